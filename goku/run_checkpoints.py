"""A run's checkpoints: saved while training goes on, and logged once they are in their place."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from goku.data import Dataset, ItemList
from goku.data.item_list import FILE_NAME
from goku.metrics import RunLog
from goku.parallelize import local
from goku.run_config import RunConfig, TrainConfig, resume_differences
from goku.trained import read_run
from goku.vae import has_vae
from goku_runtime import checkpoint
from goku_runtime.checkpoint import Checkpointer, Retention, SaveHandle

__all__ = [
    "RunCheckpoints",
    "check_resumable",
    "check_same_run",
    "check_vae_is_there",
    "has_checkpoints",
    "random_states",
    "set_random_state",
]

# What a checkpoint and the run that continues it must share beside the config, and what to say if they do not.
_FINGERPRINTS = {
    "data": "data: the items (names, captions, weights, pixels, geometry) or the VAE differ from the checkpoint's",
    "grids": "data: packing.overlong cuts other samples than in the checkpoint's run",
    "vae": "vae.path: holds another VAE than the checkpoint was trained with",
    "text": "text: another encoder than the checkpoint was trained with",
    "precision": "train.precision: 'auto' means another dtype on this machine",
}


@dataclass
class _Saving:
    handle: SaveHandle
    step: int
    started: float
    stall: float


class RunCheckpoints:
    """`out`/checkpoints, written by all ranks as `train.checkpoint_mode` says.

    A context manager: at its end the save that is under way is waited for.
    """

    def __init__(self, out: Path, train: TrainConfig, group: dist.ProcessGroup | None) -> None:
        self.root = out / "checkpoints"
        self._mode = train.checkpoint_mode
        self._retention = Retention(train.keep_checkpoints, train.keep_checkpoints_every)
        self._checkpointer = Checkpointer(group)
        self._saving: _Saving | None = None

    def __enter__(self) -> RunCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._checkpointer.close()
            return
        if self._saving is not None:
            self._saving.handle.wait_ended()
        with suppress(OSError, ValueError, RuntimeError):
            self._checkpointer.close()  # what training failed with is raised, not a save's error

    def warm(self, state: dict[str, Any]) -> None:
        """Have the memory for copies of such a state now: if there is too little, a run fails early."""
        if self._mode != "sync":
            self._checkpointer.warm(state)

    def save(self, state: dict[str, Any], step: int, log: RunLog) -> None:
        """Write step_N on all ranks, move `latest` and remove what retention does not keep.

        Waits for the save before, and raises its error.
        """
        self.finish(log)
        started = time.perf_counter()
        handle = self._checkpointer.async_save(
            state,
            self.root / f"step_{step:07d}",
            overwrite=True,
            latest=True,
            retention=self._retention,
            stage="background" if self._mode == "overlap" else "now",
        )
        self._saving = _Saving(handle, step, started, time.perf_counter() - started)
        if self._mode == "sync":
            self.finish(log)

    def wait_staged(self) -> None:
        """Wait until the state that is being saved may change."""
        if self._saving is not None:
            started = time.perf_counter()
            self._saving.handle.wait_staged()
            self._saving.stall += time.perf_counter() - started

    def finish(self, log: RunLog) -> None:
        """Wait for the save that is under way, if there is one; raises its error."""
        if self._saving is not None:
            self._saving.handle.result()
            self.poll(log)

    def poll(self, log: RunLog) -> None:
        """Log the save that was under way, if it has ended well; waits for nothing.

        Whether one has ended is not seen by all ranks at the same step, so nothing is raised here.
        """
        saving = self._saving
        if saving is None or not saving.handle.succeeded:
            return
        self._saving = None
        log.event(
            "checkpoint",
            saving.step,
            path=os.path.relpath(saving.handle.path, self.root.parent),
            seconds=time.perf_counter() - saving.started,
            stall_seconds=saving.stall,
        )


def has_checkpoints(out: Path) -> bool:
    """Whether a run in `out` has written any, damaged ones too. Removes nothing: another run may hold the folder."""
    return any((out / "checkpoints").glob("step_*"))


def check_resumable(config: RunConfig) -> None:
    """ValueError with the differences where `config.out` holds checkpoints of another config: before a VAE is trained
    or a latent encoded. What a checkpoint shares beside it is compared when it is loaded (`check_same_run`)."""
    for path in sorted((Path(config.out) / "checkpoints").glob("step_*"), reverse=True):
        try:
            run = read_run(path)
        except (ValueError, OSError):
            continue  # what is damaged is found, and told of, when it is loaded
        _refuse(path, resume_differences(run["config"], config))
        check_vae_is_there(path, config)
        return


def check_vae_is_there(path: Path, config: RunConfig) -> None:
    """ValueError where the VAE that the checkpoint at `path` was trained with is gone: a new one would be trained for
    minutes or hours, and be another."""
    if not has_vae(config.vae.path):
        raise ValueError(
            f"vae.path is {config.vae.path}, which holds no VAE, and {path} was trained with one; put it back, or name "
            "the folder where it is (or choose another `out` to begin anew)"
        )


def check_same_run(
    path: Path,
    run: Mapping[str, Any],
    config: RunConfig,
    fingerprints: Mapping[str, str],
    dataset: Dataset,
) -> None:
    """ValueError with the differences where the checkpoint at `path`, of `run`, is not one of this run."""
    lines = resume_differences(run["config"], config)
    for name, value in fingerprints.items():
        if name == "grids" and lines:
            continue  # other sizes are other grids: that was said
        if run["fingerprints"].get(name) != value:
            lines.append(_FINGERPRINTS[name])
            before = ItemList.read(Path(config.out) / FILE_NAME) if name == "data" else None
            if before is not None:
                lines += [f"  {line}" for line in before.differences(dataset.item_list())]
    _refuse(path, lines)


def _refuse(path: Path, lines: list[str]) -> None:
    if lines:
        raise ValueError(
            f"{path} was written by an incompatible run; choose another `out`, or undo:\n  "
            + "\n  ".join(lines)
        )


def random_states(
    own: Tensor, path: Path, run: Mapping[str, Any], processes: int
) -> tuple[Tensor, bool]:
    """What the random states of the checkpoint at `path`, of `run`, are loaded into, and whether that is `own`.

    A row of every process, each in its own file: of as many processes each reads its own alone. Others read all.
    """
    if run.get("processes") == processes:
        return own, True
    # Not asked for above: of a model in thousands of parts the index is read for half a minute.
    dtype, shape = checkpoint.describe(path)["rng.torch"]
    if own.shape == shape:  # checkpoints of before name no number of processes
        return own, True
    return torch.empty(shape, dtype=dtype), False  # of version 1: of rank 0 alone, and no rows


def set_random_state(saved: Tensor, number: int) -> None:
    """Go on with row `number` of saved random states of torch, (rows, bytes) of this process or (bytes) of one process;
    a process that has none there keeps its own."""
    rows = local(saved).reshape(-1, saved.shape[-1]).cpu()
    if number < len(rows):
        # A copy: torch 2.13 reads from the start of the storage, wherever the row begins in it.
        torch.set_rng_state(rows[number].clone())
