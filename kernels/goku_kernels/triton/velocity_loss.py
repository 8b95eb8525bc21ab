"""The kernels of velocity_loss: sums of squares per sample in two stages, and the gradient.

Letters in shapes: T tokens, B samples, d channels of a token (D in the kernels).

Program p of the first stage handles rows [p ROWS, (p + 1) ROWS) and leaves its sum for sample s in
slot p + s. Along the rows p and s only grow, so that no two sums share a slot, and P + B slots
suffice for P programs. The second stage adds each sample's slots in order: no atomics, and the
division of the work depends on T and the configuration alone.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import Launcher, alignment
from .segments import sample_of, samples_of

OP = "velocity_loss"


@triton.jit(
    do_not_specialize=["T", "B", "token_offset", "prediction_stride", "target_stride"]
)  # fmt: skip
def sums_kernel(
    prediction, target, cu_seqlens, sums,
    T: tl.int64, B: tl.int32, token_offset: tl.int64,
    prediction_stride: tl.int64, target_stride: tl.int64,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """First stage: the sum of squares of each sample's rows among ROWS, in slot program + sample."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    place = token_offset + row
    first = token_offset + program * ROWS
    last = token_offset + tl.minimum(program * ROWS + ROWS, T) - 1

    # Padding rows are read too: what they hold is in nobody's rows below.
    mask = (row < T)[:, None] & (column < D)
    p = tl.load(
        prediction + (row * (prediction_stride * ALIGN))[:, None] + column, mask=mask, other=0.0
    ).to(tl.float32)
    q = tl.load(
        target + (row * (target_stride * ALIGN))[:, None] + column, mask=mask, other=0.0
    ).to(tl.float32)
    error = p - q
    # A row in float32, rows in float64: one addition in D is a slow one.
    squares = tl.sum(error * error, axis=1).to(tl.float64)

    sample = sample_of(cu_seqlens, B, first)
    begin = first
    while (begin <= last) & (sample < B):
        end = tl.load(cu_seqlens + 1 + sample)
        if end > begin:
            mine = (place >= begin) & (place < end)
            tl.store(sums + program + sample, tl.sum(tl.where(mine, squares, 0.0), axis=0))
            begin = end.to(tl.int64)
        sample += 1


