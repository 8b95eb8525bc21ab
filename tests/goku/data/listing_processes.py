"""What the processes of test_listings.py do; run by tests/launch.py."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import goku.data.listings
from goku.caching import cache_latents, cache_text
from goku.data import DataConfig, DataError, Dataset, MixConfig, SourceConfig, prepare
from goku.data.listings import Listings
from goku.parallelize import ParallelContext
from goku.prepare import unseen_data
from goku.validation import ValidationConfig

NAMES = ("a.png", "b.jpg", "c.mp4", "d.mkv")


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


def _config(path: str) -> DataConfig:
    return DataConfig(
        path=path, image_pixels=1024, video_pixels=1024, max_frames=5, workers=0, skip_bad=True
    )


def _mixed(path: str, image: float, video: float) -> DataConfig:
    mix = {"one": MixConfig(image=image, video=video)}
    return replace(_config(path), path=None, sources={"one": SourceConfig(path=path)}, mix=mix)


def _prepare(
    context: ParallelContext, config: DataConfig, cache: Path, listings: Listings | None = None
) -> Dataset:
    fixtures = _fixtures()
    return prepare(
        config, fixtures.FakeVAE(), fixtures.FakeText(),
        cache_dir=cache, rank=context.rank, world=context.world, gather=context.gather,
        listings=listings or Listings(context.from_main),
    )  # fmt: skip


def from_main(rank: int, world: int) -> None:
    """What rank 0 makes, whatever its size, or why it cannot: on all of them, and the others do no work."""
    context = _context(rank, world)
    done: list[str] = []

    def work() -> list[str]:
        done.append("here")
        return ["x" * 20_000_000, "end"]

    big, end = context.from_main(work)
    assert (len(big), end) == (20_000_000, "end")
    assert done == ["here"] * (rank == 0)
    assert context.from_main(lambda: None) is None

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kind, message = (OSError, "") if rank == 0 else (ValueError, "rank 0: .*")
    with pytest.raises(kind, match=f"{message}No space left on device"):
        context.from_main(full)
    assert context.from_main(lambda: rank) == 0


def main_rank_lists(rank: int, world: int, folder: str, cache: str) -> None:
    """One rank lists, once for all that is done with the items; the others get what it found, or why it found none."""
    context = _context(rank, world)
    listed: list[str] = []
    real = goku.data.listings.scan

    def counted(path: str, form: Any, **how: Any) -> Any:
        listed.append(path)
        return real(path, form, **how)

    goku.data.listings.scan = counted  # type: ignore[assignment]
    config: Any = SimpleNamespace(
        data=_config(folder), unseen=None, cache_folder=Path(cache),
        model=SimpleNamespace(condition="none"), validation=ValidationConfig(),
    )  # fmt: skip
    works: list[Callable[[], object]] = [
        lambda: _prepare(context, config.data, Path(cache)),
        lambda: cache_text(config, context, _fixtures().FakeText()),
        lambda: cache_latents(config, context, _fixtures().FakeVAE()),
    ]
    for work in works:
        listed.clear()
        work()
        assert listed == [folder] * (rank == 0)
    # Within one start, once.
    listed.clear()
    listings = Listings(context.from_main)
    for _ in range(2):
        dataset = _prepare(context, config.data, Path(cache), listings)
    assert listed == [folder] * (rank == 0)
    listings.forget()
    assert _prepare(context, config.data, Path(cache), listings).items == dataset.items
    assert listed == [folder, folder] * (rank == 0)
    # Held-out items of a mix are listed to see which modalities there are, and not again to take them.
    listed.clear()
    listings = Listings(context.from_main)
    run: Any = SimpleNamespace(data=_mixed(folder, 0, 1), unseen=folder)
    held = unseen_data(run, listings)
    assert held is not None
    assert held.mix == {"unseen": MixConfig(image=0, video=1)}
    assert [item.name for item in _prepare(context, held, Path(cache), listings).items] == [
        "c.mp4",
        "d.mkv",
    ]
    assert listed == [folder] * (rank == 0)
    # What is wrong with all of it.
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        _prepare(context, replace(config.data, path=f"{folder}/nowhere"), Path(cache))

    def unreadable(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), folder)

    goku.data.listings.scan = unreadable
    kind, message = (OSError, "") if rank == 0 else (ValueError, "rank 0: .*")
    with pytest.raises(kind, match=f"{message}Input/output error"):
        _prepare(context, config.data, Path(cache))
    goku.data.listings.scan = real


def own_files(rank: int, world: int, folder: str, cache: str) -> None:
    """Ranks with files of their own, as where each node has a copy: items are those that rank 0 lists. One that another
    rank alone lacks is a bad one; a rank that has other files altogether says so."""
    context = _context(rank, world)
    before, own, number = Path.cwd(), Path(f"{cache}-{rank}"), iter(range(99))
    shutil.copytree(folder, own)
    os.chdir(own)
    here = _config("/proc/self/cwd")  # one path on all, and files of its own behind it on each

    def prepared(config: DataConfig) -> Dataset:
        return _prepare(context, config, Path(f"{cache}-{rank}-{next(number)}"))

    def refused(match: str, config: DataConfig, by: Sequence[int] = (1,)) -> None:
        with pytest.raises(ValueError, match=match if rank in by else f"rank 1: .*{match}"):
            prepared(config)

    assert tuple(item.name for item in prepared(here).items) == NAMES
    if rank == 1:
        (own / "b.jpg").unlink()  # of its own share
        (own / "c.txt").write_text("another caption")
    dataset = prepared(here)
    assert [item.name for item in dataset.items] == ["a.png", "c.mp4", "d.mkv"]
    reason = "media file missing: No such file or directory"
    assert [(p.name, p.reason) for p in dataset.skipped] == [("b.jpg", reason)]
    assert dataset.entries[1].record.prompts == ("this is c",)  # type: ignore[attr-defined]
    assert len(set(context.gather(dataset.fingerprint()))) == 1
    with pytest.raises(DataError, match=rf"1 of 4 items cannot be used.*\n  b\.jpg: {reason}"):
        prepared(replace(here, skip_bad=False))
    # Another path, or another section.
    refused(
        r"\. is .*-\d here, where rank 0 lists .*-0; allowed: one dataset", _config("."), by=(1, 2)
    )
    other = _config("/proc/self/cwd/.") if rank != 1 else _config(f"{cache}-1")
    refused("-1 here, where rank 0 lists /proc/self/cwd; allowed: one dataset", other)
    mixed = _mixed("/proc/self/cwd", image=1, video=float(rank != 1))
    told = "of one listing the ranks take different items: rank 0 takes 4, rank 1 2; allowed: one data section"
    with pytest.raises(ValueError, match=told):
        prepared(mixed)
    # Other files.
    if rank == 1:
        for file in own.iterdir():
            file.unlink()
    refused("/proc/self/cwd: is empty here, where rank 0 lists 4 items; allowed: one dataset", here)
    rows = [json.dumps({"path": name, "text": name}) for name in NAMES]
    (own / "own.jsonl").write_text("\n".join(rows[: 3 if rank == 1 else 4]))
    table = replace(here, path="/proc/self/cwd/own.jsonl")
    sizes = [len("\n".join(rows[:n])) for n in (3, 4)]
    refused(f"own.jsonl has {sizes[0]} bytes here, where rank 0 lists {sizes[1]} bytes", table)
    if rank == 1:
        (own / "own.jsonl").unlink()
    refused("own.jsonl: no such file or folder; allowed: a folder", table)
    os.chdir(before)


def own_archives(rank: int, world: int, folder: str, cache: str) -> None:
    """Where each rank has a copy of the archives, it looks at those that it is to read: of its share."""
    context = _context(rank, world)
    before, own = Path.cwd(), Path(f"{cache}-{rank}")
    own.mkdir()
    os.chdir(own)
    for number in range(world + 2):
        with tarfile.open(own / f"{number}.tar", "w") as archive:
            picture = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), 40 * number, np.uint8)).save(picture, "PNG")
            for name, content in (("x.png", picture.getvalue()), ("x.txt", b"a picture")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    shards = replace(_config(f"/proc/self/cwd/{{0..{world + 1}}}.tar"), skip_bad=False)
    if rank == 1:
        (own / "0.tar").unlink()
    assert len(_prepare(context, shards, Path(cache))) == world + 2
    size = (own / "1.tar").stat().st_size
    if rank == 1:
        os.truncate(own / "1.tar", size - 512)
    words = f"1.tar has {size - 512} bytes here, where rank 0 lists {size} bytes; allowed: one"
    with pytest.raises(ValueError, match=words if rank == 1 else f"rank 1: .*{words}"):
        _prepare(context, shards, Path(cache))
    context.barrier()
    if rank == 1:
        (own / "1.tar").unlink()
    words = (
        f"1.tar cannot be reached .No such file or directory. here, where rank 0 lists {size} bytes"
    )
    with pytest.raises(ValueError, match=words if rank == 1 else f"rank 1: .*{words}"):
        _prepare(context, shards, Path(cache))
    os.chdir(before)
