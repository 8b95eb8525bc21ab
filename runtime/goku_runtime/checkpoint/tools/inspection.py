"""What lies in a checkpoint, without reading its tensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from goku_runtime.checkpoint.manifest import CheckpointError, Manifest
from goku_runtime.checkpoint.tools.source import (
    Place,
    Source,
    find,
    tensor_bytes,
    writing_rank,
)
from goku_runtime.checkpoint.tools.units import count_text, shape_text, size_text, value_text
from goku_runtime.checkpoint.tree import Flat, leaves

__all__ = ["InspectedTensor", "Inspection", "inspect"]

# Lines of one list in the text, unless a pattern asks for all.
_MOST = 40
# Characters of a value there.
_LONGEST = 100


@dataclass(frozen=True)
class InspectedTensor:
    """A tensor: dtype without `torch.`, shape, bytes, and how many parts it has."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    parts: int
    _name: str
    _source: Source

    @property
    def places(self) -> list[Place]:
        """Where its parts lie."""
        return self._source.places(self._name)


@dataclass
class Inspection:
    """What `inspect` found.

    Attributes:
        path: the checkpoint.
        others: those beside it, with what is wrong with each, or None; the newest first.
        manifest: versions, time, files.
        writer: torch, goku_runtime, ranks and meshes, as the index says; None in version 1.
        ranks: how many wrote it; of version 1, how many wrote data.
        tensors: by name.
        values: plain ones by name, as JSON text.
        problems: what is wrong, as far as sizes and the small files tell.
        narrowed: a pattern chose the tensors.
    """

    path: Path
    manifest: Manifest
    others: tuple[tuple[str, str | None], ...] = ()
    writer: Mapping[str, Any] | None = None
    tensors: dict[str, InspectedTensor] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    narrowed: bool = False

    @property
    def created(self) -> str:
        """When it was written, ISO 8601, UTC."""
        try:
            at = datetime.fromtimestamp(self.manifest.created_ns / 1e9, UTC)
        except (ValueError, OverflowError, OSError):  # any integer may stand in a file
            return f"{self.manifest.created_ns} ns after 1970"
        return at.isoformat(" ", "seconds")

    @property
    def ranks(self) -> int:
        if self.writer is not None:
            return int(self.writer["ranks"])
        return len({writing_rank(name) for name in self.manifest.files} - {None})

    @property
    def nbytes(self) -> int:
        """Of all files but the manifest."""
        return sum(entry.size for entry in self.manifest.files.values())

    def to_json(self, *, parts: bool = False) -> str:
        """All of it for programs; with `parts`, every part of every tensor."""
        content = {
            "path": str(self.path),
            "format": "goku-checkpoint",
            "version": self.manifest.version,
            "created": self.created,
            "created_ns": self.manifest.created_ns,
            "writer": self.writer,
            "ranks": self.ranks,
            "bytes": self.nbytes,
            "files": {
                name: {"size": entry.size, "crc32c": f"{entry.crc:08x}"}
                for name, entry in self.manifest.files.items()
            },
            "tensors": {
                name: {
                    "dtype": each.dtype,
                    "shape": each.shape,
                    "bytes": each.nbytes,
                    "parts": [[p.file, p.offset, p.box.start, p.box.size] for p in each.places]
                    if parts
                    else each.parts,
                }
                for name, each in self.tensors.items()
            },
            "values": {name: json.loads(text) for name, text in self.values.items()},
            "problems": self.problems,
            "others": [name for name, _ in self.others],
        }
        return json.dumps(content, indent=1, allow_nan=False)

    def to_text(self, *, parts: bool = False) -> str:
        """All of it for people; long lists are cut, of tensors unless a pattern chose them."""
        return "\n".join([*self._head(), *self._files(), *self._tensors(parts), *self._values()])

    def _head(self) -> list[str]:
        writer = self.writer or {}
        by = f" by goku_runtime {writer['goku_runtime']}, torch {writer['torch']}" if writer else ""
        meshes = [_mesh_text(mesh["dims"]) for mesh in writer.get("meshes", [])]
        lines = [
            str(self.path),
            *(f"  DAMAGED  {problem}" for problem in self.problems),
            f"  format   goku-checkpoint {self.manifest.version}",
            f"  written  {self.created}{by}",
            f"  ranks    {self.ranks}" + (f"; meshes {', '.join(meshes)}" if meshes else ""),
        ]
        for name, problem in self.others:
            lines.append(f"  beside   {name}" + (f"  DAMAGED  {problem}" if problem else ""))
        return lines

    def _files(self) -> list[str]:
        files = self.manifest.files
        width = max(map(len, files), default=0)
        lines = [
            f"    {name:{width}}  {size_text(entry.size):>10}" for name, entry in files.items()
        ]
        return [f"  files    {len(files)}, {size_text(self.nbytes)}", *_cut(lines, "files")]

    def _tensors(self, parts: bool) -> list[str]:
        total = sum(each.nbytes for each in self.tensors.values())
        head = f"  tensors  {len(self.tensors)}, {size_text(total)}"
        width = min(max(map(len, self.tensors), default=0), 72)
        lines = []
        for name, each in self.tensors.items():
            lines.append(
                f"    {name:{width}}  {each.dtype:8} {shape_text(each.shape):20} "
                f"{size_text(each.nbytes):>10}  {count_text(each.parts, 'part')}"
            )
            if parts:
                lines += [f"      {_place_text(place)}" for place in each.places]
        if not (self.narrowed or parts):
            lines = _cut(lines, "tensors: --tensors '*' lists all")
        groups = self._groups()
        return [head, *(groups if len(groups) > 1 else []), *lines]

    def _groups(self) -> list[str]:
        """A line for each first key of the state."""
        groups: dict[str, list[InspectedTensor]] = {}
        for name, each in self.tensors.items():
            groups.setdefault(name.partition(".")[0], []).append(each)
        lines = []
        for name, found in groups.items():
            dtypes = ", ".join(dict.fromkeys(each.dtype for each in found))
            elements = sum(math.prod(each.shape) for each in found)
            nbytes = size_text(sum(each.nbytes for each in found))
            lines.append(
                f"    {name}: {count_text(len(found), 'tensor')} of {elements:,} elements, {nbytes}, {dtypes}"
            )
        return lines

    def _values(self) -> list[str]:
        lines = [f"    {name} = {_short(text)}" for name, text in self.values.items()]
        return [f"  values   {len(self.values)}", *_cut(lines, "values: --json lists all")]


