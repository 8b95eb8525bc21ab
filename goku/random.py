"""Counter-based random numbers: Philox4x32-10 in eager integer torch, the same on every device.

Every random number of the project is a pure function of (seed, purpose, stream index, element), so
that neither the packing, nor the number of ranks, nor a restart can change it. Nothing is drawn
from, or written to, torch's global generators.

Layout, frozen for ever (stored noise, resumed runs and the fused kernels all rely on it):

- key     = (low, high) 32 bits of the seed;
- counter = (element // 4, purpose, low 32 bits of the stream index, high 32 bits of it);
- element e takes word e % 4 of that counter's block.

In training the stream index is the sample's position in the endless shuffled stream.

The generator and the way to normals, which give the same bits on every device, are those of
`goku_kernels.philox`; the fused noising operator computes the same in a kernel.
"""

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from goku_kernels.philox import (
    MAX_ELEMENTS,
    block_normals,
    blocks_per_pass,
    philox4x32,
    split64,
)
from goku_kernels.upload import upload, upload_values

__all__ = [
    "Purpose",
    "bits",
    "normal",
    "normal_packed",
    "philox4x32",
    "stream_tensor",
    "uniform",
    "uniform_each",
]


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
    CONDITION = 8
    MIX = 9
    CAPTION = 10


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
    key = split64(seed, "seed")
    low, high = split64(stream_index, "stream_index")
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
    key = split64(seed, "seed")
    _check_count(element + 1, "element + 1")
    rows = [
        (element // 4, int(Purpose(purpose)), *split64(index, "stream_indices"))
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

    Box-Muller in fp64, rounded once; goku_kernels.philox.block_normals states it and its accuracy.

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
    key = split64(seed, "seed")
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
    streams = [split64(index, "stream_indices") for index in stream_indices]
    place = torch.device("cpu") if device is None else torch.device(device)
    limit = blocks_per_pass(place)

    out = torch.empty(sum(lengths), dtype=dtype, device=place)
    written = 0
    for part in _passes(lengths, limit):
        # Runs of (stream, first block, number of blocks, number of elements) become flat counters.
        runs = torch.tensor(
            [(*streams[i], first, (n + 3) // 4, n) for i, first, n in part],
            dtype=torch.int64,
            device="cpu",
        )
        counts = runs[:, 3]
        total = int(counts.sum())
        starts = counts.cumsum(0) - counts
        # Column 2 becomes the run's first block minus its place, so that adding the row counts up.
        table = torch.stack((runs[:, 0], runs[:, 1], runs[:, 2] - starts), dim=1)
        table = upload(table, place)
        row = torch.arange(total, dtype=torch.int64, device=place)
        if len(part) == 1:
            low, high, offset = table[0].unbind(0)
        else:
            owner = torch.repeat_interleave(upload(counts, place), output_size=total)
            low, high, offset = table.index_select(0, owner).unbind(1)
        values = block_normals(row + offset, word1, low, high, key).to(dtype).reshape(-1)

        cursor = 0
        for (_, _, n), blocks in zip(part, counts.tolist(), strict=True):
            # A view copy per sample, not an index per element: the tail of a last block is skipped.
            out[written : written + n] = values[cursor : cursor + n]
            written += n
            cursor += 4 * blocks
    return out


def stream_tensor(
    stream_indices: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Stream indices as the fused operators take them: (B,) int64 with the same 64 bits.

    Raises:
        ValueError: an index out of [0, 2^64).
    """
    for index in stream_indices:
        split64(index, "stream_indices")
    # The upper half of the unsigned range becomes the negative numbers.
    signed = [index - (index >> 63 << 64) for index in stream_indices]
    return upload_values(signed, torch.int64, device)


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


def _check_count(n: int, name: str) -> None:
    if not 0 <= n <= MAX_ELEMENTS:
        raise ValueError(f"{name} contains {n}; allowed are integers in [0, 2^34]")
