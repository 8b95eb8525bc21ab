"""Captions and names that are no Unicode: half an emoji, a byte that is not UTF-8. They cost their item alone, and are
shown wherever items are named."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from goku.cli import main
from goku.data import DataConfig, prepare, scan
from goku.data.item_list import ItemList
from goku.data.quarantine import Quarantine, read_quarantine

CUT = "cut \ud83d"  # the first half of an emoji's pair, which JSON can write and UTF-8 cannot
REASON = r"its caption is not valid Unicode: '\ud83d' at character 5 is one half of a character"
NAMES = ("a.png", "b.png", "c.png", "d.png")
CAPTIONS: tuple[Any, ...] = ("whole \U0001f600", CUT, ["whole", {"text": CUT, "weight": 0.5}], "d")


def pictures(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for level, name in enumerate(NAMES):
        Image.new("RGB", (32, 32), (9 * level, 0, 0)).save(folder / name)
    return folder


def jsonl(folder: Path) -> Path:
    rows = [json.dumps({"path": n, "text": c}) for n, c in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def array(folder: Path) -> Path:
    rows = [{"path": n, "text": c} for n, c in zip(NAMES, CAPTIONS, strict=True)]
    (folder / "metadata.json").write_text(json.dumps(rows))
    return folder


def cells(folder: Path) -> Path:
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "captions"])
        for name, text in zip(NAMES, CAPTIONS, strict=True):
            rows.writerow([name, json.dumps(text if isinstance(text, list) else [text])])
    return folder


def archive(folder: Path) -> Path:
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name, caption in zip(NAMES, CAPTIONS, strict=True):
            row = json.dumps({"caption": caption}).encode()
            for file, content in ((name, (folder / name).read_bytes()), (f"{name[0]}.json", row)):
                member = tarfile.TarInfo(file)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "s.tar"


@pytest.mark.parametrize("form", [jsonl, array, cells, archive])
def test_half_an_emoji_costs_its_item_alone(tmp_path: Path, form: Callable[[Path], Path]) -> None:
    found = scan(form(pictures(tmp_path)))
    prefix = "s.tar/" if form is archive else ""
    assert [(r.name, r.text) for r in found.records] == [
        (f"{prefix}a.png", "whole \U0001f600"),
        (f"{prefix}d.png", "d"),
    ]
    assert [(p.name, p.kind) for p in found.problems] == [
        (f"{prefix}b.png", "caption"),
        (f"{prefix}c.png", "caption"),  # of which one caption of two is whole
    ]
    assert all(p.reason.startswith(REASON) for p in found.problems), found.problems


@pytest.mark.parametrize("form", ["sidecars", "lists"])
def test_half_an_emoji_in_plain_text(tmp_path: Path, form: str) -> None:
    """As bytes it is what other tools write by "surrogatepass"."""
    pictures(tmp_path)
    half = CUT.encode("utf-8", "surrogatepass")
    for name in NAMES:
        (tmp_path / name).with_suffix(".txt").write_bytes(half if name == "b.png" else b"x")
    if form == "lists":
        (tmp_path / "images.txt").write_text("\n".join(NAMES))
        (tmp_path / "prompt.txt").write_bytes(b"\n".join([b"x", half, b"x", b"x"]))
    (problem,) = scan(tmp_path, form).problems  # type: ignore[arg-type]
    assert (problem.name, problem.kind) == ("b.png", "caption")
    assert "is not UTF-8" in problem.reason


def test_an_escaped_half_in_another_column_costs_nothing(tmp_path: Path) -> None:
    """A row's other columns are not read. The second half of an emoji looks like a byte that is not UTF-8."""
    rows = [{"path": "a.png", "text": "x", "author": "\udc80"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    assert scan(tmp_path / "a.json").records == scan(tmp_path / "a.jsonl").records
    assert scan(tmp_path / "a.json").problems == ()


@pytest.mark.parametrize("follow_links", [False, True])
def test_a_path_that_no_file_can_have(tmp_path: Path, follow_links: bool) -> None:
    """With links followed nothing else looks at it before it is opened, where it would end the run."""
    rows = [{"path": p, "text": "x"} for p in ("a\ud83d.png", "b\0.png", "c\udcff.png", "d.png")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = scan(tmp_path / "t.jsonl", follow_links=follow_links)
    # A file's name need not be UTF-8: the third may be there.
    assert [record.name for record in found.records] == ["c\udcff.png", "d.png"]
    first, second = found.problems
    assert first.reason.startswith(r"media path 'a\ud83d.png' is not valid Unicode")
    assert second.reason == r"media path 'b\x00.png' holds a null character"
    # Beside media, which it might list.
    homes = [{"path": f"~{who}/a.png", "text": "x"} for who in ("nobody\ud83d", "no-such-user")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, [*homes, rows[3]])))
    found = scan(tmp_path, follow_links=follow_links)
    assert [record.name for record in found.records] == ["d.png"]
    assert [problem.name for problem in found.problems] == ["metadata.jsonl:1", "metadata.jsonl:2"]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "images.txt").write_bytes(b"a\0.png\nd.png\n")
    (tmp_path / "prompt.txt").write_text("x\ny\n")
    (problem,) = scan(tmp_path, "lists", follow_links=follow_links).problems
    assert problem.name == "images.txt:1"
    assert "holds a null character" in problem.reason


