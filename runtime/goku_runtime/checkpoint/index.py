"""index.json: in which bytes of which files each tensor lies.

A line for each tensor. Whatever it says is checked before it is used, against the sizes in the
manifest: no tensor can be larger than the files together, and parts neither overlap nor leave gaps.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from goku_runtime.checkpoint._boxes import Box, intersection, whole
from goku_runtime.checkpoint._index_parts import (
    MOST,
    Bad,
    PartReader,
    are_sides,
    short,
    sides_text,
)
from goku_runtime.checkpoint._runs import Run, StoredPart, runs
from goku_runtime.checkpoint.collection import no_collection
from goku_runtime.checkpoint.manifest import CheckpointError
from goku_runtime.checkpoint.plan import GlobalPlan, data_file
from goku_runtime.checkpoint.records import DTYPES, dtype_name

__all__ = ["CHUNK", "INDEX_NAME", "Index", "IndexTensor", "Run", "StoredPart", "parse", "to_json"]

INDEX_NAME = "index.json"
# 4 bytes of CRC for each 64 KiB: what is read beside the bytes wanted is at most two such chunks for
# each run of them, and the sums of a terabyte are 64 MiB.
CHUNK = 65536
"""Bytes of a data file that one CRC-32C covers; a multiple of 4096."""

FORMAT = "goku-checkpoint-index"
VERSION = 1
_AXES = 64  # as many as torch allows


@dataclass(frozen=True)
class IndexTensor:
    """A stored tensor; `parts` tile it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]

    @cached_property
    def _sorted(self) -> tuple[int, list[int], list[StoredPart], int]:
        """(axis, starts, parts, longest): parts by their start on the axis that divides them best."""
        columns = list(zip(*(part.box.start for part in self.parts), strict=True))
        axis = max(range(len(columns)), key=lambda each: len(set(columns[each])), default=-1)
        if axis < 0:
            return axis, [], list(self.parts), 0
        order = sorted(range(len(self.parts)), key=columns[axis].__getitem__)
        parts = [self.parts[i] for i in order]
        longest = max(part.box.size[axis] for part in parts)
        return axis, [columns[axis][i] for i in order], parts, longest

    def touching(self, wanted: Box) -> Iterator[tuple[StoredPart, Box]]:
        """The parts that hold elements of a box, and which."""
        axis, starts, parts, longest = self._sorted
        if axis >= 0:
            low, size = wanted.start[axis], wanted.size[axis]
            parts = parts[bisect_left(starts, low - longest + 1) : bisect_left(starts, low + size)]
        for part in parts:
            if part.box == wanted:
                yield part, wanted
                continue
            common = intersection(part.box, wanted)
            if common is not None:
                yield part, common

    def runs(self, wanted: Box) -> list[Run]:
        """Which bytes make up a box of the tensor: each of its bytes once, few runs.

        Raises:
            ValueError: a box that does not lie in the tensor.
        """
        if len(wanted.start) != len(self.shape) or len(wanted.size) != len(self.shape):
            raise ValueError(f"box is {tuple(wanted)}; allowed: boxes in a tensor of {self.shape}")
        sides = zip(*wanted, self.shape, strict=True)
        if any(start < 0 or size < 0 or start + size > n for start, size, n in sides):
            raise ValueError(f"box is {wanted}; allowed: boxes in a tensor of {self.shape}")
        if not wanted.volume:
            return []
        return [
            run
            for part, common in self.touching(wanted)
            for run in runs(part, common, wanted, self.dtype.itemsize)
        ]


@dataclass(frozen=True)
class Index:
    """The content of index.json.

    Attributes:
        chunk: bytes of a data file that one CRC covers.
        writer: what wrote it: versions, number of ranks, meshes.
        files: names of the data files.
        tensors: by name.
    """

    chunk: int
    writer: Mapping[str, Any]
    files: tuple[str, ...]
    tensors: Mapping[str, IndexTensor]

    def boxes(self, name: str) -> tuple[StoredPart, ...]:
        """The parts of a tensor. Raises KeyError: it is not stored."""
        return self.tensors[name].parts


# --- writing ----------------------------------------------------------------------------------------


