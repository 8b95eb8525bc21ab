"""A checkpoint of any version, open for the tools: what is in it, and its bytes by tensor and box."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from goku_runtime.checkpoint._boxes import Box, intersection
from goku_runtime.checkpoint.layout import STATE_NAME
from goku_runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    Manifest,
    file_problem,
    file_problems,
    of_others,
    raise_problems,
    unless_replaced,
)
from goku_runtime.checkpoint.plan import Described
from goku_runtime.checkpoint.root import POINTER_NAME
from goku_runtime.checkpoint.stored import Stored, read_tree
from goku_runtime.checkpoint.tools.slabs import Wanted
from goku_runtime.checkpoint.version1.metadata import METADATA_NAME, read_metadata
from goku_runtime.checkpoint.version1.reader import StagingReader

if TYPE_CHECKING:
    from goku_runtime._io import Engine

__all__ = ["Found", "Place", "Source", "check_outside", "find", "tensor_bytes", "writing_rank"]


class Place(NamedTuple):
    """A part of a tensor: its box, the file it lies in, and where its payload begins there (None: not
    known without reading, in version 1)."""

    file: str
    offset: int | None
    box: Box


class Source(ABC):
    """A checkpoint to read from.

    Attributes:
        directory: where it lies.
        manifest: its files.
        tree: the plain values as state.json has them, tagged; see `tree`.
        tensors: dtype and shape by name, in the order of the state.
        writer: what wrote it (versions, ranks, meshes), as index.json says; None in version 1.
    """

    directory: Path
    manifest: Manifest
    tree: Any
    tensors: Mapping[str, Described]
    writer: Mapping[str, Any] | None = None

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Source:
        """Opens a checkpoint; sizes of all files are looked at, sums as bytes are read.

        Raises:
            CheckpointError: no checkpoint, or a damaged one: all that is found is named.
            OSError: a file cannot be read.
        """
        directory = Path(path)
        manifest = Manifest.read(directory)
        with unless_replaced(directory, manifest):
            raise_problems(directory, file_problems(directory, manifest, sums=False))
        return (
            _Version1(directory, manifest)
            if manifest.version == 1
            else _Version2(directory, manifest)
        )

    @abstractmethod
    def places(self, name: str) -> list[Place]:
        """The parts of a tensor: together all of it, each element once."""

    @abstractmethod
    def parts(self, name: str) -> int:
        """How many parts a tensor has: of thousands of ranks' `places` makes millions of objects."""

    @abstractmethod
    def read(self, engine: Engine, wanted: Sequence[Wanted]) -> None:
        """Reads boxes, row-major, into uint8 tensors of as many bytes, aligned for their dtypes.

        Raises:
            CheckpointError: bytes that are not those that were written; tensor and writer are named.
            OSError: a file cannot be read.
        """

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor_bytes(each) for each in self.tensors.values())

    def _read_tree(self) -> None:
        """Reads state.json, and compares it with `tensors`."""
        self.tree = read_tree(self.directory, self.manifest)
        named = set(_named(self.tree))
        odd = min(named ^ self.tensors.keys(), default=None)
        if odd is not None:
            kind = "lacks" if odd not in named else "alone has"
            raise CheckpointError(f"{self.directory} is damaged: {STATE_NAME} {kind} {odd!r}")


def tensor_bytes(tensor: Described) -> int:
    """Of all elements."""
    count = tensor.dtype.itemsize
    for size in tensor.shape:
        count *= size
    return count


def writing_rank(file: str) -> int | None:
    """The rank that wrote a data file; None for another file."""
    number = file.removeprefix("__").partition("_")[0]
    is_data = file.startswith("__") and file.endswith((".distcp", ".crc")) and number.isdecimal()
    return int(number) if is_data else None


def _named(node: Any) -> Iterator[str]:
    """The tensors that a tree refers to. The tree was checked: a tag is what it looks like."""
    if isinstance(node, dict) and node.keys() == {"$tensor"}:
        yield node["$tensor"]
    elif isinstance(node, dict | list):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _named(child)


class _Version2(Source):
    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._stored = Stored(directory, manifest)
        index = self._stored.index
        self.writer = index.writer
        self.tensors = {
            name: Described(each.dtype, each.shape) for name, each in index.tensors.items()
        }
        self._read_tree()

    def places(self, name: str) -> list[Place]:
        index = self._stored.index
        return [
            Place(index.files[part.file], part.offset, part.box)
            for part in index.tensors[name].parts
        ]

    def parts(self, name: str) -> int:
        return self._stored.index.tensors[name].tiling.count

    def read(self, engine: Engine, wanted: Sequence[Wanted]) -> None:
        self._stored.read(engine, wanted)


