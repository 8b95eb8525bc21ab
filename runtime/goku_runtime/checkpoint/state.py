"""Saving a training state and loading it in place.

A state is a dict of dicts with dense tensors (or DTensors) and plain values as leaves; see
`goku_runtime.checkpoint.tree`. Every rank of the group calls these functions with a state of the
same keys; either all ranks return or all raise.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.directory import NewDirectory, write_durably
from goku_runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    FileSum,
    Manifest,
    file_problem,
    file_problems,
    raise_problems,
)
from goku_runtime.checkpoint.metadata import METADATA_NAME, read_metadata
from goku_runtime.checkpoint.ranks import Ranks
from goku_runtime.checkpoint.root import POINTER_NAME
from goku_runtime.checkpoint.storage import StagingReader, SummingWriter
from goku_runtime.checkpoint.tree import Flat, Match, decode, flatten, match, parse_tree, to_json

__all__ = ["STATE_NAME", "load", "read_values", "save"]

STATE_NAME = "state.json"


def save(
    state: dict[Any, Any],
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Saves a state as a new checkpoint, whole or not at all.

    Tensors that every rank holds are written once, by the ranks in turn; DTensors part by part.
    Plain values must be equal on all ranks. The checkpoint is durable when this returns.

    Args:
        state: nested dicts of tensors and plain values; left unchanged.
        path: the directory to make, on a file system that all ranks share. Its parents are made.
        overwrite: replace a checkpoint that is there (nothing else is ever replaced). The old one
            stays loadable until the new one takes its place.
        process_group: the ranks that save; None takes the default group if there is one. With NCCL
            give a Gloo group: the plans of DCP would otherwise travel through GPU memory.

    Raises:
        FileExistsError: `path` is there and may not be replaced.
        ValueError: a leaf that cannot be saved, or states that differ between ranks; named.
        OSError: the disk is full or fails. The unfinished directory is removed; other checkpoints
            are untouched. Raised on every rank, naming the one where it happened.
    """
    ranks = Ranks(process_group)
    target = Path(os.path.abspath(path))
    flat = _flatten_alike(ranks, state)
    directory = ranks.on_first(lambda: _make(target, overwrite))
    try:
        unfinished = Path(ranks.gather(str(directory.path) if directory else "")[0])
        ranks.together(lambda: _check_shared(unfinished))
        writer = SummingWriter(unfinished)
        with _quiet_dcp(ranks):
            dcp.save(
                dict(flat.tensors),
                storage_writer=writer,
                process_group=ranks.group,
                no_dist=not ranks.distributed,
            )
        sums = {name: entry for each in ranks.gather(writer.sums) for name, entry in each.items()}

        ranks.together(lambda: _finish(directory, to_json(flat.tree), sums))
    except BaseException:
        if directory is not None:
            directory.discard()
        raise


