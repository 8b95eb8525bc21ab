"""Philox4x32-10 and exact normals in eager torch: what the in-kernel generator has to reproduce.

Source of the generator: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3"
(SC11), with the constants of its Random123 library. Integer operations are exact. The way to
normals uses only the fp64 operations that IEEE 754 rounds correctly (+, -, *, /), one torch
operation each, because log, sin, cos and even sqrt differ in their last bits between libm, SLEEF,
MKL and CUDA. Hence every device gives the same bits, and so does the kernel of
:mod:`goku_kernels.triton.philox`, since no compiler is let contract a product and a sum into one
FMA.

Which numbers a stream has (seed, purpose, stream index, element) is, as in goku/random.py, which draws with them:

- key     = (low, high) 32 bits of the seed;
- counter = (element // 4, purpose, low 32 bits of the stream index, high 32 bits of it);
- element e takes word e % 4 of that counter's block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
MAX_ELEMENTS = 4 << 32  # the block number has 32 bits

# Taylor coefficients, enough for the fp64 rounding error to dominate on the reduced intervals.
ATANH = tuple(1.0 / (2 * i + 1) for i in range(11))  # in s^2 <= 0.0295
COS = tuple((-1.0) ** i / math.factorial(2 * i) for i in range(10))  # in a^2 <= (pi/4)^2
SIN = tuple((-1.0) ** i / math.factorial(2 * i + 1) for i in range(10))

# Blocks per pass: bounds the temporaries (about twenty int64 or float64 per block) whatever the
# number of elements. No effect on the values. Measured for 150,000 normals on one CPU core, best of
# 60: 11 ms with 2^17, 19 ms with 2^15, 30 ms with 2^13; a GPU wants fewer, larger launches.
_BLOCKS_PER_PASS_CPU = 1 << 17
_BLOCKS_PER_PASS = 1 << 21


def philox4x32(counter: Tensor, key: Sequence[int]) -> Tensor:
    """Philox4x32-10: one block of four 32-bit words per counter.

    Args:
        counter: (..., 4) int64, each entry a 32-bit word in [0, 2^32). The values are not checked
            (that would synchronise a device); higher bits must be zero.
        key: two words in [0, 2^32).

    Returns:
        (..., 4) int64 on the counter's device, each entry in [0, 2^32).

    Raises:
        ValueError: counter of another shape or dtype; key of another length or out of range.
    """
    if counter.dtype != torch.int64:
        raise ValueError(f"counter has dtype {counter.dtype}; allowed is torch.int64")
    if counter.dim() < 1 or counter.shape[-1] != 4:
        raise ValueError(f"counter has shape {tuple(counter.shape)}; allowed is (..., 4)")
    if len(key) != 2 or any(not 0 <= word <= MASK32 for word in key):
        raise ValueError(f"key is {tuple(key)}; allowed are two integers in [0, 2^32)")
    c0, c1, c2, c3 = counter.unbind(-1)
    return torch.stack(_rounds(c0, c1, c2, c3, (key[0], key[1])), dim=-1)


def block_normals(
    block: Tensor, purpose: int, low: Tensor, high: Tensor, key: tuple[int, int]
) -> Tensor:
    """The four normals of every block: (n, 4) float64.

    Box-Muller on the words (x, y) = (word 0, word 1), then (word 2, word 3), of each block:
    u1 = ((x >> 8) + 1) * 2^-24 in (0, 1], u2 = (y >> 8) * 2^-24 in [0, 1), radius
    sqrt(-2 ln u1), angle 2 pi u2; the pair is (radius cos, radius sin). Against 80-bit arithmetic
    over all 2^24 arguments, the logarithm is within 3.3e-16 (relative), cosine and sine within
    1.8e-16 (absolute), and the root is correctly rounded.

    Args:
        block: int64 (n,), element // 4.
        purpose: counter word 1.
        low, high: int64 (n,) or what expands to it, the words of the stream index.
        key: the words of the seed. All words lie in [0, 2^32); nothing is checked.
    """
    words = _rounds(
        block,
        torch.full_like(block, purpose),
        low.expand_as(block),
        high.expand_as(block),
        key,
    )
    pairs = (*box_muller(words[0], words[1]), *box_muller(words[2], words[3]))
    return torch.stack(pairs, dim=1)


def blocks_per_pass(device: torch.device) -> int:
    """How many blocks to compute at once on `device`."""
    return _BLOCKS_PER_PASS_CPU if device.type == "cpu" else _BLOCKS_PER_PASS


def split64(value: int, name: str) -> tuple[int, int]:
    """Low and high 32 bits of an unsigned 64-bit integer.

    Raises:
        ValueError: `value` is not in [0, 2^64).
    """
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name} contains {value}; allowed are integers in [0, 2^64)")
    return value & MASK32, value >> 32


def _rounds(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0), low1
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1), low0
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def _multiply(a: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * multiplier, both below 2^32, without overflowing int64.

    The multiplier is taken in two halves of 16 bits, so that no product passes 2^48: a signed
    overflow would be undefined behaviour in the C++ below torch.
    """
    lower = a * (multiplier & 0xFFFF)
    upper = (a * (multiplier >> 16)).add_(lower >> 16)
    low = lower.bitwise_and_(0xFFFF).bitwise_or_((upper & 0xFFFF).bitwise_left_shift_(16))
    return upper.bitwise_right_shift_(16), low


