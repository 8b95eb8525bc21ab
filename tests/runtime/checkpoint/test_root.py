"""latest, set_latest and prune: always a good one to go on from."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from goku_runtime.checkpoint import (
    CheckpointError,
    Retention,
    committing,
    latest,
    load,
    prune,
    save,
    set_latest,
)
from goku_runtime.checkpoint import checkpointer as checkpointer_module
from goku_runtime.checkpoint import directory as directory_module
from goku_runtime.checkpoint import manifest as manifest_module
from goku_runtime.checkpoint.directory import new_token, remove_leftovers
from goku_runtime.checkpoint.manifest import Manifest


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


# ---- what cannot be read


def answer(monkeypatch: pytest.MonkeyPatch, directory: Path, code: int) -> None:
    """Whatever is asked of this directory's files is answered with an error; root may read everything."""
    real = os.open

    def refused(path: Any, *arguments: Any, **options: Any) -> int:
        if Path(path).parent == directory:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refused)


def loop(path: Path) -> None:
    path.mkdir()
    (path / "manifest.json").symlink_to("manifest.json")


def folder(path: Path) -> None:
    (path / "manifest.json").mkdir(parents=True)


@pytest.mark.parametrize("kind", ["loop", "folder", "lost+found"])
def test_a_directory_that_cannot_be_read_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """The root of every ext4 has one: lost+found."""
    odd = tmp_path / "step_9"
    if kind == "lost+found":
        odd.mkdir()
        answer(monkeypatch, odd, errno.EACCES)
    else:
        {"loop": loop, "folder": folder}[kind](odd)
    assert latest(tmp_path) is None
    for step in range(1, 4):
        save({"step": step}, tmp_path / f"step_{step}", retention=Retention(1))
    assert names(tmp_path) == {"step_3", "step_9"}
    assert latest(tmp_path) == tmp_path / "step_3"
    assert prune(tmp_path, 1) == []


def test_a_failing_device_is_no_reason_to_start_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, "step_1", "step_2", "step_3")
    answer(monkeypatch, tmp_path / "step_3", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        latest(tmp_path)
    assert prune(tmp_path, 1) == [tmp_path / "step_1"]
    assert "step_3 cannot be read and is passed over" in caplog.text


def test_the_one_that_the_pointer_names_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make(tmp_path, "a", "b", "c")
    set_latest(tmp_path, "b")
    answer(monkeypatch, tmp_path / "b", errno.EACCES)
    with pytest.raises(PermissionError):
        latest(tmp_path)
    assert prune(tmp_path, 1) == [tmp_path / "a"]


# ---- clocks


def test_a_clock_that_went_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A job goes on where the clock is behind: what it saves is the newest all the same."""
    for step in (1, 2):
        save({"step": step}, tmp_path / f"step_{step}", retention=Retention(2))
    save({"step": 0}, tmp_path / "other_1")
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 10**12)
    for step in (3, 4):
        path = save({"step": step}, tmp_path / f"step_{step}", retention=Retention(2))
        assert path.is_dir()
    assert names(tmp_path) == {"step_3", "step_4", "other_1"}
    created = Manifest.read(tmp_path / "step_4").created_ns
    assert created == Manifest.read(tmp_path / "step_3").created_ns + 1
    save({"step": 1}, tmp_path / "fresh_1")
    assert Manifest.read(tmp_path / "fresh_1").created_ns < created, "each series has its own"


def test_the_new_one_stays_whatever_the_times_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(committing, "newest_ns", lambda root, series: 0)
    save({"step": 1}, tmp_path / "step_1")
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 10**12)
    save({"step": 2}, tmp_path / "step_2", retention=Retention(1))
    assert names(tmp_path) == {"step_1", "step_2"}


# ---- what a commit asks


def test_files_are_looked_at_once_in_a_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With thousands of ranks each checkpoint has thousands of files."""
    asked: list[str] = []
    real = manifest_module.file_problem

    def noting(path: Path, *arguments: Any, **options: Any) -> list[str]:
        asked.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(manifest_module, "file_problem", noting)
    for step in range(1, 6):
        asked.clear()
        path = save(
            {"w": torch.ones(3)}, tmp_path / f"step_{step}", latest=True, retention=Retention(3)
        )
        files = {each.name for each in path.iterdir() if each.name != "manifest.json"}
        # Those of the new one, and of the others that are to be kept: a broken one is no good to keep.
        kept = min(step, 3)
        assert len(asked) == len(set(asked)) == kept * len(files)
        assert {os.path.basename(each) for each in asked} == files
    assert names(tmp_path) == {"step_3", "step_4", "step_5", "latest"}


def test_one_that_lacks_a_file_does_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save({"w": torch.ones(3)}, tmp_path / f"step_{step}")
    data_file(tmp_path / "step_3").unlink()
    assert prune(tmp_path, 1, sums=False) == [tmp_path / "step_1"]


def test_broken_ones_are_not_among_those_that_retention_keeps(tmp_path: Path) -> None:
    for step in range(1, 5):
        save({"w": torch.ones(99)}, tmp_path / f"step_{step}")
    os.truncate(data_file(tmp_path / "step_4"), 9)
    save({"w": torch.ones(99)}, tmp_path / "step_5", retention=Retention(2))
    assert names(tmp_path) == {"step_3", "step_4", "step_5"}  # two that are whole


def test_what_cannot_be_looked_at_costs_no_save(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "step_9").mkdir()
    real = Path.is_dir

    def stale(path: Path, *arguments: Any, **options: Any) -> bool:
        if path.name == "step_9":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "is_dir", stale)
    for step in (1, 2):
        save({"w": torch.ones(3)}, tmp_path / f"step_{step}", retention=Retention(1))
    assert names(tmp_path) == {"step_2", "step_9"}


def test_leftovers_that_leave_no_room_are_deleted_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    events: list[str] = []
    delete = directory_module.delete
    write = checkpointer_module.Checkpointer._write

    def slow(path: Path, *arguments: Any) -> None:
        time.sleep(0.5)
        delete(path, *arguments)
        events.append("deleted")

    def writing(*arguments: Any) -> None:
        events.append("writing")
        write(*arguments)

    monkeypatch.setattr(directory_module, "delete", slow)
    monkeypatch.setattr(checkpointer_module.Checkpointer, "_write", writing)
    for name, free, order in (
        ("full", 1 << 20, ["deleted", "writing"]),
        ("roomy", 1 << 40, ["writing", "deleted"]),
    ):
        events.clear()
        (tmp_path / f".a.removing-{new_token()}").mkdir()
        monkeypatch.setattr(checkpointer_module, "_free_bytes", lambda path, free=free: free)
        save({"w": torch.ones(3)}, tmp_path / name)
        assert events == order
