"""The training loop: joint image-video rectified flow on packed batches.

A step takes the next samples of the endless shuffled stream while they fit `packing.tokens_per_step`; that set depends
on (seed, step) alone. Groups of `parallel.sp` processes share it as packs of at most `packing.tokens_per_pack` tokens;
gradients are summed over all processes, and each takes the optimizer step on the weights that it holds. Sharded weights
are gathered block by block, so that all groups run their k-th pack at once: where one has none left, it runs an idle
pack without weight. Nothing draws from torch's global generator, so a resumed run repeats an uninterrupted one:
bit for bit on one process (proven on a CPU; a GPU's eager attention backward may not be deterministic), and to the
rounding of its precision on another number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goku import config as parser
from goku import flops
from goku.batch import Batch, BatchBuilder
from goku.carry import Start, carry_over
from goku.data import Dataset, Problem, Quarantine
from goku.data.item_list import FILE_NAME
from goku.evaluation import evaluate, sample
from goku.flow import per_sample_mse, weighted_loss
from goku.lost import LostItems, TooManyLost
from goku.metrics import RunLog
from goku.model import GokuTransformer
from goku.optimizer import EMA, build_adamw, learning_rate
from goku.packing import efficiency, sample_cost
from goku.parallelize import (
    ActivationCheckpointing,
    ParallelContext,
    ShardingConfig,
    build_model,
    clip,
    copy_parameters,
    draw_parameters,
    microbatch,
)
from goku.precision import autocast, autocast_dtype
from goku.run_checkpoints import (
    RunCheckpoints,
    check_same_run,
    has_checkpoints,
    random_states,
    set_random_state,
)
from goku.run_config import RunConfig
from goku.run_folder import profiler, run_log, write_config
from goku.sampler import find_checkpoint
from goku.statistics import StepStatistics, sample_groups
from goku.step_plan import StepPlan, StepPlanner
from goku.stopping import StopRequest, TrainingStopped, failures_stop
from goku.text import TextEncoder
from goku.trained import read_run
from goku.vae import VideoVAE
from goku.validation import Validator
from goku_runtime import checkpoint

__all__ = ["STAGE_NOTE", "Trainer"]

STAGE_NOTE = "stage.json"
"""Beside a stage's config.yaml, for stages that begin from something: by which command they do."""


@dataclass(frozen=True)
class _Notice:
    """An event about an item that could not be read, or (problem) its line in the quarantine's list."""

    kind: str
    fields: dict[str, Any]
    problem: Problem | None = None
    source: str = ""


