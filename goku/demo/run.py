"""The demo from end to end: collect media, train, kill the training, resume it, sample, judge, report.

It uses the same commands as anyone would: training runs as `goku train` in a process of its own, which is killed with
SIGKILL in the middle and started again.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from rich.console import Console

from goku import config as parser
from goku.demo.media import DemoError, collect
from goku.demo.verdict import DemoRun, conclude
from goku.metrics import read_log
from goku.run_config import RunConfig, load_run_config

__all__ = ["DemoFailed", "run_demo"]

_MARKER = ".goku-demo"
_FOLDERS = ("out", "data.path", "unseen", "vae.path")


class DemoFailed(RuntimeError):
    """The demo's training did not do what it should; its own messages say why."""


def run_demo(out: Path, *, media: Path | None = None, overrides: Sequence[str] = ()) -> int:
    """Run everything into `out`; exit code 0 when every criterion holds, 1 when one does not.

    Raises ValueError (exit code 2) when an override is wrong, the media cannot be had or `out` is a folder of something
    else; DemoFailed (exit code 1) when the training fails.
    """
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    # Everything that can be wrong is found before anything of an earlier demo is removed.
    run = DemoRun(_config(out, overrides), out)
    _clear(out)

    def say(text: str) -> None:
        elapsed = time.monotonic() - started
        console.print(f"[{elapsed:5.0f} s] {text}", markup=False, soft_wrap=True)

    with _timed(run, "media"):
        collect(out / "media", offline=media, log=say)
    (out / "demo.yaml").write_text(parser.dump(run.config), encoding="utf-8")
    say("training: first a small VAE, then the model; it will be killed half-way, on purpose")
    began = time.time()
    with _training(run) as process:
        run.killed_at = _kill_half_way(run, process)
    run.timings["VAE training"] = read_log(out / "run" / "vae.jsonl")[-1]["time"] - began
    run.timings["training until the kill"] = time.time() - began - run.timings["VAE training"]
    say(f"killed with SIGKILL at step {run.killed_at}; starting the same command again")
    with _timed(run, "training after the resume"), _training(run) as process:
        code = process.wait()
    run.resumed_at = _check_resumed(run, code)
    say(f"resumed at step {run.resumed_at}, finished; sampling with unused seeds")
    return conclude(run, say)


class _timed:
    def __init__(self, run: DemoRun, name: str) -> None:
        self.run, self.name = run, name

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.run.timings[self.name] = time.monotonic() - self.start


def _config(out: Path, overrides: Sequence[str]) -> RunConfig:
    """The demo's config in `out`, checked for what the demo needs of it."""
    for override in overrides:
        if override.split("=", 1)[0].strip() in _FOLDERS:
            raise DemoError(
                f"{override!r}: the demo keeps its folders together; allowed: --out FOLDER"
            )
    places = (out / "run", out / "media" / "train", out / "media" / "unseen", out / "vae")
    # JSON strings are YAML strings, whatever characters the path holds.
    folders = [f"{key}={json.dumps(str(path))}" for key, path in zip(_FOLDERS, places, strict=True)]
    with resources.as_file(resources.files("goku.demo") / "demo.yaml") as source:
        config = load_run_config(source, [*folders, *overrides])
    train = config.train
    if not 0 < train.checkpoint_every <= train.steps - 2:
        raise DemoError(
            f"train.checkpoint_every is {train.checkpoint_every}; allowed: 1 to train.steps - 2 = "
            f"{train.steps - 2}, so that there is a checkpoint to resume from"
        )
    if train.log_every != 1 or not train.eval_every:
        raise DemoError(
            f"train.log_every is {train.log_every} and train.eval_every {train.eval_every}; "
            "allowed: 1, and at least 1: the demo watches and judges by them"
        )
    return config


def _clear(out: Path) -> None:
    """Start from nothing, but never delete a folder that the demo did not make; downloaded media are kept."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _MARKER).exists())):
        raise DemoError(
            f"--out is {out}, which holds something else; allowed: an empty or new folder, or an earlier demo's"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
    for name in ("report.html", "report.jsonl", "picture.png", "demo.yaml"):
        (out / name).unlink(missing_ok=True)
    for name in ("run", "vae", "samples"):
        if (out / name).exists():
            shutil.rmtree(out / name)


@contextmanager
def _training(run: DemoRun) -> Iterator[subprocess.Popen[bytes]]:
    """`goku train` as a process of its own, which does not outlive this one's leaving by whatever way."""

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, leave) for number in numbers}
    command = [sys.executable, "-m", "goku.cli", "train", str(run.out / "demo.yaml")]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _kill_half_way(run: DemoRun, process: subprocess.Popen[bytes]) -> int:
    """SIGKILL the training some steps after the checkpoint in the middle; returns the last logged step."""
    train = run.config.train
    middle = train.checkpoint_every * max(1, train.steps // (2 * train.checkpoint_every))
    target = min(middle + max(1, train.checkpoint_every // 4), train.steps - 1)
    log = run.out / "run" / "train.jsonl"
    while (step := _last_step(log)) < target:
        if process.poll() is not None:
            raise DemoFailed(
                f"training ended by itself at step {step} with exit code {process.returncode}: see above"
            )
        time.sleep(0.2)
    process.kill()
    if (code := process.wait()) != -signal.SIGKILL:
        raise DemoFailed(f"training returned {code} before it could be killed")
    return _last_step(log)


def _check_resumed(run: DemoRun, code: int) -> int:
    if code != 0:
        raise DemoFailed(f"the resumed training failed with exit code {code}: see above")
    events = read_log(run.out / "run" / "train.jsonl")
    resumes = [int(event["step"]) for event in events if event["event"] == "resume"]
    if not resumes:
        raise DemoFailed("the second training did not resume from the checkpoint of the first")
    return resumes[-1]


def _last_step(log: Path) -> int:
    if not log.exists():
        return 0
    return max((int(e["step"]) for e in read_log(log) if e["event"] == "step"), default=0)
