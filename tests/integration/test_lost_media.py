"""Runs that go on although items of their dataset are lost, or have come since they began."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from goku.cli import main
from goku.metrics import read_log


@pytest.fixture
def run(tmp_path: Path, media: Path, settings: dict[str, Any]) -> Path:
    """The config of a run of four steps whose dataset is a table, and its own."""
    folder = tmp_path / "media"
    shutil.copytree(media, folder)
    _table(folder, {file.name: file.stem for file in sorted(folder.iterdir()) if _is_media(file)})
    data = settings["data"] | {"path": str(folder), "cache": str(tmp_path / "cache")}
    train = settings["train"] | {"steps": 4, "checkpoint_every": 4, "eval_every": 0}
    train |= {"sample_every": 0, "device": "cpu"}
    tree = settings | {"out": str(tmp_path / "run"), "train": train}
    tree["data"] = data | {"skip_bad": True}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _is_media(file: Path) -> bool:
    return file.suffix in (".png", ".mp4")


def _table(folder: Path, captions: dict[str, str]) -> None:
    rows = [{"path": name, "text": caption} for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _steps(run: Path, out: str = "run") -> list[dict[str, Any]]:
    kept = ("step", "loss", "grad_norm", "positions", "lr")
    log = read_log(run.parent / out / "train.jsonl")
    return [{key: e[key] for key in kept} for e in log if e["event"] == "step"]


def test_lost_media_do_not_keep_a_run_from_going_on(run: Path, capsys: Any) -> None:
    folder = run.parent / "media"
    assert main(["train", str(run)]) == 0
    assert (run.parent / "run/items.json.gz").is_file()
    # train.eval_every is 0, at the beginning too
    assert all(e["event"] != "eval" for e in read_log(run.parent / "run" / "train.jsonl"))
    shutil.copytree(run.parent / "run", run.parent / "whole")
    assert main(["train", str(run), f"out={run.parent / 'whole'}", "train.steps=6"]) == 0
    # Its latent is there: nothing is lost. A new item changes nothing either.
    (folder / "clip1.mp4").rename(run.parent / "clip1.mp4")
    (folder / "copy.png").write_bytes((folder / "image0.png").read_bytes())
    captions = {f.name: f.stem for f in sorted([*folder.iterdir(), folder / "clip1.mp4"])}
    del captions["metadata.jsonl"]
    _table(folder, {name: word for name, word in captions.items() if not name.endswith(".txt")})
    shutil.copytree(run.parent / "run", run.parent / "gone")
    capsys.readouterr()
    assert main(["train", str(run), f"out={run.parent / 'gone'}", "train.steps=6"]) == 0
    assert _steps(run, "gone") == _steps(run, "whole")
    said = capsys.readouterr().err
    assert "latents: 1 with unusable media trained from its cached latent: clip1.mp4" in said
    assert "latents: 1 left out, which the run did not begin with: copy.png" in said
    # Without its latent it is lost: weight 0 in steps that are the same otherwise.
    shutil.rmtree(run.parent / "cache/latents")
    assert main(["train", str(run), "train.steps=6"]) == 0
    said = capsys.readouterr().err
    assert re.search(
        r"1 of \d items lost, in the run's steps with weight 0: clip1.mp4: media file", said
    )
    assert [s["positions"] for s in _steps(run)] == [s["positions"] for s in _steps(run, "whole")]
    rows = [json.loads(row) for row in (run.parent / "run/quarantine.jsonl").open()]
    assert [row["name"] for row in rows] == ["clip1.mp4"]  # not again when it was drawn
    lost = [e for e in read_log(run.parent / "run/train.jsonl") if e["event"] == "lost"]
    assert [e["name"] for e in lost] == ["clip1.mp4"]


def test_what_has_changed_is_named(run: Path, capsys: Any) -> None:
    folder = run.parent / "media"
    assert main(["train", str(run), "train.steps=1"]) == 0
    capsys.readouterr()
    captions = {f.name: f.stem for f in sorted(folder.iterdir()) if _is_media(f)}
    _table(folder, captions | {"image1.png": "another"})
    assert main(["train", str(run)]) == 2
    said = capsys.readouterr().err
    assert "was written by an incompatible run" in said
    assert "image1.png: its caption was 'image1', is 'another'" in said
    assert "clip0.mp4" not in said
    # What has bad items may be left out from now on: that the items are the same is checked.
    _table(folder, captions)
    assert main(["train", str(run), "data.skip_bad=false", "train.steps=2"]) == 0