def load(
    state: dict[Any, Any],
    path: str | os.PathLike[str],
    *,
    partial: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Verifies a checkpoint and loads it into `state`, in place.

    The number of ranks may differ from that which saved.

    Tensors are copied into the tensors of `state`, whatever their device and strides; plain values
    are replaced in its dicts, so the tensors of ``model.state_dict()`` may be given directly. Where
    `state` has None, any plain value or dict of them is accepted. Everything is read and checked on
    every rank before the first change, which takes host memory for what this rank loads.

    Args:
        state: nested dicts with the keys, shapes and dtypes of the checkpoint.
        path: the checkpoint. All of it is verified, also with `partial`.
        partial: leave out what the checkpoint has and `state` has not, such as the optimizer.
        process_group: the ranks that load, each with its own `state`; as for `save`.

    Raises:
        CheckpointError: no checkpoint, or files missing, truncated, altered, extra or crafted.
        ValueError: keys missing or unexpected, or kinds, shapes or dtypes that differ: all named,
            with what was saved and what is wanted. (CheckpointError is a ValueError too.)
        OSError: a file cannot be read.
    """
    ranks = Ranks(process_group)
    directory = Path(os.path.abspath(path))
    manifest = ranks.together(lambda: Manifest.read(directory))
    share = (ranks.rank, ranks.count)
    found = ranks.together(lambda: file_problems(directory, manifest, share=share))
    raise_problems(directory, [problem for each in ranks.gather(found) for problem in each])

    def check() -> tuple[Match, Metadata]:
        metadata = read_metadata(directory, manifest.files)
        plan = match(state, _read_tree(directory), partial=partial)
        problems = plan.problems + _tensor_problems(plan, metadata)
        if problems:
            raise ValueError(f"{directory} does not fit the state: " + "; ".join(problems))
        return plan, metadata

    plan, metadata = ranks.together(check)
    reader = StagingReader(directory, metadata)
    with _quiet_dcp(ranks):
        dcp.load(
            {name: tensor for name, (_, tensor) in plan.tensors.items()},
            storage_reader=reader,
            process_group=ranks.group,
            no_dist=not ranks.distributed,
        )
    reader.commit()
    for parent, key, value in plan.values:
        parent[key] = value


def read_values(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The plain values of a checkpoint, nested as they were saved, without its tensors.

    Only what is read is verified: the manifest and state.json.

    Raises:
        CheckpointError: no checkpoint, or one of the two files is damaged.
        OSError: a file cannot be read.
    """
    directory = Path(path)
    manifest = Manifest.read(directory)
    if STATE_NAME not in manifest.files:
        raise CheckpointError(f"{directory} is damaged: {STATE_NAME}: missing")
    raise_problems(directory, file_problem(directory / STATE_NAME, manifest.files[STATE_NAME]))
    values = decode(_read_tree(directory))
    return dict(values)


def _flatten_alike(ranks: Ranks, state: dict[Any, Any]) -> Flat:
    """Takes the state apart and makes sure that all ranks hold the same but for DTensors' parts."""
    flat = ranks.together(lambda: flatten(state))
    description = flat.description()
    if len(set(ranks.gather(crc32c(description.encode())))) > 1:
        texts = [text.splitlines() for text in ranks.gather(description)]
        for rank, lines in enumerate(texts):
            # Both end with the same brackets, so they differ before either ends.
            for first, other in zip(texts[0], lines, strict=False):
                if first != other:
                    raise ValueError(
                        f"state: differs between ranks; rank 0 has {first.strip()!r}, "
                        f"rank {rank} has {other.strip()!r}"
                    )
    return flat


def _make(target: Path, overwrite: bool) -> NewDirectory:
    if target.name in ("", POINTER_NAME):
        raise ValueError(f"path: found {target}; the name {target.name!r} is not allowed")
    return NewDirectory(target, overwrite=overwrite)


def _finish(directory: NewDirectory | None, values: str, sums: dict[str, FileSum]) -> None:
    """Rank 0 (the one with the directory) writes what is left, the manifest last."""
    if directory is None:
        return
    text = values.encode()
    write_durably(directory.path / STATE_NAME, text)
    manifest = Manifest.of(sums | {STATE_NAME: FileSum(len(text), crc32c(text))})
    write_durably(directory.path / MANIFEST_NAME, manifest.to_bytes())
    raise_problems(directory.path, file_problems(directory.path, manifest, sums=False))
    directory.publish()


def _check_shared(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory.parent}: rank 0 made a directory there which this rank does not see; "
            "a checkpoint needs a file system that all ranks share"
        )


def _read_tree(directory: Path) -> Any:
    path = directory / STATE_NAME
    return parse_tree(path.read_bytes(), str(path))


def _tensor_problems(plan: Match, metadata: Metadata) -> list[str]:
    """Which of the caller's tensors do not have the shape and dtype of the saved ones."""
    problems = []
    for saved_name, (name, tensor) in plan.tensors.items():
        saved = metadata.state_dict_metadata.get(saved_name)
        if not isinstance(saved, dcp.TensorStorageMetadata):
            raise CheckpointError(f"{METADATA_NAME} is damaged: it lacks {saved_name!r}")
        was = f"{saved.properties.dtype} {tuple(saved.size)}"
        wanted = f"{tensor.dtype} {tuple(tensor.shape)}"
        if was != wanted:
            problems.append(f"{name}: {was} was saved, {wanted} is wanted")
    return problems


@contextmanager
def _quiet_dcp(ranks: Ranks) -> Generator[None]:
    """Turns DCP's exception into what stood behind it, and leaves out its warning of no ranks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            ranks.raise_dcp(error)
            raise
