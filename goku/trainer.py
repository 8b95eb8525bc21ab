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

import fcntl
import hashlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goku import config as parser
from goku import flops
from goku.batch import Batch, BatchBuilder
from goku.data import CachedDataset
from goku.data.stream import ShuffledStream
from goku.flow import per_sample_mse, weighted_loss
from goku.media_files import file_stem
from goku.metrics import RunLog
from goku.model import GokuTransformer
from goku.optimizer import EMA, build_adamw, learning_rate
from goku.packing import efficiency, partition, sample_cost, step_positions
from goku.parallelize import (
    ActivationCheckpointing,
    ParallelContext,
    ShardingConfig,
    build_model,
    clip,
    copy_parameters,
    microbatch,
)
from goku.precision import autocast, autocast_dtype
from goku.run_checkpoints import RunCheckpoints
from goku.run_config import RunConfig, resume_differences
from goku.sampler import Request, SampleConfig, decode, find_checkpoint, integrate_all, save_media
from goku.statistics import StepStatistics
from goku.text import TextEncoder
from goku.vae import VideoVAE
from goku_runtime import checkpoint

__all__ = ["StopRequest", "Trainer", "TrainingStopped", "stop_signals"]


class TrainingStopped(RuntimeError):
    """Training cannot go on (too many non-finite steps in a row); the last checkpoint is intact."""


