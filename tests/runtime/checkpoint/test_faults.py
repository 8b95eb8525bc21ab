"""async_save on disks that fail, in directories that are taken away, beside others, and killed at any moment."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from goku_runtime.checkpoint import (
    Checkpointer,
    CheckpointOptions,
    async_save,
    latest,
    load,
    save,
    verify,
)

SCRIPT = Path(__file__).with_name("fault_processes.py")
Run = Callable[..., str]
KIB = 1024


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


# ---- a device that fails ----


class FailingWriter:
    """The engine's, of which one call fails as it would if the device did."""

    def __init__(self, real: Any, failing: str) -> None:
        self._real, self._failing = real, failing

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any) -> None:
            self._failing = ""
            raise OSError(errno.EIO, os.strerror(errno.EIO), self._real.path)

        return fail if name == self._failing else getattr(self._real, name)


class FailingEngine:
    def __init__(self, real: Any, failing: str) -> None:
        self._real, self._failing = real, failing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def create(self, *arguments: Any, **options: Any) -> FailingWriter:
        return FailingWriter(self._real.create(*arguments, **options), self._failing)


@pytest.mark.parametrize("staging_bytes", [None, 256 * KIB])
@pytest.mark.parametrize("failing", ["submit", "wait", "finish", "chunk_crcs"])
def test_a_device_that_fails_while_writing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str, staging_bytes: int | None
) -> None:
    state = {"w": torch.arange(500_000.0), "step": 1}
    real = Checkpointer._opened
    options = CheckpointOptions(staging_bytes=staging_bytes, window_bytes=256 * KIB)
    with Checkpointer(options=options) as saving:
        saving.async_save(state, tmp_path / "good").result()
        waits = failing != "wait" or staging_bytes is not None  # all memory at once: no need to
        with monkeypatch.context() as patch:
            patch.setattr(Checkpointer, "_opened", lambda self: FailingEngine(real(self), failing))
            handle = saving.async_save(state, tmp_path / "c", stage="background")
            if waits:
                with pytest.raises(
                    OSError, match=r"Input/output error: '.*__0_0\.distcp'"
                ) as caught:
                    handle.result()
                assert caught.value.errno == errno.EIO
                assert names(tmp_path) == ["good"]
            else:
                handle.result()
        assert handle.staging_done
        saving.async_save(state, tmp_path / "next").result()
    for name in ("good", "next"):
        verify(tmp_path / name)
        found = {"w": torch.zeros(500_000), "step": 0}
        load(found, tmp_path / name)
        assert torch.equal(found["w"], state["w"])


@pytest.mark.parametrize("failing", ["gather", "finish", "chunk_crcs"])
def test_a_device_that_fails_while_nothing_is_copied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    state = {"w": torch.arange(500_000.0)}
    real = Checkpointer._opened
    with Checkpointer() as saving:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpointer, "_opened", lambda self: FailingEngine(real(self), failing))
            with pytest.raises(OSError, match=r"Input/output error: '.*__0_0\.distcp'"):
                saving.save(state, tmp_path / "c")
        assert names(tmp_path) == []
        saving.save(state, tmp_path / "c")
    found = {"w": torch.zeros(500_000)}
    load(found, tmp_path / "c")
    assert torch.equal(found["w"], state["w"])


@pytest.mark.parametrize("sync", ["fsync", "rename", "replace"])
def test_the_commit_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sync: str) -> None:
    """EIO from each call of rank 0's part in turn: either the old state of the root, or the new."""
    save({"step": 0}, tmp_path / "old", latest=True)
    real = getattr(os, sync)
    for call in range(1, 40):
        calls = 0

        def failing(*arguments: Any, call: int = call, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, sync, failing)
            saving = Checkpointer()
            try:
                saving.async_save({"step": call}, tmp_path / "new", latest=True).result()
                failed = False
            except OSError as error:
                failed = error.errno == errno.EIO
        state = {"step": -1}
        newest = latest(tmp_path)
        assert newest is not None
        load(state, newest)
        there = (tmp_path / "new").exists()
        assert state["step"] in ((0, call) if there else (0,))
        assert not [name for name in names(tmp_path) if name.startswith(".")]
        if there:
            verify(tmp_path / "new")
        if not failed:
            assert state["step"] == call
            break
        if there:
            save({"step": 0}, tmp_path / "old", overwrite=True, latest=True)
            os.rename(tmp_path / "new", tmp_path.with_name(f"aside-{sync}-{call}"))
    assert not failed
    assert call > {"fsync": 9, "rename": 1, "replace": 1}[sync]


# ---- killed ----


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_at_any_moment(run_processes: Run, tmp_path: Path, ranks: int) -> None:
    arguments = {"root": str(tmp_path), "ranks": ranks, "rounds": 14}
    output = run_processes(1, SCRIPT, ("killed", arguments), backend="none")
    assert f"in {7 * (ranks - 1)} one rank was left alone" in output


# ---- others ----


def test_two_writers(run_processes: Run, tmp_path: Path) -> None:
    run_processes(2, SCRIPT, ("two_jobs", {"root": str(tmp_path)}))


def test_an_async_save_in_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        async_save({"step": 1}, tmp_path / "file" / "c")
    assert names(tmp_path) == ["file"]