@triton.jit(do_not_specialize=["T", "token_offset"])
def means_kernel(
    sums, cu_seqlens, per_sample, T: tl.int64, token_offset: tl.int64,
    D: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Second stage: one program per sample adds its slots and divides by its whole size."""
    sample = tl.program_id(0)
    begin = tl.load(cu_seqlens + sample).to(tl.int64)
    end = tl.load(cu_seqlens + sample + 1).to(tl.int64)
    count = end - begin
    # The part of the sample that these rows hold.
    begin = tl.maximum(begin - token_offset, 0)
    end = tl.minimum(end - token_offset, T)
    slot = begin // ROWS
    stop = (end + ROWS - 1) // ROWS
    if end <= begin:
        stop = slot
    added = tl.zeros((SLOTS,), tl.float64)
    while slot < stop:
        i = slot + tl.arange(0, SLOTS)
        added += tl.load(sums + i + sample, mask=i < stop, other=0.0)
        slot += SLOTS
    divisor = (tl.maximum(count, 1) * D).to(tl.float64)
    tl.store(per_sample + sample, (tl.sum(added, axis=0) / divisor).to(tl.float32))


@triton.jit(
    do_not_specialize=["T", "B", "token_offset", "prediction_stride", "target_stride"]
)  # fmt: skip
def gradient_kernel(
    gradient, prediction, target, cu_seqlens, result,
    T: tl.int64, B: tl.int32, token_offset: tl.int64,
    prediction_stride: tl.int64, target_stride: tl.int64,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """2 (prediction - target) / (tokens * channels) times the gradient of each row's sample."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    row = start + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    last = token_offset + tl.minimum(start + ROWS, T) - 1

    sample = samples_of(cu_seqlens, B, token_offset + row, token_offset + start, last)

    inside = (row < T) & (sample < B)
    begin = tl.load(cu_seqlens + sample, mask=inside, other=0)
    end_of = tl.load(cu_seqlens + sample + 1, mask=inside, other=1)
    g = tl.load(gradient + sample, mask=inside, other=0.0).to(tl.float32)
    # In int64: tokens times channels pass 2^31.
    count = ((end_of - begin).to(tl.int64) * D).to(tl.float32)
    factor = tl.div_rn(2.0 * g, count)

    mask = inside[:, None] & (column < D)
    p = tl.load(
        prediction + (row * (prediction_stride * ALIGN))[:, None] + column, mask=mask, other=0.0
    ).to(tl.float32)
    q = tl.load(
        target + (row * (target_stride * ALIGN))[:, None] + column, mask=mask, other=0.0
    ).to(tl.float32)
    # A padding row's p, q and factor are 0.
    value = (p - q) * factor[:, None]
    tl.store(
        result + (row * D)[:, None] + column, value.to(result.dtype.element_ty),
        mask=(row < T)[:, None] & (column < D),
    )  # fmt: skip


def _constants(x: Tensor, rows: int) -> dict[str, int]:
    return {"D": x.shape[1], "BLOCK": triton.next_power_of_2(x.shape[1]), "ROWS": rows}


def forward(
    prediction: Tensor, target: Tensor, cu_seqlens: Tensor, token_offset: int, *, run: Launcher
) -> Tensor:
    """per_sample, float32 (B,); arguments as those of the operator."""
    tokens, width = prediction.shape
    batch = cu_seqlens.shape[0] - 1
    if width == 0 or tokens == 0:
        return prediction.new_zeros(batch, dtype=torch.float32)
    found = config(OP, "forward", width, prediction.dtype, run.chip)
    programs = triton.cdiv(tokens, found["rows"])
    sums = prediction.new_empty(programs + batch, dtype=torch.float64)
    per_sample = prediction.new_empty(batch, dtype=torch.float32)
    align = alignment(prediction, target)
    run(
        sums_kernel,
        (programs,),
        {
            "prediction": prediction, "target": target, "cu_seqlens": cu_seqlens, "sums": sums,
            "T": tokens, "B": batch, "token_offset": token_offset,
            "prediction_stride": prediction.stride(0) // align,
            "target_stride": target.stride(0) // align,
            **_constants(prediction, found["rows"]), "ALIGN": align,
        },
        num_warps=found["num_warps"],
    )  # fmt: skip
    run(
        means_kernel,
        (batch,),
        {
            "sums": sums, "cu_seqlens": cu_seqlens, "per_sample": per_sample, "T": tokens,
            "token_offset": token_offset, "D": width, "ROWS": found["rows"],
            "SLOTS": found["slots"],
        },
        num_warps=found["num_warps"],
    )  # fmt: skip
    return per_sample


def backward(
    gradient: Tensor, prediction: Tensor, target: Tensor, cu_seqlens: Tensor, token_offset: int, *,
    run: Launcher,
) -> Tensor:  # fmt: skip
    """The gradient of `prediction`, (T, d) of its dtype, from that of per_sample, (B,)."""
    tokens, width = prediction.shape
    result = prediction.new_empty((tokens, width))
    if width == 0:
        return result
    found = config(OP, "backward", width, prediction.dtype, run.chip)
    align = alignment(prediction, target)
    run(
        gradient_kernel,
        (triton.cdiv(tokens, found["rows"]),),
        {
            # Expanded where it is that of a sum; (B,) is small.
            "gradient": gradient.contiguous(), "prediction": prediction, "target": target,
            "cu_seqlens": cu_seqlens, "result": result, "T": tokens,
            "B": cu_seqlens.shape[0] - 1, "token_offset": token_offset,
            "prediction_stride": prediction.stride(0) // align,
            "target_stride": target.stride(0) // align,
            **_constants(prediction, found["rows"]), "ALIGN": align,
        },
        num_warps=found["num_warps"],
    )  # fmt: skip
    return result


def shipped(chip: int) -> Iterator[tuple[str, Callable[[Launcher], object]]]:
    """Every shipped configuration: (name, what runs its kernels on meta tensors).

    Goku's tokens (16 latent channels, patch 1 x 2 x 2; 512 for a patch of 1 x 4 x 4 of 32
    channels), with the prediction in bf16 and in fp32, and an unaligned width.
    """
    for width, dtype in (
        (64, torch.bfloat16),
        (64, torch.float32),
        (512, torch.bfloat16),
        (27, torch.float32),
    ):
        yield f"{width} {str(dtype).removeprefix('torch.')}", partial(_record, width, dtype)


def _record(width: int, dtype: torch.dtype, run: Launcher) -> None:
    prediction = torch.empty((4096, width), dtype=dtype, device="meta")
    target = torch.empty((4096, width), device="meta")
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    gradient = torch.empty(3, device="meta")
    forward(prediction, target, cu_seqlens, 0, run=run)
    backward(gradient, prediction, target, cu_seqlens, 0, run=run)
