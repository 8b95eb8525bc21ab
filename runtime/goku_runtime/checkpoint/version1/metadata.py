"""DCP's `.metadata`, read without running what it says.

That file is a pickle. Unpickling lets a file name any function and call it, so here every name that
is not on a short list is refused, and those on the list stand for inert records made for this one
read; the real classes of `torch.distributed.checkpoint.metadata` are built from the records after
each field has been checked against the manifest.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from goku_runtime.checkpoint.manifest import CheckpointError, FileSum

__all__ = ["METADATA_NAME", "read_metadata"]

METADATA_NAME = ".metadata"
_DCP = "torch.distributed.checkpoint"
_ALLOWED = frozenset(
    {(f"{_DCP}.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )}
    | {(f"{_DCP}.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout"),
       ("torch", "Size")}
)  # fmt: skip
# What the unpickler and the checks below raise on bytes that are no such pickle.
_BAD_PICKLE = (
    pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError,
    RecursionError, TypeError, ValueError,
)  # fmt: skip


class _Record:
    """Stands for an object of a pickle: what it is called, with which arguments and state."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """The value that the pickle sets for a field."""
        return self.state[name]


class _RecordingUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        # New classes each time: a pickle can set attributes of a class that it can name.
        self._classes: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return self._classes.setdefault(name, type(name, (_Record,), {}))
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise CheckpointError(f"names {module}.{name}, which no checkpoint of ours holds")


def read_metadata(directory: Path, files: Mapping[str, FileSum]) -> Metadata:
    """Reads `.metadata` of a checkpoint whose files are those of its manifest.

    Raises:
        CheckpointError: the file names anything but DCP's own records, is damaged, or places a
            tensor outside the files of the manifest.
        OSError: it cannot be read.
    """
    path = directory / METADATA_NAME
    data = path.read_bytes()
    try:
        return _metadata(_expect(_RecordingUnpickler(data).load(), "Metadata"), files)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from error
    except _BAD_PICKLE as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _metadata(record: _Record, files: Mapping[str, FileSum]) -> Metadata:
    tensors = {
        name: _tensor(name, _expect(entry, "TensorStorageMetadata"))
        for name, entry in record.field("state_dict_metadata").items()
    }
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for index, info in record.field("storage_data").items():
        fields = _expect(index, "MetadataIndex").state
        where = MetadataIndex(fields["fqn"], _size(fields["offset"]), fields.get("index"))
        storage[where] = _storage(fields["fqn"], _expect(info, "_StorageInfo"), files)
    for name, tensor in tensors.items():
        for chunk in tensor.chunks:
            if MetadataIndex(name, chunk.offsets) not in storage:
                raise ValueError(f"no place for {name!r} at {tuple(chunk.offsets)}")
    return Metadata(dict(tensors), storage_data=storage, storage_meta=StorageMeta())


def _tensor(name: object, record: _Record) -> TensorStorageMetadata:
    dtype = _expect(record.field("properties"), "TensorProperties").state[0]
    size = _size(record.field("size"))
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} with dtype {dtype!r}")
    chunks = []
    for entry in record.field("chunks"):
        chunk = _expect(entry, "ChunkStorageMetadata")
        offsets, sizes = _size(chunk.field("offsets")), _size(chunk.field("sizes"))
        inside = all(o + s <= n for o, s, n in zip(offsets, sizes, size, strict=True))
        if not inside:
            raise ValueError(f"a part of {name!r} lies outside of {tuple(size)}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"the parts of {name!r} do not fill {tuple(size)}")
    overlap = _overlap(chunks)
    if overlap:
        places = " and ".join(f"{tuple(c.sizes)} at {tuple(c.offsets)}" for c in overlap)
        raise ValueError(f"parts of {name!r} overlap: {places}")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _overlap(chunks: list[ChunkStorageMetadata]) -> tuple[ChunkStorageMetadata, ...]:
    """Two chunks that share an element, or nothing.

    Cuts the chunks into groups, again and again, wherever a cut through an axis meets none of them.
    For the grids that DTensors make, n chunks in d axes, that is O(d^2 n log n). What no cut divides
    is compared pair by pair, O(n^2).
    """
    groups = [[chunk for chunk in chunks if 0 not in chunk.sizes]]
    while groups:
        group = groups.pop()
        if len(group) < 2:
            continue
        for axis in range(len(group[0].sizes)):
            parts = _cut(group, axis)
            if len(parts) > 1:
                groups += parts
                break
        else:
            for pair in combinations(group, 2):
                if not _disjoint(*pair):
                    return pair
    return ()


def _cut(group: list[ChunkStorageMetadata], axis: int) -> list[list[ChunkStorageMetadata]]:
    """The parts of a group between all the places of an axis that lie inside of no chunk."""
    parts: list[list[ChunkStorageMetadata]] = []
    end = 0
    for chunk in sorted(group, key=lambda each: each.offsets[axis]):
        if not parts or chunk.offsets[axis] >= end:
            parts.append([])
        parts[-1].append(chunk)
        end = max(end, chunk.offsets[axis] + chunk.sizes[axis])
    return parts


def _disjoint(left: ChunkStorageMetadata, right: ChunkStorageMetadata) -> bool:
    return any(
        a + n <= b or b + m <= a
        for a, n, b, m in zip(left.offsets, left.sizes, right.offsets, right.sizes, strict=True)
    )


def _storage(name: object, record: _Record, files: Mapping[str, FileSum]) -> _StorageInfo:
    file, offset, length = (record.field(key) for key in ("relative_path", "offset", "length"))
    # Only files of the manifest: a path could lead anywhere.
    if file not in files or type(offset) is not int or type(length) is not int:
        raise ValueError(f"{name!r} is placed in {file!r}")
    if offset < 0 or length < 0 or offset + length > files[file].size:
        raise ValueError(f"{name!r} is placed at {offset} + {length} in {file!r}")
    if record.state.get("transform_descriptors"):
        raise ValueError(f"{name!r} is transformed; only plain records are read")
    return _StorageInfo(file, offset, length)


def _expect(value: object, kind: str) -> _Record:
    if not isinstance(value, _Record) or type(value).__name__ != kind:
        raise ValueError(f"a {type(value).__name__} where a {kind} must be")
    return value


def _size(value: object) -> torch.Size:
    (sizes,) = _expect(value, "Size").args
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"sizes {sizes!r}")
    return torch.Size(sizes)
