"""How long work ends before its end: by a signal, or, in training, because it cannot go on."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["StopRequest", "TrainingStopped", "failures_stop", "in_words", "stop_signals"]


class TrainingStopped(RuntimeError):
    """Training cannot go on (non-finite steps in a row, too many lost items, a full disk); the last checkpoint is
    intact."""


SAME_STOP = 5.0
"""Seconds in which further signals say the same: Slurm and a terminal signal every process of a job, and torchrun
passes on to its workers what it gets. Each worker hears of one stop twice, and must not leave in its step."""


_STOPPING = (
    "goku train: stopping: what is under way is finished and a checkpoint written; another signal, five seconds later "
    "or more, leaves without"
)


class StopRequest(threading.Event):
    """Set by SIGTERM or SIGINT. graceful: the loop looks at it between steps; otherwise a signal ends the process.
    number: of the signal that set it, or 0."""

    graceful = False
    number = 0


@contextmanager
def stop_signals(acknowledged: str = _STOPPING) -> Iterator[StopRequest]:
    """What SIGTERM and SIGINT do inside: while training, finish the step, write a checkpoint and return.

    acknowledged: the line on standard error that a signal is answered with while the loop looks at the request.

    Before the loop (a VAE in training, latents being encoded), or at a second signal, the process leaves at once by
    SystemExit(128 + signal), which cleans up half-written files on its way. Signals within `SAME_STOP` seconds of one
    that counted are that one again.
    """
    request = StopRequest()
    counted = -math.inf

    def handle(number: int, _frame: object) -> None:
        nonlocal counted
        now = time.monotonic()
        if now - counted < SAME_STOP:
            return
        counted = now
        if request.is_set() or not request.graceful:
            raise SystemExit(128 + number)
        request.number = number
        request.set()
        if os.environ.get("RANK", "0") == "0":
            # Not `print`, which the signal may have interrupted; and who reads it may be gone (`| tee`, a terminal).
            with suppress(OSError):
                os.write(2, f"\n{acknowledged}\n".encode())

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def failures_stop() -> Iterator[None]:
    """Within it what the machine refuses (a full disk, a handle that is stale) is a TrainingStopped: begun again the
    run goes on, where bad input would be refused again. Other processes raise ValueError, naming the one that
    failed."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise TrainingStopped(in_words(error)) from error


def in_words(error: Exception) -> str:
    """What Python says of a file, without its number of the error."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)
