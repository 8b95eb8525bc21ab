"""What saves ask of the file system, and when.

A log of every file made, byte range written, fsync and rename is enough to rebuild each state that a crash
could have left behind, which is how the commit protocol is tested (tests/runtime/checkpoint/test_crash.py). It
also tells where a slow save spends its time. Without a journal nothing is kept.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import NamedTuple

__all__ = ["Journal", "Operation", "logged"]


class Operation(NamedTuple):
    """One request to the file system, which succeeded.

    Attributes:
        begin_ns, end_ns: CLOCK_MONOTONIC, which all processes of a machine share.
        kind: mkdir, create, preallocate, write, truncate, fsync, close, fsync_directory, rename, exchange,
            unlink, rmdir or rmtree.
        path: absolute.
        offset, length: bytes, of write; preallocate and truncate have the file's size as length.
        other: the second name, of rename (the new one) and exchange.
    """

    begin_ns: int
    end_ns: int
    kind: str
    path: str
    offset: int = 0
    length: int = 0
    other: str = ""


class Journal:
    """Collects operations, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._operations: list[Operation] = []

    @property
    def operations(self) -> list[Operation]:
        """All so far, in the order in which they ended."""
        with self._lock:
            return sorted(self._operations, key=lambda each: each.end_ns)

    def add(self, operation: Operation) -> None:
        """Takes one operation up, just after its end."""
        with self._lock:
            self._operations.append(operation)

    def add_trace(self, trace: Iterable[tuple[int, int, str, str, int, int]]) -> None:
        """Takes up what an engine with ``trace=True`` logged; its files are still where they were written."""
        for event in trace:
            self.add(Operation(*event))


@contextmanager
def logged(
    journal: Journal | None,
    kind: str,
    path: str | os.PathLike[str],
    *,
    length: int = 0,
    other: str | os.PathLike[str] = "",
) -> Generator[None]:
    """Logs what is done inside as one operation, unless it raises; does nothing without a journal."""
    if journal is None:
        yield
        return
    begin = time.monotonic_ns()
    yield
    end = time.monotonic_ns()
    journal.add(Operation(begin, end, kind, os.fspath(path), 0, length, os.fspath(other)))
