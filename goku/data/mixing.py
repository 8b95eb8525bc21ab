"""The mixed stream: several groups of items, each with its exact share of every block of positions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from goku.data.stream import ShuffledStream
from goku.random import Purpose, bits

BLOCK = 1024
"""Positions in which every group has its exact share."""


@dataclass(frozen=True)
class Group:
    """Items that are drawn with one weight > 0. name: keys the order within; indices: of the items."""

    name: str
    indices: Sequence[int]
    weight: float


class MixedStream:
    """Maps stream positions to items of several groups by their weights.

    Every block of 1024 positions has the same number of each group: its share by largest remainder (of equal remainders
    the earlier group's). Places within block b are shuffled by the stable argsort of
    ``goku.random.bits(seed, b, 1024, Purpose.MIX)``; the n-th place of a group, over all blocks, is item n of a
    `ShuffledStream` over the group with a seed of its own, sha256 of (seed, name). So the position is the whole state,
    any item is found without those before it, and another group leaves the order within the others alone.

    Raises ValueError naming the group whose weight is not above 0 or too small for one place in a block, or that has
    no items, or whose name is used twice.
    """

    def __init__(self, groups: Sequence[Group], seed: int) -> None:
        names = [group.name for group in groups]
        if not groups:
            raise ValueError("groups: () is empty; at least one is needed")
        for group in groups:
            if names.count(group.name) > 1:
                raise ValueError(f"{group.name}: is the name of two groups")
            if not (math.isfinite(group.weight) and group.weight > 0):
                raise ValueError(f"{group.name}: weight {group.weight} must be finite and above 0")
            if not group.indices:
                raise ValueError(f"{group.name}: has weight {group.weight:g} and no items")
        self.seed = seed
        self.num_items = sum(len(group.indices) for group in groups)
        self.counts: tuple[int, ...] = shares(groups)
        self._groups = list(groups)
        self._streams = [ShuffledStream(len(g.indices), _seed(seed, g.name)) for g in groups]
        # Two blocks, because a step may straddle the boundary between them.
        self._layouts: dict[int, list[tuple[int, int]]] = {}

    def item(self, position: int) -> int:
        """The item's index at `position` (from 0, without an end)."""
        group, number = self.place(position)
        return self._groups[group].indices[self._streams[group].item(number)]

    def place(self, position: int) -> tuple[int, int]:
        """(group, number of that group's places before this one) at `position`."""
        if not isinstance(position, int) or isinstance(position, bool) or position < 0:
            raise ValueError(f"position must be an integer >= 0, got {position!r}")
        block, offset = divmod(position, BLOCK)
        group, rank = self._layout(block)[offset]
        return group, block * self.counts[group] + rank

    def _layout(self, block: int) -> list[tuple[int, int]]:
        """(group, rank among the group's places of the block) of every place."""
        if block not in self._layouts:
            order = torch.argsort(bits(self.seed, block, BLOCK, Purpose.MIX), stable=True).tolist()
            owner = [0] * BLOCK
            slots = (g for g, count in enumerate(self.counts) for _ in range(count))
            for place, group in zip(order, slots, strict=True):
                owner[place] = group
            seen = [0] * len(self.counts)
            layout = []
            for group in owner:
                layout.append((group, seen[group]))
                seen[group] += 1
            if len(self._layouts) == 2:
                del self._layouts[next(iter(self._layouts))]
            self._layouts[block] = layout
        return self._layouts[block]


def shares(groups: Sequence[Group]) -> tuple[int, ...]:
    """Places of each group in a block, by largest remainder, computed exactly; they add up to 1024."""
    weights = [Fraction(group.weight) for group in groups]
    total = sum(weights)
    quotas = [weight * BLOCK / total for weight in weights]
    counts = [int(quota) for quota in quotas]
    # sorted is stable: of equal remainders the earlier group's comes first.
    order = sorted(range(len(groups)), key=lambda g: counts[g] - quotas[g])
    for number in order[: BLOCK - sum(counts)]:
        counts[number] += 1
    for group, quota, count in zip(groups, quotas, counts, strict=True):
        if quota < Fraction(1, 2) or count == 0:
            raise ValueError(
                f"{group.name}: weight {group.weight:g} is {float(quota / BLOCK):.6f} of all, too little for one of "
                f"{BLOCK} samples; give it more, or leave it out"
            )
    return tuple(counts)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")
