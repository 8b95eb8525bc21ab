"""Our checkpoints behind `torch.distributed.checkpoint`: its `save`, `async_save` and `load` write and
read them where they are given a GokuStorageWriter or a GokuStorageReader.

    dcp.save(state, checkpoint_id=path, storage_writer=GokuStorageWriter())
    dcp.load(state, checkpoint_id=path, storage_reader=GokuStorageReader())

What is written is a checkpoint as `goku_runtime.checkpoint.save` writes it: `load`, `verify` and stock
DCP read it. Planning is DCP's, on its coordinator; `goku_runtime.checkpoint.save` plans on every rank
alone. What DCP's planner loses is lost: int keys become str, empty dicts vanish.
"""

from __future__ import annotations

import dataclasses
import io
import os
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from goku_runtime.checkpoint._dcp_assembly import Collected, files
from goku_runtime.checkpoint._dcp_writing import write_items
from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.dcp_metadata import leaves
from goku_runtime.checkpoint.directory import (
    NewDirectory,
    check_name,
    new_token,
    remove,
    unfinished,
    write_durably,
)
from goku_runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    FileSum,
    Manifest,
    file_problems,
    raise_problems,
    unless_replaced,
)
from goku_runtime.checkpoint.options import CheckpointOptions
from goku_runtime.checkpoint.plan import Box
from goku_runtime.checkpoint.root import newest_ns, series_of
from goku_runtime.checkpoint.stored import Stored, read_tree

__all__ = ["GokuStorageReader", "GokuStorageWriter"]

# Tensors that bytes cannot go straight into (on a GPU, strided, of another dtype) are read aside, this
# much at a time, or one tensor if that is more.
_ASIDE_BYTES = 256 << 20


def _target(checkpoint_id: str | os.PathLike[str] | None) -> Path:
    if checkpoint_id is None:
        raise ValueError("checkpoint_id is None; give a path, here or to dcp.save or dcp.load")
    return Path(os.path.abspath(checkpoint_id))


def _is_path(checkpoint_id: str | os.PathLike[str]) -> bool:
    return isinstance(checkpoint_id, str | os.PathLike) and "://" not in str(checkpoint_id)


# --- writing ----------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """What the coordinator tells a rank: how the temporary directory ends, and the rank's number."""

    token: str
    rank: int


@cache
def _token(process: int) -> str:
    """One for each process: DCP's cached plans bring a rank what it was told in the first save."""
    return new_token()


