"""The report: one well-formed page with everything in it and nothing fetched."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from goku.demo import report as demo_report
from goku.demo import score
from goku.demo.plots import Mark, PackedSample, Series, line_chart, packing
from goku.demo.training import TrainingLog, loss_sections, throughput_rows

VOID = {"meta", "link", "img", "br", "input"}


class _Page(HTMLParser):
    """Checks that tags nest, and collects what a test asks about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif tag == "a" and name == "href":
                self.links.append(value or "")
            elif name in ("src", "href", "srcset", "poster", "data", "xlink:href", "action"):
                self.fetched.append(value or "")
            assert not name.startswith("on"), f"{tag} carries {name}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _media(seed: int, frames: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    coarse = np.random.default_rng(seed).integers(0, 256, (1, 3, 3, 3)).astype(np.uint8)
    return np.rint(score.resize(coarse, (frames, 32, 48)) * 255).astype(np.uint8)


def _step(step: int, loss: float | None) -> dict[str, Any]:
    return {
        "event": "step",
        "step": step,
        "loss": loss,
        "tokens": 500,
        "seconds": 0.25,
        "tokens_per_second": 2000.0,
        "mfu": 0.31,
        "packing_efficiency": 0.9,
        "loss_by_bin": [loss] * 8,
        "loss_by_modality": {"image": loss, "video": None},
    }


def _eval(step: int, loss: float) -> dict[str, Any]:
    bins = [loss * (1 + k) for k in range(8)]
    return {
        "event": "eval",
        "step": step,
        "fixed_loss": loss,
        "unseen_loss": 2 * loss,
        "fixed_by_bin": bins,
    }


LOG: list[dict[str, Any]] = [
    {"event": "start", "step": 0},
    _eval(0, 1.5),
    *(_step(k, 1.0 / k) for k in range(1, 9)),
    {"event": "checkpoint", "step": 6},
    {"event": "resume", "step": 6},
    *(_step(k, 1.0 / k) for k in range(7, 13)),
    _eval(12, 0.25),
]


def _report(**changes: Any) -> demo_report.Report:
    training = [_media(seed, 1 if seed < 3 else 5) for seed in range(5)]
    samples = [np.clip(item.astype(int) + 3, 0, 255).astype(np.uint8) for item in training]
    decoded = [np.clip(item.astype(int) - 2, 0, 255).astype(np.uint8) for item in training]
    verdict = score.verdict(samples, range(5), training, decoded, first_loss=1.5, last_loss=0.25)
    items = [
        demo_report.Item(
            name=f"item-{k}",
            caption='a <script>alert("no")</script> & more' if k == 0 else f"picture {k}",
            modality="image" if k < 3 else "video",
            grid=(1 if k < 3 else 2, 2, 3),
            training=training[k],
            reconstruction=decoded[k],
            reconstruction_psnr=30.0,
            samples=[
                demo_report.Sample(
                    seed=7,
                    picture=samples[k],
                    psnr=25.0,
                    nearest="item-1" if k == 2 else f"item-{k}",
                )
            ],
            evolution=[(0, training[0]), (12, samples[k])] if k in (0, 3) else (),
            licence="CC0 1.0",
            attribution=f"owner {k}",
            url="https://example.org/owner" if k else "javascript:alert(1)",
            shareable=k in (0, 3),
        )
        for k in range(5)
    ]
    report = demo_report.Report(
        verdict=verdict,
        items=items,
        log=LOG,
        packs=[
            demo_report.Pack(label="step 3", names=["item-0", "item-3", "item-1"], capacity=30),
            demo_report.Pack(label="step 4", names=["item-4", "item-2"], capacity=30),
        ],
        timings=[("media", 3.21), ("training", 245.0)],
        timing_note="Installing is not included.",
        config="model:\n  dim: 192\n",
        environment={"torch": "2.13.0", "CPU": "some CPU"},
        commands=["make demo"],
        unseen=[{"name": "held", "attribution": "owner H", "licence": "CC0 1.0"}],
        files=[("run/train.jsonl", "the log")],
    )
    return dataclasses.replace(report, **changes)


