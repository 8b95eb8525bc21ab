"""Loading a checkpoint into a state, in place, whatever ranks and meshes it was saved from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from goku_runtime.checkpoint import version1
from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.collection import no_collection
from goku_runtime.checkpoint.directory import given_path
from goku_runtime.checkpoint.layout import global_rank
from goku_runtime.checkpoint.manifest import (
    Manifest,
    file_problems,
    raise_problems,
    unless_replaced,
)
from goku_runtime.checkpoint.options import CheckpointOptions
from goku_runtime.checkpoint.plan import held
from goku_runtime.checkpoint.ranks import Ranks
from goku_runtime.checkpoint.stored import Stored, Version2, read_tree
from goku_runtime.checkpoint.tree import Match, decode, is_spread, local_part, match

__all__ = ["describe", "load", "read_values"]


S = TypeVar("S", version1.Version1, Version2)

# Of what does not fit, how much an error shows: a prefix too many is thousands of keys.
_SHOWN = 10
# A line of `_tensor_problems` whose two dtypes differ, whatever the shapes.
_OTHER_DTYPE = re.compile(r": (torch\.\w+) \([\d, ]*\) was saved, (?!\1 )torch\.")


def load(
    state: dict[Any, Any],
    path: str | os.PathLike[str],
    *,
    partial: bool = False,
    convert: bool = False,
    broadcast: bool = False,
    process_group: dist.ProcessGroup | None = None,
    options: CheckpointOptions | None = None,
) -> None:
    """Loads a checkpoint into `state`, in place.

    The number of ranks, meshes and placements may differ from those that saved: each rank reads the
    bytes of its own parts, and verifies the chunks that they lie in before a byte is copied.

    Bytes go straight into dense CPU tensors; others (on a GPU, strided, of another dtype) are read
    aside, 256 MiB or one tensor at a time. Plain values are replaced in the dicts, so the tensors of
    ``model.state_dict()`` may be given directly. Where `state` has None, any plain value or dict of
    them is accepted. What does not fit is found before anything is read; an error after that (damage,
    a failing disk) leaves some tensors loaded and others not, none of them with wrong values.

    Args:
        state: nested dicts with the keys, shapes and dtypes of the checkpoint. A rank's may lack keys that
            other ranks have.
        path: the checkpoint.
        partial: leave out what the checkpoint has and `state` has not, such as the optimizer.
        convert: accept tensors of another dtype, and convert as `Tensor.copy_` does.
        broadcast: read what several ranks hold on one of them, which sends it to the others: for file
            systems slower than the network. Tensors on a GPU need a group that can send them. What is not
            wanted alike (dtype, device, mesh, placements) by all ranks that hold it, each reads by itself.
            The same on all ranks.
        process_group: the ranks that load, each with its own `state`; None takes the default group where
            there is one. If it has no backend for CPU tensors (NCCL alone), or `options` have a timeout, a Gloo
            group of the same ranks is made for the time of the call.
        options: of the reading engine, and how long a rank waits for the others' files.

    Raises:
        CheckpointError: no checkpoint, or files missing, truncated, altered or extra: named, with the
            tensors in the altered bytes and the rank that wrote them; or one that was replaced or removed
            while it was read, which is told apart.
        ValueError: keys missing or unexpected, or kinds, shapes or dtypes that differ: all named,
            with what was saved and what is wanted; or ranks that were given different checkpoints.
            (CheckpointError is a ValueError too.)
        OSError: a file cannot be read.
        Either on all ranks; those where nothing is wrong name one where something is.
    """
    options = CheckpointOptions.given(options)
    given = Ranks(process_group)
    with given.for_files(options.timeout_s) as ranks:
        directory, manifest = _looked_at(ranks, path, broadcast=broadcast)
        if manifest.version == 1:
            first = version1.Version1(ranks, directory, manifest)
            _, plan = _matched(
                state, ranks, directory, manifest, lambda: first, partial=partial, convert=convert
            )
            first.load(_tensors(plan))
        else:
            with no_collection():
                second, plan = _matched(
                    state, ranks, directory, manifest, lambda: Version2(ranks, directory, manifest),
                    partial=partial, convert=convert,
                )  # fmt: skip
            second.load(_tensors(plan), options, senders=given if broadcast else None)
    for parent, key, value in plan.values:
        parent[key] = value


def read_values(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """The plain values of a checkpoint, nested as they were saved, without its tensors.

    Only what is read is verified: the manifest and state.json.

    Raises:
        CheckpointError: no checkpoint, or one of the two files is damaged.
        ValueError: `path` is an address, or no path.
        OSError: a file cannot be read.
    """
    directory = given_path(path)
    return dict(decode(read_tree(directory, Manifest.read(directory))))


def describe(path: str | os.PathLike[str]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtype and shape of every tensor of a checkpoint, by name: its keys joined by dots.

    Only the manifest and the index are read and verified.

    Raises:
        CheckpointError: no checkpoint, or one of the two files is damaged.
        ValueError: `path` is an address, or no path.
        OSError: a file cannot be read.
    """
    directory = given_path(path)
    manifest = Manifest.read(directory)
    if manifest.version > 1:
        tensors = Stored(directory, manifest).index.tensors
        return {name: (each.dtype, each.shape) for name, each in tensors.items()}
    return version1.described(directory, manifest)


