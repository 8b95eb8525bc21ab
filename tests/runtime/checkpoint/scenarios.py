"""What the processes of test_ranks.py and test_failure.py do; run by tests/launch.py.

Every scenario gets a directory of its own, or the one that is there already.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from goku_runtime.checkpoint import (
    Checkpointer,
    CheckpointError,
    async_save,
    latest,
    load,
    prune,
    read_values,
    save,
    set_latest,
    verify,
)
from goku_runtime.checkpoint import root as root_module
from goku_runtime.checkpoint.directory import NewDirectory, remove
from goku_runtime.checkpoint.manifest import Manifest


def full(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain_state() -> dict[str, Any]:
    return {
        "plain": full(1, 6, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "rows": full(2, 5, 3),
        "columns": full(3, 4, 7),
        "copies": full(4, 3),
        "nothing": torch.empty(0, 2),
        "void": torch.empty(0, 4),
        "few": full(5, 1, 2),
    }


SPREAD = {
    "rows": Shard(0), "columns": Shard(1), "copies": Replicate(), "few": Shard(0), "void": Shard(1),
}  # fmt: skip


def spread_state(ranks: int, *, zero: bool = False) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in plain_state().items():
        value = torch.zeros_like(tensor) if zero else tensor
        tensors[name] = distribute_tensor(value, mesh, [SPREAD[name]]) if name in SPREAD else value
    return {"model": tensors, "step": 0 if zero else 11, "config": None if zero else {"dims": [1]}}


def check_loaded(state: dict[str, Any]) -> None:
    for name, tensor in plain_state().items():
        loaded = state["model"][name]
        whole = loaded.full_tensor() if isinstance(loaded, DTensor) else loaded
        assert torch.equal(whole, tensor), name
        assert whole.dtype == tensor.dtype, name
    assert state["step"] == 11
    assert state["config"] == {"dims": [1]}


def only(directory: Path, *names: str) -> None:
    """These are there and nothing else, once rank 0 has deleted what is left: nobody waits for that."""
    deadline = time.monotonic() + 30
    while (found := sorted(path.name for path in directory.iterdir())) != sorted(names):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


@contextlib.contextmanager
def raises(kind: type[BaseException], *words: str) -> Iterator[None]:
    message = None
    try:
        yield
    except kind as error:
        message = str(error)
    assert message is not None, f"no {kind.__name__}"
    assert all(word in message for word in words), (words, message)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Lets writes fail past `size` bytes with EFBIG, as they do on a full disk with ENOSPC."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# --- several ranks ------------------------------------------------------------------------------


def save_spread(rank: int, ranks: int, directory: Path) -> None:
    save(spread_state(ranks), directory / "c")
    dist.barrier()
    manifest = json.loads((directory / "c" / "manifest.json").read_bytes())
    written = {name for name in manifest["files"] if name.endswith("_0.distcp")}
    assert written == {f"__{each}_0.distcp" for each in range(ranks)}, "all ranks write"
    state = spread_state(ranks, zero=True)
    load(state, directory / "c")
    check_loaded(state)
    verify(directory / "c")


def load_spread(rank: int, ranks: int, directory: Path) -> None:
    state = spread_state(ranks, zero=True)
    load(state, directory / "c")
    check_loaded(state)
    state = {"model": {n: torch.zeros_like(t) for n, t in plain_state().items()}}
    load(state | {"step": 0, "config": None}, directory / "c")
    assert torch.equal(state["model"]["rows"], plain_state()["rows"])


def replicated_once(rank: int, ranks: int, directory: Path) -> None:
    save({"a": torch.zeros(1 << 16), "b": torch.zeros(1 << 16)}, directory / "c")
    sizes = [path.stat().st_size for path in (directory / "c").glob("*_0.distcp")]
    assert len(sizes) == ranks
    assert sum(sizes) < 2 * (1 << 18) + 16384, "each tensor once"
    assert max(sizes) < (1 << 18) + 8192, "and each rank one of them"


def one_rank_fails(rank: int, ranks: int, directory: Path) -> None:
    """Whatever goes wrong on one rank is raised on all, and nobody hangs."""
    good = {"w": torch.ones(3)}
    save(good, directory / "good")
    big = {"w": full(0, 1 << 16), "v": full(1, 1 << 16), "u": full(2, 1 << 16)}
    for failing in range(ranks):
        limit = 1 << 14 if rank == failing else resource.RLIM_INFINITY
        words = "File too large: '" if rank == failing else f"rank {failing}: File too large: '"
        with largest_file(limit), raises(OSError, words, "/.big"):
            save(big, directory / "big")
        dist.barrier()
        only(directory, "good")
    with raises(ValueError, "a: a builtins.object"):
        save({"a": object() if rank == 1 else 1}, directory / "x")
    with raises(ValueError, "step differs between ranks; rank 0 has 0, rank 1 has 1"):
        save({"step": rank}, directory / "x")
    with raises(ValueError, "differs between ranks"):
        save({"w": torch.zeros(2 + rank)}, directory / "x")
    with raises(ValueError, "w differs between ranks"):
        save({"w": {"x": torch.ones(1)} if rank else 1}, directory / "x")
    with raises(FileExistsError, "overwrite=True"):
        save(good, directory / "good")
    dist.barrier()
    only(directory, "good")

    # Loading: the shape is wrong on rank 1 alone, and rank 0's tensor stays as it was.
    state = {"w": torch.zeros(3 if rank == 0 else 4)}
    with raises(ValueError, "w: torch.float32 (3,) was saved, torch.float32 (4,) is wanted"):
        load(state, directory / "good")
    assert not state["w"].any()
    with raises(CheckpointError, "none"):
        load(state, directory / "none")
    dist.barrier()
    if rank == 0:
        path = next((directory / "good").glob("*_0.distcp"))
        path.write_bytes(path.read_bytes()[:-1])
    dist.barrier()
    state = {"w": torch.zeros(3)}
    with raises(CheckpointError, "truncated"):
        load(state, directory / "good")
    assert not state["w"].any()


def other_keys(rank: int, ranks: int, directory: Path) -> None:
    """A pipeline's stages: some keys on one rank alone, some on several, DTensors on other meshes."""

    def state(fill: bool) -> dict[str, Any]:
        wanted = {
            "everywhere": full(0, 8),
            f"stage-{rank // 2}": {"w": full(10 + rank // 2, 5)},
            f"rank-{rank}": {"generator": full(20 + rank, 3), "number": rank},
        }
        return wanted if fill else {
            key: {k: torch.zeros_like(v) if torch.is_tensor(v) else -1 for k, v in value.items()}
            if isinstance(value, dict) else torch.zeros_like(value)
            for key, value in wanted.items()
        }  # fmt: skip

    save(state(True), directory / "c")
    dist.barrier()
    verify(directory / "c")
    found = state(False)
    load(found, directory / "c")
    for key, value in state(True).items():
        for name, leaf in (value if isinstance(value, dict) else {"": value}).items():
            other = found[key][name] if name else found[key]
            assert torch.equal(other, leaf) if torch.is_tensor(leaf) else other == leaf, (key, name)
    # Nobody wants rank 0's: that is a fault on all ranks.
    del found["rank-0" if rank == 0 else "everywhere"]
    with raises(ValueError, "rank-0.number: unexpected" if rank == 0 else "does not fit"):
        load(found, directory / "c")


def parts_of_the_world(rank: int, ranks: int, directory: Path) -> None:
    """Two groups save at the same time, each its own checkpoint, with ranks of the group."""
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    mine = 0 if rank == 0 else 1
    name = f"group-{mine}"
    save({"group": mine, "w": full(mine, 4)}, directory / name, process_group=groups[mine])
    with raises(ValueError, "not a member"):
        save({}, directory / "x", process_group=groups[1 - mine])
    dist.barrier()
    state = {"group": -1, "w": torch.zeros(4)}
    load(state, directory / f"group-{1 - mine}", process_group=groups[mine])
    assert state["group"] == 1 - mine
    assert torch.equal(state["w"], full(1 - mine, 4))
    dist.barrier()
    only(directory, "group-0", "group-1")


# --- one process --------------------------------------------------------------------------------


def numbered(step: int, numbers: int = 4096) -> dict[str, Any]:
    return {"w": full(step, numbers), "v": full(step + 1, 64), "step": step}


def load_numbered(path: Path, numbers: int = 4096) -> int:
    """Loads such a checkpoint and checks that it is all of one step."""
    state = {"w": torch.zeros(numbers), "v": torch.zeros(64), "step": -1}
    load(state, path)
    step = state["step"]
    assert isinstance(step, int)
    assert torch.equal(state["w"], full(step, numbers))
    assert torch.equal(state["v"], full(step + 1, 64))
    return step


def disk_full(rank: int, ranks: int, directory: Path) -> None:
    """The disk is really full, at every stage of a save; DIRECTORY is a small file system."""
    fill_up(directory, lambda path: save(numbered(2), path))


def disk_full_behind(rank: int, ranks: int, directory: Path) -> None:
    """The same while training goes on: preparing, staging or writing fails."""
    with Checkpointer() as saving:
        stages = itertools.cycle(["now", "background"])

        def behind(path: Path) -> None:
            saving.async_save(numbered(2), path, stage=next(stages)).result()

        fill_up(directory, behind)


def fill_up(directory: Path, save_second: Callable[[Path], None]) -> None:
    save(numbered(1), directory / "step-1")
    set_latest(directory, "step-1")
    fill = directory / "fill"
    fill.touch()
    failed = saved = 0
    for free in range(0, 96, 4):
        with open(fill, "r+b") as stream:
            stream.truncate(0)
            space = os.statvfs(directory)
            stream.write(b"x" * (space.f_bavail * space.f_frsize - free * 1024))
        try:
            save_second(directory / "step-2")
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            failed += 1
            only(directory, "fill", "latest", "step-1")
        else:
            saved += 1
            assert load_numbered(directory / "step-2") == 2
            break
        assert latest(directory) == directory / "step-1"
        assert load_numbered(directory / "step-1") == 1
        with contextlib.suppress(OSError):
            set_latest(directory, "step-1")
        assert (directory / "latest").read_text() == "step-1\n"
    assert failed >= 5, "some saves failed, from the first file to the last"
    assert saved == 1, "and one did not"
    print(f"{failed} saves failed")


def remount(directory: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(directory)], check=True)


def read_only(rank: int, ranks: int, directory: Path) -> None:
    """DIRECTORY is a file system of its own, which becomes read-only between two saves."""
    with Checkpointer() as saving:
        saving.async_save(numbered(1), directory / "step-1", latest=True).result()
        remount(directory, "ro")
        for stage in ("now", "background"):
            with raises(OSError, "Read-only file system"):
                saving.async_save(numbered(2), directory / "step-2", stage=stage)
        with raises(OSError, "Read-only file system"):
            save(numbered(2), directory / "a" / "step-2")
        assert latest(directory) == directory / "step-1"
        assert load_numbered(directory / "step-1") == 1
        remount(directory, "rw")
        saving.async_save(numbered(2), directory / "step-2", latest=True).result()
        assert load_numbered(directory / "step-2") == 2


def read_only_amid(rank: int, ranks: int, directory: Path) -> None:
    """The same amid a save: once the data files are written, before the rename, and after it.

    While a file is open to be written the kernel refuses that: test_injected_faults.py has those moments.
    """
    save(numbered(1), directory / "step-1", latest=True)
    moments: list[tuple[Any, str]] = [
        (Manifest, "of"), (NewDirectory, "publish"), (root_module, "next_pointer"),
    ]  # fmt: skip
    for owner, name in moments:
        real = getattr(owner, name)

        def turned(*arguments: Any, real: Any = real, **options: Any) -> Any:
            remount(directory, "ro")
            return real(*arguments, **options)

        setattr(owner, name, turned)
        with raises(OSError, "Read-only file system", "" if rank == 0 else "rank 0: "):
            async_save(numbered(2), directory / "step-2", latest=True).result()
        setattr(owner, name, real)
        with raises(OSError, "Read-only file system", "" if rank == 0 else "rank 0: "):
            save(numbered(3), directory / "step-3")
        in_place = name == "next_pointer"
        assert (directory / "step-2").exists() == in_place
        hidden = [path.name for path in directory.iterdir() if path.name.startswith(".step-2.")]
        assert len(hidden) == (not in_place), hidden
        assert latest(directory) == directory / "step-1"
        assert load_numbered(directory / "step-1") == 1
        if in_place:
            assert load_numbered(directory / "step-2") == 2
        dist.barrier()
        if rank == 0:
            remount(directory, "rw")
        dist.barrier()
        save(numbered(2), directory / "step-2", overwrite=True)
        only(directory, "latest", "step-1", "step-2")
        dist.barrier()
        if rank == 0:
            remove(directory / "step-2")
        dist.barrier()


def file_too_large(rank: int, ranks: int, directory: Path) -> None:
    """The same with EFBIG, which needs no file system of its own."""
    save(numbered(1), directory / "step-1")
    sizes = sorted(path.stat().st_size for path in (directory / "step-1").iterdir())
    for limit in sorted({0, 1, 100, *(size - 1 for size in sizes)}):
        with largest_file(limit), raises(OSError, "File too large", ".step-2.saving-"):
            save(numbered(2), directory / "a" / "b" / "step-2")
        with largest_file(limit), raises(OSError, "File too large"):
            save(numbered(2), directory / "step-1", overwrite=True)
        only(directory, "step-1")
        assert load_numbered(directory / "step-1") == 1
    with largest_file(max(sizes)):
        save(numbered(2), directory / "step-1", overwrite=True)
    assert load_numbered(directory / "step-1") == 2


def kill_often(save_for_ever: Callable[[], None], check: Callable[[], None]) -> None:
    """Forks a process that saves until it is killed, forty times, and checks after each."""
    draw = random.Random(0)
    for _ in range(40):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever()
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.01, 0.08))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), status
        check()


