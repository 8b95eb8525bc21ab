"""Which samples a step has, in which packs of which process: known before the step, so that they are read ahead."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from goku.data import Item, SampleStream
from goku.packing import PackingConfig, partition, step_positions

__all__ = ["StepPack", "StepPlan", "plan_step", "rounds"]


class StepPack(NamedTuple):
    """One pack of this process: positions in the stream, the items there, and whether it is without weight."""

    positions: Sequence[int]
    indices: Sequence[int]
    idle: bool


@dataclass(frozen=True)
class StepPlan:
    """The samples of one step: the same on every process but for `packs`.

    positions: of all, in the stream; lengths: tokens of each; weight_sum: of all; shares: which of them
    (0 .. len(positions) - 1) go into the packs of every group of processes; packs: those of this process's group.
    """

    positions: Sequence[int]
    lengths: Sequence[int]
    weight_sum: float
    shares: Sequence[Sequence[Sequence[int]]]
    packs: Sequence[StepPack]


def plan_step(
    position: int,
    stream: SampleStream,
    tokens: Sequence[int],
    items: Sequence[Item],
    packing: PackingConfig,
    costs: Callable[[list[int]], list[float]],
    group: tuple[int, int],
) -> StepPlan:
    """The step that begins at `position` of the stream: a function of the arguments alone.

    tokens: of every item, as it is trained on; items: their weights count; costs: of samples of these lengths; group:
    rank and number of the groups of processes that share packs.
    """
    rank, count = group
    positions = step_positions(position, lambda p: tokens[stream.item(p)], packing.tokens_per_step)
    indices = [stream.item(p) for p in positions]
    lengths = [tokens[i] for i in indices]
    weight_sum = math.fsum(items[i].weight for i in indices)
    shares = partition(lengths, costs(lengths), count, packing.tokens_per_pack)
    packs = [
        StepPack([positions[k] for k in pack], [indices[k] for k in pack], idle)
        for pack, idle in rounds(shares, lengths, rank)
    ]
    return StepPlan(positions, lengths, weight_sum, shares, packs)


def rounds(
    shares: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int], rank: int
) -> list[tuple[Sequence[int], bool]]:
    """(pack, idle) of group `rank`, as many as any has: an idle pack is the shortest sample."""
    mine = shares[rank]
    shortest = [min(range(len(lengths)), key=lambda k: lengths[k])]
    packs = [mine[k] if k < len(mine) else [] for k in range(max(len(packs) for packs in shares))]
    return [(pack or shortest, not pack) for pack in packs]
