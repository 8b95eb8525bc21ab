"""The indices that tests begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard

from goku_runtime.checkpoint.index import to_json
from goku_runtime.checkpoint.plan import Described, GlobalPlan, Mesh, data_file, make_plan
from goku_runtime.checkpoint.records import dtype_name

MESH = Mesh((2, 2), (0, 1, 2, 3), ("r", "s"))


def small_plan() -> GlobalPlan:
    return make_plan(
        {
            "model.w": Described(torch.bfloat16, (5, 3), MESH, (Replicate(), Shard(0))),
            "model.grid": Described(torch.float32, (4, 6), MESH, (Shard(0), Shard(1))),
            "scalar": Described(torch.float64, ()),
            "nothing": Described(torch.int64, (0, 2), MESH, (Replicate(), Shard(0))),
            'odd "name"\n\ud800é': Described(torch.bool, (3,), Mesh((3,), (3, 0, 1)), (Shard(0),)),
        },
        world=5,
    )


def sizes_of(plan: GlobalPlan) -> dict[str, int]:
    return {data_file(rank): size for rank, size in enumerate(plan.sizes) if size}


PLAN = small_plan()
SIZES = sizes_of(PLAN) | {"state.json": 10}


def listing(plan: GlobalPlan) -> bytes:
    """index.json of version 1 for a plan: every part of every tensor."""
    content = json.loads(to_json(plan))
    del content["layouts"]
    numbers = {name: number for number, name in enumerate(content["files"])}
    content["version"] = 1
    content["tensors"] = {
        name: {
            "dtype": dtype_name(entry.dtype),
            "shape": entry.shape,
            "parts": [
                [numbers[data_file(part.rank)], part.payload, part.box.start, part.box.size]
                for part in entry.parts()
            ],
        }
        for name, entry in plan.entries.items()
    }
    return json.dumps(content).encode()


def set_at(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    def to(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            node: Any = content
            for key in path[:-1]:
                node = node[key]
            node[path[-1]] = value

        return change

    return to


def delete(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        node: Any = content
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return change
