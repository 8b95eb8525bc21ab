"""Writes the state that every golden folder holds; run as a script on two ranks.

    golden_writer.py RANK STORE DIRECTORY

With a new version of the manifest, the index or torch: run it for both ranks and add the folder, named after
them. Folders that are there are never written again.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from goku_runtime.checkpoint import save

RANKS = 2


def tensors() -> dict[str, torch.Tensor]:
    """The model, whole."""
    return {
        "rows": torch.arange(15, dtype=torch.float32).reshape(5, 3) / 4,
        "columns": torch.arange(28).to(torch.bfloat16).reshape(4, 7),
        "copies": torch.arange(3, dtype=torch.float32) - 1,
        "plain": torch.arange(6).reshape(2, 3),
        "nothing": torch.empty(0, 2),
    }


def state(model: dict[str, torch.Tensor]) -> dict[str, Any]:
    groups = [{"lr": 0.25, "betas": (0.9, 0.5), "params": [0]}]
    return {
        "model": model,
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": groups},
        "run": {"step": 7, "loss": float("inf"), "name": "golden", "none": None},
    }


def main(rank: int, store: str, directory: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("dp_shard",))
    placements = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}
    model = {
        name: distribute_tensor(value, mesh, [placements[name]]) if name in placements else value
        for name, value in tensors().items()
    }
    save(state(model), directory)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
