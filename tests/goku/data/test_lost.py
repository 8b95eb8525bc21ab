"""Samples that go bad while training: made again from their media, or zeros with weight 0 and a line that says so."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from goku.batch import BatchBuilder
from goku.data import CachedDataset, DataConfig, DecodeError, Problem, prepare
from goku.flow import FlowConfig
from goku.lost import LostItems, TooManyLost
from goku.packing import PackingConfig
from goku.text import LazyTextEncoder, TextCache, TextConfig, load_text_encoder

Report = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def dataset(tmp_path: Path, folder: Path, vae: Any, text: Any) -> CachedDataset:
    config = DataConfig(path=str(folder), video_pixels=48 * 64, workers=0)
    vae.causal = False
    found = prepare(config, vae, text, cache_dir=tmp_path / "cache", frames=(0, -1))
    assert isinstance(found, CachedDataset)
    return found


def cached(dataset: CachedDataset, index: int) -> Path:
    assert dataset._filler is not None
    return dataset._filler.cache.path(dataset._entries[index].key)


def same(a: Any, b: Any) -> bool:
    return (
        all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("mean", "logvar", "text"))
        and set(a.frames) == set(b.frames)
        and all(torch.equal(a.frames[f], b.frames[f]) for f in a.frames)
    )


@pytest.mark.parametrize(
    ("how", "index"), [("removed", 0), ("removed", 2), ("damaged", 0), ("damaged", 2), ("frame", 2)]
)
def test_it_is_made_again_with_the_same_bits(
    tmp_path: Path, dataset: CachedDataset, vae: Any, how: str, index: int
) -> None:
    before, content = dataset.read(index), cached(dataset, index).read_bytes()
    victim = cached(dataset, index)
    if how == "frame":
        assert dataset._filler is not None
        victim = dataset._filler.cache.frame_path(dataset._entries[2].key, -1)
    if how == "removed":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-1] + b"\x7f")
    report: Report = []
    lost = LostItems(0, lambda kind, fields: report.append((kind, fields)))
    sample, usable = lost.read(dataset, index, vae, dataset.empty_text)
    assert usable
    assert same(sample, before)
    assert cached(dataset, index).read_bytes() == content
    assert [(kind, fields["name"]) for kind, fields in report] == [
        ("repaired", dataset.items[index].name)
    ]
    lost.read(dataset, index, vae, dataset.empty_text)
    assert (len(report), lost.count) == (1, 0)


def test_what_is_read_ahead_is_what_is_read_and_mends_nothing(
    dataset: CachedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = dataset._text
    assert text is not None

    def never(prompts: Any) -> Any:
        raise AssertionError("a thread must not load an encoder")

    monkeypatch.setattr(text.encoder, "encode", never)
    for index in range(len(dataset)):
        ahead = dataset.cached(index)
        assert ahead is not None
        assert same(ahead, dataset.read(index))
    cached(dataset, 0).unlink()
    victim = cached(dataset, 1)
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x7f")
    caption = text.path(dataset._entries[2].record.prompts[0])
    caption.write_bytes(caption.read_bytes()[:-1] + b"\x7f")
    assert dataset.cached(0) is None
    assert dataset.cached(1) is None
    assert dataset.cached(2) is None  # and warns of nothing, which pytest would raise
    caption.unlink()
    assert dataset.cached(2) is None
    assert not cached(dataset, 0).exists()


def test_media_that_are_gone_cost_the_item_and_no_more(
    tmp_path: Path, folder: Path, dataset: CachedDataset, vae: Any
) -> None:
    for index, name in ((0, "a.png"), (2, "c.mp4")):
        cached(dataset, index).unlink()
        (folder / name).unlink()
    report: Report = []
    set_aside: list[Problem] = []
    lost = LostItems(1, lambda *event: report.append(event), set_aside.append)
    for _ in range(2):
        for index in (0, 2):
            sample, usable = lost.read(dataset, index, vae, dataset.empty_text)
            t, h, w = dataset.items[index].grid
            assert not usable
            assert sample.mean.shape == sample.logvar.shape == (4, t, 2 * h, 2 * w)
            assert not sample.mean.any()
            assert set(sample.frames) == (set() if index == 0 else {0, -1})
            assert all(frame.shape == (4, 1, 2 * h, 2 * w) for frame in sample.frames.values())
    assert [kind for kind, _ in report] == ["lost", "lost"]
    assert [problem.name for problem in set_aside] == ["a.png", "c.mp4"]
    assert all("media file missing" in problem.reason for problem in set_aside)
    assert lost.read(dataset, 1, vae, dataset.empty_text)[1]
    lost.check({"a.png": "gone"})
    with pytest.raises(TooManyLost, match=r"2 items lost, over data\.max_lost = 1: a\.png: "):
        lost.check(lost.names)
    # Media that come back do not change the run that lost them.
    Image.fromarray(np.zeros((80, 120, 3), np.uint8)).save(folder / "a.png")
    assert not lost.read(dataset, 0, vae, dataset.empty_text)[1]


def test_other_media_are_not_taken_for_the_old(
    folder: Path, dataset: CachedDataset, vae: Any
) -> None:
    cached(dataset, 0).unlink()
    Image.fromarray(np.zeros((80, 120, 3), np.uint8)).save(folder / "a.png")
    with pytest.raises(DecodeError, match="changed since training began"):
        dataset.repair(0, vae)
    assert not LostItems(5).read(dataset, 0, vae, dataset.empty_text)[1]


def test_a_damaged_caption_leaves_no_encoder_in_memory(
    tmp_path: Path, folder: Path, vae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of gigabytes would stay beside the model that trains."""
    made: list[weakref.ref[Any]] = []
    full = False

    def load(config: TextConfig, **how: Any) -> Any:
        if full:
            raise RuntimeError("out of memory")
        encoder = load_text_encoder(config, **how)
        made.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr("goku.text.lazy.load_text_encoder", load)
    text = LazyTextEncoder(TextConfig(tiny_dim=8, tiny_heads=2))
    cache = TextCache(tmp_path / "cache/text", text)
    config = DataConfig(path=str(folder), video_pixels=48 * 64, workers=0)
    found = prepare(config, vae, cache, cache_dir=tmp_path / "cache")
    text.release()
    before = found.read(0)

    def damage() -> None:
        path = cache.path("this is a")
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")

    damage()
    with pytest.warns(UserWarning, match="is damaged"):
        sample, usable = LostItems(0).read(found, 0, vae, found.empty_text)
    assert usable
    assert same(sample, before)
    gc.collect()
    assert [reference() for reference in made] == [None, None]
    assert not text.loaded
    # What is in use stays.
    text.encode(["a prompt"])
    damage()
    with pytest.warns(UserWarning, match="is damaged"):
        assert same(found.read(0), before)
    assert text.loaded
    text.release()
    # Reads of one pack share it, whatever is nested; after them it is gone.
    loads = len(made)
    with found.reading():
        for _ in range(2):
            damage()
            with pytest.warns(UserWarning, match="is damaged"):
                assert same(found.read(0), before)
            assert text.loaded
    assert len(made) == loads + 1
    assert not text.loaded
    # Where there is no room for it, the item is lost and no more.
    full = True
    damage()
    lost = LostItems(1)
    packing = PackingConfig(tokens_per_step=1000, tokens_per_pack=1000)
    builder = BatchBuilder(found, vae, FlowConfig(), packing, 0, torch.device("cpu"), lost=lost)
    empty = found.empty_text
    # The empty prompt's embedding is asked for before the steps alone.
    cache.path("").unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        batch = builder.fixed([0, 1], [0.5, 0.5])
    assert batch.lost == (True, False)
    assert torch.equal(batch.text[: len(empty)], empty)
    assert "out of memory" in lost.names["a.png"]


def test_the_limit_is_a_number() -> None:
    with pytest.raises(ValueError, match="limit is -1; allowed: 0 or more"):
        LostItems(-1)
