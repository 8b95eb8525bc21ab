"""The doctor's page and its command: one file that needs nothing else, every name escaped, exit codes."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from goku.cli import main
from goku.data.errors import Problem, Remark
from goku.data.html_report import page, write_html
from goku.data.report import DoctorReport
from goku.page_style import STYLE

VOID = {"meta", "br", "img", "link", "input", "hr"}
NASTY = "<script>alert('x')</script> & \"quotes\".png"


class Page(HTMLParser):
    """Refuses tags that are not closed in order; collects what the page refers to and says."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.refers: list[tuple[str, str]] = []
        self.said: list[str] = []
        self.widths: list[float] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "srcset", "action", "data", "xlink:href"):
                self.refers.append((name, value or ""))
            if name == "style":
                match = re.fullmatch(r"width:([0-9.]+)%", value or "")
                assert match, value
                self.widths.append(float(match[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.said)


def standing_alone(text: str) -> Page:
    parsed = Page(text)
    assert text.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(parsed.tags)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in text
    for name, target in parsed.refers:
        assert (name, target[0]) == ("href", "#")
        assert target[1:] in parsed.ids
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(0 < width <= 100 for width in parsed.widths)
    assert STYLE in text
    assert "prefers-color-scheme: dark" in text
    return parsed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, two of them bad, one with a name that is HTML."""
    media = tmp_path / "media"
    media.mkdir()
    for n in range(3):
        pixels = np.random.default_rng(n).integers(0, 256, (33 + n, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(media / f"{n}.png")
        (media / f"{n}.txt").write_text(f"picture {n}")
    for name in ("bad & <i>worse</i>".replace("/", "_"), "é<b>"):
        (media / f"{name}.png").write_text("no picture")
        (media / f"{name}.txt").write_text("words")
    return media


@pytest.fixture
def recipe(tmp_path: Path, folder: Path) -> Path:
    written: dict[str, Any] = {
        "out": str(tmp_path / "run"),
        "sources": {"stills": {"path": str(folder)}},
        "vae": {"path": str(tmp_path / "vae"), "train": {}},
        "text": {"tiny_dim": 32, "tiny_heads": 2},
        "model": {"dim": 32, "depth": 1, "heads": 2, "text_dim": 32},
        "data": {"skip_bad": True, "workers": 0},
        "packing": {"tokens_per_step": 64, "tokens_per_pack": 64},
        "train": {"steps": 5},
        "stages": {
            "one": {"mix": {"stills": {"image": 1}}},
            "two": {"mix": {"stills": {"image": 1}}, "data": {"min_image_pixels": 2150}},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written))
    return path


def test_the_page_of_a_recipe(
    recipe: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "pages" / "report.html"
    assert main(["doctor", str(recipe), "--html", str(target), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
    text = target.read_text(encoding="utf-8")
    parsed = standing_alone(text)
    assert "Every stage can train." in parsed.text
    bad = [path.name for path in folder.glob("*.png") if path.stat().st_size < 20]
    assert len(bad) == 2
    for name in bad:
        assert name in parsed.said
        assert name not in text  # but escaped
    assert {row["name"] for row in content["quarantined"]} == set(bad)
    for row in content["remarks"]:
        assert row["text"] in parsed.said
    for stage in content["stages"]:
        assert f"stage-{stage['name']}" in parsed.ids
        for row in stage["dropped_by_limit"]:
            assert row["reason"] in parsed.text
    assert "2 images, 1 dropped, 2 quarantined" in parsed.text  # the second stage's bar
    assert {40.0, 60.0, 20.0} <= set(parsed.widths)


def test_the_page_of_a_recipe_that_cannot_train(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report.html"
    arguments = ["doctor", str(recipe), "stages.two.data.min_image_pixels=9999", "--html"]
    assert main([*arguments, str(target)]) == 2
    assert "1 of 2 stages cannot train: two." in capsys.readouterr().out
    parsed = standing_alone(target.read_text(encoding="utf-8"))
    assert "class='verdict failed'" in target.read_text(encoding="utf-8")
    assert "nothing is left to train on" in parsed.text
    assert "NO" in parsed.said
    # The good stage alone.
    assert main([*arguments, str(target), "--stage", "one"]) == 0
    assert "stage-two" not in standing_alone(target.read_text(encoding="utf-8")).ids


def test_the_page_of_a_dataset(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "report.html"
    assert main(["doctor", str(folder), "--html", str(target), "--workers", "0"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "Not ready for training: 2 items cannot be used; data.skip_bad: true goes on without them."
    )
    parsed = standing_alone(target.read_text(encoding="utf-8"))
    for part in ("Not ready for training.", "2 items cannot be used", "bad & <i>worse<_i>.png"):
        assert part in parsed.text
    assert "has an odd size: 33 x 64, cropped to 32 x 64" in parsed.said
    for path in folder.glob("*.png"):
        if path.stat().st_size < 20:
            path.unlink()
            path.with_suffix(".txt").unlink()
    assert main(["doctor", str(folder), "--html", str(target), "--workers", "0"]) == 0
    assert "Ready for training." in standing_alone(target.read_text(encoding="utf-8")).said


def report_of(remarks: int) -> DoctorReport:
    return DoctorReport(
        path=NASTY,
        quick=True,
        listed=2,
        items=(),
        unusable=(Problem(NASTY, "is <b>bad</b>", "too large", "a&b"), Problem("\udc80.png", "x")),
        notes=("a <note>",),
        packing=None,
        cache_bytes=0,
        remarks=tuple(Remark(f"{n}.png", "is grey") for n in range(remarks)),
    )


def test_hostile_names_and_many_remarks(tmp_path: Path) -> None:
    report = report_of(3000)
    write_html(report, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    parsed = standing_alone(text)
    assert NASTY in parsed.said
    assert "is <b>bad</b>" in parsed.said
    assert "a&b" in parsed.said
    assert "too large" in parsed.said
    assert "a <note>" in parsed.said
    assert "\\udc80.png" in parsed.said
    assert "1999.png" in parsed.said
    assert "2000.png" not in parsed.said
    assert "1,000 more" in parsed.text
    assert "Remarks on used items (3,000)" in parsed.said


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "page.html"
    target.write_text("the old one")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_html(report_of(1), target)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert target.read_text() == "the old one"
    assert page(report_of(1)) == page(report_of(1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{recipe}", "--stage", "three"], ["'three'", "one, two"]),
        (["{recipe}", "--max-frames", "9"], ["--max-frames is 9", "data.max_frames=33"]),
        (["{recipe}", "--workers", "-1"], ["--workers is -1", "0 or more"]),
        (["{recipe}", "--ranks", "0"], ["ranks is 0", "1 or more"]),
        (["{recipe}", "stages.one.data.max_frames=8"], ["max_frames", "4k+1"]),
        (["{run}", "--stage", "one"], ["--stage is 'one'", "with a recipe"]),
        (["{media}", "--stage", "one"], ["--stage one is given with the dataset"]),
        (["{media}", "data.max_frames=9"], ["data.max_frames=9 is given with the dataset"]),
        (["{recipe}x.yaml"], ["recipe.yamlx.yaml"]),
    ],
)
def test_wrong_calls_exit_2_and_say_what_is_wrong(
    recipe: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    run = tmp_path / "run.yaml"
    written = yaml.safe_load(recipe.read_text())
    del written["stages"], written["sources"]
    written["data"]["path"] = str(folder)
    run.write_text(yaml.safe_dump(written))
    places = {"recipe": str(recipe), "run": str(run), "media": str(folder)}
    assert main(["doctor", *(argument.format(**places) for argument in arguments)]) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("goku doctor: ")
    assert all(word in error for word in words), error


def test_a_run_is_a_recipe_of_one_stage(
    recipe: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yml"
    written = yaml.safe_load(recipe.read_text())
    del written["stages"], written["sources"]
    written["data"] |= {"path": str(folder), "skip_bad": False}
    run.write_text(yaml.safe_dump(written))
    assert main(["doctor", str(run), "--json", "--quick", "--workers", "0"]) == 2
    content = json.loads(capsys.readouterr().out)
    assert content["quick"] is True
    (stage,) = content["stages"]
    assert stage["reasons"] == [
        f"{folder}: 2 of 5 items cannot be used; data.skip_bad: true goes on without them"
    ]
    assert main(["doctor", str(run), "data.skip_bad=true", "--ranks", "2"]) == 0
    printed = capsys.readouterr().out
    assert "on 2 ranks" in printed
    assert printed.splitlines()[-1] == "Ready for training."
