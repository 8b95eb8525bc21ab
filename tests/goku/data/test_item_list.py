"""A run that goes on has the items that it began with: none less, none more, none other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from goku.config import parse
from goku.data import DataConfig, DataError, Dataset, DecodeError, ItemList, Problem, prepare
from goku.data.filler import FROM_CACHE
from goku.data.item_list import LEFT_OUT
from goku.lost import LostItems

NAMES = ["a.png", "b.jpg", "c.mp4", "d.mkv"]


@pytest.fixture
def folder(tmp_path: Path, write_dataset: Callable[[Path], Path]) -> Path:
    folder = write_dataset(tmp_path / "media")
    table(folder, NAMES)
    return folder


@pytest.fixture
def config(folder: Path) -> DataConfig:
    return DataConfig(
        path=str(folder), image_pixels=1024, video_pixels=1024, max_frames=5, workers=0,
        skip_bad=True,
    )  # fmt: skip


def table(folder: Path, files: list[str], **captions: Any) -> None:
    """The dataset's listing: files that are not listed are not in it, and files that are not there stay listed."""
    rows = [{"path": name, "text": captions.get(name[0], f"this is {name[0]}")} for name in files]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def get(tmp_path: Path, config: DataConfig, vae: Any, text: Any) -> Callable[..., Any]:
    """get(items=None, **changes) -> what `prepare` gives now."""

    def prepared(items: ItemList | None = None, **changes: Any) -> Dataset:
        changed = replace(config, **changes)
        return prepare(changed, vae, text, cache_dir=tmp_path / "cache", items=items)

    return prepared


def forget(cache: Path, dataset: Any, name: str) -> None:
    """Remove the item's latent."""
    index = [item.name for item in dataset.items].index(name)
    (cache / "latents" / dataset.entries[index].key[:2]).joinpath(
        f"{dataset.entries[index].key}.safetensors"
    ).unlink()


def names(dataset: Dataset) -> list[str]:
    return [item.name for item in dataset.items]


def test_written_and_read_it_is_the_same(tmp_path: Path, folder: Path, get: Any) -> None:
    pair = [{"text": "größer", "weight": 3}, "two"]
    table(folder, NAMES, a=pair)
    dataset = get()
    path = tmp_path / "items.json.gz"
    assert ItemList.read(path) is None
    dataset.item_list().write(path)
    first = path.read_bytes()
    found = ItemList.read(path)
    assert found is not None
    assert found.fingerprint() == dataset.fingerprint()
    assert found.differences(dataset.item_list()) == []
    assert names(get(found)) == NAMES
    dataset.item_list().write(path)
    assert path.read_bytes() == first
    assert list(tmp_path.glob(".partial*")) == []
    for damaged in (b"", first[:-9], b"not gzip", first[:20] + b"\0\0\0" + first[23:]):
        path.write_bytes(damaged)
        assert ItemList.read(path) is None


def test_media_that_are_gone_are_not_needed_while_the_latent_is_there(
    tmp_path: Path, folder: Path, get: Any, vae: Any
) -> None:
    before = get()
    latents = [before.read(i).mean for i in range(4)]
    (folder / "c.mp4").unlink()
    (folder / "a.png").unlink()
    vae.encoded.clear()
    for items in (None, before.item_list()):
        after = get(items)
        assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
        assert (after.skipped, after.lost, vae.encoded) == ((), {}, [])
        assert [torch.equal(after.read(i).mean, latents[i]) for i in range(4)] == [True] * 4
        assert [(r.name, r.text) for r in after.report.remarks if r.text.endswith(FROM_CACHE)] == [
            (
                name,
                f"its media file cannot be reached (No such file or directory): {FROM_CACHE}",
            )
            for name in ("a.png", "c.mp4")
        ]
    # With another geometry nothing is cached.
    assert names(get(max_frames=1)) == ["b.jpg", "d.mkv"]


def test_damaged_media_are_not_needed_either(folder: Path, get: Any) -> None:
    before = get()
    (folder / "b.jpg").write_bytes(b"")
    assert names(get()) == ["a.png", "c.mp4", "d.mkv"]
    after = get(before.item_list())
    assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
    assert (after.skipped, after.lost) == ((), {})
    assert torch.equal(after.read(1).mean, before.read(1).mean)
    assert f"b.jpg: the file is empty (0 bytes): {FROM_CACHE}" in map(str, after.report.remarks)


