"""The limit of a medium: plain loops of pwrite and pread, in the threads and blocks that do best.

Nothing is copied or summed and no tensor is looked at: aligned memory that lies ready goes to one
file a process and comes back. `with_work` does what no checkpoint with checksums can leave out as
well: each block is copied out of the tensors' memory and its CRC-32C computed, by the same threads.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from goku_runtime._io import Buffer, crc32c

MIB = 1 << 20
# (threads, bytes of a block); where the file system has O_DIRECT each of them with and without it.
SETTINGS = ((1, 4 * MIB), (2, 1 * MIB), (2, 16 * MIB), (8, 1 * MIB), (8, 4 * MIB))
_TRIAL_BYTES = 128 * MIB
_LARGEST = 1 << 30


@dataclass(frozen=True)
class Setting:
    """How a loop goes about it."""

    threads: int
    block: int
    direct: bool

    def __str__(self) -> str:
        how = "O_DIRECT" if self.direct else "buffered"
        return f"{self.threads} threads, {self.block / MIB:g} MiB, {how}"


class Loop:
    """Writes and reads files of `nbytes` from and to memory of its own.

    Of a file larger than a GiB the same GiB is written again and again.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes % mmap.PAGESIZE:
            raise ValueError(f"nbytes is {nbytes}: allowed are multiples of {mmap.PAGESIZE}")
        self.nbytes = nbytes
        self._room = min(nbytes, _LARGEST)
        self._buffer = Buffer(self._room)
        self._view = memoryview(self._buffer)
        self._bytes = torch.frombuffer(self._buffer, dtype=torch.uint8).random_(256)
        self._source: Tensor | None = None  # what stands for the tensors

    def shorter(self, nbytes: int) -> Loop:
        """A loop over the same memory."""
        loop = copy(self)
        loop.nbytes = min(nbytes, self.nbytes)
        return loop

    def write(self, path: Path, setting: Setting, *, fsync: bool, work: bool = False) -> None:
        """Writes a new file. `work`: each block is copied from elsewhere and summed first."""
        source = self._elsewhere() if work else self._bytes
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | (os.O_DIRECT if setting.direct else 0)
        descriptor = os.open(path, flags, 0o644)
        try:
            if setting.direct:
                os.posix_fallocate(descriptor, 0, self.nbytes)

            def move(at: int, stop: int) -> None:
                low, high = self._place(at, stop)
                if work:
                    self._bytes[low:high] = source[low:high]
                    crc32c(self._view[low:high])
                while at < stop:
                    done = os.pwrite(descriptor, self._view[low:high], at)
                    at, low = at + done, low + done

            self._each(setting, move)
            if fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, path: Path, setting: Setting, *, work: bool = False) -> None:
        """Reads the file. `work`: each block is summed and copied elsewhere then."""
        source = self._elsewhere() if work else self._bytes
        flags = os.O_RDONLY | (os.O_DIRECT if setting.direct else 0)
        descriptor = os.open(path, flags)
        try:

            def move(at: int, stop: int) -> None:
                low, high = self._place(at, stop)
                begin = low
                while at < stop:
                    done = os.preadv(descriptor, [self._view[begin:high]], at)
                    at, begin = at + done, begin + done
                if work:
                    crc32c(self._view[low:high])
                    source[low:high] = self._bytes[low:high]

            self._each(setting, move)
        finally:
            os.close(descriptor)

    def _elsewhere(self) -> Tensor:
        if self._source is None:
            self._source = self._bytes.clone()
        return self._source

    def _place(self, start: int, stop: int) -> tuple[int, int]:
        low = start % self._room
        return low, low + stop - start

    def _each(self, setting: Setting, move: Callable[[int, int], None]) -> None:
        blocks = iter(range(0, self.nbytes, setting.block))
        lock = threading.Lock()
        errors: list[BaseException] = []

        def run() -> None:
            # A copy here is one of many at a time: torch's own threads would only be in the way.
            torch.set_num_threads(1)
            try:
                for start in _shared(blocks, lock):
                    move(start, min(start + setting.block, self.nbytes))
            except OSError as error:
                errors.append(error)

        before = torch.get_num_threads()
        threads = [threading.Thread(target=run) for _ in range(setting.threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)
        if errors:
            raise errors[0]


def _shared(blocks: Iterator[int], lock: threading.Lock) -> Iterator[int]:
    while True:
        with lock:
            start = next(blocks, None)
        if start is None:
            return
        yield start


def best(
    folder: Path, loop: Loop, together: Callable[[float], float], drop: Callable[[Path], None]
) -> tuple[Setting, Setting]:
    """The settings that wrote and read fastest, of two trials of each, on 128 MiB or what there is.

    Args:
        folder: on the medium.
        loop: its memory is used.
        together: the slowest rank's seconds from each rank's own.
        drop: puts a file out of the page cache.
    """
    trial = loop.shorter(_TRIAL_BYTES)
    path = folder / f"trial-{os.getpid()}"
    writing: dict[Setting, float] = {}
    reading: dict[Setting, float] = {}
    direct = (True, False) if _direct_works(path) else (False,)
    for _ in range(2):
        for threads, block in SETTINGS:
            for each in direct:
                setting = Setting(threads, block, each)
                try:
                    seconds = together(timed(partial(trial.write, path, setting, fsync=True)))
                    writing[setting] = min(seconds, writing.get(setting, seconds))
                    drop(path)
                    seconds = together(timed(partial(trial.read, path, setting)))
                    reading[setting] = min(seconds, reading.get(setting, seconds))
                finally:
                    path.unlink(missing_ok=True)
    return min(writing, key=writing.__getitem__), min(reading, key=reading.__getitem__)


def _direct_works(path: Path) -> bool:
    """Whether O_DIRECT does something here: not on tmpfs, whatever the kernel says of the flag."""
    from bench.checkpoint_cases import file_system

    if file_system(path.parent) in ("tmpfs", "ramfs"):
        return False
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
    return True


def timed(step: Callable[[], object]) -> float:
    """Seconds that a step takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began
