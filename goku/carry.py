"""What a stage takes from the checkpoint that it starts from: weights, their average, moments, schedule, position.

It is always read from disk, never handed over in memory: a stage begins with the same bits whether the process that
trained the one before still lives or not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goku.data import ItemList
from goku.metrics import RunLog
from goku.parallelize import copy_parameters
from goku.recipe import CarryConfig
from goku.trained import read_run
from goku_runtime import checkpoint

if TYPE_CHECKING:
    from goku.trainer import Trainer

__all__ = ["Start", "absent_parts", "carry_over", "checkpoint_id"]


@dataclass(frozen=True)
class Start:
    """A checkpoint to start from.

    path: its folder; checkpoint_id: of its content; stage: the stage that wrote it, None for a run outside of a
    recipe; step: of that run; carry: what to take.
    """

    path: Path
    checkpoint_id: str
    stage: str | None
    step: int
    carry: CarryConfig

    def items(self) -> ItemList | None:
        """The items of the run that wrote the checkpoint; None where its folder does not list them, or lists others."""
        run = read_run(self.path)
        return ItemList.of_run(self.path.parent.parent, run["fingerprints"]["data"])

    def record(self) -> dict[str, Any]:
        """Plain values that the checkpoints of the stage keep, by which a changed start is known later."""
        return {
            "stage": self.stage,
            "step": self.step,
            "checkpoint_id": self.checkpoint_id,
            "carry": asdict(self.carry),
        }


def checkpoint_id(path: Path) -> str:
    """SHA-256 of a checkpoint's manifest, which holds the sums of all its files. OSError when there is none."""
    return hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()


def absent_parts(carry: CarryConfig, names: Iterable[str]) -> list[str]:
    """A line for each part that is to be taken of which a checkpoint with tensors of these names holds nothing."""
    asked: dict[str, str] = {carry.weights: f"carry.weights: {carry.weights}"}
    if carry.ema:
        asked.setdefault("ema", "carry.ema")
    if carry.optimizer:
        asked["optimizer"] = "carry.optimizer"
    return [
        f"{words} is asked for, and the checkpoint holds no {part!r}"
        for part, words in asked.items()
        if not any(name.startswith(f"{part}.") for name in names)
    ]


def carry_over(trainer: Trainer, start: Start, log: RunLog) -> None:
    """Load into a trainer that has done no step what `start.carry` names; the rest keeps its initial value.

    Parameters that the checkpoint lacks (of a module that is new in this stage) keep their initial values, in the
    average those of the model, and zero moments. All ranks call this together. Raises CheckpointError when the
    checkpoint is damaged or a tensor has another shape.
    """
    saved = checkpoint.describe(start.path)
    run = read_run(start.path)
    carry, group = start.carry, trainer.context.host_group
    weights = dict(trainer.model.state_dict())
    taken = _present(weights, carry.weights, saved)
    checkpoint.load({carry.weights: taken}, start.path, partial=True, process_group=group)
    copy_parameters(trainer.model, trainer.ema.module)
    if carry.ema:
        average = _present(dict(trainer.ema.module.state_dict()), "ema", saved)
        checkpoint.load({"ema": average}, start.path, partial=True, process_group=group)
        trainer.ema.updates = run["ema_updates"]
    if carry.optimizer:
        moments = trainer.state()["optimizer"]
        known = {
            name: values for name, values in moments.items() if f"optimizer.{name}.exp_avg" in saved
        }
        checkpoint.load({"optimizer": known}, start.path, partial=True, process_group=group)
    if carry.stream:
        trainer.position = run["position"]
    trainer.widen_limits(run)
    new = sorted(weights.keys() - taken.keys())
    log.event(
        "carry", 0, path=str(start.path), from_stage=start.stage, from_step=start.step,
        tensors=len(taken), new=new, **{f"carry_{k}": v for k, v in asdict(carry).items()},
    )  # fmt: skip
    fresh = f"; new and at their initial values: {', '.join(new)}" if new else ""
    log.message(f"starting from {start.path} ({len(taken)} tensors{fresh})")


def _present(tensors: dict[str, Any], prefix: str, saved: Any) -> dict[str, Any]:
    """Those of the tensors that the checkpoint holds under "prefix."."""
    return {name: tensor for name, tensor in tensors.items() if f"{prefix}.{name}" in saved}
