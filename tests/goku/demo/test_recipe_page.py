"""The demo's second page: its verdict on what the logs say, and one well-formed page of it."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from goku.demo.recipe_contents import Drawn, Given, Kill, RecipeReport, Shown, StageReport, frames
from goku.demo.recipe_page import render
from goku.demo.recipe_verdict import judge, summary
from goku.demo.training import TrainingLog
from goku.media_files import save

NAMES = ("t2i", "joint-480", "joint-720", "tune-t2i", "i2v")


def _page_parser() -> Any:
    """The HTML checker of the first page's tests."""
    path = Path(__file__).with_name("test_report.py")
    spec = importlib.util.spec_from_file_location("report_tests", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._Page


def _clip(seed: int, count: int = 5) -> np.ndarray[Any, np.dtype[np.uint8]]:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 2, 3, 3))
    return np.kron(coarse, np.ones((1, 16, 16, 1))).astype(np.uint8)


def _log(
    *, killed: bool = False, last: float = 0.5, repeated: float = 0.75
) -> list[dict[str, Any]]:
    def step(number: int, loss: float = 0.75) -> dict[str, Any]:
        return {"event": "step", "step": number, "loss": loss, "tokens": 100, "time": float(number)}

    events: list[dict[str, Any]] = [
        {"event": "start", "step": 0, "time": 0.0},
        {"event": "eval", "step": 0, "fixed_loss": 1.0, "time": 0.0},
        *(step(k) for k in range(1, 5)),
    ]
    if killed:
        events += [{"event": "resume", "step": 2, "time": 9.0}, step(3, repeated), step(4)]
    return [*events, {"event": "eval", "step": 6, "fixed_loss": last, "time": 6.0}]


def _events() -> list[dict[str, Any]]:
    """Of recipe.jsonl: three processes, the second and third of them after kills."""
    inside, between = NAMES.index("joint-480"), NAMES.index("joint-720") + 1
    order = [("stage_begin", NAMES[0]), ("stage_finish", NAMES[0]), ("stage_begin", NAMES[inside])]
    order += [("stage_skip", name) for name in NAMES[:inside]]
    order += [("stage_resume", NAMES[inside]), ("stage_finish", NAMES[inside])]
    order += [("stage_begin", "joint-720"), ("stage_finish", "joint-720")]
    order += [("stage_skip", name) for name in NAMES[:between]]
    for name in NAMES[between:]:
        order += [("stage_begin", name), ("stage_finish", name)]
    return [{"event": event, "stage": stage} for event, stage in order]


def _stages(**changes: Mapping[str, Any]) -> list[StageReport]:
    return [
        StageReport(
            name=name,
            start=NAMES[index - 1] if index else "",
            carry="weights, ema" if index else "",
            mix="clips video 1",
            sizes="video 32 × 48 × 9",
            steps=6,
            shift=5.0,
            lr=1e-3,
            tokens=600,
            seconds=65.0,
            log=TrainingLog.read(
                _log(**{"killed": name == "joint-480"} | dict(changes.get(name, {})))
            ),
        )
        for index, name in enumerate(NAMES)
    ]


KILLS = (Kill(stage="joint-480", step=4), Kill(stage="joint-720", step=6, next_step=0))


@pytest.fixture
def given(tmp_path: Path) -> list[Given]:
    return [
        Given(name=name, caption=f"<{name}>", trained=name == "own", image=save(tmp_path / name, _clip(seed, 1)))
        for seed, name in enumerate(("own", "other"))
    ]  # fmt: skip


@pytest.fixture
def drawn(tmp_path: Path) -> dict[str, list[Drawn]]:
    def clips(kind: str, first: float) -> list[Drawn]:
        return [
            Drawn(
                path=save(tmp_path / kind / str(seed), _clip(seed)),
                psnr=first - 4 * seed,
                vae_psnr=25.0,
            )
            for seed in range(2)
        ]

    held = [dataclasses.replace(one, psnr=25.0) for one in clips("held", 25.0)]
    return {"plain": clips("plain", 22.0), "held": held, "exported": clips("exported", 22.0)}


def _judged(given: list[Given], drawn: Mapping[str, list[Drawn]], **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "stages": _stages(),
        "finished": NAMES,
        "events": _events(),
        "kills": KILLS,
    }
    return judge(**(arguments | changes), given=given, drawn=drawn)


def _missed(result: Mapping[str, Any]) -> list[str]:
    return [c["key"] for c in result["criteria"] if not c["passed"]]


def test_a_recipe_that_went_well_passes(given: list[Given], drawn: dict[str, list[Drawn]]) -> None:
    result = _judged(given, drawn)
    assert _missed(result) == []
    assert result["passed"]
    assert summary(result) == (
        "PASS: 5 of 5 stages finished; killed in joint-480 at step 4, resumed at 2; 2 repeated steps gave exactly the "
        "same losses; killed between joint-720 and tune-t2i, gone on with tune-t2i; "
        "first frame of own 22.0 dB, held 25.0, the VAE alone 25.0; "
        "first frame of other (never trained on) 18.0 dB, held 25.0, the VAE alone 25.0"
    )


