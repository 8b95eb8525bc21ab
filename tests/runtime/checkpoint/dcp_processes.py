"""What the processes of test_dcp.py do. Run by tests/launch.py."""

from __future__ import annotations

import os
import resource
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from goku_runtime.checkpoint import (
    CheckpointOptions,
    GokuStorageReader,
    GokuStorageWriter,
    load,
    save,
    verify,
)

R, ROWS, COLUMNS = Replicate(), Shard(0), Shard(1)
# Of a mesh of one dimension, and of one of two.
PLACEMENTS: dict[str, tuple[tuple[Placement], tuple[Placement, Placement]]] = {
    "rows": ((ROWS,), (ROWS, COLUMNS)),
    "columns": ((COLUMNS,), (COLUMNS, ROWS)),
    "copies": ((R,), (R, R)),
    "few": ((ROWS,), (R, ROWS)),
    "nothing.sharded": ((ROWS,), (ROWS, R)),
    "large": ((ROWS,), (COLUMNS, R)),
}
# Several windows and a part of one, so that records lie across their borders.
OPTIONS = CheckpointOptions(window_bytes=4 << 16)


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole() -> dict[str, Tensor]:
    return {
        "plain": numbers(1, 6, 4, dtype=torch.bfloat16),
        "transposed": numbers(2, 300, 500).T,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "rows": numbers(3, 5, 3),
        "columns": numbers(4, 4, 7),
        "copies": numbers(5, 3),
        "few": numbers(6, 1, 2),
        "nothing": torch.empty(0, 2),
        "nothing.sharded": torch.empty(4, 0, dtype=torch.int32),
        "large": numbers(7, 601, 257),
    }


def mesh_of(shape: list[int]) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(shape))


def state_of(mesh: DeviceMesh, *, zero: bool = False) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    for name, value in whole().items():
        tensor = torch.zeros_like(value) if zero else value
        if name in PLACEMENTS:
            tensor = distribute_tensor(tensor, mesh, PLACEMENTS[name][mesh.ndim - 1])
        tensors[name] = tensor
    values: dict[str, Any] = {
        "step": 11,
        "best": float("inf"),
        "betas": (0.9, 0.95),
        "none": None,
        "groups": [{"lr": 0.1, "params": [0, 1]}, {"lr": 0.2, "params": []}],
    }
    if zero:
        groups = [{"lr": 0, "params": 0} for _ in range(2)]
        values = dict.fromkeys(values) | {"groups": groups}
    return {"model": tensors, **values}


def check(state: dict[str, Any], places: str = "") -> None:
    for name, wanted in whole().items():
        found = state["model"][name]
        found = found.full_tensor() if isinstance(found, DTensor) else found
        assert found.dtype == wanted.dtype, (places, name)
        assert torch.equal(found, wanted), (places, name)
    wanted = state_of(init_device_mesh("cpu", (dist.get_world_size(),)))
    for name in wanted.keys() - {"model"}:
        assert state[name] == wanted[name], (places, name, state[name])


def check_all_readers(path: Path, shape: list[int]) -> None:
    """Our load, DCP with our reader and stock DCP, each into zeros."""
    mesh = mesh_of(shape)
    state = state_of(mesh, zero=True) | {"groups": None}
    load(state, path)
    check(state, "load")
    state = state_of(mesh, zero=True)
    dcp.load(state, checkpoint_id=path, storage_reader=GokuStorageReader())
    check(state, "GokuStorageReader")
    state = state_of(mesh, zero=True)
    dcp.load(state, storage_reader=FileSystemReader(path))
    check(state, "FileSystemReader")


def written(rank: int, world: int, path: str, shape: list[int]) -> None:
    writer = GokuStorageWriter(options=OPTIONS)
    dcp.save(state_of(mesh_of(shape)), checkpoint_id=path, storage_writer=writer)
    assert verify(path).total_bytes > 601 * 257 * 4
    names = {each.name for each in Path(path).iterdir() if each.name.endswith("_0.distcp")}
    assert names == {f"__{each}_0.distcp" for each in range(world)}, "all ranks write"
    dist.barrier()
    assert [each.name for each in Path(path).parent.glob(".*")] == []
    check_all_readers(Path(path), shape)


