"""DCP's storage, with checksums: what `torch.distributed.checkpoint` writes to and reads from.

Each rank sums the bytes that it writes while it writes them. That costs no second read, spreads
the work over the ranks, and the sum is of the bytes meant to be written: had it been taken from the
file afterwards, it would have covered up whatever went wrong in between.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, WriteResult
from torch.futures import Future
from typing_extensions import Buffer

from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.manifest import CheckpointError, FileSum

__all__ = ["StagingReader", "SummedStream", "SummingWriter", "open_summed"]

# Records of small tensors come in pieces of a few bytes; fewer system calls, one buffer per file.
_BUFFER_BYTES = 1 << 20


class SummedStream(io.RawIOBase):
    """A file opened for writing that sums what goes through it and remembers why it failed."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self.size = 0
        self.crc = 0
        self.error: OSError | None = None

    def fail(self, error: OSError) -> None:
        """Remembers the first error, with the file's name: the system says only what, not where."""
        if self.error is None:
            error.filename = error.filename or self._raw.name
            self.error = error

    def write(self, data: Buffer, /) -> int:
        view = memoryview(data).cast("B")
        try:
            self._raw.write(view)
        except OSError as error:
            self.fail(error)
            raise
        self.crc = crc32c(view, self.crc)
        self.size += len(view)
        return len(view)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self._raw.fileno()

    def make_durable(self) -> None:
        """Hands everything to the device."""
        try:
            self._raw.flush()
            os.fsync(self._raw.fileno())
        except OSError as error:
            self.fail(error)
            raise


@contextmanager
def open_summed(path: Path) -> Generator[SummedStream]:
    """Opens a new file to write; when the block ends it is durable and its sum is known.

    Raises OSError as the system does, also where the block itself failed of something that the
    failed write led to (torch's archive writer turns ENOSPC into a RuntimeError of its own).
    """
    raw = open(path, "xb", buffering=_BUFFER_BYTES)  # noqa: SIM115  closing may fail as well
    stream = SummedStream(raw)
    try:
        yield stream
        stream.make_durable()
    except (RuntimeError, OSError) as error:
        if stream.error is not None and error is not stream.error:
            raise stream.error from error
        raise
    finally:
        try:
            raw.close()
        except OSError as error:
            # A full disk: the buffer cannot be flushed now either. The first error is on its way.
            if stream.error is None:
                stream.fail(error)
                raise


class _SummingFileSystem(FileSystem):
    """DCP's file system, whose new files are summed, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase]:
        with open_summed(Path(path)) as stream:
            yield stream
        self.sums[Path(path).name] = FileSum(stream.size, stream.crc)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class SummingWriter(FileSystemWriter):
    """DCP's file writer; `sums` are the files that this rank wrote into `directory`.

    One thread: DCP 2.13 loses the exceptions of the others, and the files they did not write.
    """

    def __init__(self, directory: Path) -> None:
        # The streams sync themselves: DCP syncs .metadata before its buffer is flushed.
        super().__init__(directory, sync_files=False, thread_count=1, overwrite=False)
        files = _SummingFileSystem()
        self.fs = files
        self.sums = files.sums

    def storage_meta(self) -> StorageMeta:
        """Nothing: the place is temporary, and paths in a pickle differ between Pythons."""
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # A rank with nothing to write would leave an empty file behind.
        if not plan.items:
            nothing: Future[list[WriteResult]] = Future()
            nothing.set_result([])
            return nothing
        return super().write_data(plan, planner)


class StagingReader(StorageReader):
    """Reads a checkpoint's tensors aside; `commit` puts them where they belong.

    Nothing of the caller's changes before every rank has read and checked everything of its own.
    The price is host memory: once more what this rank loads.
    """

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        self._directory = directory
        self._metadata = metadata
        self._staged: list[tuple[Tensor, Tensor]] = []

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forgets what was read."""
        self._staged = []

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata given at construction."""
        return self._metadata

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this reader could read such a place: any path."""
        return True

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads this rank's part. Raises CheckpointError for a record that is not as described."""
        storage = cast("dict[Any, Any]", self._metadata.storage_data)
        items = sorted(plan.items, key=lambda item: _place(storage[item.storage_index]))
        place, whole = None, torch.empty(0)
        for item in items:
            # Several parts of one record (the checkpoint had fewer ranks): read it once.
            if place != _place(storage[item.storage_index]):
                place = _place(storage[item.storage_index])
                whole = self._read_record(item.storage_index, *place)
            part = whole
            for axis, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                part = part.narrow(axis, start, length)
            # A view would keep the whole record in memory.
            part = part.clone() if part.numel() < whole.numel() else part
            self._staged.append((planner.resolve_tensor(item).detach(), part))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_record(self, index: Any, file: str, offset: int, length: int) -> Tensor:
        with open(self._directory / file, "rb") as stream:
            stream.seek(offset)
            record = io.BytesIO(stream.read(length))
        try:
            tensor = torch.load(record, map_location="cpu", weights_only=True)
        except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{file}: the record of {index.fqn!r} is refused: {error}"
            ) from error
        described = self._metadata.state_dict_metadata[index.fqn]
        sizes = next(c.sizes for c in described.chunks if c.offsets == index.offset)  # type: ignore[union-attr]
        dtype = described.properties.dtype  # type: ignore[union-attr]
        if type(tensor) is not Tensor or tensor.dtype != dtype or tensor.shape != sizes:
            raise CheckpointError(
                f"{file}: the record of {index.fqn!r} is not {dtype} {tuple(sizes)}"
            )
        return tensor

    @torch.no_grad()
    def commit(self) -> None:
        """Copies what was read into the caller's tensors."""
        for target, source in self._staged:
            target.copy_(source)
        self._staged = []


def _place(info: Any) -> tuple[str, int, int]:
    return info.relative_path, info.offset, info.length