def test_every_failure_is_seen(
    given: list[Given], drawn: dict[str, list[Drawn]], tmp_path: Path
) -> None:
    assert _missed(_judged(given, drawn, finished=NAMES[:-1])) == ["stages"]
    for log in ({"repeated": 0.7500001}, {"killed": False}):
        assert _missed(_judged(given, drawn, stages=_stages(**{"joint-480": log}))) == ["inside"]
    assert _missed(_judged(given, drawn, stages=_stages(i2v={"last": 1.0}))) == ["losses"]
    # A stage that was trained again after the second kill, or not passed by.
    again = [
        e | {"event": "stage_resume"} if e == {"event": "stage_skip", "stage": "joint-720"} else e
        for e in _events()
    ]
    assert _missed(_judged(given, drawn, events=again)) == ["between"]
    # Each of the two may be missed by the first frame: a model that goes by the caption misses the other by 8.
    own, unseen = drawn["plain"]
    for worse in (
        [dataclasses.replace(own, psnr=18.9), unseen],
        [own, dataclasses.replace(unseen, psnr=17.9)],
    ):
        assert _missed(_judged(given, drawn | {"plain": worse})) == ["first_frame"]
    loose = [drawn["held"][0], dataclasses.replace(drawn["held"][1], psnr=24.9)]
    assert _missed(_judged(given, drawn | {"held": loose})) == ["held"]
    clip = _clip(0)
    clip[-1, 0, 0] += 64
    other = [
        dataclasses.replace(drawn["exported"][0], path=save(tmp_path / "other", clip)),
        drawn["exported"][1],
    ]
    result = _judged(given, drawn | {"exported": other})
    assert _missed(result) == ["exported"]
    assert summary(result).startswith("FAIL (exported): ")


def _report(given: list[Given], drawn: dict[str, list[Drawn]], **changes: Any) -> RecipeReport:
    shown = Shown(caption="a & b", training=_clip(7), drawn=_clip(8), psnr=21.5, vae_psnr=27.5)
    stages = _stages()
    stages[1] = dataclasses.replace(stages[1], shown=[shown])
    report = RecipeReport(
        verdict=_judged(given, drawn),
        stages=stages,
        kills=KILLS,
        drawn=list(zip(given, drawn["plain"], drawn["held"], strict=True)),
        vae_psnr=[(25, 20.0), (50, 26.25)],
        timings=[("the rest", 65.0)],
        config="out: x\n",
        environment={"torch": "2.13.0"},
        commands=["goku demo --page 2"],
        files=[("given", "the given images")],
        media=[({"name": "m", "attribution": "owner", "licence": "CC0", "url": "https://example.org"}, "held out")],
        also=[("report.html", "the first page")],
    )  # fmt: skip
    return dataclasses.replace(report, **changes)


def test_the_page_is_whole_and_fetches_nothing(
    given: list[Given], drawn: dict[str, list[Drawn]]
) -> None:
    text = render(_report(given, drawn))
    page = _page_parser()(text)
    assert all(value.startswith("data:") for value in page.fetched)
    outside = {link for link in page.links if not link.startswith("#")}
    assert outside == {"https://example.org", "report.html"}
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    said = " ".join(page.texts)
    for words in (
        "Every criterion holds",
        "26.2 dB on its last crops",
        "joint-480: weights, ema",
        "1.00 → 0.50",
        "1 min 05 s",
        "joint-480 had come to step 4 and went on from its checkpoint at 2",
        "2 repeated steps gave exactly the same losses",
        "training, VAE alone 27.5 dB",
        "first frame, 22.0 dB to the given image",
        "first frame 25.0 dB",
        "never trained on",
        "−7.0 dB",
        "<own>",
    ):
        assert words in said, words
    # given image, first and last frame of two images; a training clip, a drawn one, and two clips of each image
    assert text.count("data:image/png") == 6
    assert text.count("data:video/mp4") == 6
    # A stage's line at each of its begins, and a mark for each kill, in both charts and both scalings.
    assert text.count('class="mark"') - text.count('<span class="mark"') == 4 * len(KILLS)
    for name in NAMES:
        assert text.count(f">{name}</text>") == 4


def test_a_failure_is_on_the_page(given: list[Given], drawn: dict[str, list[Drawn]]) -> None:
    verdict = _judged(given, drawn, finished=NAMES[:-1])
    text = render(_report(given, drawn, verdict=verdict))
    said = " ".join(_page_parser()(text).texts)
    assert "Not every criterion holds" in said
    assert "Missed: stages finished" in said
    assert "not finished: i2v" in said
    assert text.count('class="card failed"') == 1


def test_frames_of_a_clip(tmp_path: Path) -> None:
    clip = _clip(3)
    found = frames(save(tmp_path / "clip", clip))
    assert found.shape == clip.shape
    assert np.abs(found.astype(int) - clip).mean() < 4  # H.264 loses a little
