"""What `prepare` can be asked for: limits, single frames, one cache of two, captions by number, a start by sizes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from goku.data import (
    DataConfig,
    DataError,
    Problem,
    Remark,
    SourceConfig,
    prepare,
)
from goku.data.filler import Filler
from goku.data.item_list import SourceItems
from goku.data.items import Item
from goku.data.latents import LatentCache


def names(dataset: Any) -> list[str]:
    return [item.name for item in dataset.items]


@pytest.mark.parametrize(
    ("limits", "kept", "reason"),
    [
        (
            {"min_image_pixels": 80 * 120},
            "acd",
            "60 x 60 = 3,600 pixels, fewer than min_image_pixels",
        ),
        ({"min_video_pixels": 64 * 64 + 1}, "abc", "64 x 64 = 4,096 pixels, fewer than min_video"),
        ({"min_frames": 8}, "abc", "7 frames, fewer than min_frames = 8"),
        ({"min_frames": 4, "fps": 12.0}, "abcd", ""),
        ({"min_frames": 5, "fps": 12.0}, "abc", "4 frames, fewer than min_frames = 5"),
    ],
)
def test_limits_drop_and_say_so(
    tmp_path: Path, plain: DataConfig, vae: Any, text: Any, limits: Any, kept: str, reason: str
) -> None:
    everything = prepare(plain, vae, text, cache_dir=tmp_path / "cache")
    for cache in ("cache", "other"):  # known from a run without limits, or new
        dataset = prepare(replace(plain, **limits), vae, text, cache_dir=tmp_path / cache)
        assert "".join(name[0] for name in names(dataset)) == kept
        assert [reason in d.reason for d in dataset.report.dropped] == [True] * (4 - len(kept))
        assert (dataset.report.listed, dataset.skipped) == (4, ())
    assert everything.report.dropped == ()
    high = replace(plain, min_image_pixels=10**6, min_video_pixels=10**6)
    with pytest.raises(DataError, match="nothing is left to train on; the limits dropped 4 of 4"):
        prepare(high, vae, text, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("seconds", "fps", "frames"),
    # 25 frames at 24 a second: frame n stands at n / 24. Then 4k+1 of them.
    [
        (None, None, 17),
        (0.5, None, 13),
        (0.49, None, 9),
        (0.5, 12.0, 5),
        (1 / 3, 12.0, 5),
        (9, 12.0, 13),
    ],
)
def test_max_seconds(
    tmp_path: Path, plain: DataConfig, vae: Any, text: Any, seconds: Any, fps: Any, frames: int
) -> None:
    config = replace(plain, max_seconds=seconds, fps=fps)
    dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert dataset.items[2].frames == frames
    whole = prepare(replace(plain, fps=fps), vae, text, cache_dir=tmp_path / "cache")
    assert torch.equal(dataset.pixels(2), whole.pixels(2)[:, :frames])


@pytest.mark.parametrize("causal", [True, False])
def test_single_frames(
    tmp_path: Path, plain: DataConfig, vae: Any, text: Any, causal: bool
) -> None:
    vae.causal = causal
    without = prepare(plain, vae, text, cache_dir=tmp_path / "cache")
    assert all(without.read(i).frames == {} for i in range(4))
    vae.encoded.clear()
    dataset = prepare(plain, vae, text, cache_dir=tmp_path / "cache", frames=(0, -1))
    assert dataset.fingerprint() == without.fingerprint()
    # Only what is lacking is encoded: of two clips the last frame, and the first where it is not the clip's own.
    assert len(vae.encoded) == (2 if causal else 4)
    for index, item in enumerate(dataset.items):
        sample = dataset.read(index)
        assert set(sample.frames) == (set() if item.frames == 1 else {0, -1})
        pixels = dataset.pixels(index).float() / 127.5 - 1
        for frame, mean in sample.frames.items():
            at = frame % item.frames
            with torch.no_grad():
                expected = vae.encode(pixels[None, :, at : at + 1]).mean[0]
            assert torch.equal(mean, expected)
    vae.encoded.clear()
    prepare(plain, vae, text, cache_dir=tmp_path / "cache", frames=(0, -1))
    assert vae.encoded == []
    # A damaged one is found and made again.
    victim = next((tmp_path / "cache/frames").rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    prepare(plain, vae, text, cache_dir=tmp_path / "cache", frames=(0, -1))
    assert len(vae.encoded) == 1
    with pytest.raises(ValueError, match="frames: 3 cannot be given; allowed are 0"):
        prepare(plain, vae, text, cache_dir=tmp_path / "cache", frames=(3,))


def test_one_cache_without_the_other(
    tmp_path: Path, plain: DataConfig, vae: Any, text: Any
) -> None:
    cache = tmp_path / "cache"
    done: list[int] = []
    words = prepare(
        plain, None, text, cache_dir=cache, latents=False, progress=lambda n, _: done.append(n)
    )
    assert (len(words), words.report.used, done) == (0, 4, [1, 2, 3, 4])
    assert (words.report.made, words.report.present) == (5, 0)  # with the empty prompt
    stored = sum(p.stat().st_size for p in (cache / "text").rglob("*.safetensors"))
    assert words.report.nbytes == stored
    assert not (cache / "latents").exists()
    latents = prepare(plain, vae, None, cache_dir=cache, texts=False)
    assert (latents.report.made, latents.report.present) == (4, 0)
    stored = sum(p.stat().st_size for p in (cache / "latents").rglob("*.safetensors"))
    assert latents.report.nbytes == stored
    with pytest.raises(ValueError, match="prepared without captions"):
        latents.read(0)
    text.encoded.clear()
    vae.encoded.clear()
    both = prepare(plain, vae, text, cache_dir=cache)
    assert (both.report.made, both.report.present) == (0, 4)
    assert (vae.encoded, text.encoded) == ([], [])
    with pytest.raises(ValueError, match="vae, text: None only where latents=False, texts=False"):
        prepare(plain, None, text, cache_dir=cache)


def test_every_caption_is_cached_and_read_by_number(
    tmp_path: Path, plain: DataConfig, folder: Path, vae: Any, text: Any
) -> None:
    rows = [{"path": "a.png", "text": ["one", {"text": "two", "weight": 3}], "motion": 2}]
    (folder / "metadata.jsonl").write_text(json.dumps(rows[0]) + "\n")
    config = replace(plain, motion_caption="{caption} motion score: {motion:.1f}")
    dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    (item,) = dataset.items
    two, one = "two motion score: 2.0", "one motion score: 2.0"
    assert (item.caption, item.captions, item.caption_weights) == (two, (two, one), (3.0, 1.0))
    assert sorted(text.encoded) == ["", one, two]
    for number, prompt in enumerate((two, one)):
        assert torch.equal(dataset.read(0, number).text, text.encode([prompt])[0])
    chosen = Counter(item.choose_caption(n / 1000) for n in range(1000))
    assert chosen == {0: 750, 1: 250}
    assert Item("n", "c", 1, 16, 16, (1, 1, 1), 1, "image", 1.0).choose_caption(0.99) == 0


@pytest.mark.parametrize("frames", [(), (-1,)])
def test_trusting_sizes(
    tmp_path: Path,
    plain: DataConfig,
    vae: Any,
    text: Any,
    monkeypatch: Any,
    frames: tuple[int, ...],
) -> None:
    cache = tmp_path / "cache"
    first = prepare(plain, vae, text, cache_dir=cache, frames=frames)
    quick = replace(plain, verify="size")
    vae.encoded.clear()

    def fail(*_: object) -> None:
        raise AssertionError("a latent was read whole")

    with monkeypatch.context() as patch:
        patch.setattr(LatentCache, "read", fail)
        patch.setattr(LatentCache, "read_frame", fail)
        again = prepare(quick, vae, text, cache_dir=cache, frames=frames)
    assert (again.items, again.fingerprint()) == (first.items, first.fingerprint())
    assert vae.encoded == []
    # A flipped bit is not seen at the start, and found when it is read; another size is seen at once.
    files = sorted((cache / "latents").rglob("*.safetensors"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    flipped = prepare(quick, vae, text, cache_dir=cache, frames=frames)
    with pytest.raises(ValueError, match="is damaged: its CRC-32"):
        [flipped.read(i) for i in range(4)]
    assert vae.encoded == []
    for content in (whole[:-1], whole + b"\0", b"", whole[:30], b"\xff" * len(whole)):
        files[0].write_bytes(content)
        prepare(quick, vae, text, cache_dir=cache, frames=frames)
        assert len(vae.encoded) == 1
        assert files[0].read_bytes() == whole
        vae.encoded.clear()


def test_duplicates_by_content(
    tmp_path: Path, plain: DataConfig, folder: Path, vae: Any, text: Any
) -> None:
    for stem, caption in (("x", "this is a"), ("y", "another")):
        shutil.copy(folder / "a.png", folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(caption)
    with pytest.raises(DataError, match="1 of 6 items") as error:
        prepare(plain, vae, text, cache_dir=tmp_path / "cache")
    reason = "duplicate of a.png (same content and caption)"
    assert error.value.problems == (Problem("x.png", reason, "duplicate"),)
    dataset = prepare(replace(plain, skip_bad=True), vae, text, cache_dir=tmp_path / "cache")
    assert names(dataset) == ["a.png", "b.jpg", "c.mp4", "d.mkv", "y.png"]
    assert Remark("y.png", "same content as a.png, with another caption") in dataset.report.remarks


def test_what_is_checked_counts_while_it_is(
    tmp_path: Path, plain: DataConfig, vae: Any, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = prepare(plain, vae, text, cache_dir=tmp_path / "cache")
    key = dataset.entries[1].key  # type: ignore[attr-defined]
    LatentCache(tmp_path / "cache").path(key).unlink()
    looked: list[str] = []
    real = Filler._cached

    def look(filler: Filler, record: Any) -> Any:
        looked.append(record.name)
        return real(filler, record)

    monkeypatch.setattr(Filler, "_cached", look)
    seen: list[tuple[int, int]] = []
    prepare(
        plain,
        vae,
        text,
        cache_dir=tmp_path / "cache",
        progress=lambda done, total: seen.append((done, len(looked))),
    )
    # b.jpg is made when all have been looked at; the others are counted as they are.
    assert seen == [(1, 1), (2, 3), (3, 4), (4, 4)]


def test_the_items_are_hashed_once_and_listed_with_their_geometries(
    tmp_path: Path, plain: DataConfig, vae: Any, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = SourceItems.fingerprint

    def counted(items: SourceItems) -> str:
        hashed.append(items.name)
        return real(items)

    monkeypatch.setattr(SourceItems, "fingerprint", counted)
    two = replace(
        plain, path=None, sources={name: SourceConfig(path=str(plain.path)) for name in ("x", "y")}
    )
    for config, names_ in ((plain, [""]), (two, ["x", "y"])):
        hashed.clear()
        dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
        assert dataset.fingerprint() == dataset.fingerprint()
        assert hashed == names_
        items = dataset.item_list()
        assert items.fingerprint() == dataset.fingerprint()
    (source, _) = items.sources
    entries = dataset.parts[0][1].entries  # type: ignore[attr-defined]
    assert source.geometries == [astuple(entry.geometry) for entry in entries]