def box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals (float64) from two words of 32 bits (int64): see :func:`block_normals`."""
    radius = sqrt(log_of_24_bits((x >> 8) + 1).mul_(-2.0))
    cosine, sine = cos_sin_of_24_bits(y >> 8)
    return radius * cosine, radius * sine


def log_of_24_bits(k: Tensor) -> Tensor:
    """ln(k * 2^-24) in fp64, for integers k in [1, 2^24]."""
    mantissa, exponent = torch.frexp(k.to(torch.float64))  # mantissa in [1/2, 1), exact
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)  # in [sqrt(1/2), sqrt(2))
    power = exponent.to(torch.float64) - 24.0 - small.to(torch.float64)
    # ln m = 2 atanh((m - 1) / (m + 1)); around 1 the power is 0 and nothing cancels.
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    return _horner(s * s, ATANH).mul_(s).mul_(2.0).add_(power.mul_(math.log(2.0)))


def sqrt(v: Tensor) -> Tensor:
    """Correctly rounded fp64 square root for v in {0} and [2^-24, 2^6).

    torch.sqrt is not: on x86 it is MKL's, which was seen off by one ulp in 1.2% of arguments. One
    Newton step with an exact residual (Dekker's product, which needs no FMA) repairs that, from
    whichever neighbour it starts.
    """
    root = v.sqrt()
    high = root * 134217729.0  # 2^27 + 1: Veltkamp's split into two halves of 26 bits
    high = high - (high - root)
    low = root - high
    product = root * root
    error = (high * high).sub_(product).add_((high * low).mul_(2.0)).add_(low * low)
    residual = (v - product).sub_(error)
    return root + residual.div_((root * 2.0).clamp_(min=2.0**-512))  # 0 stays 0


def cos_sin_of_24_bits(k: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi k 2^-24 in fp64, for integers k in [0, 2^24)."""
    quarter = (k + (1 << 21)) >> 22  # nearest quarter turn, 0..4; the reduction is exact
    angle = (k - (quarter << 22)).to(torch.float64).mul_(2.0 * math.pi * 2.0**-24)
    square = angle * angle
    cosine, sine = _horner(square, COS), _horner(square, SIN).mul_(angle)
    odd = (quarter & 1) == 1
    cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    half = (quarter & 2) == 2
    return torch.where(half, -cosine, cosine), torch.where(half, -sine, sine)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    result = x * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        # Two operations on purpose: a fused multiply-add would round differently.
        result.add_(coefficient).mul_(x)
    return result.add_(coefficients[0])
