"""`save` and `async_save`: one save by a `Checkpointer` that lives as long as it takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from goku_runtime.checkpoint.checkpointer import Checkpointer
from goku_runtime.checkpoint.handle import SaveHandle
from goku_runtime.checkpoint.options import CheckpointOptions, Retention

__all__ = ["async_save", "save"]


def save(
    state: dict[Any, Any],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    latest: bool = False,
    retention: Retention | None = None,
    process_group: dist.ProcessGroup | None = None,
    options: CheckpointOptions | None = None,
) -> Path:
    """Saves a state as a new checkpoint, whole or not at all.

    A state is nested dicts with dense tensors (or DTensors) and plain values as leaves; see
    `goku_runtime.checkpoint.tree`. Tensors that several ranks hold are written by one of them, so that
    ranks write about as much; DTensors part by part. Plain values must be equal on all ranks that
    have them. The checkpoint is durable when this returns, and stock
    ``torch.distributed.checkpoint.load`` reads it too.

    Args:
        state: left unchanged.
        path: the directory to make, on a file system that all ranks share. Its parents are made.
        overwrite: replace a checkpoint that is there (nothing else is ever replaced). The old one
            stays loadable until the new one takes its place.
        latest: make it the one that `latest` names, once it is in its place.
        retention: remove those that it does not keep, then.
        process_group: the ranks that save; None takes the default group if there is one.
        options: of files and memory.

    Returns:
        The directory, absolute.

    Raises:
        FileExistsError: `path` is there and may not be replaced.
        ValueError: a leaf that cannot be saved, or states that contradict each other; named.
        OSError: the disk is full or fails. The unfinished directory is removed; other checkpoints
            are untouched. Raised on every rank; the others name the one where it happened.
    """
    with Checkpointer(process_group, options) as checkpointer:
        return checkpointer.save(
            state, path, overwrite=overwrite, latest=latest, retention=retention
        )


def async_save(
    state: dict[Any, Any],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    latest: bool = False,
    retention: Retention | None = None,
    stage: Literal["now", "background"] = "now",
    process_group: dist.ProcessGroup | None = None,
    options: CheckpointOptions | None = None,
) -> SaveHandle:
    """`save` in the background: the caller waits only for a copy of the tensors in host memory.

    A training that saves again and again uses a `Checkpointer`, which keeps that memory and the layout.

    Args:
        stage: "now" returns when the state was copied. "background" returns at once and copies during
            what comes next, such as a forward and backward pass: nothing of the state may change
            before ``handle.wait_staged()`` returns, so call that before the optimizer's step.
        Others as for `save`.

    Returns:
        Its `result` waits for the end and raises what `save` would have raised from then on.

    Raises:
        As `save`, what shows before anything is written.
    """
    checkpointer = Checkpointer(process_group, options)
    try:
        handle = checkpointer.async_save(
            state, path, overwrite=overwrite, latest=latest, retention=retention, stage=stage
        )
    except BaseException:
        checkpointer.close()
        raise
    checkpointer.close_after(handle)
    return handle
