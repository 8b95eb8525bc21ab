"""The real engine on disks that fail: system calls of its own are made to, by a preloaded library."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from fault_injection import CHANGES, build

SCRIPT = Path(__file__).with_name("injected_processes.py")
Run = Callable[..., str]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


@pytest.fixture
def run(run_processes: Run, library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("LD_PRELOAD", str(library))

    def preloaded(*names: str, expect: Sequence[int] = (0, 0), **arguments: object) -> str:
        calls = [(name, {"root": str(tmp_path), **arguments}) for name in names]
        # A hundred saves with their syncs: 15 s, and more on a disk that others use.
        return run_processes(2, SCRIPT, "no_faults", *calls, expect=expect, timeout=240)

    return preloaded


def test_a_data_file_that_cannot_be_written(run: Run) -> None:
    run("data_file_fails", "no_room")


def test_a_data_file_that_cannot_be_synced(run: Run) -> None:
    run("sync_fails")


def test_an_error_that_nobody_catches(run: Run, tmp_path: Path) -> None:
    output = run("nobody_catches", expect=[1, 1])
    assert "OSError: [Errno 5] Input/output error: '" in output
    assert "OSError: [Errno 5] rank 1: Input/output error: '" in output
    left = sorted(path.name for path in (tmp_path / "uncaught").iterdir())
    assert left == ["good", "latest"]


def test_short_transfers(run: Run) -> None:
    run("short_writes", "short_reads")


def test_a_checkpoint_that_cannot_be_read(run: Run) -> None:
    run("reading_fails")


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.parametrize(
    ("calls", "pointer"),
    [
        # ext4 after an error of the device: even fsync of a directory is refused.
        pytest.param(f"{CHANGES} fsync", True, id="by-the-kernel"),
        pytest.param(CHANGES, False, id="by-a-remount", marks=pytest.mark.long),
        pytest.param(f"{CHANGES} fsync", False, id="without-a-pointer", marks=pytest.mark.long),
    ],
)
def test_a_file_system_that_becomes_read_only(
    run: Run, calls: str, pointer: bool, overwrite: bool
) -> None:
    run("becomes_read_only", calls=calls, pointer=pointer, overwrite=overwrite)
