"""The demo's way from media to verdict, in miniature, and what it refuses before it removes anything."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from goku.demo import DemoError, run
from goku.metrics import read_log

TINY = [
    "vae.train.steps=3",
    "vae.model.width=8",
    "vae.model.stem_width=8",
    "model.dim=32",
    "model.heads=2",
    "model.depth=1",
    "train.steps=400",
    "train.checkpoint_every=100",
    "train.eval_every=200",
    "train.eval_times=1",
    "train.sample_every=400",
    "train.sample_steps=1",
    "data.workers=0",
    "packing.tokens_per_step=8",
    "packing.tokens_per_pack=8",
]


def _media(directory: Path, **_: Any) -> None:
    """Four captioned pictures to learn and one that stays unseen, in place of the downloaded media."""
    generator = np.random.default_rng(0)
    for folder, count in (("train", 4), ("unseen", 1)):
        (directory / folder).mkdir(parents=True)
        for i in range(count):
            pixels = np.kron(generator.integers(0, 256, (2, 2, 3)), np.ones((16, 16, 1)))
            Image.fromarray(pixels.astype(np.uint8)).save(directory / folder / f"p{i}.png")
            (directory / folder / f"p{i}.txt").write_text(f"{folder} {i}")


@pytest.mark.long
def test_the_whole_way_with_a_real_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "collect", _media)
    out = tmp_path / "demo # out"  # a path that YAML would cut short
    code = run.run_demo(out, overrides=TINY)
    last = capfd.readouterr().out.strip().splitlines()[-1]
    rows = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    verdict = rows[0]
    # 400 steps of a crippled model: the verdict must be a failure, and say so in the exit code.
    assert (code, verdict["passed"]) == (1, False)
    assert last.startswith("FAIL (")
    for words in ("nearest item", "mean image", "VAE", "fixed noise", "unseen media"):
        assert words in last
    assert verdict["samples"] == 8
    log = read_log(out / "run" / "train.jsonl")
    resumed = [e["step"] for e in log if e["event"] == "resume"]
    assert len(resumed) == 1
    assert resumed[0] >= 200
    assert resumed[0] % 100 == 0
    assert [e["event"] for e in log if e["event"] in ("stop", "finish")] == ["finish"]
    page = (out / "report.html").read_text()
    assert "killed at" in page
    assert not re.search(r"<(script|img|link|video)[^>]+(src|href)=.https?:", page)
    assert (out / "samples").is_dir()


def test_nothing_is_removed_before_everything_is_checked(tmp_path: Path) -> None:
    (tmp_path / ".goku-demo").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "report.html").write_text("earlier")
    for overrides, words in (
        (["tarin.steps=3"], "train"),
        (["train.steps=50"], "checkpoint_every is 100; allowed: 1 to train.steps - 2 = 48"),
        (["train.checkpoint_every=0"], "checkpoint_every is 0"),
        (["train.log_every=10"], "log_every is 10"),
        (["vae.path=/elsewhere"], "--out"),
        (["out=/elsewhere"], "--out"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            run.run_demo(tmp_path, overrides=overrides)
    assert (tmp_path / "report.html").read_text() == "earlier"
    assert (tmp_path / "run").is_dir()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DemoError, match="holds something else"):
        run.run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
