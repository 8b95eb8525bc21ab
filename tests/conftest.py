"""What all tests share: one thread a process, reproducible property tests, runs of several processes."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

# Before torch is imported: the workers of `make test` share two cores, and a sum's rounding does
# not depend on how many cores the machine has.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# No deadline: a loaded machine is no failure. Derandomised in continuous integration, so that a
# red run can be repeated; elsewhere every run explores further.
settings.register_profile("goku", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("goku"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "goku")

# -P: the folder of launch.py would stand in the way of the packages.
_PYTHON = (sys.executable, "-P", str(Path(__file__).with_name("launch.py")))


@pytest.fixture
def free_port() -> Callable[[], int]:
    """free_port() -> a TCP port of this machine that nobody listened to a moment ago, another at every call."""

    def port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return port


class LaunchServer:
    """`launch.py --serve`: begun when first asked, gone with pytest, and given up whenever a run of its did not end by
    itself. What is preloaded comes into a process where it begins: such runs have a server of their own."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(
        self, arguments: list[str], environment: dict[str, str], log: Path, timeout: float
    ) -> bool:
        """One run, whose words go to log; False where it took longer and was killed. A process of it that is left at
        its end is killed and fails the test."""
        preloaded = environment.get("LD_PRELOAD", "")
        request = {
            "arguments": arguments, "environment": environment, "path": [path for path in sys.path if path],
            "folder": os.getcwd(), "output": str(log),
        }  # fmt: skip
        process = self._processes.pop(preloaded, None)
        if process is None or process.poll() is not None:
            process = subprocess.Popen(
                [*_PYTHON, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
                bufsize=0, env=environment,  # no line may wait in a buffer that `select` cannot see
            )  # fmt: skip
        child = 0
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            child = _number(process, 60) or 0
            assert child, "the server of launch.py does not answer"
            ended = _number(process, timeout)
            assert ended in (child, None)
            if ended and _left(child):
                pytest.fail(f"{arguments[5:]} leaves processes behind")
        except BaseException:
            _kill(process, child)  # also where pytest's own timeout ends the test
            raise
        if ended is None:
            _kill(process, child)
            return False
        self._processes[preloaded] = process
        return True

    def close(self) -> None:
        for process in self._processes.values():
            process.communicate(timeout=60)


def _number(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """The next one that the server says; None where it takes longer, or has died."""
    assert process.stdout is not None
    answered, _, _ = select.select([process.stdout], [], [], timeout)
    line = process.stdout.readline() if answered else b""
    return int(line) if line.endswith(b"\n") else None


def _left(group: int) -> bool:
    """Whether a process of the group is still there after some seconds; those that wait to be reaped do not count."""
    end = time.monotonic() + 5
    while any(each == group for each in _groups()):
        if time.monotonic() > end:
            return True
        time.sleep(0.05)
    return False


def _groups() -> Iterator[int]:
    """The process group of every process that runs."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # gone meanwhile
            continue
        if state not in "ZX":
            yield int(group)


def _kill(process: subprocess.Popen[bytes], group: int) -> None:
    """The server and all processes of its run."""
    if group:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    process.kill()
    process.wait()


def _run_alone(
    command: Sequence[str], environment: dict[str, str], log: Path, timeout: float
) -> bool:
    """As `LaunchServer.run`, in a process begun for it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too
        process.wait()
        return False
    return True


@pytest.fixture(scope="session")
def launch_server() -> Iterator[LaunchServer]:
    server = LaunchServer()
    yield server
    server.close()


@pytest.fixture
def run_processes(tmp_path: Path, launch_server: LaunchServer) -> Callable[..., str]:
    """run_processes(world, script, *functions, ...) -> what the ranks printed.

    functions: names, or (name, {keyword: JSON value}). timeout: seconds for all of it; a run that
    takes longer fails the test and leaves no process behind. group_timeout: seconds of a collective.
    expect: exit codes by rank, all 0 unless given. prefix: a command that runs it, in a namespace say.
    """

    def run(
        world: int,
        script: Path,
        *functions: str | tuple[str, dict[str, object]],
        backend: str = "gloo",
        timeout: float = 120,
        group_timeout: float = 60,
        expect: Sequence[int] | None = None,
        prefix: Sequence[str] = (),
    ) -> str:
        calls = [f if isinstance(f, str) else f"{f[0]}:{json.dumps(f[1])}" for f in functions]
        number = len(list(tmp_path.glob("store-*.log")))
        store = tmp_path / f"store-{number}"
        store.touch()
        arguments = [str(world), str(store), str(script), backend, str(group_timeout), *calls]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        log = Path(f"{store}.log")
        if prefix:
            ended = _run_alone([*prefix, *_PYTHON, *arguments], environment, log, timeout)
        else:
            ended = launch_server.run(arguments, environment, log, timeout)
        output = log.read_text(encoding="utf-8", errors="replace")
        if not ended:
            pytest.fail(f"{calls} on {world} ranks hangs:\n{output}")
        codes = list(expect or [0] * world)
        assert f"exit codes: {codes}\n" in output, output
        if not any(codes):
            for call in calls:
                for rank in range(world):
                    done = output.count(f"{call}: rank {rank} is done\n")
                    assert done == calls.count(call), output
        return output

    return run
