"""The demo's first page from end to end: collect media, train, kill the training, resume it, sample, judge, report.

It uses the same commands as anyone would: training runs as `goku train` in a process of its own, which is killed with
SIGKILL in the middle and started again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from goku import config as parser
from goku.demo.folder import clear, refuse_folders
from goku.demo.media import DemoError, collect
from goku.demo.verdict import DemoRun, conclude
from goku.demo.watching import (
    DemoFailed,
    command,
    kill_step,
    kill_when,
    last_step,
    narrator,
    timed,
)
from goku.metrics import read_log
from goku.run_config import RunConfig, load_run_config

__all__ = ["run_demo"]

_FOLDERS = ("out", "data.path", "unseen", "vae.path")
_FILES = ("report.html", "report.jsonl", "picture.png", "demo.yaml")


def run_demo(
    out: Path,
    *,
    media: Path | None = None,
    overrides: Sequence[str] = (),
    also: tuple[tuple[str, str], ...] = (),
) -> int:
    """Run everything into `out`; exit code 0 when every criterion holds, 1 when one does not.

    also: (file, what it shows) of pages in `out` that the report is to name.

    Raises ValueError (exit code 2) when an override is wrong, the media cannot be had or `out` is a folder of something
    else; DemoFailed (exit code 1) when the training fails.
    """
    # Everything that can be wrong is found before anything of an earlier demo is removed.
    run = DemoRun(_config(out, overrides), out, also=also)
    clear(out, _FILES, ("run", "vae", "samples"))
    say = narrator()
    with timed(run.timings, "media"):
        collect(out / "media", offline=media, log=say)
    written = out / "demo.yaml"
    written.write_text(parser.dump(run.config), encoding="utf-8")
    say("training: first a small VAE, then the model; it will be killed half-way, on purpose")
    began = time.time()
    log = out / "run" / "train.jsonl"
    target = kill_step(run.config.train)
    with command("train", written) as process:
        kill_when(process, lambda: last_step(log) >= target, lambda: f"at step {last_step(log)}")
    run.killed_at = last_step(log)
    run.timings["VAE training"] = read_log(out / "run" / "vae.jsonl")[-1]["time"] - began
    run.timings["training until the kill"] = time.time() - began - run.timings["VAE training"]
    say(f"killed with SIGKILL at step {run.killed_at}; starting the same command again")
    with timed(run.timings, "training after the resume"), command("train", written) as process:
        code = process.wait()
    run.resumed_at = _check_resumed(run, code)
    say(f"resumed at step {run.resumed_at}, finished; sampling with unused seeds")
    return conclude(run, say)


def _config(out: Path, overrides: Sequence[str]) -> RunConfig:
    """The demo's config in `out`, checked for what the demo needs of it."""
    refuse_folders(overrides, _FOLDERS)
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


def _check_resumed(run: DemoRun, code: int) -> int:
    if code != 0:
        raise DemoFailed(f"the resumed training failed with exit code {code}: see above")
    events = read_log(run.out / "run" / "train.jsonl")
    resumes = [int(event["step"]) for event in events if event["event"] == "resume"]
    if not resumes:
        raise DemoFailed("the second training did not resume from the checkpoint of the first")
    return resumes[-1]
