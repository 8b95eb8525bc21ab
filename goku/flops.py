"""The only count of FLOPs and of model FLOPs utilisation (MFU).

Counted are the matrix products of the model as packed: attention from sum(len_i^2), not from the
square of the sum. A training step is 3 forwards (backward = 2x forward: the gradients of both
factors) less the gradients that nobody asks for, those of the data: noised latents, text embeddings
and timestep features. Recomputation is never counted, and neither are norms, activations, rotations
and the arithmetic of modulation, which are under a percent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch

# Dense bf16 peaks in FLOP/s from NVIDIA's data sheets, by a part of the device's name.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


class ModelShape(Protocol):
    """The numbers that decide the FLOPs; `goku.model.ModelConfig` has them."""

    @property
    def dim(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def patch_dim(self) -> int: ...
    @property
    def condition_dim(self) -> int: ...
    @property
    def time_channels(self) -> int: ...


def block_flops(shape: ModelShape, lengths: Sequence[int], text_lengths: Sequence[int]) -> int:
    """Forward FLOPs of one block on a packed batch.

    Args:
        shape: the model's numbers.
        lengths: tokens of every sample.
        text_lengths: text tokens of every sample.

    Raises:
        ValueError: the two lists have different lengths.
    """
    if len(lengths) != len(text_lengths):
        raise ValueError(
            f"text_lengths has {len(text_lengths)} entries: lengths has {len(lengths)} samples"
        )
    dim, tokens, text = shape.dim, sum(lengths), sum(text_lengths)
    per_token = 4 * dim + 2 * dim + 2 * shape.mlp_dim  # q, k, v, o; cross q, o; FFN
    linears = tokens * dim * per_token + text * shape.text_dim * 2 * dim
    modulation = len(lengths) * dim * 6 * dim
    pairs = sum(n * (n + s) for n, s in zip(lengths, text_lengths, strict=True))
    # A product of (m, k) and (k, n) is 2mkn; attention has two of them per pair of tokens.
    return 2 * (linears + modulation) + 4 * dim * pairs


def model_flops(shape: ModelShape, lengths: Sequence[int], text_lengths: Sequence[int]) -> int:
    """Forward FLOPs of the whole transformer on a packed batch; arguments as in `block_flops`."""
    dim, samples = shape.dim, len(lengths)
    embed_and_head = 2 * sum(lengths) * shape.patch_dim * dim
    embed_and_head += _condition_products(shape, sum(lengths))
    per_sample = shape.time_channels * dim + dim * dim + 2 * dim * dim  # time MLP, final adaLN
    blocks = shape.depth * block_flops(shape, lengths, text_lengths)
    return blocks + 2 * (embed_and_head + samples * per_sample)


def training_flops(shape: ModelShape, lengths: Sequence[int], text_lengths: Sequence[int]) -> int:
    """FLOPs of forward and backward of the whole transformer; arguments as in `block_flops`.

    3 forwards less the gradients of the latents in the patch embedding and of given frames, of the
    timestep features in the time MLP and of the text in every block.
    """
    unasked = sum(lengths) * shape.patch_dim * shape.dim
    if shape.condition_dim:
        unasked += sum(lengths) * (shape.patch_dim + shape.condition_dim) * shape.dim
    unasked += len(lengths) * shape.time_channels * shape.dim
    text = shape.depth * _text_gradient_flops(shape, text_lengths)
    return 3 * model_flops(shape, lengths, text_lengths) - 2 * unasked - text


def block_training_flops(
    shape: ModelShape, lengths: Sequence[int], text_lengths: Sequence[int]
) -> int:
    """FLOPs of forward and backward of one block in training; arguments as in `block_flops`.

    3 forwards less the gradient of the text; those of the tokens and of the conditioning go on to
    the layers before.
    """
    forward = block_flops(shape, lengths, text_lengths)
    return 3 * forward - _text_gradient_flops(shape, text_lengths)


def _condition_products(shape: ModelShape, tokens: int) -> int:
    """Multiplications of the MLP through which given frames enter; 0 for a model without it."""
    if not shape.condition_dim:
        return 0
    return tokens * shape.dim * (shape.patch_dim + shape.condition_dim + shape.dim)


def _text_gradient_flops(shape: ModelShape, text_lengths: Sequence[int]) -> int:
    """What one block's gradient of the text would take, through the k and v projections."""
    return 2 * sum(text_lengths) * shape.text_dim * 2 * shape.dim


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Share of the hardware's peak that `flops` in `seconds` make: flops / (seconds * peak).

    Args:
        flops: of all the work that `peak` covers.
        seconds: wall clock, over 0.
        peak: FLOP/s of all devices together, over 0: `peak_flops` times their number.

    Raises:
        ValueError: `seconds` or `peak` is not over 0.
    """
    for name, value in (("seconds", seconds), ("peak", peak)):
        if not value > 0:
            raise ValueError(f"{name} is {value!r}: allowed are numbers > 0")
    return flops / (seconds * peak)


def peak_flops(
    device: torch.device | str, dtype: torch.dtype = torch.float32, *, probe_seconds: float = 0.3
) -> float | None:
    """Peak FLOP/s of one device: NVIDIA's dense bf16 figure, or for a CPU a measured one.

    Args:
        device: a CUDA device of the table (H100, H200, A100, B200), or the CPU.
        dtype: what the CPU probe multiplies in (the table is bf16 whatever it says).
        probe_seconds: how long the CPU probe may take.

    Returns:
        FLOP/s, or None where no figure is known: then there is no MFU to report.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return measured_flops(device, dtype, seconds=probe_seconds)
    if device.type != "cuda":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of the NVIDIA device called `name`, None if it is not in the table.

    The figures are of the SXM parts; a PCIe or NVL one, whose peak is lower, is not in the table.
    """
    if "PCIe" in name or "NVL" in name:
        return None
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def measured_flops(
    device: torch.device, dtype: torch.dtype, *, size: int = 768, seconds: float = 0.3
) -> float:
    """FLOP/s of square matrix products measured for `seconds`: the fastest of them, as a ceiling.

    Uses random operands (zeros would draw less power) from a generator of its own.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    _synchronise(device)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    torch.mm(a, b)  # the first call sets up the library
    while not times or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
