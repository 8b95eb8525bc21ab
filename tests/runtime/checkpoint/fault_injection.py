"""System calls on chosen files that fail, in processes that fault_injection.cpp is preloaded into."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

SOURCE = Path(__file__).with_name("fault_injection.cpp")
EVER = 1 << 62
# What a read-only file system refuses.
CHANGES = "open write fallocate ftruncate mkdir rename unlink"


def build(directory: Path) -> Path:
    """The library, for LD_PRELOAD."""
    library = directory / "fault_injection.so"
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, *flags, str(SOURCE), "-o", str(library), "-ldl"], check=True)
    return library


class Faults:
    """What the rule has met, on all ranks together; complete once the block has been left."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        for function in (library.calls_seen, library.calls_changed):
            function.restype = ctypes.c_long

    @property
    def seen(self) -> int:
        """Calls of the kinds and on the files in question."""
        return int(self._library.calls_seen())

    @property
    def changed(self) -> int:
        """Those of them that failed, or were short."""
        return int(self._library.calls_changed())


@contextmanager
def injected(
    calls: str, path: str, *, error: int = 0, most: int = 0, skip: int = 0, count: int = EVER
) -> Generator[Faults]:
    """Within it, on all ranks: `count` calls after `skip` others fail, or are cut short.

    Args:
        calls: their kinds with spaces between: open (to write), read, write, fsync, fallocate,
            ftruncate, mkdir, rename (the new name counts), unlink (of a directory too).
        path: what the file's path has in it.
        error: the errno, or 0: reads and writes transfer at most `most` bytes.
    """
    library = ctypes.CDLL(os.environ["LD_PRELOAD"])
    _together(
        lambda: library.inject_faults(
            calls.encode(), os.fsencode(path), ctypes.c_long(skip), ctypes.c_long(count), error,
            ctypes.c_size_t(most),
        )
    )  # fmt: skip
    yield Faults(library)
    # Not where this rank has failed: another one may wait for it elsewhere.
    end()


def end() -> None:
    """No calls fail any more, on any rank."""
    _together(ctypes.CDLL(os.environ["LD_PRELOAD"]).end_faults)


def _together(change: Callable[[], object]) -> None:
    """Changes the one rule between two barriers, so that every rank's calls are before or after it."""
    ranks = dist.is_initialized()
    if ranks:
        dist.barrier()
    if not ranks or dist.get_rank() == 0:
        change()
    if ranks:
        dist.barrier()
