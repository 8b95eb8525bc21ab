"""rectified_flow_noise: draw each sample's noise, mix it with the data, and form the target.

Letters in shapes: T tokens, B samples, d channels of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks as check
from . import philox
from .reference import segments, without_autocast, zero_padding

_OP = "rectified_flow_noise"
_BACKENDS = ("torch", "triton")
_LARGEST_WIDTH = 8192  # of triton/configs/rectified_flow_noise.json


def rectified_flow_noise(
    x1: Tensor,
    t: Tensor,
    stream_index: Tensor,
    cu_seqlens: Tensor,
    *,
    seed: int,
    purpose: int = 0,
    token_offset: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x_t = t x1 + (1 - t) x0 and the velocity x1 - x0, x0 being the noise of each sample's stream.

    t = 0 is noise and t = 1 is data (Goku, arXiv 2502.04896). Element (row, column) of sample b
    takes normal number (row - cu_seqlens[b]) * d + column of the stream (seed, purpose,
    stream_index[b]) of `goku_kernels.philox`, rounded to float32: a number depends neither on the packing
    nor on the shard. Computed in promote(x1's dtype, float32), 1 - t before t is rounded. Both
    backends use the same correctly rounded operations in the same order, so that they give the same
    bits. Rows at or past cu_seqlens[-1] are padding: zero in both outputs.

    This makes training data, so there is no gradient: arguments that require one are refused.

    Args:
        x1: (T, d) data, floating, unit inner stride.
        t: (B,) float32 or float64 times.
        stream_index: int64 (B,), the bits of the unsigned 64-bit stream index of each sample.
        cu_seqlens: int32 (B+1,), global offsets of the samples; each of at most 2^34 elements.
        seed: in [0, 2^64).
        purpose: counter word 1, in [0, 2^32): numbers for other things are others
            (goku itself numbers them in goku.random.Purpose).
        token_offset: global row of x1's first token (a shard may begin inside a sample).
        backend: None, "torch" or "triton".

    Returns:
        x_t (T, d) of x1's dtype; target (T, d) of promote(x1's dtype, float32).

    Raises:
        ValueError: an argument of wrong dtype, shape, device, stride or value, or that requires a
            gradient (outside torch.no_grad).
        RuntimeError: a backend that this installation does not have.
    """
    check.check_dense(_OP, "x1", x1, (None, None))
    refusal = None
    if x1.dtype == torch.float64:
        refusal = "x1 has dtype torch.float64: the Triton kernel computes in float32"
    elif not 0 < x1.shape[1] <= _LARGEST_WIDTH:
        refusal = check.width_refusal("x1", x1, _LARGEST_WIDTH)
    check.check_cu_seqlens(_OP, "cu_seqlens", cu_seqlens, x1.device)
    check.check_count(_OP, "token_offset", token_offset)
    batch = cu_seqlens.shape[0] - 1
    allowed: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    for name, x, dtypes in (("t", t, allowed), ("stream_index", stream_index, (torch.int64,))):
        check.check_tensor(_OP, name, x)
        if x.dtype not in dtypes:
            raise ValueError(f"{_OP}: {name} has dtype {x.dtype}: allowed are {list(dtypes)}")
        check.check_shape(_OP, name, x, (batch,))
        check.check_device(_OP, name, x, x1.device)
        if not x.is_contiguous():
            raise ValueError(f"{_OP}: {name} has stride {x.stride()}: it must be contiguous")
    for name, value, bits in (("seed", seed, 64), ("purpose", purpose, 32)):
        whole = isinstance(value, int | torch.SymInt) and not isinstance(value, bool)
        if not whole or not 0 <= value < 1 << bits:
            raise ValueError(f"{_OP}: {name} is {value}: allowed are integers in [0, 2^{bits})")
    if torch.is_grad_enabled():
        for name, x in (("x1", x1), ("t", t)):
            if x.requires_grad:
                raise ValueError(
                    f"{_OP}: {name} requires a gradient: noised data have none, detach it"
                )
    if check.readable(cu_seqlens):
        longest = int(cu_seqlens.diff().max()) * x1.shape[1]
        if longest > philox.MAX_ELEMENTS:
            raise ValueError(
                f"{_OP}: cu_seqlens and x1 give a sample {longest} elements: at most 2^34"
            )
    low, high = philox.split64(seed, "seed")
    if check.choose_backend(_OP, backend, _BACKENDS, x1, refusal) == "triton":
        return _noise(x1, t, stream_index, cu_seqlens, low, high, purpose, token_offset)
    return reference(x1, t, stream_index, cu_seqlens, (low, high), purpose, token_offset)


