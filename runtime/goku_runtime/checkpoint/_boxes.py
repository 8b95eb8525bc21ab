"""Boxes of elements: parts of a tensor with sides along its axes, and whether they tile it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Box", "Fault", "fault", "intersection", "whole"]


class Box(NamedTuple):
    """The elements start[d] <= i[d] < start[d] + size[d] of a tensor; () and () for a scalar."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def volume(self) -> int:
        """How many elements it holds."""
        return math.prod(self.size)

    def __str__(self) -> str:
        sides = ", ".join(f"{s}:{s + n}" for s, n in zip(self.start, self.size, strict=True))
        return f"[{sides}]"


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersection(left: Box, right: Box) -> Box | None:
    """The elements that are in both boxes of one tensor; None if there are none."""
    start, size = [], []
    for a, n, b, m in zip(*left, *right, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        start.append(low)
        size.append(high - low)
    return Box(tuple(start), tuple(size))


class Fault(NamedTuple):
    """Why boxes do not tile a tensor.

    Attributes:
        kind: "outside" (of the tensor, or empty), "overlap" or "gap".
        boxes: which of the boxes: one that is outside, two that overlap, none for a gap.
        where: the elements in question: the box outside, what two share, or what none holds.
    """

    kind: str
    boxes: tuple[int, ...]
    where: Box

    def __str__(self) -> str:
        if self.kind == "gap":
            return f"no part holds {self.where}"
        if self.kind == "overlap":
            return f"two parts hold {self.where}"
        return f"a part is {self.where}, outside of the tensor or empty"


def fault(shape: Sequence[int], boxes: Sequence[Box]) -> Fault | None:
    """What keeps boxes from holding every element of a tensor exactly once; None if they do.

    A tensor without elements is tiled by one box: all of it. Grids, what DTensors make, take
    O(n d) for n boxes in d axes; other tilings O(n log n) as long as few boxes have to be cut.
    """
    region = whole(shape)
    if len(boxes) == 1 and boxes[0] == region:
        return None
    if not region.volume:
        wrong = next((i for i, box in enumerate(boxes) if box != region), None)
        if wrong is not None:
            return Fault("outside", (wrong,), boxes[wrong])
        return Fault("overlap", (0, 1), region) if boxes else Fault("gap", (), region)
    if _is_grid(shape, boxes):
        return None
    for i, box in enumerate(boxes):
        sides = zip(*box, shape, strict=True)
        if any(start < 0 or size < 1 or start + size > n for start, size, n in sides):
            return Fault("outside", (i,), box)
    return _search(region, boxes)


def _is_grid(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes are all the cells of a partition of each axis.

    Takes 0.4 us for each box of two axes, box by box it would be 1.5.
    """
    starts = [box.start for box in boxes]
    lows = list(zip(*starts, strict=True))
    lengths = list(zip(*(box.size for box in boxes), strict=True))
    if not len(lows) == len(lengths) == len(shape):
        return False
    count = 1
    for low, length, whole_length in zip(lows, lengths, shape, strict=True):
        sides = set(zip(low, length, strict=True))
        end = 0
        for start, size in sorted(sides):
            if start != end or size < 1:
                return False
            end = start + size
        if end != whole_length:
            return False
        count *= len(sides)
    return count == len(boxes) == len(set(starts))


def _search(region: Box, boxes: Sequence[Box]) -> Fault | None:
    """Cuts the tensor, and the boxes with it, again and again until what is wrong stands alone.

    Every piece of a tiling holds as much as its boxes together. Where a piece does not, the fault
    lies in it and only it is followed, an excess before a lack.
    """
    pieces = [(region, [(box, i) for i, box in enumerate(boxes)])]
    while pieces:
        region, held = pieces.pop()
        surplus = sum(box.volume for box, _ in held) - region.volume
        if surplus:
            pieces.clear()
        if not held:
            return Fault("gap", (), region)
        cut = _cut(region, held)
        if cut is None:  # every box is all of the region
            if len(held) > 1:
                return Fault("overlap", (held[0][1], held[1][1]), region)
            continue
        halves = [_half(region, held, cut, upper) for upper in (False, True)]
        if surplus:
            excess = [sum(box.volume for box, _ in h) - r.volume for r, h in halves]
            better = max if surplus > 0 else min
            halves = [halves[excess.index(better(excess))]]
        pieces += halves
    return None


_Held = list[tuple[Box, int]]


def _cut(region: Box, held: _Held) -> tuple[int, int] | None:
    """(axis, place) that divides the region, going through few boxes and near the middle of them."""
    best: tuple[int, int] | None = None
    least = (len(held) + 1, 0)
    for axis, (low, length) in enumerate(zip(*region, strict=True)):
        starts = [box.start[axis] for box, _ in held]
        ends = [box.start[axis] + box.size[axis] for box, _ in held]
        places = sorted({*starts, *ends} - {low, low + length})
        if not places:
            continue
        starts.sort()
        place = starts[len(starts) // 2]
        if place not in (low, low + length) and place in places:
            chosen = place
        else:
            chosen = places[len(places) // 2]
        through = sum(
            box.start[axis] < chosen < box.start[axis] + box.size[axis] for box, _ in held
        )
        below = sum(end <= chosen for end in ends)
        balance = abs(2 * below - len(held))
        if (through, balance) < least:
            best, least = (axis, chosen), (through, balance)
    return best


def _half(region: Box, held: _Held, cut: tuple[int, int], upper: bool) -> tuple[Box, _Held]:
    """One side of a cut, with what the boxes have in it."""
    axis, place = cut
    start, size = list(region.start), list(region.size)
    if upper:
        size[axis] -= place - start[axis]
        start[axis] = place
    else:
        size[axis] = place - start[axis]
    half = Box(tuple(start), tuple(size))
    clipped = ((intersection(half, box), i) for box, i in held)
    return half, [(box, i) for box, i in clipped if box is not None]
