"""index.json: in which bytes of which files each tensor lies.

A line for each way in which tensors are cut into boxes, and one for each tensor. Whatever it says is checked
before it is used, against the sizes in the manifest: no tensor can be larger than the files together, and
parts neither overlap nor leave gaps.

Version 2 of it is written. Version 1, which lists every part of every tensor, is read: for a model of 8B with
EMA and Adam that 4,096 ranks shard it has 237 MiB and takes 19 s to read, version 2 has 0.4 MiB and takes 0.3 s.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from goku_runtime._version import own_version
from goku_runtime.checkpoint._entries import Kind
from goku_runtime.checkpoint._index_fields import Bad, fields, integer, listed, short, string
from goku_runtime.checkpoint._index_layouts import PlaceReader, read_layout
from goku_runtime.checkpoint._index_parts import PartReader
from goku_runtime.checkpoint._runs import Run, StoredPart
from goku_runtime.checkpoint._tilings import IndexTensor, Tiling, cuts_of
from goku_runtime.checkpoint.collection import no_collection
from goku_runtime.checkpoint.manifest import CheckpointError
from goku_runtime.checkpoint.plan import GlobalPlan, data_file
from goku_runtime.checkpoint.records import dtype_name

__all__ = ["CHUNK", "INDEX_NAME", "Index", "IndexTensor", "Run", "StoredPart", "parse", "to_json"]

INDEX_NAME = "index.json"
# 4 bytes of CRC for each 64 KiB: what is read beside the bytes wanted is at most two such chunks for
# each run of them, and the sums of a terabyte are 64 MiB.
CHUNK = 65536
_MAX_CHUNK = 64 << 20  # of the engine, which reads whole ones
"""Bytes of a data file that one CRC-32C covers; a multiple of 4096."""

FORMAT = "goku-checkpoint-index"
VERSION = 2


@dataclass(frozen=True)
class Index:
    """The content of index.json.

    Attributes:
        version: of the file.
        chunk: bytes of a data file that one CRC covers.
        writer: what wrote it: versions, number of ranks, meshes.
        files: names of the data files.
        layouts: which the tensors have; none in version 1.
        tensors: by name.
    """

    version: int
    chunk: int
    writer: Mapping[str, Any]
    files: tuple[str, ...]
    layouts: tuple[Tiling, ...]
    tensors: Mapping[str, IndexTensor]


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
        "goku_runtime": own_version() or "unknown",
        "ranks": plan.world,
        "meshes": meshes,
    }
    head = {"format": FORMAT, "version": VERSION, "chunk": chunk, "writer": writer}
    layouts, lines = _Layouts(), []
    for entry, kind, places in zip(plan.entries.values(), *_places(plan, numbers), strict=True):
        layout = layouts.number(entry.shape, kind)
        # By hand: json takes twice as long for the places, of which there may be hundreds of thousands.
        text = ",".join([f"[{count},{file},{offset}]" for count, file, offset in places])
        fields = f'"dtype":"{dtype_name(entry.dtype)}","layout":{layout},"places":[{text}]'
        lines.append(f"{json.dumps(entry.name)}:{{{fields}}}")
    files = _compact([data_file(rank) for rank in ranks])
    shapes, body = ",\n".join(layouts.lines), ",\n".join(lines)
    text = (
        f'{_compact(head)[:-1]},\n"files":{files},\n"layouts":[\n{shapes}\n],\n'
        f'"tensors":{{\n{body}\n}}}}\n'
    )
    return text.encode()


class _Layouts:
    """The layouts of a plan's tensors, each once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._numbers: dict[str, int] = {}
        self._known: dict[int, int] = {}

    def number(self, shape: tuple[int, ...], kind: Kind) -> int:
        if id(kind) not in self._known:
            cuts = cuts_of(shape, kind.boxes)
            where = {"boxes": kind.boxes} if cuts is None else {"cuts": cuts}
            line = _compact({"shape": shape, **where})
            number = self._numbers.setdefault(line, len(self._numbers))
            if number == len(self.lines):
                self.lines.append(line)
            self._known[id(kind)] = number
        return self._known[id(kind)]


