"""What was running when a process ended, and the way on from there.

A kernel that reads where it must not takes the device's context along: everything that the process
asks for afterwards fails. One that crashes or never ends takes the process itself. So what is about
to run is noted beside the results, and what a process left in its note is passed over by the next.
Where the context alone is lost, or who noted it waits no longer, the process runs itself again, to go
on behind that.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import timing

ENDED = "ended_process"  # of a row's extra: whose it is took the process or the context along
PULSE_SECONDS = 1.0
START_SECONDS = (
    8.0  # of a process: importing torch, the device's context; its limit begins after that
)
# Who runs for less when a process is stopped that has outlived its limit was only slow: a whole setting of
# bench/step takes up to 72 s by its estimate, and is noted once.
PATIENCE_SECONDS = 90.0
_RESTARTED = "GOKU_BENCH_RESTARTED"
_PROCESS_BEGAN = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class ContextLost(Exception):
    """The device does nothing more for this process; says whose call it was and what it raised."""


def lost(device: torch.device) -> bool:
    """Whether an error has outlived its call: asked to wait, the device raises it again."""
    try:
        timing.synchronise(device)
    except RuntimeError:
        return True
    return False


@dataclass
class Begun:
    """A file that holds records of what runs, until it is cleared.

    A thread touches it every PULSE_SECONDS: its time of change is the process's last sign of life.

    Attributes:
        file: removed when nothing runs.
        until: time.time() after which the process begins nothing new.
        patience: seconds; who runs for less was only slow.
        overdue: called, in that thread, once what was noted last has run for so long.
    """

    file: Path
    until: float = float("inf")
    patience: float = PATIENCE_SECONDS
    overdue: Callable[[], None] | None = None
    _began: float = 0.0
    _descriptor: int = -1
    _stop: threading.Event = field(default_factory=threading.Event)
    _pulse: threading.Thread | None = None

    def begin(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Note what is about to run, in the place of what was noted."""
        self.begin_encoded(json.dumps(records))

    def begin_encoded(self, records: str) -> None:
        """As `begin`, of what is JSON already: a few microseconds."""
        self._began = time.monotonic()
        if self._descriptor < 0:
            self._open()
        until = None if self.until == float("inf") else self.until
        words = f'{{"began": {time.time()}, "until": {json.dumps(until)}, "records": {records}}}\n'
        # In place: a file that is made anew for each of thousands of calls would cost as much as they.
        content = words.encode()
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))

    def _open(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        self._stop = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True, name="begun")
        self._pulse.start()

    def _beat(self) -> None:
        told = -1.0
        while not self._stop.wait(PULSE_SECONDS):
            os.utime(self._descriptor)
            began = self._began
            if self.overdue and told != began and time.monotonic() - began > self.patience:
                told = began
                self.overdue()

    def clear(self) -> None:
        """Nothing runs any more; the file goes."""
        if self._pulse is not None:
            self._stop.set()
            self._pulse.join()
            os.close(self._descriptor)
            self._descriptor, self._pulse = -1, None
        self.file.unlink(missing_ok=True)

    def left(self) -> tuple[list[dict[str, Any]], bool]:
        """What a process that ended has left, and whether it was only out of time; the file goes.

        Out of time: it had outlived its limit, and what ran had run for less than `patience`.
        """
        if not self.file.is_file():
            return [], False
        line = self.file.read_text(encoding="utf-8").split("\n", 1)[0]
        alive = self.file.stat().st_mtime
        self.file.unlink()
        try:
            found = json.loads(line)
        except json.JSONDecodeError:  # it ended before the first note was whole
            return [], False
        late = found["until"] is not None and alive > found["until"]
        return found["records"], late and alive - found["began"] < self.patience


# ---- the same command once more ----


@dataclass(frozen=True)
class Start:
    """How a command began.

    resume: as it was asked for. since: rows from then on are this command's own, in whatever state;
    None in its first process.
    """

    resume: bool
    since: str | None = None

    @classmethod
    def of(cls, resume: bool) -> Start:
        """This process's; `resume` as its arguments say, which a restart has added to."""
        given = os.environ.get(_RESTARTED)
        return cls(resume) if given is None else cls(**json.loads(given))


def restart(left: float, start: Start) -> None:
    """Replace this process by the same command with --resume and the `left` seconds as its limit.

    It comes back only where this process is no `python -m bench`.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if getattr(spec, "name", "") != "bench.__main__":
        return
    since = start.since or _PROCESS_BEGAN
    os.environ[_RESTARTED] = json.dumps({"resume": start.resume, "since": since})
    limit = [] if left == float("inf") else ["--limit", f"{max(0.0, left - START_SECONDS):.1f}"]
    sys.stdout.flush()
    sys.stderr.flush()
    # Open files of the driver would keep the device's memory.
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            _close_on_exec(int(name))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--resume", *limit])


def _close_on_exec(descriptor: int) -> None:
    try:
        os.set_inheritable(descriptor, False)
    except OSError:
        return  # the folder's own, which is closed by now
