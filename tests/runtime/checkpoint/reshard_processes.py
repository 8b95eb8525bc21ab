"""What the ranks of test_reshard.py do; started by tests/launch.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from goku_runtime.checkpoint import async_save, load, read_values, save, verify
from goku_runtime.mesh import ParallelDims, shard_mesh

SHAPES = {"big": (53, 129), "few": (3, 4), "one": (1, 300), "odd": (7, 5, 3)}


def dims_of(world: int) -> list[ParallelDims]:
    """Every arrangement of so many processes."""
    return [
        ParallelDims(replicate, world // replicate // sp, sp)
        for replicate in range(1, world + 1)
        for sp in range(1, world + 1)
        if world % (replicate * sp) == 0
    ]


def whole(name: str) -> torch.Tensor:
    seed = sorted(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def state_of(dims: ParallelDims, *, filled: bool) -> dict[str, Any]:
    """A model on the mesh that FSDP2 would use, an EMA divided by columns, and what every rank holds."""
    mesh = dims.build_mesh("cpu")
    flat = shard_mesh(mesh)
    shards = [Replicate()] * (flat.ndim - 1) + [Shard(0)]
    model: dict[str, Any] = {}
    ema: dict[str, Any] = {}
    for name in SHAPES:
        value = whole(name) if filled else torch.full(SHAPES[name], 9.0)
        model[name] = nn.Parameter(distribute_tensor(value, flat, shards))
        # Also by the mesh's three axes, each of which divides what the one before left.
        axes = [Replicate(), Shard(1), Shard(0)]
        ema[name] = distribute_tensor(value * 2 if filled else value, mesh, axes)
    scale = torch.arange(20_000) if filled else torch.zeros(20_000, dtype=torch.int64)
    return {"model": model, "ema": ema, "scale": scale, "step": 5 if filled else 0}


def same(state: dict[str, Any], dims: ParallelDims) -> None:
    wanted = state_of(dims, filled=True)
    for part in ("model", "ema"):
        for name, tensor in state[part].items():
            assert isinstance(tensor, DTensor)
            assert torch.equal(tensor.to_local(), wanted[part][name].to_local()), (part, name)
    assert torch.equal(state["scale"], wanted["scale"])


def save_all(rank: int, world: int, root: str) -> None:
    for number, dims in enumerate(dims_of(world)):
        path = Path(root) / f"saved-{world}-{number}"
        state = state_of(dims, filled=True)
        if number % 2:
            async_save(state, path).result()
        else:
            save(state, path)
        dist.barrier()
        if rank == 0:
            verify(path)
            assert read_values(path)["step"] == 5


def load_all(rank: int, world: int, root: str) -> None:
    paths = sorted(Path(root).glob("saved-*"))
    assert len(paths) >= 3
    every = dims_of(world)
    for number, path in enumerate(paths):
        for broadcast in (False, True):
            for dims in every if number % 3 == 0 else every[number % len(every) :][:1]:
                state = state_of(dims, filled=False)
                load(state, path, broadcast=broadcast)
                assert state["step"] == 5
                same(state, dims)
        # Stock DCP, on all ranks together, from the same folder.
        dims = every[number % len(every)]
        state = state_of(dims, filled=False)
        del state["step"]
        dcp.load(state, checkpoint_id=path)
        same(state, dims)