def read_elsewhere(rank: int, world: int, path: str, shape: list[int]) -> None:
    check_all_readers(Path(path), shape)


def ours_read(rank: int, world: int, path: str, shape: list[int]) -> None:
    save(state_of(mesh_of(shape)), path)
    check_all_readers(Path(path), shape)


# --- async ------------------------------------------------------------------------------------------


def asynchronous(rank: int, world: int, path: str, kind: str) -> None:
    """Two saves one after the other: the second finds the process of the first."""
    mesh = mesh_of([world])
    writer = GokuStorageWriter(options=OPTIONS)
    for number in range(2):
        state = state_of(mesh)
        future = dcp.async_save(
            state,
            checkpoint_id=f"{path}{number}",
            storage_writer=writer,
            async_checkpointer_type=AsyncCheckpointerType(kind),
        )
        for tensor in state["model"].values():
            tensor.zero_()  # it was staged
        future.result(timeout=60)
        verify(f"{path}{number}")
        check_all_readers(Path(f"{path}{number}"), [world])


# --- failures ---------------------------------------------------------------------------------------


def refused(action: Callable[[], object], *words: str) -> CheckpointException:
    try:
        action()
    except CheckpointException as error:
        text = "".join(str(cause) for cause, _ in error.failures.values())
        assert all(word in text for word in words), (words, text)
        return error
    raise AssertionError("nothing was raised")


def listing(directory: Path) -> list[str]:
    dist.barrier()
    names = sorted(str(each.relative_to(directory)) for each in directory.rglob("*"))
    dist.barrier()
    return names


@contextmanager
def largest_file(size: int) -> Any:
    """Lets writes fail past `size` bytes with EFBIG, as they do on a full disk with ENOSPC."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def failing(rank: int, world: int, root: str) -> None:
    """One rank of three, each in its turn, fails to write; what was there stays loadable."""
    directory = Path(root)
    mesh = mesh_of([world])
    writer = GokuStorageWriter(directory / "c", overwrite=True, options=OPTIONS)
    dcp.save(state_of(mesh), storage_writer=writer)
    before = listing(directory)
    for unlucky in range(world):
        with largest_file((1 << 16) if rank == unlucky else resource.RLIM_INFINITY):
            error = refused(lambda: dcp.save(state_of(mesh), storage_writer=writer))
        cause, _ = error.failures[unlucky]
        assert isinstance(cause, OSError), cause
        assert cause.filename.endswith(f"__{unlucky}_0.distcp"), cause.filename
        assert listing(directory) == before
        verify(directory / "c")
    dcp.save(state_of(mesh), storage_writer=writer)  # the same writer, none the worse
    assert listing(directory) == before
    check_all_readers(directory / "c", [world])


def failing_late(rank: int, world: int, root: str) -> None:
    """A rank fails while others are still busy: they cannot leave anything either."""

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if rank == 1:
                raise RuntimeError("no data")
            time.sleep(0.05)
            return super().resolve_data(write_item)

    state = state_of(mesh_of([world]))
    writer = GokuStorageWriter(Path(root) / "c", options=OPTIONS)
    refused(lambda: dcp.save(state, storage_writer=writer, planner=Planner()), "no data")
    assert listing(Path(root)) == []


def failing_last(rank: int, world: int, root: str) -> None:
    """The coordinator fails when everything but the index is written."""
    state = state_of(mesh_of([world]))
    writer = GokuStorageWriter(Path(root) / "c", options=OPTIONS)
    finish = writer.finish

    def meddled(metadata: Any, results: Any) -> None:
        results[1] = results[1][:-2]  # a part of `large`, and the sums
        finish(metadata, results)

    writer.finish = meddled  # type: ignore[method-assign]
    refused(lambda: dcp.save(state, storage_writer=writer), "large of shape (601, 257)", "no part")
    assert listing(Path(root)) == []


def overwriting(rank: int, world: int, root: str) -> None:
    path, mesh = Path(root) / "c", mesh_of([world])
    dcp.save({"w": torch.zeros(3)}, checkpoint_id=path, storage_writer=GokuStorageWriter())
    before = listing(Path(root))
    error = refused(
        lambda: dcp.save(state_of(mesh), checkpoint_id=path, storage_writer=GokuStorageWriter()),
        "exists already", "overwrite=True",
    )  # fmt: skip
    assert isinstance(error.failures[0][0], FileExistsError)
    assert listing(Path(root)) == before
    writer = GokuStorageWriter(overwrite=True)
    dcp.save(state_of(mesh), checkpoint_id=path, storage_writer=writer)
    check_all_readers(path, [world])
    (Path(root) / "other").mkdir(exist_ok=True)
    refused(
        lambda: dcp.save(state_of(mesh), checkpoint_id=f"{root}/other", storage_writer=writer),
        "is not replaced",
    )
    refused(
        lambda: dcp.save(
            {"w": torch.ones(2), "key": {"deep": {1, 2}}},
            checkpoint_id=f"{root}/d", storage_writer=writer,
        ),
        "key.deep",
    )  # fmt: skip
    assert not (Path(root) / "d").exists()


def cached_plans(rank: int, world: int, root: str) -> None:
    """DCP's cached plans: the second save sends none, the third has other shapes."""
    mesh = mesh_of([world])
    for number in range(4):
        state = state_of(mesh)
        state["step"] = number
        if number > 1:
            state["model"]["plain"] = numbers(number, 6, 5, dtype=torch.bfloat16)
        path = f"{root}/c{number}"
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state, checkpoint_id=path, storage_writer=GokuStorageWriter(), planner=planner)
        verify(path)
        other = state_of(mesh, zero=True) | {"groups": None}
        other["model"]["plain"] = torch.zeros_like(state["model"]["plain"])
        load(other, path)
        assert other["step"] == number
        assert torch.equal(other["model"]["plain"], state["model"]["plain"])
        other["model"]["plain"], other["step"] = whole()["plain"], 11
        check(other)


