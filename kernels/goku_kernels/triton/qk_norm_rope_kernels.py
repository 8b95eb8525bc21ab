"""Kernels of qk_norm_rope: one pass over q and k, forward and backward.

A program walks a run of consecutive tokens of q or of k, sample by sample. For each token it finds
the place (t, h, w) from the sample's grid and makes the cosines and sines of the channel pairs, for
all heads. A token's heads and channels are one tile in registers, padded to powers of two. Each
program has one of q and k, not both: their gains, and sums of gradients of gains, would take twice
the registers, and larger tiles a thread save more than sines shared by q and k would.

Everything is computed in fp32, angles in fp64 (rotation.py). Rows are rows of q or k, global rows
those plus token_offset. Letters in shapes: T tokens, B samples, H heads, D head_dim, P = D/2
channel pairs.
"""

import triton
import triton.language as tl

from .rotation import (
    axis_of_pair,
    cos_sin,
    load_pairs,
    pair_offsets,
    quarter_turns_per_step,
    store_pairs,
)
from .segments import sample_of


@triton.jit
def _three(pointer, index):
    """Row `index` of `pointer` (.., 3) as fp64 numbers."""
    row = pointer + index * 3
    return (
        tl.load(row).to(tl.float64),
        tl.load(row + 1).to(tl.float64),
        tl.load(row + 2).to(tl.float64),
    )


@triton.jit
def _place(index, height, width):
    """(t, h, w), fp64, of the token that is `index` in a sample, in row-major order."""
    i = index.to(tl.int32)
    line = i // width
    t = line // height
    return t.to(tl.float64), (line - t * height).to(tl.float64), (i - line * width).to(tl.float64)


@triton.jit
def _mean(x0, x1, COUNT: tl.constexpr, NORM: tl.constexpr):
    """Mean of pairs over the channels that are normed together: a number, "head": (H, 1)."""
    if NORM == "full":
        return tl.sum(x0 + x1) * (1.0 / COUNT)
    else:
        return tl.sum(x0 + x1, axis=1)[:, None] * (1.0 / COUNT)


