"""Saving: who writes what, when training may go on, and how a checkpoint gets its name.

A save has four parts. *Preparing*: the state is taken apart and laid out, on every rank alone, and one
all-reduce of a digest shows that all did the same. *Staging*: tensors are copied into page-aligned
memory. *Writing*: the engine writes each rank's file. *Committing*: rank 0 collects sizes and sums,
writes the index and the manifest, and renames the directory into place. `save` stages into a few
windows of memory, or not at all where the engine can take the tensors from where they lie;
`async_save` leaves the last two, or three, to a thread.
"""

from __future__ import annotations

import errno
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from goku_runtime.checkpoint.beside import beside, clean
from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.committing import SmallFiles, commit, thin_out
from goku_runtime.checkpoint.directory import NewDirectory, check_name, given_path, write_durably
from goku_runtime.checkpoint.handle import Progress, SaveHandle
from goku_runtime.checkpoint.index import CHUNK
from goku_runtime.checkpoint.journal import Journal
from goku_runtime.checkpoint.layout import Layout, Layouts
from goku_runtime.checkpoint.manifest import CheckpointError, FileSum
from goku_runtime.checkpoint.options import CheckpointOptions, Retention
from goku_runtime.checkpoint.ranks import Ranks
from goku_runtime.checkpoint.staging import Memory, Window, write_windows

if TYPE_CHECKING:
    from goku_runtime._io import Engine, FileWriter

__all__ = ["Checkpointer"]

logger = logging.getLogger(__name__)

# What is written beside the tensors, generously.
_SMALL_FILES = 64 << 20
# Windows in flight while `save` copies: one being filled, the others being written.
_RING = 4


@dataclass
class _Job:
    """One save, from preparing to committing."""

    layout: Layout
    tree: Any
    sources: list[Tensor]
    target: Path
    directory: NewDirectory | None  # rank 0's
    unfinished: Path
    latest: bool
    retention: Retention | None
    progress: Progress
    beside: SmallFiles | None = None  # rank 0's, from when its data is written
    handle: SaveHandle | None = None
    device: int | None = None  # the training's GPU
    # What the training's stream had reached on each GPU when the save was asked for.
    events: dict[torch.device, torch.cuda.Event] = field(default_factory=dict)


