"""Counter-based random numbers: Philox4x32-10 in eager integer torch, the same on every device.

Every random number of the project is a pure function of (seed, purpose, stream index, element), so
that neither the packing, nor the number of ranks, nor a restart can change it. Nothing is drawn
from, or written to, torch's global generators.

Layout, frozen for ever (stored noise, resumed runs and the fused kernels all rely on it):

- key     = (low, high) 32 bits of the seed;
- counter = (element // 4, purpose, low 32 bits of the stream index, high 32 bits of it);
- element e takes word e % 4 of that counter's block.

In training the stream index is the sample's position in the endless shuffled stream.

Source of the generator: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3"
(SC11), with the constants of its Random123 library. Integer operations are exact. The way to
normals uses only the fp64 operations that IEEE 754 rounds correctly (+, -, *, /), one torch
operation each, because log, sin, cos and even sqrt differ in their last bits between libm, SLEEF,
MKL and CUDA. Hence every device gives the same bits, and so can a kernel, as long as no compiler
contracts a product and a sum into one FMA.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

__all__ = [
    "Purpose",
    "bits",
    "normal",
    "normal_packed",
    "philox4x32",
    "uniform",
    "uniform_each",
]

_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
_MAX_ELEMENTS = 4 << 32  # the block number has 32 bits
# Blocks per pass: bounds the temporaries (about twenty int64 or float64 per block) whatever the
# number of elements. No effect on the values. Measured for 150,000 normals on one CPU core, best of
# 60: 11 ms with 2^17, 19 ms with 2^15, 30 ms with 2^13; a GPU wants fewer, larger launches.
_BLOCKS_PER_PASS_CPU = 1 << 17
_BLOCKS_PER_PASS = 1 << 21

# Taylor coefficients, enough for the fp64 rounding error to dominate on the reduced intervals.
_ATANH = tuple(1.0 / (2 * i + 1) for i in range(11))  # in s^2 <= 0.0295
_COS = tuple((-1.0) ** i / math.factorial(2 * i) for i in range(10))  # in a^2 <= (pi/4)^2
_SIN = tuple((-1.0) ** i / math.factorial(2 * i + 1) for i in range(10))


class Purpose(IntEnum):
    """What a stream of numbers is for; one counter word. The values are frozen for ever."""

    NOISE = 0
    TIME = 1
    TEXT_DROP = 2
    POSTERIOR = 3
    SHUFFLE = 4
    SAMPLE = 5
    EVAL = 6
    CROP = 7


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
    if len(key) != 2 or any(not 0 <= word <= _MASK32 for word in key):
        raise ValueError(f"key is {tuple(key)}; allowed are two integers in [0, 2^32)")
    c0, c1, c2, c3 = counter.unbind(-1)
    return torch.stack(_rounds(c0, c1, c2, c3, (key[0], key[1])), dim=-1)


def bits(
    seed: int,
    stream_index: int,
    n: int,
    purpose: Purpose,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The first n random words of a stream: (n,) int64, each uniform over [0, 2^32).

    The first words do not depend on n.

    Args:
        seed: in [0, 2^64).
        stream_index: in [0, 2^64).
        n: number of elements, in [0, 2^34].
        purpose: which family of streams.
        device: where to compute and leave them; the CPU by default. The values are the same.

    Raises:
        ValueError: an argument out of its range.
    """
    key = _split64(seed, "seed")
    low, high = _split64(stream_index, "stream_index")
    _check_count(n, "n")
    block = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)
    counter = torch.empty(block.shape[0], 4, dtype=torch.int64, device=device)
    counter[:, 0] = block
    counter[:, 1] = int(Purpose(purpose))
    counter[:, 2] = low
    counter[:, 3] = high
    return philox4x32(counter, key).reshape(-1)[:n]


