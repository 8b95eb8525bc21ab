"""`ordered_map`: a function over many items in worker processes, results in the items' order.

At most `ahead` items are in flight or finished and waiting, which bounds memory. Results do not
depend on the number of workers, since each is a function of its item alone.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Lost:
    """Stands for the result of an item whose worker process died; `reason` says so."""

    reason: str


def ordered_map(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    name: Callable[[T], str],
    workers: int,
    ahead: int | None = None,
) -> Iterator[R | Lost]:
    """Yield function(item) for every item, in order.

    workers: processes; 0 uses one thread of this process. ahead: the window, default 2 * workers.
    A process that dies (a decoder's crash, the out-of-memory killer) costs only its own item: what
    was in flight is run again one at a time and the item that kills its process alone gives `Lost`.
    Any other exception in a worker is raised here, with a note naming the item.

    function and items must be picklable, and a script's entry point guarded by
    ``if __name__ == "__main__"``: processes are started afresh (forkserver), never forked from a
    process that already has threads or a device.
    """
    ahead = max(1, 2 * workers if ahead is None else ahead)
    processes = min(workers, len(items))
    pool = _start(processes)
    waiting: deque[tuple[T, Future[R]]] = deque()
    position = 0
    try:
        while waiting or position < len(items):
            try:
                while position < len(items) and len(waiting) < ahead:
                    item = items[position]
                    waiting.append((item, pool.submit(function, item)))
                    position += 1
                broken = isinstance(waiting[0][1].exception(), BrokenProcessPool)
            except BrokenProcessPool:
                broken = True
            if not broken:
                yield _result(*waiting.popleft(), name)
                continue
            pool.shutdown(wait=True, cancel_futures=True)
            for item, future in waiting:
                # Items finished before the crash keep their results.
                if future.done() and not future.cancelled() and not future.exception():
                    yield future.result()
                else:
                    yield _alone(function, item, name)
            waiting.clear()
            pool = _start(processes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _alone(function: Callable[[T], R], item: T, name: Callable[[T], str]) -> R | Lost:
    with _start(1) as pool:
        future = pool.submit(function, item)
        if isinstance(future.exception(), BrokenProcessPool):
            return Lost("the worker process died on it (a decoder's crash, or out of memory)")
        return _result(item, future, name)


def _result(item: T, future: Future[R], name: Callable[[T], str]) -> R:
    error = future.exception()
    if error is not None:
        error.add_note(f"while working on {name(item)}")
        raise error
    return future.result()


def _start(processes: int) -> Executor:
    if processes == 0:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("forkserver")
    # Imported once by the server; every worker is then forked from it in milliseconds.
    context.set_forkserver_preload(["goku.data.decode"])
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_begin)


def _begin() -> None:
    # An interrupt is the parent's to handle: it cancels what waits and lets the rest finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot shut its pool down; without this its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


__all__ = ["Lost", "ordered_map"]