def to_json(plan: GlobalPlan, *, chunk: int = CHUNK) -> bytes:
    """index.json for a plan, the same bytes for the same plan.

    Raises:
        ValueError: a chunk that is not a positive multiple of 4096.
    """
    if chunk < 1 or chunk % 4096:
        raise ValueError(f"chunk is {chunk}; allowed: positive multiples of 4096")
    ranks = [rank for rank, size in enumerate(plan.sizes) if size]
    numbers = {rank: number for number, rank in enumerate(ranks)}
    meshes = [
        {"dims": [list(dim) for dim in zip(mesh.names or [None] * len(mesh.shape), mesh.shape, strict=True)]}
        for mesh in plan.meshes
    ]  # fmt: skip
    writer = {
        "torch": torch.__version__,
        "goku_runtime": _own_version(),
        "ranks": plan.world,
        "meshes": meshes,
    }
    head = {"format": FORMAT, "version": VERSION, "chunk": chunk, "writer": writer}
    kinds, owners, offsets = plan.columns()
    tails: dict[int, list[str]] = {}  # what follows the payload's offset in each part of a kind
    lines, end = [], 0
    for entry, kind in zip(plan.entries.values(), kinds, strict=True):
        if id(kind) not in tails:
            tails[id(kind)] = [f"{_sides(start)},{_sides(size)}]" for start, size in kind.boxes]
        begin, end = end, end + len(kind.boxes)
        places = zip(
            owners[begin:end], offsets[begin:end], kind.heads, tails[id(kind)], strict=True
        )
        # By hand: json takes twice as long for the parts, of which there may be a million.
        parts = ",".join(
            [f"[{numbers[rank]},{offset + head},{tail}" for rank, offset, head, tail in places]
        )
        fields = (
            f'"dtype":"{dtype_name(entry.dtype)}","shape":{_sides(entry.shape)},"parts":[{parts}]'
        )
        lines.append(f"{json.dumps(entry.name)}:{{{fields}}}")
    files = _compact([data_file(rank) for rank in ranks])
    body = ",\n".join(lines)
    text = f'{_compact(head)[:-1]},\n"files":{files},\n"tensors":{{\n{body}\n}}}}\n'
    return text.encode()


def _sides(values: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, values))}]"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _own_version() -> str:
    try:
        # None where the package is being installed again at this very moment.
        return version("goku") or "unknown"
    except PackageNotFoundError:  # used from a source tree
        return "unknown"


# --- reading ----------------------------------------------------------------------------------------


