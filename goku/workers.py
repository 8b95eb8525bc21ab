"""`ordered_map`: a function over many items in worker processes, results in the items' order.

At most `ahead` items are in flight or finished and waiting, which bounds memory. Results do not
depend on the number of workers, since each is a function of its item alone.

The standard library's ProcessPoolExecutor is not used: up to Python 3.11 a worker's death can hang
it for ever where a task is being handed over at that moment (docs/log.md, 2026-11-23), and the death
costs every other task in flight.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import select
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import Finalize
from typing import Any, TypeVar

__all__ = ["Lost", "WorkersLost", "ordered_map"]

T = TypeVar("T")
R = TypeVar("R")

# For what is there once in a process: its environment, and multiprocessing's record of children, by
# which each start asks all how they ended. Reentrant, as the garbage collector may close a forgotten
# map anywhere.
_CHILDREN = threading.RLock()

# Seconds until a process that has closed its connection is killed; one that died takes none of them.
_ENDING_SECONDS = 5.0


@dataclass(frozen=True)
class Lost:
    """Stands for the result of an item whose worker process died; `reason` says so."""

    reason: str


class WorkersLost(RuntimeError):
    """No worker process comes up: nothing can be said of any item."""


def ordered_map(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    name: Callable[[T], str],
    workers: int,
    ahead: int | None = None,
    preload: Sequence[str] | None = None,
) -> Generator[R | Lost, None, None]:
    """Yield function(item) for every item, in order.

    workers: processes; 0 uses one thread of this process. ahead: the window, default 2 * workers.
    preload: modules that the server of all processes imports, each of which is then forked from it in
    milliseconds; default the function's own. What an earlier call of this process gave holds.

    A process that dies (a decoder's crash, the out-of-memory killer) costs only its own item: that is
    run again with nothing beside it, and gives `Lost` if it kills that process too. Any other
    exception in a worker is raised here, with a note naming the item. WorkersLost is raised when a
    process ends before it takes an item.

    function and items must be picklable, and a script's entry point guarded by
    ``if __name__ == "__main__"``: processes are started afresh (forkserver), never forked from a
    process that already has threads or a device. When this is closed, they are killed at whatever they
    do: use it in `contextlib.closing`, since an exception in a loop over it does not close it.
    """
    ahead = max(1, 2 * workers if ahead is None else ahead)
    processes = _Processes(preload=_modules(function) if preload is None else preload)
    call = functools.partial(processes.call, function) if workers else function
    threads = _Threads(max(1, min(workers, len(items))))
    waiting: deque[tuple[T, Future[R]]] = deque()
    position = 0
    try:
        while waiting or position < len(items):
            while position < len(items) and len(waiting) < ahead:
                waiting.append((items[position], threads.submit(call, items[position])))
                position += 1
            item, future = waiting.popleft()
            if isinstance(future.exception(), _Died):
                # Alone, since what all held together may be more than the machine has.
                wait([other for _, other in waiting])
                processes.end()
                future = threads.submit(call, item)
                if lost := _lost(future.exception()):
                    yield lost
                    continue
            yield _result(item, future, name)
    finally:
        # When the interpreter ends, other threads stand still with what they hold, and what
        # multiprocessing calls before that has killed all processes.
        if not sys.is_finalizing():
            processes.close()
            threads.close()


def _lost(error: BaseException | None) -> Lost | None:
    """What the death of the process that had an item to itself makes of the item."""
    if isinstance(error, _NotUp):
        raise WorkersLost(
            f"a worker process ended before its first item ({error}); is the script's entry point "
            'guarded by `if __name__ == "__main__"`, and can the module of the function be imported?'
        )
    if isinstance(error, _Died):
        return Lost(f"the worker process died on it ({error}): a decoder's crash, or out of memory")
    return None


def _result(item: T, future: Future[R], name: Callable[[T], str]) -> R:
    error = future.exception()
    if error is not None:
        error.add_note(f"while working on {name(item)}")
        raise error
    return future.result()


def _modules(function: Callable[..., Any]) -> list[str]:
    while isinstance(function, functools.partial):
        function = function.func
    module = function.__module__
    return [] if module in (None, "__main__") else [module]


class _Threads:
    """Threads that run calls in the order in which they were given.

    ThreadPoolExecutor's would be waited for at the interpreter's end, with all that they were given.
    """

    def __init__(self, count: int) -> None:
        # Reentrant: the garbage collector may close a forgotten map within `get` or `put`.
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any] | None]
        self._calls = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_run, args=(self._calls,), daemon=True) for _ in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[T], R], item: T) -> Future[R]:
        future: Future[R] = Future()
        self._calls.put((future, call, item))
        return future

    def close(self) -> None:
        """Forget what has not begun, and wait for what has."""
        with suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        for _ in self._threads:
            self._calls.put(None)
        if threading.current_thread() in self._threads:
            return  # it collects garbage, perhaps where it holds what the others wait for
        for thread in self._threads:
            thread.join()


def _run(calls: queue.SimpleQueue[tuple[Future[Any], Callable[[Any], Any], Any] | None]) -> None:
    while given := calls.get():
        future, call, item = given
        try:
            result = call(item)
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)
        else:
            future.set_result(result)
        del given, future, item  # the queue may be empty for long


# ---- the processes, seen from their parent ----


class _Died(Exception):
    """The process that a call was given to ended; says how."""


class _NotUp(_Died):
    """It did so before it took anything."""


class _InWorker(Exception):
    """The cause of an exception that came from a process: where it was raised there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(eq=False)
class _Worker:
    process: ForkServerProcess
    connection: Connection
    pidfd: int  # still this process when its server, which alone can say how it ended, is gone

    def kill(self) -> None:
        with suppress(OSError):  # it has ended, or another thread closes the descriptor behind it
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def end(self) -> str:
        """Wait for it to end, and say how it did."""
        self.connection.close()
        ended = select.poll()  # `select` takes no descriptors beyond 1023
        ended.register(self.pidfd, select.POLLIN)
        if not ended.poll(1000 * _ENDING_SECONDS):
            self.kill()
            ended.poll()
        os.close(self.pidfd)
        with _CHILDREN:
            self.process.join()
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"signal {-code}, {signal.strsignal(-code)}"
        return f"exit code {code}"


class _Processes:
    """Processes that each serve one thread at a time, as many as threads call at once."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        # Reentrant: the garbage collector may close a forgotten map where this one is held.
        self._lock = threading.RLock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False
        # multiprocessing waits at the interpreter's end for processes that nobody closed, after it
        # has called what has a priority.
        self._at_exit = Finalize(None, self._kill_all, exitpriority=10)

    def call(self, function: Callable[[T], R], item: T) -> R:
        """function(item) by one of the processes. Raises what it raises, or _Died."""
        message = ForkingPickler.dumps((function, item))
        worker = self._take()
        try:
            worker.connection.send_bytes(message)
            answer = worker.connection.recv_bytes()
        except BaseException as error:  # a message may have gone through in part
            how = self._remove(worker)
            if isinstance(error, EOFError | OSError):
                raise _Died(how) from error
            raise
        try:
            result, raised, trace = ForkingPickler.loads(answer)
        finally:
            self._give_back(worker)
        if raised is not None:
            raise raised from _InWorker(trace)
        return result

    def end(self) -> None:
        """End those that have nothing to do."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            self._remove(worker)

    def close(self) -> None:
        """Kill all of them; who still waits for one gets _Died."""
        self._at_exit.cancel()
        self._kill_all()
        self.end()

    def _kill_all(self) -> None:
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.kill()

    def _take(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise _Died("closed")
            if self._idle:
                return self._idle.pop()
            worker = self._start()
            self._all.add(worker)
            if not self._at_exit.still_active():  # closed meanwhile, by the garbage collector
                worker.kill()
        try:
            worker.connection.recv_bytes()  # it is up
        except (EOFError, OSError) as error:
            raise _NotUp(self._remove(worker)) from error
        return worker

    def _start(self) -> _Worker:
        """A process on its way up. Where their server has just been killed, from a new one."""
        for seconds in (0.05, 0.5):
            with suppress(EOFError, OSError):
                return self._started()
            time.sleep(seconds)
        try:
            return self._started()
        except (EOFError, OSError) as error:
            raise _NotUp(f"their server ended: {error!r}") from error

    def _started(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        try:
            with theirs, _CHILDREN:
                process = self._context.Process(target=_serve, args=(theirs, dict(os.environ)))
                with _search_path_of_this():
                    process.start()
            assert process.pid is not None
            return _Worker(process, ours, os.pidfd_open(process.pid))
        except BaseException:
            ours.close()
            raise

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(worker)
                return
        self._remove(worker)

    def _remove(self, worker: _Worker) -> str:
        with self._lock:
            self._all.discard(worker)
        return worker.end()


@contextmanager
def _search_path_of_this() -> Iterator[None]:
    """What starts within it imports from where this process does.

    Up to Python 3.12 a server of processes is told no path, and looks into the current folder first:
    a file there named as a module that it preloads would be every worker's.
    """
    ours = {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if os.pathsep not in p),
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# ---- in a process ----


def _serve(parent: Connection, environment: dict[str, str]) -> None:
    """Answers (function, item) with (result, exception, traceback) until nobody asks."""
    os.environ.clear()  # the server's is that of the time when it began
    os.environ.update(environment)
    # An interrupt, or a job's end, is the parent's to handle.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):  # the parent has gone, or needs no more
        parent.send_bytes(b"up")
        while True:
            parent.send_bytes(_answer(parent.recv_bytes()))


def _answer(message: bytes) -> memoryview:
    try:
        function, item = ForkingPickler.loads(message)
        return ForkingPickler.dumps((function(item), None, ""))
    except Exception as error:  # noqa: BLE001 - every one is raised where the item was asked for
        return _failure(error)


def _failure(error: Exception) -> memoryview:
    trace = "".join(traceback.format_exception(error))
    try:
        answer = ForkingPickler.dumps((None, error, trace))
        ForkingPickler.loads(answer)  # calls its constructor, which may want other arguments
        return answer
    except Exception as reason:  # noqa: BLE001 - what its class runs may raise anything
        return _told(error, reason, trace)


def _told(error: Exception, reason: Exception, trace: str) -> memoryview:
    """An exception that cannot be handed over, in words."""
    what, why = (traceback.format_exception_only(e)[-1].strip() for e in (error, reason))
    return ForkingPickler.dumps(
        (None, RuntimeError(f"{what} (cannot be handed over: {why})"), trace)
    )


def _end_with_parent() -> None:
    """A killed parent cannot close its processes; one that is at work would go on without it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