def _places(
    plan: GlobalPlan, numbers: Mapping[int, int]
) -> tuple[list[Kind], list[list[list[int]]]]:
    """Of each tensor its kind, and the [boxes, file, offset] of its parts: as many that follow each other lie
    in files that do, at one offset."""
    kinds, ranks, offsets = plan.columns()
    if not kinds:
        return [], []
    table = torch.zeros(plan.world, dtype=torch.int64, device="cpu")
    table[list(numbers)] = torch.tensor(list(numbers.values()), dtype=torch.int64, device="cpu")
    files, offsets = table[ranks], offsets + torch.cat([kind.heads for kind in kinds])
    ends = list(accumulate(len(kind.boxes) for kind in kinds))
    breaks = torch.ones(len(files) + 1, dtype=torch.bool, device="cpu")
    breaks[1:-1] = (files.diff() != 1) | (offsets.diff() != 0)
    breaks[ends] = True
    begins = breaks.nonzero()[:, 0]
    rows = torch.stack((begins.diff(), files[begins[:-1]], offsets[begins[:-1]]), 1).tolist()
    cuts = [0, *torch.searchsorted(begins, torch.tensor(ends, device="cpu")).tolist()]
    return kinds, [rows[begin:end] for begin, end in pairwise(cuts)]


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


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


def _index(content: Any, sizes: Mapping[str, int]) -> Index:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise Bad(f"format: not {FORMAT!r}")
    number = content.get("version")
    if type(number) is not int or number not in (1, VERSION):
        raise Bad(f"version: {short(number)}; this program reads 1 and {VERSION}")
    layouts = ("layouts",) if number > 1 else ()
    own = ("format", "version", "chunk", "writer", "files", *layouts, "tensors")
    _, _, chunk, writer, names, *laid_out, tensors = fields(content, "index", *own)
    if integer(chunk, "chunk", 4096) % 4096 or chunk > _MAX_CHUNK:
        raise Bad(f"chunk: {chunk}; must be a multiple of 4096 up to {_MAX_CHUNK}")
    _check_writer(writer)
    files: list[str] = []
    for i, name in enumerate(listed(names, "files")):
        if string(name, f"files[{i}]") not in sizes:
            raise Bad(f"files[{i}]: {short(name)} is no file of the checkpoint")
        files.append(name)
    if len(set(files)) < len(files):
        raise Bad("files: a name is there twice")
    if not isinstance(tensors, dict):
        raise Bad(f"tensors: {short(tensors)}; must be an object")
    lengths = [sizes[name] for name in files]
    if number == 1:
        parts = PartReader(lengths)
        found = {name: parts.tensor(value, name) for name, value in tensors.items()}
        return Index(number, chunk, writer, tuple(files), (), found)
    tilings = [
        read_layout(value, f"layouts[{i}]", len(files))
        for i, value in enumerate(listed(laid_out[0], "layouts"))
    ]
    places = PlaceReader(lengths, tilings)
    found = {name: places.tensor(value, name) for name, value in tensors.items()}
    places.check_files()
    return Index(number, chunk, writer, tuple(files), tuple(tilings), found)


def _check_writer(writer: Any) -> None:
    names = ("torch", "goku_runtime", "ranks", "meshes")
    torch_version, own, ranks, meshes = fields(writer, "writer", *names)
    string(torch_version, "writer.torch")
    string(own, "writer.goku_runtime")
    integer(ranks, "writer.ranks", 1)
    for i, mesh in enumerate(listed(meshes, "writer.meshes")):
        where = f"writer.meshes[{i}].dims"
        (dims,) = fields(mesh, f"writer.meshes[{i}]", "dims")
        for dim in listed(dims, where):
            if len(listed(dim, where)) != 2:
                raise Bad(f"{where}: {short(dim)}; must be pairs of name and size")
            if dim[0] is not None:
                string(dim[0], where)
            integer(dim[1], where, 1)
