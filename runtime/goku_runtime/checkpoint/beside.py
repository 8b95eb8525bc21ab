"""Work in a thread beside what others wait for: small files while the data is written, deletions after it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

__all__ = ["CLEANING_S", "beside", "clean"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

# How long who cleans up waits for it: what is quick is done when it returns. Not longer, since the other
# ranks are in the training's next collective by then: NCCL's watchdog ends a job after 10 minutes there,
# and a parallel file system takes as long for the files of thousands of ranks.
CLEANING_S = 2.0


def beside(name: str, task: Callable[[], T]) -> Future[T]:
    """Runs a task in a thread of this name; here, where the interpreter starts no more of them."""
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        done = executor.submit(task)
    except RuntimeError:  # the interpreter is ending
        done = Future()
        done.set_result(task())
    executor.shutdown(wait=False)  # the thread ends with its one task
    return done


def clean(name: str, task: Callable[[], None], after: Sequence[Future[None]] = ()) -> Future[None]:
    """Runs a deletion that nobody depends on, behind `after`, and waits `CLEANING_S` for it at most.

    The interpreter waits for its end. What it raises is logged: there is nothing to be undone by it.
    """

    def behind() -> None:
        wait(after)
        task()

    def tell(done: Future[None]) -> None:
        error = done.exception()
        if error is not None:
            logger.error("%s failed: %s: %s", name, type(error).__name__, error)

    done = beside(name, behind)
    done.add_done_callback(tell)
    wait([done], timeout=CLEANING_S)
    return done