@torch.library.custom_op("goku_kernels::rectified_flow_noise", mutates_args=())
def _noise(
    x1: Tensor, t: Tensor, stream_index: Tensor, cu_seqlens: Tensor, seed_low: int, seed_high: int,
    purpose: int, token_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from .triton import rectified_flow_noise as kernels
    from .triton.launch import launcher

    return kernels.forward(
        x1, t, stream_index, cu_seqlens, seed_low, seed_high, purpose, token_offset,
        run=launcher(x1),
    )  # fmt: skip


@_noise.register_fake
def _(
    x1: Tensor, t: Tensor, stream_index: Tensor, cu_seqlens: Tensor, seed_low: int, seed_high: int,
    purpose: int, token_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x1.new_empty(x1.shape), x1.new_empty(x1.shape, dtype=check.compute_dtype(x1))


def reference(
    x1: Tensor, t: Tensor, stream_index: Tensor, cu_seqlens: Tensor, seed: tuple[int, int],
    purpose: int, token_offset: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator in eager PyTorch, for checked arguments: its specification."""
    with without_autocast(x1):
        segment, inside = segments(cu_seqlens, x1.shape[0], token_offset)
        rows_T = torch.arange(token_offset, token_offset + x1.shape[0], device=x1.device)
        token_T = rows_T - cu_seqlens.index_select(0, segment)
        stream_T = stream_index.index_select(0, segment)
        x0 = _noise_of_rows(token_T, stream_T, x1.shape[1], seed, purpose)
        x_t = path(x1, x0, t.index_select(0, segment)[:, None])
        return zero_padding(x_t, inside), zero_padding(velocity(x1, x0), inside)


def path(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """t x1 + (1 - t) x0 in promote(x1's dtype, float32), in x1's dtype; `t` broadcasts."""
    dtype = check.compute_dtype(x1)
    noise_share = (1.0 - t).to(dtype)  # before t is rounded: t near 1 keeps its digits
    return (t.to(dtype) * x1.to(dtype) + noise_share * x0.to(dtype)).to(x1.dtype)


def velocity(x1: Tensor, x0: Tensor) -> Tensor:
    """x1 - x0 in promote(x1's dtype, float32)."""
    dtype = check.compute_dtype(x1)
    return x1.to(dtype) - x0.to(dtype)


def _noise_of_rows(
    token: Tensor, stream: Tensor, width: int, key: tuple[int, int], purpose: int
) -> Tensor:
    """Normals of each row: float32 (T, width), for its place in its sample and its stream, (T,)."""
    x0 = torch.empty((token.shape[0], width), dtype=torch.float32, device=token.device)
    # Blocks of 4 that a row meets: its first element need not begin one.
    blocks = width // 4 if width % 4 == 0 else (width + 6) // 4
    rows = max(1, philox.blocks_per_pass(token.device) // max(1, blocks))
    within = torch.arange(blocks, device=token.device)
    column = torch.arange(width, device=token.device)
    for first in range(0, token.shape[0], rows):
        part = slice(first, first + rows)
        element = token[part, None] * width
        # & MASK32: a padding row may lie past the last number of its stream; it is zeroed later.
        block = ((element >> 2) + within) & philox.MASK32
        low, high = (
            words[:, None].expand_as(block).reshape(-1)
            for words in (stream[part] & philox.MASK32, (stream[part] >> 32) & philox.MASK32)
        )
        values = philox.block_normals(block.reshape(-1), purpose, low, high, key)
        values = values.float().view(block.shape[0], 4 * blocks)
        if width % 4:
            values = values.gather(1, (element & 3) + column)
        x0[part] = values
    return x0


def rectified_flow_noise_flops(tokens: int, dim: int) -> int:
    """Arithmetic of one call: 77 per pair of elements, of which 69 are float64 ones of Box-Muller.

    27 for the logarithm, 1 root, 39 for cosine and sine, 2 products; a division and a root count
    one each, although a GPU takes about ten instructions for either. The integer work of Philox (20
    products of 32 bits per 4 elements) is left out.
    """
    return tokens * dim * 77 // 2


def rectified_flow_noise_bytes(tokens: int, dim: int, *, itemsize: int) -> int:
    """Least memory traffic of one call in bytes: x1 read, x_t and the target written once."""
    return tokens * dim * (2 * itemsize + max(itemsize, 4))
