"""Checkpoints as any number of ranks on any meshes would write them, made by one process.

Bytes are put together in memory from the plan alone, without the engine and the tools.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import Placement, Replicate, Shard

from goku_runtime.checkpoint import crc32c, dcp_metadata, index
from goku_runtime.checkpoint.manifest import FileSum, Manifest
from goku_runtime.checkpoint.plan import Described, Mesh, make_plan
from goku_runtime.checkpoint.tree import flatten, to_json


class Topology(NamedTuple):
    """A mesh over all ranks, and how tensors lie on it; those with too few axes lie on all ranks."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]


TOPOLOGIES = {
    "one": Topology((1,), (Shard(0),)),
    "rows": Topology((4,), (Shard(0),)),
    "columns": Topology((3,), (Shard(1),)),
    "grid": Topology((2, 3), (Shard(0), Shard(1))),
    "hybrid": Topology((2, 2), (Replicate(), Shard(0))),
}


def full(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def state() -> dict[str, Any]:
    """Every kind of shape, dtypes of all sizes, and tensors that go over windows' borders."""
    return {
        "model": {
            "big": full(1, 300, 129),
            "bytes": torch.arange(70001).to(torch.uint8),
            "wide": full(2, 6, 4, 9, dtype=torch.bfloat16),
            "few": full(3, 2, 3, dtype=torch.float16),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
            "empty": torch.empty(0, 3),
            "flags": torch.arange(13) % 3 == 0,
            "complex": torch.complex(full(4, 5, 2), full(5, 5, 2)),
        },
        "ema": {"big": full(6, 300, 129), "wide": full(7, 6, 4, 9, dtype=torch.bfloat16)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.25, "betas": (0.9, 0.95)}],
        },
        "step": 7,
        "loss": float("nan"),
    }


def save(state: dict[Any, Any], path: Path, topology: Topology | str = "one") -> Path:
    if isinstance(topology, str):
        topology = TOPOLOGIES[topology]
    world = 1
    for size in topology.shape:
        world *= size
    mesh = Mesh(topology.shape, tuple(range(world)), ("a", "b")[: len(topology.shape)])
    deepest = max((p.dim for p in topology.placements if isinstance(p, Shard)), default=-1)
    flat = flatten(state)
    described = {
        name: Described(tensor.dtype, tuple(tensor.shape), mesh, topology.placements)
        if tensor.ndim > deepest
        else Described(tensor.dtype, tuple(tensor.shape))
        for name, tensor in flat.tensors.items()
    }
    plan = make_plan(described, world=world)
    files = {
        "index.json": index.to_json(plan),
        "state.json": to_json(flat.tree).encode(),
        **dcp_metadata.files(plan, flat.tree),
    }
    for rank, size in enumerate(plan.sizes):
        image = plan.local(rank)
        data = bytearray(size)
        for record in image.records:
            part = flat.tensors[record.name]
            for axis, (start, length) in enumerate(zip(*record.box, strict=True)):
                part = part.narrow(axis, start, length)
            payload = part.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            whole = record.skeleton.before + payload + record.skeleton.after
            data[record.offset : record.offset + len(whole)] = whole
        if size:
            files[f"__{rank}_0.distcp"] = bytes(data)
            chunks = [data[at : at + index.CHUNK] for at in range(0, size, index.CHUNK)]
            files[f"__{rank}_0.crc"] = b"".join(
                crc32c(bytes(chunk)).to_bytes(4, "little") for chunk in chunks
            )
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    manifest = Manifest.of({name: FileSum(len(d), crc32c(d)) for name, d in files.items()})
    (path / "manifest.json").write_bytes(manifest.to_bytes())
    return path


def empty_like(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state with other contents, to load into."""
    result: dict[Any, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            result[key] = empty_like(value)
        elif isinstance(value, torch.Tensor):
            result[key] = torch.empty(value.shape, dtype=value.dtype).fill_(1)
        else:
            result[key] = None
    return result


def same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether two states are equal bit by bit, types and order of keys too."""
    if list(one) != list(other):
        return False
    for key, value in one.items():
        if isinstance(value, dict):
            equal = same(value, other[key])
        elif isinstance(value, torch.Tensor):
            theirs = other[key]
            equal = (value.dtype, value.shape) == (theirs.dtype, theirs.shape) and torch.equal(
                value.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)
            )
        else:
            equal = repr(value) == repr(other[key])
        if not equal:
            return False
    return True


def flip(path: Path, place: int) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def place_of(checkpoint: Path, name: str, number: int = -1) -> tuple[Path, int]:
    """A data file, and a byte in the middle of a tensor's n-th part there."""
    found = index.parse(
        (checkpoint / "index.json").read_bytes(),
        {path.name: path.stat().st_size for path in checkpoint.iterdir()},
    )
    tensor = found.tensors[name]
    part = tensor.parts[number]
    middle = part.offset + part.box.volume * tensor.dtype.itemsize // 2
    return checkpoint / found.files[part.file], middle
