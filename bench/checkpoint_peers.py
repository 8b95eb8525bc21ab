"""Who saves and loads in `bench.checkpoint`: ours, DCP in its forms, torch.save, safetensors, others.

Each peer gets the same state and a directory that is not there yet. What a peer does not hand to the
device itself (torch.save, safetensors, torch_checkpointing) is handed to it by the benchmark with
fsync, so that durability is equal unless a peer's name says otherwise.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from bench.cases import Absent
from bench.checkpoint_cases import locals_of
from goku_runtime.checkpoint import load, verify
from goku_runtime.checkpoint.checkpointer import Checkpointer
from goku_runtime.checkpoint.options import CheckpointOptions

OURS = "goku_runtime"
OURS_ASYNC = "goku_runtime, async"
OURS_NO_FSYNC = "goku_runtime, no fsync"
OURS_BOUNDED = "goku_runtime, async in 1 GiB"
DCP = "DCP"
DCP_THREADS = "DCP, threads"
DCP_TUNED = "DCP, threads, no CRC"
DCP_NO_FSYNC = "DCP, threads, no CRC, no fsync"
DCP_ASYNC = "DCP async, thread"
DCP_PROCESS = "DCP async, process"
TORCH = "torch.save"
SAFETENSORS = "safetensors"
META = "torch_checkpointing, buffered"

State = Mapping[str, Any]
BOUNDED = 1 << 30


class Peer(ABC):
    """One way to save and load.

    Attributes:
        fsync: whether what it saved survives a power failure when it says so.
        summed: whether it takes checksums of what it writes.
    """

    fsync = True
    summed = False

    @abstractmethod
    def save(self, state: State, path: Path) -> None:
        """Saves the state of all ranks; durable when it returns, if `fsync`."""

    def load(self, into: State, path: Path) -> Mapping[str, Tensor] | None:
        """Loads what it saved, into these tensors where it can: this rank's. None: another's format."""
        return None

    def start(self, state: State, path: Path) -> Callable[[], None] | None:
        """Begins to save in the background: returns what waits for the end. None: it cannot."""
        return None

    def verify(self, path: Path) -> bool:
        """Reads everything and compares checksums; False: it cannot."""
        return False

    def close(self) -> None:
        """Gives back what was kept between saves."""
        return


class Ours(Peer):
    """The runtime's own, by one Checkpointer for all saves of a case."""

    summed = True

    def __init__(self, *, fsync: bool = True, background: bool = False, staging: int | None = None):
        self.fsync = fsync
        self._background = background
        options = CheckpointOptions(fsync=fsync, staging_bytes=staging)
        self._checkpointer = Checkpointer(options=options)

    def save(self, state: State, path: Path) -> None:
        self._checkpointer.save(dict(state), path)

    def load(self, into: State, path: Path) -> Mapping[str, Tensor] | None:
        if self._background or not self.fsync:
            return None  # the same files
        load(dict(into), path)
        return locals_of(into)

    def start(self, state: State, path: Path) -> Callable[[], None] | None:
        if not self._background:
            return None
        handle = self._checkpointer.async_save(dict(state), path)
        return lambda: void(handle.result())

    def verify(self, path: Path) -> bool:
        if self._background or not self.fsync or dist.get_rank():
            return False
        verify(path)
        return True

    def close(self) -> None:
        self._checkpointer.close()


class Dcp(Peer):
    """torch.distributed.checkpoint."""

    def __init__(
        self, *, threads: int = 1, crc: bool = True, fsync: bool = True,
        background: AsyncCheckpointerType | None = None,
    ):  # fmt: skip
        self.fsync, self.summed = fsync, crc
        self._threads, self._background = threads, background
        # Its thread's collectives must not meet the benchmark's.
        self._group = None if background is None else dist.new_group(backend="gloo")

    def _writer(self, path: Path) -> dcp.FileSystemWriter:
        return dcp.FileSystemWriter(path, sync_files=self.fsync, thread_count=self._threads)

    def save(self, state: State, path: Path) -> None:
        with _crc(self.summed):
            dcp.save(dict(state), storage_writer=self._writer(path))

    def load(self, into: State, path: Path) -> Mapping[str, Tensor] | None:
        if self._threads > 1 or self._background is not None:
            return None  # its reader has nothing to tune
        dcp.load(dict(into), storage_reader=dcp.FileSystemReader(path))
        return locals_of(into)

    def start(self, state: State, path: Path) -> Callable[[], None] | None:
        if self._background is None:
            return None
        done = dcp.async_save(
            dict(state), storage_writer=self._writer(path), process_group=self._group,
            async_checkpointer_type=self._background,
        )  # fmt: skip
        upload = done if isinstance(done, Future) else done.upload_completion
        return lambda: void(upload.result())


