"""Checkpoints of version 1 load as ever; what is damaged or crafted is refused, and runs no code."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import random
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from goku_runtime.checkpoint import CheckpointError, load, read_values, verify
from goku_runtime.checkpoint.version1 import metadata as metadata_module

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from sealing import seal
from version1_writer import save

WEIGHT = torch.arange(6, dtype=torch.float32).reshape(2, 3)
DATA = "__0_0.distcp"


def wanted() -> dict[str, Any]:
    return {"w": torch.full((2, 3), -1.0), "v": torch.full((4,), -1.0), "step": -1}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("intact") / "c"
    save({"w": WEIGHT, "v": torch.ones(4), "step": 3}, path)
    return path


@pytest.fixture
def checkpoint(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "c"))


def refused(checkpoint: Path, match: str, kind: type[Exception] = CheckpointError) -> None:
    """Loading raises and leaves the caller's state as it was."""
    state = wanted()
    with pytest.raises(kind, match=match):
        load(state, checkpoint)
    assert torch.equal(state["w"], torch.full((2, 3), -1.0))
    assert torch.equal(state["v"], torch.full((4,), -1.0))
    assert state["step"] == -1


def flipped(checkpoint: Path) -> None:
    data = bytearray((checkpoint / DATA).read_bytes())
    data[data.index(WEIGHT.numpy().tobytes()) + 4] ^= 1
    (checkpoint / DATA).write_bytes(data)


def test_what_was_saved_comes_back(checkpoint: Path) -> None:
    state = wanted()
    load(state, checkpoint)
    assert torch.equal(state["w"], WEIGHT)
    assert torch.equal(state["v"], torch.ones(4))
    assert state["step"] == 3
    assert read_values(checkpoint) == {"step": 3}
    assert verify(checkpoint).total_bytes > 0


def test_a_flipped_bit_is_not_loaded(checkpoint: Path) -> None:
    flipped(checkpoint)
    altered = rf"{DATA}: altered, CRC-32C [0-9a-f]{{8}} instead of [0-9a-f]{{8}}"
    refused(checkpoint, altered)
    with pytest.raises(CheckpointError, match=altered):
        verify(checkpoint)


def test_a_copy_that_is_sealed_again_loads(checkpoint: Path) -> None:
    """Guards the tests below: what they refuse is the crafted content, not the seal."""
    flipped(checkpoint)
    seal(checkpoint)
    state = wanted()
    load(state, checkpoint)
    assert not torch.equal(state["w"], WEIGHT)


# --- crafted ------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def good_metadata(checkpoint: Path) -> Metadata:
    return pickle.loads((checkpoint / ".metadata").read_bytes())  # noqa: S301  our own, intact


@pytest.mark.parametrize("place", ["whole", "planner data", "tensor name", "file", "dtype", "size"])
def test_metadata_runs_no_code(checkpoint: Path, tmp_path: Path, place: str) -> None:
    bomb: Any = Call(os.mkdir, str(tmp_path / "exploded"))
    metadata: Any = good_metadata(checkpoint)
    entry: Any = metadata.state_dict_metadata["w"]
    if place == "whole":
        metadata = bomb
    elif place == "planner data":
        metadata.planner_data = bomb
    elif place == "tensor name":
        metadata.state_dict_metadata[bomb] = entry
    elif place == "file":
        next(iter(metadata.storage_data.values())).relative_path = bomb
    elif place == "dtype":
        entry.properties.dtype = bomb
    else:
        entry.size = bomb
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    refused(checkpoint, r"\.metadata is refused: names posix\.mkdir")
    assert not (tmp_path / "exploded").exists()
    # The same bytes do run code where they are read without these precautions.
    pickle.loads((checkpoint / ".metadata").read_bytes())  # noqa: S301  that is the point
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "eval"), ("os", "system"), ("torch", "load"), ("torch", "Size.__class__"),
        ("torch.serialization", "load"), ("copyreg", "_reconstructor"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch.distributed.checkpoint.metadata", "Metadata.__class__"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
        ("torch.distributed.checkpoint.filesystem", "pickle"), ("goku_runtime.checkpoint", "load"),
    ],
)  # fmt: skip
def test_other_names_are_refused(checkpoint: Path, module: str, name: str) -> None:
    """Protocol 4 resolves dotted names, so the names are compared whole."""
    head = b"\x80\x04"
    words = b"".join(
        b"\x8c" + len(word).to_bytes(1, "little") + word.encode() for word in (module, name)
    )
    (checkpoint / ".metadata").write_bytes(head + words + b"\x93.")
    seal(checkpoint)
    refused(checkpoint, r"\.metadata is refused: names")


