"""Running a recipe: which stage is next, whether it may start, and what has been done, all read from the disk.

There is no file that says how far a recipe is. A stage is finished when the latest checkpoint in OUT/stages/NAME is at
`train.steps`; the next one is the first in order that is not. So a recipe goes on wherever it was killed.
"""

from __future__ import annotations

import gc
import json
import shlex
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from goku import config as parser
from goku.carry import Start, absent_parts, checkpoint_id
from goku.data import ItemList, Quarantine
from goku.data.listings import Listings
from goku.metrics import RunLog
from goku.parallelize import ParallelContext
from goku.prepare import (
    check_sources,
    check_validation,
    prepare_datasets,
    prepare_text,
    prepare_vae,
    prepare_validator,
)
from goku.recipe import Recipe, Stage
from goku.run_checkpoints import check_vae_is_there
from goku.run_config import RunConfig, model_differences, resume_differences
from goku.run_folder import locked, write_config
from goku.sampler import find_checkpoint
from goku.stopping import StopRequest
from goku.text import TextEncoder
from goku.trained import read_run
from goku.trainer import STAGE_NOTE, Trainer
from goku.vae import VideoVAE
from goku.whole_file import write_whole
from goku_runtime import checkpoint

__all__ = [
    "StageRefused",
    "StageState",
    "check_order",
    "check_start",
    "resolved",
    "run_recipe",
    "states",
]


class StageRefused(ValueError):
    """A stage that may not start: every reason on a line of its own."""


