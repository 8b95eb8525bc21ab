"""Cutting tensors into pieces that lie in one row, and pieces into batches worth a reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from goku_runtime.checkpoint._boxes import Box, whole
from goku_runtime.checkpoint.plan import Described

__all__ = [
    "SLAB_BYTES", "Slab", "Wanted", "aligned", "batches", "empty_buffer", "spans", "wanted",
]  # fmt: skip

SLAB_BYTES = 16 << 20
"""What is read at once, unless the caller says otherwise."""

_ALIGNMENT = 64

Wanted = tuple[str, Box, Tensor]
"""A box of a tensor and where its bytes go, uint8."""


def spans(box: Box, first: int, last: int) -> Iterator[Box]:
    """The elements [first, last) of a box, counted row-major, as boxes in that order.

    Each of them is one row of memory in the box. There are at most two for each axis, less one.
    """
    if 0 == first < last == box.volume:  # of small tensors almost always
        yield box
    else:
        yield from _spans(box, (), first, last)


def _spans(box: Box, prefix: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    if first >= last:
        return
    axis = len(prefix)
    if axis == len(box.size):
        yield Box(prefix, (1,) * axis)
        return
    inner = math.prod(box.size[axis + 1 :])
    origin = box.start[axis]
    (low, head), (high, tail) = divmod(first, inner), divmod(last, inner)
    if low == high:
        yield from _spans(box, (*prefix, origin + low), head, tail)
        return
    if head:
        yield from _spans(box, (*prefix, origin + low), head, inner)
        low += 1
    if low < high:
        start = (*prefix, origin + low, *box.start[axis + 1 :])
        yield Box(start, ((1,) * axis + (high - low,)) + box.size[axis + 1 :])
    yield from _spans(box, (*prefix, origin + high), 0, tail)


def wanted(
    name: str, box: Box, first: int, last: int, itemsize: int, target: Tensor
) -> Iterator[Wanted]:
    """What to read for elements [first, last) of a box, into consecutive bytes of a target."""
    at = 0
    for part in spans(box, first, last):
        nbytes = part.volume * itemsize
        yield name, part, target[at : at + nbytes]
        at += nbytes


class Slab(NamedTuple):
    """Elements [first, last) of a tensor, row-major, and their place in a buffer, in bytes."""

    name: str
    tensor: Described
    first: int
    last: int
    offset: int

    @property
    def nbytes(self) -> int:
        return (self.last - self.first) * self.tensor.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        """Its bytes in a buffer."""
        return buffer[self.offset : self.offset + self.nbytes]

    def wanted(self, buffer: Tensor) -> Iterator[Wanted]:
        """What to read to fill its place in a buffer."""
        box = whole(self.tensor.shape)
        return wanted(
            self.name, box, self.first, self.last, self.tensor.dtype.itemsize, self.of(buffer)
        )


def batches(tensors: Iterable[tuple[str, Described]], nbytes: int) -> Iterator[list[Slab]]:
    """All elements of all tensors in batches that fit into a buffer of `nbytes`, at least 64."""
    batch: list[Slab] = []
    at = 0
    for name, tensor in tensors:
        item = tensor.dtype.itemsize
        count = math.prod(tensor.shape)
        first = 0
        while first < count:
            room = max(nbytes - at, 0) // item
            if not room:
                yield batch
                batch, at = [], 0
                continue
            last = min(first + room, count)
            batch.append(Slab(name, tensor, first, last, at))
            at += aligned((last - first) * item)
            first = last
    if batch:
        yield batch


def aligned(nbytes: int) -> int:
    """Bytes up to the next place where a tensor of any dtype may begin."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def empty_buffer(nbytes: int) -> Tensor:
    """(nbytes,) uint8, uninitialised."""
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
