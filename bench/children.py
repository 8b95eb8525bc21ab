"""Runs a command within a time and leaves nothing of it running, nor of what it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# In the environment of a child, and so of all that it starts: by this they are found again, also
# those in a session of their own and those whose parent is gone.
MARK = "GOKU_CHECK"
KILL_SECONDS = 10.0  # a process that a driver holds may not end at once


def run(
    command: Sequence[str], seconds: float, *, cwd: Path, env: Mapping[str, str], output: IO[bytes]
) -> int | None:
    """The exit code of `command`, or None where it took longer than `seconds` and was killed.

    However it ends, by an exception here too, its process group and every process that it started
    are killed (the latter where /proc is).

    Args:
        output: an open file for both of its streams.
    """
    mark = uuid.uuid4().hex
    marks = f"{os.environ.get(MARK, '')} {mark}".strip()
    child = subprocess.Popen(
        command, cwd=cwd, env={**env, MARK: marks}, stdin=subprocess.DEVNULL, stdout=output,
        stderr=subprocess.STDOUT, process_group=0,
    )  # fmt: skip
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(child, mark)


def _end(child: subprocess.Popen[bytes], mark: str) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # PermissionError: zombies alone
        os.killpg(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + KILL_SECONDS
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=KILL_SECONDS)
    while (left := marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    if left:
        print(f"processes {left} could not be killed", flush=True)


def marked(mark: str) -> list[int]:
    """Processes of this user whose environment holds `mark`; none where there is no /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found