@dataclass(frozen=True)
class StageState:
    """How far a stage is: its latest checkpoint, the step of that, and the values of the run in it."""

    stage: Stage
    status: Literal["fresh", "partial", "finished"]
    step: int = 0
    checkpoint: Path | None = None
    run: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint."""
        return self.checkpoint is not None

    def __str__(self) -> str:
        steps = self.stage.config.train.steps
        if not self.begun:
            return "has no checkpoint"
        return f"is at step {self.step} of {steps}"


def states(recipe: Recipe) -> list[StageState]:
    """The state of every stage, from OUT/stages/*/checkpoints alone. Raises CheckpointError where all are damaged."""
    return [state_of(stage) for stage in recipe.stages]


def state_of(stage: Stage) -> StageState:
    """That of one stage, as `states`."""
    path = find_checkpoint(Path(stage.config.out) / "checkpoints")
    if path is None:
        return StageState(stage, "fresh")
    run = read_run(path)
    finished = run["step"] >= stage.config.train.steps
    return StageState(stage, "finished" if finished else "partial", run["step"], path, run)


def resolved(stage: Stage, state: StageState, start: Start | None) -> RunConfig:
    """The stage's run with the offset of its schedule: that of its checkpoints, else what `carry.schedule` gives."""
    if state.begun:
        offset = state.run.get("schedule_offset", 0) if stage.carry.schedule else 0
    elif start is not None and stage.carry.schedule:
        saved = read_run(start.path)
        offset = saved.get("schedule_offset", 0) + start.step
    else:
        return stage.config
    return replace(stage.config, optimizer=replace(stage.config.optimizer, schedule_offset=offset))


def check_order(recipe: Recipe, found: Sequence[StageState], only: str | None = None) -> None:
    """Refuse, before anything is trained, what would leave stages behind that began from something else.

    Raises StageRefused naming every stage that was begun with another configuration, and every one that began from a
    stage which is about to be trained (again).
    """
    by_name = {state.stage.name: state for state in found}
    lines = []
    for state in found:
        stage = state.stage
        if not state.begun:
            continue
        if only in (None, stage.name):
            changed = resume_differences(state.run["config"], resolved(stage, state, None))
            if changed:
                lines.append(
                    f"{stage.name} was begun with another configuration; undo, or move {stage.config.out} away:"
                )
                lines += [f"  {line}" for line in changed]
        before = by_name.get(stage.start or "")
        if before is None or before.status == "finished":
            continue
        if before.stage.name == only or (only is None):
            lines.append(
                f"{stage.name} began from {before.stage.name}, which {before} now: move {stage.config.out} away, or "
                f"bring {before.stage.name} back as it was"
            )
    _refuse(f"{recipe.out}: the recipe cannot go on", lines)


def check_start(
    recipe: Recipe,
    stage: Stage,
    found: Sequence[StageState],
    fingerprints: Mapping[str, str] | None = None,
    items: ItemList | None = None,
) -> Start | None:
    """What the stage starts from; None for a fresh model, and for a stage that goes on from its own checkpoint.

    fingerprints: of the run to be ("vae", "text", "data", "grids", as checkpoints keep them); what is absent is not
    compared. items: of the run to be, to say which differ. Raises StageRefused with all reasons.
    """
    state = found[stage.index]
    if stage.start is None:
        if state.run.get("start") is not None:
            _refuse(_head(stage), [_changed_start(recipe, stage, state.run["start"], "nothing")])
        return None
    ready = True
    if stage.starts_from_folder:
        folder = Path(stage.start)
        path = folder if (folder / "manifest.json").is_file() else None
        path = path or find_checkpoint(folder / "checkpoints")
        absent = f"it starts from {folder}, which holds no checkpoint; allowed: a run's folder, or a checkpoint"
    else:
        before = next(s for s in found if s.stage.name == stage.start)
        path, ready = before.checkpoint, before.status == "finished"
        command = shlex.join(
            ["goku", "train", str(recipe.source or "RECIPE"), "--stage", stage.start]
        )
        absent = f"it starts from {stage.start}, which {before}; finish it first: {command}"
    if state.begun:
        _check_same_start(recipe, stage, state, path)
        return None
    if path is None or not ready:
        raise StageRefused(f"{_head(stage)}:\n  {absent}")
    run = read_run(path)
    names = checkpoint.describe(path)
    start = Start(path, checkpoint_id(path), run.get("stage"), run["step"], stage.carry)
    lines = model_differences(run["config"], stage.config)
    lines += absent_parts(stage.carry, names)
    if stage.carry.schedule:
        lines += _other_schedule(run["config"], stage.config)
    compared = {"vae": "vae.path holds another VAE", "text": "text is another encoder"}
    if stage.carry.stream:
        compared |= {
            "data": "carry.stream: the items or the mix are others",
            "grids": "carry.stream: packing.overlong cuts other samples",
        }
    for name, words in compared.items():
        if name in (fingerprints or {}) and run["fingerprints"].get(name) != fingerprints[name]:  # type: ignore[index]
            lines.append(f"{words} than {path} was trained with")
            if name == "data" and items is not None and (kept := start.items()) is not None:
                lines += [f"  {line}" for line in kept.differences(items)]
    _refuse(f"{_head(stage)} from {path}", lines)
    return start


def _head(stage: Stage) -> str:
    return f"stage {stage.name} cannot start"


def _refuse(head: str, lines: Sequence[str]) -> None:
    if lines:
        raise StageRefused("\n  ".join([f"{head}:", *lines]))


def _changed_start(recipe: Recipe, stage: Stage, record: Mapping[str, Any], now: str) -> str:
    return (
        f"it began from {record['stage'] or 'a run'} at step {record['step']}, and the recipe says {now}: undo, or "
        f"move {stage.config.out} away"
    )


def _check_same_start(recipe: Recipe, stage: Stage, state: StageState, path: Path | None) -> None:
    """A stage that has begun goes on only from what it began from, as far as that is still there."""
    record = state.run.get("start")
    if record is None:
        _refuse(
            _head(stage),
            [
                f"it began fresh, and the recipe says from {stage.start}: move {stage.config.out} away"
            ],
        )
        return
    carry = parser.difference({"carry": record["carry"]}, {"carry": asdict(stage.carry)})
    lines = [f"it began with other settings, {line}" for line in carry]
    if not stage.starts_from_folder and record["stage"] != stage.start:
        lines.append(_changed_start(recipe, stage, record, f"from {stage.start}"))
    elif path is not None and checkpoint_id(path) != record["checkpoint_id"]:
        lines.append(
            f"{stage.start} was trained on after {stage.name} began: move {stage.config.out} away"
        )
    _refuse(_head(stage), lines)


def _other_schedule(saved: Mapping[str, Any], current: RunConfig) -> list[str]:
    """carry.schedule counts on in the same schedule: what it is made of may not change."""
    now = parser.to_dict(current)["optimizer"]
    keys = ("lr", "warmup_steps", "schedule", "final_lr_ratio")
    old = {key: saved["optimizer"].get(key) for key in keys}
    lines = parser.difference({"optimizer": old}, {"optimizer": {key: now[key] for key in keys}})
    return [f"carry.schedule goes on in the same schedule, but {line}" for line in lines]


# ---- running


def run_recipe(
    recipe: Recipe,
    context: ParallelContext,
    stop: threading.Event,
    *,
    only: str | None = None,
    profile: bool = False,
) -> Literal["finished", "stopped"]:
    """Train all stages in their order, or `only` one, each from where it is; "stopped" after a signal.

    OUT/recipe.jsonl gets an event for every stage that begins, resumes, is skipped or ends, OUT/recipe.yaml the recipe
    with its overrides. A VAE of the recipe's own is trained first, on the sources of all stages. Raises StageRefused
    (a ValueError) when a stage may not start, ValueError for parallel degrees that do not fit the number of processes
    or an OUT in use, and what preparing and training raise.
    """
    wanted = recipe.stages if only is None else (recipe.stage(only),)
    for stage in wanted:
        try:
            stage.config.parallel.resolve(context.world)
        except ValueError as error:
            raise ValueError(f"stages.{stage.name}.parallel: {error}") from error
    with _recipe_log(recipe, context) as log:
        # By the main rank: looking, at every file of a checkpoint, also removes what a crash left.
        found = context.from_main(lambda: states(recipe))
        check_order(recipe, found, only)
        first = next((s for s in wanted if found[s.index].status != "finished"), None)
        if first is not None:
            _start(recipe, first, found, context)  # before minutes of work on a VAE
        left = [stage.config for stage in wanted if found[stage.index].status != "finished"]
        check_validation(left, context)
        begun = {state.stage.name for state in found if state.begun}
        # Where a stream goes on the list of the stage that began it decides, whatever has come since.
        for stage in recipe.stages:
            if stage.carry.stream and stage.start in begun:
                begun.add(stage.name)  # and of those that go on from it
        carried = [s.config for s in wanted if s.carry.stream and s.start in begun]
        listings = Listings(context.from_main)
        check_sources(left, context, carried, listings)
        context.on_main(lambda: write_config(recipe.out / "recipe.yaml", recipe.tree))
        parts: tuple[VideoVAE, TextEncoder] | None = None
        for stage in wanted:
            state = found[stage.index]
            _start(recipe, stage, found, context)
            if state.status == "finished":
                log.event(
                    "stage_skip", state.step, stage=stage.name, checkpoint=str(state.checkpoint)
                )
                log.message(f"stage {stage.name} is finished at step {state.step}")
                continue
            if parts is None:
                kept = next((each.checkpoint for each in found if each.checkpoint), None)
                if kept is not None:
                    context.on_main(partial(check_vae_is_there, kept, recipe.vae))
                runs = [each.config for each in recipe.stages]
                vae = prepare_vae(recipe.vae, context, runs)
                parts = vae, prepare_text(recipe.vae, context)
            outcome = _run_stage(recipe, stage, found, context, stop, parts, log, listings, profile)
            # A stage's model must be gone before the next one's is built: cycles would keep it.
            gc.collect()
            if context.device.type == "cuda":
                torch.cuda.empty_cache()
            if isinstance(stop, StopRequest):
                stop.graceful = False
            # A signal during the last step ends the stage as finished; ranks may see it at different times.
            if outcome == "stopped" or any(context.gather(stop.is_set())):
                return "stopped"
            found[stage.index] = context.from_main(partial(state_of, stage))
    return "finished"


def _start(
    recipe: Recipe,
    stage: Stage,
    found: Sequence[StageState],
    context: ParallelContext,
    fingerprints: Mapping[str, str] | None = None,
    items: ItemList | None = None,
) -> Start | None:
    """`check_start` by the main rank, its result on every rank."""
    return context.from_main(lambda: check_start(recipe, stage, found, fingerprints, items))


def _run_stage(
    recipe: Recipe,
    stage: Stage,
    found: Sequence[StageState],
    context: ParallelContext,
    stop: threading.Event,
    parts: tuple[VideoVAE, TextEncoder],
    log: RunLog,
    listings: Listings,
    profile: bool,
) -> str:
    """One stage from where it is to its end or a signal. A frame of its own: what it built goes with it."""
    started = time.perf_counter()
    vae, text = parts
    state = found[stage.index]
    known = {"vae": vae.fingerprint(), "text": text.fingerprint()}
    start = _start(recipe, stage, found, context, known)
    config = resolved(stage, state, start)
    event = "stage_resume" if state.begun else "stage_begin"
    where = str(state.checkpoint or "") or (str(start.path) if start else None)
    log.event(event, state.step, stage=stage.name, checkpoint=where)
    log.message(
        f"stage {stage.index + 1} of {len(recipe.stages)}: {stage.name}"
        + (f", from {stage.start}" if stage.start and not state.begun else "")
    )
    arranged = context.arranged(config.parallel)
    quarantine = Quarantine(recipe.out / "quarantine.jsonl", stage.name)
    # Positions of a stream mean the items that it was begun with, whatever has come or gone since.
    items = arranged.from_main(start.items) if start is not None and start.carry.stream else None
    training, unseen, _ = prepare_datasets(config, arranged, vae, text, quarantine, items, listings)
    listings.forget()  # the next stage begins when this one has been trained
    trainer = Trainer(
        config, arranged, training, vae, text, unseen,
        stage=stage.name, start=start, quarantine=quarantine,
        validator=prepare_validator(config, arranged, vae, text),
    )  # fmt: skip
    if start is not None:
        # Now with the data's.
        now = training.item_list() if context.is_main else None
        _start(recipe, stage, found, context, trainer.fingerprints, now)
    note = Path(config.out) / STAGE_NOTE
    if stage.start is not None:  # a stage that has begun, too: its checkpoints may be moved away
        command = shlex.join(
            ["goku", "train", str(recipe.out / "recipe.yaml"), "--stage", stage.name]
        )
        said = json.dumps({"stage": stage.name, "command": command})
        context.on_main(lambda: write_whole(note, f"{said}\n".encode(), durable=True))
    else:
        context.on_main(lambda: note.unlink(missing_ok=True))  # of an earlier `from`
    outcome = trainer.run(stop, profile)
    written = find_checkpoint(trainer.checkpoints.root) if context.is_main else None
    log.event(
        "stage_finish" if outcome == "finished" else "stage_stop",
        trainer.step,
        stage=stage.name,
        checkpoint=str(written),
        seconds=time.perf_counter() - started,
    )
    return outcome


@contextmanager
def _recipe_log(recipe: Recipe, context: ParallelContext) -> Iterator[RunLog]:
    """OUT, held for this process group, and its log; on all ranks but the main one a silent one."""
    opened: list[RunLog] = []
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(locked(recipe.out))
            steps = sum(stage.config.train.steps for stage in recipe.stages)
            opened.append(RunLog(recipe.out / "recipe.jsonl", total_steps=steps, what="recipe"))
            stack.callback(opened[0].close)

        context.on_main(enter)
        yield opened[0] if opened else RunLog(None, total_steps=0)
