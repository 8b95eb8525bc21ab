"""Which samples a step has, in which packs of which process: known before the step, so that they are read ahead."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from goku.data import Item, SampleStream
from goku.packing import PackingConfig, partition, step_positions
from goku_runtime.pack_process import PackProcess, PackProcessLost

__all__ = ["StepPack", "StepPlan", "StepPlanner", "rounds"]

# Seconds of this thread, in which it launches nothing, beyond which sharing a step out is a process's: about 1% of a
# step of thousands of processes. On one core of an EPYC up to 32 groups take less, and no process.
PATIENCE = 0.02
# How many processes may be lost before there are none any more: one that is killed for memory costs the run a step
# that waits, one that never answers a minute.
LIVES = 3

Shares = Sequence[Sequence[Sequence[int]]]
Costs = Callable[[list[int]], list[float]]


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
    shares: Shares
    packs: Sequence[StepPack]


class _Samples(NamedTuple):
    """What a step takes from the stream."""

    positions: list[int]
    indices: list[int]
    lengths: list[int]
    costs: list[float]


class StepPlanner:
    """Plans steps, each a function of its position and of these arguments alone.

    tokens: of every item, as it is trained on; items: their weights count; costs: of samples of these lengths; group:
    rank and number of the groups of processes that share packs; patience: seconds that sharing one step out may take in
    this thread. From the first step on that takes longer, the step behind the one that was planned last is shared out
    in a process meanwhile. Where that one is lost, with a warning, this thread does it: no plan depends on it.
    """

    def __init__(
        self,
        stream: SampleStream,
        tokens: Sequence[int],
        items: Sequence[Item],
        packing: PackingConfig,
        costs: Costs,
        group: tuple[int, int],
        patience: float = PATIENCE,
    ) -> None:
        self._stream, self._tokens, self._items = stream, tokens, items
        self._packing, self._costs, self._group = packing, costs, group
        self._patience = patience
        self._lives = LIVES
        self._ahead = False  # it takes long
        self._process: PackProcess | None = None
        self._asked: _Samples | None = None  # of the process

    @property
    def process(self) -> PackProcess | None:
        """That shares out the next step, where there is one."""
        return self._process

    def plan(self, position: int) -> StepPlan:
        """The step that begins at `position` of the stream."""
        samples, shares = self._begun(position)
        if samples is None:
            samples = self._samples(position)
        if shares is None:
            # What other threads and processes take meanwhile says nothing of the step.
            started = time.thread_time()
            shares = partition(
                samples.lengths, samples.costs, self._group[1], self._packing.tokens_per_pack
            )
            self._ahead |= time.thread_time() - started > self._patience
        self._begin(samples.positions[-1] + 1)
        rank, _ = self._group
        packs = [
            StepPack([samples.positions[k] for k in pack], [samples.indices[k] for k in pack], idle)
            for pack, idle in rounds(shares, samples.lengths, rank)
        ]
        weight_sum = math.fsum(self._items[i].weight for i in samples.indices)
        return StepPlan(samples.positions, samples.lengths, weight_sum, shares, packs)

    def close(self) -> None:
        """Give up what is being planned ahead. To plan begins anew."""
        if self._process is not None:
            self._process.close()
        self._process = self._asked = None

    def _samples(self, position: int) -> _Samples:
        stream, tokens = self._stream, self._tokens
        indices: list[int] = []

        def length(p: int) -> int:
            indices.append(stream.item(p))
            return tokens[indices[-1]]

        positions = step_positions(position, length, self._packing.tokens_per_step)
        del indices[len(positions) :]  # the one that found no room
        lengths = [tokens[i] for i in indices]
        # Of thousands of images most are of the same few lengths.
        distinct = list(set(lengths))
        cost = dict(zip(distinct, self._costs(distinct), strict=True))
        return _Samples(positions, indices, lengths, [cost[n] for n in lengths])

    def _begin(self, position: int) -> None:
        """Have the step at this position shared out in the process."""
        if not self._ahead or not self._lives:
            return
        samples = self._samples(position)
        try:
            if self._process is None:
                self._process = PackProcess()
            self._process.ask(
                samples.lengths, samples.costs, self._group[1], self._packing.tokens_per_pack
            )
            self._asked = samples
        except PackProcessLost as lost:
            self._lose(lost)

    def _begun(self, position: int) -> tuple[_Samples | None, Shares | None]:
        """What is known of this step already."""
        samples, self._asked = self._asked, None
        if samples is None or self._process is None:
            return None, None
        if samples.positions[0] != position:
            self.close()  # a resume: nobody waits for the other step
            return None, None
        try:
            return samples, self._process.take()
        except PackProcessLost as lost:
            self._lose(lost)
            return samples, None

    def _lose(self, lost: PackProcessLost) -> None:
        self._process = None
        self._lives -= 1
        then = "" if self._lives else ", and all from now on"
        warnings.warn(f"{lost}; the training process plans a step itself{then}", stacklevel=4)


def rounds(shares: Shares, lengths: Sequence[int], rank: int) -> list[tuple[Sequence[int], bool]]:
    """(pack, idle) of group `rank`, as many as any has: an idle pack is the shortest sample."""
    mine = shares[rank]
    shortest = [min(range(len(lengths)), key=lambda k: lengths[k])]
    packs = [mine[k] if k < len(mine) else [] for k in range(max(len(packs) for packs in shares))]
    return [(pack or shortest, not pack) for pack in packs]
