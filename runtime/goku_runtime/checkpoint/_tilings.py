"""Where the parts of stored tensors lie: the boxes, which tensors that are cut alike share, and their places."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise, product

import torch
from torch import Tensor

from goku_runtime.checkpoint._boxes import Box, intersection, whole
from goku_runtime.checkpoint._runs import Run, StoredPart, runs

__all__ = ["Cut", "IndexTensor", "Tiling", "cuts_of"]

Cut = int | tuple[int, ...]
"""How an axis is cut: into parts of so many elements, the last perhaps of fewer, or at which starts."""


class Tiling:
    """Boxes that tile a tensor, in the order of its parts.

    Args:
        shape: of the tensor.
        boxes: which; None where `cuts` say it.
        cuts: of a grid, one for each axis: its boxes are the product of the axes' parts, row-major. A tensor
            without elements is one box.

    Attributes:
        shape, cuts: as given.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        boxes: Sequence[Box] | None = None,
        *,
        cuts: tuple[Cut, ...] | None = None,
    ) -> None:
        self.shape = shape
        self.cuts = cuts
        self._given = boxes

    @property
    def count(self) -> int:
        """Of the boxes."""
        if self._given is not None:
            return len(self._given)
        return math.prod(map(len, self._starts))

    @property
    def _starts(self) -> list[Sequence[int]]:
        assert self.cuts is not None
        return [_starts(n, cut) for n, cut in zip(self.shape, self.cuts, strict=True)]

    @property
    def _sizes(self) -> list[list[int]]:
        """Of the parts of each axis of a grid."""
        return [
            [b - a for a, b in pairwise((*starts, n))]
            for n, starts in zip(self.shape, self._starts, strict=True)
        ]

    @cached_property
    def boxes(self) -> Sequence[Box]:
        """All of them."""
        if self._given is not None:
            return self._given
        starts, sizes = product(*self._starts), product(*self._sizes)
        return [Box(start, size) for start, size in zip(starts, sizes, strict=True)]

    @property
    def volumes(self) -> Tensor:
        """(boxes,) int64, elements of each. The tensor has fewer than 2^63.

        Those of a grid are made anew each time: a megabyte of index may name thousands of grids, each of as
        many boxes as there are files, and they would be gigabytes.
        """
        if self._given is not None:
            return self._given_volumes
        found = torch.ones(1, dtype=torch.int64, device="cpu")
        for sizes in self._sizes:
            axis = torch.tensor(sizes, dtype=torch.int64, device="cpu")
            found = (found[:, None] * axis).flatten()
        return found

    @cached_property
    def _given_volumes(self) -> Tensor:
        assert self._given is not None
        each = [box.volume for box in self._given]
        return torch.tensor(each, dtype=torch.int64, device="cpu")

    def number_of(self, box: Box) -> int | None:
        """The place of a box among `boxes`; None if it is none of them."""
        return self._numbers.get(box)

    @cached_property
    def _numbers(self) -> dict[Box, int]:
        return {box: number for number, box in enumerate(self.boxes)}

    def touching(self, wanted: Box) -> Iterator[tuple[int, Box]]:
        """The boxes that hold elements of another one, by their places, and which elements."""
        axis, order, starts, longest = self._sorted
        if axis >= 0:
            low, size = wanted.start[axis], wanted.size[axis]
            order = order[bisect_left(starts, low - longest + 1) : bisect_left(starts, low + size)]
        for number in order:
            common = intersection(self.boxes[number], wanted)
            if common is not None:
                yield number, common

    @cached_property
    def _sorted(self) -> tuple[int, Sequence[int], list[int], int]:
        """(axis, numbers, starts, longest): boxes by their start on the axis that divides them best."""
        boxes = self.boxes
        columns = list(zip(*(box.start for box in boxes), strict=True))
        axis = max(range(len(columns)), key=lambda each: len(set(columns[each])), default=-1)
        if axis < 0:
            return axis, range(len(boxes)), [], 0
        order = sorted(range(len(boxes)), key=columns[axis].__getitem__)
        longest = max(box.size[axis] for box in boxes)
        return axis, order, [columns[axis][number] for number in order], longest


