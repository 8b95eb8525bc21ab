"""What a request has where nothing is said, and the words for what lies beyond training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from goku.requests import Request, read_requests
from goku.sizes import beyond_limits, request_defaults
from goku.trained import Trained, read_checkpoint

Make = Callable[..., Path]


def _about(
    trained_run: Make, image: int, video: int, limits: list[int] | None, area: int | None
) -> Trained:
    data = {"image_pixels": image, "video_pixels": video}
    return read_checkpoint(trained_run(limits=limits, area=area, data=data))


def test_the_warning_says_what_is_done() -> None:
    request = Request("a", 192, 448, frames=33)
    assert beyond_limits(request, None) is None
    assert beyond_limits(request, (9, 12, 28)) is None
    assert beyond_limits(request, (5, 8, 8)) == (
        "192 x 448, 33 frames: beyond the trained 128 x 128, 17; "
        "RoPE positions scaled by t 0.50, h 0.64, w 0.26"
    )
    assert beyond_limits(request, (1, 12, 28)) == (
        "192 x 448, 33 frames: beyond the trained 192 x 448, 1; not along t, where training had one position"
    )
    assert beyond_limits(request, (5, 8, 8), scaled=False) == (
        "192 x 448, 33 frames: beyond the trained 128 x 128, 17; RoPE positions as they are"
    )


def test_an_area_beyond_the_trained_one_is_said() -> None:
    """After 720 x 1280 and 1280 x 720 a square is within every axis, and was never seen."""
    limits, area = (1, 80, 80), 45 * 80
    assert beyond_limits(Request("a", 1280, 1280), limits, area) == (
        "1280 x 1280, 1 frames: 6400 tokens in a frame, beyond the trained 3600"
    )
    for request in (Request("a", 720, 1280), Request("a", 1280, 720), Request("a", 960, 960)):
        assert beyond_limits(request, limits, area) is None
    # Checkpoints of before do not say it.
    assert beyond_limits(Request("a", 1280, 1280), limits) is None
    # Beyond an axis that is said alone.
    line = beyond_limits(Request("a", 1296, 1280), limits, area)
    assert line is not None
    assert line.startswith("1296 x 1280, 1 frames: beyond the trained 1280 x 1280, 1; RoPE")


@pytest.mark.parametrize(
    ("limits", "area", "frames", "size"),
    [
        # Images and clips each in their own area.
        (None, None, 1, (64, 64)),
        (None, None, 5, (128, 128)),
        # Square, of both shapes; landscape alone; portrait alone.
        ([3, 8, 8], 64, 5, (128, 128)),
        ([3, 4, 7], 28, 5, (64, 112)),
        ([3, 7, 4], 28, 5, (112, 64)),
        ([3, 7, 7], 28, 5, (80, 80)),
        # Trained on images of 48 x 64: nothing was enlarged to fill the 64 x 64 that were allowed.
        ([1, 3, 4], 12, 1, (48, 64)),
        # A checkpoint that does not say its area: what its axes span at most.
        ([3, 4, 7], None, 5, (64, 112)),
    ],
)
def test_what_is_drawn_by_default_was_trained(
    limits: list[int] | None,
    area: int | None,
    frames: int,
    size: tuple[int, int],
    trained_run: Make,
) -> None:
    about = _about(trained_run, 64 * 64, 128 * 128, limits, area)
    request = request_defaults(about, frames=frames).request("a")
    assert (request.height, request.width) == size
    assert beyond_limits(request, about.limits, about.area) is None


@pytest.mark.parametrize(
    ("limits", "area", "picture", "size"),
    [
        # Landscapes alone were trained: a portrait, and a square, are no higher than they were.
        ([3, 18, 32], 18 * 32, (1600, 900), (288, 176)),
        ([3, 18, 32], 18 * 32, (700, 700), (288, 288)),
        ([3, 32, 18], 18 * 32, (900, 1600), (176, 288)),
        # No less than before where both sides are within.
        ([3, 18, 32], 18 * 32, (90, 160), (288, 512)),
        ([3, 18, 32], 18 * 32, (100, 200), (256, 512)),
        # Both shapes were trained, and a square in their area is within both.
        ([3, 32, 32], 18 * 32, (1600, 900), (512, 288)),
        ([3, 32, 32], 18 * 32, (700, 700), (384, 384)),
        # As thin as the largest side lets it be.
        ([3, 18, 32], 18 * 32, (4000, 20), (288, 16)),
    ],
)
def test_a_given_image_keeps_its_shape_within_the_trained_sides(
    limits: list[int],
    area: int,
    picture: tuple[int, int],
    size: tuple[int, int],
    trained_run: Make,
) -> None:
    about = _about(trained_run, 288 * 512, 288 * 512, limits, area)
    image = torch.zeros(3, *picture, dtype=torch.uint8)
    request = request_defaults(about, given={0: image}).request("a")
    assert (request.height, request.width, request.frames) == (*size, 9)
    assert beyond_limits(request, about.limits, about.area) is None
    # What is asked for in numbers is drawn so, and said to be beyond.
    asked = request_defaults(about, given={0: image}, height=1024, width=16).request("a")
    assert (asked.height, asked.width) == (1024, 16)
    assert beyond_limits(asked, about.limits, about.area) is not None


def test_how_long_a_clip_is_by_default(trained_run: Make, tmp_path: Path) -> None:
    """As long as those of training where something is given; an image where nothing is."""
    about = _about(trained_run, 1024, 1024, [5, 2, 2], 4)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(
        '[{"prompt": "a"}, {"prompt": "b", "image": "a.png"}, {"prompt": "c", "last_image": "a.png"},'
        ' {"prompt": "d", "image": "a.png", "frames": 9}]'
    )
    found = read_requests(prompts, request_defaults(about))
    assert [request.frames for request in found] == [1, 17, 17, 9]
    found = read_requests(prompts, request_defaults(about, frames=5))
    assert [request.frames for request in found] == [5, 5, 5, 9]
    # A checkpoint that does not say how long they were leaves it to the caller.
    older = _about(trained_run, 1024, 1024, None, None)
    assert [r.frames for r in read_requests(prompts, request_defaults(older))] == [1, 1, 1, 9]
