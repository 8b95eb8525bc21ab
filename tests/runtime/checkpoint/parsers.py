"""What is read of a checkpoint before any of its data, and what must hold whatever stands there."""

from __future__ import annotations

import json
import math
import sys
import tracemalloc
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from mutations import mutated_text
from sealing import manifest_text

from goku_runtime.checkpoint import CheckpointError, index, tree
from goku_runtime.checkpoint._tilings import Tiling
from goku_runtime.checkpoint.index import Index
from goku_runtime.checkpoint.manifest import Manifest
from goku_runtime.checkpoint.records import dtype_name

GOLDEN = Path(__file__).with_name("golden")
SIZES: dict[str, int] = {}
"""Bytes of the golden folders' files, the largest of each name."""
for manifest in GOLDEN.glob("version2-*/manifest.json"):
    for name, entry in json.loads(manifest.read_bytes())["files"].items():
        SIZES[name] = max(SIZES.get(name, 0), entry["size"])

# Memory that a parser may take for a file: `[{},{},...]` are 48 bytes for each byte, a traceback of a
# thousand calls half a MiB.
MOST_FIRST, MOST_PER_BYTE = 1 << 20, 64


@dataclass(frozen=True)
class Parser:
    """One of the three.

    Attributes:
        file: its name in a checkpoint.
        read: what is made of it; CheckpointError refuses it, and nothing else may be raised.
        faithful: raises AssertionError if what was made of it is not what stands there.
        sealed: gives it the sum that it has in itself, if it has one.
        more: files beside the golden ones that mutations begin with.
    """

    file: str
    read: Callable[[bytes], Any]
    faithful: Callable[[bytes, Any], None]
    sealed: Callable[[bytes], bytes] = bytes
    more: tuple[bytes, ...] = ()

    def seeds(self) -> list[bytes]:
        """Files that are taken: those of the golden checkpoints, and `more`."""
        golden = [path.read_bytes() for path in sorted(GOLDEN.glob(f"*/{self.file}"))]
        return [*golden, *self.more]

    def check(self, data: bytes) -> bool:
        """Reads a file: True if it is taken, False if refused. Raises if either is wrong."""
        taken, found = False, None
        tracemalloc.start()
        try:
            with suppress(CheckpointError):
                found = self.read(data)
                taken = True
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= MOST_FIRST + MOST_PER_BYTE * len(data), f"{peak} bytes for {len(data)}"
        if taken:
            self.faithful(data, found)
        return taken

    def mutated(self, data: bytes, random: Random) -> bytes:
        """Another file, which may have the right sum or not."""
        data = mutated_text(data, random)
        return self.sealed(data) if random.randrange(2) else data


# ---- what was read is what stands there


def content_of(found: Index) -> dict[str, Any]:
    """An index as JSON would have it: parsing must neither lose nor change anything."""
    numbers = {id(tiling): number for number, tiling in enumerate(found.layouts)}
    layouts = {} if found.version == 1 else {"layouts": list(map(_layout, found.layouts))}
    tensors: dict[str, Any] = {}
    for name, tensor in found.tensors.items():
        if found.version == 1:
            parts = [[f, at, list(box.start), list(box.size)] for f, at, box in tensor.parts]
            where = {"shape": list(tensor.shape), "parts": parts}
        else:
            ends = [*tensor.firsts[1:], tensor.tiling.count]
            counts = [end - first for first, end in zip(tensor.firsts, ends, strict=True)]
            places = zip(counts, tensor.files, tensor.offsets, strict=True)
            where = {"layout": numbers[id(tensor.tiling)], "places": list(map(list, places))}
        tensors[name] = {"dtype": dtype_name(tensor.dtype), **where}
    return {
        "format": "goku-checkpoint-index",
        "version": found.version,
        "chunk": found.chunk,
        "writer": found.writer,
        "files": list(found.files),
        **layouts,
        "tensors": tensors,
    }


def _layout(tiling: Tiling) -> dict[str, Any]:
    if tiling.cuts is None:
        boxes = [[list(box.start), list(box.size)] for box in tiling.boxes]
        return {"shape": list(tiling.shape), "boxes": boxes}
    cuts = [cut if isinstance(cut, int) else list(cut) for cut in tiling.cuts]
    return {"shape": list(tiling.shape), "cuts": cuts}


