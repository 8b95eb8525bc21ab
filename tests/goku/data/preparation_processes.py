"""What the processes of test_preparation_processes.py do; run by tests/launch.py."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import goku.caching
import goku.data.filler
from goku.caching import cache_latents
from goku.data import DataConfig, Dataset, DecodeError, prepare
from goku.data.latents import LatentCache
from goku.data.listings import Listings
from goku.metrics import RunLog, read_log
from goku.parallelize import ParallelContext
from goku.prepare import _check_equal


def _fixtures() -> ModuleType:
    path = Path(__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("data_fixtures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _context(rank: int, world: int) -> ParallelContext:
    group = dist.group.WORLD
    return ParallelContext(rank, world, torch.device("cpu"), group, group)


def _config(folder: str) -> DataConfig:
    return DataConfig(
        path=folder, image_pixels=1024, video_pixels=1024, max_frames=5, workers=0, skip_bad=True
    )


def _prepare(context: ParallelContext, config: DataConfig, cache: Path, **how: Any) -> Dataset:
    fixtures = _fixtures()
    return prepare(
        config, fixtures.FakeVAE(), fixtures.FakeText(),
        cache_dir=cache, rank=context.rank, world=context.world, gather=context.gather,
        listings=Listings(context.from_main), **how,
    )  # fmt: skip


class _Failing:
    """In place of `identify_and_decode`: this process cannot read some items. Counts what it tries."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.tried = names, list[str]()
        self.real = goku.data.filler.identify_and_decode
        goku.data.filler.identify_and_decode = self

    def __call__(self, config: DataConfig, cache: str, record: Any) -> Any:
        self.tried.append(record.name)
        if record.name in self.names:
            return DecodeError(record.path, "cannot be read: Input/output error")
        return self.real(config, cache, record)

    def end(self) -> None:
        goku.data.filler.identify_and_decode = self.real


def unreadable_for_one(rank: int, world: int, folder: str, cache: str) -> None:
    """The last rank reads neither c.mp4 nor d.mkv. What its owner makes of an item holds for all."""
    context = _context(rank, world)
    owners = {"a.png": 0, "b.jpg": 1 % world, "c.mp4": 2 % world, "d.mkv": 3 % world}
    last = world - 1
    failing = _Failing(("c.mp4", "d.mkv") if rank == last else ())
    done: list[tuple[int, int]] = []
    for attempt in range(2):
        failing.tried.clear()
        done.clear()
        dataset = _prepare(
            context, _config(folder), Path(cache), checking=lambda *at: done.append(at)
        )
        kept = [name for name, owner in owners.items() if owner != last or name < "c"]
        assert [item.name for item in dataset.items] == kept
        assert [p.name for p in dataset.skipped] == [n for n in owners if n not in kept]
        assert all("Input/output error" in problem.reason for problem in dataset.skipped)
        # Nobody tries what another rank has tried, good or bad; at a warm start, the bad alone.
        mine = [name for name, owner in owners.items() if owner == rank]
        assert failing.tried == (mine if attempt == 0 else [n for n in mine if n not in kept])
        others = [name for name in kept if owners[name] != rank]
        assert done == [(i + 1, 4 - len(mine)) for i in range(len(others))]
        assert len(set(context.gather(dataset.fingerprint()))) == 1
    failing.end()


def whole_share_alone(rank: int, world: int, folder: str, cache: str) -> None:
    """With verify "full" a rank reads its own share whole, and of a cache that all share no other file."""
    context = _context(rank, world)
    _prepare(context, _config(folder), Path(cache))
    reads: list[str] = []
    real = LatentCache.read

    def read(self: LatentCache, key: str) -> Any:
        reads.append(key)
        return real(self, key)

    looks: list[str] = []
    looked = LatentCache.valid

    def valid(self: LatentCache, key: str, *arguments: Any, **how: Any) -> bool:
        looks.append(key)
        return looked(self, key, *arguments, **how)

    LatentCache.read, LatentCache.valid = read, valid  # type: ignore[method-assign]
    dataset = _prepare(context, _config(folder), Path(cache))
    share = [entry.key for entry in dataset.entries[rank::world]]  # type: ignore[attr-defined]
    assert len(dataset) == 4
    assert reads == share
    assert looks == share
    # Where the folder cannot be told from others the headers of the others' files are looked at.
    if rank == 1:
        LatentCache.folder_id = lambda self: None  # type: ignore[method-assign]
    dataset = _prepare(context, _config(folder), Path(cache))
    LatentCache.read, LatentCache.valid = real, looked  # type: ignore[method-assign]
    assert sorted(looks[len(share) :]) == sorted(e.key for e in dataset.entries)  # type: ignore[attr-defined]
    assert reads == share + share


