"""Time of a plan for many ranks, on one process: a fake process group, whose collectives do nothing.

    python -m bench.checkpoint_planning OPTIONS.json

What is timed is all that a rank does before it copies: take the state apart, lay all ranks' files
out, digest the plan, lay its own file out. The all-reduce of the digest and the gathering of errors
are left out: they are the network's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from bench.checkpoint_peers import OURS
from bench.checkpoint_raw import timed
from bench.checkpoint_runs import Results
from goku_runtime.checkpoint.layout import Layouts
from goku_runtime.checkpoint.ranks import Ranks

T = TypeVar("T")

# (the mesh, how a tensor lies on it); the state is 8B's in both.
MESHES: Mapping[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "512 ranks": ((512,), (Shard(0),)),
    "8,960 ranks (35 x 32 x 8)": ((35, 32, 8), (Replicate(), Shard(0), Shard(0))),
}
_LAYERS = 40
# Weights of a layer: attention, MLP, norms, modulation; with two moments of each 1,500 tensors.
_LAYER = (
    (4096, 4096), (4096, 4096), (4096, 4096), (4096, 4096), (11008, 4096), (11008, 4096),
    (4096, 11008), (4096,), (4096,), (4096,), (24576, 1024), (24576,),
)  # fmt: skip
_REST = ((4096, 64), (4096,), (64, 4096), (64,), (4096, 4096), (4096,), (4096, 256), (4096,),
         (4096, 4096), (4096,), (4096, 2048), (4096,), (8192, 4096), (8192,), (4096, 4096),
         (4096,), (2048, 4096), (2048,), (4096, 4096), (4096,))  # fmt: skip
COUNT = 3 * (_LAYERS * len(_LAYER) + len(_REST))


class _Simulated(Ranks):
    """The ranks of a fake group: what one sends comes from all."""

    def gather(self, value: T) -> list[T]:
        return [value] * self.count


def plans(options: Mapping[str, Any]) -> Results:
    """First and later plans of a state of 1,500 tensors, for rank 1 of each mesh."""
    results = Results()
    for label, (shape, placements) in MESHES.items():
        if label not in options["meshes"]:
            continue
        world = int(torch.tensor(shape).prod())
        with _fake_group(world):
            state = _state(shape, placements)
            for _ in range(options["rounds"]):
                layouts = Layouts(_Simulated(None))
                first = timed(partial(layouts.of, state))
                results.add(f"{OURS}, first", label, first, tensors=COUNT, ranks=world)
                for _ in range(3):
                    again = timed(partial(layouts.of, state))
                    results.add(f"{OURS}, cached", label, again, tensors=COUNT, ranks=world)
                layout, tree, _ = layouts.of(state)
                files = timed(partial(layout.files, tree))
                results.add(f"{OURS}, files of rank 0", label, files, tensors=COUNT, ranks=world)
    return results


@contextmanager
def _fake_group(world: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _state(mesh_shape: tuple[int, ...], placements: tuple[Any, ...]) -> dict[str, Any]:
    """8B's parameters and Adam's moments, sharded; nothing is ever put into their memory."""
    mesh = init_device_mesh("cpu", mesh_shape)
    shapes = {f"layers.{i}.{j}": s for i in range(_LAYERS) for j, s in enumerate(_LAYER)}
    shapes |= {f"rest.{j}": s for j, s in enumerate(_REST)}
    state: dict[str, Any] = {"step": 1000}
    for part in ("model", "exp_avg", "exp_avg_sq"):
        state[part] = {}
        for name, shape in shapes.items():
            own, _ = _local_shape(shape, mesh, placements)
            state[part][name] = DTensor.from_local(
                torch.empty(own, dtype=torch.bfloat16), mesh, placements, run_check=False,
                shape=torch.Size(shape), stride=tuple(torch.empty(shape, device="meta").stride()),
            )  # fmt: skip
    return state


def _local_shape(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Any:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(shape, mesh, placements)


def main(arguments: list[str]) -> int:
    options = json.loads(Path(arguments[0]).read_text())
    results = plans(options)
    Path(options["results"]).write_text(json.dumps(results.to_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
