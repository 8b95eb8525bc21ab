"""Degrees, placement on nodes, and the groups of a mesh."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from goku_runtime.mesh import ParallelDims

PROCESSES = Path(__file__).with_name("mesh_processes.py")


def test_groups_of_eight_processes(run_processes: Callable[..., str]) -> None:
    run_processes(
        8,
        PROCESSES,
        "every_group_holds_the_right_ranks",
        "fully_shard_takes_the_mesh",
        "wrong_degrees_and_axes_are_refused",
        "sp_across_nodes_warns",
        "groups_have_the_callers_timeout",
    )


def test_a_world_of_one(run_processes: Callable[..., str]) -> None:
    run_processes(1, PROCESSES, "every_group_holds_the_right_ranks")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 64), st.integers(1, 16))
def test_the_rest_goes_to_dp_shard(replicate: int, shard: int, sp: int) -> None:
    world = replicate * shard * sp
    dims = ParallelDims(replicate, -1, sp).resolve(world)
    assert dims == ParallelDims(replicate, shard, sp)
    assert (dims.world, dims.dp) == (world, replicate * shard)
    assert dims.resolve(world) == dims


@pytest.mark.parametrize(
    ("degrees", "world", "message"),
    [
        ((1, -1, 3), 8, "dp_replicate=1 x sp=3 = 3 does not divide the 8 processes"),
        ((2, -1, 8), 8, "dp_replicate=2 x sp=8 = 16 does not divide the 8 processes"),
        ((2, 2, 1), 8, "dp_replicate=2 x dp_shard=2 x sp=1 = 4, but there are 8 processes"),
        ((1, 1, 1), 4096, "= 1, but there are 4096 processes"),
        ((1, -1, 1), 0, "does not divide the 0 processes"),
    ],
)
def test_degrees_that_do_not_fit(degrees: tuple[int, int, int], world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelDims(*degrees).resolve(world)


@pytest.mark.parametrize("value", [0, -2, 1.0, True, "2"])
@pytest.mark.parametrize("name", ["dp_replicate", "dp_shard", "sp"])
def test_bad_degrees_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}; allowed: integers >= 1"):
        ParallelDims(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sp is -1"):
        ParallelDims(sp=-1)


def test_no_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group before build_mesh"):
        ParallelDims().build_mesh("cpu")


@pytest.fixture
def alone() -> Iterator[None]:
    """A default group of one process that serves CPUs alone."""
    dist.init_process_group("cpu:fake", store=FakeStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["gpu", "cuda", "cpu:0", "", None, 0])
@pytest.mark.usefixtures("alone")
def test_a_device_that_the_group_does_not_serve_is_refused(device: object) -> None:
    message = f"device_type is {device!r}; allowed: what the default group serves, 'cpu'"
    with pytest.raises(ValueError, match=message):
        ParallelDims().build_mesh(device)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["x", "", "-1", "1.5"])
@pytest.mark.usefixtures("alone")
def test_a_bad_local_world_size_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    with pytest.raises(ValueError, match=f"LOCAL_WORLD_SIZE is {value!r} in the environment"):
        ParallelDims().build_mesh("cpu")


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(1, 16))
def test_placement_by_counting(replicate: int, shard: int, sp: int, node: int) -> None:
    world = replicate * shard * sp
    placed = ParallelDims(replicate, shard, sp).placement(world, node)

    def nodes(ranks: range) -> int:
        return len({rank // node for rank in ranks})

    groups = [nodes(range(first, first + sp)) for first in range(0, world, sp)]
    assert placed.sp_nodes == max(groups)
    assert placed.sp_crossing == sum(count > 1 for count in groups)
    size = shard * sp
    assert placed.shard_nodes == max(
        nodes(range(first, first + size)) for first in range(0, world, size)
    )
    # sp innermost is the best order: wherever a degree can lie inside nodes, it does.
    if node % sp == 0:
        assert placed.sp_crossing == 0


def test_placement_is_a_sentence() -> None:
    placed = ParallelDims(4, -1, 8).placement(4096, 8)
    assert str(placed) == (
        "groups of sp=8 lie inside nodes of 8 ranks; parameters are sharded over 1024 ranks on 128 "
        "nodes, 4 copies"
    )
    crossing = ParallelDims(1, -1, 16).placement(4096, 8)
    assert str(crossing).startswith(
        "256 of 256 groups of sp=16 touch up to 2 nodes of 8 ranks, so every layer's exchanges "
        "cross nodes; sp in (1, 2, 4, 8) would stay inside; "
    )
    # Some groups cross where sp does not divide a node.
    assert ParallelDims(sp=3).placement(24, 8).sp_crossing == 2
    with pytest.raises(ValueError, match="ranks_per_node is 0; allowed: >= 1"):
        ParallelDims().placement(8, 0)
