"""Media in Weights & Biases, through a process of its own: whatever W&B does, a training neither waits nor ends for it.

W&B's client asks for a key where there is a terminal, retries without an end while the network is gone (in `finish`,
and once more in a hook when the interpreter exits), and takes over the console. None of it can be bounded from inside a
process, so that every step's media are shown by a short one, `python -m goku.media_wandb`: without a terminal, with a
limit of time, and with its errors in its exit code and out/wandb.log. It imports neither torch nor anything else of
Goku.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["WandbMedia", "check_wandb", "run_id"]


def check_wandb(wait: float = 120.0) -> None:
    """ValueError, with W&B's own reason, where it has no key and is not offline; no network is used.

    wait: seconds that it may take to say so.
    """
    allowed = "allowed: WANDB_API_KEY, a key kept by `wandb login`, or WANDB_MODE=offline"
    try:
        done = subprocess.run(
            _command("check"), env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=wait, start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"media in wandb: no answer of W&B in {wait:g} s; {allowed}") from error
    if done.returncode:
        reason = _reason(done.returncode, done.stdout)
        raise ValueError(f"media in wandb: {reason}; {allowed}")


def run_id(out: Path) -> str:
    """The id of the W&B run of the folder `out`, made at the first call and kept in out/wandb_id."""
    name = out / "wandb_id"
    if not name.is_file():
        partial = out / f".partial-{name.name}"
        try:
            partial.write_text(secrets.token_hex(8), encoding="utf-8")
            partial.replace(name)
        finally:
            partial.unlink(missing_ok=True)
    return name.read_text(encoding="utf-8")


class WandbMedia:
    """Shows media of the run in the folder `out` in W&B's `project`, one step at a time, while training goes on.

    The W&B run is the folder's own, however often the training is resumed. limit: seconds that one step's media may
    take; the process that sends them ends itself then, even if this one is gone.
    """

    def __init__(self, out: Path, project: str, *, limit: float = 900.0) -> None:
        self.out, self.project, self.limit = out, project, limit
        self._process: subprocess.Popen[bytes] | None = None
        self._step = 0
        self._began = 0.0
        self._offset = 0  # of its words in the log

    def show(self, items: Sequence[tuple[str, Path, str]], step: int) -> list[str]:
        """Begins to send (tag, PNG or MP4, caption) at `step`; what failed of that, or of the step before, in words.

        While an earlier step's are being sent, these are left out, and that is said. Raises OSError where no process
        can be started or out/wandb_id and out/wandb.log not be written.
        """
        failed = self._collect()
        if self._process is not None:
            return [
                *failed,
                f"W&B: step {step} is left out, since step {self._step} is being sent for "
                f"{time.monotonic() - self._began:.0f} s",
            ]
        job = {
            "init": {"project": self.project, "name": self.out.name, "dir": str(self.out), "id": run_id(self.out)},
            "items": [[tag, str(path), caption] for tag, path, caption in items],
            "step": step,
            "limit": self.limit,
        }  # fmt: skip
        self._step, self._began = step, time.monotonic()
        with self._log.open("ab") as log, tempfile.TemporaryFile() as told:
            self._offset = log.seek(0, os.SEEK_END)
            told.write(json.dumps(job).encode())
            told.seek(0)
            self._process = subprocess.Popen(
                _command("show"), env=_environment(), stdin=told, stdout=log, stderr=log,
                start_new_session=True,  # a Ctrl-C is for the training
            )  # fmt: skip
        return failed

    def close(self, wait: float = 60.0) -> list[str]:
        """Waits so many seconds for what is being sent; what has failed, in words. It may go on to its limit."""
        if self._process is not None:
            try:
                self._process.wait(wait)
            except subprocess.TimeoutExpired:
                return [
                    f"W&B: step {self._step} is still being sent; it goes on without the training for "
                    f"{max(0.0, self.limit - (time.monotonic() - self._began)):.0f} s at most ({self._log})"
                ]
        return self._collect()

    @property
    def _log(self) -> Path:
        return self.out / "wandb.log"

    def _collect(self) -> list[str]:
        """How the last process ended, if it has."""
        if self._process is None or (code := self._process.poll()) is None:
            return []
        self._process = None
        if code == 0:
            return []
        if code == -signal.SIGALRM:
            reason = f"not sent within {self.limit:g} s"
        else:
            with self._log.open("rb") as log:
                log.seek(self._offset)
                reason = _reason(code, log.read())
        return [f"W&B: step {self._step}: {reason} ({self._log})"]


def _command(task: str) -> list[str]:
    return [sys.executable, "-m", "goku.media_wandb", task]


def _environment() -> dict[str, str]:
    """Ours, with the folders that this process imports from: it may have been told of them by no variable."""
    folders = [str(Path(entry).resolve()) for entry in sys.path]
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join(folders)}


def _reason(code: int, output: bytes) -> str:
    """The error that a process ended with: the last line that names one, else its last line."""
    lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line]
    named = [line for line in lines if "Error: " in line.split(" ", 1)[0] + " "]
    said = named or lines
    return said[-1] if said else f"the process ended with code {code}"


# ---- the other process


def _check() -> None:
    import wandb

    wandb.login(verify=False)  # raises where it would ask; does nothing offline


def _show(job: dict[str, Any]) -> None:
    import wandb

    run = wandb.init(**job["init"], resume="allow")
    values = {
        tag: wandb.Image(path, caption=caption)
        if path.endswith(".png")
        else wandb.Video(path, caption=caption, format="mp4")
        for tag, path, caption in job["items"]
    }
    run.log(values, step=job["step"])
    run.finish()


def _main(task: str) -> None:
    if task == "check":
        _check()
        return
    job = json.load(sys.stdin)
    # The default action ends the process at once, in the middle of what never returns.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, job["limit"])
    _show(job)


if __name__ == "__main__":
    _main(sys.argv[1])
