"""What the ranks of test_async.py do; started by tests/launch.py."""

from __future__ import annotations

import contextlib
import inspect
import logging
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from goku_runtime.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointOptions,
    async_save,
    load,
    verify,
)

ROWS = 60_000


def state_of(step: int, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """A DTensor in rows, one held by all, and plain tensors: each number tells the step."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    rows = torch.full((ROWS, 5), float(step))
    return {
        "rows": distribute_tensor(rows, mesh, [Shard(0)]),
        "copies": distribute_tensor(torch.full((1000,), float(step)), mesh, [Replicate()]),
        "plain": torch.full((30_000,), step, dtype=torch.int64),
        "step": step,
    }


def change(state: dict[str, Any], step: int) -> None:
    for name in ("rows", "copies"):
        state[name].to_local().fill_(step)
    state["plain"].fill_(step)
    state["step"] = step


def check(path: Path, step: int) -> None:
    state = state_of(-1)
    load(state, path)
    assert state["step"] == step, state["step"]
    for tensor in (state["rows"].to_local(), state["copies"].to_local(), state["plain"]):
        assert bool((tensor == step).all()), (step, tensor)
    if dist.get_rank() == 0:
        verify(path)
    dist.barrier()


def only(root: Path, *names: str) -> None:
    dist.barrier()
    found = sorted(path.name for path in root.iterdir()) if root.exists() else []
    assert found == sorted(names), found
    dist.barrier()


class Gate:
    """Holds this rank's save before it copies."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        real = getattr(Checkpointer, name)

        def held(*arguments: Any) -> Any:
            self.reached.set()
            assert self.open.wait(30)
            return real(*arguments)

        setattr(Checkpointer, name, held)
        try:
            yield
        finally:
            self.open.set()
            setattr(Checkpointer, name, real)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def error_of(handle: Any) -> BaseException:
    handle.wait_ended()
    assert not handle.succeeded
    error = handle._result.exception()
    assert error is not None
    return error


def training_goes_on(rank: int, world: int, root: str) -> None:
    """Collectives of the training and of the save, at the same time on the same ranks."""
    directory = Path(root) / "training"
    options = CheckpointOptions(staging_bytes=512 << 10, window_bytes=256 << 10)
    for number, (options_of, stage) in enumerate(
        [(None, "now"), (None, "background"), (options, "now"), (options, "background")]
    ):
        with Checkpointer(options=options_of) as saving:
            state = state_of(0)
            for step in range(1, 5):
                change(state, step)
                handle = saving.async_save(state, directory / f"{number}-{step}", stage=stage)
                total = torch.zeros(1)
                for _ in range(20):  # the next forward and backward pass
                    value = torch.full((1,), float(rank + step))
                    dist.all_reduce(value)
                    total += value
                assert total.item() == 20 * (world * step + sum(range(world)))
                handle.wait_staged()
                change(state, -step)  # the optimizer's step
        for step in range(1, 5):
            check(directory / f"{number}-{step}", step)


def cancel_on_one_rank(rank: int, world: int, root: str) -> None:
    """Before the copy, and after this rank's file was written; by the first rank and the last."""
    directory = Path(root) / "cancelled"
    with Checkpointer() as saving:
        saving.async_save(state_of(1), directory / "good").result()
        for name in ("_copy", "_write_files"):
            for canceller in range(world):
                gate = Gate()
                with gate.on(name):
                    handle = saving.async_save(state_of(2), directory / "c", stage="background")
                    assert gate.reached.wait(10)
                    dist.barrier()
                    if rank == canceller:
                        handle.cancel()
                    dist.barrier()
                    gate.open.set()
                    error = error_of(handle)
                assert type(error) is RuntimeError, error
                who = "" if rank == canceller else f"rank {canceller}: "
                assert str(error) == f"{who}{directory}/c: cancelled", error
                only(directory, "good")
        saving.async_save(state_of(3), directory / "c").result()
        check(directory / "c", 3)
        check(directory / "good", 1)


def one_rank_fails(rank: int, world: int, root: str) -> None:
    directory = Path(root) / "failing"
    logging.basicConfig(level="ERROR")
    with Checkpointer() as saving:
        saving.async_save(state_of(1), directory / "good", latest=True).result()
        for failing in range(world):
            for stage in ("now", "background"):
                with largest_file(1 << 14 if rank == failing else resource.RLIM_INFINITY):
                    handle = saving.async_save(state_of(2), directory / "c", stage=stage)
                    error = error_of(handle)
                assert isinstance(error, OSError)
                words = "File too large" if rank == failing else f"rank {failing}: File too large"
                assert words in str(error), error
                if rank != failing:
                    print(error)
                assert handle.staging_done
                only(directory, "good", "latest")
        # An error that nobody asked for is not the next save's.
        with largest_file(1 << 14 if rank == 1 else resource.RLIM_INFINITY):
            saving.async_save(state_of(2), directory / "c").wait_ended()
        saving.async_save(state_of(3), directory / "c", latest=True).result()
        check(directory / "c", 3)
        only(directory, "good", "c", "latest")


def vanished(rank: int, world: int, root: str) -> None:
    """Somebody removes the directory while the ranks write into it."""
    directory = Path(root) / "vanished"
    with Checkpointer() as saving:
        for name in ("_copy", "_write_files"):
            gate = Gate()
            with gate.on(name):
                handle = saving.async_save(state_of(1), directory / "c", stage="background")
                assert gate.reached.wait(10)
                dist.barrier()
                if rank == 0:
                    shutil.rmtree(directory)
                dist.barrier()
                gate.open.set()
                error = error_of(handle)
            kind = OSError if name == "_copy" else CheckpointError
            assert isinstance(error, kind), error
            only(directory)
        saving.async_save(state_of(2), directory / "c").result()
        check(directory / "c", 2)


def again_and_again(rank: int, world: int, root: str) -> None:
    """The function makes a group for every save and gives it back, whatever the ranks do then."""
    directory = Path(root) / "again"
    for step in range(6):
        state = state_of(step)
        handle = async_save(state, directory / "c", overwrite=True)
        change(state, -1)
        handle.result()
        check(directory / "c", step)
    only(directory, "c")


def parts_of_the_world(rank: int, world: int, root: str) -> None:
    """Two groups save at the same time, again and again; their ranks have other groups beside."""
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    dist.new_group([0, 2])
    number = min(rank, 1)
    directory = Path(root) / "parts"
    for step in range(4):
        state = {"w": torch.full((50_000,), float(step)), "v": torch.zeros(50_000), "step": step}
        handle = async_save(state, directory / f"{number}-{step}", process_group=groups[number])
        state["w"].fill_(-1)
        handle.result()
    dist.barrier()
    for number in range(2):
        for step in range(4):
            state = {"w": torch.zeros(50_000), "v": torch.ones(50_000), "step": -1}
            load(state, directory / f"{number}-{step}")
            assert state["step"] == step
            assert bool((state["w"] == step).all())
            assert not state["v"].any()
    only(directory, *(f"{number}-{step}" for number in range(2) for step in range(4)))


def ranks_in_another_order(rank: int, world: int, root: str) -> None:
    """The group for the background has the same first rank as the one that was given."""
    how: dict[str, Any] = {"sort_ranks": False} if takes_an_order() else {}
    for name, members in (("all", [2, 0, 1]), ("some", [2, 1])):
        group = dist.new_group(members, **how)
        if rank in members:
            target = Path(root) / "order" / name
            state = {"w": torch.full((50_000,), 1.0), "v": torch.zeros(50_000), "step": 1}
            async_save(state, target, process_group=group).result()
            found = {"w": torch.zeros(50_000), "v": torch.ones(50_000), "step": -1}
            load(found, target, process_group=group, broadcast=True)
            assert found["step"] == 1
            assert bool((found["w"] == 1).all())
        dist.barrier()


def takes_an_order() -> bool:
    """Older versions of torch sort the ranks of every group."""
    return "sort_ranks" in inspect.signature(dist.new_group).parameters


def all_groups_destroyed(rank: int, world: int, root: str) -> None:
    """The caller ends torch.distributed as soon as the save has ended: nobody is in its way."""
    directory = Path(root) / "destroyed"
    saving = Checkpointer()
    saving.async_save(state_of(1), directory / "a").result()
    handle = async_save(state_of(2), directory / "b")
    handle.result()
    dist.barrier()
    dist.destroy_process_group()
    saving.close()
    if rank == 0:
        assert sorted(path.name for path in directory.iterdir()) == ["a", "b"]