def inspect(path: str | os.PathLike[str], *, tensors: str | None = None) -> Inspection:
    """Looks into a checkpoint, or into the latest one of a folder of them or of a run.

    Reads the manifest, index and plain values, which are verified, and of other files the size.

    Args:
        path: the checkpoint or folder.
        tensors: only those whose names match this shell pattern; None: all.

    Raises:
        ValueError: no checkpoint is there, or none of its tensors has a name that matches.
        CheckpointError: the manifest is damaged. Other damage is in `problems`.
        OSError: a file cannot be read.
    """
    found = find(path)
    result = Inspection(
        found.path, Manifest.read(found.path), found.others, narrowed=tensors is not None
    )
    try:
        source = Source.open(found.path)
    except CheckpointError as error:
        result.problems = list(error.problems) or [str(error)]
        return result
    result.writer = source.writer
    for name, tensor in source.tensors.items():
        if tensors is None or fnmatchcase(name, tensors):
            dtype = str(tensor.dtype).removeprefix("torch.")
            result.tensors[name] = InspectedTensor(
                dtype, tensor.shape, tensor_bytes(tensor), source.parts(name), name, source
            )
    if tensors is not None and source.tensors and not result.tensors:
        some = ", ".join(list(source.tensors)[:3])
        raise ValueError(
            f"tensors is {tensors!r}; no tensor of {found.path} has such a name: {some} is what they are like"
        )
    result.values = leaves(Flat(source.tree))
    return result


def _mesh_text(dims: Iterable[tuple[str | None, int]]) -> str:
    return " x ".join(f"{name or 'unnamed'} {size}" for name, size in dims)


def _place_text(place: Place) -> str:
    offset = "" if place.offset is None else f" at {place.offset}"
    return f"{place.box} in {place.file}{offset}"


def _short(text: str) -> str:
    text = value_text(text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _cut(lines: list[str], what: str) -> list[str]:
    if len(lines) <= _MOST:
        return lines
    return [*lines[:_MOST], f"    and {len(lines) - _MOST} more {what}"]