def uniform(
    seed: int,
    stream_index: int,
    n: int,
    purpose: Purpose,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """The first n uniform numbers of a stream: (n,) float64, word * 2^-32, in [0, 1).

    Arguments and errors as :func:`bits`. The numbers are exact multiples of 2^-32; 0 can occur.
    """
    return bits(seed, stream_index, n, purpose, device=device).to(torch.float64) * 2.0**-32


def uniform_each(
    seed: int, stream_indices: Sequence[int], purpose: Purpose, *, element: int = 0
) -> Tensor:
    """One uniform number from each of several streams, on the CPU.

    Entry i equals ``uniform(seed, stream_indices[i], element + 1, purpose)[element]``.

    Args:
        seed: in [0, 2^64).
        stream_indices: B indices in [0, 2^64).
        purpose: which family of streams.
        element: position within each stream, in [0, 2^34).

    Returns:
        (B,) float64 in [0, 1).

    Raises:
        ValueError: an argument out of its range.
    """
    key = _split64(seed, "seed")
    _check_count(element + 1, "element + 1")
    rows = [
        (element // 4, int(Purpose(purpose)), *_split64(index, "stream_indices"))
        for index in stream_indices
    ]
    counter = torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)
    return philox4x32(counter, key)[:, element % 4].to(torch.float64) * 2.0**-32


def normal(
    seed: int,
    stream_index: int,
    n: int,
    purpose: Purpose = Purpose.NOISE,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The first n standard normal numbers of a stream, (n,); they do not depend on n.

    Box-Muller on the words (x, y) = (word 0, word 1), then (word 2, word 3), of each block:
    u1 = ((x >> 8) + 1) * 2^-24 in (0, 1], u2 = (y >> 8) * 2^-24 in [0, 1), radius
    sqrt(-2 ln u1), angle 2 pi u2; the pair is (radius cos, radius sin). Computed in fp64, rounded
    once. Against 80-bit arithmetic over all 2^24 arguments, the logarithm is within 3.3e-16
    (relative), cosine and sine within 1.8e-16 (absolute), and the root is correctly rounded.

    Tail: u1 >= 2^-24, so |value| <= sqrt(48 ln 2) = 5.768. A true normal passes that with
    probability 8.0e-9, about once in 125 million numbers.

    Args:
        seed: in [0, 2^64).
        stream_index: in [0, 2^64).
        n: number of elements, in [0, 2^34].
        purpose: which family of streams.
        device: where to compute and leave them; the CPU by default. The values are the same.
        dtype: float32 or float64. (A narrower one would be rounded twice; convert it outside.)

    Raises:
        ValueError: an argument out of its range.
    """
    return normal_packed(seed, (stream_index,), (n,), purpose, device=device, dtype=dtype)


def normal_packed(
    seed: int,
    stream_indices: Sequence[int],
    lengths: Sequence[int],
    purpose: Purpose = Purpose.NOISE,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal numbers of several streams, end to end, in one vectorised pass.

    Exactly the concatenation of ``normal(seed, stream_indices[i], lengths[i], purpose)``.
    Nothing is read back from the device.

    Args:
        seed: in [0, 2^64).
        stream_indices: B indices in [0, 2^64).
        lengths: B numbers of elements (not of tokens), each in [0, 2^34].
        purpose, device, dtype: as :func:`normal`.

    Returns:
        (sum(lengths),) of the dtype, on the device.

    Raises:
        ValueError: an argument out of its range, or the two sequences differ in length.
    """
    key = _split64(seed, "seed")
    if len(stream_indices) != len(lengths):
        raise ValueError(
            f"lengths has {len(lengths)} entries; allowed is one per stream index, "
            f"here {len(stream_indices)}"
        )
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype is {dtype}; allowed are torch.float32 and torch.float64")
    for n in lengths:
        _check_count(n, "lengths")
    word1 = int(Purpose(purpose))
    streams = [_split64(index, "stream_indices") for index in stream_indices]
    place = torch.device("cpu") if device is None else torch.device(device)
    limit = _BLOCKS_PER_PASS_CPU if place.type == "cpu" else _BLOCKS_PER_PASS

    out = torch.empty(sum(lengths), dtype=dtype, device=place)
    written = 0
    for part in _passes(lengths, limit):
        # Runs of (stream, first block, number of blocks, number of elements) become flat counters.
        runs = torch.tensor(
            [(*streams[i], first, (n + 3) // 4, n) for i, first, n in part], dtype=torch.int64
        )
        counts = runs[:, 3]
        total = int(counts.sum())
        starts = counts.cumsum(0) - counts
        # Column 2 becomes the run's first block minus its place, so that adding the row counts up.
        table = torch.stack((runs[:, 0], runs[:, 1], runs[:, 2] - starts), dim=1)
        table = table.to(place, non_blocking=True)
        row = torch.arange(total, dtype=torch.int64, device=place)
        if len(part) == 1:
            low, high, offset = table[0].unbind(0)
        else:
            owner = torch.repeat_interleave(counts.to(place, non_blocking=True), output_size=total)
            low, high, offset = table.index_select(0, owner).unbind(1)
        block = row + offset
        words = _rounds(
            block, torch.full_like(block, word1), low.expand_as(row), high.expand_as(row), key
        )
        pairs = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
        values = torch.stack(pairs, dim=1).to(dtype).reshape(-1)

        cursor = 0
        for (_, _, n), blocks in zip(part, counts.tolist(), strict=True):
            # A view copy per sample, not an index per element: the tail of a last block is skipped.
            out[written : written + n] = values[cursor : cursor + n]
            written += n
            cursor += 4 * blocks
    return out


def _rounds(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1 = high1.bitwise_xor_(c1).bitwise_xor_(k0), low1
        c2, c3 = high0.bitwise_xor_(c3).bitwise_xor_(k1), low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
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


def _box_muller(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    radius = _sqrt(_log_of_24_bits((x >> 8) + 1).mul_(-2.0))
    cosine, sine = _cos_sin_of_24_bits(y >> 8)
    return radius * cosine, radius * sine


def _log_of_24_bits(k: Tensor) -> Tensor:
    """ln(k * 2^-24) in fp64, for integers k in [1, 2^24]."""
    mantissa, exponent = torch.frexp(k.to(torch.float64))  # mantissa in [1/2, 1), exact
    small = mantissa < math.sqrt(0.5)
    mantissa = torch.where(small, mantissa * 2.0, mantissa)  # in [sqrt(1/2), sqrt(2))
    power = exponent.to(torch.float64) - 24.0 - small.to(torch.float64)
    # ln m = 2 atanh((m - 1) / (m + 1)); around 1 the power is 0 and nothing cancels.
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    return _horner(s * s, _ATANH).mul_(s).mul_(2.0).add_(power.mul_(math.log(2.0)))


def _sqrt(v: Tensor) -> Tensor:
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


def _cos_sin_of_24_bits(k: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi k 2^-24 in fp64, for integers k in [0, 2^24)."""
    quarter = (k + (1 << 21)) >> 22  # nearest quarter turn, 0..4; the reduction is exact
    angle = (k - (quarter << 22)).to(torch.float64).mul_(2.0 * math.pi * 2.0**-24)
    square = angle * angle
    cosine, sine = _horner(square, _COS), _horner(square, _SIN).mul_(angle)
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


def _passes(lengths: Sequence[int], limit: int) -> list[list[tuple[int, int, int]]]:
    """Passes of at most `limit` blocks: lists of (stream number, first block, elements)."""
    passes: list[list[tuple[int, int, int]]] = []
    room = 0
    for i, n in enumerate(lengths):
        first, blocks = 0, (n + 3) // 4
        while first < blocks:
            if room == 0:
                passes.append([])
                room = limit
            take = min(room, blocks - first)
            passes[-1].append((i, first, min(4 * take, n - 4 * first)))
            first += take
            room -= take
    return passes


def _split64(value: int, name: str) -> tuple[int, int]:
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name} contains {value}; allowed are integers in [0, 2^64)")
    return value & _MASK32, value >> 32


def _check_count(n: int, name: str) -> None:
    if not 0 <= n <= _MAX_ELEMENTS:
        raise ValueError(f"{name} contains {n}; allowed are integers in [0, 2^34]")