class Checkpointer:
    """Saves the states of one training, again and again, by the ranks of one group.

    It keeps what the saves have in common: the layout, for as long as names, shapes, dtypes, meshes and
    placements stay; the memory that tensors are staged in; a group of its own for the thread of
    `async_save`, whose collectives must not meet those of the training. `close` gives them back; it is
    a context manager.

    Args:
        process_group: the ranks that save; None takes the default group where there is one. If it has no
            backend for CPU tensors (NCCL alone), or `options` have a timeout, a Gloo group of the same ranks
            is made.
        options: of files and memory.
        journal: that this rank's requests to the file system are logged in.

    Raises:
        ValueError: this process is not in the group, or something else than options was given.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        options: CheckpointOptions | None = None,
        *,
        journal: Journal | None = None,
    ) -> None:
        self._journal = journal
        self._options = CheckpointOptions.given(options)
        self._groups: list[dist.ProcessGroup] = []
        self._ranks = Ranks(process_group)
        if self._ranks.needs_own(self._options.timeout_s):
            self._ranks = self._gloo()
        self._background: Ranks | None = None
        self._layouts = Layouts(self._ranks)
        self._staged: tuple[Layout, Memory, Window] | None = None
        self._ring: list[Memory] = []
        self._engine: Engine | None = None
        self._handle: SaveHandle | None = None
        self._deleting: list[Future[None]] = []  # rank 0's, in threads
        self._anchored: Path | None = None  # of the save before: the directories above are durable

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- what users call

    def save(
        self,
        state: dict[Any, Any],
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        latest: bool = False,
        retention: Retention | None = None,
    ) -> Path:
        """Saves a state as a new checkpoint, whole or not at all; see `goku_runtime.checkpoint.save`."""
        self._wait()
        job = self._prepare(state, path, overwrite, latest, retention)
        self._write(job, self._ranks)
        return job.target

    def async_save(
        self,
        state: dict[Any, Any],
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        latest: bool = False,
        retention: Retention | None = None,
        stage: Literal["now", "background"] = "now",
    ) -> SaveHandle:
        """Saves a state in the background; see `goku_runtime.checkpoint.async_save`.

        Waits for the save before, if that has not ended. Had that one failed, the log says so.
        """
        if stage not in ("now", "background"):
            raise ValueError(f"stage is {stage!r}; allowed: 'now', 'background'")
        self._wait()
        self._have_background()
        job = self._prepare(state, path, overwrite, latest, retention)
        handle = job.handle = SaveHandle(job.target, job.progress)
        executor = ThreadPoolExecutor(1, thread_name_prefix=f"saving {job.target.name}")
        try:
            if job.layout.on_gpu:
                job.device = torch.cuda.current_device()
            for device in {source.device for source in job.sources if source.is_cuda}:
                job.events[device] = torch.cuda.current_stream(device).record_event()
            handle.follow(executor.submit(self._run, job, handle))
        except (
            BaseException
        ) as error:  # the system has no thread left, or the interpreter is ending
            # The threads of the other ranks are in their first exchange, and learn of it there.
            (self._background or self._ranks).fail(error)
            self._abandon(job)
            raise
        executor.shutdown(wait=False)  # the thread ends with its one task
        self._handle = handle
        if stage == "now":
            handle.wait_staged()
        return handle

    def warm(self, state: dict[Any, Any]) -> None:
        """Does before the first `async_save` what only that one needs time for; all ranks call it.

        The layout is made, and the memory that tensors are staged in is had from the system, which
        takes 1 to 5 s per GiB. Nothing is kept if a later state has another layout: give it what will
        be saved (an optimizer's state comes with its first step). Ranks whose states differ gather a
        new layout at each save, and keep nothing.

        Raises:
            As `async_save`, what shows before anything is written; OSError, on all ranks: one has not
            that much memory.
        """
        self._wait()
        self._have_background()
        layout, tree, _ = self._layouts.of(state)

        def have() -> None:
            if self._ranks.is_first:
                layout.files(tree)  # kept: the index of thousands of ranks takes a second
            limit = self._options.staging_bytes
            if not layout.image.nbytes:
                return
            if limit is None or layout.image.nbytes <= limit:
                self._whole(layout, touch=True)
            else:
                self._make_ring(*self._ring_for(layout, limit), pin=layout.on_gpu)
                for memory in self._ring:
                    memory.touch()

        self._ranks.together(have)

    def wait(self) -> None:
        """Waits for the save in the background, if there is one, and raises its error."""
        handle = self._handle
        self._wait()
        if handle is not None:
            handle.result()

    def close_after(self, handle: SaveHandle) -> None:
        """Closes this once a save of it has ended, without waiting for that; its error is the handle's."""
        self._handle = None
        handle.on_end(self.close)

    def close(self) -> None:
        """Waits for the save in the background and gives memory and groups back.

        All ranks call it. Raises the save's error, when everything has been given back.
        """
        try:
            self.wait()
        finally:
            for memory in self._ring:
                memory.close()
            if self._staged is not None:
                self._staged[1].close()
            self._ring, self._staged = [], None
            if self._engine is not None:
                self._engine.close()
                self._engine = None
            for group in self._groups:
                with suppress(
                    ValueError, AssertionError
                ):  # destroyed with all others by the caller
                    dist.destroy_process_group(group)
            self._groups = []

    # ---- preparing

    def _wait(self) -> None:
        """Waits for the end of the save before, good or bad."""
        if self._handle is not None:
            self._handle.wait_ended()
            self._handle = None

    def _have_background(self) -> None:
        """The group for the thread of `async_save`, whose exchanges must not meet the training's."""
        if self._ranks.count > 1 and self._background is None:
            self._background = self._gloo()

    def _gloo(self) -> Ranks:
        """The same ranks with a Gloo group of their own."""
        group = self._ranks.new_gloo_group(self._options.timeout_s)
        self._groups.append(group)
        ranks = Ranks(group)
        ranks.connect()
        return ranks

    def _prepare(
        self,
        state: dict[Any, Any],
        path: str | os.PathLike[str],
        overwrite: bool,
        latest: bool,
        retention: Retention | None,
    ) -> _Job:
        layout, tree, sources = self._layouts.of(state)
        made: list[NewDirectory] = []

        def make() -> tuple[str, str, int, int | None]:
            target, free = Path(os.path.abspath(given_path(path))), None
            _check_retention(retention)
            if self._ranks.is_first:
                made.append(self._make(target, overwrite))
                if made[0].leftovers:
                    free = _free_bytes(made[0].path)
            return str(made[0].path) if made else "", str(target), layout.image.nbytes, free

        try:
            found = self._ranks.collect(make)
            for rank, (_, other, _, _) in enumerate(found):
                if other != found[0][1]:
                    raise ValueError(f"path is {found[0][1]} on rank 0 and {other} on rank {rank}")
            self._sweep(made[0] if made else None, sum(each[2] for each in found), found[0][3])
        except BaseException:
            if made:  # an exchange that fails after it
                made[0].discard()
            raise
        directory, progress = made[0] if made else None, Progress(layout.image.nbytes)
        return _Job(
            layout, tree, sources, Path(found[0][1]), directory, Path(found[0][0]), latest,
            retention, progress,
        )  # fmt: skip

    def _sweep(self, directory: NewDirectory | None, nbytes: int, free: int | None) -> None:
        """Deletes what killed processes left there beside the writing; before it where both do not fit."""
        if free is None:
            return
        if directory is not None:
            sweep = beside(f"sweep for {directory.target.name}", directory.clear)
            self._deleting.append(sweep)
        if free < nbytes + nbytes // 16 + _SMALL_FILES:
            self._ranks.on_first(lambda: wait(self._deleting))

    def _make(self, target: Path, overwrite: bool) -> NewDirectory:
        check_name(target)
        directory = NewDirectory(
            target,
            overwrite=overwrite,
            fsync=self._options.fsync,
            anchored=target.parent == self._anchored,
            journal=self._journal,
            deferred=True,
        )
        self._anchored = target.parent
        return directory

    def _whole(self, layout: Layout, *, touch: bool = False) -> tuple[Memory, Window]:
        """Memory for the whole image; the last save's if the layout is the same."""
        if self._staged is None or self._staged[0] is not layout:
            if self._staged is not None:
                self._staged[1].close()
                self._staged = None  # before the next is made: both may not fit
            memory = Memory(layout.image.nbytes, pin=layout.on_gpu)
            if touch:
                memory.touch()
            window = Window(layout.image, 0, layout.image.nbytes, memory, views=layout.on_gpu)
            self._staged = layout, memory, window
        return self._staged[1:]

    # ---- staging

    def _copy(self, job: _Job, window: Window) -> None:
        """Copies tensors into a window and waits until they are there."""
        if not job.layout.on_gpu:
            window.copy(job.sources)
        else:
            # A stream of its own: the training's kernels go on, and only this copy is waited for.
            streams = {}
            for device in {source.device for source in job.sources if source.is_cuda}:
                streams[device] = torch.cuda.Stream(device)
                if device in job.events:
                    streams[device].wait_event(job.events[device])
                else:
                    streams[device].wait_stream(torch.cuda.current_stream(device))
            with ExitStack() as entered:
                for stream in streams.values():
                    entered.enter_context(torch.cuda.stream(stream))
                window.copy(job.sources, non_blocking=True)
            for stream in streams.values():
                stream.synchronize()
        job.progress.staged = max(job.progress.staged, window.stop)

    # ---- writing

    def _run(self, job: _Job, handle: SaveHandle) -> None:
        """The thread of `async_save`."""
        try:
            if job.device is not None:
                # A new thread begins on GPU 0: memory pinned by it would cost each rank a context there.
                torch.cuda.set_device(job.device)
            self._write(job, self._background or self._ranks)
        except BaseException as error:
            # Nobody may ask for the result. Before it is there: whoever does prints after this.
            level = logging.INFO if handle.cancelled else logging.ERROR
            logger.log(level, "%s was not saved: %s: %s", job.target, type(error).__name__, error)
            raise
        finally:
            job.sources = []  # a handle that is kept does not keep the tensors
            handle.staged()

    def _write(self, job: _Job, ranks: Ranks) -> None:
        """Writes this rank's file, then commits: all ranks succeed or all raise."""
        try:
            sums: dict[str, FileSum] = {}
            for each in ranks.collect(lambda: self._written(job)):
                sums |= each
            ranks.on_first(lambda: self._commit(job, sums))
        except BaseException:
            self._abandon(job)
            raise
        if job.directory is not None:
            self._clean_up(job, job.directory)

    def _clean_up(self, job: _Job, directory: NewDirectory) -> None:
        """Deletes what was replaced and what retention does not keep: rank 0 alone, when all have the result."""

        def task() -> None:
            directory.clear()
            if job.retention is not None:
                thin_out(job.target, job.retention, self._journal)

        name = f"cleaning up behind {job.target.name}"
        self._deleting = [clean(name, task, after=self._deleting)]

    def _abandon(self, job: _Job) -> None:
        if job.beside is not None:
            job.beside.wait()
        if job.directory is not None:
            job.directory.discard()

    def _written(self, job: _Job) -> dict[str, FileSum]:
        """`_write_files`, and the one error for a save that was given up, however far it was."""
        try:
            sums = self._write_files(job)
        except BaseException as error:
            # Training here need not wait until the other ranks have written.
            job.sources = []
            if job.handle is not None:
                job.handle.staged()
            if isinstance(error, OSError) and error.errno == errno.ECANCELED:
                raise _cancelled(job) from error
            raise
        if job.handle is not None and job.handle.cancelled:
            raise _cancelled(job)
        return sums

    def _write_files(self, job: _Job) -> dict[str, FileSum]:
        """This rank's data file and its sums."""
        if not job.unfinished.is_dir():
            raise CheckpointError(
                f"{job.unfinished.parent}: rank 0 made a directory there which this rank does not "
                "see; a checkpoint needs a file system that all ranks share"
            )
        image = job.layout.image
        if not image.nbytes:
            if job.handle is not None:
                job.handle.staged()
            self._begin_beside(job)
            return {}
        path = job.unfinished / job.layout.file
        memory = self._stage_whole(job)
        self._begin_beside(job)  # once training may go on: it takes the interpreter's lock at times
        engine = self._opened()
        try:
            writer = engine.create(str(path), image.nbytes, chunk=CHUNK, fsync=self._options.fsync)
            job.progress.follow(lambda: writer.written)
            try:
                if job.handle is not None:
                    job.handle.on_cancel(writer.cancel)
                extents = None if job.handle is not None else job.layout.extents.of(job.sources)
                if memory is not None:
                    writer.submit(memory.address, 0, image.nbytes)
                elif extents is not None:
                    writer.gather(extents, 0, image.nbytes)
                else:
                    self._submit_windows(job, writer)
                size, crc = writer.finish()
                sums = writer.chunk_crcs()
            except BaseException:
                writer.cancel()
                with suppress(OSError, RuntimeError):
                    writer.finish()  # the memory is free once nothing is in flight
                raise
            finally:
                done = writer.written
                job.progress.follow(lambda: done)  # not the writer, which holds the file
                if job.handle is not None:
                    job.handle.on_cancel(None)
        finally:
            if self._journal is not None:
                self._journal.add_trace(engine.trace())
                engine.close()
        beside = path.with_suffix(".crc")
        write_durably(beside, sums, fsync=self._options.fsync, journal=self._journal)
        return {path.name: FileSum(size, crc), beside.name: FileSum(len(sums), crc32c(sums))}

    def _begin_beside(self, job: _Job) -> None:
        """On rank 0: the files beside the data, written while that is."""
        if job.directory is not None:
            layout, tree = job.layout, job.tree
            job.beside = SmallFiles(job.directory, lambda: layout.files(tree))

    def _commit(self, job: _Job, sums: dict[str, FileSum]) -> None:
        """Rank 0, which has the directory, gives it its name."""
        assert job.directory is not None
        assert job.beside is not None
        if job.handle is not None and job.handle.cancelled:
            raise _cancelled(job)
        commit(job.directory, sums | job.beside.sums(), latest=job.latest)

    def _opened(self) -> Engine:
        """The engine, kept for its memory, which takes time to be had; with a journal one for each save."""
        if self._journal is not None:
            return self._options.engine(trace=True)
        if self._engine is None:
            self._engine = self._options.engine()
        return self._engine

    def _stage_whole(self, job: _Job) -> Memory | None:
        """Copies the whole image, in the background and where that much memory may be had; else None."""
        handle, limit = job.handle, self._options.staging_bytes
        if handle is None or (limit is not None and job.layout.image.nbytes > limit):
            return None
        memory, window = self._whole(job.layout)
        self._copy(job, window)
        job.sources = []  # writing may take long, and the tensors be wanted elsewhere
        handle.staged()
        return memory

    def _submit_windows(self, job: _Job, writer: FileWriter) -> None:
        """Copies the image in windows and hands them to the writer."""
        image, handle = job.layout.image, job.handle
        limit = None if handle is None else self._options.staging_bytes
        count, size = self._ring_for(job.layout, limit)
        self._make_ring(count, size, pin=job.layout.on_gpu)
        ring = self._ring[:count]
        write_windows(image, ring, size, writer, lambda window: self._copy(job, window))
        job.sources = []
        if handle is not None:
            handle.staged()

    def _ring_for(self, layout: Layout, limit: int | None) -> tuple[int, int]:
        """How many windows, and of how many bytes, are in memory at a time."""
        size, count = self._options.window_bytes, _RING
        if limit is not None:
            count = max(limit // size, 1)
            size = min(size, limit // CHUNK * CHUNK)
        size = min(size, -(-layout.image.nbytes // CHUNK) * CHUNK)
        return min(count, -(-layout.image.nbytes // max(size, 1))), size

    def _make_ring(self, count: int, size: int, *, pin: bool) -> None:
        fits = len(self._ring) >= count and all(memory.nbytes >= size for memory in self._ring)
        if not fits:
            for memory in self._ring:
                memory.close()
            self._ring = []
            self._ring = [Memory(size, pin=pin) for _ in range(count)]


def _cancelled(job: _Job) -> RuntimeError:
    return RuntimeError(f"{job.target}: cancelled")


def _check_retention(given: object) -> None:
    if given is not None and not isinstance(given, Retention):
        raise ValueError(f"retention is {given!r}; allowed: None or Retention(keep_last)")


def _free_bytes(path: Path) -> int:
    """That the file system of `path` has for this user."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