def _looked_at(
    ranks: Ranks, path: str | os.PathLike[str], *, broadcast: bool
) -> tuple[Path, Manifest]:
    """The directory and the manifest, on all ranks; of version 2 the sizes of all files too, by the ranks in turn.

    Raises:
        CheckpointError: no checkpoint, or files missing, truncated or extra, all named on all ranks.
        ValueError: no path, ranks were given different checkpoints, or `broadcast` differs.
    """
    own: list[tuple[Path, Manifest]] = []

    def look() -> tuple[str, int, bool, list[str]]:
        directory = Path(os.path.abspath(given_path(path)))
        manifest = Manifest.read(directory)
        own.append((directory, manifest))
        problems: list[str] = []
        if manifest.version > 1:  # version 1 reads the files themselves
            share = (ranks.rank, ranks.count)
            with unless_replaced(directory, manifest):
                problems = file_problems(directory, manifest, sums=False, share=share)
        return str(directory), crc32c(manifest.to_bytes()), broadcast, problems

    found = ranks.collect(look)
    first, manifest, sends, _ = found[0]
    for rank, (place, other, sent, _) in enumerate(found):
        # By the manifest, which has the time of the save and all sums: one directory may be mounted under
        # two names. Before the problems: each rank has looked at its share of its own checkpoint alone.
        if other != manifest:
            note = "" if place != first else ", but another checkpoint lies there"
            raise ValueError(
                f"path: all ranks load one checkpoint; it is {first} on rank 0 and {place} on rank {rank}{note}"
            )
        if sent != sends:
            raise ValueError(f"broadcast is {sends} on rank 0 and {sent} on rank {rank}")
    with unless_replaced(*own[0]):
        raise_problems(own[0][0], [problem for each in found for problem in each[3]])
    return own[0]


def _tensors(plan: Match) -> dict[str, torch.Tensor]:
    """The caller's tensors by saved name."""
    return {name: tensor for name, (_, tensor) in plan.tensors.items()}


def _matched(
    state: dict[Any, Any],
    ranks: Ranks,
    directory: Path,
    manifest: Manifest,
    opened: Callable[[], S],
    *,
    partial: bool,
    convert: bool,
) -> tuple[S, Match]:
    """Opens a checkpoint and lays it over the state; raises on all ranks if it does not fit on one."""
    own: list[tuple[S, Match]] = []

    def check() -> tuple[list[str], list[str]]:
        stored = opened()
        plan = match(state, read_tree(directory, manifest))
        own.append((stored, plan))
        problems = plan.problems + _tensor_problems(plan, stored, convert=convert)
        return problems, [] if partial else plan.unexpected

    found = ranks.collect(check)
    # What no rank has a key for; a rank may lack what another one has.
    nobody = set.intersection(*(set(unexpected) for _, unexpected in found))
    plan = own[0][1]
    problems = found[ranks.rank][0]
    problems = problems + [f"{name}: unexpected" for name in plan.unexpected if name in nobody]
    for rank, (others, _) in enumerate(found):
        problems = problems or [f"rank {rank}: {each}" for each in others]
    if problems:
        text = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"{directory} does not fit the state: {text}{more}{_hints(problems, convert)}"
        )
    return own[0]


def _hints(problems: list[str], convert: bool) -> str:
    """What helps against some of them, and was not asked for."""
    found = []
    if any(each.endswith(": unexpected") for each in problems):
        found.append(
            "partial=True leaves out what the state has no key for (an optimizer has its moments only "
            "after a step: torch.distributed.checkpoint.state_dict.get_state_dict makes them)"
        )
    if not convert and any(_OTHER_DTYPE.search(each) for each in problems):
        found.append("convert=True accepts other dtypes")
    return f" ({'; '.join(found)})" if found else ""


def _tensor_problems(
    plan: Match, stored: version1.Version1 | Version2, *, convert: bool
) -> list[str]:
    """Which of the caller's tensors do not have the shape and dtype of the saved ones, or of their own part."""
    problems = []
    # Of plain tensors the part is the whole; for 20,000 of them this took 60 ms of a load of 600.
    spread = {saved: tensor for saved, (_, tensor) in plan.tensors.items() if is_spread(tensor)}
    boxes = {each.name: each.box for each in held(spread, rank=global_rank())}
    for saved_name, (name, tensor) in plan.tensors.items():
        dtype, shape = stored.described(saved_name)
        other = str(tensor.dtype) != dtype and not convert
        if other or tuple(tensor.shape) != shape:
            wanted = f"{tensor.dtype} {tuple(tensor.shape)}"
            problems.append(f"{name}: {dtype} {shape} was saved, {wanted} is wanted")
            continue
        if saved_name not in spread:
            continue
        # Where a part is of another shape, its bytes would go beside it.
        part, box = tuple(local_part(tensor).shape), boxes.get(saved_name)
        if tensor.numel() and (math.prod(part) > 0 if box is None else part != box.size):
            makes = "leave it none" if box is None else f"make it {box.size}"
            problems.append(
                f"{name}: this rank's part has shape {part}; its mesh and placements {makes}"
            )
    return problems
