"""A full disk, a failing device, a killed process: what was saved before stays loadable."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from goku_runtime.checkpoint import (
    Checkpointer,
    async_save,
    checkpointer,
    latest,
    load,
    prune,
    save,
)
from goku_runtime.checkpoint import directory as directory_module
from goku_runtime.checkpoint.directory import NewDirectory, new_token, remove_leftovers, unfinished
from goku_runtime.checkpoint.ranks import Ranks

Run = Callable[..., str]


def small_file_system(directory: Path) -> tuple[str, ...]:
    """A command prefix that runs a command with 1 MiB of tmpfs at `directory`, where allowed."""
    mount = 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"'
    for unshare in (("unshare", "-m"), ("unshare", "-rm")):
        prefix = (*unshare, "sh", "-c", mount, str(directory))
        try:
            if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
                return prefix
        except FileNotFoundError:
            break
    return ()


def test_disk_full(run_ranks: Run, tmp_path: Path) -> None:
    """ENOSPC from a file system of 1 MiB; where none can be mounted, EFBIG from a limit."""
    directory = tmp_path / "small"
    directory.mkdir()
    prefix = small_file_system(directory)
    if prefix:
        for scenario in ("disk_full", "disk_full_behind"):
            assert "saves failed" in run_ranks(1, directory, scenario, prefix=prefix)
    else:
        run_ranks(1, directory, "file_too_large")


def test_a_read_only_file_system(run_ranks: Run, tmp_path: Path) -> None:
    directory = tmp_path / "small"
    directory.mkdir()
    prefix = small_file_system(directory)
    if not prefix:
        pytest.skip("file systems cannot be mounted here")
    (directory / "read_only").mkdir()
    # The scenario's own directory is the mount: what is read-only must not be the test's.
    prefix = (*prefix[:-1], str(directory / "read_only"))
    run_ranks(1, directory, "read_only", prefix=prefix)
    (directory / "read_only_amid").mkdir()
    prefix = (*prefix[:-1], str(directory / "read_only_amid"))
    run_ranks(2, directory, "read_only_amid", prefix=prefix)


def test_files_that_may_not_grow(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(1, tmp_path, "file_too_large")


def test_killed_at_any_moment(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(1, tmp_path, "killed_while_saving", "killed_while_replacing")


STATE: dict[str, Any] = {"w": torch.ones(1000), "step": 1}


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[str]:
    """EIO from the n-th fsync (0: from none); returns what was synced, growing."""
    real, synced = os.fsync, []

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if len(synced) == call:
            raise OSError(errno.EIO, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return synced


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failing_device_at_every_sync(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, overwrite: bool
) -> None:
    """EIO from the n-th fsync: before the rename nothing is left, after it the new one is whole."""
    (tmp_path / "0").mkdir()
    with monkeypatch.context() as patch:
        synced = fail_at(patch, 0)
        save(STATE, tmp_path / "0" / "c")
    # The directories above; .crc, index.json, .metadata, __values.distcp, state.json, manifest.json,
    # the directory; its parent, after the rename. The data file is the engine's (tests/csrc).
    assert len(synced) >= 9
    assert synced[-1] == str(tmp_path / "0")
    for call in range(1, len(synced) + 1):
        root = tmp_path / str(call)
        save({"w": torch.zeros(1000), "step": 0}, root / "old")
        target = root / ("old" if overwrite else "new")
        with monkeypatch.context() as patch:
            fail_at(patch, call)
            with pytest.raises(OSError, match="Input/output"):
                save(STATE, target, overwrite=overwrite)
        renamed = call == len(synced)
        state = {"w": torch.full((1000,), 9.0), "step": 9}
        load(state, root / "old")
        assert state["step"] == int(overwrite and renamed)
        assert bool((state["w"] == state["step"]).all())
        if not overwrite:
            assert target.exists() == renamed
        save(STATE, root / "next")
        assert not [path for path in root.iterdir() if path.name.startswith(".")]


def test_an_interrupt_while_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ctrl-C arrives as itself, and nothing stays behind."""

    def interrupt(*arguments: object, **options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointer, "write_durably", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(STATE, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_with_and_without_exchange(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(directory_module, "_exchange", lambda left, right: False)
    save({"step": 0}, tmp_path / "c")
    save({"step": 1}, tmp_path / "c", overwrite=True)
    state = {"step": -1}
    load(state, tmp_path / "c")
    assert state == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """Without an exchange there is a moment without a target; the old one is put back."""
    save({"step": 0}, tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / ".c.replaced-0123456789abcdef")
    assert latest(tmp_path) == tmp_path / "c"
    state = {"step": -1}
    load(state, tmp_path / "c")
    assert state == {"step": 0}


def test_leftovers_are_told_from_what_is_alive(tmp_path: Path) -> None:
    alive = NewDirectory(tmp_path / "alive", overwrite=False)
    for name in (f".c.saving-{new_token()}", ".c.removing-0123456789abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    kept = [".c.saving-short", ".saving-0123456789abcdef", "c.saving-0123456789abcdef", ".git"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".d.saving-0123456789abcdef").write_text("a file")
    save({"step": 0}, tmp_path / "c")
    save({"step": 0}, tmp_path / "d")
    save({"step": 1}, tmp_path / "d", overwrite=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*kept, "c", "d", ".d.saving-0123456789abcdef", alive.path.name}
    alive.discard()
    assert not alive.path.exists()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names - {alive.path.name}


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    new = NewDirectory(tmp_path / "c", overwrite=False)
    save({"step": 5}, tmp_path / "c")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        new.publish()
    new.discard()
    state = {"step": -1}
    load(state, tmp_path / "c")
    assert state == {"step": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_parents_made_for_a_failed_save_are_removed(tmp_path: Path) -> None:
    new = NewDirectory(tmp_path / "a" / "b" / "c", overwrite=False)
    new.discard()
    assert list(tmp_path.iterdir()) == []


def opens_its_own(arguments: tuple[Any, ...]) -> bool:
    return threading.current_thread() is threading.main_thread() and ".saving-" in str(arguments[0])


@pytest.mark.parametrize("moment", ["mkdir", "open"])
def test_a_sweep_spares_a_directory_that_is_not_locked_yet(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, moment: str
) -> None:
    """Another one sweeps just when the writer has made, or opened, its directory."""
    owner = Path if moment == "mkdir" else os
    real = getattr(owner, moment)
    sweep = threading.Thread(target=remove_leftovers, args=(tmp_path,))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        if opens_its_own(arguments):
            sweep.start()
            sweep.join(0.5)  # it waits for the writer, or else has swept by now
        return result

    monkeypatch.setattr(owner, moment, interrupted)
    new = NewDirectory(tmp_path / "c", overwrite=False)
    monkeypatch.undo()
    sweep.join(10)
    assert not sweep.is_alive()
    remove_leftovers(tmp_path)
    assert new.path.is_dir()
    new.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_gets_its_lock_though_another_one_probes_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = os.open
    release = threading.Timer(0.3, lambda: None)

    def probed(*arguments: Any, **options: Any) -> int:
        if opens_its_own(arguments):
            probe = real(*arguments, **options)
            fcntl.flock(probe, fcntl.LOCK_EX)
            release.function = lambda: os.close(probe)
            release.start()
        return real(*arguments, **options)

    monkeypatch.setattr(os, "open", probed)
    new = NewDirectory(tmp_path / "c", overwrite=False)
    monkeypatch.undo()
    release.join()
    remove_leftovers(tmp_path)
    assert new.path.is_dir()
    new.discard()


def test_a_sweep_waits_for_both_renames(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It would put the old checkpoint back between them, and the second one would fail."""
    monkeypatch.setattr(directory_module, "_exchange", lambda left, right: False)
    save({"step": 0}, tmp_path / "c")
    real = os.rename
    sweep = threading.Thread(target=remove_leftovers, args=(tmp_path,))

    def interrupted(source: Path, target: Path) -> None:
        real(source, target)
        if source == tmp_path / "c":
            sweep.start()
            sweep.join(0.5)

    monkeypatch.setattr(os, "rename", interrupted)
    save({"step": 1}, tmp_path / "c", overwrite=True)
    sweep.join(10)
    state = {"step": -1}
    load(state, tmp_path / "c")
    assert state == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_sweep_waits_for_a_removal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save({"step": 0}, tmp_path / "c")
    real = os.rename
    sweep = threading.Thread(target=remove_leftovers, args=(tmp_path,))

    def interrupted(source: Path, target: Path) -> None:
        real(source, target)
        sweep.start()
        sweep.join(0.5)

    monkeypatch.setattr(os, "rename", interrupted)
    directory_module.remove(tmp_path / "c")
    sweep.join(10)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Saving works; what may belong to a living writer is left alone."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".c.saving-0123456789abcdef").mkdir()
    save({"step": 0}, tmp_path / "c")
    save({"step": 1}, tmp_path / "c", overwrite=True)
    assert latest(tmp_path) == tmp_path / "c"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"c", ".c.saving-0123456789abcdef"}


# ---- other machines ----

HOUR = 3600.0


def left(parent: Path, token: str, *, hours: float = 0.0) -> Path:
    """A directory that was being written, the last time so many hours ago."""
    path = unfinished(parent / "c", token)
    path.mkdir(parents=True)
    file = path / "__0_0.distcp"
    file.write_bytes(b"half")
    for each in (file, path):
        os.utime(each, (time.time() - hours * HOUR,) * 2)
    return path


def test_a_lock_that_only_one_machine_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """NFS and Lustre tell no other machine of a directory's lock: a save there must not be swept."""
    begun = threading.Event()
    swept = threading.Event()
    real = Checkpointer._write_files

    def waits(self: Checkpointer, job: Any) -> Any:
        if job.target.name == "a":
            begun.set()
            assert swept.wait(30)
        return real(self, job)

    monkeypatch.setattr(Checkpointer, "_write_files", waits)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # everybody gets every lock
    handle = async_save({"step": 1}, tmp_path / "a", stage="background")
    assert begun.wait(30)
    monkeypatch.setattr(directory_module, "_machine", lambda: "0" * 8)
    save({"step": 2}, tmp_path / "b")
    prune(tmp_path, 1)
    remove_leftovers(tmp_path)
    swept.set()
    assert handle.result() == tmp_path / "a"
    state = {"step": 0}
    load(state, tmp_path / "a")
    assert state == {"step": 1}


@pytest.mark.parametrize(
    ("hours", "stays"), [(0.0, True), (11.9, True), (12.1, False), (-5.0, True)]
)
def test_another_machines_is_swept_by_its_age(tmp_path: Path, hours: float, stays: bool) -> None:
    path = left(tmp_path, "0123456789abcdef", hours=hours)  # as all were named before
    remove_leftovers(tmp_path)
    assert path.exists() == stays
    save({"step": 0}, tmp_path / "c")
    assert {each.name for each in tmp_path.iterdir()} == ({"c", path.name} if stays else {"c"})


def test_what_is_still_being_written_is_young(tmp_path: Path) -> None:
    path = left(tmp_path, "0123456789abcdef", hours=100)
    (path / "__1_0.distcp").write_bytes(b"more")
    os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert path.exists()


def test_of_this_machine_the_lock_decides(tmp_path: Path) -> None:
    alive = NewDirectory(tmp_path / "alive", overwrite=False)
    os.utime(alive.path, (0, 0))
    path = left(tmp_path, new_token())
    remove_leftovers(tmp_path)
    assert not path.exists()
    assert alive.path.exists()
    alive.discard()


def test_without_locks_age_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    young, old = left(tmp_path, new_token()), left(tmp_path, new_token(), hours=13)
    remove_leftovers(tmp_path)
    assert young.exists()
    assert not old.exists()


def test_another_machines_pointer_is_swept_by_its_age(tmp_path: Path) -> None:
    young, old = tmp_path / ".latest.0123456789abcdef", tmp_path / ".latest.1123456789abcdef"
    for path in (young, old):
        path.touch()
    os.utime(old, (0, 0))
    remove_leftovers(tmp_path)
    assert young.exists()
    assert not old.exists()


# ---- deletions that others would wait for ----


def test_nobody_waits_for_deletions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A commit, and another job's pointer, come before terabytes of a killed save have gone."""
    gone = threading.Event()
    real = directory_module.delete
    order = []

    def slow(path: Path, journal: Any = None) -> None:
        assert gone.wait(30)
        order.append(path.name)
        real(path, journal)

    def together(self: Ranks, step: Any) -> Any:
        result = real_together(self, step)
        order.append("agreed")
        gone.set()
        return result

    real_together = Ranks.on_first
    save({"step": 0}, tmp_path / "c")
    left(tmp_path, new_token())
    monkeypatch.setattr(directory_module, "delete", slow)
    monkeypatch.setattr(Ranks, "on_first", together)
    save({"step": 1}, tmp_path / "c", overwrite=True, latest=True)
    assert order[0] == "agreed"
    assert len(order) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"c", "latest"}
