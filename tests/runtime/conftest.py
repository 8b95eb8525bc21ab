"""Runs functions of a script in real processes: see launch.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

LAUNCH = Path(__file__).with_name("launch.py")


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
            [sys.executable, str(LAUNCH), str(world), str(store), str(script), backend,
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
