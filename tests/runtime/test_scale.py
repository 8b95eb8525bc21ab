"""4,096 ranks without any of them: a fake process group plans a Goku-8B in one process."""

import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from goku.model import PRESETS, GokuTransformer
from goku_runtime.balancing import balance_packs, step_cost, step_cost_bound
from goku_runtime.memory import memory_estimate
from goku_runtime.mesh import (
    ParallelDims,
    data_parallel_group,
    data_parallel_rank,
    sequence_parallel_group,
    shard_mesh,
)
from goku_runtime.sharding import ShardingPolicy, apply_hybrid_sharding

WORLD, NODE = 4096, 8
SECONDS, GIBIBYTES = 30, 4
POLICY = ShardingPolicy(
    blocks=("blocks.*",),
    full_precision=("patch_embed", "time_embed", "blocks.*.norm1", "final"),
    param_dtype=torch.bfloat16,
)


def test_a_plan_for_4096_ranks(run_processes: Callable[..., str]) -> None:
    output = run_processes(1, Path(__file__), "plan_the_8b", backend="none", timeout=120)
    print(output)


def plan_the_8b(rank: int, world: int) -> None:
    """In a process of its own, so that its time and its memory are this work's."""
    # torch has no public fake group; registering the backend is all that its module is needed for.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    started = time.perf_counter()
    # A rank in the middle, so that no coordinate is 0 by chance.
    mine = 1_234
    dist.init_process_group("fake", store=FakeStore(), rank=mine, world_size=WORLD)
    for dims in (ParallelDims(1, -1, 8), ParallelDims(512, -1, 1), ParallelDims(8, -1, 8)):
        dims = dims.resolve(WORLD)
        mesh = dims.build_mesh("cpu", ranks_per_node=NODE)
        assert mesh.shape == (dims.dp_replicate, dims.dp_shard, dims.sp)
        assert data_parallel_rank(mesh) == mine // dims.sp
        group = sequence_parallel_group(mesh)
        if group is not None:
            first = mine // 8 * 8
            assert dist.get_process_group_ranks(group) == list(range(first, first + 8))
        group = data_parallel_group(mesh)
        assert group is not None
        assert dist.get_process_group_ranks(group) == list(range(mine % dims.sp, WORLD, dims.sp))
        placed = dims.placement(WORLD, NODE)
        assert (placed.sp_nodes, placed.sp_crossing) == (1, 0)
        assert placed.shard_nodes == dims.dp_shard * dims.sp // NODE
    print(f"meshes and placement: {time.perf_counter() - started:.1f} s")

    # The last of them, (8, 64, 8): parameters on 512 ranks, 8 copies.
    with torch.device("meta"):
        model = GokuTransformer(PRESETS["goku-8b"])
    parameters = sum(p.numel() for p in model.parameters())
    assert 8e9 < parameters < 10e9
    estimate = memory_estimate(model, mesh, POLICY)
    apply_hybrid_sharding(model, mesh, POLICY)
    local = [p.to_local().numel() for p in model.parameters()]
    shards = 512
    assert shard_mesh(mesh).shape == (8, shards)
    # Rows are dealt out in ceil(rows / 512): nobody has less than this share of all elements, and
    # what the estimate says of the fullest rank is above what this one has.
    assert sum(local) * 4 <= estimate.parameters
    even = 4 * parameters / shards
    assert even <= estimate.parameters < 1.5 * even
    assert estimate.gradients == estimate.parameters  # fp32 both
    assert estimate.optimizer == 2 * estimate.parameters  # two fp32 moments
    assert all(p.device.type == "meta" for p in model.parameters())
    print(f"with the sharding plan: {time.perf_counter() - started:.1f} s; {estimate}")

    generator = random.Random(0)
    clips = (7_488, 14_976, 23_040, 46_080, 108_000, 216_000)
    lengths = [
        generator.randint(256, 3_600) if generator.random() < 0.75 else generator.choice(clips)
        for _ in range(20_000)
    ]
    costs = [n * (n + 7 * 3_072) for n in lengths]
    plan = balance_packs(lengths, costs, 512, 220_000)
    ratio = step_cost(plan, costs) / step_cost_bound(lengths, costs, 512, 220_000)
    assert ratio <= 1.05
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    print(f"in all: {seconds:.1f} s, {peak:.2f} GiB; balance {1 / ratio:.4f} of the bound")
    assert seconds < SECONDS
    assert peak < GIBIBYTES
    dist.destroy_process_group()
