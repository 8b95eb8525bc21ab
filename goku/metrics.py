"""What a run says while it works: JSON lines always, TensorBoard by option, one progress line for people."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["RunLog", "progress_bar", "read_log"]

# Without a terminal (CI, a batch job) a line this often, in seconds, is enough to see that the run lives.
_PLAIN_INTERVAL = 20.0
# Seconds whose steps a bar's time left is reckoned from. rich's own half a minute knows none where a step takes longer.
_RATE_SECONDS = 3600.0
_BLOCK = 1 << 16


class _Bar(Progress):
    """Without a terminal a line now and then, once it is clear that the work takes longer than that."""

    _next_plain: float | None = None

    def update(self, task_id: TaskID, **fields: Any) -> None:
        super().update(task_id, **fields)
        if self.console.is_terminal:
            return
        now = self.get_time()
        if self._next_plain is None:
            self._next_plain = now + _PLAIN_INTERVAL
        task = next(task for task in self.tasks if task.id == task_id)
        if now < self._next_plain or not task.visible or task.total is None:
            return
        self._next_plain = now + _PLAIN_INTERVAL
        counts = (task.description, int(task.completed), int(task.total))
        _print_line(self.console, *counts, task.time_remaining, task.fields.get("info", ""))


def progress_bar(console: Console) -> Progress:
    """The one look of every progress bar: description, bar, count, elapsed, left, and a free text field `info`.

    Where `console` is no terminal, every 20 s a line with the same.
    """
    return _Bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
        transient=True,
        refresh_per_second=4,
        speed_estimate_period=_RATE_SECONDS,
        disable=not console.is_terminal,
    )


def _print_line(
    console: Console, what: str, done: int, total: int, seconds_left: float | None, info: str
) -> None:
    left = f"  {timedelta(seconds=round(seconds_left))} left" if seconds_left else ""
    text = f"{what} {done}/{total}{left}  {info}".rstrip()
    console.print(text, highlight=False, markup=False, soft_wrap=True)


class RunLog:
    """The log of one run, written by the main rank alone (path None: everything is a no-op).

    Every event is one JSON object per line with "event", "step" and "time" (seconds since the epoch), flushed at
    once, so that what was logged survives a kill. `tensorboard` names a directory or is None; asking for it without
    the package raises ImportError with the way to get it. what: one word for what a step is a step of.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        total_steps: int,
        tensorboard: Path | None = None,
        what: str = "train",
    ) -> None:
        self._file: IO[str] | None = None
        self._writer: Any = None
        self._open_writer: Callable[[int], Any] | None = None
        self._bar: Progress | None = None
        self.console = Console(stderr=True)
        if path is None:
            return
        if tensorboard is not None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "train.tensorboard needs tensorboard: pip install 'goku[tensorboard]'"
                ) from error
            self._open_writer = lambda step: SummaryWriter(str(tensorboard), purge_step=step)
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._file = path.open("a", encoding="utf-8")
        self._total, self._what = total_steps, what
        self._last_plain = 0.0
        self._first: tuple[float, int] | None = None  # when which step was shown first

    def event(self, event: str, step: int, **fields: Any) -> None:
        """Append one event; numbers also go to TensorBoard when it is on."""
        if self._file is None:
            return
        self._file.write(
            json.dumps(
                _finite({"event": event, "step": step, "time": time.time(), **fields}),
                allow_nan=False,
            )
            + "\n"
        )
        self._file.flush()
        if self._open_writer is not None and self._writer is None:
            # The first event tells where the run begins: points of a killed run beyond it are hidden.
            self._writer = self._open_writer(step)
        if self._writer is not None:
            for name, value in fields.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(f"{event}/{name}", value, step)

    def progress(self, step: int, info: str) -> None:
        """Show that `step` steps are done, and the time left."""
        if self._file is None:
            return
        now = time.monotonic()
        self._first = self._first or (now, step)
        if self.console.is_terminal:
            if self._bar is None:
                self._bar = progress_bar(self.console)
                self._task = self._bar.add_task(
                    self._what, total=self._total, completed=step, info=info
                )
                self._bar.start()
            self._bar.update(self._task, completed=step, info=info)
        elif now - self._last_plain >= _PLAIN_INTERVAL or step == self._total:
            self._last_plain = now
            left = self._left(now, step)
            _print_line(self.console, self._what, step, self._total, left, info)

    def _left(self, now: float, step: int) -> float | None:
        """Seconds left, by the steps since the first that was shown; None before there is a second one."""
        began, first = self._first or (now, step)
        if not first < step < self._total:
            return None
        return (now - began) / (step - first) * (self._total - step)

    def message(self, text: str) -> None:
        """A line for people, above the progress bar."""
        if self._file is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Flush to disk and stop drawing."""
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _finite(value: Any) -> Any:
    """NaN and infinity as None: JSON has neither, and a reader must not choke on a diverged step."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_torn_line(path: Path) -> None:
    """A kill can leave half a line; what follows must not be glued to it."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = high = file.seek(0, os.SEEK_END)
        # Where the last whole line ends, looked for from behind: a log may have gigabytes.
        whole = 0
        while high > 0:
            low = max(0, high - _BLOCK)
            file.seek(low)
            newline = file.read(high - low).rfind(b"\n")
            if newline >= 0:
                whole = low + newline + 1
                break
            high = low
        if whole < end:
            file.truncate(whole)


def read_log(path: Path) -> list[dict[str, Any]]:
    """All events of a JSONL log, in order; a torn last line (the writer was killed) is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
    return events