def own_caches(rank: int, world: int, folder: str, cache: str) -> None:
    """Caches that are not shared are filled by each rank, and what one cannot make ends all of them by name."""
    context = _context(rank, world)
    own = Path(cache) / str(rank)
    dataset = _prepare(context, _config(folder), own)
    assert len(dataset) == 4
    assert len(set(context.gather(dataset.fingerprint()))) == 1
    # A copy is no shared folder, though it has everything of it.
    if rank == 1:
        shutil.rmtree(own)
        shutil.copytree(own.with_name("0"), own)
        shutil.rmtree(own / "latents")
    context.barrier()
    dataset = _prepare(context, _config(folder), own)
    assert len(dataset) == 4
    for index in range(4):
        dataset.read(index)
    context.barrier()
    shutil.rmtree(own)
    failing = _Failing(("a.png",) if rank == 1 else ())
    with pytest.raises(ValueError, match=r"a\.png: another rank has cached .* Input/output error"):
        context.together(lambda: _prepare(context, _config(folder), own))
    failing.end()


def disk_full(rank: int, world: int, folder: str, cache: str) -> None:
    """A rank that cannot write says so at once, and then all ranks raise."""
    context = _context(rank, world)
    real = LatentCache.write

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def slow(*arguments: Any) -> None:
        time.sleep(0.5)  # the other one has long failed
        print(f"rank {rank} has worked on", flush=True)
        real(*arguments)

    LatentCache.write = full if rank == 1 else slow  # type: ignore[assignment, method-assign]
    kind, message = OSError if rank == 1 else ValueError, "No space left on device"
    with pytest.raises(kind, match=message if rank == 1 else f"rank 1: .*{message}"):
        context.together(lambda: _prepare(context, _config(folder), Path(cache)))
    LatentCache.write = real  # type: ignore[method-assign]


def progress_of_all(rank: int, world: int, folder: str, cache: str) -> None:
    """The main rank shows what all ranks have cached, also while it has nothing left to do but to wait for them."""
    context = _context(rank, world)
    config: Any = SimpleNamespace(
        data=_config(folder), unseen=None, cache_folder=Path(cache),
        model=SimpleNamespace(condition="none"),
    )  # fmt: skip
    seen, told = Path(f"{cache}-seen"), list[tuple[int, str]]()
    write, progress, every = LatentCache.write, RunLog.progress, goku.caching._EVERY
    left = len(range(rank, 4, world)) if rank == world - 1 else 0

    def slow(*arguments: Any) -> None:
        nonlocal left
        left -= 1
        time.sleep(0.1)
        until = time.monotonic() + 60
        while left == 0 and not seen.exists():  # the last of all items, until the others are shown
            assert time.monotonic() < until
            time.sleep(0.01)
        write(*arguments)

    def shown(log: RunLog, step: int, info: str) -> None:
        told.append((step, log._what))
        if step == 3:
            seen.touch()
        progress(log, step, info)

    LatentCache.write, RunLog.progress = slow, shown  # type: ignore[assignment, method-assign]
    goku.caching._EVERY = 0.02
    summary = cache_latents(config, context, _fixtures().FakeVAE())
    LatentCache.write, RunLog.progress = write, progress  # type: ignore[method-assign]
    goku.caching._EVERY = every
    assert (summary.items, summary.made) == (4, 4)
    steps = [step for step, _ in told]
    if rank > 0:
        assert steps == []
        return
    assert steps == sorted(set(steps))
    assert steps[-2:] == [3, 4]
    assert {what for _, what in told} == {f"latents of {world} ranks"}
    (event,) = read_log(Path(cache) / "latents.jsonl")
    assert (event["event"], event["step"], event["total"]) == ("cache", 4, 4)
    assert threading.active_count() == 1


def guarded(rank: int, world: int) -> None:
    """However it came to be: ranks with different items do not begin to train."""
    context = _context(rank, world)
    _check_equal(SimpleNamespace(fingerprint=lambda: "same"), context)  # type: ignore[arg-type]
    mine = SimpleNamespace(fingerprint=lambda: "same" if rank != 1 else "other")
    with pytest.raises(ValueError, match="rank 1: the items differ from those of rank 0"):
        _check_equal(mine, context)  # type: ignore[arg-type]
