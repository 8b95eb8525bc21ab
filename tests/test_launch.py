"""The launcher of multi-process tests: nothing of a run reaches the next, and one that hangs leaves nobody behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def test_a_test_that_is_interrupted_leaves_the_next_ones_alone(run_processes: Run) -> None:
    """As pytest's own timeout does it: by an exception out of a signal's handler."""

    def interrupt(*_: object) -> None:
        raise TimeoutError("the test's time is over")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 8)
        with pytest.raises(TimeoutError):
            run_processes(2, SCRIPT, "one_hangs", backend="none")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    run_processes(2, SCRIPT, "nothing", backend="none")


def test_a_server_that_died_is_begun_anew(run_processes: Run, launch_server: Any) -> None:
    run_processes(1, SCRIPT, "nothing", backend="none")
    (server,) = (p for key, p in launch_server._processes.items() if not key)
    server.kill()
    server.wait()
    run_processes(1, SCRIPT, "nothing", backend="none")


def test_processes_that_are_left_behind_fail_the_test(run_processes: Run) -> None:
    with pytest.raises(pytest.fail.Exception, match="leaves processes behind"):
        run_processes(1, SCRIPT, "leaves_one", backend="none")
    run_processes(1, SCRIPT, "nothing", backend="none")


def test_every_call_has_to_end_on_every_rank(run_processes: Run) -> None:
    calls = [("may_leave", {"early": early}) for early in (False, True)]
    with pytest.raises(AssertionError, match="may_leave"):
        run_processes(2, SCRIPT, *calls, backend="none")


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


def leaves_one(rank: int, world: int) -> None:
    subprocess.Popen(["sleep", "300"])


def may_leave(rank: int, world: int, early: bool) -> None:
    if early and rank == 1:
        os._exit(0)


def nothing(rank: int, world: int) -> None:
    pass
