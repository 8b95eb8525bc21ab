"""latest, set_latest and prune: always a good one to go on from."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from goku_runtime.checkpoint import (
    CheckpointError,
    Retention,
    latest,
    load,
    prune,
    save,
    set_latest,
)
from goku_runtime.checkpoint.directory import remove_leftovers


def make(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        save({"w": torch.full((8,), float(number)), "name": name}, root / name)


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def data_file(path: Path) -> Path:
    return next(path.glob("*.distcp"))


def test_nothing_there(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "none") is None
    assert prune(tmp_path, 1) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "file").touch()
    assert latest(tmp_path) is None


def test_the_pointer_decides(tmp_path: Path) -> None:
    make(tmp_path, "step-1", "step-2")
    assert latest(tmp_path) == tmp_path / "step-2"
    set_latest(tmp_path, "step-1")
    assert latest(tmp_path) == tmp_path / "step-1"
    set_latest(tmp_path, "step-2")
    assert latest(str(tmp_path)) == tmp_path / "step-2"
    assert names(tmp_path) == {"step-1", "step-2", "latest"}


@pytest.mark.parametrize(
    "content", ["", "gone\n", "../step-3", "/", ".", "step-2/x", "\0", "step-3"]
)
def test_a_stale_pointer_falls_back_to_the_newest_complete_one(
    tmp_path: Path, content: str
) -> None:
    make(tmp_path, "step-1", "step-2", "step-3")
    data_file(tmp_path / "step-3").write_bytes(b"short")
    (tmp_path / "latest").write_text(content)
    assert latest(tmp_path) == tmp_path / "step-2"
    (tmp_path / "step-2" / "manifest.json").unlink()
    assert latest(tmp_path) == tmp_path / "step-1"


def test_a_pointer_that_is_no_text(tmp_path: Path) -> None:
    make(tmp_path, "step-1")
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert latest(tmp_path) == tmp_path / "step-1"


@pytest.mark.parametrize("name", ["none", "", "..", "a/b", "half", ".hidden"])
def test_only_a_complete_checkpoint_becomes_the_latest(tmp_path: Path, name: str) -> None:
    make(tmp_path, "good", "half")
    data_file(tmp_path / "half").write_bytes(b"short")
    set_latest(tmp_path, "good")
    with pytest.raises(CheckpointError, match="cannot become the latest"):
        set_latest(tmp_path, name)
    assert latest(tmp_path) == tmp_path / "good"
    assert names(tmp_path) == {"good", "half", "latest"}


class Killed(BaseException):
    """Stands for the end of the process: nothing is cleaned up."""


def kill_before_replace(monkeypatch: pytest.MonkeyPatch, root: Path, name: str) -> Path:
    """set_latest up to its rename; returns the file that it leaves."""

    def killed(*arguments: Any, **options: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        with pytest.raises(Killed):
            set_latest(root, name)
    (left,) = (path for path in root.iterdir() if path.name.startswith(".latest."))
    return left


@pytest.mark.parametrize("sweep", ["save", "prune", "latest"])
def test_killed_before_the_pointer_is_in_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sweep: str
) -> None:
    make(tmp_path, "a", "b")
    kill_before_replace(monkeypatch, tmp_path, "a")
    others = [".latest.swp", ".latest.0123456789abcdef0", "latest.0123456789abcdef"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".latest.0123456789abcdef").mkdir()
    if sweep == "save":
        save({"w": torch.zeros(8), "name": "b"}, tmp_path / "b", overwrite=True)
    elif sweep == "prune":
        prune(tmp_path, 2)
    else:
        assert latest(tmp_path) == tmp_path / "b"
    assert names(tmp_path) == {"a", "b", *others, ".latest.0123456789abcdef"}


def test_a_pointer_being_written_is_not_swept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(tmp_path, "a", "b")
    real = os.replace
    sweep = threading.Thread(target=remove_leftovers, args=(tmp_path,))

    def interrupted(source: Path, target: Path) -> None:
        sweep.start()
        sweep.join(0.5)
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    set_latest(tmp_path, "a")
    sweep.join(10)
    assert latest(tmp_path) == tmp_path / "a"
    assert names(tmp_path) == {"a", "b", "latest"}


def test_without_locks_no_pointer_is_swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    make(tmp_path, "a")
    left = kill_before_replace(monkeypatch, tmp_path, "a")
    monkeypatch.setattr(fcntl, "flock", flock)
    set_latest(tmp_path, "a")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"a", "latest", left.name}


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    make(tmp_path, "d", "c", "b", "a")
    (tmp_path / "notes").mkdir()
    assert prune(tmp_path, 2) == [tmp_path / "c", tmp_path / "d"]
    assert names(tmp_path) == {"a", "b", "notes"}
    assert prune(tmp_path, 5) == []


def test_prune_keeps_what_the_pointer_names(tmp_path: Path) -> None:
    make(tmp_path, "a", "b", "c")
    set_latest(tmp_path, "a")
    assert prune(tmp_path, 1) == [tmp_path / "b"]
    assert names(tmp_path) == {"a", "c", "latest"}
    assert latest(tmp_path) == tmp_path / "a"


def test_prune_keeps_the_last_good_one(tmp_path: Path) -> None:
    """The newest has its size but not its content: the sums tell."""
    make(tmp_path, "a", "b", "c")
    path = data_file(tmp_path / "c")
    path.write_bytes(bytes(path.stat().st_size))
    assert prune(tmp_path, 1) == [tmp_path / "a"]
    state = {"w": torch.zeros(8), "name": ""}
    load(state, tmp_path / "b")
    assert state["name"] == "b"
    assert prune(tmp_path, 1, sums=False) == [tmp_path / "b"]


def test_prune_leaves_incomplete_ones_alone(tmp_path: Path) -> None:
    make(tmp_path, "a", "b", "c")
    (tmp_path / "a" / "manifest.json").unlink()
    data_file(tmp_path / "c").unlink()
    assert prune(tmp_path, 1) == []
    assert names(tmp_path) == {"a", "b", "c"}


@pytest.mark.parametrize("keep", [0, -1])
def test_prune_wants_to_keep_something(tmp_path: Path, keep: int) -> None:
    with pytest.raises(ValueError, match=f"keep_last: found {keep}; must be at least 1"):
        prune(tmp_path, keep)


def test_only_the_series_is_thinned_out(tmp_path: Path) -> None:
    retention = Retention(2)
    save({"step": 0}, tmp_path / "best")
    save({"step": 0}, tmp_path / "other_1")
    for step in range(1, 5):
        save({"step": step}, tmp_path / f"step_{step}", latest=True, retention=retention)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"best", "other_1", "step_3", "step_4", "latest"}
    save({"step": 9}, tmp_path / "best", overwrite=True, retention=retention)
    assert {path.name for path in tmp_path.iterdir()} == found


@pytest.mark.parametrize("path", ["s3://bucket/run", "file:///tmp/x"])
def test_addresses_are_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="allowed: a directory, no address"):
        save({"step": 0}, path)
    assert not list(tmp_path.iterdir())


def test_a_retention_of_another_kind_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"retention is 3; allowed: None or Retention"):
        save({"step": 0}, tmp_path / "c", retention=3)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
