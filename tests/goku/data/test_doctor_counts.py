"""The doctor's numbers on a recipe small enough to count by hand, as data, as text and on the page."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from goku.data import DataConfig, MixedStream, doctor
from goku.data.html_report import page
from goku.data.mixing import Group
from goku.data.stage_report import STAGE_HEAD
from goku.packing import PackingConfig, sample_cost
from goku.recipe import Recipe, load_recipe
from goku.recipe_doctor import doctor_recipe

SMALL, LARGE = 4, 16  # tokens: 32 x 32 and 64 x 64 pixels


def picture(path: Path, seed: int, side: int) -> None:
    Image.new("RGB", (side, side), (seed, 2 * seed, 3 * seed)).save(path)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """small: 5 pictures, and 5 under the limit; large: 2 pictures, one with two captions, and a broken one."""
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
    for n in range(5):
        for name, side in ((f"s{n}", 32), (f"t{n}", 16)):
            picture(tmp_path / f"small/{name}.png", 10 * n + side, side)
            (tmp_path / f"small/{name}.txt").write_text(f"picture {name}")
    for n in range(2):
        picture(tmp_path / f"large/{n}.png", 100 + n, 64)
    (tmp_path / "large/broken.png").write_text("no picture")
    rows: list[dict[str, Any]] = [
        {"path": "0.png", "captions": [{"text": "one"}, {"text": "two"}]},
        {"path": "1.png", "text": "three"},
        {"path": "broken.png", "text": "four"},
    ]
    (tmp_path / "large/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load_recipe(
        {
            "out": str(tmp_path / "run"),
            "sources": {name: {"path": str(tmp_path / name)} for name in ("small", "large")},
            "vae": {"path": str(tmp_path / "vae"), "model": {"channels": 4}, "train": {}},
            "text": {"tiny_dim": 8, "tiny_heads": 2},
            "model": {"dim": 32, "depth": 1, "heads": 2, "text_dim": 8, "latent_channels": 4},
            "data": {"skip_bad": True, "workers": 0, "image_pixels": "64x64"},
            "packing": {"tokens_per_step": 96, "tokens_per_pack": 32},
            "train": {"steps": 10},
            "stages": {
                "first": {
                    "mix": {"small": {"image": 3}, "large": {"image": 1}},
                    "data": {"min_image_pixels": 600},
                },
                "second": {"mix": {"large": {"image": 1}}},
            },
        }
    )


def steps_of(seed: int, count: int) -> list[list[int]]:
    """The tokens of the samples of each of the first steps, by a plain loop over the stream."""
    groups = [Group("small/image", range(5), 3.0), Group("large/image", range(5, 7), 1.0)]
    stream, tokens = MixedStream(groups, seed), [SMALL] * 5 + [LARGE] * 2
    position, steps = 0, []
    for _ in range(count):
        step: list[int] = []
        while sum(step) + tokens[stream.item(position)] <= 96:
            step.append(tokens[stream.item(position)])
            position += 1
        steps.append(step)
    return steps


def test_the_numbers_by_hand(recipe: Recipe) -> None:
    first = doctor_recipe(recipe).stages[0]
    small, large = first.sources
    assert (small.listed, small.images, small.dropped, small.quarantined) == (10, 5, 5, 0)
    assert (large.listed, large.images, large.dropped, large.quarantined) == (3, 2, 0, 1)
    (dropped,) = first.dropped
    assert (dropped.source, dropped.count) == ("small", 5)
    assert dropped.names == ("t0.png", "t1.png", "t2.png")
    assert first.tokens_in_all == 5 * SMALL + 2 * LARGE
    assert first.tokens_per_sample == {"min": SMALL, "median": SMALL, "max": LARGE}
    steps = steps_of(recipe.stages[0].config.seed, 10)
    assert first.samples == sum(map(len, steps))
    assert first.epochs == pytest.approx(first.samples / 7)
    packing = first.packing
    assert packing is not None
    assert packing.tokens_in_step == pytest.approx(statistics.mean(map(sum, steps)))
    assert packing.samples_per_step == pytest.approx(statistics.mean(map(len, steps)))
    # Three of four samples are small ones of 4 tokens, one is a large one of 16.
    ours, theirs = first.groups
    assert [(g.name, g.items, g.drawn) for g in first.groups] == [
        ("small/image", 5, 768),
        ("large/image", 2, 256),
    ]
    assert (ours.asked, theirs.asked) == (0.75, 0.25)
    assert ours.token_share == pytest.approx(3 * SMALL / (3 * SMALL + LARGE))
    assert theirs.token_share == pytest.approx(LARGE / (3 * SMALL + LARGE))
    assert ours.passes == pytest.approx(first.samples * 0.75 / 5)
    assert theirs.passes == pytest.approx(first.samples * 0.25 / 2)


def test_the_caches_by_hand(recipe: Recipe) -> None:
    """fp32 mean and logvar of 4 channels, 4 latent cells a token; every caption, those of items left out too."""
    first, second = doctor_recipe(recipe).stages
    assert first.cache.latent_files == 7
    assert first.cache.latents == 2 * 4 * 4 * 4 * first.tokens_in_all
    captions = ["", "one", "two", "three", "four"]
    captions += [f"picture {kind}{n}" for kind in "st" for n in range(5)]
    assert first.cache.text_files == len(captions)
    # The built-in encoder's tokens are bytes and the end: 8 wide, fp32.
    assert first.cache.texts == sum(len(caption) + 1 for caption in captions) * 8 * 4
    assert second.cache.shared == second.cache.total > 0
    assert first.cache.shared == 0
    (cut, _) = doctor_recipe(load_recipe(dict(recipe.tree), ["text.max_tokens=5"])).stages
    assert cut.cache.texts == sum(min(len(caption) + 1, 5) for caption in captions) * 8 * 4


def test_the_text_says_each_number_in_its_place(recipe: Recipe) -> None:
    report = doctor_recipe(recipe, path="recipe.yaml")
    text = report.to_text()
    head, *rows = (re.split(r" {2,}", line) for line in text.splitlines()[2:5])
    assert head == list(STAGE_HEAD)
    first, second = (dict(zip(head, row, strict=True)) for row in rows)
    told = report.stages[0]
    assert {key: first[key] for key in ("images", "videos", "dropped", "quarantined")} == {
        "images": "7", "videos": "0", "dropped": "5", "quarantined": "1"
    }  # fmt: skip
    assert (second["images"], second["dropped"]) == ("2", "0")
    assert told.packing is not None
    assert first["tokens/step"] == f"{told.packing.tokens_in_step:,.0f}"
    assert first["samples/step"] == f"{told.packing.samples_per_step:,.1f}"
    assert first["full"] == f"{told.packing.efficiency:.0%}"
    assert (first["steps"], first["epochs"]) == ("10", f"{told.samples / 7:,.1f}")
    for line in (
        "  small           5 images and 0 videos used of 10 listed, 5 dropped, 0 quarantined (",
        "  large           2 images and 0 videos used of 3 listed, 0 dropped, 1 quarantined (",
        "(small: t0.png, t1.png, t2.png, ...)",
        "small/image: 75.0% of samples asked, 768 of 1024 drawn, 42.9% of tokens; its 5 items ",
        "  quarantined     damaged 1\n",
        "large: broken.png: [damaged] ",
    ):
        assert line in text
    # The page says the same, and its bars are as long.
    shown = page(report)
    assert f"{told.packing.tokens_in_step:,.0f} tokens of at most 96, " in shown
    assert "10 listed: 5 images, 5 dropped <code>" in shown
    assert "<span class='dropped' style='width:50.000%'></span>" in shown
    assert "<span class='quarantined' style='width:33.333%'></span>" in shown


def test_packs_are_balanced_by_the_trainers_cost(
    recipe: Recipe, partitioned: list[tuple[list[int], list[float]]]
) -> None:
    doctor_recipe(recipe, stage="first")
    assert partitioned
    for lengths, costs in partitioned:
        assert costs == [sample_cost(length, 32, text_dim=8) for length in lengths]


@pytest.mark.parametrize(("fewer", "more"), [(2, []), (1, ["1 more item"]), (0, ["2 more items"])])
def test_items_that_do_not_fit_are_named_or_counted(
    recipe: Recipe, tmp_path: Path, fewer: int, more: list[str]
) -> None:
    for n in range(fewer):
        (tmp_path / f"small/s{n}.png").unlink()
        (tmp_path / f"small/s{n}.txt").unlink()
    tree = dict(recipe.tree)
    tree["stages"] = {
        "tight": {
            "mix": {"small": {"image": 1}},
            "data": {"min_image_pixels": 600},
            "packing": {"tokens_per_pack": SMALL - 1},
        }
    }
    (stage,) = doctor_recipe(load_recipe(tree)).stages
    named = [f"s{n}.png: " for n in range(fewer, fewer + 3)]
    assert len(stage.reasons) == 3 + len(more)
    for reason, name in zip(stage.reasons, named, strict=False):
        assert reason.startswith(name)
        assert "over tokens_per_pack=3" in reason
    assert list(stage.reasons[3:]) == [f"the same of {words}" for words in more]


@pytest.fixture
def clips(tmp_path: Path, write_video: Any, gradient: Any) -> Path:
    """Four clips of 5, 9, 9 and 13 frames at 12 a second; the table says more of the second than it has."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rows = []
    for n, frames in enumerate((5, 9, 9, 13)):
        write_video(folder / f"{n}.mp4", gradient(frames, 32, 32), fps=12)
        rows.append(
            {"path": f"{n}.mp4", "text": f"clip {n}"} | ({"num_frames": 99} if n == 1 else {})
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("cut", [False, True])
def test_clips_by_hand(recipe: Recipe, clips: Path, cut: bool) -> None:
    """A latent frame of 32 x 32 pixels is 4 tokens; a pack of 8 cuts to two latent frames, 5 frames."""
    tree = dict(recipe.tree)
    tree["sources"] = {"clips": {"path": str(clips)}}
    packing = {"tokens_per_pack": 8, "overlong": "cut"} if cut else {}
    tree["stages"] = {
        "only": {
            "mix": {"clips": {"video": 1}},
            "data": {"video_pixels": "32x32", "max_frames": 13},
            "packing": packing,
        }
    }
    (told,) = doctor_recipe(load_recipe(tree)).stages
    frames = [5, 5, 5, 5] if cut else [5, 9, 9, 13]
    assert told.tokens_in_all == sum(4 * ((n - 1) // 4 + 1) for n in frames)
    sizes = {f"video {n} x 32 x 32": frames.count(n) for n in frames}
    assert dict(told.sizes) == sizes
    seconds = [n / 12 for n in frames]
    assert told.seconds == pytest.approx(
        {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
    )
    assert told.durations == (
        (("0.25 - 0.5 s", 4),) if cut else (("0.25 - 0.5 s", 1), ("0.5 - 1 s", 2), ("1 - 2 s", 1))
    )
    assert any("3 clips cut to tokens_per_pack" in note for note in told.notes) == cut
    # What is encoded is not cut: 2, 3 and 4 latent frames of 4 x 4 cells, 4 channels, mean and logvar; the two clips of
    # 9 frames have equal pixels, and one file.
    assert (told.cache.latent_files, told.cache.latents) == (3, (2 + 3 + 4) * 4 * 4 * 4 * 2 * 4)


def test_lengths_are_those_of_the_file_at_the_rate_of_training(clips: Path) -> None:
    config = DataConfig(path=str(clips), video_pixels=1024, max_frames=13, workers=0)
    report = doctor(config, PackingConfig(tokens_per_step=72, tokens_per_pack=32))
    assert [item.source[0] for item in report.items] == [5, 9, 9, 13]
    assert [item.source_seconds for item in report.items] == pytest.approx(
        [n / 12 for n in (5, 9, 9, 13)]
    )
    assert not any("max_frames" in note for note in report.all_notes())
    # A step of 72 tokens is more than one round of these 48, and fewer than two.
    assert any("smaller than a step" in note for note in report.all_notes())
    assert report.packing is not None
    assert 4 < report.packing.samples_per_step < 8
    # At half the rate 13 frames are 7, of which 5 are encoded: what is not seen is counted at that rate.
    slow = doctor(
        replace(config, fps=6.0, max_frames=5),
        PackingConfig(tokens_per_step=96, tokens_per_pack=32),
    )
    assert [item.unused_frames for item in slow.items] == [2, 0, 0, 2]


def test_clips_at_another_rate_share_no_latents(recipe: Recipe, clips: Path) -> None:
    """Their sizes are equal, their frames are not; the captions are."""
    tree = dict(recipe.tree)
    tree["sources"] = {"clips": {"path": str(clips)}}
    sizes = {"video_pixels": "32x32", "image_pixels": "32x32", "max_frames": 5}
    tree["stages"] = {f"at{fps}": {"data": {**sizes, "fps": float(fps)}} for fps in (12, 6)}
    tree["stages"]["again"] = tree["stages"]["at12"]
    fast, slow, again = doctor_recipe(load_recipe(tree)).stages
    assert fast.cache.shared == 0
    assert slow.cache.shared == slow.cache.texts == fast.cache.texts
    assert again.cache.shared == again.cache.total == fast.cache.total


def test_a_dataset_of_which_the_limits_leave_nothing(recipe: Recipe, tmp_path: Path) -> None:
    config = DataConfig(path=str(tmp_path / "small"), min_image_pixels=5000, workers=0)
    report = doctor(config, PackingConfig(tokens_per_step=96, tokens_per_pack=32))
    assert (report.listed, len(report.dropped), report.unusable) == (10, 10, ())
    assert not report.ok
    assert report.to_text().splitlines()[-1] == f"Not ready for training: {report.reasons[0]}."
    assert report.reasons == ("nothing is left to train on; the limits dropped 10 of 10 items",)
    (verdict,) = re.findall(r"<div class='verdict failed'>.*?</div>", page(report))
    assert "Not ready for training." in verdict
    assert report.reasons[0] in verdict
    assert "cannot be used" not in verdict
    # One line of the page for all that one limit leaves out, whatever their sizes.
    (limit,) = {dropped.reason.rpartition(", ")[2] for dropped in report.dropped}
    assert len({dropped.reason for dropped in report.dropped}) == 2
    assert limit.endswith("min_image_pixels = 5,000")
    assert f"<td class='name'>10  {limit}</td>" in page(report)
