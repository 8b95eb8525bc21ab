"""The steps and packs that a stream of items gives, laid out as training would: `lay_out`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from goku.data.items import SampleStream
from goku.packing import PackingConfig, efficiency, partition, step_positions

# Steps from the first on whose packs are laid out for the efficiency; more do not change the mean.
_STEPS_PACKED = 256
_SAMPLES_PACKED = 16_384
# Samples up to which the steps of a short run are counted one by one beyond the first epoch.
_SAMPLES_COUNTED = 4_096


@dataclass(frozen=True)
class PackingReport:
    """Steps of one epoch for the given budgets; means over the steps that were laid out.

    ranks: groups of processes that take packs of their own; tokens_in_step: of the mean step; efficiency: share of the
    packs' token budget that holds tokens. One epoch: as many samples as there are items; steps_per_epoch: that begin in
    it.
    """

    tokens_per_step: int
    tokens_per_pack: int
    overlong: str
    ranks: int
    steps_per_epoch: int
    samples_per_step: float
    tokens_in_step: float
    packs_per_step: float
    efficiency: float


@dataclass(frozen=True)
class Layout:
    """samples: how many the first `steps` steps take; counted: whether they were counted, not reckoned by the mean."""

    packing: PackingReport
    steps: int
    samples: int
    counted: bool


def lay_out(
    tokens: Sequence[int],
    stream: SampleStream,
    packing: PackingConfig,
    ranks: int,
    cost: Callable[[int], float],
    steps: int = 0,
) -> Layout:
    """The steps of the first epoch, and how far `steps` steps go.

    tokens: of every item, as trained; stream: position -> item; cost: of a sample of so many tokens, by which packs are
    balanced. The packs of the first 256 steps (16,384 samples) are laid out. Raises ValueError as `partition`.
    """

    def length_of(position: int) -> int:
        return tokens[stream.item(position)]

    position = epoch = done = packs = packed = 0
    asked: int | None = 0 if steps == 0 else None
    total = samples_packed = 0
    shares: list[float] = []
    while position < len(tokens) or (done < steps and position < _SAMPLES_COUNTED):
        positions = step_positions(position, length_of, packing.tokens_per_step)
        lengths = [length_of(p) for p in positions]
        if not shares or (packed < _STEPS_PACKED and samples_packed < _SAMPLES_PACKED):
            costs = [cost(length) for length in lengths]
            plan = partition(lengths, costs, ranks, packing.tokens_per_pack)
            flat = [pack for rank in plan for pack in rank if pack]
            shares.append(efficiency(flat, lengths, packing.tokens_per_pack))
            packs += len(flat)
            packed += 1
            samples_packed += len(positions)
        epoch += position < len(tokens)
        done += 1
        total += sum(lengths)
        position += len(positions)
        if done == steps:
            asked = position
    report = PackingReport(
        tokens_per_step=packing.tokens_per_step,
        tokens_per_pack=packing.tokens_per_pack,
        overlong=packing.overlong,
        ranks=ranks,
        steps_per_epoch=epoch,
        samples_per_step=position / done,
        tokens_in_step=total / done,
        packs_per_step=packs / packed,
        efficiency=sum(shares) / packed,
    )
    return Layout(
        packing=report,
        steps=steps,
        samples=round(steps * position / done) if asked is None else asked,
        counted=asked is not None,
    )


__all__ = ["Layout", "PackingReport", "lay_out"]
