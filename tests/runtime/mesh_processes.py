"""Functions for `run_processes`: meshes of gloo groups, and what is refused."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from goku_runtime.mesh import (
    AXES,
    ParallelDims,
    data_parallel_group,
    data_parallel_rank,
    data_parallel_size,
    sequence_parallel_group,
    shard_mesh,
)


def every_group_holds_the_right_ranks(rank: int, world: int) -> None:
    """Groups by arithmetic on the rank, for every way to write the world as a product of three."""
    for replicate in (n for n in range(1, world + 1) if world % n == 0):
        for sp in (n for n in range(1, world + 1) if world // replicate % n == 0):
            shard = world // replicate // sp
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # no deprecated call
                mesh = ParallelDims(replicate, sp=sp).build_mesh("cpu", ranks_per_node=world)
                again, sharded = shard_mesh(mesh), shard_mesh(mesh)
            assert mesh.mesh_dim_names == AXES
            assert mesh.shape == (replicate, shard, sp)
            r, s, p = rank // (shard * sp), rank // sp % shard, rank % sp

            group = sequence_parallel_group(mesh)
            if sp == 1:
                assert group is None
            else:
                assert group is not None
                first = rank - p
                assert dist.get_process_group_ranks(group) == list(range(first, first + sp))
            assert data_parallel_size(mesh) == replicate * shard
            assert data_parallel_rank(mesh) == r * shard + s
            group = data_parallel_group(mesh)
            if replicate * shard == 1:
                assert group is None
            else:
                assert group is not None
                assert dist.get_process_group_ranks(group) == list(range(p, world, sp))
                assert data_parallel_group(mesh) is group

            inner = list(range(r * shard * sp, (r + 1) * shard * sp))
            assert dist.get_process_group_ranks(sharded.get_group(sharded.ndim - 1)) == inner
            assert sharded.ndim == (1 if replicate == 1 else 2)
            if replicate > 1:
                assert sharded.mesh_dim_names == ("dp_replicate", "dp_shard_sp")
                outer = list(range(rank % (shard * sp), world, shard * sp))
                assert dist.get_process_group_ranks(sharded.get_group(0)) == outer
            # The groups are made once, not per call.
            last = sharded.ndim - 1
            assert again == sharded
            assert again.get_group(last) is sharded.get_group(last)

            # They work: a sum over sp, then one over dp, is the sum over all.
            value = torch.tensor(float(rank + 1))
            for group in (sequence_parallel_group(mesh), data_parallel_group(mesh)):
                if group is not None:
                    dist.all_reduce(value, group=group)
            assert value.item() == world * (world + 1) / 2


def fully_shard_takes_the_mesh(rank: int, world: int) -> None:
    mesh = ParallelDims(2, 2, world // 4).build_mesh("cpu")
    model = torch.nn.Linear(8, 8, bias=False)
    torch.nn.init.ones_(model.weight)
    fully_shard(model, mesh=shard_mesh(mesh))
    assert model.weight.to_local().shape == (8 // (world // 2), 8)
    model(torch.full((1, 8), float(rank))).sum().backward()
    # FSDP2 averages over all ranks of its mesh: replicas and shards.
    assert model.weight.grad.full_tensor()[0, 0].item() == (world - 1) / 2


def wrong_degrees_and_axes_are_refused(rank: int, world: int) -> None:
    message = f"dp_replicate=3 x dp_shard=1 x sp=1 = 3, but there are {world} processes"
    with pytest.raises(ValueError, match=message):
        ParallelDims(3, 1, 1).build_mesh("cpu")
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    message = r"mesh has the axes \('dp',\); needed are \('dp_replicate', 'dp_shard', 'sp'\)"
    for accessor in (
        shard_mesh, sequence_parallel_group, data_parallel_group, data_parallel_rank,
        data_parallel_size,
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            accessor(mesh)


def sp_across_nodes_warns(rank: int, world: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ParallelDims(sp=world).build_mesh("cpu", ranks_per_node=world // 2)
    if rank:
        assert not caught
        return
    (text,) = [str(w.message) for w in caught]
    assert f"1 of 1 groups of sp={world} touch up to 2 nodes of {world // 2} ranks" in text


def groups_have_the_callers_timeout(rank: int, world: int) -> None:
    """A stopped rank is noticed after it; torch gives these groups gloo's half an hour."""
    mesh = ParallelDims(2, sp=2).build_mesh("cpu")
    groups = [*mesh.get_all_groups(), *shard_mesh(mesh).get_all_groups(), data_parallel_group(mesh)]
    cpu = torch.device("cpu")
    wanted = dist.group.WORLD._get_backend(cpu).options._timeout
    assert wanted.total_seconds() < 1800
    for group in groups:
        assert group._get_backend(cpu).options._timeout == wanted