def parse(data: bytes, sizes: Mapping[str, int], where: str = INDEX_NAME) -> Index:
    """Reads index.json.

    Args:
        data: the file.
        sizes: bytes of each file of the checkpoint, from the manifest.
        where: the file's name in messages.

    Raises:
        CheckpointError: anything that `to_json` does not write, or that the files cannot hold; it
            names the field.
    """
    try:
        with no_collection():
            # Only `_index` holds what was parsed: it is gone when the collector comes back, which
            # then has half as much to look at.
            return _index(
                json.loads(
                    data.decode("utf-8"),
                    object_pairs_hook=_object,
                    parse_constant=_refuse,
                    parse_float=_refuse,
                ),
                sizes,
            )
    except (Bad, ValueError, RecursionError) as error:  # bad text and bad JSON are ValueErrors
        raise CheckpointError(f"{where} is damaged: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise Bad(f"{next(n for n in counts if counts[n] > 1)!r}: twice in one object")
    return found


def _refuse(text: str) -> Any:
    raise Bad(f"the number {text[:40]}; allowed: integers")


def _fields(value: Any, field: str, *names: str) -> list[Any]:
    """The values of an object that has these fields and no others."""
    if not isinstance(value, dict):
        raise Bad(f"{field}: {short(value)}; must be an object")
    for name in names:
        if name not in value:
            raise Bad(f"{field}: lacks {name!r}")
    for name in value:
        if name not in names:
            raise Bad(f"{field}: unknown field {short(name)}")
    return [value[name] for name in names]


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise Bad(f"{field}: {short(value)}; must be a list")
    return value


def _int(value: Any, field: str, least: int, most: int = MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise Bad(f"{field}: {short(value)}; must be an integer from {least} to {most}")
    return value


def _str(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise Bad(f"{field}: {short(value)}; must be a string")
    return value


def _index(content: Any, sizes: Mapping[str, int]) -> Index:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Bad(f"format: not {FORMAT!r}")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise Bad(f"version: {short(content.get('version'))}; this program reads {VERSION}")
    fields = ("format", "version", "chunk", "writer", "files", "tensors")
    _, _, chunk, writer, names, tensors = _fields(content, "index", *fields)
    if _int(chunk, "chunk", 4096) % 4096:
        raise Bad(f"chunk: {chunk}; must be a multiple of 4096")
    _check_writer(writer)
    files: list[str] = []
    for i, name in enumerate(_list(names, "files")):
        if _str(name, f"files[{i}]") not in sizes:
            raise Bad(f"files[{i}]: {short(name)} is no file of the checkpoint")
        files.append(name)
    if len(set(files)) < len(files):
        raise Bad("files: a name is there twice")
    if not isinstance(tensors, dict):
        raise Bad(f"tensors: {short(tensors)}; must be an object")
    reader = PartReader([sizes[name] for name in files])
    found = {name: _tensor(value, name, reader) for name, value in tensors.items()}
    return Index(chunk, writer, tuple(files), found)


def _check_writer(writer: Any) -> None:
    fields = ("torch", "goku_runtime", "ranks", "meshes")
    torch_version, own, ranks, meshes = _fields(writer, "writer", *fields)
    _str(torch_version, "writer.torch")
    _str(own, "writer.goku_runtime")
    _int(ranks, "writer.ranks", 1)
    for i, mesh in enumerate(_list(meshes, "writer.meshes")):
        where = f"writer.meshes[{i}].dims"
        (dims,) = _fields(mesh, f"writer.meshes[{i}]", "dims")
        for dim in _list(dims, where):
            if len(_list(dim, where)) != 2:
                raise Bad(f"{where}: {short(dim)}; must be pairs of name and size")
            if dim[0] is not None:
                _str(dim[0], where)
            _int(dim[1], where, 1)


def _single(value: Any, reader: PartReader) -> IndexTensor | None:
    """A tensor in one part, as all are that one rank saved; None: it is none, or something is wrong.

    20,000 small tensors take 75 ms this way; with names for all fields it would be 165 ms.
    """
    try:
        kind, shape, ((file, offset, start, size),) = value["dtype"], value["shape"], value["parts"]
    except (LookupError, TypeError, ValueError):
        return None
    if not (
        len(value) == 3
        and type(kind) is str
        and kind in DTYPES
        and type(shape) is type(start) is type(size) is list
        and len(shape) <= _AXES
        and {*map(type, (file, offset, *start, *shape, *size))} == {int}  # True is none
        and shape == size
        and len(start) == len(shape)
        and not any(start)
        and min(file, offset, *shape) >= 0
        and max(0, offset, *shape) <= MOST
        and file < len(reader.lengths)
    ):
        return None
    dtype = DTYPES[kind]
    nbytes = math.prod(shape) * dtype.itemsize
    if offset + nbytes > reader.lengths[file] or nbytes > reader.left[file]:
        return None
    reader.left[file] -= nbytes
    box = whole(shape)
    return IndexTensor(dtype, box.size, (StoredPart(file, offset, box),))


def _tensor(value: Any, name: str, reader: PartReader) -> IndexTensor:
    single = _single(value, reader)
    if single is not None:
        return single
    field = f"tensors[{short(name)}]"
    kind, sides, entries = _fields(value, field, "dtype", "shape", "parts")
    dtype = DTYPES.get(_str(kind, f"{field}.dtype"))
    if dtype is None:
        raise Bad(f"{field}.dtype: {short(kind)}; allowed: {', '.join(DTYPES)}")
    axes = len(_list(sides, f"{field}.shape"))
    if axes > _AXES or not are_sides(sides, axes):
        allowed = f"at most {_AXES} integers from 0 to {MOST}"
        raise Bad(f"{field}.shape: {sides_text(sides)}; must be {allowed}")
    shape = tuple(sides)
    rows = _list(entries, f"{field}.parts")
    parts = reader.parts(rows, f"{field}.parts", shape, dtype.itemsize)
    return IndexTensor(dtype, shape, parts)
