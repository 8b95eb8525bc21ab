"""What the processes of test_faults.py do; started by tests/launch.py."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from goku_runtime.checkpoint import (
    Checkpointer,
    Retention,
    async_save,
    latest,
    load,
    read_values,
    save,
    verify,
)

ROWS = 40_000
# Exit codes: a rank that saw that another one is gone.
LEFT_ALONE = 7


def values(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    return {"rows": torch.randn(ROWS, 3, generator=generator), "b": torch.full((9,), step)}


def step_in(path: Path, group: dist.ProcessGroup | None = None) -> int:
    verify(path)
    state = {"rows": torch.zeros(ROWS, 3), "b": torch.zeros(9, dtype=torch.int64), "step": -1}
    load(state, path, process_group=group)
    step = int(state["step"])
    for name, tensor in values(step).items():
        assert torch.equal(state[name], tensor), name
    return step


def final(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.name[0] != "." and path.name != "latest"]


# ---- killed ----


def fork(run: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run()
        code = 0
    except (RuntimeError, OSError):
        code = LEFT_ALONE
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(code)


def save_for_ever(rank: int, ranks: int, store: Path, root: Path, told: int) -> None:
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        mesh = init_device_mesh("cpu", (ranks,))
    found = latest(root)
    step = 0 if found is None else int(read_values(found)["step"])
    saving = Checkpointer()
    while True:
        step += 1
        state = {**values(step), "step": step}
        if ranks > 1:
            state["rows"] = distribute_tensor(state["rows"], mesh, [Shard(0)])
        stage = "background" if step % 2 else "now"
        handle = saving.async_save(
            state, root / f"step-{step}", overwrite=True, latest=True, retention=Retention(2),
            stage=stage,
        )  # fmt: skip
        handle.wait_staged()
        for name in ("rows", "b"):
            state[name].zero_()
        handle.result()
        os.write(told, f"{step}\n".encode())


def killed(rank: int, world: int, root: str, ranks: int, rounds: int) -> None:
    """Ranks that save again and again are killed, all of them or one; a new job goes on, and so forth."""
    directory = Path(root) / "killed"
    directory.mkdir()
    log = os.open(directory.with_name("committed"), os.O_RDWR | os.O_CREAT | os.O_APPEND)
    draw = random.Random(0)
    amid, alone = 0, 0
    for number in range(rounds):
        store = directory.with_name(f"killed-store-{number}")
        before = os.fstat(log).st_size
        run = partial(save_for_ever, ranks=ranks, store=store, root=directory, told=log)
        children = [fork(partial(run, each)) for each in range(ranks)]
        started = time.monotonic()
        while os.fstat(log).st_size == before:  # until a first save has ended
            assert time.monotonic() < started + 60
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.08))
        victims = [draw.choice(children)] if number % 2 and ranks > 1 else children
        for child in victims:
            os.kill(child, signal.SIGKILL)
        codes = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        for child, code in codes.items():
            assert code == (-signal.SIGKILL if child in victims else LEFT_ALONE), codes
        alone += len(victims) < ranks
        names = [path.name for path in directory.iterdir()]
        amid += any(".saving-" in name for name in names)
        newest = latest(directory)
        assert newest is not None
        committed = max(map(int, os.pread(log, 1 << 20, 0).split()))
        assert step_in(newest) in (committed, committed + 1)
        for path in final(directory):
            assert path.name == f"step-{step_in(path)}"
    print(f"{amid} of {rounds} killed amid a save; in {alone} one rank was left alone")
    assert amid > 0
    save({**values(1), "step": 1}, directory / "last", latest=True)
    assert not [path.name for path in directory.iterdir() if path.name.startswith(".")]


# ---- two writers ----


def one_target(rank: int, world: int, root: str) -> None:
    """Jobs that know nothing of each other save under one name at the same time."""
    directory = Path(root) / "target"
    for number in range(12):
        path = directory / str(number)
        overwrite = number % 3 > 0
        if number % 3 == 2 and rank == 0:
            old = {**values(99), "step": 99}
            save(old, path, process_group=MINE[0])  # there is one to replace
        state = {**values(10 * number + rank), "step": 10 * number + rank}
        dist.barrier()
        alone = MINE[rank]
        error: OSError | None = None
        try:
            if number % 2:
                async_save(state, path, overwrite=overwrite, process_group=alone).result()
            else:
                save(state, path, overwrite=overwrite, process_group=alone)
        except FileExistsError as failure:
            error = failure
        ends: list[Any] = [None] * world
        dist.all_gather_object(ends, error is None)
        if rank == 0:
            step = step_in(path, MINE[0])
            assert step - 10 * number in range(world), step
            assert ends[step - 10 * number], "the one that is there was told so"
            assert any(ends)
            names = sorted(each.name for each in directory.iterdir())
            assert names == sorted(map(str, range(number + 1))), names
        dist.barrier()


def one_root(rank: int, world: int, root: str) -> None:
    """Each has names of its own in one series, moves `latest` and removes what is old, the other's too."""
    directory = Path(root) / "root"
    directory.mkdir(exist_ok=True)
    alone = MINE[rank]
    with Checkpointer(alone) as saving:
        for number in range(12):
            step = 100 * rank + number
            handle = saving.async_save(
                {**values(step), "step": step}, directory / f"step-{2 * number + rank}", latest=True,
                retention=Retention(3), stage="background" if number % 2 else "now",
            )  # fmt: skip
            handle.result()
            newest = latest(directory)
            assert newest is not None
    dist.barrier()
    if rank == 0:
        newest = latest(directory)
        assert newest is not None
        assert step_in(newest, MINE[0]) % 100 == 11
        found = final(directory)
        assert 3 <= len(found) <= 5, found
        for path in found:
            step_in(path, MINE[0])
        hidden = [path.name for path in directory.iterdir() if path.name.startswith(".")]
        assert not hidden, hidden


# A group of this rank alone, for jobs that know nothing of each other.
MINE: list[dist.ProcessGroup] = []


def two_jobs(rank: int, world: int, root: str) -> None:
    MINE.extend(dist.new_group([each]) for each in range(world))
    one_target(rank, world, root)
    one_root(rank, world, root)