def test_a_pickle_cannot_change_the_real_classes(checkpoint: Path) -> None:
    """BUILD with slot state sets attributes of whatever is on the stack, a class for example."""
    before = dict(vars(Metadata))
    name = b"torch.distributed.checkpoint.metadata"
    attack = (
        b"\x80\x04\x8c" + bytes([len(name)]) + name + b"\x8c\x08Metadata\x93"
        b"N}\x8c\x0estorage_layout\x8c\x05bogus\x73\x86b."
    )  # fmt: skip
    (checkpoint / ".metadata").write_bytes(attack)
    seal(checkpoint)
    refused(checkpoint, r"\.metadata is damaged")
    assert dict(vars(Metadata)) == before
    pickle.loads(attack)  # noqa: S301  without precautions it does
    assert vars(Metadata).get("storage_layout") == "bogus"
    del Metadata.storage_layout  # type: ignore[attr-defined]


def entry(size: tuple[int, ...], *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
    parts = [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in chunks]
    return TensorStorageMetadata(TensorProperties(), torch.Size(size), parts)


def change_storage(**fields: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            for name, value in fields.items():
                setattr(info, name, value)

    return change


def change_entry(value: Any) -> Callable[[Metadata], None]:
    return lambda metadata: metadata.state_dict_metadata.update(w=value)


def drop(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["w"]


def swap_places(metadata: Metadata) -> None:
    storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
    (a, x), (b, y) = storage.items()
    storage[a], storage[b] = y, x


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (change_storage(relative_path="../../../etc/passwd"), "is placed in '../../../etc/passwd'"),
        (change_storage(relative_path="manifest.json"), r"is placed in 'manifest\.json'"),
        (change_storage(offset=-1), "is placed at -1"),
        (change_storage(length=1 << 40), "is placed at"),
        (change_storage(offset="0"), "is placed in"),
        (change_storage(transform_descriptors=["zstd"]), "is transformed"),
        (change_storage(length=10), "the record of .* is refused"),
        (change_entry(entry((2, 3))), "do not fill"),
        (change_entry(entry((2, 3), ((0, 0), (1, 3)))), "do not fill"),
        (change_entry(entry((2, 3), ((1, 0), (2, 3)))), "lies outside"),
        (change_entry(entry((2, 3), ((0,), (6,)))), "is damaged"),
        (change_entry(entry((2, 3), ((0, 0), (1, 3)), ((1, 0), (1, 3)))), "no place for 'w'"),
        (change_entry(BytesStorageMetadata()), "names .*BytesStorageMetadata"),
        (change_entry("w"), "a str where a TensorStorageMetadata must be"),
        (drop, "lacks 'w'"),
        (swap_places, r"the record of '.' is not torch\.float32"),
    ],
)  # fmt: skip
def test_metadata_that_lies(
    checkpoint: Path, change: Callable[[Metadata], None], words: str
) -> None:
    metadata = good_metadata(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    refused(checkpoint, words)


@pytest.mark.parametrize("data", [b"", b".", b"\x80\x04", b"\x80\x04N.", b"garbage", b"\x80\xff."])
def test_metadata_that_is_no_pickle(checkpoint: Path, data: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(data)
    seal(checkpoint)
    refused(checkpoint, r"\.metadata is damaged")


def record_of(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["code", "dtype", "shape", "dict", "subclass", "noise"])
def test_records_that_are_no_such_tensor(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """A record is a pickle too: torch reads it with weights_only, and it must be what was said."""
    record = {
        "code": lambda: record_of(Call(os.mkdir, str(tmp_path / "exploded"))),
        "dtype": lambda: record_of(WEIGHT.double()),
        "shape": lambda: record_of(WEIGHT.t()),
        "dict": lambda: record_of({"w": WEIGHT}),
        "subclass": lambda: record_of(torch.nn.Parameter(WEIGHT)),
        "noise": lambda: zlib.compress(b"noise"),
    }[kind]()
    metadata = good_metadata(checkpoint)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, len(record)
    (checkpoint / DATA).write_bytes(record)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)
    refused(checkpoint, r"the record of '.' is")
    assert not (tmp_path / "exploded").exists()


def test_a_bad_record_after_good_ones_changes_nothing(checkpoint: Path) -> None:
    """v is read before w: all of it must be read and checked before the first copy."""
    metadata = good_metadata(checkpoint)
    places = {index.fqn: info for index, info in metadata.storage_data.items()}
    last = max(places.values(), key=lambda info: info.offset)
    with open(checkpoint / DATA, "r+b") as stream:
        stream.seek(last.offset)
        stream.write(b"\0" * last.length)
    seal(checkpoint)
    refused(checkpoint, "the record of '.' is refused")


# --- parts of a tensor --------------------------------------------------------------------------


Part = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


def split_w(checkpoint: Path, *parts: Part) -> None:
    """Stores w in these parts, each with a record of its own that holds only ones."""
    metadata = good_metadata(checkpoint)
    metadata.state_dict_metadata["w"] = entry((2, 3), *parts)
    storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
    for index in [index for index in storage if index.fqn == "w"]:
        del storage[index]
    with open(checkpoint / DATA, "ab") as stream:
        for offsets, sizes in parts:
            record = record_of(torch.ones(sizes))
            place = _StorageInfo(DATA, stream.tell(), len(record))
            storage[MetadataIndex("w", torch.Size(offsets))] = place
            stream.write(record)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(checkpoint)


def test_parts_that_fill_a_tensor(checkpoint: Path) -> None:
    split_w(checkpoint, ((0, 2), (2, 1)), ((0, 0), (1, 2)), ((1, 0), (1, 2)), ((2, 0), (0, 3)))
    state = wanted()
    load(state, checkpoint)
    assert torch.equal(state["w"], torch.ones(2, 3))


def test_parts_that_overlap(checkpoint: Path) -> None:
    """Six elements of six, but one column twice and another never."""
    split_w(checkpoint, ((0, 0), (2, 2)), ((0, 1), (2, 1)))
    refused(checkpoint, r"parts of 'w' overlap: \(2, 2\) at \(0, 0\) and \(2, 1\) at \(0, 1\)")


def test_overlap_against_counting() -> None:
    draw = random.Random(0)
    outcomes = set()
    for _ in range(2000):
        size = [draw.randint(1, 4) for _ in range(draw.randint(0, 3))]
        parts, counts = [], torch.zeros(size, dtype=torch.int)
        for _ in range(draw.randint(0, 4)):
            offsets = [draw.randint(0, n) for n in size]
            sizes = [draw.randint(0, n - o) for n, o in zip(size, offsets, strict=True)]
            parts.append((tuple(offsets), tuple(sizes)))
            counts[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
        found = metadata_module._overlap(entry(tuple(size), *parts).chunks)
        assert bool(found) == bool((counts > 1).any()), (size, parts)
        outcomes.add(bool(found))
    assert outcomes == {True, False}


def test_a_layout_that_no_cut_divides() -> None:
    """Four blades around a hub."""
    wheel = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    chunks = entry((3, 3), *wheel).chunks
    assert metadata_module._overlap(chunks) == ()
    assert metadata_module._overlap([*chunks, chunks[0]]) == (chunks[0], chunks[0])


@pytest.mark.parametrize("grid", [(10_000,), (1, 10_000), (100, 100), (22, 22, 22)], ids=str)
def test_thousands_of_parts_take_no_time(grid: tuple[int, ...]) -> None:
    parts: list[Part] = [
        (tuple(3 * i for i in place), (3,) * len(grid))
        for place in itertools.product(*map(range, grid))
    ]
    random.Random(0).shuffle(parts)
    chunks = entry(tuple(3 * n for n in grid), *parts).chunks
    assert len(chunks) == math.prod(grid)
    start = time.process_time()
    assert metadata_module._overlap(chunks) == ()
    assert time.process_time() - start < 2  # a tenth of it; 50 million pairs are not compared
