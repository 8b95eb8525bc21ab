"""The demo from end to end: collect media, train, kill the training, resume it, sample, judge, report.

It uses the same commands as anyone would: training runs as `goku train` in a process of its own, which is killed with
SIGKILL in the middle and started again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from rich.console import Console

from goku import config as parser
from goku.demo.media import DemoError, collect
from goku.demo.verdict import DemoRun, conclude
from goku.metrics import read_log
from goku.run_config import RunConfig, load_run_config

__all__ = ["run_demo"]

_MARKER = ".goku-demo"


def run_demo(out: Path, *, media: Path | None = None, overrides: Sequence[str] = ()) -> int:
    """Run everything into `out`; exit code 0 when every criterion holds, 1 when one does not.

    Raises ValueError (exit code 2) when the media cannot be had or `out` is a folder of something else.
    """
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    _clear(out)
    run = DemoRun(_write_config(out, overrides), out)

    def say(text: str) -> None:
        elapsed = time.monotonic() - started
        console.print(f"[{elapsed:5.0f} s] {text}", markup=False, soft_wrap=True)

    with _timed(run, "media"):
        collect(out / "media", offline=media, log=say)
    say("training: first a small VAE, then the model; it will be killed half-way, on purpose")
    began = time.time()
    run.killed_at = _train_and_kill(run)
    vae_log = out / "run" / "vae.jsonl"
    if vae_log.exists():  # not when an override names a trained VAE
        run.timings["VAE training"] = read_log(vae_log)[-1]["time"] - began
    vae_seconds = run.timings.get("VAE training", 0.0)
    run.timings["training until the kill"] = time.time() - began - vae_seconds
    say(f"killed with SIGKILL at step {run.killed_at}; starting the same command again")
    with _timed(run, "training after the resume"):
        _train_to_the_end(run)
    say(f"resumed at step {run.resumed_at}, finished; sampling with unused seeds")
    return conclude(run, say)


class _timed:
    def __init__(self, run: DemoRun, name: str) -> None:
        self.run, self.name = run, name

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.run.timings[self.name] = time.monotonic() - self.start


def _clear(out: Path) -> None:
    """Start from nothing, but never delete a folder that the demo did not make; downloaded media are kept."""
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise DemoError(
            f"--out is {out}, which holds something else; allowed: an empty or new folder, or an earlier demo's"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
    for name in ("run", "vae", "samples"):
        shutil.rmtree(out / name, ignore_errors=True)


def _write_config(out: Path, overrides: Sequence[str]) -> RunConfig:
    folders = [
        f"out={out / 'run'}",
        f"data.path={out / 'media' / 'train'}",
        f"unseen={out / 'media' / 'unseen'}",
        f"vae.path={out / 'vae'}",
    ]
    with resources.as_file(resources.files("goku.demo") / "demo.yaml") as source:
        config = load_run_config(source, [*folders, *overrides])
    (out / "demo.yaml").write_text(parser.dump(config), encoding="utf-8")
    return config


def _command(run: DemoRun) -> list[str]:
    return [sys.executable, "-m", "goku.cli", "train", str(run.out / "demo.yaml")]


def _train_and_kill(run: DemoRun) -> int:
    """Start training and SIGKILL it some steps after the checkpoint in the middle; returns the last logged step."""
    train = run.config.train
    middle = train.checkpoint_every * max(1, train.steps // (2 * train.checkpoint_every))
    target = min(middle + max(1, train.checkpoint_every // 4), train.steps - 1)
    log = run.out / "run" / "train.jsonl"
    process = subprocess.Popen(_command(run), start_new_session=True)
    try:
        while (step := _last_step(log)) < target:
            if process.poll() is not None:
                raise DemoError(
                    f"training ended by itself at step {step} with exit code {process.returncode}: see above"
                )
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode != -signal.SIGKILL:
        raise DemoError(f"the killed training returned {process.returncode}, not {-signal.SIGKILL}")
    return _last_step(log)


def _train_to_the_end(run: DemoRun) -> None:
    process = subprocess.Popen(_command(run))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if code != 0:
        raise DemoError(
            f"the resumed training failed with exit code {code}; see its messages above"
        )
    resumes = [
        event for event in read_log(run.out / "run" / "train.jsonl") if event["event"] == "resume"
    ]
    if not resumes:
        raise DemoError("the second training did not resume from the checkpoint of the first")
    run.resumed_at = int(resumes[-1]["step"])


def _last_step(log: Path) -> int:
    if not log.exists():
        return 0
    return max((int(e["step"]) for e in read_log(log) if e["event"] == "step"), default=0)
