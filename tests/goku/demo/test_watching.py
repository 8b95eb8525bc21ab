"""Commands that the demo starts: killed when they should be, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from goku.demo import watching
from goku.demo.watching import DemoFailed
from goku.run_config import TrainConfig


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in place of the interpreter: `command` then runs it instead of goku."""
    script = tmp_path / "stand-in"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexec sleep ${LASTS:-60}\n')
    script.chmod(0o755)
    monkeypatch.setattr(watching.sys, "executable", str(script))
    return script


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_everything_with_one_line(
    number: signal.Signals, stand_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    started = []

    def work() -> None:
        with watching.ended_by_signals(), watching.command("train") as process:
            started.append(process)
            os.kill(os.getpid(), number)
            time.sleep(30)

    with pytest.raises(SystemExit) as left:
        work()
    assert left.value.code == 128 + number
    assert started[0].poll() == -signal.SIGKILL
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"goku demo: ended by {number.name}")
    assert signal.getsignal(number) is before


def test_what_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watching.ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_exit_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), watching.ended_by_signals():
        raise SystemExit(3)
    assert capsys.readouterr().err == ""


def test_a_command_is_killed_when_it_is_due(stand_in: Path) -> None:
    looks = iter([False, False, True])
    with watching.command("train", "x.yaml") as process:
        watching.kill_when(process, lambda: next(looks), lambda: "", every=0.01)
        assert process.returncode == -signal.SIGKILL


def test_a_command_that_ends_too_early_is_a_failure(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASTS", "0")
    with (
        watching.command("train") as process,
        pytest.raises(DemoFailed, match="ended by itself at step 7 with exit code 0"),
    ):
        watching.kill_when(process, lambda: False, lambda: "at step 7", every=0.01)


def test_what_a_command_printed(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LASTS", "0")
    assert watching.output_of("sample", Path("a b"), "--steps", 4).splitlines() == [
        "-m", "goku.cli", "sample", "a b", "--steps", "4",
    ]  # fmt: skip
    seen = capfd.readouterr()
    assert "a b" in seen.err
    assert seen.out == ""
    stand_in.write_text("#!/bin/sh\nexit 2\n")
    with pytest.raises(DemoFailed, match="goku sample x ended with exit code 2"):
        watching.output_of("sample", "x")


def test_threads_are_as_many_as_asked_unless_the_environment_says(
    stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.write_text('#!/bin/sh\necho "${OMP_NUM_THREADS-unset}"\n')
    for said, asked, expected in ((None, 1, "1"), (None, None, "unset"), ("3", 1, "3")):
        if said is None:
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert watching.output_of("train", threads=asked).strip() == expected


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(500, 100, 225), (60, 20, 25), (60, 60, 59), (3, 1, 2)]
)
def test_the_kill_falls_after_a_checkpoint_and_before_the_end(
    steps: int, every: int, expected: int
) -> None:
    assert (
        watching.kill_step(TrainConfig(steps=steps, checkpoint_every=every, device="cpu"))
        == expected
    )


def test_the_last_step_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    assert watching.last_step(log) == 0
    events = [
        {"event": "start", "step": 0},
        {"event": "step", "step": 3},
        {"event": "eval", "step": 9},
    ]
    log.write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "st')
    assert watching.last_step(log) == 3
