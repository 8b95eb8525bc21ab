"""Damaged and crafted checkpoints: every fault is named, nothing wrong is loaded."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from goku_runtime.checkpoint import (
    CheckpointError,
    load,
    loading,
    manifest,
    read_values,
    save,
    verify,
)
from goku_runtime.checkpoint.stored import Stored

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from sealing import seal, write_manifest

WEIGHT = torch.arange(6, dtype=torch.float32).reshape(2, 3)
DATA, SUMS = "__0_0.distcp", "__0_0.crc"


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


def test_a_copy_that_is_sealed_again_loads(checkpoint: Path) -> None:
    """Guards the tests below: what they refuse is the crafted content, not the seal."""
    seal(checkpoint)
    state = wanted()
    load(state, checkpoint)
    assert torch.equal(state["w"], WEIGHT)


# --- others, who replace or remove it ------------------------------------------------------------


def replace(path: Path) -> None:
    save({"w": WEIGHT * 2, "v": torch.zeros(4), "step": 4}, path, overwrite=True)


@pytest.mark.parametrize("change", [replace, shutil.rmtree], ids=["replaced", "removed"])
@pytest.mark.parametrize(
    ("module", "name"),
    [(loading, "file_problems"), (loading, "Version2"), (loading, "match"), (Stored, "read")],
    ids=["sizes", "index", "values", "tensors"],
)
def test_a_checkpoint_that_others_touch_is_not_called_damaged(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    module: Any,
    name: str,
) -> None:
    """Whenever it happens: nothing is mixed, and nobody looks for a broken disk."""
    real = getattr(module, name)

    def changed(*arguments: Any, **options: Any) -> Any:
        change(checkpoint)
        monkeypatch.setattr(module, name, real)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, changed)
    refused(checkpoint, "was replaced or removed while it was read")
    if change is replace:
        state = wanted()
        load(state, checkpoint)
        assert torch.equal(state["w"], WEIGHT * 2)
        assert state["step"] == 4


@pytest.mark.parametrize("change", [replace, shutil.rmtree], ids=["replaced", "removed"])
def test_verify_does_not_call_it_damaged_either(
    checkpoint: Path, change: Callable[[Path], None]
) -> None:
    left = [change]

    def shown(*_: int) -> None:
        if left:
            left.pop()(checkpoint)

    with pytest.raises(CheckpointError, match="was replaced or removed while it was read"):
        verify(checkpoint, progress=shown)


def test_values_are_those_of_the_manifest_that_was_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = manifest.file_problem

    def behind(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)  # it was all right a moment ago
        monkeypatch.setattr(manifest, "file_problem", real)
        replace(checkpoint)
        return found

    monkeypatch.setattr(manifest, "file_problem", behind)
    with pytest.raises(CheckpointError, match="was replaced or removed while it was read"):
        read_values(checkpoint)


# --- accidents ----------------------------------------------------------------------------------


def test_a_pipe_in_place_of_the_manifest_is_not_waited_at(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")
    refused(checkpoint, "manifest.json is no regular file")
    with pytest.raises(CheckpointError, match="no regular file"):
        verify(checkpoint)


def test_verify_finds_sums_that_load_refuses(checkpoint: Path) -> None:
    sums = bytearray((checkpoint / SUMS).read_bytes())
    sums[0] ^= 1
    (checkpoint / SUMS).write_bytes(sums)
    seal(checkpoint)
    refused(checkpoint, f"{DATA}: altered")
    with pytest.raises(CheckpointError, match=f"{DATA}: altered"):
        verify(checkpoint)


def test_lacking_sums_are_told_once(checkpoint: Path) -> None:
    state = wanted()
    (checkpoint / SUMS).unlink()
    with pytest.raises(CheckpointError) as error:
        load(state, checkpoint)
    assert str(error.value).count("is damaged") == 1


@pytest.mark.parametrize("name", [".metadata", DATA, SUMS, "index.json", "state.json"])
@pytest.mark.parametrize("left", [0.0, 0.5, -1])
def test_truncation(checkpoint: Path, name: str, left: float) -> None:
    size = (checkpoint / name).stat().st_size
    os.truncate(checkpoint / name, int(size * left) if left >= 0 else size - 1)
    with pytest.raises(CheckpointError, match=rf"{name}: truncated, \d+ bytes instead of {size}"):
        verify(checkpoint)
    refused(checkpoint, f"{name}: truncated")


@pytest.mark.parametrize(
    "name",
    [".metadata", DATA, SUMS, "index.json", "__values.distcp", "state.json", "manifest.json"],
)
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
    where = rf"{DATA}: altered, bytes 0 to \d+ \(v, w\), written by rank 0"
    refused(checkpoint, where)
    with pytest.raises(CheckpointError, match=where):
        verify(checkpoint)


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
        {"format": "other"}, {"version": 3}, {"version": True}, {"version": "1"}, {"files": []}, {"created_ns": "x"},
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
