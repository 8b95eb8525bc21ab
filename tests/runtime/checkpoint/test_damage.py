"""Damaged and crafted checkpoints: every fault is named, no code runs, nothing is changed."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
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

from goku_runtime.checkpoint import CheckpointError, crc32c, load, read_values, save, verify
from goku_runtime.checkpoint import metadata as metadata_module

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


def seal(checkpoint: Path) -> None:
    """Makes the manifest match the files again, as somebody with bad intentions would."""
    write_manifest(
        checkpoint,
        files={
            path.name: {"size": path.stat().st_size, "crc32c": f"{crc32c(path.read_bytes()):08x}"}
            for path in sorted(checkpoint.iterdir())
            if path.name != "manifest.json"
        },
    )


def write_manifest(checkpoint: Path, **change: Any) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_bytes()) | change
    del manifest["crc32c"]
    manifest["crc32c"] = f"{crc32c(json.dumps(manifest).encode()):08x}"
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def test_a_copy_that_is_sealed_again_loads(checkpoint: Path) -> None:
    """Guards the tests below: what they refuse is the crafted content, not the seal."""
    seal(checkpoint)
    state = wanted()
    load(state, checkpoint)
    assert torch.equal(state["w"], WEIGHT)


# --- accidents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".metadata", DATA, "state.json"])
@pytest.mark.parametrize("left", [0.0, 0.5, -1])
def test_truncation(checkpoint: Path, name: str, left: float) -> None:
    size = (checkpoint / name).stat().st_size
    os.truncate(checkpoint / name, int(size * left) if left >= 0 else size - 1)
    with pytest.raises(CheckpointError, match=rf"{name}: truncated, \d+ bytes instead of {size}"):
        verify(checkpoint)
    refused(checkpoint, f"{name}: truncated")


@pytest.mark.parametrize("name", [".metadata", DATA, "state.json", "manifest.json"])
def test_every_flipped_bit_is_found(checkpoint: Path, name: str) -> None:
    """Every byte of the small files, a sample of the large one; a random bit of each."""
    original = (checkpoint / name).read_bytes()
    draw = random.Random(0)
    places = draw.sample(range(len(original)), min(len(original), 400))
    for place in places:
        data = bytearray(original)
        data[place] ^= 1 << draw.randrange(8)
        (checkpoint / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=r"is damaged|is not a manifest|has version"):
            verify(checkpoint)
    (checkpoint / name).write_bytes(original)
    verify(checkpoint)


def test_a_flipped_bit_is_not_loaded(checkpoint: Path) -> None:
    data = bytearray((checkpoint / DATA).read_bytes())
    place = data.index(WEIGHT.numpy().tobytes()) + 4
    data[place] ^= 1
    (checkpoint / DATA).write_bytes(data)
    refused(checkpoint, rf"{DATA}: altered, CRC-32C [0-9a-f]{{8}} instead of [0-9a-f]{{8}}")


def test_missing_extra_and_too_long_files_are_all_named(checkpoint: Path) -> None:
    (checkpoint / DATA).unlink()
    (checkpoint / "notes.txt").write_text("x")
    (checkpoint / "folder").mkdir()
    with open(checkpoint / "state.json", "ab") as stream:
        stream.write(b" ")
    with pytest.raises(CheckpointError, match="is damaged") as caught:
        verify(checkpoint)
    for words in (f"{DATA}: missing", "notes.txt: extra", "folder: extra", "state.json: too long"):
        assert words in str(caught.value)
    refused(checkpoint, "notes.txt: extra")


def test_a_link_is_not_a_file_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shutil.move(checkpoint / DATA, tmp_path / "elsewhere")
    (checkpoint / DATA).symlink_to(tmp_path / "elsewhere")
    refused(checkpoint, f"{DATA}: missing")


def test_no_checkpoint_at_all(checkpoint: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", r"is no directory with a manifest\.json")
    refused(checkpoint / DATA, r"is no directory with a manifest\.json")
    (checkpoint / "manifest.json").unlink()
    refused(checkpoint, r"holds no manifest\.json: no checkpoint")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_values(checkpoint)


def test_read_values_verifies_what_it_reads(checkpoint: Path) -> None:
    assert read_values(checkpoint) == {"step": 3}
    text = (checkpoint / "state.json").read_bytes()
    (checkpoint / "state.json").write_bytes(text.replace(b"3", b"4"))
    with pytest.raises(CheckpointError, match=r"state\.json: altered"):
        read_values(checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"}, {"version": 2}, {"version": "1"}, {"files": []}, {"created_ns": "x"},
        {"files": {"../up": {"size": 1, "crc32c": "00000000"}}},
        {"files": {"/etc/passwd": {"size": 1, "crc32c": "00000000"}}},
        {"files": {"..": {"size": 1, "crc32c": "00000000"}}},
        {"files": {"a": {"size": -1, "crc32c": "00000000"}}},
        {"files": {"a": {"size": True, "crc32c": "00000000"}}},
        {"files": {"a": {"size": 1, "crc32c": "0"}}}, {"files": {"a": {"size": 1}}},
        {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_manifests_that_are_none(checkpoint: Path, change: dict[str, Any]) -> None:
    write_manifest(checkpoint, **change)
    refused(checkpoint, r"manifest\.json")


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


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (b"[]", "no JSON object"),
        (b"{", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b'{"w": {"$tensor": "w"}, "v": {"$tensor": "v"}, "step": {"$code": 1}}', "unknown tag"),
        (b'{"w": {"$tensor": "w"}, "v": {"$tensor": "v"}, "step": {"$dict": [3]}}', "no entry"),
        (b'{"w": {"$tensor": "x"}, "v": {"$tensor": "v"}, "step": 3}', "w: refers to 'x'"),
        (b'{"w": {"$tensor": "v"}, "v": {"$tensor": "v"}, "step": 3}', "w: refers to 'v'"),
        (b'{"w": {"$tensor": "v"}, "v": {"$tensor": "w"}, "step": 3}', "w: refers to 'v'"),
        (b'{"$dict": [["w", {"$tensor": "w"}], ["w", {"$tensor": "w"}], '
         b'["v", {"$tensor": "v"}], ["step", 3]]}', "w: two tensors have this name"),
        (b'{"w": {"$tensor": "w"}, "v": {"$tensor": "v"}, "step": [{"a": {"$tensor": "w"}}]}',
         r"step\[0\]\.a: a tensor inside a list"),
        (b'{"w": {"$tensor": "w"}, "v": {"$tensor": "v"}, '
         b'"step": {"$tuple": [1, [{"a": {"$tensor": "step[1][0].a"}}]]}}',
         r"step\[1\]\[0\]\.a: a tensor inside a list"),
    ],
)  # fmt: skip
def test_values_that_are_none(checkpoint: Path, tree: bytes, words: str) -> None:
    (checkpoint / "state.json").write_bytes(tree)
    seal(checkpoint)
    refused(checkpoint, words)


def test_two_leaves_of_one_tensor(tmp_path: Path) -> None:
    """They have the shape that is wanted, so nothing else would tell; also where a part is loaded.

    The dotted keys "a.b" and "a", "b" are one name: here both leaves bear their own.
    """
    save({"a": {"b": torch.ones(2)}, "a.b": 1, "c": torch.zeros(2)}, tmp_path / "c")
    tree = json.loads((tmp_path / "c" / "state.json").read_bytes())
    tree["a.b"] = {"$tensor": "a.b"}
    (tmp_path / "c" / "state.json").write_text(json.dumps(tree))
    seal(tmp_path / "c")
    state: dict[str, Any] = {"a": {"b": torch.full((2,), -1.0)}, "a.b": torch.full((2,), -1.0)}
    with pytest.raises(CheckpointError, match=r"a\.b: two tensors have this name"):
        load(state, tmp_path / "c", partial=True)
    assert torch.equal(state["a"]["b"], torch.full((2,), -1.0))
    with pytest.raises(CheckpointError, match="two tensors"):
        read_values(tmp_path / "c")


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