class GokuStorageWriter(StorageWriter):
    """Writes what DCP's `save` and `async_save` (by thread or by process) plan.

    The checkpoint appears under its name when all of it is durable, or not at all: a rank that fails
    removes what all have written. (What is left when processes are killed the next save removes.) Use
    one writer for one save at a time.

    Args:
        path: the directory to make; None where `dcp.save` is given a `checkpoint_id`.
        overwrite: replace a checkpoint that is there (nothing else is ever replaced).
        options: of files and memory.

    Raises:
        What DCP raises: its CheckpointException on all ranks, whose `failures` hold, by rank, what
        `goku_runtime.checkpoint.save` would have raised.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
        options: CheckpointOptions | None = None,
    ) -> None:
        self.checkpoint_id = path
        self._overwrite = overwrite
        self._options = CheckpointOptions.given(options)
        self._directory: NewDirectory | None = None  # the coordinator's
        self._undo: weakref.finalize[Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # DCP sends the writer to its process for saving; a save that is under way stays here.
        return self.__dict__ | {"_directory": None, "_undo": None}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path."""
        return _is_path(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins, into `checkpoint_id` if given. What is left of a failed one is removed."""
        self._abandon()
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id

    def storage_meta(self) -> StorageMeta | None:
        """The path, for planners that want to know."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError: no path, or a save without collectives, of which no rank knows all."""
        self._abandon()
        check_name(_target(self.checkpoint_id))
        if not kwargs.get("use_collectives", True):
            raise ValueError("use_collectives is False; allowed: True")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is: a rank lays out its file when it knows what it is to write."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the temporary directory (on the coordinator) and tells the ranks which it is."""
        token = _token(os.getpid())
        self._directory = NewDirectory(
            _target(self.checkpoint_id),
            overwrite=self._overwrite,
            fsync=self._options.fsync,
            token=token,
        )
        # Should nobody get to call this again: when the writer goes, or the program ends.
        self._undo = weakref.finalize(self, _discard, self._directory, os.getpid())
        return [
            dataclasses.replace(plan, storage_data=_Place(token, rank))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's data file; the future it returns is done."""
        place = plan.storage_data
        if not isinstance(place, _Place):
            raise ValueError(
                f"storage_data of the plan is a {type(place).__name__}; the planner has to leave it be"
            )
        directory = unfinished(_target(self.checkpoint_id), place.token)
        try:
            if not directory.is_dir():
                raise CheckpointError(
                    f"{directory.parent}: the coordinator made a directory there which rank "
                    f"{place.rank} does not see: another rank failed and removed it, or this is no "
                    "file system that all ranks share"
                )
            results = write_items(plan.items, planner, directory, place.rank, self._options)
        except BaseException:
            # DCP tells nobody else. Renamed first: no rank that still writes can add to it.
            with suppress(OSError):
                remove(directory)
            self._abandon()
            raise
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes what is left, the manifest last, and renames the directory (on the coordinator)."""
        directory = self._directory
        assert directory is not None
        assert self._undo is not None
        try:
            collected = Collected.of(results)
            sums = collected.sums
            for name, data in files(metadata, collected).items():
                write_durably(directory.path / name, data, fsync=directory.fsync)
                sums[name] = FileSum(len(data), crc32c(data))
            target = directory.target
            after = newest_ns(target.parent, series_of(target.name))
            manifest = Manifest.of(sums, after=after)
            path = directory.path / MANIFEST_NAME
            write_durably(path, manifest.to_bytes(), fsync=directory.fsync)
            raise_problems(directory.path, file_problems(directory.path, manifest, sums=False))
            directory.publish()
        except BaseException:
            self._abandon()
            raise
        self._undo.detach()
        self._directory = self._undo = None

    def _abandon(self) -> None:
        if self._undo is not None:
            self._undo()
        self._directory = self._undo = None


def _discard(directory: NewDirectory, process: int) -> None:
    if os.getpid() == process:  # and not that of a process that was forked during the save
        directory.discard()


# --- reading ----------------------------------------------------------------------------------------


class GokuStorageReader(StorageReader):
    """Reads our checkpoints of version 2 for DCP's `load`.

    Nothing is unpickled: names, shapes and places come from index.json, values from state.json. Of the
    data files only what is wanted is read, straight into dense CPU tensors, and every chunk is verified
    before a byte of it is copied. To DCP's planner each tensor looks like one piece, so that it plans
    one read for each part that is wanted, whoever wrote it. As DCP does, a tensor of another dtype
    is converted to. Values are found by the names of leaves: what was saved as one dict by a planner
    that does not flatten (flatten_state_dict=False) is found by ours and by stock DCP's `load` alone.

    Args:
        path: the checkpoint; None where `dcp.load` is given a `checkpoint_id`.
        options: of the reading engine.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        options: CheckpointOptions | None = None,
    ) -> None:
        self.checkpoint_id = path
        self._options = CheckpointOptions.given(options)
        self._opened: tuple[Stored, dict[str, Any]] | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path."""
        return _is_path(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins, from `checkpoint_id` if given."""
        self._opened = None
        if checkpoint_id is not None:
            self.checkpoint_id = checkpoint_id

    def read_metadata(self, *args: Any) -> Metadata:
        """What the checkpoint holds.

        Raises:
            ValueError: no checkpoint, a damaged one, or one of version 1. DCP makes an AssertionError
                of it, whose text ends with what was wrong.
        """
        directory = _target(self.checkpoint_id)
        manifest = Manifest.read(directory)
        if manifest.version < 2:
            raise ValueError(
                f"{directory} is of version 1, whose files are DCP's: FileSystemReader reads them, and "
                "goku_runtime.checkpoint.load without unpickling"
            )
        stored = Stored(directory, manifest)
        tree = read_tree(directory, manifest)
        paths, values = leaves(tree)
        described: dict[str, Any] = {name: BytesStorageMetadata() for name in values}
        for name, tensor in stored.index.tensors.items():
            size = torch.Size(tensor.shape)
            chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
            properties = TensorProperties(dtype=tensor.dtype)
            described[name] = TensorStorageMetadata(properties, size, [chunk])
        self._opened = stored, values
        return Metadata(described, planner_data=paths, storage_meta=StorageMeta())

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Looks (on the coordinator) whether all files are there and of their sizes.

        Raises:
            CheckpointError: they are not: all named.
        """
        stored, _ = self._open()
        if is_coordinator:
            with unless_replaced(stored.directory, stored.manifest):
                problems = file_problems(stored.directory, stored.manifest, sums=False)
                raise_problems(stored.directory, problems)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are: ranks read for themselves."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads what this rank wants; the future it returns is done.

        Raises:
            CheckpointError: bytes that are not those that were written; tensor and writer are named.
            OSError: a file cannot be read.
        """
        stored, values = self._open()
        batch = _Batch(stored, planner, self._options)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                stream = io.BytesIO()
                torch.save(values[item.storage_index.fqn], stream)
                stream.seek(0)
                planner.load_bytes(item, stream)
            else:
                batch.add(item)
        batch.read()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _open(self) -> tuple[Stored, dict[str, Any]]:
        if self._opened is None:
            self.read_metadata()
        assert self._opened is not None
        return self._opened


class _Batch:
    """Parts of tensors that are read in one go."""

    def __init__(self, stored: Stored, planner: LoadPlanner, options: CheckpointOptions) -> None:
        self._stored, self._planner, self._options = stored, planner, options
        self._wanted: list[tuple[str, Box, Tensor]] = []
        self._targets: list[tuple[ReadItem, Tensor]] = []
        self._aside_bytes = 0

    def add(self, item: ReadItem) -> None:
        """One more; what is in the batch is read once that is much."""
        chunk = item.storage_index.offset or torch.Size([0] * len(item.lengths))
        start = tuple(map(sum, zip(chunk, item.storage_offsets, strict=True)))
        box = Box(start, tuple(item.lengths))
        target = self._planner.resolve_tensor(item).detach()
        if target.shape != item.lengths:
            raise ValueError(
                f"{item.dest_index.fqn}: {tuple(item.lengths)} is to be read, the planner gives a "
                f"tensor of {tuple(target.shape)}"
            )
        name = item.storage_index.fqn
        dtype = self._stored.index.tensors[name].dtype
        straight = target.device.type == "cpu" and target.is_contiguous()
        lazy = target.is_conj() or target.is_neg()
        place = target
        if not straight or lazy or target.dtype != dtype:
            place = torch.empty(box.size, dtype=dtype, device="cpu")
            self._aside_bytes += place.nbytes
        self._wanted.append((name, box, place))
        self._targets.append((item, target))
        if self._aside_bytes >= _ASIDE_BYTES:
            self.read()

    def read(self) -> None:
        """Reads the batch and empties it."""
        if self._wanted:
            with self._options.engine() as engine:
                self._stored.read(engine, self._wanted)
        for (_, _, place), (item, target) in zip(self._wanted, self._targets, strict=True):
            if place is not target:
                with torch.no_grad():
                    target.copy_(place)
            self._planner.commit_tensor(item, target)
        self._wanted, self._targets, self._aside_bytes = [], [], 0
