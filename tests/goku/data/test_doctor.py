from __future__ import annotations

import json
import statistics
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest

from goku.data import DataConfig, DataError, ShuffledStream, doctor, prepare
from goku.data.html_report import page
from goku.packing import PackingConfig

PACKING = PackingConfig(tokens_per_step=100, tokens_per_pack=70)


@pytest.fixture
def config(folder: Path) -> DataConfig:
    return DataConfig(
        path=str(folder), image_pixels=64 * 96, video_pixels=48 * 64, max_frames=17, workers=0
    )


@pytest.mark.parametrize("changes", [{}, {"fps": 12.0}, {"max_frames": 5}, {"upscale": True}])
@pytest.mark.parametrize("quick", [False, True])
def test_it_predicts_what_prepare_does(
    tmp_path: Path, config: DataConfig, vae: Any, text: Any, changes: dict[str, Any], quick: bool
) -> None:
    config = replace(config, **changes)
    report = doctor(config, PACKING, quick=quick, latent_channels=vae.channels)
    assert not list(tmp_path.glob("cache*"))  # nothing is written
    dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert report.ok
    assert [(i.name, i.modality, i.frames, i.height, i.width, i.tokens) for i in report.items] == [
        (i.name, i.modality, i.frames, i.height, i.width, i.tokens) for i in dataset.items
    ]
    samples = [dataset.read(i) for i in range(len(dataset))]
    assert report.cache_bytes == sum(s.mean.nbytes + s.logvar.nbytes for s in samples)
    stored = sum(p.stat().st_size for p in (tmp_path / "cache/latents").rglob("*.safetensors"))
    assert report.cache_bytes < stored < report.cache_bytes + 1000 * len(dataset)


def test_steps_and_efficiency_by_hand(config: DataConfig) -> None:
    report = doctor(config, PACKING, seed=5)
    tokens = [item.tokens for item in report.items]
    assert sorted(tokens) == [9, 18, 24, 60]
    # Steps of at most 100 tokens in the stream's order, by a plain loop.
    stream = ShuffledStream(4, 5)
    position, steps = 0, []
    while position < 4:
        step = [tokens[stream.item(position)]]
        position += 1
        while sum(step) + tokens[stream.item(position)] <= 100:
            step.append(tokens[stream.item(position)])
            position += 1
        steps.append(step)
    assert report.packing is not None
    assert report.packing.steps_per_epoch == len(steps)
    assert report.packing.samples_per_step == pytest.approx(statistics.mean(map(len, steps)))
    # 70 tokens a pack: a step of up to 70 takes one, and of up to 100 two, whatever their order.
    packs = [1 if sum(step) <= 70 else 2 for step in steps]
    assert report.packing.packs_per_step == pytest.approx(statistics.mean(packs))
    shares = [sum(step) / (70 * n) for step, n in zip(steps, packs, strict=True)]
    assert report.packing.efficiency == pytest.approx(statistics.mean(shares))


