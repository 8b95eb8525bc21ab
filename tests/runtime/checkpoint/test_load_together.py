"""Ranks that load together: each gets what it asked for, or all learn that they were given other things."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from goku_runtime.checkpoint import latest, load, save

Run = Callable[..., str]
SCRIPT = Path(__file__).with_name("load_processes.py")


def test_two_ranks(run_processes: Run, tmp_path: Path) -> None:
    cases = (
        "other_orders_and_keys", "one_reads_what_all_want", "meshes_that_differ",
        "values_that_are_lazy", "other_checkpoints", "the_latest_of_all", "a_group_of_its_own",
    )  # fmt: skip
    run_processes(2, SCRIPT, *((case, {"root": str(tmp_path)}) for case in cases), group_timeout=20)


def test_a_group_that_is_a_part_of_a_mesh(run_processes: Run, tmp_path: Path) -> None:
    case = ("parts_of_the_world", {"root": str(tmp_path)})
    run_processes(3, SCRIPT, case, group_timeout=20)


def test_meshes_and_parts_of_four_ranks(run_processes: Run, tmp_path: Path) -> None:
    cases = ("meshes_in_any_order", "parts_of_another_shape")
    run_processes(4, SCRIPT, *((case, {"root": str(tmp_path)}) for case in cases), group_timeout=20)


def test_removals_that_take_longer_than_the_timeout(run_processes: Run, tmp_path: Path) -> None:
    case = ("removals_take_longer", {"root": str(tmp_path)})
    run_processes(2, SCRIPT, case, group_timeout=3)


def test_alone(tmp_path: Path) -> None:
    save({"w": torch.ones(3)}, tmp_path / "c")
    state = {"w": torch.zeros(3)}
    load(state, tmp_path / "c", broadcast=True)
    assert bool((state["w"] == 1).all())
    assert latest(tmp_path, together=True) == tmp_path / "c"


def test_a_group_without_together_is_refused(tmp_path: Path) -> None:
    group = dist.ProcessGroup(0, 1)
    with pytest.raises(ValueError, match="process_group: given without together=True"):
        latest(tmp_path, process_group=group)
