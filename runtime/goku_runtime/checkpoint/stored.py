"""A checkpoint of version 2, open for reading: its index, its sums, and its tensors.

Only files that hold wanted bytes are opened. A byte reaches a tensor only after the CRC-32C of the
chunk that it lies in was compared, so nothing wrong is ever loaded.
"""

from __future__ import annotations

import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from goku_runtime.checkpoint.index import INDEX_NAME, Index, parse
from goku_runtime.checkpoint.layout import STATE_NAME, global_rank
from goku_runtime.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    unless_replaced,
    verified,
)
from goku_runtime.checkpoint.options import CheckpointOptions
from goku_runtime.checkpoint.plan import Box, held
from goku_runtime.checkpoint.ranks import Ranks
from goku_runtime.checkpoint.replicas import is_reader, send, shared
from goku_runtime.checkpoint.staging import copyable
from goku_runtime.checkpoint.tree import is_spread, parse_tree

if TYPE_CHECKING:
    from goku_runtime._io import Engine

__all__ = ["Stored", "Version2", "read_tree", "sums_name"]

# Tensors that bytes cannot go straight into (on a GPU, strided, of another dtype) are read aside, this
# much at a time, or one tensor if that is more.
_ASIDE_BYTES = 256 << 20


def sums_name(data_file: str) -> str:
    """The name of the file that holds a data file's CRCs."""
    return data_file.removesuffix(".distcp") + ".crc"


def read_tree(directory: Path, manifest: Manifest) -> Any:
    """state.json, verified, as `tree.parse_tree` gives it. Raises CheckpointError: it is damaged."""
    return parse_tree(verified(directory, manifest, STATE_NAME), str(directory / STATE_NAME))