class Trainer:
    """One run on this process: model, optimizer, data position, and the folder `config.out` that holds it all.

    stage: its name in a recipe; start: what a run without checkpoints begins from (None: a fresh model). A run that
    has checkpoints goes on from them and keeps the stage and start that they name. validator: draws the run's cases
    every `validation.every` steps; quarantine: lists items that turn out lost, by default in out/quarantine.jsonl.
    """

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        dataset: Dataset,
        vae: VideoVAE,
        text: TextEncoder,
        unseen: Dataset | None = None,
        *,
        stage: str | None = None,
        start: Start | None = None,
        validator: Validator | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.config, self.context, self.vae, self.text = config, context, vae, text
        self.out = Path(config.out)
        self.device = context.device
        self.dtype = autocast_dtype(config.train.precision, self.device)
        self.sharding = context.pack_sharding(config.model.heads)
        self.lost = self._lost_items()
        self.quarantine = quarantine or Quarantine(self.out / "quarantine.jsonl")
        self.notices: list[_Notice] = []
        self.told: set[tuple[str, str, str, int | None]] = set()
        self.builder = self._builder(dataset, self.lost)
        self.unseen = None if unseen is None else self._builder(unseen, self._lost_items("unseen"))
        self.validator = validator
        self.stream = dataset.stream(config.seed)
        # Where there are checkpoints the weights come from one: those of an 8B would be drawn for half a minute.
        self.drawn = not context.from_main(lambda: has_checkpoints(self.out))
        seed = config.seed if self.drawn else None
        self.model = self._build(config.activation_checkpointing, config.sharding, seed)
        # The average runs forwards without backwards, after which FSDP2 would leave it gathered, and its updates would
        # go into the gathered copy.
        resharding = replace(config.sharding, reshard_after_forward=True)
        average = self._build(ActivationCheckpointing(), resharding, None)
        copy_parameters(self.model, average)
        self.ema = EMA(config.ema, average)
        self.optimizer = build_adamw(config.optimizer, self.model)
        self.checkpoints = RunCheckpoints(self.out, config.train, context.host_group)
        self.step = self.position = self.skipped = self.known_lost = 0
        self.plans: list[StepPlan] = []  # of the step under way and those that are read ahead
        self.planner = StepPlanner(
            self.stream, self.builder.tokens, dataset.items, config.packing, self.costs,
            (context.pack_rank, context.packs),
        )  # fmt: skip
        self.stage, self.start = stage, start
        self.start_record = None if start is None else start.record()
        self.limits = _largest(self.builder.grids)
        self.area = max(h * w for _, h, w in self.builder.grids)
        self.fingerprints = {
            "data": dataset.fingerprint(),
            "grids": hashlib.sha256(json.dumps(self.builder.grids).encode()).hexdigest(),
            "vae": vae.fingerprint(),
            "text": text.fingerprint(),
            "precision": str(self.dtype),
        }
        self.peak_flops = flops.peak_flops(self.device, self.dtype)

    def _lost_items(self, source: str = "") -> LostItems:
        """Of one dataset: what is told is kept until all processes tell it together, since the main one writes."""

        def quarantined(problem: Problem) -> None:
            self.notices.append(_Notice("quarantine", {}, problem, source))

        def told(kind: str, fields: dict[str, Any]) -> None:
            self.notices.append(_Notice(kind, fields, None, source))

        return LostItems(self.config.data.max_lost, told, quarantined, source)

    def _builder(self, dataset: Dataset, lost: LostItems) -> BatchBuilder:
        config = self.config
        return BatchBuilder(
            dataset, self.vae, config.flow, config.packing, config.seed, self.device,
            backend=config.kernels.operator_backend, sharding=self.sharding,
            conditioning=config.conditioning if config.model.condition == "frames" else None,
            lost=lost,
        )  # fmt: skip

    def _build(
        self, checkpointing: ActivationCheckpointing, sharding: ShardingConfig, seed: int | None
    ) -> GokuTransformer:
        config, context = self.config, self.context
        return build_model(
            config.model, config.kernels, context, sharding, checkpointing, self.dtype, seed
        )

    # ---- the loop

    def run(self, stop: threading.Event, profile: bool = False) -> str:
        """Train until `train.steps` or a stop signal; returns "finished" or "stopped". Resumes by itself.

        Raises ValueError when `out` belongs to an incompatible run or is in use, TrainingStopped when the loss stays
        non-finite or, once steps are taken, the machine refuses something. A checkpoint is written at the end, at a
        stop and every `train.checkpoint_every` steps.
        """
        train = self.config.train
        with (
            run_log(self.config, self.context) as log, self.checkpoints, closing(self.builder),
            closing(self.planner),
        ):  # fmt: skip
            resumed = self.resume(log)
            self.context.on_main(lambda: write_config(self.out / "config.yaml", self.config))
            self.context.on_main(
                lambda: self.builder.dataset.item_list().write(self.out / FILE_NAME)
            )
            event, word = ("resume", "resumed") if resumed else ("start", "starting")
            world, dims = self.context.world, self.context.dims
            degrees = {"dp_replicate": dims.dp_replicate, "dp_shard": dims.dp_shard, "sp": dims.sp}
            log.event(event, self.step, world=world, parallel=degrees, dtype=str(self.dtype))
            left = ": nothing is left to do" if self.step >= train.steps else ""
            log.message(f"{word} at step {self.step} of {train.steps} in {self.out}{left}")
            if isinstance(stop, StopRequest):
                stop.graceful = True
            if not resumed:
                self._check_start()
                if self.start is not None:
                    carry_over(self, self.start, log)
                if train.eval_every:
                    self.evaluate(log)
                self.sample(log)
                self.validate(log)
            first = self.step
            profiled = profile and self.context.is_main
            with failures_stop(), profiler(self.out / "profile", profiled) as profile_steps:
                while self.step < train.steps:
                    stopping = self.train_step(log, stop)
                    if self.step == first + 1:  # now the optimizer has its state
                        self.checkpoints.warm(self.state())
                    self.checkpoints.poll(log)
                    if profile_steps is not None:
                        profile_steps.step()
                    last = self.step == train.steps
                    if _due(self.step, train.eval_every, last):
                        self.evaluate(log)
                    if _due(self.step, train.sample_every, last):
                        self.sample(log)
                    if _due(self.step, self.config.validation.every, last):
                        self.validate(log)
                    if stopping or last or _due(self.step, train.checkpoint_every, last):
                        self._tell(log)
                        self.checkpoints.save(self.state(), self.step, log)
                    if stopping or last:
                        self.checkpoints.finish(log)
                        if self.validator is not None:
                            # Who sent a signal may not wait long.
                            self.validator.close(self.step, log, wait=60.0 if last else 5.0)
                    if stopping and not last:
                        log.event("stop", self.step)
                        log.message(
                            f"stopped by a signal after step {self.step}; run again to resume"
                        )
                        return "stopped"
            log.event("finish", self.step)
            sample = shlex.join(["goku", "sample", str(self.out), "--prompt", "TEXT"])
            log.message(f"finished at step {self.step}; try: {sample}")
        return "finished"

    def _check_start(self) -> None:
        """A stage that begins from something, and has no checkpoint (any more), is begun by its recipe alone: here it
        would begin fresh."""

        def check() -> None:
            note = self.out / STAGE_NOTE
            if self.start is None and note.is_file():
                command = json.loads(note.read_text(encoding="utf-8"))["command"]
                raise ValueError(
                    f"{self.out} is a stage that begins from another one, and has no checkpoint; begin it by: "
                    f"{command}"
                )

        self.context.on_main(check)

    def train_step(self, log: RunLog, stop: threading.Event) -> bool:
        """One optimizer step on the global batch; True when any rank was asked to stop."""
        started, read_before = time.perf_counter(), self.builder.read_seconds
        train = self.config.train
        if not self.plans or self.plans[0].positions[0] != self.position:
            self.plans = [self.planner.plan(self.position)]  # the first, or after a resume
        plan = self.plans[0]

        statistics = StepStatistics(self.device)
        for number, (positions, indices, idle) in enumerate(plan.packs, start=1):
            batch = self.builder.training(positions, indices)
            groups = sample_groups(batch)
            keep = self.config.sharding.keep_unsharded
            microbatch(self.model, last=number == len(plan.packs), keep_unsharded=keep)
            per_sample = self.per_sample_loss(self.model, batch)
            self._read_ahead(number)  # while the device is at work
            weights = torch.zeros_like(batch.weights) if idle else batch.weights
            weighted_loss(per_sample, weights, plan.weight_sum).backward()
            if not idle:
                work = flops.training_flops(self.config.model, *batch.begun)
                statistics.add(batch, per_sample, plan.weight_sum, work, groups)
        if stop.is_set():
            statistics.ask_to_stop()
        statistics.count_lost(self.lost.count)
        self.context.all_sum(statistics.vector)
        norm, lr = self._update(statistics)
        # What is drawn between steps, and a VAE that decodes it, has the gradients' memory.
        self.optimizer.zero_grad(set_to_none=True)

        self.position += len(plan.positions)
        self.plans.pop(0)
        self.step += 1
        seconds = time.perf_counter() - started
        if self.step % train.log_every == 0 or self.step == train.steps:
            read = self.builder.read_seconds - read_before
            self._log_step(log, statistics, norm, lr, seconds, read, plan)
        if self.context.world == 1 or statistics.lost > self.known_lost:
            self._tell(log)
        if statistics.lost > self.known_lost:
            self._check_lost(log)
        self.known_lost = statistics.lost
        if self.skipped > train.max_skipped_steps:
            log.event("gave_up", self.step, skipped=self.skipped)
            raise TrainingStopped(
                f"{self.skipped} steps in a row had a non-finite gradient norm; stopped at step {self.step}"
            )
        return statistics.stopping

    def _read_ahead(self, done: int) -> None:
        """Begin to read the packs behind the first `done` of the step under way, whatever steps they are of."""
        end = done + self.config.data.read_ahead
        packs = [pack for plan in self.plans for pack in plan.packs]
        while len(packs) < end and self.step + len(self.plans) < self.config.train.steps:
            self.plans.append(self.planner.plan(self.plans[-1].positions[-1] + 1))
            packs += self.plans[-1].packs
        self.builder.read_ahead([pack[:2] for pack in packs[done:end]])

    def costs(self, lengths: list[int]) -> list[float]:
        """Relative cost of samples, for sharing them among ranks."""
        model = self.config.model
        return [sample_cost(n, model.dim, text_dim=model.text_dim) for n in lengths]

    def per_sample_loss(self, model: GokuTransformer, batch: Batch) -> Tensor:
        """(B,) mean squared velocity error of each sample, in fp32; of a shard its part of them."""
        with autocast(self.device, self.dtype):
            prediction = model(*batch.inputs)
        return per_sample_mse(
            prediction,
            batch.target,
            batch.packing,
            token_offset=None if batch.shard is None else batch.shard.token_offset,
            backend=self.config.kernels.operator_backend,
        )

    def _update(self, statistics: StepStatistics) -> tuple[float, float]:
        """Clip, step, average. The norm is of the reduced gradient, hence equal on all ranks, as is the decision."""
        optimizer = self.config.optimizer
        lr = learning_rate(optimizer, self.step, self.config.train.steps)
        norm = clip(self.model, optimizer.grad_clip, self.context).item()
        # The device has nothing to do at this moment: later the host would wait for the optimizer, with the next
        # step's first pack to prepare.
        statistics.read()
        if not math.isfinite(norm):
            self.skipped += 1
            return norm, lr
        self.skipped = 0
        self.checkpoints.wait_staged()  # what follows changes what is being copied
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.ema.update(self.model)
        return norm, lr

    def _log_step(
        self,
        log: RunLog,
        statistics: StepStatistics,
        norm: float,
        lr: float,
        seconds: float,
        read_seconds: float,
        plan: StepPlan,
    ) -> None:
        loss, by_bin, by_modality = statistics.means()
        positions, lengths = plan.positions, plan.lengths
        packs = [pack for share in plan.shares for pack in share if pack]
        peak = self.peak_flops
        mfu = None
        if peak is not None:
            mfu = flops.mfu(statistics.flops, seconds, peak * self.context.world)
        rate = sum(lengths) / seconds
        log.event(
            "step",
            self.step,
            loss=loss,
            lr=lr,
            grad_norm=norm if math.isfinite(norm) else None,
            skipped=self.skipped,
            tokens=sum(lengths),
            seconds=seconds,
            read_seconds=read_seconds,
            tokens_per_second=rate,
            mfu=mfu,
            packing_efficiency=efficiency(packs, lengths, self.config.packing.tokens_per_pack),
            loss_by_bin=by_bin,
            loss_by_modality=by_modality,
            loss_by_resolution=statistics.by_resolution(),
            positions=[positions[0], positions[-1] + 1],
        )
        shown = "" if mfu is None else f"  MFU {mfu:.0%}"
        log.progress(self.step, f"loss {loss:.4f}  {rate:,.0f} tokens/s{shown}")

    # ---- looking at it

    def evaluate(self, log: RunLog) -> None:
        """Log the averaged weights' loss on fixed samples: see `goku.evaluation.evaluate`."""
        evaluate(self, log)

    def sample(self, log: RunLog) -> None:
        """Draw the first training captions: see `goku.evaluation.sample`."""
        sample(self, log)

    def validate(self, log: RunLog) -> None:
        """Draw the validation's cases with the averaged weights, if there are any."""
        if self.validator is not None and self.config.validation.every:
            self.validator.run(self.ema.module, self.step, log, self.limits, self.area)

    def _check_lost(self, log: RunLog) -> None:
        """Stop where too many items are lost, each counted once, whoever drew it. All processes call this together."""
        lost = {k: v for each in self.context.gather(self.lost.names) for k, v in each.items()}
        self.lost.adopt(lost)
        try:
            self.lost.check(lost)
        except TooManyLost as error:
            log.event("gave_up", self.step, lost=len(lost))
            raise TrainingStopped(f"{error}; stopped at step {self.step}") from error

    def _tell(self, log: RunLog) -> None:
        """Log what any process read anew or lost since the last time. All processes call this together.

        A lost item is told once, whoever else loses it, and one that was read anew once a step.
        """
        mine, self.notices = self.notices, []
        for notices in self.context.gather(mine):
            for notice in notices:
                what = notice.fields.get("name") or str(notice.problem)
                told = (
                    notice.kind, notice.source, what, self.step if notice.kind == "repaired" else None,
                )  # fmt: skip
                if told in self.told:
                    continue
                self.told.add(told)
                if notice.problem is not None:
                    if self.context.is_main:
                        self.quarantine.add([notice.problem])
                    continue
                log.event(notice.kind, self.step, **notice.fields)
                log.message(f"{notice.kind}: {notice.fields['name']}: {notice.fields['reason']}")

    # ---- state

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs, by reference: tensors are the live ones and are loaded into in place."""
        moments: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            entry = self.optimizer.state[parameter]
            if not entry:
                entry["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                entry["exp_avg"], entry["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
            moments[name] = dict(entry)
        return {
            "model": dict(self.model.state_dict()),
            "ema": dict(self.ema.module.state_dict()),
            "optimizer": moments,
            "rng": {"torch": self.context.row(torch.get_rng_state().to(self.device))},
            "run": {
                "step": self.step,
                "position": self.position,
                "ema_updates": self.ema.updates,
                "skipped": self.skipped,
                "fingerprints": self.fingerprints,
                "learning_rate": learning_rate(
                    self.config.optimizer, self.step, self.config.train.steps
                ),
                "schedule_offset": self.config.optimizer.schedule_offset,
                "stage": self.stage,
                "start": self.start_record,
                "limits": {"grid": list(self.limits), "area": self.area},
                "config": self._saved_config(),
                "processes": self.context.world,
            },
        }

    def _saved_config(self) -> dict[str, Any]:
        """The resolved config; its own folder and those of the VAE and the text encoder absolute, so that sampling
        finds them from anywhere, and a VAE that was moved with the run."""
        config = parser.to_dict(self.config)
        config["out"] = str(self.out.absolute())
        config["vae"]["path"] = str(Path(self.config.vae.path).absolute())
        if self.config.text.path is not None:
            config["text"]["path"] = str(Path(self.config.text.path).absolute())
        return config

    def resume(self, log: RunLog) -> bool:
        """Continue from the latest checkpoint of `out`, if there is one.

        Raises ValueError with the differences when that checkpoint belongs to another run (config or data), and
        CheckpointError when it is damaged.
        """
        root = self.checkpoints.root
        # The main rank looks, since looking also removes what a crash left.
        path = self.context.from_main(lambda: find_checkpoint(root))
        if path is None:
            if not self.drawn:  # what was there has been removed meanwhile
                draw_parameters(self.model, self.config.seed)
                copy_parameters(self.model, self.ema.module)
            return False
        newest = max(root.glob("step_*"), key=lambda p: p.name, default=path)
        if newest.name > path.name:
            log.event("damaged", self.step, path=str(newest), used=str(path))
            log.message(f"{newest} is damaged: going on from {path}")
        run = read_run(path)
        check_same_run(path, run, self.config, self.fingerprints, self.builder.dataset)
        state = self.state()
        state["run"] = None  # whatever values were saved
        rows, own = random_states(state["rng"]["torch"], path, run, self.context.world)
        state["rng"]["torch"] = rows
        checkpoint.load(state, path, process_group=self.context.host_group)
        set_random_state(rows, 0 if own else self.context.rank)
        run = state["run"]
        self.step, self.position, self.skipped = run["step"], run["position"], run["skipped"]
        self.ema.updates = run["ema_updates"]
        # Checkpoints of before there were recipes name none of these.
        self.stage, self.start_record = run.get("stage"), run.get("start")
        self.widen_limits(run)
        return True

    def widen_limits(self, run: dict[str, Any]) -> None:
        """Count the sizes that an earlier run was trained on as trained: `run` is that of its checkpoint."""
        if "limits" in run:
            grid = run["limits"]["grid"]
            self.limits = _largest([self.limits, grid])
            # Where it is not recorded: the most that it can have been.
            self.area = max(self.area, run["limits"].get("area", grid[1] * grid[2]))


def _largest(grids: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    """The most tokens along each axis (t, h, w) of any of the grids."""
    t, h, w = (max(axis) for axis in zip(*grids, strict=True))
    return t, h, w


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)