def test_an_item_that_cannot_be_had_keeps_its_place(
    tmp_path: Path, folder: Path, get: Any, vae: Any
) -> None:
    before = get()
    sample = before.read(2)
    forget(tmp_path / "cache", before, "c.mp4")
    shutil.move(folder / "c.mp4", tmp_path / "c.mp4")
    items = before.item_list()
    assert get().fingerprint() != before.fingerprint()
    after = get(items)
    assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
    problem = Problem("c.mp4", "media file missing: No such file or directory")
    assert (after.skipped, after.lost) == ((problem,), {2: problem})
    assert (after.report.listed, after.report.used) == (4, 3)
    for attempt in (after.read, after.pixels, lambda i: after.repair(i, vae)):
        with pytest.raises(DecodeError, match=r"c\.mp4: media file missing"):
            attempt(2)
    told: list[str] = []
    set_aside: list[Problem] = []
    lost = LostItems(
        1, lambda kind, fields: told.append(f"{kind} {fields['name']}"), set_aside.append
    )
    zeros, usable = lost.read(after, 2, vae, after.empty_text)
    assert (usable, zeros.mean.shape, told) == (False, sample.mean.shape, ["lost c.mp4"])
    assert all(lost.read(after, i, vae, after.empty_text)[1] for i in (0, 1, 3))
    assert set_aside == [problem]  # whose line it has
    # Another fault is another line.
    changed = get(items)
    (folder / "c.mp4").write_bytes(b"")
    LostItems(1, quarantine=set_aside.append).read(changed, 2, vae, changed.empty_text)
    assert [(p.name, "is empty" in p.reason) for p in set_aside[1:]] == [("c.mp4", True)]
    (folder / "c.mp4").unlink()
    # More of them than may be lost, or where none may be left out: refused, by name.
    with pytest.raises(DataError, match=r"1 item of the run lost, over .* = 0\n  c\.mp4: "):
        get(items, max_lost=0)
    with pytest.raises(DataError, match=r"1 of 4 items cannot be used; .*\n  c\.mp4: media file"):
        get(items, skip_bad=False)
    # It may come back while the run goes on.
    again = get(items)
    shutil.move(tmp_path / "c.mp4", folder / "c.mp4")
    found, usable = LostItems(0).read(again, 2, vae, again.empty_text)
    assert usable
    assert torch.equal(found.mean, sample.mean)
    assert again.lost == {}


def test_an_item_that_is_listed_no_more_is_not_trained_on(folder: Path, get: Any, vae: Any) -> None:
    before = get()
    table(folder, ["a.png", "c.mp4", "d.mkv"])
    after = get(before.item_list())
    assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
    assert after.skipped == (Problem("b.jpg", "is no longer listed", "listing"),)
    assert (after.report.listed, after.report.used) == (4, 3)
    # Its latent is there: who takes an item out of a dataset does not want it used.
    assert not LostItems(1).read(after, 1, vae, after.empty_text)[1]
    with pytest.raises(DataError, match=r"1 of 4 items cannot be used; .*\n  b\.jpg: is no longer"):
        get(before.item_list(), skip_bad=False)


def test_a_file_that_is_gone_from_a_folder_is_listed_no_more(folder: Path, get: Any) -> None:
    """The files themselves are the list: none tells one that was lost from one that was taken out."""
    (folder / "metadata.jsonl").unlink()
    before = get(skip_bad=False)
    (folder / "a.png").unlink()
    (folder / "e.png").write_bytes(b"")
    (folder / "e.txt").write_text("bad")
    with pytest.raises(DataError) as error:
        get(before.item_list(), skip_bad=False)
    assert str(error.value) == (
        f"{folder}: 1 of 5 items cannot be used; the run began with 1 of them: put back what is missing, or "
        "data.skip_bad: true goes on with weight 0 in its place\n  a.png: is no longer listed"
    )
    # What does not concern the run has no such remedy.
    with pytest.raises(DataError, match=r"1 of 4 items cannot be used; .*\n  e\.png"):
        get(skip_bad=False)
    after = get(before.item_list())
    assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
    assert {i: str(p) for i, p in after.lost.items()} == {0: "a.png: is no longer listed"}
    # A table that names it says that it is wanted.
    table(folder, NAMES)
    after = get(before.item_list(), skip_bad=False)
    assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
    assert torch.equal(after.read(0).mean, before.read(0).mean)
    assert [r.name for r in after.report.remarks if r.text.endswith(FROM_CACHE)] == ["a.png"]