class Stored:
    """The data files of one checkpoint, as its manifest and index describe them.

    Raises:
        CheckpointError: the index is missing or damaged.
        OSError: it cannot be read.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.index: Index = parse(
            self.file(INDEX_NAME),
            {name: entry.size for name, entry in manifest.files.items()},
            f"{directory / INDEX_NAME}",
        )
        self._sums: dict[str, bytes] = {}
        self.bytes_read = 0
        self.bytes_wanted = 0

    def file(self, name: str) -> bytes:
        """A small file, verified."""
        return verified(self.directory, self.manifest, name)

    def sums(self, data_file: str) -> bytes:
        """The CRC-32C of each chunk of a data file: little-endian, 4 bytes each."""
        if data_file not in self._sums:
            name, size = sums_name(data_file), self.manifest.files[data_file].size
            found = self.file(name)
            if len(found) != -(-size // self.index.chunk) * 4:
                raise CheckpointError(
                    f"{self.directory} is damaged: {name} has {len(found)} bytes for {size} bytes of data"
                )
            self._sums[data_file] = found
        return self._sums[data_file]

    def read(self, engine: Engine, wanted: Sequence[tuple[str, Box, Tensor]]) -> None:
        """Reads boxes of tensors into dense CPU tensors of their shapes and dtypes.

        Raises:
            CheckpointError: bytes that are not those that were written; tensor and writer are named.
            OSError: a file cannot be read.
        """
        by_file: defaultdict[int, array.array[int]] = defaultdict(lambda: array.array("q"))
        for name, box, target in wanted:
            address, stored = target.data_ptr(), self.index.tensors[name]
            same = stored.stored_as(box) if target.nbytes else None
            if same is not None:  # which most loads are: one run, without a look at the others
                row = (same.offset, target.nbytes, 1, target.nbytes, address, target.nbytes)
                by_file[same.file].extend(row)
                continue
            for run in stored.runs(box):
                by_file[run.file].extend(
                    (run.offset, run.row_bytes, run.rows, run.file_stride,
                     address + run.memory_offset, run.memory_stride)
                )  # fmt: skip
        with unless_replaced(self.directory, self.manifest):
            for number, rows in sorted(by_file.items()):
                self._read_file(engine, self.index.files[number], rows)

    def _read_file(self, engine: Engine, name: str, rows: array.array[int]) -> None:
        from goku_runtime._io import ChunkError

        path, size = self.directory / name, self.manifest.files[name].size
        segments = memoryview(rows).cast("B").cast("q", (len(rows) // 6, 6))
        crcs = self.sums(name)
        try:
            stats = engine.read(str(path), segments, chunk=self.index.chunk, crcs=crcs, size=size)
        except ChunkError as error:
            text = self.damage(name, error.offset, error.length)
            raise CheckpointError(f"{self.directory} is damaged: {text}") from error
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.directory} is damaged: {name}: missing") from error
        except ValueError as error:
            raise CheckpointError(f"{self.directory} is damaged: {name}: {error}") from error
        self.bytes_read += stats.bytes_read
        self.bytes_wanted += stats.bytes_wanted

    def damage(self, name: str, offset: int, length: int) -> str:
        """A damaged piece of a data file in words: the bytes, the tensors in them, who wrote them."""
        tensors = sorted(self.tensors_in(name, offset, length))
        shown = ", ".join(tensors[:8]) + (f" and {len(tensors) - 8} more" if tensors[8:] else "")
        rank = name.removeprefix("__").partition("_")[0]
        return (
            f"{name}: altered, bytes {offset} to {offset + length} ({shown or 'between tensors'}), "
            f"written by rank {rank}"
        )

    def tensors_in(self, name: str, offset: int, length: int) -> Iterator[str]:
        """The tensors whose payloads lie at least partly in a piece of a data file."""
        number = self.index.files.index(name)
        for tensor, stored in self.index.tensors.items():
            for part in stored.in_file(number):
                size = part.box.volume * stored.dtype.itemsize
                if size and part.offset < offset + length and offset < part.offset + size:
                    yield tensor
                    break


class Version2(Stored):
    """A checkpoint that all ranks load together; see `goku_runtime.checkpoint.load`.

    Each rank opens it by itself, when the sizes of all files were seen to be right; sums are looked at as
    bytes are read.

    Raises:
        CheckpointError: a damaged index.
        OSError: a file cannot be read.
    """

    def __init__(self, ranks: Ranks, directory: Path, manifest: Manifest) -> None:
        self._ranks = ranks
        super().__init__(directory, manifest)

    def described(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A saved tensor's dtype ("torch.float32") and shape. Raises CheckpointError: there is none."""
        stored = self.index.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"{self.directory / INDEX_NAME} is damaged: it lacks {name!r}")
        return str(stored.dtype), stored.shape

    def load(
        self, tensors: Mapping[str, Tensor], options: CheckpointOptions, *, senders: Ranks | None
    ) -> None:
        """Reads tensors into the caller's, by saved name, on all ranks.

        Args:
            tensors: of the saved shapes; another dtype is converted to.
            options: of the reading engine.
            senders: the same ranks, with the group that tensors on a GPU are sent by: what several ranks hold
                is read on one of them, which sends it to the others. What is not wanted alike by all
                that hold it, each reads by itself, and so is everything with None.
        """
        sent = [] if senders is None else shared(tensors, self._ranks)
        waits = {name for name in sent if not is_reader(tensors[name], self._ranks)}

        def read() -> None:
            mine = {each.name: each.box for each in held(tensors, rank=global_rank())}
            own = {
                name: tensor
                for name, tensor in tensors.items()
                if name in mine and name not in waits
            }
            with options.engine() as engine:
                self._load(own, mine, engine)

        self._ranks.together(read)
        for name in sent:
            assert senders is not None
            send(tensors[name], self._ranks if tensors[name].device.type == "cpu" else senders)

    def _load(self, tensors: Mapping[str, Tensor], mine: Mapping[str, Box], engine: Engine) -> None:
        wanted: list[tuple[str, Box, Tensor]] = []
        aside: list[tuple[Tensor, Tensor]] = []
        aside_bytes = 0
        for name, tensor in tensors.items():
            spread: Any = tensor
            local: Tensor = spread.to_local() if is_spread(tensor) else tensor
            local = local.detach() if local.requires_grad else local
            if not local.numel():
                continue
            stored = self.index.tensors[name]
            target = local
            straight = local.device.type == "cpu" and local.is_contiguous()
            lazy = local.is_conj() or local.is_neg()
            if not straight or lazy or local.dtype != stored.dtype:
                target = torch.empty(mine[name].size, dtype=stored.dtype, device="cpu")
                aside.append((local, target))
                aside_bytes += target.nbytes
            wanted.append((name, mine[name], target))
            if aside_bytes >= _ASIDE_BYTES:
                self._read_batch(engine, wanted, aside)
                wanted, aside, aside_bytes = [], [], 0
        self._read_batch(engine, wanted, aside)

    def _read_batch(
        self,
        engine: Engine,
        wanted: Sequence[tuple[str, Box, Tensor]],
        aside: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self.read(engine, wanted)
        with torch.no_grad():
            for local, target in aside:
                same = local.dtype == target.dtype
                (copyable(local) if same else local).copy_(copyable(target) if same else target)
