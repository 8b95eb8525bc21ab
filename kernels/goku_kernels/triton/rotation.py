"""Rotary embedding in registers: pairs of channels, their frequencies, sines and cosines.

Letters in shapes: H heads, D head_dim, P = D/2 channel pairs, each padded to a power of two.
"""

import triton
import triton.language as tl

# sin(pi/2 r) = r * (SIN_0 + SIN_0_LOW + SIN_1 r^2 + ...) and cos(pi/2 r) = 1 + COS_1 r^2 + ... for
# |r| <= 1/2, fitted in the maximum norm (Lawson's reweighted least squares on 4,000 Chebyshev
# points): relative error of the sine 3.1e-9, error of the cosine 5.4e-11, against half a unit in
# the last place of fp32, 6.0e-8. SIN_0 alone is a number of fp32; what its rounding left is added
# with the small terms, so that it costs nothing.
_SIN_0 = tl.constexpr(1.57079637050628662109375)
_SIN_0_LOW = tl.constexpr(-4.85396357810e-8)
_SIN_1 = tl.constexpr(-0.6459634786355936)
_SIN_2 = tl.constexpr(0.07968022800880174)
_SIN_3 = tl.constexpr(-0.0046021768414945385)
_COS_1 = tl.constexpr(-1.2337005433534636)
_COS_2 = tl.constexpr(0.25366924402936986)
_COS_3 = tl.constexpr(-0.020860288503584436)
_COS_4 = tl.constexpr(0.0009040216595956851)

_TWO_OVER_PI = tl.constexpr(0.6366197723675814)
# Adding 3 * 2^51 moves the binary point of an fp64 number below 2^51 to the end of its fraction:
# the sum is rounded to an integer, whose low bits are those of the sum.
_ROUND = tl.constexpr(6755399441055744.0)


@triton.jit
def axis_of_pair(PAIRS: tl.constexpr, AXES: tl.constexpr):
    """Axis (0, 1, 2 = t, h, w), first pair of that axis, channels of that axis: int32 (P,) each."""
    pair = tl.arange(0, PAIRS)
    first_h: tl.constexpr = AXES[0] // 2
    first_w: tl.constexpr = (AXES[0] + AXES[1]) // 2
    axis = (pair >= first_h).to(tl.int32) + (pair >= first_w).to(tl.int32)
    start = tl.where(axis == 0, 0, tl.where(axis == 1, first_h, first_w))
    size = tl.where(axis == 0, AXES[0], tl.where(axis == 1, AXES[1], AXES[2]))
    return axis, start, size


@triton.jit
def quarter_turns_per_step(PAIRS: tl.constexpr, AXES: tl.constexpr, LOG2_THETA: tl.constexpr):
    """theta^(-2i/d_axis) * 2/pi of every pair, fp64 (P,)."""
    axis, start, _ = axis_of_pair(PAIRS, AXES)
    # An empty axis has no pair, but padded pairs are counted to w: no division by 0.
    step_t: tl.constexpr = -2.0 * LOG2_THETA / (AXES[0] if AXES[0] > 0 else 2)
    step_h: tl.constexpr = -2.0 * LOG2_THETA / (AXES[1] if AXES[1] > 0 else 2)
    step_w: tl.constexpr = -2.0 * LOG2_THETA / (AXES[2] if AXES[2] > 0 else 2)
    zero = tl.zeros((PAIRS,), tl.float64)
    step = tl.where(axis == 0, zero + step_t, tl.where(axis == 1, zero + step_h, zero + step_w))
    i = (tl.arange(0, PAIRS) - start).to(tl.float64)
    return tl.exp2(i * step) * _TWO_OVER_PI