# --- a model and its optimizer ----------------------------------------------------------------------


def trained(world: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    fully_shard(model, mesh=mesh_of([world]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def optimizers(rank: int, world: int, root: str) -> None:
    """FSDP2's states by name, nested and flat, saved by all and loaded again by fresh ones."""
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, optimizer = trained(world, 3)
        states = get_state_dict(model, optimizer, options=options)
        wanted = dict(zip(("model", "optimizer"), states, strict=True))
        path = f"{root}/flat_{flat}"
        dcp.save(wanted, checkpoint_id=path, storage_writer=GokuStorageWriter())
        verify(path)
        for reader in (GokuStorageReader(path), FileSystemReader(path)):
            model, optimizer = trained(world, 1)
            states = get_state_dict(model, optimizer, options=options)
            state = dict(zip(("model", "optimizer"), states, strict=True))
            dcp.load(state, storage_reader=reader)
            set_state_dict(
                model, optimizer,
                model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                options=options,
            )  # fmt: skip
            found = get_state_dict(model, optimizer, options=options)
            for left, right in zip(found, (wanted["model"], wanted["optimizer"]), strict=True):
                equal(left, right)
        model, optimizer = trained(world, 1)
        states = get_state_dict(model, optimizer, options=options)
        state = dict(zip(("model", "optimizer"), states, strict=True))
        load(state, path)
        equal(state, wanted)


def equal(found: Any, wanted: Any, where: str = "state") -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key, value in wanted.items():
            equal(found[key], value, f"{where}.{key}")
    elif isinstance(wanted, Tensor):
        same = found.to_local() if isinstance(found, DTensor) else found
        local = wanted.to_local() if isinstance(wanted, DTensor) else wanted
        assert torch.equal(same, local), where
    else:
        assert found == wanted, (where, found, wanted)


def killed(rank: int, world: int, root: str) -> None:
    """The process of one rank dies in the middle; the next save removes what is left."""

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            if rank == 1:
                os._exit(9)
            return super().resolve_data(write_item)

    writer = GokuStorageWriter(Path(root) / "c", options=OPTIONS)
    try:
        dcp.save(state_of(mesh_of([world])), storage_writer=writer, planner=Planner())
    except BaseException:
        traceback.print_exc()
        assert not (Path(root) / "c").exists()
        os._exit(3)  # as a killed process: nothing is cleaned up
        raise