def test_the_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.html"
    demo_report.write_report(path, _report())
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert all(value.startswith("data:") for value in page.fetched)
    assert page.fetched
    for forbidden in ("@import", "url(", "<iframe", "fetch(", "XMLHttpRequest"):
        assert forbidden not in text
    outside = [link for link in page.links if not link.startswith("#")]
    assert set(outside) == {"https://example.org/owner"}
    # Every reference inside the page has its target, and no name is given twice.
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    sections = {"verdict", "generated", "evolution", "loss", "packing", "timings", "reproduce"}
    assert sections | {"media"} <= set(page.ids)


def test_the_page_says_what_it_was_given() -> None:
    text = demo_report.render(_report())
    page = _Page(text)
    said = " ".join(page.texts)
    for words in (
        "Every criterion holds",
        "Loss on fixed noise",
        "seed 7",
        "nearest: item-1",
        "owner H",
        "owner 0",
        "Installing is not included.",
        "4 min 05 s",
        "make demo",
        "dim: 192",
        "2.13.0",
        "run/train.jsonl",
        "killed at 8",
        "step 6",
        "2 repeated steps gave exactly the same losses",
        "tokens per second",
        "31.0%",
        "2×2×3 = 12 tokens",
        "80.0% full",
    ):
        assert words in said, words
    assert "<script>alert" not in text
    assert html.escape('a <script>alert("no")</script> & more') in text
    assert page.tags.count("script") == 1


def test_pictures_are_in_the_page_and_readable(tmp_path: Path) -> None:
    text = demo_report.render(_report())
    pictures = [base64.b64decode(m) for m in re.findall(r"data:image/png;base64,([^\"]+)\"", text)]
    # training, reconstruction and sample of 3 photographs, and the evolution's 3 photographs
    assert len(pictures) == 3 * 3 + 3
    for data in pictures:
        assert Image.open(io.BytesIO(data)).size == (48, 32)
    clips = [base64.b64decode(m) for m in re.findall(r"data:video/mp4;base64,([^\"]+)\"", text)]
    assert len(clips) == 2 * 3 + 1
    with av.open(io.BytesIO(clips[0])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    for tag in re.findall(r"<video [^>]+>", text):
        assert " autoplay loop muted playsinline" in tag

    path = tmp_path / "picture.png"
    path.write_bytes(pictures[0])
    report = _report()
    item = dataclasses.replace(report.items[0], training=path)
    given = demo_report.render(dataclasses.replace(report, items=[item, *report.items[1:]]))
    # Only the shape, which the page then learns from the file itself, is not written down.
    assert given == text.replace(' style="aspect-ratio:48/32"', "", 1)
    bad = dataclasses.replace(item, training=tmp_path / "picture.webm")
    bad.training.write_bytes(b"")  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"picture\.webm"):
        demo_report.render(dataclasses.replace(report, items=[bad, *report.items[1:]]))


def test_a_failed_run_says_so() -> None:
    report = _report()
    samples = [np.full_like(_media(k, 1), 128) for k in range(3)]
    training = [_media(k, 1) for k in range(3)]
    verdict = score.verdict(samples, range(3), training, training, first_loss=1, last_loss=0.9)
    text = demo_report.render(dataclasses.replace(report, verdict=verdict))
    said = " ".join(_Page(text).texts)
    assert "Not every criterion holds" in said
    assert "Every criterion holds" not in said
    assert "distinct captions" in said
    assert text.count('class="card failed"') >= 4


def test_little_to_tell_is_no_error() -> None:
    text = demo_report.render(
        _report(log=[], packs=(), timings=(), config="", environment={}, unseen=(), files=())
    )
    said = " ".join(_Page(text).texts)
    assert "Nothing was logged." in said
    assert "No packs were recorded." in said


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old", encoding="utf-8")
    broken = dataclasses.replace(_report().items[0], training=tmp_path / "absent.png")
    with pytest.raises(FileNotFoundError):
        demo_report.write_report(path, _report(items=[broken]))
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readme_picture_shows_shareable_items_only() -> None:
    report = _report()
    shown = Image.open(io.BytesIO(demo_report.readme_picture(report.items)))
    both = [item for item in report.items if item.shareable]
    alone = Image.open(io.BytesIO(demo_report.readme_picture(both)))
    assert shown.tobytes() == alone.tobytes()
    with pytest.raises(ValueError, match="shareable"):
        demo_report.readme_picture([item for item in report.items if not item.shareable])


