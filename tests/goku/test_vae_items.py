"""What a VAE is trained on: of the items of all stages those that any takes, refused where one of these would be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from goku.cli import main
from goku.data import DataError
from goku.media_files import save
from goku.recipe import load_recipe
from goku.vae_items import decode_vae_items


def _pictures(folder: Path, sizes: Sequence[int]) -> None:
    folder.mkdir()
    for size in sizes:
        Image.fromarray(np.full((size, size, 3), size, np.uint8)).save(folder / f"{size}.png")
        (folder / f"{size}.txt").write_text(f"a square of {size}")


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Any]:
    """Stills by one process, then larger ones of another source by two."""
    _pictures(tmp_path / "a", [16, 32])
    _pictures(tmp_path / "b", [16, 32, 48])
    return {
        "out": str(tmp_path / "out"),
        "sources": {name: {"path": str(tmp_path / name)} for name in "ab"},
        "data": {"workers": 0, "image_pixels": "32x32"},
        "vae": {"path": str(tmp_path / "vae"), "train": {"steps": 1}},
        "text": {"tiny_dim": 32, "tiny_heads": 2},
        "model": {"dim": 32, "depth": 2, "heads": 2, "text_dim": 32},
        "packing": {"tokens_per_step": 48, "tokens_per_pack": 24},
        "train": {"device": "cpu"},
        "stages": {
            "low": {"mix": {"a": {"image": 1.0}}},
            "high": {
                "mix": {"b": {"image": 1.0}},
                "data": {"image_pixels": "48x48", "min_image_pixels": 1024},
                "packing": {"tokens_per_pack": 32},
                "parallel": {"sp": 2},
            },
        },
    }


def _decoded(written: dict[str, Any], *overrides: str) -> list[tuple[int, ...]]:
    recipe = load_recipe(written, overrides)
    clips = decode_vae_items(recipe.vae, [stage.config for stage in recipe.stages])
    return [tuple(clip.shape) for clip in clips]


def test_what_any_stage_takes_and_no_more(written: dict[str, Any]) -> None:
    """One token is enough for the first stage; the second takes none of that size. Pixels are those of the largest."""
    assert _decoded(written) == [(3, 1, size, size) for size in (16, 32, 32, 48)]
    assert _decoded(written, "stages.low.data.min_image_pixels=257") == [
        (3, 1, size, size) for size in (32, 32, 48)
    ]


def test_what_a_stage_would_refuse_is_refused(written: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^b:16\.png has 1 tokens; allowed: parallel\.sp = 2 or"):
        _decoded(written, "stages.high.data.min_image_pixels=256")
    # At its own sizes: 48 x 48 would be 9 tokens, and 32 x 32 is 4.
    with pytest.raises(ValueError, match=r"^a:32\.png: 1 x 2 x 2 = 4 tokens"):
        _decoded(written, "stages.low.packing.tokens_per_pack=3")
    _decoded(written, "stages.low.packing.tokens_per_pack=4")


def test_limits_that_leave_nothing(written: dict[str, Any], tmp_path: Path) -> None:
    for name in ("low", "high"):
        written["stages"][name]["data"] = {"min_image_pixels": 10_000}
    with pytest.raises(DataError, match=r"on; the limits dropped 5 of 5 items: a:16\.png: 16 x 16"):
        _decoded(written)
    # Not the fault of the one that is bad.
    (tmp_path / "a" / "32.png").write_bytes(b"")
    with pytest.raises(DataError, match="on; the limits dropped 4 of 5 items: "):
        _decoded(written | {"data": written["data"] | {"skip_bad": True}})


def test_a_clip_that_a_stage_takes_at_another_rate_is_kept(
    written: dict[str, Any], tmp_path: Path
) -> None:
    """At 4 frames a second it has too few for the second stage; how many the first would find is not known here."""
    save(tmp_path / "b" / "clip", np.zeros((9, 32, 32, 3), np.uint8), fps=8)
    (tmp_path / "b" / "clip.txt").write_text("nine frames")
    clips = {"mix": {"b": {"video": 1.0}}, "data": {"min_frames": 9, "video_pixels": "32x32"}}
    written["stages"]["low"] |= clips
    written["stages"]["high"] |= clips | {"data": clips["data"] | {"fps": 4.0}}
    assert _decoded(written) == [(3, 5, 32, 32)]
    with pytest.raises(DataError, match=r"clip\.mp4: 5 frames, fewer than min_frames = 9"):
        _decoded(written, "stages.low.data.fps=4.0")


def test_the_cache_of_one_stage_trains_the_vae_of_all(
    written: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written["vae"]["model"] = {"stem_width": 8, "width": 8, "encoder_depth": 1, "decoder_depth": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    assert main(["cache", "latents", str(path), "--stage", "high"]) == 0
    assert "training the VAE on 4 items" in capsys.readouterr().err