@triton.jit
def _forward(
    x0, x1, gain0, gain1, cos, sin,
    COUNT: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """The pairs x of one token, normed and turned."""
    if NORM != "none":
        scale = tl.rsqrt(_mean(x0 * x0, x1 * x1, COUNT, NORM) + EPS)
        x0, x1 = x0 * gain0, x1 * gain1
        if ROTATE:
            # For "full" a product for each pair of channels, not for each element.
            cos, sin = cos * scale, sin * scale
        else:
            x0, x1 = x0 * scale, x1 * scale
    if ROTATE:
        return x0 * cos - x1 * sin, x1 * cos + x0 * sin
    else:
        return x0, x1


@triton.jit
def _backward(
    g0, g1, x0, x1, gain0, gain1, cos, sin,
    COUNT: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Gradient of one token's pairs, and what it adds to the gradient of the gain.

    With s = (mean(x^2) + eps)^(-1/2) and u the gradient g turned back, times s: dgain = u * x and
    dx = u * gain - x * s^2 * mean(u * gain * x).
    """
    if NORM != "none":
        scale = tl.rsqrt(_mean(x0 * x0, x1 * x1, COUNT, NORM) + EPS)
        if ROTATE:
            cos, sin = cos * scale, sin * scale
        else:
            g0, g1 = g0 * scale, g1 * scale
    if ROTATE:
        u0 = g0 * cos + g1 * sin
        u1 = g1 * cos - g0 * sin
    else:
        u0, u1 = g0, g1
    if NORM == "none":
        return u0, u1, u0, u1
    else:
        d0, d1 = u0 * gain0, u1 * gain1
        slope = _mean(d0 * x0, d1 * x1, COUNT, NORM) * scale * scale
        return d0 - x0 * slope, d1 - x1 * slope, u0 * x0, u1 * x1


@triton.jit
def _walk(
    program, T, rows, x, row_stride, head_stride, grad, grad_row, grad_head, weight, out, partial,
    cu_seqlens, grid_sizes, positions, position_offset, position_scale, B, token_offset,
    offset_step, scale_step,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, AXES: tl.constexpr,
    RUN: tl.constexpr, ROTATE: tl.constexpr, LOG2_THETA: tl.constexpr, EPS: tl.constexpr,
    NORM: tl.constexpr, HALF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What rows_kernel does, for q or for k; program counts from 0 in each."""
    head_dim: tl.constexpr = AXES[0] + AXES[1] + AXES[2]
    width: tl.constexpr = HEADS * head_dim
    # "head" has one gain for all heads.
    gain_heads: tl.constexpr = 1 if NORM == "head" else HEADS
    gain_block: tl.constexpr = 1 if NORM == "head" else BLOCK_H
    count: tl.constexpr = gain_heads * head_dim  # channels normed together, and of the gain
    read = pair_offsets(head_stride, BLOCK_H, BLOCK_D, HEADS, AXES, HALF, RUN)
    read_grad = pair_offsets(grad_head, BLOCK_H, BLOCK_D, HEADS, AXES, HALF, RUN)
    write = pair_offsets(head_dim, BLOCK_H, BLOCK_D, HEADS, AXES, HALF, RUN)
    gains = pair_offsets(head_dim, gain_block, BLOCK_D, gain_heads, AXES, HALF, RUN)
    gain0 = tl.full((1, BLOCK_D // 2), 1.0, tl.float32)
    gain1 = gain0
    if weight is not None:
        gain0, gain1 = load_pairs(weight, gains, HALF)
    sum0 = tl.zeros((BLOCK_H, BLOCK_D // 2), tl.float32)
    sum1 = tl.zeros((BLOCK_H, BLOCK_D // 2), tl.float32)

    row = program.to(tl.int64) * rows
    last = tl.minimum(row + rows, T)
    stop = last  # rows from here on are padding
    sample = tl.zeros((), tl.int32)
    if ROTATE:
        turns = quarter_turns_per_step(BLOCK_D // 2, AXES, LOG2_THETA)
        axis, _, _ = axis_of_pair(BLOCK_D // 2, AXES)
        stop = tl.minimum(last, tl.load(cu_seqlens + B) - token_offset)
        stop = tl.maximum(row, stop)
        if positions is None:
            sample = sample_of(cu_seqlens, B, row + token_offset)
    padding = stop

    while row < stop:
        end = stop
        if ROTATE and positions is None:
            begin = tl.load(cu_seqlens + sample) - token_offset
            end = tl.minimum(stop, tl.load(cu_seqlens + sample + 1) - token_offset)
            lines = tl.load(grid_sizes + 3 * sample + 1)
            columns = tl.load(grid_sizes + 3 * sample + 2)
            if position_scale is not None:
                scale_t, scale_h, scale_w = _three(position_scale, sample * scale_step)
            if position_offset is not None:
                offset_t, offset_h, offset_w = _three(position_offset, sample * offset_step)
        for r in tl.range(row, end, num_stages=STAGES):
            x0, x1 = load_pairs(x + r * row_stride, read, HALF)
            cos, sin = 1.0, 0.0
            if ROTATE:
                if positions is None:
                    t, h, w = _place(r - begin, lines, columns)
                    if position_scale is not None:
                        t, h, w = t * scale_t, h * scale_h, w * scale_w
                    if position_offset is not None:
                        t, h, w = t + offset_t, h + offset_h, w + offset_w
                else:
                    t, h, w = _three(positions, r)
                cos, sin = cos_sin(t, h, w, turns, axis)
                cos, sin = cos[None, :], sin[None, :]
            if grad is None:
                y0, y1 = _forward(x0, x1, gain0, gain1, cos, sin, count, NORM, EPS, ROTATE)
            else:
                g0, g1 = load_pairs(grad + r * grad_row, read_grad, HALF)
                y0, y1, s0, s1 = _backward(
                    g0, g1, x0, x1, gain0, gain1, cos, sin, count, NORM, EPS, ROTATE
                )
                if partial is not None:
                    sum0 += s0
                    sum1 += s1
            store_pairs(out + r * width, write, y0, y1, HALF)
        row = end
        sample += 1

    if ROTATE:
        channel = tl.arange(0, BLOCK_H * BLOCK_D)
        zero = tl.zeros((BLOCK_H * BLOCK_D,), out.dtype.element_ty)
        for r in range(padding, last):
            tl.store(out + r * width + channel, zero, mask=channel < width)
    if partial is not None:
        if NORM == "head":
            sum0 = tl.sum(sum0, axis=0)[None, :]
            sum1 = tl.sum(sum1, axis=0)[None, :]
        store_pairs(partial + program.to(tl.int64) * count, gains, sum0, sum1, HALF)


@triton.jit(
    do_not_specialize=[
        "q_programs", "q_T", "k_T", "q_rows", "k_rows", "B", "token_offset", "offset_step",
        "scale_step", "q_row", "q_head", "k_row", "k_head", "q_grad_row", "q_grad_head",
        "k_grad_row", "k_grad_head",
    ]
)  # fmt: skip
def rows_kernel(
    q, k, q_grad, k_grad, q_weight, k_weight, q_out, k_out, q_partial, k_partial,
    cu_seqlens, grid_sizes, positions, position_offset, position_scale,
    q_programs: tl.int32, q_T: tl.int64, k_T: tl.int64, q_rows: tl.int64, k_rows: tl.int64,
    B: tl.int32, token_offset: tl.int64, offset_step: tl.int32, scale_step: tl.int32,
    q_row: tl.int64, q_head: tl.int64, k_row: tl.int64, k_head: tl.int64,
    q_grad_row: tl.int64, q_grad_head: tl.int64, k_grad_row: tl.int64, k_grad_head: tl.int64,
    ALIGN: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, AXES: tl.constexpr, RUN: tl.constexpr,
    ROTATE_K: tl.constexpr, LOG2_THETA: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr,
    HALF: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q_out and k_out, contiguous, of rows [q_rows * p, q_rows * (p + 1)) of q or so of k.

    The first q_programs programs have q. q_grad None: the outputs are q and k, normed and turned.
    Else q_grad, k_grad are gradients of those, and the outputs are gradients of q and k; row p of
    q_partial, fp32 (programs, H*D, or D for "head"), gets program p's part of the gradient of
    q_weight, if it is not None.

    k None: q alone. Strides count ALIGN elements. offset_step, scale_step: 1 for a row per sample,
    0 for one row for all. Without ROTATE_K, k has no samples and no padding.
    """
    # In 64 bits even where the interpreter makes int32 of an argument that fits.
    unit = tl.full((), ALIGN, tl.int64)
    program = tl.program_id(0)
    if program < q_programs:
        _walk(
            program, q_T, q_rows, q, q_row * unit, q_head * unit, q_grad, q_grad_row * unit,
            q_grad_head * unit, q_weight, q_out, q_partial,
            cu_seqlens, grid_sizes, positions, position_offset, position_scale, B, token_offset,
            offset_step, scale_step,
            HEADS_Q, BLOCK_Q, BLOCK_D, AXES, RUN, True, LOG2_THETA, EPS, NORM, HALF, STAGES,
        )  # fmt: skip
    elif k is not None:
        _walk(
            program - q_programs, k_T, k_rows, k, k_row * unit, k_head * unit, k_grad,
            k_grad_row * unit, k_grad_head * unit, k_weight, k_out, k_partial,
            cu_seqlens, grid_sizes, positions, position_offset, position_scale, B, token_offset,
            offset_step, scale_step,
            HEADS_K, BLOCK_K, BLOCK_D, AXES, RUN, ROTATE_K, LOG2_THETA, EPS, NORM, HALF, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
def weight_kernel(
    partial, out, programs: tl.int32,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out (WIDTH,) = sum of partial (programs, WIDTH) over the programs, always in one order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((CHUNK, BLOCK), tl.float32)
    for begin in range(0, programs, CHUNK):
        p = (begin + tl.arange(0, CHUNK)[:, None]).to(tl.int64)
        mask = (p < programs) & (column < WIDTH)[None, :]
        total += tl.load(partial + p * WIDTH + column[None, :], mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(out + column, result.to(out.dtype.element_ty), mask=column < WIDTH)
