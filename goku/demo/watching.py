"""Commands of goku as processes of their own: started, watched, killed on purpose, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from goku.metrics import read_log
from goku.run_config import TrainConfig

__all__ = [
    "DemoFailed",
    "command",
    "ended_by_signals",
    "kill_step",
    "kill_when",
    "last_step",
    "narrator",
    "output_of",
    "timed",
]


class DemoFailed(RuntimeError):
    """A command of the demo did not do what it should; its own messages say why."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C leave the block by SystemExit(128 + signal), after one line on standard error."""
    received: list[signal.Signals] = []

    def leave(number: int, _frame: object) -> None:
        received.append(signal.Signals(number))
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    # What is ignored stays so: nohup's hangup, the interrupts of a job in the background.
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, leave) for number in heard}
    try:
        yield
    except SystemExit:
        if received:
            print(
                f"goku demo: ended by {received[0].name}, and what it had started with it; run it again to start over",
                file=sys.stderr,
                flush=True,
            )
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def narrator() -> Callable[[str], None]:
    """What prints a line for people with the seconds since now before it."""
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()

    def say(text: str) -> None:
        elapsed = time.monotonic() - started
        console.print(f"[{elapsed:5.0f} s] {text}", markup=False, soft_wrap=True)

    return say


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Puts the seconds that the block took into timings[name], if it ends well."""
    start = time.monotonic()
    yield
    timings[name] = time.monotonic() - start


@contextmanager
def command(*arguments: object, threads: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """`goku ARGUMENTS` as a process, killed where it still runs when the block is left, by whatever way.

    threads: for arithmetic, unless OMP_NUM_THREADS says otherwise; None for as many as there are processors.
    """
    line = [sys.executable, "-m", "goku.cli", *map(str, arguments)]
    process = subprocess.Popen(line, env=_environment(threads))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def output_of(*arguments: object, threads: int | None = None) -> str:
    """Runs `goku ARGUMENTS` to its end and returns what it printed, which is printed on standard error too.

    threads: as for `command`. Raises DemoFailed where its exit code is not 0.
    """
    done = subprocess.run(
        [sys.executable, "-m", "goku.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=_environment(threads),
    )
    print(done.stdout, end="", file=sys.stderr, flush=True)
    if done.returncode != 0:
        raise DemoFailed(
            f"goku {' '.join(map(str, arguments))} ended with exit code {done.returncode}: see above"
        )
    return done.stdout


def _environment(threads: int | None) -> dict[str, str]:
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return own | os.environ


def kill_when(
    process: subprocess.Popen[bytes],
    due: Callable[[], bool],
    where: Callable[[], str],
    *,
    every: float = 0.2,
) -> None:
    """SIGKILL the process as soon as `due`, looked at every so many seconds.

    Raises DemoFailed when it ends before; `where` then says how far it came ("at step 7").
    """
    while not due():
        if process.poll() is not None:
            raise DemoFailed(
                f"training ended by itself {where()} with exit code {process.returncode}: see above"
            )
        time.sleep(every)
    process.kill()
    if (code := process.wait()) != -signal.SIGKILL:
        raise DemoFailed(f"training returned {code} before it could be killed")


def kill_step(train: TrainConfig) -> int:
    """A step to kill at: some steps after the checkpoint in the middle, so that a resume has steps to repeat."""
    middle = train.checkpoint_every * max(1, train.steps // (2 * train.checkpoint_every))
    return min(middle + max(1, train.checkpoint_every // 4), train.steps - 1)


def last_step(log: Path) -> int:
    """The last step that the log of a run names; 0 without any, or without a log."""
    if not log.exists():
        return 0
    return max((int(e["step"]) for e in read_log(log) if e["event"] == "step"), default=0)