def same_json(data: bytes, content: Any) -> bool:
    return json.dumps(content, sort_keys=True) == json.dumps(json.loads(data), sort_keys=True)


def faithful_index(data: bytes, found: Index) -> None:
    assert same_json(data, content_of(found))
    for tensor in found.tensors.values():
        boxes = [part.box for part in tensor.parts]
        assert sum(box.volume for box in boxes) == math.prod(tensor.shape)


def outcome(data: bytes, sizes: Mapping[str, int]) -> Any:
    """The content of an index, or what is wrong with it."""
    try:
        return content_of(index.parse(data, sizes))
    except CheckpointError as error:
        return str(error)


def refused_or_faithful(data: bytes, sizes: Mapping[str, int]) -> None:
    try:
        found = index.parse(data, sizes)
    except CheckpointError:
        return
    faithful_index(data, found)


def faithful_manifest(data: bytes, found: Manifest) -> None:
    content = json.loads(data)
    files = {name: {"size": f.size, "crc32c": f"{f.crc:08x}"} for name, f in found.files.items()}
    assert list(content["files"].items()) == list(files.items())
    assert (content["version"], content["created_ns"]) == (found.version, found.created_ns)
    assert not [name for name in files if "/" in name or "\0" in name or name in ("", ".", "..")]


def faithful_tree(data: bytes, found: Any) -> None:
    """It can be used as `load` does: nothing is found out later."""
    assert same_json(data, found)
    assert isinstance(tree.decode(found), dict)
    assert not tree.match({}, found).problems


# ---- the three


def resealed(data: bytes) -> bytes:
    """The manifest with the sum that it should have."""
    try:
        content = json.loads(data)
        return manifest_text(content).encode() if isinstance(content, dict) else data
    except (ValueError, RecursionError):
        return data


def odd_indices() -> list[bytes]:
    """Of both versions: parts that are no grid, around one in the middle, and a tensor that is most of a file;
    in the second also grids, cut evenly or not, and a scalar."""
    content = json.loads((GOLDEN / "version2-torch2.13" / "index.json").read_bytes())
    assert content["version"] == 1
    wheel = [
        ([0, 0], [1, 2]),
        ([0, 2], [2, 1]),
        ([2, 1], [1, 2]),
        ([1, 0], [2, 1]),
        ([1, 1], [1, 1]),
    ]
    parts = [[i % 2, 64 * i, start, size] for i, (start, size) in enumerate(wheel)]
    most = SIZES["__0_0.distcp"] - 64
    tensors = {
        "wheel": {"dtype": "int8", "shape": [3, 3], "parts": parts},
        "most": {"dtype": "int8", "shape": [most], "parts": [[0, 64, [0], [most]]]},
    }
    first = content | {"tensors": tensors}
    layouts = [
        {"shape": [3, 3], "boxes": wheel},
        {"shape": [most // 2], "cuts": [most // 2]},
        {"shape": [7, 3], "cuts": [4, 3]},
        {"shape": [5, 3], "cuts": [[0, 1], 3]},
        {"shape": [], "cuts": []},
    ]
    spread = [[2, 0, 0], [1, 1, 64], [1, 0, 128], [1, 1, 192]]
    places = {"wheel": spread, "half": [[1, 0, 64]], "rows": [[2, 0, 0]],
              "uneven": [[1, 1, 64], [1, 0, 64]], "scalar": [[1, 1, 0]]}  # fmt: skip
    tensors = {
        name: {"dtype": "int8", "layout": number, "places": each}
        for number, (name, each) in enumerate(places.items())
    }
    second = content | {"version": 2, "layouts": layouts, "tensors": tensors}
    return [json.dumps(first).encode(), json.dumps(second).encode()]


PARSERS = {
    "index": Parser(
        "index.json", lambda data: index.parse(data, SIZES), faithful_index, more=(*odd_indices(),)
    ),
    "manifest": Parser(
        "manifest.json", lambda data: Manifest.from_bytes(data, "c"), faithful_manifest, resealed
    ),
    "tree": Parser("state.json", lambda data: tree.parse_tree(data, "c"), faithful_tree),
}
