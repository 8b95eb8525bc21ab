"""Several real processes over Gloo: any number saves, any number loads, and all fail together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from goku_runtime.checkpoint import load
from goku_runtime.checkpoint.ranks import Ranks

Run = Callable[..., str]


def test_two_ranks_save_and_one_and_three_load(run_ranks: Run, tmp_path: Path) -> None:
    """Plain tensors and DTensors, evenly split or not, some ranks without any rows."""
    # Sets in another order, as in processes that were not forked from one.
    run_ranks(2, tmp_path, "save_spread@spread", prefix=("env", "PYTHONHASHSEED=1"))
    run_ranks(3, tmp_path, "load_spread@spread", prefix=("env", "PYTHONHASHSEED=2"))
    directory = tmp_path / "spread"
    shapes = {"rows": (5, 3), "columns": (4, 7), "copies": (3,), "few": (1, 2), "nothing": (0, 2)}
    shapes["void"] = (0, 4)
    model = {name: torch.zeros(shape) for name, shape in shapes.items()}
    model["plain"] = torch.zeros(6, 4, dtype=torch.bfloat16)
    model["scalar"] = torch.zeros((), dtype=torch.float64)
    state = {"model": model, "step": 0, "config": None}
    load(state, directory / "c")
    assert state["step"] == 11
    assert state["config"] == {"dims": [1]}
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model["rows"], rows)
    assert model["scalar"] == 2.5


def test_what_fails_on_one_rank_is_raised_on_all(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(2, tmp_path, "one_rank_fails", "replicated_once")


def test_ranks_with_keys_of_their_own(run_ranks: Run, tmp_path: Path) -> None:
    output = run_ranks(4, tmp_path, "other_keys")
    assert "4 of 4 ranks lack keys that others have" in output, "the log says so"


def test_groups_that_are_parts_of_the_world(run_ranks: Run, tmp_path: Path) -> None:
    run_ranks(3, tmp_path, "parts_of_the_world")


@pytest.mark.parametrize(
    ("config", "device"),
    [
        ("cpu:gloo", "cpu"),
        ("cuda:nccl", "cuda"),
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("cuda:nccl,cpu:gloo", "cpu"),
    ],
)
def test_numbers_go_where_the_group_can_exchange_them(
    config: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of NCCL alone has nothing to exchange CPU tensors with."""
    ranks = Ranks(None)
    assert ranks.device == "cpu"  # alone
    ranks.count = 2
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert ranks.device == device