def test_an_item_that_has_come_since_is_left_out(folder: Path, get: Any) -> None:
    table(folder, ["b.jpg", "d.mkv"])
    before = get()
    table(folder, NAMES)
    after = get(before.item_list())
    assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
    assert [(d.name, d.reason) for d in after.report.dropped] == [
        ("a.png", LEFT_OUT),
        ("c.mp4", LEFT_OUT),
    ]
    assert after.skipped == ()
    # Also one that cannot be used, in a run that may leave nothing out: perhaps it is still being written.
    (folder / "e.mp4").write_bytes(b"half of")
    table(folder, ["b.jpg", "d.mkv", "e.mp4"], e=" ")
    for changed in (" ", "a caption"):
        table(folder, ["b.jpg", "d.mkv", "e.mp4"], e=changed)
        with pytest.raises(DataError, match="1 of 3 items cannot be used"):
            get(skip_bad=False)
        after = get(before.item_list(), skip_bad=False)
        assert (after.items, after.skipped) == (before.items, ())
        assert LEFT_OUT in [d.reason for d in after.report.dropped]
    # A twin that stands before the item does not take its place.
    shutil.copy(folder / "b.jpg", folder / "again.jpg")
    table(folder, ["again.jpg", "d.mkv", "b.jpg"], a="this is b")
    assert names(get()) == ["again.jpg", "d.mkv"]
    after = get(before.item_list())
    assert (after.items, after.skipped) == (before.items, ())


def test_the_report_of_a_run_that_goes_on_is_that_of_its_start(folder: Path, get: Any) -> None:
    """Duplicates, too, also of an item whose media are damaged since."""
    for name in ("x.png", "y.png"):
        shutil.copy(folder / "a.png", folder / name)
    (folder / "bad.png").write_bytes(b"")
    listed = ["a.png", "x.png", *NAMES[1:], "bad.png", "y.png"]
    table(folder, listed, x="this is a")
    get()
    before = get()
    told = [(p.name, p.kind) for p in before.skipped]
    assert told == [("bad.png", "damaged"), ("x.png", "duplicate")]
    assert names(before) == [*NAMES, "y.png"]
    after = get(before.item_list())
    assert after.report == before.report
    (folder / "a.png").write_bytes(b"")
    after = get(before.item_list())
    assert (after.items, after.skipped) == (before.items, before.skipped)
    # Where nothing may be left out it has come since.
    (folder / "bad.png").unlink()
    table(folder, [name for name in listed if name != "bad.png"], x="this is a")
    after = get(before.item_list(), skip_bad=False)
    assert after.skipped == ()
    assert [(d.name, d.reason) for d in after.report.dropped] == [("x.png", LEFT_OUT)]


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("caption", "b.jpg: its caption was 'this is b', is 'another'"),
        ("content", "b.jpg: its media, its geometry, the VAE or the decoding libraries are others"),
        ("geometry", "a.png: its media, its geometry, the VAE or the decoding libraries are"),
        ("vae", "a.png: its media, its geometry, the VAE or the decoding libraries are"),
        ("name", "b.jpg: is no longer there"),
        ("limits", "c.mp4: is no longer there"),
    ],
)
def test_items_that_have_become_others_are_named(
    tmp_path: Path, folder: Path, get: Any, vae: Any, how: str, line: str
) -> None:
    before = get()
    items, changes = before.item_list(), {}
    if how == "caption":
        table(folder, NAMES, b="another")
    elif how == "content":
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "b.jpg")
    elif how == "geometry":
        changes = {"image_pixels": 32 * 48}
    elif how == "vae":
        vae.name = "another"
    elif how == "name":
        (folder / "b.jpg").rename(folder / "e.jpg")
        table(folder, ["a.png", "e.jpg", "c.mp4", "d.mkv"], e="this is b")
    else:
        changes = {"min_video_pixels": 10**6}
        with pytest.raises(DataError, match="nothing"):
            get(items, min_video_pixels=10**6, min_image_pixels=10**6)
    after = get(items, **changes)
    assert after.fingerprint() != items.fingerprint()
    found = items.differences(after.item_list())
    assert found[0].startswith(line)
    if how == "vae":
        assert (len(found), found[3]) == (4, "and 1 more item")


