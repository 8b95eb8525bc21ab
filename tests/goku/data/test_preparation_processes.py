"""Ranks prepare a dataset together, on real gloo processes: they end with the same items, whatever one cannot read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("preparation_processes.py")


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_end_with_the_same_items(
    tmp_path: Path, write_dataset: Callable[[Path], Path], run_processes: Any, world: int
) -> None:
    folder = str(write_dataset(tmp_path / "media"))

    def case(name: str) -> tuple[str, dict[str, object]]:
        return name, {"folder": folder, "cache": str(tmp_path / name)}

    cases = [case("unreadable_for_one"), case("whole_share_alone"), "guarded"]
    cases += [case("own_caches"), case("disk_full"), case("progress_of_all")]
    output = run_processes(world, SCRIPT, *cases)
    # Said by the rank itself, before it waited for the others.
    failed = output.index("rank 1 has failed and waits for the other ranks: [Errno 28] No space")
    assert failed < output.index("has worked on")