@contextmanager
def _crc(on: bool) -> Any:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(on)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class TorchSave(Peer):
    """torch.save of each rank's tensors into a file of its own."""

    summed = True

    def save(self, state: State, path: Path) -> None:
        file = _own(path, ".pt")
        with file.open("xb") as stream:
            torch.save(dict(locals_of(state)), stream)
            stream.flush()
            os.fsync(stream.fileno())
        _sync(path)

    def load(self, into: State, path: Path) -> Mapping[str, Tensor] | None:
        found: Mapping[str, Tensor] = torch.load(_own(path, ".pt"), weights_only=True)
        return found


class Safetensors(Peer):
    """safetensors, each rank's tensors in a file of its own."""

    def __init__(self) -> None:
        try:
            import safetensors.torch
        except ImportError as error:
            raise Absent(f"safetensors cannot be imported: {error}") from error
        self._library = safetensors.torch

    def save(self, state: State, path: Path) -> None:
        file = _own(path, ".safetensors")
        self._library.save_file(locals_of(state), file)
        _sync(file)
        _sync(path)

    def load(self, into: State, path: Path) -> Mapping[str, Tensor] | None:
        # Its tensors look into a mapping of the file: reading happens when they are touched.
        found = self._library.load_file(_own(path, ".safetensors"))
        for name, tensor in locals_of(into).items():
            tensor.copy_(found[name])
        return locals_of(into)


class TorchCheckpointing(Peer):
    """Meta's torch_checkpointing (alpha), each rank's tensors as an item; commits by a rename.

    Buffered: its O_DIRECT writes the odd end of a file as it is, which ext4 refuses with EINVAL.
    """

    def __init__(self) -> None:
        try:
            library = importlib.import_module("torch_checkpointing")
            config = importlib.import_module("torch_checkpointing.config")
            files = importlib.import_module("torch_checkpointing.storage.filesystem")
        except ImportError as error:
            raise Absent(f"torch_checkpointing cannot be imported: {error}") from error
        self._manager: Any = library.CheckpointManager.Config(
            save=config.SyncCheckpointSaverConfig(),
            load=config.CheckpointLoaderConfig(use_mmap=False),
            storage_config=files.LocalFileSystemStorageConfig(use_direct_io=False),
        ).build()

    def save(self, state: State, path: Path) -> None:
        self._manager.save(str(path), {"model": dict(locals_of(state))})
        if not dist.get_rank():
            for file in path.rglob("*"):
                _sync(file)
            _sync(path)

    def load(self, into: State, path: Path) -> Mapping[str, Tensor] | None:
        found: Mapping[str, Tensor] = self._manager.load(
            str(path), {"model": dict(locals_of(into))}
        )["model"]
        return found

    def close(self) -> None:
        self._manager.close()


def _own(path: Path, suffix: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path / f"rank{dist.get_rank()}{suffix}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def void(_: object) -> None:
    """Drops a result."""


def makers(cores: int) -> dict[str, Callable[[], Peer]]:
    """How each peer is made, in the order of the tables."""
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    return {
        OURS: Ours,
        OURS_NO_FSYNC: lambda: Ours(fsync=False),
        OURS_ASYNC: lambda: Ours(background=True),
        OURS_BOUNDED: lambda: Ours(background=True, staging=BOUNDED),
        DCP: Dcp,
        DCP_THREADS: lambda: Dcp(threads=cores),
        DCP_TUNED: lambda: Dcp(threads=cores, crc=False),
        DCP_NO_FSYNC: lambda: Dcp(threads=cores, crc=False, fsync=False),
        DCP_ASYNC: lambda: Dcp(background=thread),
        DCP_PROCESS: lambda: Dcp(background=process),
        TORCH: TorchSave,
        SAFETENSORS: Safetensors,
        META: TorchCheckpointing,
    }


def made(names: list[str], cores: int, stack: ExitStack) -> dict[str, Peer | str]:
    """The peers of these names, or why one is absent; `stack` closes them."""
    found: dict[str, Peer | str] = {}
    for name in names:
        try:
            peer = makers(cores)[name]()
        except Absent as reason:
            found[name] = str(reason)
        else:
            stack.callback(peer.close)
            found[name] = peer
    return found
