"""The log of what a save asks of the file system: all of it, in order, and nothing that failed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from goku_runtime.checkpoint import Checkpointer, CheckpointOptions, Retention, directory
from goku_runtime.checkpoint.journal import Journal, logged


def test_a_save(tmp_path: Path) -> None:
    """Every file is made, written and synced before the directory is, and that before its rename."""
    journal = Journal()
    options = CheckpointOptions(block_bytes=65536)
    begin = time.monotonic_ns()
    with Checkpointer(options=options, journal=journal) as saving:
        saving.save({"w": torch.zeros(50_000), "step": 1}, tmp_path / "made" / "c", latest=True)
        files = {path.name: path.stat().st_size for path in (tmp_path / "made" / "c").iterdir()}
        first = journal.operations
        saving.async_save({"step": 2}, tmp_path / "made" / "d", retention=Retention(1)).result()
    assert begin <= min(each.begin_ns for each in first)
    assert all(each.begin_ns <= each.end_ns for each in first)
    assert [each.end_ns for each in first] == sorted(each.end_ns for each in first)

    renamed = next(n for n, each in enumerate(first) if each.kind == "rename")
    assert first[renamed].other == str(tmp_path / "made" / "c")
    hidden = Path(first[renamed].path)
    synced = next(
        n for n, each in enumerate(first) if each.path == str(hidden) and "sync" in each.kind
    )
    for name, size in files.items():
        own = [(n, each) for n, each in enumerate(first) if each.path == str(hidden / name)]
        kinds = [each.kind for _, each in own]
        assert kinds[0] == "create", name
        assert kinds.count("fsync") == 1
        assert "write" not in kinds[kinds.index("fsync") :], "nothing is written after its fsync"
        assert sum(each.length for _, each in own if each.kind == "write") == size
        assert max(n for n, _ in own) < synced < renamed
    writes = [each for each in first if each.kind == "write" and each.path.endswith("__0_0.distcp")]
    assert len(writes) > 1, "the engine's trace is in it"

    after = [(each.kind, Path(each.path)) for each in first[renamed + 1 :]]
    root = tmp_path / "made"
    pointer = after[1][1]
    assert after == [
        ("fsync_directory", root),
        ("create", pointer), ("write", pointer), ("fsync", pointer), ("rename", pointer),
        ("fsync_directory", root),
    ]  # fmt: skip
    removed = [each.kind for each in journal.operations[len(first) :] if "removing" in each.path]
    assert removed == [], "the pointer's is kept"


def test_replacing_and_removing(tmp_path: Path) -> None:
    journal = Journal()
    with Checkpointer(journal=journal) as saving:
        saving.save({"step": 1}, tmp_path / "c-1")
        saving.save({"step": 2}, tmp_path / "c-1", overwrite=True)
        saving.save({"step": 3}, tmp_path / "c-2", retention=Retention(1))
    kinds = [each.kind for each in journal.operations]
    assert kinds.count("exchange") == 1
    assert kinds.count("rmtree") == 2
    assert kinds[kinds.index("exchange") :][:3] == ["exchange", "fsync_directory", "rmtree"]
    assert kinds[-3:] == ["rename", "fsync_directory", "rmtree"]


def test_without_fsync_there_is_none(tmp_path: Path) -> None:
    journal = Journal()
    with Checkpointer(options=CheckpointOptions(fsync=False), journal=journal) as saving:
        saving.save({"w": torch.zeros(100)}, tmp_path / "c")
    kinds = {each.kind for each in journal.operations}
    assert {"create", "write", "rename"} <= kinds
    assert not {kind for kind in kinds if "sync" in kind}


def test_what_fails_is_not_logged(tmp_path: Path) -> None:
    journal = Journal()
    with pytest.raises(FileExistsError), logged(journal, "mkdir", tmp_path):
        tmp_path.mkdir()
    with pytest.raises(FileNotFoundError):
        directory.write_durably(tmp_path / "none" / "file", b"x", journal=journal)
    assert journal.operations == []
    directory.write_durably(tmp_path / "file", b"xyz", journal=journal)
    assert [(each.kind, each.length) for each in journal.operations] == [
        ("create", 0), ("write", 3), ("fsync", 0),
    ]  # fmt: skip
