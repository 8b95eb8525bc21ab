"""Device functions: Philox4x32-10 and the normals of goku_kernels.philox, bit for bit.

Every float64 operation here is one that IEEE 754 rounds correctly, in the order of the eager code.
The kernel that calls `normals` has to be launched with enable_fp_fusion=False: an FMA in the place
of a product and a sum would round once where the eager code rounds twice. Triton's float64 `/` and
`tl.sqrt` are div.rn.f64 and sqrt.rn.f64 (its float32 ones are approximations).
"""

import math

import triton
import triton.language as tl

from goku_kernels import philox

M0 = tl.constexpr(philox.MULTIPLIERS[0])
M1 = tl.constexpr(philox.MULTIPLIERS[1])
W0 = tl.constexpr(philox.WEYL[0])
W1 = tl.constexpr(philox.WEYL[1])
ROUNDS = tl.constexpr(philox.ROUNDS)
# -2 ln m = -4 atanh(...): a power of two scales every term exactly, and so costs nothing.
ATANH = tl.constexpr(tuple(-4.0 * c for c in philox.ATANH))
MINUS_TWO_LN2 = tl.constexpr(-2.0 * math.log(2.0))
COS = tl.constexpr(philox.COS)
SIN = tl.constexpr(philox.SIN)
N_ATANH = tl.constexpr(len(philox.ATANH))
N_COS = tl.constexpr(len(philox.COS))
N_SIN = tl.constexpr(len(philox.SIN))
TURN = tl.constexpr(2.0 * math.pi * 2.0**-24)
# The fraction bits (of float32) of the largest 24-bit mantissa below sqrt(1/2).
ROOT_HALF = tl.constexpr(int(math.sqrt(0.5) * 2**24) - 2**23)


@triton.jit
def multiply(a, b: tl.constexpr):
    """High and low 32 bits of the product of a uint32 tensor and a constant: one mul.wide."""
    product = a.to(tl.uint64) * tl.full((), b, tl.uint64)
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def words(c0, c1, c2, c3, k0, k1):
    """The block of four words (uint32) of a counter and a key (uint32)."""
    for _ in tl.static_range(ROUNDS):
        high0, low0 = multiply(c0, M0)
        high1, low1 = multiply(c2, M1)
        c0, c1 = high1 ^ c1 ^ k0, low1
        c2, c3 = high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + tl.full((), W0, tl.uint32), k1 + tl.full((), W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _horner(x, coefficients: tl.constexpr, N: tl.constexpr):
    result = x * tl.full((), coefficients[N - 1], tl.float64)
    for i in tl.static_range(1, N - 1):
        result = (result + tl.full((), coefficients[N - 1 - i], tl.float64)) * x
    return result + tl.full((), coefficients[0], tl.float64)


@triton.jit
def _minus_two_log(k):
    """-2 ln(k * 2^-24) in float64 for uint32 k in [1, 2^24]."""
    # k is exact in float32: exponent and fraction are its bits.
    bits = k.to(tl.float32).to(tl.int32, bitcast=True)
    fraction = bits & 0x7FFFFF
    small = (fraction <= ROOT_HALF).to(tl.int32)
    # Mantissa in [1/2, 1), or in [1, 2) with one power of two less if it is below sqrt(1/2).
    mantissa = (fraction | 0x3F000000) + (small << 23)
    mantissa = mantissa.to(tl.float32, bitcast=True).to(tl.float64)
    power = ((bits >> 23) - (126 + 24) - small).to(tl.float64)
    one = tl.full((), 1.0, tl.float64)
    s = (mantissa - one) / (mantissa + one)
    return _horner(s * s, ATANH, N_ATANH) * s + power * tl.full((), MINUS_TWO_LN2, tl.float64)


@triton.jit
def normals(x, y):
    """Two normals, float32, from two words (uint32)."""
    radius = tl.sqrt(_minus_two_log((x >> 8) + 1))
    k = (y >> 8).to(tl.int32)
    quarter = (k + (1 << 21)) >> 22  # nearest quarter turn, 0..4
    angle = (k - (quarter << 22)).to(tl.float64) * tl.full((), TURN, tl.float64)
    square = angle * angle
    cosine = (radius * _horner(square, COS, N_COS)).to(tl.float32)
    sine = (radius * (_horner(square, SIN, N_SIN) * angle)).to(tl.float32)
    # Turning by quarters exchanges and negates, which is the same after rounding, on half the bits.
    odd = (quarter & 1) == 1
    cosine, sine = tl.where(odd, -sine, cosine), tl.where(odd, cosine, sine)
    half = (quarter & 2) == 2
    return tl.where(half, -cosine, cosine), tl.where(half, -sine, sine)
