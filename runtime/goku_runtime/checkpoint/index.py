"""index.json: in which bytes of which files each tensor lies.

A line for each tensor. Whatever it says is checked before it is used, against the sizes in the
manifest: no tensor can be larger than the files together, and parts neither overlap nor leave gaps.
"""

from __future__ import annotations

import gc
import json
from bisect import bisect_left
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from goku_runtime.checkpoint._boxes import Box, fault, intersection
from goku_runtime.checkpoint._runs import Run, StoredPart, runs
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
_MOST = (1 << 63) - 1
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
        axes = range(len(self.shape))
        counts = [len({part.box.start[axis] for part in self.parts}) for axis in axes]
        axis = max(axes, key=lambda each: counts[each], default=-1)
        if axis < 0:
            return axis, [], list(self.parts), 0
        parts = sorted(self.parts, key=lambda part: part.box.start[axis])
        longest = max(part.box.size[axis] for part in parts)
        return axis, [part.box.start[axis] for part in parts], parts, longest

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
    lines = []
    for entry in plan.entries.values():
        parts = [
            (numbers[part.rank], part.payload, part.box.start, part.box.size)
            for part in entry.parts()
        ]
        tensor = {"dtype": dtype_name(entry.dtype), "shape": entry.shape, "parts": parts}
        lines.append(f"{json.dumps(entry.name)}:{_compact(tensor)}")
    files = _compact([data_file(rank) for rank in ranks])
    body = ",\n".join(lines)
    text = f'{_compact(head)[:-1]},\n"files":{files},\n"tensors":{{\n{body}\n}}}}\n'
    return text.encode()


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _own_version() -> str:
    try:
        # None where the package is being installed again at this very moment.
        return version("goku") or "unknown"
    except PackageNotFoundError:  # used from a source tree
        return "unknown"


# --- reading ----------------------------------------------------------------------------------------


class _Bad(Exception):
    """What is wrong, without saying where the index lies."""


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
        with _no_collection():
            content = json.loads(
                data.decode("utf-8"),
                object_pairs_hook=_object,
                parse_constant=_refuse,
                parse_float=_refuse,
            )
            return _index(content, sizes)
    except (_Bad, ValueError, RecursionError) as error:  # bad text and bad JSON are ValueErrors
        raise CheckpointError(f"{where} is damaged: {error}") from error


@contextmanager
def _no_collection() -> Generator[None]:
    """Stops the garbage collector, if it runs: it would look again and again at millions of objects
    all of which stay, for half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise _Bad(f"{next(n for n in names if names.count(n) > 1)!r}: twice in one object")
    return found


def _refuse(text: str) -> Any:
    raise _Bad(f"the number {text[:40]}; allowed: integers")


def _fields(value: Any, field: str, *names: str) -> list[Any]:
    """The values of an object that has these fields and no others."""
    if not isinstance(value, dict):
        raise _Bad(f"{field}: {_short(value)}; must be an object")
    for name in names:
        if name not in value:
            raise _Bad(f"{field}: lacks {name!r}")
    for name in value:
        if name not in names:
            raise _Bad(f"{field}: unknown field {_short(name)}")
    return [value[name] for name in names]


def _short(value: Any) -> str:
    """A value as text that is not long, however long the value is."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if type(value) is int and not -_MOST <= value <= _MOST:
        return "an integer beyond 64 bits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Bad(f"{field}: {_short(value)}; must be a list")
    return value


