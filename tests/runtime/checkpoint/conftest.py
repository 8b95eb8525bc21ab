"""Runs the scenarios of `scenarios.py` in real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SCENARIOS = Path(__file__).with_name("scenarios.py")


@pytest.fixture
def run_ranks(run_processes: Callable[..., str]) -> Callable[..., str]:
    """run_ranks(ranks, root, *scenarios, prefix=()) -> what the ranks printed, several in a Gloo group."""

    def run(ranks: int, root: Path, *scenarios: str, prefix: tuple[str, ...] = ()) -> str:
        calls = [("scenario", {"root": str(root), "name": name}) for name in scenarios]
        backend = "gloo" if ranks > 1 else "none"
        return run_processes(ranks, SCENARIOS, *calls, backend=backend, prefix=prefix, timeout=90)

    return run
