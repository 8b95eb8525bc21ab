"""The launcher of multi-process tests: nothing of a run reaches the next, and one that hangs leaves nobody behind."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__)
Run = Callable[..., str]


def test_every_run_begins_without_this_project(
    run_processes: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for value in ("first", "second"):
        monkeypatch.setenv("LAUNCH_TEST", value)
        folder = str(tmp_path)
        run_processes(
            2, SCRIPT, ("begins_anew", {"value": value, "folder": folder}), backend="none"
        )


def test_exit_codes_by_rank_and_what_was_said(run_processes: Run) -> None:
    output = run_processes(3, SCRIPT, "one_fails", expect=[0, 1, -9], backend="none")
    assert "ValueError: on rank 1" in output
    assert output.rstrip().endswith("exit codes: [0, 1, -9]")
    with pytest.raises(AssertionError, match=r"exit codes: \[0, 1, -9\]"):
        run_processes(3, SCRIPT, "one_fails", backend="none")


def test_a_run_that_hangs_is_ended_with_all_its_ranks(run_processes: Run) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"on 2 ranks hangs") as caught:
        run_processes(2, SCRIPT, "one_hangs", backend="none", timeout=3)
    (pid,) = map(int, re.findall(r"rank 1 is (\d+)", str(caught.value)))
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}/cmdline").exists()
    run_processes(1, SCRIPT, "nothing", backend="none")  # the server is there for the next one


def begins_anew(rank: int, world: int, value: str, folder: str) -> None:
    """Environment and folder are the test's, and what a run before imported is gone."""
    assert os.environ["LAUNCH_TEST"] == value
    assert Path.cwd() == Path(folder)
    assert "torch" in sys.modules
    ours = [name for name in sys.modules if name.startswith("goku")]
    assert ours == []
    import goku_runtime.mesh  # noqa: F401


def one_fails(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("on rank 1")
    if rank == 2:
        os.kill(os.getpid(), 9)


def one_hangs(rank: int, world: int) -> None:
    if rank == 1:
        print(f"rank 1 is {os.getpid()}", flush=True)
        time.sleep(300)


def nothing(rank: int, world: int) -> None:
    pass