def test_text_and_json_say_it_all(config: DataConfig, folder: Path) -> None:
    (folder / "e.mp4").write_text("words")
    (folder / "e.txt").write_text("caption")
    (folder / "f.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "notes.md").touch()
    report = doctor(config, PACKING)
    assert not report.ok
    assert report.listed == 6
    assert report.counts() == {"image": 2, "video": 2}
    text = report.to_text()
    for part in (
        "6 listed: 2 images and 2 videos usable, 2 unusable",
        "e.mp4: not a readable video",
        "f.png: missing caption: no f.txt beside it",
        "notes.md",
        "video 17 x 48 x 64",
        "9 / 21 / 60, 111 in all",
        "Not ready for training: 2 items cannot be used; data.skip_bad: true goes on without them.",
        "1 clip longer than max_frames: the rest is not seen",
    ):
        assert part in text
    content = json.loads(report.to_json())
    assert content["ok"] is False
    assert content["tokens"] == {"min": 9, "median": 21, "max": 60}
    assert content["unusable"][0] == {
        "name": "f.png",
        "reason": "missing caption: no f.txt beside it",
        "kind": "caption",
        "source": "",
    }
    assert [item["name"] for item in content["items"]] == ["a.png", "b.jpg", "c.mp4", "d.mkv"]
    assert content["packing"]["tokens_per_pack"] == 70
    seconds = [item["source_seconds"] for item in content["items"]]
    assert seconds == pytest.approx([0, 0, 25 / 24, 7 / 24], rel=1e-2)


def test_samples_over_the_budget(config: DataConfig) -> None:
    small = PackingConfig(tokens_per_step=50, tokens_per_pack=30)
    report = doctor(config, small)
    assert [p.name for p in report.unusable] == ["c.mp4"]
    assert "60 tokens, over tokens_per_pack=30" in report.unusable[0].reason
    cut = doctor(config, replace(small, overlong="cut"))
    assert cut.ok
    clip = cut.items[2]
    assert (clip.encoded_frames, clip.frames, clip.tokens) == (17, 5, 24)
    assert 'overlong: "cut"' in cut.to_text()
    assert cut.cache_bytes == doctor(config, PACKING).cache_bytes


def test_the_quick_look_misses_damage_and_says_so(config: DataConfig, folder: Path) -> None:
    content = bytearray((folder / "c.mp4").read_bytes())
    for place in range(len(content) // 3, len(content) // 2, 50):
        content[place] ^= 0x55
    (folder / "c.mp4").write_bytes(content)
    full = doctor(config, PACKING)
    assert [p.name for p in full.unusable] == ["c.mp4"]
    assert "corrupt video" in full.unusable[0].reason
    quick = doctor(config, PACKING, quick=True)
    assert quick.ok
    assert "not seen by the quick look" in quick.to_text()


def test_workers_and_progress_change_nothing(config: DataConfig) -> None:
    done: list[tuple[int, int]] = []
    alone = doctor(config, PACKING, progress=lambda count, total: done.append((count, total)))
    assert done == [(i, 4) for i in range(1, 5)]
    assert doctor(replace(config, workers=2), PACKING) == alone


def test_nothing_usable(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").touch()
    (tmp_path / "bad/a.txt").write_text("x")
    report = doctor(replace(config, path=str(tmp_path / "bad")), PACKING)
    assert not report.ok
    assert report.reasons == ("1 item cannot be used", "nothing is left to train on")
    assert report.packing is None
    assert "0 images and 0 videos usable, 1 unusable" in report.to_text()
    assert json.loads(report.to_json())["tokens"] == {}
    with pytest.raises(DataError, match="no such file or folder"):
        doctor(replace(config, path=str(tmp_path / "bad/none")), PACKING)


def test_slow_clips_are_noted(config: DataConfig) -> None:
    assert "2 clips slower than fps" in doctor(replace(config, fps=48.0), PACKING).to_text()


def test_packs_are_balanced_by_the_given_cost(
    config: DataConfig, partitioned: list[tuple[list[int], list[float]]]
) -> None:
    doctor(config, PACKING)
    assert partitioned
    assert all(costs == [length**2 for length in lengths] for lengths, costs in partitioned)
    partitioned.clear()
    doctor(config, PACKING, cost=lambda length: 3.0 * length + 1)
    assert partitioned
    assert all(costs == [3.0 * length + 1 for length in lengths] for lengths, costs in partitioned)


def test_an_unlisted_file_is_shown(config: DataConfig, folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"path": "a.png", "text": "x"}\n')
    assert (
        "3 media not listed in metadata.jsonl: b.jpg, c.mp4, d.mkv"
        in doctor(config, PACKING).to_text()
    )


def test_limits_remarks_and_equal_files(
    config: DataConfig, folder: Path, tmp_path: Path, vae: Any, text: Any
) -> None:
    """As `prepare` sees them, which alone looked for these once."""
    (folder / "e.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "e.txt").write_text("this is a")
    (folder / "f.png").write_bytes((folder / "a.png").read_bytes())
    (folder / "f.txt").write_text("and this is f")
    config = replace(config, min_frames=9, skip_bad=True)
    report = doctor(config, PACKING)
    made = prepare(config, vae, text, cache_dir=tmp_path / "cache").report
    assert (report.unusable, report.dropped, report.remarks) == (
        made.problems,
        made.dropped,
        made.remarks,
    )
    assert [problem.name for problem in report.unusable] == ["e.png"]
    assert [dropped.name for dropped in report.dropped] == ["d.mkv"]
    assert [remark.name for remark in report.remarks] == ["f.png"]
    assert report.listed == 6 == len(report.items) + 2
    assert "1 unusable, 1 dropped by limits" in report.to_text()
    for part in ("duplicate of a.png", "fewer than min_frames = 9", "same content as a.png"):
        assert part in report.to_text()
        assert part in report.to_json()
    quick = doctor(config, PACKING, quick=True)
    assert quick.ok
    assert len(quick.items) == len(report.items) + 1


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "images.txt"])
def test_what_a_listing_names_and_is_not_there_is_named(
    config: DataConfig, folder: Path, name: str, quick: bool
) -> None:
    """A missing file and a broken one, by their names and with why, in every form of the report."""
    (folder / "broken.png").write_text("no picture")
    rows = {"a.png": "a picture", "gone.jpg": "was here once", "broken.png": "broken"}
    lines = {
        "metadata.jsonl": [json.dumps({"path": path, "text": rows[path]}) for path in rows],
        "metadata.csv": ["path,text", *(f"{path},{rows[path]}" for path in rows)],
        "images.txt": list(rows),
    }
    (folder / name).write_text("\n".join(lines[name]) + "\n")
    (folder / "prompt.txt").write_text("\n".join(rows.values()) + "\n")
    report = doctor(config, PACKING, quick=quick)
    assert (report.listed, len(report.items), report.dropped) == (3, 1, ())
    reasons = {problem.name: problem.reason for problem in report.unusable}
    assert list(reasons) == ["gone.jpg", "broken.png"]
    assert reasons["gone.jpg"].startswith("media file missing")
    text, shown = report.to_text(), page(report)
    unusable = text[text.index("\nUnusable\n") :]
    for path, reason in reasons.items():
        assert f"\n  {path}: {reason}\n" in unusable
        assert f"<td class='name'>{path}</td>" in shown
        assert escape(reason) in shown
