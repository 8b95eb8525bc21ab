"""Two ranks, one of which fails alone: both raise at once, and can save afterwards."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from goku_runtime.checkpoint import Checkpointer, committing, load, save, staging

SECONDS = 20.0  # far less than gloo's patience


@contextmanager
def fails_soon(kind: type[BaseException], words: str) -> Iterator[None]:
    began = time.monotonic()
    try:
        yield
    except kind as error:
        if words not in str(error):
            raise
    else:
        raise AssertionError(f"{kind.__name__} was not raised")
    assert time.monotonic() - began < SECONDS


def state(value: float) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"w": distribute_tensor(torch.full((64, 3), value), mesh, [Shard(0)]), "step": 1}


def no_thread(rank: int, world: int, root: str) -> None:
    real = ThreadPoolExecutor.submit

    def refused(self: ThreadPoolExecutor, *arguments: Any, **options: Any) -> Any:
        if rank == 1 and self._thread_name_prefix.startswith("saving"):
            raise RuntimeError("can't start new thread")
        return real(self, *arguments, **options)

    directory = Path(root)
    with Checkpointer() as saving:
        ThreadPoolExecutor.submit = refused  # type: ignore[method-assign]
        with fails_soon(RuntimeError, "can't start new thread"):
            saving.async_save(state(1), directory / "c").result()
        ThreadPoolExecutor.submit = real  # type: ignore[method-assign]
        dist.barrier()
        assert not list(directory.glob(".c.*"))
        saving.async_save(state(2), directory / "c").result()
    found = state(0)
    load(found, directory / "c")
    assert bool((found["w"].to_local() == 2).all())


def no_memory_to_warm(rank: int, world: int, root: str) -> None:
    real = staging.Memory.__init__

    def refused(self: staging.Memory, *arguments: Any, **options: Any) -> None:
        if rank == 1:
            raise OSError(12, "Cannot allocate memory")
        real(self, *arguments, **options)

    with Checkpointer() as saving:
        staging.Memory.__init__ = refused  # type: ignore[method-assign]
        with fails_soon(OSError, "Cannot allocate memory"):
            saving.warm(state(1))
        staging.Memory.__init__ = real  # type: ignore[method-assign]
        saving.async_save(state(2), Path(root) / "c").result()


def latest_is_not_moved(rank: int, world: int, root: str) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    path = Path(root) / "c"
    if rank == 0:
        committing.set_latest = refused
    with pytest.raises(OSError, match="No space left") as caught:
        save(state(1), path, latest=True)
    assert caught.value.__notes__ == [f"{path} is saved; only `latest` was not moved to it"]
    found = state(0)
    load(found, path)
    assert bool((found["w"].to_local() == 1).all())


def gone_before_the_first_message(rank: int, world: int, root: str) -> None:
    """A process ends before its thread says anything in the group of the background, whose ranks connect
    with the first message, as those of large groups do."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"  # of groups made from now on
    saving = Checkpointer()
    saving.warm(state(1))
    if rank == 2:
        Checkpointer._run = lambda *_: os._exit(9)  # type: ignore[method-assign, assignment]
    began = time.monotonic()
    try:
        saving.async_save(state(1), Path(root) / "c").result()
    except RuntimeError:
        traceback.print_exc()
        os._exit(3 if time.monotonic() - began < SECONDS else 4)
    raise AssertionError("not missed")


def a_placement_on_one_rank(rank: int, world: int, root: str) -> None:
    save(state(1.0), Path(root) / "c")
    mesh = init_device_mesh("cpu", (2,))
    found: Any = torch.zeros(64, 3)
    if rank == 0:
        found = DTensor.from_local(found, mesh, [Partial()], run_check=False)
    with fails_soon(ValueError, "P(sum)"):
        load({"w": found, "step": 0}, Path(root) / "c")
    dist.barrier()


def other_paths(rank: int, world: int, root: str) -> None:
    with fails_soon(ValueError, "on rank 0 and"):
        save(state(1.0), Path(root) / f"c{rank}")
    dist.barrier()
    assert not [path for path in Path(root).iterdir() if path.name.startswith((".c", "c"))]
