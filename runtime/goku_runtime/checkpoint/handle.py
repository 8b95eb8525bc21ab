"""What `async_save` returns: how far a save is, and its end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, TimeoutError
from pathlib import Path

__all__ = ["Progress", "SaveHandle"]


class Progress:
    """Bytes of this rank that were staged and written so far; read from other threads."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.staged = 0
        self._written: Callable[[], int] = lambda: 0

    @property
    def written(self) -> int:
        """Bytes that the file system has taken."""
        return self._written()

    def follow(self, written: Callable[[], int]) -> None:
        """From now on `written` is what this says."""
        self._written = written


class SaveHandle:
    """A save that goes on in the background. Made by `async_save`.

    The state may change as soon as `wait_staged` returns; with ``stage="now"`` that is so from the start.
    """

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.progress = progress
        self._staged = threading.Event()
        self._stopped = threading.Event()
        self._result: Future[None] = Future()
        self._cancel: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        if self.upload_done:
            error = self._result.exception()
            state = "done" if error is None else f"failed, {type(error).__name__}: {error}"
        else:
            state = f"{self.progress.written} of {self.progress.nbytes} bytes written"
        return f"<SaveHandle {self.path}: {state}>"

    @property
    def staging_done(self) -> bool:
        """Whether the state may change: it was copied, or never will be because the save failed."""
        return self._staged.is_set()

    @property
    def upload_done(self) -> bool:
        """Whether the save has ended, well or badly: `result` will not wait."""
        return self._result.done()

    @property
    def succeeded(self) -> bool:
        """Whether the checkpoint is in its place."""
        return self.upload_done and self._result.exception() is None

    def wait_staged(self, timeout: float | None = None) -> None:
        """Waits until the state may change. Call it before the optimizer's step.

        Errors of the staging are not raised here but by `result`: training can go on without them.

        Raises:
            TimeoutError: not done after `timeout` seconds.
        """
        if not self._staged.wait(timeout):
            raise TimeoutError(f"{self.path}: not staged after {timeout} s")

    def result(self, timeout: float | None = None) -> Path:
        """Waits for the end: the checkpoint, durable and in its place on every rank.

        Raises:
            TimeoutError: not done after `timeout` seconds; the save goes on.
            Whatever `save` raises; RuntimeError after `cancel`.
        """
        try:
            self._result.result(timeout)
        except TimeoutError:
            if self._result.done():  # the save's own
                raise
            raise TimeoutError(f"{self.path}: not saved after {timeout} s") from None
        return self.path

    def wait_ended(self) -> None:
        """Waits for the end, good or bad, and raises nothing."""
        self._result.exception()

    def cancel(self) -> None:
        """Gives the save up, if it has not ended: on one rank it ends on all, with nothing left of it.

        Waits only for requests that are under way; `result` waits for the end and raises RuntimeError.
        Once every rank's file is written it comes too late: what is being committed stays.
        """
        with self._lock:
            self._stopped.set()
            if self._cancel is not None:
                self._cancel()

    # ---- for the thread that saves

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._stopped.is_set()

    def on_cancel(self, stop: Callable[[], None] | None) -> None:
        """What `cancel` calls beside setting `cancelled`; called at once if that has happened."""
        with self._lock:
            self._cancel = stop
            if stop is not None and self.cancelled:
                stop()

    def staged(self) -> None:
        """The state may change."""
        self._staged.set()

    def follow(self, result: Future[None]) -> None:
        """The save is this task."""
        self._result = result

    def on_end(self, then: Callable[[], None]) -> None:
        """What is done at the very end, or at once if the save has ended."""
        self._result.add_done_callback(lambda _: then())