def _int(value: Any, field: str, least: int, most: int = _MOST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _Bad(f"{field}: {_short(value)}; must be an integer from {least} to {most}")
    return value


def _str(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"{field}: {_short(value)}; must be a string")
    return value


def _index(content: Any, sizes: Mapping[str, int]) -> Index:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise _Bad(f"format: not {FORMAT!r}")
    if type(content.get("version")) is not int or content["version"] != VERSION:
        raise _Bad(f"version: {_short(content.get('version'))}; this program reads {VERSION}")
    fields = ("format", "version", "chunk", "writer", "files", "tensors")
    _, _, chunk, writer, names, tensors = _fields(content, "index", *fields)
    if _int(chunk, "chunk", 4096) % 4096:
        raise _Bad(f"chunk: {chunk}; must be a multiple of 4096")
    _check_writer(writer)
    files: list[str] = []
    for i, name in enumerate(_list(names, "files")):
        if _str(name, f"files[{i}]") not in sizes:
            raise _Bad(f"files[{i}]: {_short(name)} is no file of the checkpoint")
        files.append(name)
    if len(set(files)) < len(files):
        raise _Bad("files: a name is there twice")
    if not isinstance(tensors, dict):
        raise _Bad(f"tensors: {_short(tensors)}; must be an object")
    lengths = [sizes[name] for name in files]
    # Not more payload than bytes: an index cannot let a small file stand for much.
    left = list(lengths)
    found = {name: _tensor(value, name, lengths, left) for name, value in tensors.items()}
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
                raise _Bad(f"{where}: {_short(dim)}; must be pairs of name and size")
            if dim[0] is not None:
                _str(dim[0], where)
            _int(dim[1], where, 1)


def _tensor(value: Any, name: str, lengths: list[int], left: list[int]) -> IndexTensor:
    field = f"tensors[{_short(name)}]"
    kind, sides, entries = _fields(value, field, "dtype", "shape", "parts")
    dtype = DTYPES.get(_str(kind, f"{field}.dtype"))
    if dtype is None:
        raise _Bad(f"{field}.dtype: {_short(kind)}; allowed: {', '.join(DTYPES)}")
    axes = len(_list(sides, f"{field}.shape"))
    if axes > _AXES or not _are_sides(sides, axes):
        allowed = f"at most {_AXES} integers from 0 to {_MOST}"
        raise _Bad(f"{field}.shape: {_sides_text(sides)}; must be {allowed}")
    shape = tuple(sides)
    parts, count = [], len(lengths)
    for i, entry in enumerate(_list(entries, f"{field}.parts")):
        # An index has a part for each rank and tensor: names are made only for what is wrong.
        if not (
            type(entry) is list
            and len(entry) == 4
            and type(entry[0]) is int
            and 0 <= entry[0] < count
            and type(entry[1]) is int
            and 0 <= entry[1] <= _MOST
            and _are_sides(entry[2], axes)
            and _are_sides(entry[3], axes)
        ):
            raise _Bad(_part_problem(entry, f"{field}.parts[{i}]", count, axes))
        file, offset = entry[0], entry[1]
        box = Box(tuple(entry[2]), tuple(entry[3]))
        nbytes = box.volume * dtype.itemsize
        if offset + nbytes > lengths[file]:
            raise _Bad(
                f"{field}.parts[{i}]: {_short(nbytes)} bytes at {offset} of file {file}, which has "
                f"{lengths[file]}"
            )
        left[file] -= nbytes
        if left[file] < 0:
            raise _Bad(
                f"{field}.parts[{i}]: with it, parts hold more than the {lengths[file]} bytes of "
                f"file {file}"
            )
        parts.append(StoredPart(file, offset, box))
    wrong = fault(shape, [part.box for part in parts])
    if wrong is not None:
        raise _Bad(f"{field}.parts: {wrong} (of shape {shape})")
    return IndexTensor(dtype, shape, tuple(parts))


def _are_sides(value: Any, axes: int) -> bool:
    """Whether these are sizes or starts: an integer from 0 for each axis."""
    return (
        type(value) is list
        and len(value) == axes
        and all(type(side) is int and 0 <= side <= _MOST for side in value)
    )


def _part_problem(entry: Any, where: str, files: int, axes: int) -> str:
    if not isinstance(entry, list) or len(entry) != 4:
        return f"{where}: {_short(entry)}; must be [file, offset, start, size]"
    for name, value, most in (("file", entry[0], files - 1), ("offset", entry[1], _MOST)):
        if type(value) is not int or not 0 <= value <= most:
            return f"{where}: {name} {_short(value)}; must be an integer from 0 to {most}"
    name, value = ("size", entry[3]) if _are_sides(entry[2], axes) else ("start", entry[2])
    return f"{where}: {name} {_sides_text(value)}; must be {axes} integers from 0 to {_MOST}"


def _sides_text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value[:8])) + (", ...]" if len(value) > 8 else "]")
    return _short(value)