def _starts(length: int, cut: Cut) -> Sequence[int]:
    return range(0, max(1, length), cut) if isinstance(cut, int) else cut


def cuts_of(shape: tuple[int, ...], boxes: Sequence[Box]) -> tuple[Cut, ...] | None:
    """The cuts whose grid these boxes are, in its order; None if they are no such grid."""
    if len(boxes) == 1:
        return tuple(max(1, n) for n in shape) if boxes[0] == whole(shape) else None
    cuts: list[Cut] = []
    for axis, length in enumerate(shape):
        starts = tuple(sorted({box.start[axis] for box in boxes}))
        every = starts[1] if len(starts) > 1 else max(1, length)
        even = _starts(length, every)
        cuts.append(every if len(even) == len(starts) and tuple(even) == starts else starts)
    count = math.prod(len(_starts(n, cut)) for n, cut in zip(shape, cuts, strict=True))
    same = count == len(boxes) and Tiling(shape, cuts=tuple(cuts)).boxes == list(boxes)
    return tuple(cuts) if same else None


@dataclass(frozen=True, slots=True, eq=False)
class IndexTensor:
    """A stored tensor.

    Attributes:
        dtype: of its elements.
        tiling: the boxes of its parts.
        firsts, files, offsets: the boxes from `firsts[i]` up to the next of `firsts` lie in the files
            `files[i]`, `files[i] + 1`, ..., one in each, where the payload begins at the byte `offsets[i]`.
            A model that 4,096 ranks shard takes a few numbers for a tensor this way, not 4,096 objects.
    """

    dtype: torch.dtype
    tiling: Tiling
    firsts: Sequence[int]
    files: Sequence[int]
    offsets: Sequence[int]

    @classmethod
    def of(
        cls, dtype: torch.dtype, shape: tuple[int, ...], parts: Sequence[StoredPart]
    ) -> IndexTensor:
        """The tensor that parts make up, which tile it."""
        tiling = Tiling(shape, [part.box for part in parts])
        files, offsets = [part.file for part in parts], [part.offset for part in parts]
        return cls(dtype, tiling, range(len(parts)), files, offsets)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.tiling.shape

    @property
    def parts(self) -> list[StoredPart]:
        """All of them, which tile it; made anew each time."""
        return [self.part(number) for number in range(self.tiling.count)]

    def part(self, number: int) -> StoredPart:
        """The part that holds a box of the tiling."""
        at = bisect_right(self.firsts, number) - 1
        file = self.files[at] + number - self.firsts[at]
        return StoredPart(file, self.offsets[at], self.tiling.boxes[number])

    def in_file(self, number: int) -> Iterator[StoredPart]:
        """The parts that lie in a file."""
        ends = chain(self.firsts[1:], (self.tiling.count,))
        for first, end, file in zip(self.firsts, ends, self.files, strict=True):
            if file <= number < file + end - first:
                yield self.part(first + number - file)

    def stored_as(self, box: Box) -> StoredPart | None:
        """The part that holds a box and nothing else; None if there is none."""
        number = self.tiling.number_of(box)
        return None if number is None else self.part(number)

    def touching(self, wanted: Box) -> Iterator[tuple[StoredPart, Box]]:
        """The parts that hold elements of a box, and which."""
        for number, common in self.tiling.touching(wanted):
            yield self.part(number), common

    def runs(self, wanted: Box) -> list[Run]:
        """Which bytes make up a box of the tensor: each of its bytes once, few runs.

        Raises:
            ValueError: a box that does not lie in the tensor.
        """
        if len(wanted.start) != len(self.shape) or len(wanted.size) != len(self.shape):
            raise ValueError(f"box is {tuple(wanted)}; allowed: boxes in a tensor of {self.shape}")
        sides = zip(*wanted, self.shape, strict=True)
        if any(start < 0 or size < 0 or start + size > n for start, size, n in sides):
            raise ValueError(f"box is {wanted}; allowed: boxes in a tensor of {self.shape}")
        if not wanted.volume:
            return []
        return [
            run
            for part, common in self.touching(wanted)
            for run in runs(part, common, wanted, self.dtype.itemsize)
        ]
