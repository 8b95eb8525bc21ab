"""What the ranks of test_injected_faults.py do; started by tests/launch.py, with faults preloaded."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from errno import EIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from goku_runtime.checkpoint import (
    CheckpointOptions,
    async_save,
    latest,
    load,
    read_values,
    save,
    verify,
)

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages
from fault_injection import end, injected

# Data files of some 2 MB each in requests of 64 KiB, and a size that is no multiple of 4096: what is left
# of it is written by a call of its own, past O_DIRECT.
ROWS = 131_001
OPTIONS = CheckpointOptions(backend="threads", block_bytes=65536, window_bytes=262_144)
VICTIM = 1
FILE = f"__{VICTIM}_0.distcp"


def no_faults(rank: int, world: int) -> None:
    """The rule is shared by all processes that the library came into together, those of a run that failed, too."""
    end()


def state_of(step: int, rows: int = ROWS) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(step)
    return {
        "rows": distribute_tensor(torch.randn(rows, 8, generator=generator), mesh, [Shard(0)]),
        "copies": distribute_tensor(torch.randn(100, generator=generator), mesh, [Replicate()]),
        "step": step,
    }


def zeros(rows: int = ROWS) -> dict[str, Any]:
    state = state_of(0, rows)
    for name in ("rows", "copies"):
        state[name].to_local().zero_()
    return state | {"step": -1}


def check(path: Path, step: int, options: CheckpointOptions = OPTIONS, *, rows: int = ROWS) -> None:
    """The checkpoint is whole and holds this step, bit for bit."""
    state, wanted = zeros(rows), state_of(step, rows)
    load(state, path, options=options)
    assert state["step"] == step, state["step"]
    for name in ("rows", "copies"):
        assert torch.equal(state[name].to_local(), wanted[name].to_local()), name
    if dist.get_rank() == 0:
        verify(path, options=options)
    dist.barrier()


def only(root: Path, *names: str) -> None:
    dist.barrier()
    found = sorted(path.name for path in root.iterdir())
    assert found == sorted(names), found
    dist.barrier()


Save = Callable[[Any, Path, CheckpointOptions], None]


def now(state: Any, path: Path, options: CheckpointOptions) -> None:
    save(state, path, options=options)


def behind(state: Any, path: Path, options: CheckpointOptions) -> None:
    async_save(state, path, options=options, stage="background").result()


def in_windows(state: Any, path: Path, options: CheckpointOptions) -> None:
    less = replace(options, staging_bytes=2 * options.window_bytes)
    async_save(state, path, options=less, stage="background").result()


@contextmanager
def fails(code: int, path: str = "") -> Generator[None]:
    """What stands in it fails with this error on every rank.

    path: of the victim's file: then the error names it, and on the ranks that are well the victim.
    """
    caught: OSError | None = None
    try:
        yield
    except OSError as error:
        caught = error
    assert caught is not None, "no error"
    assert caught.errno == code, caught
    if path:
        prefix = "" if dist.get_rank() == VICTIM else f"rank {VICTIM}: "
        assert str(caught).startswith(f"[Errno {code}] {prefix}{os.strerror(code)}: '"), caught
        assert path in str(caught.filename), caught


def begun(root: str, name: str) -> Path:
    """A directory with a good checkpoint, which `latest` names."""
    directory = Path(root) / name
    save(state_of(1), directory / "good", latest=True, options=OPTIONS)
    return directory


def undamaged(directory: Path) -> None:
    """As `begun` left it, and it can be saved to again."""
    only(directory, "good", "latest")
    assert latest(directory) == directory / "good"
    check(directory / "good", 1)


def writes_of_one_save(directory: Path, options: CheckpointOptions) -> int:
    with injected("write", FILE, count=0) as faults:
        save(state_of(2), directory / "c", overwrite=True, options=options)
    dist.barrier()
    assert faults.changed == 0
    return faults.seen


# ---- saving


def data_file_fails(rank: int, world: int, root: str) -> None:
    """EIO and ENOSPC from the first, a middle and the last write of one rank's data file."""
    directory = begun(root, "fails")
    for direct in ("auto", "off"):
        options = replace(OPTIONS, direct=direct)
        writes = writes_of_one_save(directory.with_name(f"clean-{direct}"), options)
        assert writes > 30, writes
        for code in (EIO, errno.ENOSPC):
            for skip, method in ((0, now), (writes // 2, now), (writes // 2, behind),
                                 (writes // 2, in_windows), (writes - 1, behind)):  # fmt: skip
                with injected("write", FILE, error=code, skip=skip) as faults, fails(code, FILE):
                    method(state_of(2), directory / "c", options)
                assert faults.changed > 0
                undamaged(directory)
    save(state_of(2), directory / "c", options=OPTIONS)
    check(directory / "c", 2)


def no_room(rank: int, world: int, root: str) -> None:
    """The blocks of the data file cannot be reserved; where only that is not supported, it is not needed."""
    directory = begun(root, "room")
    for method in (now, behind, in_windows):
        code = errno.ENOSPC
        with injected("fallocate", FILE, error=code) as faults, fails(code, FILE):
            method(state_of(2), directory / "c", OPTIONS)
        assert faults.changed == 1
        undamaged(directory)
    with injected("fallocate", FILE, error=errno.EOPNOTSUPP) as faults:
        save(state_of(2), directory / "c", options=OPTIONS)
    assert faults.changed == 1
    check(directory / "c", 2)


def sync_fails(rank: int, world: int, root: str) -> None:
    """fsync of a data file fails once.

    Linux then drops what it could not write and lets the next fsync succeed: a save that tried again would
    name a checkpoint whose bytes are nowhere.
    """
    directory = begun(root, "sync")
    for backend in ("threads", "auto"):
        options = replace(OPTIONS, backend=backend)
        for method in (now, behind, in_windows):
            with injected("fsync", FILE, error=EIO, count=1) as faults, fails(EIO, FILE):
                method(state_of(2), directory / "c", options)
            assert (faults.seen, faults.changed) == (1, 1), "not again"
            undamaged(directory)
    with injected("fsync", FILE, count=0) as faults:
        save(state_of(2), directory / "c", options=OPTIONS)
    assert faults.seen == 1, "a good save hands it to the device, too"
    check(directory / "c", 2)


def nobody_catches(rank: int, world: int, root: str) -> None:
    """A training that does not expect it ends on every rank."""
    directory = begun(root, "uncaught")
    with injected("write", FILE, error=EIO, skip=10):
        save(state_of(2), directory / "c", options=OPTIONS)


def short_writes(rank: int, world: int, root: str) -> None:
    """Transfers that end early, are interrupted or asked to be made later: the same files, bit for bit."""
    directory = Path(root) / "short"
    names = [f"__{each}_0.{kind}" for each in range(world) for kind in ("distcp", "crc")]
    save(state_of(2), directory / "wanted", options=OPTIONS)
    for direct in ("auto", "off"):
        options = replace(OPTIONS, direct=direct)
        # Past the page cache blocks are written whole, of what the kernel says it has written.
        sizes = (4096, 5000, 53_248) if direct == "auto" else (1000, 4096, 65_535)
        changes: list[dict[str, int]] = [{"most": size} for size in sizes]
        changes += [{"error": code, "skip": 5, "count": 50} for code in (errno.EINTR, errno.EAGAIN)]
        for number, change in enumerate(changes):
            path = directory / f"{direct}-{number}"
            with injected("write", "_0.distcp", **change) as faults:
                (now, behind, in_windows)[number % 3](state_of(2), path, options)
            assert faults.changed >= 50, (faults.changed, change)
            for name in names:
                same = (path / name).read_bytes() == (directory / "wanted" / name).read_bytes()
                assert same, (name, direct, change)
            check(path, 2)


# ---- loading


def short_reads(rank: int, world: int, root: str) -> None:
    directory = begun(root, "reads")
    for direct in ("auto", "off"):
        options = replace(OPTIONS, direct=direct)
        # A direct read is cut within a block by the file's end alone.
        sizes = (4096, 53_248) if direct == "auto" else (1000, 4096, 65_535)
        changes: list[dict[str, int]] = [{"most": size} for size in sizes]
        changes += [{"error": code, "skip": 5, "count": 50} for code in (errno.EINTR, errno.EAGAIN)]
        for change in changes:
            with injected("read", "_0.distcp", **change) as faults:
                check(directory / "good", 1, options)
            assert faults.changed >= 50, (faults.changed, change)


def reading_fails(rank: int, world: int, root: str) -> None:
    """EIO from reads of a data file on the rank that needs it, and of each small file; later all is well."""
    directory = begun(root, "unreadable")
    good = directory / "good"
    for direct in ("auto", "off"):
        options = replace(OPTIONS, direct=direct)
        with injected("read", FILE, count=0) as counted:
            load(zeros(), good, options=options)
        for skip in (0, counted.seen // 2, counted.seen - 1):
            with injected("read", FILE, error=EIO, skip=skip) as faults, fails(EIO, FILE):
                load(zeros(), good, options=options)
            assert faults.changed > 0
        undamaged(directory)
    for name in ("manifest.json", "index.json", "state.json", f"__{VICTIM}_0.crc"):
        # The small ones are read by every rank, or by the first.
        with injected("read", f"/good/{name}", error=EIO) as faults, fails(EIO):
            load(zeros(), good, options=OPTIONS)
        assert faults.changed > 0, name
        undamaged(directory)
    with injected("read", FILE, error=EIO, skip=3), fails(EIO):
        verify(good, options=OPTIONS)
    undamaged(directory)


# ---- a file system that becomes read-only

FEW = 20_001  # rows: there are a hundred moments


def becomes_read_only(
    rank: int, world: int, root: str, overwrite: bool, pointer: bool, calls: str
) -> None:
    """At each call of a save in turn that changes the file system, it becomes read-only for all ranks."""
    directory = Path(root) / "read-only"
    good, target, following = (directory / name for name in ("good", "c", "following"))
    save(state_of(1, FEW), good, latest=pointer, options=OPTIONS)
    failed = left = in_place = skip = 0
    refused = True
    while refused:
        without(target, following)
        if overwrite:
            save(state_of(2, FEW), target, options=OPTIONS)
        with injected(calls, str(directory), error=errno.EROFS, skip=skip) as faults:
            error = error_of_save(target, skip, overwrite=overwrite, latest=pointer)
            dist.barrier()
            refused = faults.changed > 0
            dist.barrier()
            step = still_usable(directory, overwrite)
            left += any(".saving-" in name for name in os.listdir(directory))
        assert same_everywhere(error), error
        assert error is not None or step == 3, (skip, step)
        failed += error is not None
        in_place += error is not None and step == 3
        # Writable again: the next save clears up.
        save(state_of(4, FEW), following, options=OPTIONS)
        there = [] if step is None else ["c"]
        only(directory, "good", "following", *there, *(["latest"] if pointer else []))
        check(following, 4, rows=FEW)
        skip += 1
    print(f"{skip} moments: {failed} saves failed, {left} left something, {in_place} were in place")
    assert failed > 30
    assert left > 20
    assert in_place > 0 or not pointer


def without(*paths: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
    dist.barrier()


def error_of_save(path: Path, number: int, **how: Any) -> OSError | None:
    """Saves in one of the three ways."""
    state = state_of(3, FEW)
    try:
        if number % 3 == 0:
            save(state, path, options=OPTIONS, **how)
        else:
            how["stage"] = "now" if number % 3 == 1 else "background"
            async_save(state, path, options=OPTIONS, **how).result()
    except OSError as error:
        return error
    return None


def same_everywhere(error: OSError | None) -> bool:
    """All ranks are well, or all say that the file system is read-only."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, error and (error.errno, str(error)))
    words = os.strerror(errno.EROFS)
    refused = [each and each[0] == errno.EROFS and words in each[1] for each in every]
    return every == [None] * len(every) or all(refused)


def still_usable(directory: Path, overwrite: bool) -> int | None:
    """What is there is whole and loads, though nothing can be written; the step of the target."""
    check(directory / "good", 1, rows=FEW)
    target = directory / "c"
    step = int(read_values(target)["step"]) if target.exists() else None
    assert step in ((2, 3) if overwrite else (None, 3)), step
    if step is not None:
        check(target, step, rows=FEW)
    assert latest(directory) in (directory / "good", *([] if step is None else [target]))
    return step