class _Version1(Source):
    """Its files have one sum each: a file is read whole, and compared, before the first record of it is
    used. A record is in memory as a whole, the last one stays."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._verified: set[str] = set()
        self._verify(METADATA_NAME)
        self._metadata = read_metadata(directory, manifest.files)
        described: dict[str, Any] = dict(self._metadata.state_dict_metadata)
        self._chunks = {name: each.chunks for name, each in described.items()}
        self.tensors = {
            name: Described(each.properties.dtype, tuple(each.size))
            for name, each in described.items()
        }
        self._reader = StagingReader(directory, self._metadata)
        self._last: tuple[Any, Tensor] | None = None
        self._read_tree()

    def places(self, name: str) -> list[Place]:
        found = []
        for chunk in self._chunks[name]:
            where = self._where(name, chunk)
            box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            found.append(Place(where.relative_path, None, box))
        return found

    def parts(self, name: str) -> int:
        return len(self._chunks[name])

    def read(self, engine: Engine, wanted: Sequence[Wanted]) -> None:
        for name, box, target in wanted:
            dtype = self.tensors[name].dtype
            shaped = target.view(dtype).view(box.size)
            for chunk in self._chunks[name]:
                common = intersection(Box(tuple(chunk.offsets), tuple(chunk.sizes)), box)
                if common is not None:
                    record = self._record(name, chunk)
                    _part(shaped, common, box.start).copy_(_part(record, common, chunk.offsets))

    def _where(self, name: str, chunk: Any) -> Any:
        storage: Any = self._metadata.storage_data
        return storage[MetadataIndex(name, chunk.offsets)]

    def _record(self, name: str, chunk: Any) -> Tensor:
        where = self._where(name, chunk)
        place = (where.relative_path, where.offset, where.length)
        if self._last is None or self._last[0] != place:
            self._last = None  # before the next is read: both may not fit
            self._verify(where.relative_path)
            index = MetadataIndex(name, chunk.offsets)
            self._last = place, self._reader.read_record(index, *place)
        return self._last[1]

    def _verify(self, name: str) -> None:
        if name not in self._verified:
            entry = self.manifest.files.get(name)
            if entry is None:
                raise CheckpointError(f"{self.directory} is damaged: {name}: missing")
            raise_problems(self.directory, file_problem(self.directory / name, entry))
            self._verified.add(name)


def _part(tensor: Tensor, box: Box, origin: Sequence[int]) -> Tensor:
    """A box of a tensor whose first element is at `origin`."""
    for axis, (start, size) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(axis, start - origin[axis], size)
    return tensor


def check_outside(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Refuses to write into the checkpoint that is read: what does not belong there damages it.

    Raises:
        ValueError: `target` lies in it.
    """
    directory = Path(path).resolve()
    if directory in Path(target).resolve().parents:
        raise ValueError(f"target is {target}; allowed: places outside of the checkpoint {path}")


# ---- which one is meant


@dataclass(frozen=True)
class Found:
    """A checkpoint, and those that lie beside it if a folder of them was given.

    Attributes:
        path: the checkpoint.
        others: name and what is wrong with each, or None; the newest first.
    """

    path: Path
    others: tuple[tuple[str, str | None], ...] = ()


def find(path: str | os.PathLike[str]) -> Found:
    """The checkpoint that a path means: it, or the latest one of a folder of them or of a run.

    The latest is what the folder's pointer names, or else the newest complete one. Nothing is
    changed, and nothing waited for.

    Raises:
        ValueError: there is none, or none is complete.
        OSError: a folder cannot be read.
    """
    given = Path(path)
    if not given.is_dir():
        raise ValueError(f"{given} is no directory; allowed: a checkpoint, or a folder of them")
    if (given / MANIFEST_NAME).exists():
        return Found(given)
    for root in (given, given / "checkpoints"):
        listed = _listed(root) if root.is_dir() else []
        if not listed:
            continue
        complete = [name for name, problem in listed if problem is None]
        if not complete:
            raise ValueError(f"{root} holds no complete checkpoint; {listed[0][1]}")
        pointed = _pointed(root)
        chosen = pointed if pointed in complete else complete[0]
        others = tuple((name, problem) for name, problem in listed if name != chosen)
        return Found(root / chosen, others)
    hint = of_others(given) or ", nor is one in it"
    raise ValueError(f"{given} holds no {MANIFEST_NAME}: no checkpoint{hint}")


def _listed(root: Path) -> list[tuple[str, str | None]]:
    """The checkpoints in a folder, the newest first, each with what is wrong with it."""
    found: list[tuple[int, str, str | None]] = []
    for path in root.iterdir():
        if path.name.startswith(".") or path.is_symlink():
            continue
        try:
            if not (path / MANIFEST_NAME).is_file():
                continue
            manifest = Manifest.read(path)
            raise_problems(path, file_problems(path, manifest, sums=False))
            found.append((manifest.created_ns, path.name, None))
        except (CheckpointError, OSError) as error:
            found.append((0, path.name, str(error)))
    return [(name, problem) for _, name, problem in sorted(found, key=_age, reverse=True)]


def _age(found: tuple[int, str, str | None]) -> tuple[int, str]:
    return found[:2]


def _pointed(root: Path) -> str | None:
    try:
        return (root / POINTER_NAME).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        return None