def test_of_several_sources_each_has_its_own(
    tmp_path: Path, folder: Path, config: DataConfig, vae: Any, text: Any
) -> None:
    second = tmp_path / "second"
    shutil.copytree(folder, second)
    sources = {"one": {"path": str(folder)}, "two": {"path": str(second)}}
    tree = {"sources": sources, "image_pixels": 1024, "video_pixels": 1024, "max_frames": 5}
    tree |= {"workers": 0, "skip_bad": True, "mix": {"one": {"image": 1}, "two": {"video": 2}}}
    mixed = parse(DataConfig, tree)
    cache = tmp_path / "cache"
    before = prepare(mixed, vae, text, cache_dir=cache)
    assert names(before) == ["one:a.png", "one:b.jpg", "two:c.mp4", "two:d.mkv"]
    path = tmp_path / "items.json.gz"
    before.item_list().write(path)
    items = ItemList.read(path)
    assert items is not None
    assert items.fingerprint() == before.fingerprint()
    table(second, ["d.mkv"])
    shutil.copy(folder / "a.png", folder / "x.png")
    table(folder, ["x.png", *NAMES])
    after = prepare(mixed, vae, text, cache_dir=cache, items=items)
    assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
    problem = Problem("two:c.mp4", "is no longer listed", "listing", "two")
    assert (after.skipped, dict(after.lost)) == ((problem,), {2: problem})
    assert [str(d) for d in after.report.dropped if d.name == "one:x.png"] == [
        f"one:x.png: {LEFT_OUT}"
    ]
    with pytest.raises(DecodeError, match=r"two:c\.mp4: is no longer listed"):
        after.read(2)
    table(second, ["c.mp4", "d.mkv"], d="another")
    after = prepare(mixed, vae, text, cache_dir=cache, items=items)
    assert items.differences(after.item_list()) == [
        "two:d.mkv: its caption was 'this is d', is 'another'"
    ]


def test_what_the_mix_leaves_out_is_not_lost(
    tmp_path: Path, folder: Path, config: DataConfig, vae: Any, text: Any
) -> None:
    def get(items: ItemList | None = None, **weights: int) -> Dataset:
        tree = {"sources": {"one": {"path": str(folder)}}, "mix": {"one": weights}, "workers": 0}
        tree |= {"image_pixels": 1024, "video_pixels": 1024, "max_frames": 5}
        mixed = parse(DataConfig, tree)
        return prepare(mixed, vae, text, cache_dir=tmp_path / "cache", items=items)

    items = get(image=1, video=1).item_list()
    # Every item is there, and may be left out without skip_bad.
    after = get(items, video=1)
    assert (names(after), after.skipped, dict(after.lost)) == (["c.mp4", "d.mkv"], (), {})
    assert items.differences(after.item_list())[0] == "a.png: is no longer there"


def test_the_same_file_asked_for_otherwise_is_no_duplicate(folder: Path, get: Any) -> None:
    """The latents are equal, since both are cut; a start takes both, and so they are not told as duplicates later."""
    table(folder, NAMES)
    before = get()
    shutil.copy(folder / "c.mp4", folder / "x.mp4")
    row = {"path": "x.mp4", "text": "this is c", "num_frames": 7}
    with (folder / "metadata.jsonl").open("a") as listing:
        listing.write(json.dumps(row) + "\n")
    assert names(get()) == [*NAMES, "x.mp4"]
    after = get(before.item_list())
    assert (after.items, after.skipped) == (before.items, ())
    assert [(d.name, d.reason) for d in after.report.dropped] == [("x.mp4", LEFT_OUT)]


def test_what_a_run_began_with_never_becomes_a_duplicate(folder: Path, get: Any) -> None:
    """Two ranges that are cut to the same frames are two items, also when the ranges are not known any more."""
    shutil.copy(folder / "c.mp4", folder / "x.mp4")

    def list_clips(*frames: int, other: int) -> None:
        table(folder, ["a.png"])
        rows = [{"path": "c.mp4", "text": "this is c", "num_frames": count} for count in frames]
        rows.append({"path": "x.mp4", "text": "this is c", "num_frames": other})
        with (folder / "metadata.jsonl").open("a") as listing:
            listing.write("".join(json.dumps(row) + "\n" for row in rows))

    list_clips(5, 6, other=7)
    before = get()
    clips = ["c.mp4", "c.mp4 #2", "x.mp4"]
    assert names(before) == ["a.png", *clips]
    assert len({entry.key for entry in before.entries}) == 2
    table(folder, ["a.png"])
    after = get(before.item_list())
    assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
    gone = [Problem(name, "is no longer listed", "listing") for name in clips]
    assert after.skipped == tuple(gone)
    assert after.lost == dict(enumerate(gone, 1))
    assert (after.report.listed, after.report.used) == (4, 1)
    # They are listed with one range, of which a start would take the first alone.
    list_clips(5, 6, other=5)
    assert names(get()) == ["a.png", *clips[:2]]
    after = get(before.item_list())
    assert (after.items, after.fingerprint()) == (before.items, before.fingerprint())
    assert (after.skipped, after.lost) == ((), {})
