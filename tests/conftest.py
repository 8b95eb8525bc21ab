"""What all tests share: one thread a process, reproducible property tests, runs of several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
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

LAUNCH = Path(__file__).with_name("launch.py")


@pytest.fixture
def free_port() -> Callable[[], int]:
    """free_port() -> a TCP port of this machine that nobody listened to a moment ago, another at every call."""

    def port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return port


@pytest.fixture
def run_processes(tmp_path: Path) -> Callable[..., str]:
    """run_processes(world, script, *functions, ...) -> what the ranks printed.

    functions: names, or (name, {keyword: JSON value}). timeout: seconds for all of it; a run that
    takes longer fails the test and leaves no process behind. group_timeout: seconds of a collective.
    expect: exit codes by rank, all 0 unless given.
    """

    def run(
        world: int,
        script: Path,
        *functions: str | tuple[str, dict[str, object]],
        backend: str = "gloo",
        timeout: float = 120,
        group_timeout: float = 60,
        expect: Sequence[int] | None = None,
    ) -> str:
        calls = [f if isinstance(f, str) else f"{f[0]}:{json.dumps(f[1])}" for f in functions]
        number = len(list(tmp_path.glob("store-*")))
        store = tmp_path / f"store-{number}"
        store.touch()
        process = subprocess.Popen(
            # -P: the folder of launch.py would stand in the way of the packages.
            [sys.executable, "-P", str(LAUNCH), str(world), str(store), str(script), backend,
             str(group_timeout), *calls],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
            },
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the ranks too
            output, _ = process.communicate()
            pytest.fail(f"{calls} on {world} ranks hangs:\n{output}")
        codes = list(expect or [0] * world)
        assert f"exit codes: {codes}\n" in output, output
        if not any(codes):
            for call in calls:
                done = output.count(f"{call.partition(':')[0]}: rank ")
                assert done >= world, output
        return output

    return run
