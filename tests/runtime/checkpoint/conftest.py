"""Runs the scenarios of `scenarios.py` in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SCENARIOS = Path(__file__).with_name("scenarios.py")


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., str]:
    """run_ranks(ranks, root, *scenarios, prefix=()) -> what the ranks printed.

    Every rank is a process of its own in a Gloo group, and all must end with exit code 0 within a
    minute and a half: a rank that hangs fails the test.
    """

    def run(ranks: int, root: Path, *scenarios: str, prefix: tuple[str, ...] = ()) -> str:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
        }
        store = tmp_path / f"store-{ranks}-{scenarios[0]}"
        process = subprocess.Popen(
            [*prefix, sys.executable, str(SCENARIOS), str(ranks), str(store), str(root),
             *scenarios],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # the ranks too
            output, _ = process.communicate()
            pytest.fail(f"{scenarios} hangs:\n{output}")
        assert process.returncode == 0, output
        for scenario in scenarios:
            assert output.count(f"{scenario}: rank ") == ranks, output
        return output

    return run
