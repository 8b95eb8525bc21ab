from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from goku.data import (
    CachedDataset,
    DataConfig,
    DataError,
    Dataset,
    decode,
    decode_all,
    prepare,
    read_records,
)
from goku.data.decode import decode_record
from goku.data.filler import MENDED, Filler
from goku.data.listings import Listings
from goku.text import TextCache


@pytest.fixture
def config(folder: Path) -> DataConfig:
    return DataConfig(
        path=str(folder), image_pixels=64 * 96, video_pixels=48 * 64, max_frames=17, workers=0
    )


def contents(cache: Path, kind: str = "latents") -> dict[str, bytes]:
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted((cache / kind).rglob("*"))
        if path.is_file()
    }


def spoil(folder: Path) -> None:
    """One more item of every unusable kind."""
    (folder / "e.mp4").write_text("these are words")
    (folder / "f.png").touch()
    broken = bytearray((folder / "c.mp4").read_bytes())
    (folder / "g.mp4").write_bytes(broken[: len(broken) // 2])
    for stem in "efg":
        (folder / f"{stem}.txt").write_text(f"this is {stem}")
    shutil.copy(folder / "a.png", folder / "h.png")


def test_items_and_samples(tmp_path: Path, config: DataConfig, vae: Any, text: Any) -> None:
    done: list[tuple[int, int]] = []
    dataset = prepare(
        config,
        vae,
        text,
        cache_dir=tmp_path / "cache",
        progress=lambda count, total: done.append((count, total)),
    )
    assert done == [(i, 4) for i in range(1, 5)]
    assert len(dataset) == 4
    found = [(i.name, i.caption, i.modality, i.frames, i.height, i.width) for i in dataset.items]
    assert found == [
        # 80x120 is 2:3, the budget's own shape; 60x60 floors to 48; 96x128 is 3:4.
        ("a.png", "this is a", "image", 1, 64, 96),
        ("b.jpg", "this is b", "image", 1, 48, 48),
        ("c.mp4", "this is c", "video", 17, 48, 64),
        ("d.mkv", "this is d", "video", 5, 48, 48),
    ]
    assert [i.grid for i in dataset.items] == [(1, 4, 6), (1, 3, 3), (5, 3, 4), (2, 3, 3)]
    assert [i.tokens for i in dataset.items] == [24, 9, 60, 18]
    records = read_records(config.path)
    for index, item in enumerate(dataset.items):
        sample = dataset.read(index)
        pixels = decode(records[index], config)
        assert torch.equal(dataset.pixels(index), pixels)
        with torch.no_grad():
            expected = vae.encode(pixels[None].float() / 127.5 - 1)
        assert torch.equal(sample.mean, expected.mean[0])
        assert torch.equal(sample.logvar, expected.logvar[0])
        t, h, w = item.grid
        assert sample.mean.shape == (4, t, 2 * h, 2 * w)
        assert sample.mean.dtype == torch.float32
        assert torch.equal(sample.text, text.encode([item.caption])[0])
    assert dataset.empty_text.shape == (1, 8)
    assert dataset.skipped == ()


def test_the_second_time_nothing_is_done(
    tmp_path: Path, config: DataConfig, vae: Any, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    before = contents(tmp_path / "cache")
    assert len(before) == 4
    vae.encoded.clear()
    text.encoded.clear()

    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("goku.data.filler.decode_record", fail)
    cache = TextCache(tmp_path / "cache/text", text)
    second = prepare(config, vae, cache, cache_dir=tmp_path / "cache")
    assert second.items == first.items
    assert (vae.encoded, text.encoded) == ([], [])
    assert contents(tmp_path / "cache") == before


def test_the_worker_count_changes_nothing(
    tmp_path: Path, folder: Path, config: DataConfig, vae: Any, text: Any
) -> None:
    spoil(folder)
    config = replace(config, skip_bad=True)
    results = {}
    for workers in (0, 1, 3):
        cache = tmp_path / f"cache{workers}"
        dataset = prepare(replace(config, workers=workers), vae, text, cache_dir=cache)
        results[workers] = (dataset.items, dataset.skipped, contents(cache))
    assert results[1] == results[0]
    assert results[3] == results[0]


def test_only_what_changed_is_encoded_again(
    tmp_path: Path, folder: Path, config: DataConfig, vae: Any, text: Any
) -> None:
    def run(changed: DataConfig = config, with_vae: Any = vae) -> int:
        with_vae.encoded.clear()
        prepare(changed, with_vae, text, cache_dir=tmp_path / "cache")
        return len(with_vae.encoded)

    assert run() == 4
    (folder / "a.txt").write_text("another caption")
    assert run() == 0
    shutil.move(folder / "a.png", folder / "z.png")
    shutil.move(folder / "a.txt", folder / "z.txt")
    assert run() == 0
    Image.fromarray(np.zeros((80, 120, 3), np.uint8)).save(folder / "z.png")
    assert run() == 1
    assert run(replace(config, max_frames=9)) == 1
    assert run(replace(config, image_pixels=32 * 32)) == 2
    assert run(replace(config, fps=12.0)) == 2  # a picture has none
    assert run(with_vae=type(vae)("another")) == 4
    assert run() == 0


@pytest.mark.parametrize("how", ["truncate", "flip", "empty"])
def test_a_damaged_cache_file_is_made_anew(
    tmp_path: Path, config: DataConfig, vae: Any, text: Any, how: str
) -> None:
    cache = tmp_path / "cache"
    dataset = prepare(config, vae, text, cache_dir=cache)
    before = contents(cache)
    victim = cache / next(iter(before))
    content = bytearray(victim.read_bytes())
    content[-3] ^= 4
    damaged = {"truncate": content[:-9], "flip": content, "empty": bytearray()}
    victim.write_bytes(damaged[how])
    with pytest.raises(ValueError, match=f"cached latent {victim} is damaged"):
        [dataset.read(i) for i in range(4)]
    vae.encoded.clear()
    mended = prepare(config, vae, text, cache_dir=cache)
    assert mended.items == dataset.items
    assert len(vae.encoded) == 1
    assert contents(cache) == before
    new = [remark for remark in mended.report.remarks if remark not in dataset.report.remarks]
    assert [remark.text for remark in new] == [MENDED]
    assert prepare(config, vae, text, cache_dir=cache).report.remarks == dataset.report.remarks


@pytest.mark.parametrize("workers", [0, 2])
def test_all_bad_items_are_reported_at_once(
    tmp_path: Path, folder: Path, config: DataConfig, vae: Any, text: Any, workers: int
) -> None:
    spoil(folder)
    config = replace(config, workers=workers)
    with pytest.raises(DataError, match="4 of 8 items cannot be used") as error:
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
    reasons = {p.name: p.reason for p in error.value.problems}
    assert list(reasons) == ["h.png", "e.mp4", "f.png", "g.mp4"]
    assert "missing caption" in reasons["h.png"]
    assert "not a readable video" in reasons["e.mp4"]
    assert "empty (0 bytes)" in reasons["f.png"]
    assert "not a readable video" in reasons["g.mp4"]
    assert all(f"{name}: {reason}" in str(error.value) for name, reason in reasons.items())
    # What is there is whole: four latents, nothing partial.
    assert len(contents(tmp_path / "cache")) == 4
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]
    dataset = prepare(replace(config, skip_bad=True), vae, text, cache_dir=tmp_path / "cache")
    assert [item.name for item in dataset.items] == ["a.png", "b.jpg", "c.mp4", "d.mkv"]
    assert {p.name: p.reason for p in dataset.skipped} == reasons


def test_nothing_left_is_an_error_even_when_bad_items_are_skipped(
    tmp_path: Path, config: DataConfig, vae: Any, text: Any
) -> None:
    empty = tmp_path / "bad"
    empty.mkdir()
    (empty / "a.png").touch()
    (empty / "a.txt").write_text("x")
    bad = replace(config, path=str(empty), skip_bad=True)
    with pytest.raises(DataError, match="1 of 1 item cannot"):
        prepare(bad, vae, text, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="1 of 1 item cannot"):
        decode_all(read_records(empty), bad)


def test_vae_geometry_mismatch(tmp_path: Path, config: DataConfig, vae: Any, text: Any) -> None:
    vae.strides = (4, 16, 16)
    with pytest.raises(ValueError, match=r"VAE geometry mismatch: strides .*\(4, 16, 16\)"):
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
    vae.strides, vae.channels = (4, 8, 8), 5
    with pytest.raises(ValueError, match=r"VAE geometry mismatch: .*\(5, 1, 8, 12\) was expected"):
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert contents(tmp_path / "cache") == {}


def test_latents_that_are_not_finite_are_a_bad_item(
    tmp_path: Path, config: DataConfig, vae: Any, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = vae.encode

    def broken(video: torch.Tensor) -> Any:
        posterior = encode(video)
        if video.shape[2] == 17:
            posterior.logvar[0, 0, 0, 0, 0] = float("inf")
        return posterior

    monkeypatch.setattr(vae, "encode", broken)
    with pytest.raises(DataError, match=r"1 of 4 .*\n  c\.mp4: the VAE gave latents .* not finite"):
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert len(contents(tmp_path / "cache")) == 3


def run_ranks(
    config: DataConfig, cache: Path, world: int, make: Callable[[], tuple[Any, Any]]
) -> list[tuple[Any, Dataset | Exception]]:
    """`prepare` on `world` ranks at once, each a thread with its own VAE and encoder."""
    barrier = threading.Barrier(world, timeout=60)
    told: dict[int, Any] = {}
    results: dict[int, tuple[Any, Dataset | Exception]] = {}

    def work(rank: int) -> None:
        vae, text = make()

        def gather(value: Any) -> list[Any]:
            told[rank] = value
            barrier.wait()
            values = [told[r] for r in range(world)]
            barrier.wait()  # before one of them tells something else
            return values

        def from_main(work: Callable[[], Any]) -> Any:
            return gather(work() if rank == 0 else None)[0]

        try:
            dataset = prepare(
                config,
                vae,
                text,
                cache_dir=cache,
                rank=rank,
                world=world,
                gather=gather,
                listings=Listings(from_main),
            )
            results[rank] = (vae, dataset)
        except (ValueError, OSError) as error:
            results[rank] = (vae, error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_share_the_work_and_end_alike(
    tmp_path: Path, config: DataConfig, vae: Any, text: Any, world: int
) -> None:
    alone = prepare(config, vae, text, cache_dir=tmp_path / "alone")
    shapes = list(vae.encoded)
    ranks = run_ranks(config, tmp_path / "shared", world, lambda: (type(vae)(), type(text)()))
    for rank, (own_vae, dataset) in enumerate(ranks):
        assert isinstance(dataset, CachedDataset)
        assert own_vae.encoded == shapes[rank::world]
        assert dataset.items == alone.items
        assert torch.equal(dataset.read(2).mean, alone.read(2).mean)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_ranks_all_raise_the_same_error(
    tmp_path: Path, folder: Path, config: DataConfig, vae: Any, text: Any
) -> None:
    spoil(folder)
    ranks = run_ranks(config, tmp_path / "cache", 2, lambda: (type(vae)(), type(text)()))
    errors = [result for _, result in ranks]
    assert all(isinstance(error, DataError) for error in errors)
    assert str(errors[0]) == str(errors[1])


def test_ranks_need_a_way_to_tell_each_other(
    tmp_path: Path, config: DataConfig, vae: Any, text: Any
) -> None:
    with pytest.raises(ValueError, match="world 2: give `gather`"):
        prepare(config, vae, text, cache_dir=tmp_path, rank=1, world=2)
    with pytest.raises(ValueError, match="world 2: give `gather` and `listings`"):
        prepare(
            config, vae, text, cache_dir=tmp_path, rank=1, world=2, gather=lambda value: [value]
        )
    with pytest.raises(ValueError, match="rank 2 must be in 0"):
        prepare(config, vae, text, cache_dir=tmp_path, rank=2, world=2)


def test_several_may_fill_one_cache_at_once(
    tmp_path: Path, config: DataConfig, vae: Any, text: Any
) -> None:
    alone = prepare(config, vae, text, cache_dir=tmp_path / "alone")
    found: list[CachedDataset] = []

    def work() -> None:
        own = type(vae)(), type(text)()
        found.append(prepare(config, *own, cache_dir=tmp_path / "shared"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [dataset.items for dataset in found] == [alone.items] * 3
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_decode_all(folder: Path, config: DataConfig) -> None:
    records = read_records(folder)
    clips = decode_all(records, replace(config, workers=2))
    assert len(clips) == 4
    for (of, clip), record in zip(clips, records, strict=True):
        assert of == record
        assert clip.is_contiguous()
        assert torch.equal(clip, decode(record, config))
    spoil(folder)
    (folder / "h.txt").write_text("now with a caption")
    with pytest.raises(DataError, match="3 of 8 items") as error:
        decode_all(read_records(folder), config)
    assert [p.name for p in error.value.problems] == ["e.mp4", "f.png", "g.mp4"]
    left = decode_all(read_records(folder), replace(config, skip_bad=True))
    assert [record.name[0] for record, _ in left] == ["a", "b", "c", "d", "h"]
    assert all(torch.equal(clip, decode(record, config)) for record, clip in left)


def paint(path: Path, level: int) -> None:
    Image.fromarray(np.full((80, 120, 3), level, np.uint8)).save(path)


def test_a_file_replaced_while_it_is_read_is_a_bad_item(
    tmp_path: Path,
    folder: Path,
    config: DataConfig,
    vae: Any,
    text: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(record: Any, config: DataConfig) -> Any:
        result = decode_record(record, config)
        if record.name == "a.png":
            paint(folder / "a.png", 7)
        return result

    with monkeypatch.context() as patch:
        patch.setattr("goku.data.filler.decode_record", read)
        with pytest.raises(DataError, match=r"1 of 4 .*\n  a\.png: changed while it was read"):
            prepare(config, vae, text, cache_dir=tmp_path / "cache")
    again = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    afresh = prepare(config, vae, text, cache_dir=tmp_path / "afresh")
    assert torch.equal(again.read(0).mean, afresh.read(0).mean)


def test_a_file_replaced_after_it_was_read_does_not_lend_its_key(
    tmp_path: Path,
    folder: Path,
    config: DataConfig,
    vae: Any,
    text: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode = Filler._encode

    def late(filler: Any, record: Any, *result: Any) -> Any:
        if record.name == "a.png":
            paint(folder / "a.png", 7)
        return encode(filler, record, *result)

    with monkeypatch.context() as patch:
        patch.setattr(Filler, "_encode", late)
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
    again = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    afresh = prepare(config, vae, text, cache_dir=tmp_path / "afresh")
    assert torch.equal(again.read(0).mean, afresh.read(0).mean)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_a_bad_item(
    tmp_path: Path, folder: Path, config: DataConfig, vae: Any, text: Any
) -> None:
    (folder / "a.png").chmod(0)
    with pytest.raises(DataError, match=r"1 of 4 .*\n  a\.png: cannot be read: Permission denied"):
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
