"""Ranks that load together though they want different things, or were given different checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from goku_runtime.checkpoint import (
    CheckpointOptions,
    Retention,
    committing,
    latest,
    load,
    save,
    set_latest,
)
from goku_runtime.checkpoint.ranks import Ranks
from goku_runtime.checkpoint.replicas import shared
from goku_runtime.checkpoint.stored import Stored

LETTERS = "abcdef"


def saved(root: str) -> Path:
    """A checkpoint with the tensors a to f of 2, 4, ... 12 elements, which are 1 to 6."""
    path = Path(root) / "letters"
    if not path.exists():
        save({key: torch.full((2 * i,), float(i)) for i, key in enumerate(LETTERS, 1)}, path)
    dist.barrier()
    return path


def zeros(keys: str, **how: Any) -> dict[str, Any]:
    return {key: torch.zeros(2 * LETTERS.index(key) + 2, **how) for key in keys}


def check(state: dict[str, Any]) -> None:
    for key, tensor in state.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert bool((local == LETTERS.index(key) + 1).all()), (key, local)


def read(found: list[str]) -> Any:
    """Stored.read, noting the names of what is read."""
    real = Stored.read

    def noting(self: Stored, engine: Any, wanted: Any) -> None:
        found.extend(name for name, _, _ in wanted)
        real(self, engine, wanted)

    return noting


def other_orders_and_keys(rank: int, world: int, root: str) -> None:
    """Matched by position, every one of these would get another tensor's values, or hang."""
    path = saved(root)
    for mine in (
        ("abc", "cba"),  # another order
        ("af", "fa"),  # of other sizes
        ("ab", "b"),  # one has more
        ("a", "b"),  # nothing in common
        ("", "abc"),
    ):
        state = zeros(mine[rank])
        load(state, path, broadcast=True, partial=True)
        check(state)


def one_reads_what_all_want(rank: int, world: int, root: str) -> None:
    path, names = saved(root), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stored, "read", read(names))
        state = zeros(("abc", "bcd")[rank])
        state["b"] = state["b"].to(torch.float64 if rank else torch.float32)
        load(state, path, broadcast=True, partial=True, convert=True)
    check(state)
    # c alone is wanted alike: b has another dtype.
    assert sorted(names) == (["b", "d"] if rank else ["a", "b", "c"]), names


