"""A progress bar with a rate, on a terminal; lines of text elsewhere, where they are asked for."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from goku_runtime.checkpoint.tools.units import size_text

__all__ = ["ProgressBar"]

_WIDTH = 28
# Seconds between two looks of a bar, and between two lines.
_REDRAW, _LINE = 0.1, 2.0


class ProgressBar:
    """Called with the bytes done and all bytes; a context manager.

    A terminal's line is rewritten, and cleared at the end. Nothing at all is written where `shown`
    is False, or None and the stream is no terminal.

    Args:
        label: what is being done, in a word.
        shown: None shows it on terminals.
        stream: None is standard error, as it is then.
    """

    def __init__(
        self, label: str, *, shown: bool | None = None, stream: TextIO | None = None
    ) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._shown = self._terminal if shown is None else shown
        self._label = label
        self._started = time.perf_counter()
        self._next = self._started
        self._last = ""
        self.done = self.total = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._shown:
            return
        if self._terminal:
            self._stream.write("\r\x1b[K" if self._last else "")
        elif self._last != self._text() and self.total:
            self._stream.write(f"{self._text()}\n")
        self._stream.flush()

    def __call__(self, done: int, total: int) -> None:
        self.done, self.total = done, total
        now = time.perf_counter()
        if not self._shown or now < self._next:
            return
        self._next = now + (_REDRAW if self._terminal else _LINE)
        self._last = self._text()
        self._stream.write(f"\r{self._last}\x1b[K" if self._terminal else f"{self._last}\n")
        self._stream.flush()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self._started

    @property
    def rate(self) -> float:
        """GiB/s so far."""
        return self.done / max(self.seconds, 1e-9) / (1 << 30)

    def _text(self) -> str:
        part = self.done / self.total if self.total else 0.0
        bar = "#" * int(part * _WIDTH)
        left = self.seconds / part - self.seconds if part else 0.0
        sizes = f"{size_text(self.done)} of {size_text(self.total)}"
        minutes, seconds = divmod(int(left), 60)
        return (
            f"{self._label} [{bar:.<{_WIDTH}}] {part:4.0%}  {sizes}  {self.rate:.2f} GiB/s  "
            f"{minutes}:{seconds:02d} left"
        )