class StopRequest(threading.Event):
    """Set by SIGTERM or SIGINT. graceful: the loop looks at it between steps; otherwise a signal ends the process."""

    graceful = False


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """What SIGTERM and SIGINT do inside: while training, finish the step, write a checkpoint and return.

    Before the loop (a VAE in training, latents being encoded), or at a second signal, the process leaves at once by
    SystemExit(128 + signal), which cleans up half-written files on its way.
    """
    request = StopRequest()

    def handle(number: int, _frame: object) -> None:
        if request.is_set() or not request.graceful:
            raise SystemExit(128 + number)
        request.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """One run on this process: model, optimizer, data position, and the folder `config.out` that holds it all."""

    def __init__(
        self,
        config: RunConfig,
        context: ParallelContext,
        dataset: CachedDataset,
        vae: VideoVAE,
        text: TextEncoder,
        unseen: CachedDataset | None = None,
    ) -> None:
        self.config, self.context, self.vae, self.text = config, context, vae, text
        self.out = Path(config.out)
        self.device = context.device
        self.dtype = autocast_dtype(config.train.precision, self.device)
        self.sharding = context.pack_sharding(config.model.heads)
        self.builder = self._builder(dataset)
        self.unseen = None if unseen is None else self._builder(unseen)
        self.stream = ShuffledStream(len(dataset.items), config.seed)
        self.model = self._build(config.activation_checkpointing, config.sharding, config.seed)
        # The average runs forwards without backwards, after which FSDP2 would leave it gathered, and its updates would
        # go into the gathered copy.
        resharding = replace(config.sharding, reshard_after_forward=True)
        average = self._build(ActivationCheckpointing(), resharding, None)
        copy_parameters(self.model, average)
        self.ema = EMA(config.ema, average)
        self.optimizer = build_adamw(config.optimizer, self.model)
        self.checkpoints = RunCheckpoints(self.out, config.train, context.host_group)
        self.step = self.position = self.skipped = 0
        self.fingerprints = {
            "data": dataset.fingerprint(),
            "grids": hashlib.sha256(json.dumps(self.builder.grids).encode()).hexdigest(),
            "vae": vae.fingerprint(),
            "text": text.fingerprint(),
            "precision": str(self.dtype),
        }
        self.peak_flops = flops.peak_flops(self.device, self.dtype)

    def _builder(self, dataset: CachedDataset) -> BatchBuilder:
        config = self.config
        return BatchBuilder(
            dataset, self.vae, config.flow, config.packing, config.seed, self.device,
            backend=config.kernels.operator_backend, sharding=self.sharding,
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
        non-finite. A checkpoint is written at the end, at a stop and every `train.checkpoint_every` steps.
        """
        train = self.config.train
        with self._folder() as log, self.checkpoints:
            resumed = self.resume(log)
            self.context.on_main(self._write_config)
            event, word = ("resume", "resumed") if resumed else ("start", "starting")
            world, dims = self.context.world, self.context.dims
            degrees = {"dp_replicate": dims.dp_replicate, "dp_shard": dims.dp_shard, "sp": dims.sp}
            log.event(event, self.step, world=world, parallel=degrees, dtype=str(self.dtype))
            log.message(f"{word} at step {self.step} of {train.steps} in {self.out}")
            if isinstance(stop, StopRequest):
                stop.graceful = True
            if not resumed:
                self.evaluate(log)
                self.sample(log)
            first = self.step
            with self._profiler(profile) as profiler:
                while self.step < train.steps:
                    stopping = self.train_step(log, stop)
                    if self.step == first + 1:  # now the optimizer has its state
                        self.checkpoints.warm(self.state())
                    self.checkpoints.poll(log)
                    if profiler is not None:
                        profiler.step()
                    last = self.step == train.steps
                    if _due(self.step, train.eval_every, last):
                        self.evaluate(log)
                    if _due(self.step, train.sample_every, last):
                        self.sample(log)
                    if stopping or last or _due(self.step, train.checkpoint_every, last):
                        self.checkpoints.save(self.state(), self.step, log)
                    if stopping or last:
                        self.checkpoints.finish(log)
                    if stopping and not last:
                        log.event("stop", self.step)
                        log.message(
                            f"stopped by a signal after step {self.step}; run again to resume"
                        )
                        return "stopped"
            log.event("finish", self.step)
            log.message(f"finished at step {self.step}; try: goku sample {self.out} --prompt TEXT")
        return "finished"

    def train_step(self, log: RunLog, stop: threading.Event) -> bool:
        """One optimizer step on the global batch; True when any rank was asked to stop."""
        started = time.perf_counter()
        packing, train = self.config.packing, self.config.train
        tokens_of = self.builder.tokens
        positions = step_positions(
            self.position, lambda p: tokens_of[self.stream.item(p)], packing.tokens_per_step
        )
        indices = [self.stream.item(p) for p in positions]
        lengths = [tokens_of[i] for i in indices]
        weight_sum = math.fsum(self.builder.dataset.items[i].weight for i in indices)
        shares = partition(
            lengths, self._costs(lengths), self.context.packs, packing.tokens_per_pack
        )

        self.optimizer.zero_grad(set_to_none=True)
        statistics = StepStatistics(self.device)
        packs = self._rounds(shares, lengths)
        for number, (pack, idle) in enumerate(packs, start=1):
            batch = self.builder.training([positions[k] for k in pack], [indices[k] for k in pack])
            keep = self.config.sharding.keep_unsharded
            microbatch(self.model, last=number == len(packs), keep_unsharded=keep)
            per_sample = self.per_sample_loss(self.model, batch)
            weights = torch.zeros_like(batch.weights) if idle else batch.weights
            weighted_loss(per_sample, weights, weight_sum).backward()
            if not idle:
                sizes = batch.packing.lengths, batch.text_lengths
                work = flops.training_flops(self.config.model, *sizes)
                statistics.add(batch, per_sample, weight_sum, work)
        if stop.is_set():
            statistics.ask_to_stop()
        self.context.all_sum(statistics.vector)
        norm, lr = self._update()

        self.position += len(positions)
        self.step += 1
        seconds = time.perf_counter() - started
        if self.step % train.log_every == 0 or self.step == train.steps:
            self._log_step(log, statistics, norm, lr, seconds, positions, lengths, shares)
        if self.skipped > train.max_skipped_steps:
            log.event("gave_up", self.step, skipped=self.skipped)
            raise TrainingStopped(
                f"{self.skipped} steps in a row had a non-finite gradient norm; stopped at step {self.step}"
            )
        return statistics.stopping

    def _rounds(
        self, shares: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int]
    ) -> list[tuple[Sequence[int], bool]]:
        """(pack, idle) of this process, as many as any has: an idle pack is the step's shortest sample."""
        mine = shares[self.context.pack_rank]
        shortest = [min(range(len(lengths)), key=lambda k: lengths[k])]
        rounds = max(len(packs) for packs in shares)
        packs = [mine[k] if k < len(mine) else [] for k in range(rounds)]
        return [(pack or shortest, not pack) for pack in packs]

    def _costs(self, lengths: list[int]) -> list[float]:
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

    def _update(self) -> tuple[float, float]:
        """Clip, step, average. The norm is of the reduced gradient, hence equal on all ranks, as is the decision."""
        optimizer = self.config.optimizer
        lr = learning_rate(optimizer, self.step, self.config.train.steps)
        norm = clip(self.model, optimizer.grad_clip, self.context).item()
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
        positions: list[int],
        lengths: list[int],
        shares: list[list[list[int]]],
    ) -> None:
        loss, by_bin, by_modality = statistics.means()
        packs = [pack for share in shares for pack in share if pack]
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
            tokens_per_second=rate,
            mfu=mfu,
            packing_efficiency=efficiency(packs, lengths, self.config.packing.tokens_per_pack),
            loss_by_bin=by_bin,
            loss_by_modality=by_modality,
            positions=positions,
        )
        shown = "" if mfu is None else f"  MFU {mfu:.0%}"
        log.progress(self.step, f"loss {loss:.4f}  {rate:,.0f} tokens/s{shown}")

    # ---- looking at it

    @torch.no_grad()
    def evaluate(self, log: RunLog) -> None:
        """Loss of the averaged weights on fixed (sample, noise, t): training items, and unseen ones where given."""
        fields: dict[str, Any] = {}
        for name, builder in (("fixed", self.builder), ("unseen", self.unseen)):
            if builder is None:
                continue
            statistics = self._fixed_statistics(builder)
            loss, by_bin, by_modality = statistics.means()
            fields |= {
                f"{name}_loss": loss,
                f"{name}_by_bin": by_bin,
                f"{name}_by_modality": by_modality,
            }
        log.event("eval", self.step, **fields)

    def _fixed_statistics(self, builder: BatchBuilder) -> StepStatistics:
        train, packing = self.config.train, self.config.packing
        count = min(train.eval_items, len(builder.tokens))
        times = [(k + 0.5) / train.eval_times for k in range(train.eval_times)]
        cases = [(i, t) for i in range(count) for t in times]
        lengths = [builder.tokens[i] for i, _ in cases]
        weight_sum = math.fsum(builder.dataset.items[i].weight for i, _ in cases)
        costs = self._costs(lengths)
        statistics = StepStatistics(self.device)
        shares = partition(lengths, costs, self.context.packs, packing.tokens_per_pack)
        for pack, idle in self._rounds(shares, lengths):
            batch = builder.fixed([cases[k][0] for k in pack], [cases[k][1] for k in pack])
            per_sample = self.per_sample_loss(self.ema.module, batch)
            if not idle:
                statistics.add(batch, per_sample, weight_sum)
        self.context.all_sum(statistics.vector)
        return statistics

    def sample(self, log: RunLog) -> None:
        """Draw the first training captions with fixed seeds into out/samples/step_N; each group draws its share.

        All processes integrate together, since sharded weights are gathered together: what fails there ends the run,
        unless it is alone. Decoding and writing are each group's own, and a rank that fails there says so and goes on.
        """
        train = self.config.train
        items = self.builder.dataset.items[: train.sample_captions] if train.sample_every else []
        requests = [
            Request(item.caption, item.height, item.width, item.frames, seed=i)
            for i, item in enumerate(items)
        ]
        settings = SampleConfig(
            steps=train.sample_steps,
            shift=self.config.flow.shift,
            tokens_per_pack=self.config.packing.tokens_per_pack,
            precision=self.dtype,
        )
        folder = self.out / "samples" / f"step_{self.step:07d}"
        drawn: list[tuple[str, str]] = []
        failure: str | None = None
        context = self.context

        def integrate() -> dict[int, Tensor]:
            return integrate_all(
                self.ema.module, self.vae, self.text.encode, requests, settings, self.device,
                share=(context.pack_rank, context.packs), sharding=self.sharding,
            )  # fmt: skip

        latents = integrate() if context.world > 1 else {}
        try:
            if context.world == 1:
                latents = integrate()
            for i, latent in sorted(latents.items()) if context.leads_pack else []:
                path = save_media(decode(self.vae, latent), folder / file_stem(items[i].name))
                drawn.append((items[i].name, str(path.relative_to(self.out))))
        except (OSError, RuntimeError, ValueError) as error:
            failure = f"rank {context.rank}: {error}"
        for names, problem in context.gather((drawn, failure)):
            for name, saved in names:
                log.event("sample", self.step, name=name, path=saved)
            if problem is not None:
                log.event("sample_failed", self.step, error=problem)
                log.message(f"sampling at step {self.step} failed: {problem}")

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
                "config": self._saved_config(),
            },
        }

    def _saved_config(self) -> dict[str, Any]:
        """The resolved config; the VAE's folder absolute, so that sampling finds it from anywhere."""
        config = parser.to_dict(self.config)
        config["vae"]["path"] = str(Path(self.config.vae.path).absolute())
        return config

    def resume(self, log: RunLog) -> bool:
        """Continue from the latest checkpoint of `out`, if there is one.

        Raises ValueError with the differences when that checkpoint belongs to another run (config or data), and
        CheckpointError when it is damaged.
        """
        root = self.checkpoints.root
        # The main rank looks, since looking also removes what a crash left.
        found = self.context.together(
            lambda: find_checkpoint(root) if self.context.is_main else None
        )
        path = self.context.gather(found)[0]
        if path is None:
            return False
        newest = max(root.glob("step_*"), key=lambda p: p.name, default=path)
        if newest.name > path.name:
            log.event("damaged", self.step, path=str(newest), used=str(path))
            log.message(f"{newest} is damaged: going on from {path}")
        run = checkpoint.read_values(path)["run"]
        lines = resume_differences(run["config"], self.config)
        for name, value in self.fingerprints.items():
            if run["fingerprints"].get(name) != value:
                lines.append(_FINGERPRINTS[name])
        if lines:
            raise ValueError(
                f"{path} was written by an incompatible run; choose another `out`, or undo:\n  "
                + "\n  ".join(lines)
            )
        state = self.state()
        state["run"] = None  # whatever values were saved
        dtype, shape = checkpoint.describe(path)["rng.torch"]
        generators = state["rng"]["torch"] = torch.empty(shape, dtype=dtype)
        checkpoint.load(state, path, process_group=self.context.host_group)
        # A row of every process; of rank 0 alone in checkpoints of version 1. Further processes keep theirs.
        rows = generators.reshape(-1, shape[-1])
        if self.context.rank < len(rows):
            # A copy: torch 2.13 reads from the start of the storage, wherever the row begins in it.
            torch.set_rng_state(rows[self.context.rank].clone())
        run = state["run"]
        self.step, self.position, self.skipped = run["step"], run["position"], run["skipped"]
        self.ema.updates = run["ema_updates"]
        return True

    def _write_config(self) -> None:
        target = self.out / "config.yaml"
        partial = target.with_name(".partial-config.yaml")
        try:
            partial.write_text(parser.dump(self.config), encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def _folder(self) -> Iterator[RunLog]:
        """The run's folder, held for this run alone, and its log."""
        opened: list[RunLog] = []
        with ExitStack() as stack:

            def enter() -> None:
                tensorboard = self.out / "tensorboard" if self.config.train.tensorboard else None
                steps = self.config.train.steps
                stack.enter_context(_locked(self.out))
                opened.append(
                    RunLog(self.out / "train.jsonl", total_steps=steps, tensorboard=tensorboard)
                )
                stack.callback(opened[0].close)

            self.context.on_main(enter)
            yield opened[0] if opened else RunLog(None, total_steps=0)

    @contextmanager
    def _profiler(self, enabled: bool) -> Iterator[Any]:
        """torch.profiler over steps 3 to 5 of this process (warm by then), as a Chrome trace in out/profile."""
        if not enabled or not self.context.is_main:
            yield None
            return
        folder = self.out / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(folder / "trace.json")),
            record_shapes=True,
        ) as profiler:
            yield profiler


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (last or step % every == 0)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds `folder` against a second run; the lock ends with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"out is {folder}, which another run is writing to; allowed: one run a folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


# What a checkpoint and the run that continues it must share beside the config, and what to say if they do not.
_FINGERPRINTS = {
    "data": "data: the items (names, captions, weights, pixels, geometry) or the VAE differ from the checkpoint's",
    "grids": "data: packing.overlong cuts other samples than in the checkpoint's run",
    "vae": "vae.path: holds another VAE than the checkpoint was trained with",
    "text": "text: another encoder than the checkpoint was trained with",
    "precision": "train.precision: 'auto' means another dtype on this machine",
}