@triton.jit
def cos_sin(t, h, w, turns, axis):
    """cos and sin of position * frequency: fp32 (P,).

    t, h, w: position, fp64 scalars. turns: quarter turns per step. axis: of every pair.

    Within 8.8e-8 of the truth (4 million angles in each of +-1, +-1000, +-2^20), which is 1.5 units
    in the last place of 1; relative to the value within 2.4 units in its last place, and with
    fused multiply-adds within 1.3 up to +-1000 and 2.0 beyond, away from the zeros.

    The angle is kept in quarter turns in fp64, which brings it into [-1/2, 1/2] without the slow
    path (and local memory) that fp32 sines of large angles take, and without the 2^-24 of the angle
    that an fp32 product would be off. Three fp64 operations for a pair: a token has few pairs, so
    they cost little on A100, H100 and B200, where fp64 has half the fp32 rate; chips with 1/64 of it
    (consumer cards, B300) feel them.
    """
    position = tl.where(axis == 0, t, tl.where(axis == 1, h, w))
    angle = position * turns
    shifted = angle + _ROUND
    r = (angle - (shifted - _ROUND)).to(tl.float32)
    quadrant = shifted.to(tl.int64, bitcast=True).to(tl.int32)
    s = r * r
    sine = _SIN_0_LOW + s * (_SIN_1 + s * (_SIN_2 + s * _SIN_3))
    sine = r * _SIN_0 + r * sine
    cosine = 1.0 + s * (_COS_1 + s * (_COS_2 + s * (_COS_3 + s * _COS_4)))
    odd = (quadrant & 1) != 0
    sin = tl.where(odd, cosine, sine)
    cos = tl.where(odd, sine, cosine)
    return (
        tl.where(((quadrant + 1) & 2) != 0, -cos, cos),
        tl.where((quadrant & 2) != 0, -sin, sin),
    )


@triton.jit
def pair_offsets(
    head_stride, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
    AXES: tl.constexpr, HALF: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Where the pairs of a token lie: offsets of first and second members, and a mask.

    HALF: (H, P) each. RUN is a power of two that the halves of all axes are multiples of: as many
    channels lie side by side and start on a multiple of it, so that one load may take them.
    Interleaved: offsets and mask are (H, D), both members in turn, in loads of 16 bytes.
    """
    heads = tl.arange(0, BLOCK_H)[:, None]
    head_dim: tl.constexpr = AXES[0] + AXES[1] + AXES[2]
    if HALF:
        pair = tl.arange(0, BLOCK_D // 2)
        _, start, size = axis_of_pair(BLOCK_D // 2, AXES)
        first = tl.max_contiguous(tl.multiple_of(pair + start, RUN), RUN)
        second = tl.max_contiguous(tl.multiple_of(pair + start + size // 2, RUN), RUN)
        mask = (heads < HEADS) & (pair < head_dim // 2)[None, :]
        return heads * head_stride + first[None, :], heads * head_stride + second[None, :], mask
    else:
        channel = tl.arange(0, BLOCK_D)[None, :]
        offsets = heads * head_stride + channel
        return offsets, offsets, (heads < HEADS) & (channel < head_dim)


@triton.jit
def load_pairs(base, where, HALF: tl.constexpr):
    """First and second members of the pairs at `pair_offsets`: fp32 (H, P) each, 0 where masked."""
    first, second, mask = where
    if HALF:
        x0 = tl.load(base + first, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(base + second, mask=mask, other=0.0).to(tl.float32)
        return x0, x1
    else:
        x = tl.load(base + first, mask=mask, other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def store_pairs(base, where, y0, y1, HALF: tl.constexpr):
    """Store fp32 pairs in the dtype of `base`."""
    first, second, mask = where
    dtype = base.dtype.element_ty
    if HALF:
        tl.store(base + first, y0.to(dtype), mask=mask)
        tl.store(base + second, y1.to(dtype), mask=mask)
    else:
        y = tl.join(y0.to(dtype), y1.to(dtype))
        tl.store(base + first, tl.reshape(y, (y.shape[0], y.shape[1] * 2)), mask=mask)