# ---- the training log ------------------------------------------------------------------------


def test_repeated_steps_count_once() -> None:
    log = TrainingLog.read(LOG)
    assert [event["step"] for event in log.steps] == list(range(1, 13))
    assert log.interruptions == [(8, 6)]
    assert (log.replayed, log.replay_difference) == (2, 0.0)
    assert log.fixed == [(0.0, 1.5), (12.0, 0.25)]
    assert log.unseen == [(0.0, 3.0), (12.0, 0.5)]
    assert dict(throughput_rows(log))["tokens seen"] == "6,000"


@pytest.mark.parametrize(
    ("second", "expected"), [(0.5, 0.0), (0.75, 0.25), (None, math.inf), (math.nan, math.inf)]
)
def test_a_different_replay_is_told(second: float | None, expected: float) -> None:
    events = [_step(1, 1.0), _step(2, 0.5), {"event": "resume", "step": 1}, _step(2, second)]
    log = TrainingLog.read(events)
    assert log.replay_difference == expected
    assert ("exactly the same" in log.replay_text()) is (expected == 0.0)


def test_non_finite_losses_do_not_break_the_charts() -> None:
    events: Sequence[Mapping[str, Any]] = [_step(1, 1.0), _step(2, math.nan), _step(3, None)]
    page = loss_sections(TrainingLog.read(events))
    assert "nan" not in page
    _Page(page)


# ---- charts ----------------------------------------------------------------------------------


def _polyline(chart: str) -> list[tuple[float, float]]:
    (points,) = re.findall(r'<polyline class="line c0" points="([^"]+)"', chart)
    return [tuple(map(float, pair.split(","))) for pair in points.split()]  # type: ignore[misc]


def test_a_line_runs_where_its_numbers_say() -> None:
    series = Series(label="x", points=[(0, 0.0), (1, 5.0), (2, 10.0)])
    points = _polyline(line_chart("k", [series], x_label="x", y_label="y"))
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)  # coordinates have one decimal
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y2 < y0


def test_the_logarithmic_axis_spaces_powers_evenly() -> None:
    series = Series(label="x", points=[(0, 1.0), (1, 0.1), (2, 0.01), (3, 0.0)])
    chart = line_chart("k", [series], x_label="x", y_label="y", log_option=True)
    logarithmic = chart.split('<div class="log">')[1].split('<div class="lin">')[0]
    points = _polyline(logarithmic)
    assert len(points) == 3  # zero has no place on it
    assert points[1][1] - points[0][1] == pytest.approx(points[2][1] - points[1][1], abs=0.11)


def test_long_series_are_thinned_and_end_where_they_end() -> None:
    series = Series(label="x", points=[(k, float(k % 2)) for k in range(5001)])
    chart = line_chart("k", [series], x_label="x", y_label="y", marks=[Mark(x=9, label="here")])
    points = _polyline(chart)
    assert len(points) < 500
    data = re.search(r'data-plot="([^"]+)"', chart)
    assert data is not None
    values = json.loads(html.unescape(data.group(1)))["s"][0][2]
    assert values[-1] == [5000, 0.0]
    assert "here" in chart


def test_an_empty_chart_says_so() -> None:
    series = Series(label="x", points=[(0, math.nan)])
    assert "nothing was logged" in line_chart("k", [series], x_label="x", y_label="loss")


def test_a_pack_is_drawn_to_scale_with_its_frames() -> None:
    samples = [
        PackedSample(name="a", modality="image", grid=(1, 5, 10), tokens=50, hue=0),
        PackedSample(name="b", modality="clip", grid=(3, 5, 10), tokens=150, hue=200),
    ]
    svg = packing(samples, capacity=400)
    widths = [float(w) for w in re.findall(r'class="block" x="[^"]+" y="0" width="([^"]+)"', svg)]
    # The strip is 1100 wide for 400 tokens; 1.5 is the gap between blocks.
    assert widths == pytest.approx([50 / 400 * 1100 - 1.5, 150 / 400 * 1100 - 1.5], abs=0.01)
    assert svg.count('class="frame"') == 2
    assert "200 tokens unused" in svg
    assert "clip, 3 × 5 × 10" in svg
