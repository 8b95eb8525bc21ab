"""Packing: where each sample of a packed batch begins and ends, and what shape it has.

A packed batch holds the tokens of all samples end to end, without padding between them. `Packing`
is built and validated once per batch from lengths known on the host, so that no operator has to
read `cu_seqlens` back from the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from goku_kernels.upload import upload, upload_values

Grid = tuple[int, int, int]
T = TypeVar("T")

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Packing:
    """Boundaries and grids of the samples in one packed batch of B samples.

    Build it with `from_grids` (latent video and images) or `from_lengths` (text); both validate.

    Attributes:
        cu_seqlens: int32 (B+1,), offsets of the samples; the first is 0, the last the token count.
        grid_sizes: int32 (B, 3), (t, h, w) of every sample after patchify, tokens in row-major
            order; None for sequences without a grid.
        lengths: tokens of every sample, on the host.
        grids: `grid_sizes` on the host, or None.
        max_seqlen: the largest of `lengths`.
    """

    cu_seqlens: Tensor
    grid_sizes: Tensor | None
    lengths: tuple[int, ...]
    grids: tuple[Grid, ...] | None
    max_seqlen: int

    @classmethod
    def from_grids(
        cls, grid_sizes: Sequence[Grid], device: torch.device | str | None = None
    ) -> Packing:
        """Pack samples of the given (t, h, w) grids; a sample has t*h*w tokens (zero is allowed).

        Raises:
            ValueError: no sample, a grid that is not three integers >= 0, or over 2^31-1 tokens.
        """
        grids = []
        for i, grid in enumerate(_several("grid_sizes", grid_sizes, "of (t, h, w)")):
            sizes = tuple(grid) if isinstance(grid, Iterable) else ()
            if len(sizes) != 3 or not all(_is_count(n) for n in sizes):
                raise ValueError(
                    f"grid_sizes[{i}] is {grid!r}: allowed are 3 integers >= 0 (t, h, w)"
                )
            grids.append((int(sizes[0]), int(sizes[1]), int(sizes[2])))
        lengths = tuple(t * h * w for t, h, w in grids)
        cu_seqlens = _offsets("grid_sizes", lengths, device)
        sizes_B3 = upload_values(grids, torch.int32, device)
        return cls(cu_seqlens, sizes_B3, lengths, tuple(grids), max(lengths))

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str | None = None
    ) -> Packing:
        """Pack sequences of the given lengths (zero is allowed), without grids.

        Raises:
            ValueError: no sequence, a length that is not an integer >= 0, or over 2^31-1 tokens.
        """
        given = _several("lengths", lengths, "of integers >= 0")
        for i, n in enumerate(given):
            if not _is_count(n):
                raise ValueError(f"lengths[{i}] is {n!r}: allowed are integers >= 0")
        host = tuple(int(n) for n in given)
        return cls(_offsets("lengths", host, device), None, host, None, max(host))

    @property
    def total(self) -> int:
        """Tokens of all samples together."""
        return sum(self.lengths)

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def to(self, device: torch.device | str) -> Packing:
        """The same packing with its tensors on `device`."""
        grids = None if self.grid_sizes is None else self.grid_sizes.to(device)
        return Packing(self.cu_seqlens.to(device), grids, self.lengths, self.grids, self.max_seqlen)

    def segment_ids(self) -> Tensor:
        """Sample index of every token: int64 (total,), on the device of `cu_seqlens`, cached."""
        return self._segment_ids

    @cached_property
    def _segment_ids(self) -> Tensor:
        # On the host: repeat_interleave of a device tensor would have to read its length back.
        samples = torch.arange(self.batch, device="cpu")
        lengths = torch.tensor(self.lengths, device="cpu")
        ids = torch.repeat_interleave(samples, lengths, output_size=self.total)
        return upload(ids, self.cu_seqlens.device)


def _several(name: str, values: Iterable[T], what: str) -> tuple[T, ...]:
    if not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r}: allowed is a sequence {what}")
    return tuple(values)


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0


def _offsets(name: str, lengths: tuple[int, ...], device: torch.device | str | None) -> Tensor:
    if not lengths:
        raise ValueError(f"{name} is empty: a packing needs at least one sample")
    offsets = [0, *accumulate(lengths)]
    if offsets[-1] > _INT32_MAX:
        raise ValueError(f"{name} add up to {offsets[-1]} tokens: at most {_INT32_MAX} are allowed")
    return upload_values(offsets, torch.int32, device)
