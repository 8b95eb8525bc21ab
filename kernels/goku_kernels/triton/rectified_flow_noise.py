"""The kernel of rectified_flow_noise: one pass, x1 read once, x_t and target written once.

A program handles GROUPS groups of consecutive elements of one row each: of 4, one block of Philox,
where a row is a multiple of 4 long (so that groups and blocks coincide), else of 1.

Time per element, in cycles of one SM of an H100 (132 of 1.75 GHz, 3 TB/s reached), estimated: the
traffic takes 0.93 for float32 data (12 bytes) and 0.62 for bf16 (8 bytes). The compiled code has
about 45 float64 instructions, 0.70 at 64 lanes, and about 140 of all kinds, 1.1 at 128 issued: the
exact bits cost about as much as the traffic of float32 data, and 1.8 times that of bf16. Chips of
few float64 lanes (sm_86, sm_89, sm_103, sm_120: 2 per SM) take some 22 cycles.

Letters in shapes: T tokens, B samples, d channels of a token (D in the kernel).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import config
from .launch import Launcher, alignment
from .philox import normals, words
from .segments import samples_of

OP = "rectified_flow_noise"


@triton.jit(
    do_not_specialize=[
        "T", "B", "token_offset", "x1_stride", "seed_low", "seed_high", "purpose",
    ]
)  # fmt: skip
def noise_kernel(
    x1, t, stream_index, cu_seqlens, x_t, target,
    T: tl.int64, B: tl.int32, token_offset: tl.int64, x1_stride: tl.int64,
    seed_low: tl.int64, seed_high: tl.int64, purpose: tl.int64,
    D: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of GROUP elements: the groups of all rows, end to end, are dealt out in runs."""
    PER_ROW: tl.constexpr = D // GROUP
    start = tl.program_id(0).to(tl.int64) * GROUPS
    first_row = start // PER_ROW
    # Within the program 32 bits suffice, and dividing by a constant is a multiplication.
    group = (start - first_row * PER_ROW).to(tl.int32) + tl.arange(0, GROUPS)
    row = first_row + group // PER_ROW
    column = group % PER_ROW * GROUP

    last = token_offset + tl.minimum(first_row + (GROUPS + PER_ROW - 2) // PER_ROW, T - 1)
    sample = samples_of(cu_seqlens, B, token_offset + row, token_offset + first_row, last)

    inside = (row < T) & (sample < B)
    begin = tl.load(cu_seqlens + sample, mask=inside, other=0)
    stream = tl.load(stream_index + sample, mask=inside, other=0)
    time = tl.load(t + sample, mask=inside, other=0.0)
    noise_share = (1.0 - time).to(tl.float32)  # before t is rounded
    data_share = time.to(tl.float32)

    # The bits of the seed's and the stream's words, whatever their signs are.
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    element = (token_offset + row - begin) * D + column
    block = (element >> 2).to(tl.uint32)
    c1 = tl.full((GROUPS,), 0, tl.uint32) + purpose.to(tl.uint32)
    low, high = stream.to(tl.uint32), (stream >> 32).to(tl.uint32)
    w0, w1, w2, w3 = words(block, c1, low, high, k0, k1)
    if GROUP == 4:
        a, b = normals(w0, w1)
        c, d = normals(w2, w3)
        # Joined axes come last: (a, c), (b, d) -> a, b, c, d.
        x0 = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (GROUPS, 4))
    else:
        second = (element & 2) == 2
        a, b = normals(tl.where(second, w2, w0), tl.where(second, w3, w1))
        x0 = tl.where((element & 1) == 1, b, a)[:, None]

    step = tl.arange(0, GROUP)[None, :]
    mask = inside[:, None] & (step < GROUP)
    at = (row * (x1_stride * ALIGN) + column)[:, None] + step
    x = tl.load(x1 + at, mask=mask, other=0.0).to(tl.float32)
    mixed = data_share[:, None] * x + noise_share[:, None] * x0
    out = (row * D + column)[:, None] + step
    stored = (row < T)[:, None] & (step < GROUP)
    tl.store(x_t + out, tl.where(mask, mixed, 0.0).to(x_t.dtype.element_ty), mask=stored)
    tl.store(target + out, tl.where(mask, x - x0, 0.0), mask=stored)


def forward(
    x1: Tensor, t: Tensor, stream_index: Tensor, cu_seqlens: Tensor, seed_low: int, seed_high: int,
    purpose: int, token_offset: int, *, run: Launcher,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x_t, target); arguments as those of the operator."""
    tokens, width = x1.shape
    x_t = x1.new_empty((tokens, width))
    target = x1.new_empty((tokens, width), dtype=torch.float32)
    if width == 0:
        return x_t, target
    found = config(OP, "forward", width, x1.dtype, run.chip)
    align = alignment(x1)
    group = 4 if width % 4 == 0 else 1
    run(
        noise_kernel,
        (triton.cdiv(tokens * (width // group), found["groups"]),),
        {
            "x1": x1, "t": t, "stream_index": stream_index, "cu_seqlens": cu_seqlens, "x_t": x_t,
            "target": target, "T": tokens, "B": cu_seqlens.shape[0] - 1,
            "token_offset": token_offset, "x1_stride": x1.stride(0) // align,
            "seed_low": seed_low, "seed_high": seed_high, "purpose": purpose,
            "D": width, "GROUP": group, "GROUPS": found["groups"], "ALIGN": align,
        },
        num_warps=found["num_warps"],
        # The bits of the eager code: see philox.py.
        enable_fp_fusion=False,
    )  # fmt: skip
    return x_t, target


def shipped(chip: int) -> Iterator[tuple[str, Callable[[Launcher], object]]]:
    """Every shipped configuration: (name, what runs its kernel on meta tensors).

    Goku's tokens (16 latent channels, patch 1 x 2 x 2), and a width that is no multiple of 4.
    """
    for width, dtype, time in (
        (64, torch.bfloat16, torch.float32),
        (64, torch.float32, torch.float32),
        (64, torch.float32, torch.float64),
        (27, torch.float32, torch.float32),
    ):
        name = f"{width} {str(dtype).removeprefix('torch.')}, t {str(time).removeprefix('torch.')}"
        yield name, partial(_record, width, dtype, time)


def _record(width: int, dtype: torch.dtype, time: torch.dtype, run: Launcher) -> None:
    x1 = torch.empty((4096, width), dtype=dtype, device="meta")
    t = torch.empty(3, dtype=time, device="meta")
    stream = torch.empty(3, dtype=torch.int64, device="meta")
    cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
    forward(x1, t, stream, cu_seqlens, 1, 2, 0, 0, run=run)