def killed_while_saving(rank: int, ranks: int, directory: Path) -> None:
    save(numbered(0), directory / "step-0")
    set_latest(directory, "step-0")
    leftovers = 0

    def save_for_ever() -> None:
        path = latest(directory)
        assert path is not None
        step = read_values(path)["step"]
        while True:
            step += 1
            save(numbered(step), directory / f"step-{step}", overwrite=True)
            set_latest(directory, f"step-{step}")
            prune(directory, 2)

    def check() -> None:
        nonlocal leftovers
        hidden = [path for path in directory.iterdir() if path.name.startswith(".")]
        leftovers += any("saving" in path.name for path in hidden)
        path = latest(directory)
        assert path is not None
        assert path.name == f"step-{load_numbered(path)}"
        for path in directory.glob("step-*"):
            verify(path)

    kill_often(save_for_ever, check)
    assert leftovers > 0, "some were killed amid a save"
    save(numbered(7), directory / "last")
    assert not [path for path in directory.iterdir() if ".saving-" in path.name]
    print(f"{leftovers} of 40 killed amid a save")


def killed_while_replacing(rank: int, ranks: int, directory: Path) -> None:
    """The same target again and again: at every moment there is a whole one."""
    save(numbered(0), directory / "c")

    def save_for_ever() -> None:
        while True:
            for step in (1, 2):
                save(numbered(step), directory / "c", overwrite=True)

    kill_often(save_for_ever, lambda: print(load_numbered(directory / "c")))
    save(numbered(7), directory / "c", overwrite=True)
    only(directory, "c")


def scenario(rank: int, ranks: int, root: str, name: str) -> None:
    """One of the above; name: NAME, or NAME@DIRECTORY to be run in."""
    function, _, directory = name.partition("@")
    path = Path(root) / (directory or function)
    path.mkdir(exist_ok=True)
    globals()[function](rank, ranks, path)
