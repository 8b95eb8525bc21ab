"""Several sources, their mix and limits; single frames; parts of the caches; what the report says."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from goku.config import parse
from goku.data import (
    CachedDataset,
    DataConfig,
    DataError,
    Dropped,
    MixedDataset,
    MixedStream,
    Quarantine,
    Remark,
    ShuffledStream,
    list_records,
    prepare,
    quarantine_message,
)
from goku.data.listings import Listings
from goku.data.quarantine import read_quarantine
from goku.text import LazyTextEncoder, TextCache, TextConfig


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    """Three more pictures, of 32, 48 and 64 pixels square."""
    other = tmp_path / "extra"
    other.mkdir()
    for n, side in enumerate((32, 48, 64)):
        pixels = np.random.default_rng(n).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(other / f"{n}.png")
        (other / f"{n}.txt").write_text(f"picture {n}")
    return other


def several(plain: DataConfig, folder: Path, extra: Path, **fields: Any) -> DataConfig:
    sources = {"media": {"path": str(folder)}, "extra": {"path": str(extra)}}
    rest = {"image_pixels": plain.image_pixels, "video_pixels": plain.video_pixels, "workers": 0}
    return parse(DataConfig, {"sources": sources, **rest, **fields})


def names(dataset: Any) -> list[str]:
    return [item.name for item in dataset.items]


def test_a_plain_dataset_keeps_its_fingerprint_and_its_stream(
    tmp_path: Path, plain: DataConfig, vae: Any, text: Any
) -> None:
    dataset = prepare(plain, vae, text, cache_dir=tmp_path / "cache")
    assert isinstance(dataset, CachedDataset)
    keys = [entry.key for entry in dataset._entries]
    rows = [
        [item.name, item.caption, item.weight, key]
        for item, key in zip(dataset.items, keys, strict=True)
    ]
    assert dataset.fingerprint() == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert all((i.source, i.captions, i.caption_weights) == ("", (), ()) for i in dataset.items)
    stream, expected = dataset.stream(7), ShuffledStream(4, 7)
    assert [stream.item(p) for p in range(40)] == [expected.item(p) for p in range(40)]
    # Other captions are another dataset, even when the heaviest stays.
    (tmp_path / "media/metadata.jsonl").write_text(
        "".join(
            json.dumps({"path": i.name, "text": [{"text": i.caption, "weight": 2}, "other"]}) + "\n"
            for i in dataset.items
        )
    )
    again = prepare(plain, vae, text, cache_dir=tmp_path / "cache")
    assert [i.caption for i in again.items] == [i.caption for i in dataset.items]
    assert again.fingerprint() != dataset.fingerprint()


def test_several_sources_are_one_dataset(
    tmp_path: Path, plain: DataConfig, folder: Path, extra: Path, vae: Any, text: Any
) -> None:
    done: list[tuple[int, int]] = []
    dataset = prepare(
        several(plain, folder, extra),
        vae,
        text,
        cache_dir=tmp_path / "cache",
        progress=lambda count, total: done.append((count, total)),
    )
    assert isinstance(dataset, MixedDataset)
    assert done == [(n, 7) for n in range(1, 8)]
    media = [f"media:{name}" for name in ("a.png", "b.jpg", "c.mp4", "d.mkv")]
    assert names(dataset) == [*media, "extra:0.png", "extra:1.png", "extra:2.png"]
    assert [item.source for item in dataset.items] == ["media"] * 4 + ["extra"] * 3
    alone = prepare(replace(plain, path=str(extra)), vae, text, cache_dir=tmp_path / "cache")
    for index in range(3):
        for part in ("mean", "logvar", "text"):
            sample, expected = dataset.read(4 + index), alone.read(index)
            assert torch.equal(getattr(sample, part), getattr(expected, part))
        assert torch.equal(dataset.pixels(4 + index), alone.pixels(index))
    stream, expected_stream = dataset.stream(3), ShuffledStream(7, 3)
    assert [stream.item(p) for p in range(30)] == [expected_stream.item(p) for p in range(30)]
    assert torch.equal(dataset.empty_text, alone.empty_text)
    # One source by name has no prefix.
    one = parse(DataConfig, {"sources": {"extra": {"path": str(extra)}}, "workers": 0})
    assert names(prepare(one, vae, text, cache_dir=tmp_path / "cache")) == names(alone)


def test_damaged_captions_of_one_pack_share_an_encoder(
    tmp_path: Path, plain: DataConfig, folder: Path, extra: Path, vae: Any
) -> None:
    encoder = LazyTextEncoder(TextConfig(tiny_dim=8, tiny_heads=2))
    cache = TextCache(tmp_path / "cache/text", encoder)
    dataset = prepare(several(plain, folder, extra), vae, cache, cache_dir=tmp_path / "cache")
    before = [dataset.read(index).text for index in (0, 4)]
    encoder.release()
    for caption in ("this is a", "picture 0"):
        cache.path(caption).write_bytes(b"")
    with dataset.reading():
        for index, text in zip((0, 4), before, strict=True):
            with pytest.warns(UserWarning, match="is damaged"):
                assert torch.equal(dataset.read(index).text, text)
            assert encoder.loaded
    assert not encoder.loaded


def test_the_mix(
    tmp_path: Path, plain: DataConfig, folder: Path, extra: Path, vae: Any, text: Any
) -> None:
    mix = {"media": {"video": 2}, "extra": {"image": 1}}
    config = several(plain, folder, extra, mix=mix)
    dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert names(dataset) == ["media:c.mp4", "media:d.mkv", *(f"extra:{n}.png" for n in range(3))]
    # What has no weight is not decoded, and is counted.
    assert len(vae.encoded) == 5
    assert dataset.report.dropped == (
        Dropped("media:a.png", "mix.media gives images no weight"),
        Dropped("media:b.jpg", "mix.media gives images no weight"),
    )
    assert (dataset.report.listed, dataset.report.used) == (7, 5)
    stream = dataset.stream(0)
    assert isinstance(stream, MixedStream)
    drawn = Counter(dataset.items[stream.item(p)].modality for p in range(1024))
    assert drawn == {"video": 683, "image": 341}
    # The mix is part of what a run resumes.
    other = several(plain, folder, extra, mix={**mix, "extra": {"image": 2}})
    again = prepare(other, vae, text, cache_dir=tmp_path / "cache")
    assert (again.items, again.fingerprint()) != (dataset.items, dataset.fingerprint())
    assert again.items == dataset.items
    one = several(plain, folder, extra, mix={"extra": {"image": 1}})
    assert names(prepare(one, vae, text, cache_dir=tmp_path / "cache")) == [
        f"extra:{n}.png" for n in range(3)
    ]


def test_a_group_without_items_is_refused(
    tmp_path: Path, plain: DataConfig, folder: Path, extra: Path, vae: Any, text: Any
) -> None:
    config = several(plain, folder, extra, mix={"extra": {"image": 1, "video": 1}})
    with pytest.raises(DataError, match=r"mix\.extra\.video is 1, but the source has no video"):
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
    config = several(plain, folder, extra, mix={"media": {"video": 1}}, min_video_pixels=10**6)
    with pytest.raises(DataError, match=r"nothing is left.*dropped 4 of 4.*96 x 128 = 12,288"):
        prepare(config, vae, text, cache_dir=tmp_path / "cache")


def test_a_clip_of_one_frame_counts_as_an_image(
    tmp_path: Path,
    folder: Path,
    plain: DataConfig,
    write_video: Any,
    gradient: Any,
    vae: Any,
    text: Any,
) -> None:
    write_video(folder / "e.mp4", gradient(2, 32, 48))
    (folder / "e.txt").write_text("short")
    config = parse(
        DataConfig,
        {
            "sources": {"m": {"path": str(folder)}},
            "mix": {"m": {"video": 1}},
            "workers": 0,
            "video_pixels": plain.video_pixels,
        },
    )
    for _ in range(2):  # decoded, then from the plans
        vae.encoded.clear()
        dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
        assert names(dataset) == ["c.mp4", "d.mkv"]
        assert Dropped("e.mp4", "mix.m gives images no weight") in dataset.report.dropped
    both = prepare(plain, vae, text, cache_dir=tmp_path / "cache")
    assert both.items[-1].modality == "image"
    assert both.report.remarks == (Remark("e.mp4", "has 2 usable frames: trained as an image"),)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_several_sources(
    tmp_path: Path, plain: DataConfig, folder: Path, extra: Path, vae: Any, text: Any, world: int
) -> None:
    config = several(plain, folder, extra, mix={"media": {"video": 1}, "extra": {"image": 1}})
    alone = prepare(config, vae, text, cache_dir=tmp_path / "alone", frames=(-1,))
    barrier = threading.Barrier(world, timeout=60)
    found: dict[int, Any] = {}
    told: dict[int, Any] = {}

    def work(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            told[rank] = value
            barrier.wait()
            values = [told[r] for r in range(world)]
            barrier.wait()  # before one of them tells something else
            return values

        def from_main(work: Callable[[], Any]) -> Any:
            return gather(work() if rank == 0 else None)[0]

        own = type(vae)(), type(text)()
        found[rank] = prepare(
            config,
            *own,
            cache_dir=tmp_path / "shared",
            rank=rank,
            world=world,
            gather=gather,
            listings=Listings(from_main),
            frames=(-1,),
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for dataset in found.values():
        assert dataset.items == alone.items
        assert dataset.fingerprint() == alone.fingerprint()
        assert torch.equal(dataset.read(0).frames[-1], alone.read(0).frames[-1])
    assert sum(dataset.report.made for dataset in found.values()) == 5


def test_problems_name_their_source(
    tmp_path: Path, plain: DataConfig, folder: Path, extra: Path, vae: Any, text: Any
) -> None:
    (extra / "9.png").touch()
    (extra / "9.txt").write_text("nothing")
    (folder / "b.txt").unlink()
    config = several(plain, folder, extra)
    with pytest.raises(DataError, match=r"data\.sources: 2 of 8 items cannot be used"):
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match="1 of 8 items"):
        list_records(config)
    config = replace(config, skip_bad=True)
    assert len(list_records(config)) == 7  # the empty file is seen when it is opened
    dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert [(p.name, p.source, p.kind) for p in dataset.skipped] == [
        ("media:b.jpg", "media", "caption"),
        ("extra:9.png", "extra", "damaged"),
    ]
    file = tmp_path / "out/quarantine.jsonl"
    for _ in range(2):
        Quarantine(file, "joint").add(dataset.skipped)
    assert Quarantine(file, "tune").add(dataset.skipped[:1]) == 1
    rows = read_quarantine(file)
    assert [(row["stage"], row["source"], row["name"]) for row in rows] == [
        ("joint", "media", "media:b.jpg"),
        ("joint", "extra", "extra:9.png"),
        ("tune", "media", "media:b.jpg"),
    ]
    assert all(set(row) == {"time", "stage", "source", "name", "kind", "reason"} for row in rows)
    # A line that a kill cut off costs itself alone.
    file.write_bytes(file.read_bytes()[:-9])
    assert Quarantine(file, "tune").add(dataset.skipped[:1]) == 1
    assert len(read_quarantine(file)) == 3
    message = quarantine_message(dataset.skipped, 8, file)
    assert message == f"2 of 8 items are quarantined (caption 1, damaged 1): see {file}"
    assert quarantine_message((), 8, file) == ""


def test_a_source_of_which_nothing_is_left_is_refused(
    tmp_path: Path, plain: DataConfig, folder: Path, extra: Path, vae: Any, text: Any
) -> None:
    for file in extra.glob("*.png"):
        file.write_bytes(b"")
    config = several(plain, folder, extra, skip_bad=True)
    with pytest.raises(DataError, match="extra: none of 3 items can be used"):
        prepare(config, vae, text, cache_dir=tmp_path / "cache")