def test_a_run_goes_on_without_it(tmp_path: Path, vae: Any, text: Any) -> None:
    config = DataConfig(path=str(jsonl(pictures(tmp_path / "media"))), skip_bad=True, workers=0)
    dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert [item.name for item in dataset.items] == ["a.png", "d.png"]
    assert [problem.name for problem in dataset.report.problems] == ["b.png", "c.png"]


def recipe_of(tmp_path: Path, media: Path) -> Path:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "out": str(tmp_path / "out"),
                "vae": {"path": str(tmp_path / "vae"), "train": {}},
                "sources": {"stills": {"path": str(media)}},
                "text": {"tiny_dim": 32, "tiny_heads": 2},
                "model": {"dim": 32, "depth": 1, "heads": 2, "text_dim": 32},
                "data": {"skip_bad": True, "workers": 0},
                "packing": {"tokens_per_step": 64, "tokens_per_pack": 64},
                "train": {"steps": 5},
                "stages": {"one": {"mix": {"stills": {"image": 1}}}},
            }
        )
    )
    return recipe


def test_the_doctor_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media = jsonl(pictures(tmp_path / "media"))
    for arguments, code in (([media, "--workers", 0], 2), ([recipe_of(tmp_path, media)], 0)):
        for quick in ([], ["--quick"]):
            assert main(["doctor", *map(str, arguments), *quick]) == code
            printed = capsys.readouterr()
            assert "its caption is not valid Unicode: '\\ud83d'" in printed.out, printed.err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_standard_output_has_no_bytes_for(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = pictures(tmp_path / "media")
    for name in (b"\xffy.png", "größer.png".encode()):
        (media / os.fsdecode(name)).write_text("no picture")

    def printed(*options: str) -> str:
        bytes_of = io.BytesIO()
        stdout = io.TextIOWrapper(bytes_of, encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["doctor", str(media), "--workers", "0", *options]) == 2
        assert stdout.errors == "strict"  # as it was found
        stdout.flush()
        return bytes_of.getvalue().decode(encoding)

    lines = [line.partition(":")[0].strip() for line in printed().splitlines()]
    assert r"\udcffy.png" in lines
    assert ("größer.png" if encoding == "utf-8" else r"gr\xf6\xdfer.png") in lines
    names = {row["name"] for row in json.loads(printed("--json"))["unusable"]}
    assert names == {*NAMES, "\udcffy.png", "größer.png"}


def test_the_recipes_json_holds_them_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media = jsonl(pictures(tmp_path / "media"))
    rows = [{"path": name, "text": "x"} for name in (*NAMES, "\udcffy.png")]
    (media / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["doctor", str(recipe_of(tmp_path, media)), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert [row["name"] for row in json.loads(printed)["quarantined"]] == ["\udcffy.png"]


def test_what_preparation_and_quarantine_say(tmp_path: Path, vae: Any, text: Any) -> None:
    media = pictures(tmp_path / "media")
    for name in NAMES:
        (media / name).with_suffix(".txt").write_text(name)
    (media / "a.png").rename(media / os.fsdecode(b"\xffx.png"))
    (media / "a.txt").rename(media / os.fsdecode(b"\xffx.txt"))
    (media / os.fsdecode(b"\xffy.png")).write_text("no caption")
    config = DataConfig(path=str(media), skip_bad=True, workers=0)
    dataset = prepare(config, vae, text, cache_dir=tmp_path / "cache")
    assert [item.name for item in dataset.items] == ["b.png", "c.png", "d.png", "\udcffx.png"]
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    assert quarantine.add(dataset.report.problems) == 1
    assert [row["name"] for row in read_quarantine(quarantine.path)] == ["\udcffy.png"]
    dataset.item_list().write(tmp_path / "items.json.gz")
    found = ItemList.read(tmp_path / "items.json.gz")
    assert found is not None
    assert found.fingerprint() == dataset.fingerprint()