def meshes_that_differ(rank: int, world: int, root: str) -> None:
    path, names = saved(root), list[str]()
    mesh = init_device_mesh("cpu", (2,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stored, "read", read(names))
        state = zeros("abcd")
        for key, placement in (("a", Replicate()), ("b", Shard(0)), ("d", Replicate())):
            state[key] = distribute_tensor(state[key], mesh, [placement])
        if rank:  # d is spread on one rank and plain on the other
            state = dict(reversed((state | zeros("de")).items()))
        load(state, path, broadcast=True, partial=True)
    check(state)
    assert sorted(names) == (["b", "d", "e"] if rank else ["a", "b", "c", "d"]), names


def values_that_are_lazy(rank: int, world: int, root: str) -> None:
    """What is sent are bytes: one side's conjugated view must not get the other's bits."""
    path = Path(root) / "complex"
    values = torch.tensor([1 + 2j, 3 - 4j])
    save({"z": values, "t": torch.arange(6.0).reshape(2, 3)}, path)
    state = {"z": torch.zeros(2, dtype=torch.complex64), "t": torch.zeros(2, 3)}
    if rank:
        state = {"z": state["z"].conj(), "t": torch.zeros(3, 2).t()}
    load(state, path, broadcast=True)
    assert torch.equal(state["z"].resolve_conj(), values)
    assert torch.equal(state["t"], torch.arange(6.0).reshape(2, 3))


def parts_of_the_world(rank: int, world: int, root: str) -> None:
    """A mesh whose ranks are not all in the group: nobody outside would take part."""
    path = saved(root)
    pair = dist.new_group([1, 2])
    mesh = init_device_mesh("cpu", (3,))
    if rank:
        state = zeros("abc")
        state["b"] = distribute_tensor(state["b"], mesh, [Replicate()], src_data_rank=None)
        assert shared(state, Ranks(pair)) == ["a", "c"]
        load(state, path, broadcast=True, partial=True, process_group=pair)
        check(state)
    dist.barrier()


def meshes_in_any_order(rank: int, world: int, root: str) -> None:
    """A group numbers its members by rank, a mesh by coordinate."""
    path = Path(root) / "replicated"
    values = torch.arange(12.0).reshape(4, 3)
    save({"w": values}, path)
    for ranks in ([[1, 0], [2, 3]], [[0, 3], [2, 1]], [[0, 2], [3, 1]], [[3, 2], [1, 0]]):
        mesh = DeviceMesh("cpu", ranks)
        for placements in (
            [Replicate(), Replicate()],
            [Replicate(), Shard(0)],
            [Shard(0), Replicate()],
        ):
            empty = torch.zeros(4, 3)
            part = distribute_tensor(empty, mesh, placements, src_data_rank=None)
            load({"w": part}, path, broadcast=True)
            # By hand: `full_tensor` joins the parts in the order of the group's ranks.
            mine = values
            for place, placement in zip(mesh.get_coordinate() or (), placements, strict=True):
                mine = mine.chunk(2)[place] if placement == Shard(0) else mine
            assert torch.equal(part.to_local(), mine), (ranks, placements)


def parts_of_another_shape(rank: int, world: int, root: str) -> None:
    """Cut as torch.tensor_split does (3, 3, 2, 2) where placements mean torch.chunk's 3, 3, 3, 1."""
    path = Path(root) / "uneven"
    save({"w": torch.arange(10.0)}, path)
    mesh = init_device_mesh("cpu", (4,))
    memory = torch.full((10,), -7.0)
    rows = [3, 3, 2, 2][rank]
    part = DTensor.from_local(
        memory[:rows], mesh, [Shard(0)], run_check=False, shape=torch.Size((10,)), stride=(1,)
    )
    ways: list[dict[str, Any]] = [{}, {"convert": True}, {"broadcast": True}]
    for options in ways:
        with pytest.raises(ValueError, match=r"w: this rank's part has shape \(2,\); .* make it "):
            load({"w": part}, path, **options)
    assert bool((memory == -7).all())
    # A rank that has none by its placements.
    save({"w": torch.arange(2.0)}, Path(root) / "few")
    few = DTensor.from_local(
        memory[: [1, 0, 0, 1][rank]],
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size((2,)),
        stride=(1,),
    )
    with pytest.raises(
        ValueError, match=r"w: this rank's part has shape \(.,\); .* (leave|make) it "
    ):
        load({"w": few}, Path(root) / "few")
    assert bool((memory == -7).all())


def other_checkpoints(rank: int, world: int, root: str) -> None:
    directory = Path(root) / "two"
    for step in (1, 2):
        save({"w": torch.full((4,), float(step)), "step": step}, directory / f"step_{step}")
    state = {"w": torch.zeros(4), "step": 0}
    with pytest.raises(ValueError, match=r"step_1 on rank 0 and .*step_2 on rank 1"):
        load(state, directory / f"step_{1 + rank}")
    assert state["step"] == 0
    assert not state["w"].any()
    with pytest.raises(ValueError, match="broadcast is True on rank 0 and False on rank 1"):
        load(state, directory / "step_1", broadcast=rank == 0)
    with pytest.raises(ValueError, match="process_group is 'x'; allowed: None or a ProcessGroup"):
        load(state, directory / "step_1", process_group="x")  # type: ignore[arg-type]
    link = Path(root) / "link"  # another name of the same directory is no other checkpoint
    if rank:
        link.symlink_to(directory)
    dist.barrier()
    load(state, (link if rank else directory) / "step_2")
    assert state["step"] == 2


def the_latest_of_all(rank: int, world: int, root: str) -> None:
    """Rank 1 sees another directory, or none: what counts is what rank 0 finds."""
    directory = Path(root) / "two"
    if rank == 0:
        set_latest(directory, "step_1")
    dist.barrier()
    seen = (directory, Path(root) / "none")[rank]
    assert latest(seen, together=True) == directory / "step_1"
    assert latest((Path(root) / "none", directory)[rank], together=True) is None
    assert latest(seen) == ((directory / "step_1") if rank == 0 else None)


class Patience:
    """Notes the groups that are made, with their timeouts, and pretends that the default one is of NCCL alone."""

    def __init__(self, patch: pytest.MonkeyPatch, *, alone: bool) -> None:
        self.made: list[float] = []
        real = Ranks.new_gloo_group

        def noting(ranks: Ranks, timeout_s: float | None = None) -> dist.ProcessGroup:
            group = real(ranks, timeout_s)
            backend = group._get_backend(torch.device("cpu"))
            self.made.append(backend.options._timeout.total_seconds())
            return group

        patch.setattr(Ranks, "new_gloo_group", noting)
        if alone:
            device = property(lambda ranks: "cuda" if ranks.group is None else "cpu")
            patch.setattr(Ranks, "device", device)


def a_group_of_its_own(rank: int, world: int, root: str) -> None:
    """Beside NCCL alone, whose all-reduce gives up after ten minutes; or with a timeout of the caller's."""
    path, other = saved(root), Path(root) / "other"
    before = len(c10d._world.pg_map)
    for alone, timeout_s, expected in ((True, None, 7200), (True, 500, 500), (False, 500, 500)):
        with pytest.MonkeyPatch.context() as patch:
            patience = Patience(patch, alone=alone)
            options = CheckpointOptions(timeout_s=timeout_s)
            state = zeros("abc")
            load(state, path, partial=True, broadcast=True, options=options)
            check(state)
            assert patience.made == [expected]
            save(state, other, overwrite=True, options=options)
            assert patience.made == [expected] * 2
    with pytest.MonkeyPatch.context() as patch:
        patience = Patience(patch, alone=False)
        load(state, path, partial=True)
        assert patience.made == []
    assert len(c10d._world.pg_map) == before


def removals_take_longer(rank: int, world: int, root: str) -> None:
    """Deleting old ones takes longer than the group's timeout: the save is none the worse for it."""
    directory = Path(root) / "slow"
    real = committing.prune

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(5)
        return real(*arguments, **options)

    save({"step": 1}, directory / "step_1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committing, "prune", slow)
        begun = time.monotonic()
        save({"step": 2}, directory / "step_2", latest=True, retention=Retention(1))
        assert time.monotonic() - begun < 4.5  # rank 0 is back in the training before it is done
    assert (directory / "step_2").is_dir()
    dist.barrier()
    while (directory / "step_1").exists():
        assert time.monotonic() - begun < 60
        time.sleep(0.1)
