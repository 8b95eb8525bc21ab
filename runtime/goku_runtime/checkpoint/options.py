"""How checkpoints are written and read: what `Checkpointer` takes beside the ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from goku_runtime.checkpoint.index import CHUNK
from goku_runtime.checkpoint.native import needs_io

if TYPE_CHECKING:
    from goku_runtime._io import Engine

__all__ = ["CheckpointOptions", "Retention"]


@dataclass(frozen=True)
class CheckpointOptions:
    """Of the files and of the memory between them and the tensors.

    Attributes:
        backend: "io_uring", "threads" (pread and pwrite) or "auto", the first that the kernel allows.
        direct: "on" writes past the page cache (O_DIRECT), "off" through it, "auto" past it where
            the file system allows that.
        queue_depth, block_bytes, threads: requests in flight, bytes of one, threads that copy and
            sum; 0 takes the engine's defaults. `goku ckpt probe` measures them for a directory. Files in
            memory (tmpfs) have threads of their own, unless queue_depth or threads is given.
        fsync: hand files and directories to the device before a checkpoint gets its name. Without it a
            power failure can leave a checkpoint that `verify` finds damaged.
        staging_bytes: the most host memory in which `async_save` keeps a copy of what this rank
            writes; None: as much as that is. With less, staging waits for the device.
        window_bytes: in which `save` copies what does not lie dense in host memory, and writes; four are
            in memory at a time.
        timeout_s: seconds that a rank waits for the slowest one's files, over a Gloo group of its own. None:
            over the group given, with that one's timeout, where it can exchange CPU tensors; the groups that
            are made (for the background, or beside one of NCCL alone) have two hours.

    Raises:
        ValueError: a value that is not allowed, with its name.
    """

    backend: Literal["auto", "io_uring", "threads"] = "auto"
    direct: Literal["auto", "on", "off"] = "auto"
    queue_depth: int = 0
    block_bytes: int = 0
    threads: int = 0
    fsync: bool = True
    staging_bytes: int | None = None
    window_bytes: int = 16 << 20
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("backend", ("auto", "io_uring", "threads")),
            ("direct", ("auto", "on", "off")),
        ):
            if getattr(self, name) not in allowed:
                text = ", ".join(allowed)
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {text}")
        for name in ("queue_depth", "block_bytes", "threads"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: integers >= 0")
        least = 4 * CHUNK
        for name in ("window_bytes", "staging_bytes"):
            value = getattr(self, name)
            if value is None and name == "staging_bytes":
                continue
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: integers >= {least}")
        if self.timeout_s is not None and not (
            type(self.timeout_s) in (int, float) and 0 < self.timeout_s < math.inf
        ):
            raise ValueError(f"timeout_s is {self.timeout_s!r}; allowed: None or seconds > 0")
        if self.window_bytes % CHUNK:
            raise ValueError(
                f"window_bytes is {self.window_bytes}; allowed: multiples of {CHUNK}, the bytes of a chunk"
            )

    @classmethod
    def given(cls, options: CheckpointOptions | None) -> CheckpointOptions:
        """What a caller gave, or the defaults. Raises ValueError: it is something else."""
        if options is not None and not isinstance(options, cls):
            raise ValueError(f"options is {options!r}; allowed: None or CheckpointOptions(...)")
        return options or cls()

    def engine(self, *, trace: bool = False) -> Engine:
        """The engine of these options.

        Raises:
            ImportError: the compiled module is missing; the message says which step builds it.
            OSError, ValueError: what was asked for is not to be had here.
        """
        with needs_io():
            from goku_runtime import _io

        return _io.Engine(
            backend=self.backend,
            direct=self.direct,
            queue_depth=self.queue_depth,
            block_bytes=self.block_bytes,
            threads=self.threads,
            trace=trace,
        )


@dataclass(frozen=True)
class Retention:
    """Which checkpoints of a series stay: those in one directory whose names differ only in the number
    that ends them, as step_1000 and step_2000. Others (best, final) are left alone.

    Attributes:
        keep_last: the newest so many, at least 1.
        keep_every: also those whose number (the digits that end the name, as in step_2000) is a
            multiple of this; 0: none.

    Raises:
        ValueError: a value that is not allowed, with its name.
    """

    keep_last: int
    keep_every: int = 0

    def __post_init__(self) -> None:
        for name, least in (("keep_last", 1), ("keep_every", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: integers >= {least}")
