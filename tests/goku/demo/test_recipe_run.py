"""What the demo's second page needs and refuses before it removes anything, and how the two pages go together."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from goku.demo import DemoError, DemoFailed, pages, recipe_run, run_pages
from goku.demo.catalogue import TRAINING, UNSEEN
from goku.demo.recipe_verdict import RecipeRun
from goku.media_files import read_metadata, save
from goku.recipe import load_recipe


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_removed_before_everything_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(*_: object, **__: object) -> None:
        raise AssertionError("what is wrong was not found before the work began")

    monkeypatch.setattr(recipe_run, "collect", collect)
    (tmp_path / ".goku-demo").touch()
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe.html").write_text("earlier")
    for overrides, words in (
        (["stages.i2v.tarin.steps=3"], "did you mean train"),
        (["stages.joint-480.train={steps: 50, checkpoint_every: 49}"],
            "checkpoint_every is 49; allowed: 1 to train.steps - 2 = 48",),
        (["stages.t2i.train.log_every=10"], "stages.t2i: train.log_every is 10"),
        (["train.eval_every=0"], "train.eval_every 0"),
        (["out=/elsewhere"], "--out"),
        (["vae.path=/elsewhere"], "--out"),
        (["sources.i2v.path=/elsewhere"], "--out"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(words)):
            recipe_run.run_recipe_demo(tmp_path, overrides=overrides)
    assert _names(tmp_path) == [".goku-demo", "recipe", "recipe.html"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DemoError, match="holds something else"):
        recipe_run.run_recipe_demo(tmp_path)
    assert _names(tmp_path) == ["thesis.tex"]


def test_the_recipe_has_its_folders_in_the_demos(tmp_path: Path) -> None:
    out = tmp_path / "demo # out"  # a path that YAML would cut short
    recipe = load_recipe(recipe_run.demo_recipe(out, ["stages.i2v.train.steps=7"]))
    assert recipe.stages[-1].config.train.steps == 7
    places = [recipe.out, recipe.vae.vae.path, recipe.vae.unseen, recipe.vae.validation.file]
    places += [source.path for source in (recipe.vae.data.sources or {}).values()]
    assert len(places) == 7
    assert all(out in Path(str(place)).parents for place in places)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """media/train and media/unseen with one clip of noise in place of all of the catalogue's."""
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 64, 112, "yuv420p"
        for t in range(153):  # to the end of the nine frames from 144 on
            pixels = np.random.default_rng(t).integers(0, 256, (4, 7, 3)).astype(np.uint8)
            pixels = np.kron(pixels, np.ones((16, 16, 1), np.uint8))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    for name, media in (("train", TRAINING), ("unseen", UNSEEN)):
        folder = tmp_path / "media" / name
        folder.mkdir(parents=True)
        shots = [medium for medium in media if medium.name in recipe_run.GIVEN]
        for shot in shots:
            shutil.copyfile(clip, folder / shot.source.file_name)
        lines = [json.dumps(shot.record()) for shot in shots]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_given_images_are_first_frames_and_requests_name_them(clips: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_run.demo_recipe(tmp_path))
    given = recipe_run.write_given(recipe, tmp_path)
    assert [(g.name, g.trained) for g in given] == [("bunny", True), ("fence", False)]
    assert _names(tmp_path / "given") == ["bunny.png", "fence.png", "requests.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "given" / "requests.jsonl").open()]
    bunny = next(medium for medium in TRAINING if medium.name == "bunny")
    assert rows[0] == {
        "prompt": bunny.text, "image": "bunny.png", "height": 64, "width": 112, "frames": 9, "seed": 1001,
    }  # fmt: skip
    cases = json.loads((tmp_path / "validation.json").read_text())["data"]
    assert cases[1] == {"caption": bunny.text, "image_path": "given/bunny.png"}
    assert cases[0] == {"caption": TRAINING[0].text, "num_frames": 1}


def test_what_goku_sample_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RecipeRun(load_recipe(recipe_run.demo_recipe(tmp_path)), tmp_path)
    run.given = [recipe_run.Given(name=n, caption=n, trained=True, image=tmp_path) for n in "ab"]
    asked: list[tuple[object, ...]] = []

    def printed(*arguments: object, threads: int) -> str:
        asked.append(arguments)
        folder = tmp_path / "image-to-video" / "held"
        lines = []
        for k, (own, vae) in enumerate((("22.5", "inf"), ("-1.0", "30.1"))):
            path = save(folder / f"000{k}_x", np.zeros((5, 16, 16, 3), np.uint8), metadata={"k": k})
            lines += [
                f"{path}  a prompt",
                f"first frame: {own} dB to the given image, the VAE alone {vae} dB",
            ]
        return "\n".join(lines[: len(lines) if len(asked) == 1 else 3])  # fmt: skip

    monkeypatch.setattr(recipe_run, "output_of", printed)
    recipe_run._draw(run, tmp_path / "model", "held", "--hold")
    assert asked[0][:2] == ("sample", tmp_path / "model")
    assert asked[0][-1] == "--hold"
    found = run.drawn["held"]
    assert [(one.psnr, one.vae_psnr) for one in found] == [(22.5, float("inf")), (-1.0, 30.1)]
    assert [read_metadata(one.path)["k"] for one in found] == [0, 1]
    with pytest.raises(DemoFailed, match=r"made 2 clips in .* told 1 first frames, for 2 given"):
        recipe_run._draw(run, tmp_path / "model", "held")


@pytest.mark.parametrize(
    ("asked", "codes", "expected"),
    [
        ("1", {"1": 0}, 0), ("2", {"2": 1}, 1), ("all", {"1": 0, "2": 0}, 0), ("all", {"1": 1, "2": 0}, 1),
        ("all", {"1": 0, "2": 1}, 1),
    ],
)  # fmt: skip
def test_pages_are_made_as_asked(
    asked: pages.Pages, codes: dict[str, int], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    made: list[str] = []

    def page(number: str) -> Any:
        def make(out: Path, *, media: Path | None, overrides: Sequence[str], also: Any = ()) -> int:
            assert (out, media) == (tmp_path, None)
            # The first page names the second where that is made too.
            assert [file for file, _ in also] == (
                ["recipe.html"] if (asked, number) == ("all", "1") else []
            )
            made.append(number)
            return codes[number]

        return make  # fmt: skip

    monkeypatch.setattr(pages, "run_demo", page("1"))
    monkeypatch.setattr(pages, "run_recipe_demo", page("2"))
    assert run_pages(tmp_path, asked) == expected
    assert made == list(codes)


def test_overrides_are_of_one_page(tmp_path: Path) -> None:
    with pytest.raises(
        DemoError,
        match=r"'train\.steps=3': the two pages have a config each; allowed: .*--page 1 or",
    ):
        run_pages(tmp_path / "out", overrides=["train.steps=3"])  # fmt: skip
    assert not (tmp_path / "out").exists()
