from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from goku.data.transform import apply, plan, snapped_size, square_pixels, usable_frames

sizes = st.integers(1, 400)
budgets = st.integers(256, 100_000)


def every_size(height: int, width: int, pixels: int, upscale: bool) -> list[tuple[int, int]]:
    top = pixels // 16 if upscale else max(height, width)
    return [
        (h, w)
        for h in range(16, top + 1, 16)
        for w in range(16, min(top, pixels // h) + 1, 16)
        if upscale or (h <= height and w <= width)
    ]


@settings(max_examples=60)
@given(height=sizes, width=sizes, pixels=budgets)
def test_the_size_is_the_best_of_all_allowed_ones(height: int, width: int, pixels: int) -> None:
    allowed = every_size(height, width, pixels, upscale=False)
    if not allowed:
        with pytest.raises(ValueError, match=f"{height}x{width}"):
            snapped_size(height, width, pixels)
        return
    best = max(
        allowed, key=lambda size: (min(size[1] * height, size[0] * width), -size[0] * size[1])
    )
    found = snapped_size(height, width, pixels)
    # Sizes of the same fit and area (a square's two ways to round) are equally good.
    assert found in allowed
    assert min(found[1] * height, found[0] * width) == min(best[1] * height, best[0] * width)
    assert found[0] * found[1] == best[0] * best[1]


@settings(max_examples=30)
@given(
    height=sizes,
    width=sizes,
    pixels=st.integers(256, 4000),
    most=st.none() | st.tuples(st.integers(16, 250), st.integers(16, 250)),
)
def test_enlarging_too_is_the_best_of_all(
    height: int, width: int, pixels: int, most: tuple[int, int] | None
) -> None:
    allowed = every_size(height, width, pixels, upscale=True)
    if most is not None:
        allowed = [size for size in allowed if size[0] <= most[0] and size[1] <= most[1]]
    best = max(
        allowed, key=lambda size: (min(size[1] * height, size[0] * width), -size[0] * size[1])
    )
    found = snapped_size(height, width, pixels, upscale=True, most=most)
    assert found in allowed
    assert min(found[1] * height, found[0] * width) == min(best[1] * height, best[0] * width)


@pytest.mark.parametrize(
    ("source", "pixels", "expected"),
    [
        # The paper's stages, from 720p and 1080p sources (arXiv 2502.04896, training stages).
        ((720, 1280), 288 * 512, (288, 512)),
        ((720, 1280), 480 * 864, (480, 864)),
        ((1080, 1920), 480 * 864, (480, 864)),
        ((720, 1280), 720 * 1280, (720, 1280)),
        ((1080, 1920), 720 * 1280, (720, 1280)),
        ((512, 512), 256 * 256, (256, 256)),
        ((100, 100), 256 * 256, (96, 96)),
        ((100, 3000), 4096, (16, 256)),
    ],
)
def test_known_sizes(source: tuple[int, int], pixels: int, expected: tuple[int, int]) -> None:
    assert snapped_size(*source, pixels) == expected
    assert snapped_size(*reversed(source), pixels) == tuple(reversed(expected))


@given(
    height=st.integers(16, 900),
    width=st.integers(16, 900),
    pixels=budgets,
    frames=st.integers(1, 90),
    longest=st.integers(0, 20).map(lambda k: 4 * k + 1),
)
def test_a_plan_is_consistent(
    height: int, width: int, pixels: int, frames: int, longest: int
) -> None:
    geometry = plan(height, width, frames, pixels=pixels, max_frames=longest)
    assert geometry.height % 16 == geometry.width % 16 == 0
    assert geometry.height * geometry.width <= pixels
    # Nothing is enlarged, the crop lies inside and is centred to a pixel.
    assert geometry.height <= geometry.resize_height <= height
    assert geometry.width <= geometry.resize_width <= width
    assert 0 <= geometry.resize_height - geometry.height - 2 * geometry.top <= 1
    assert 0 <= geometry.resize_width - geometry.width - 2 * geometry.left <= 1
    # One side is exactly the crop's, and the other follows it to half a pixel.
    by_height = abs(geometry.resize_width - width * geometry.height / height) <= 0.5 + 1e-9
    by_width = abs(geometry.resize_height - height * geometry.width / width) <= 0.5 + 1e-9
    assert (geometry.resize_height == geometry.height and by_height) or (
        geometry.resize_width == geometry.width and by_width
    )
    assert geometry.frames == max(f for f in range(1, min(frames, longest) + 1) if f % 4 == 1)
    t, h, w = geometry.grid
    assert (4 * (t - 1) + 1, 16 * h, 16 * w) == (geometry.frames, geometry.height, geometry.width)
    assert geometry.tokens == t * h * w
    assert geometry.latent_shape == (t, geometry.height // 8, geometry.width // 8)


def test_no_frames_is_an_error() -> None:
    with pytest.raises(ValueError, match="frames: 0"):
        usable_frames(0, 17)


@pytest.mark.parametrize("size", [(0, 5), (15, 400), (400, 15)])
def test_too_small_is_an_error_unless_enlarged(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}"):
        snapped_size(*size, 4096)
    if min(size):
        assert min(snapped_size(*size, 4096, upscale=True)) >= 16


def test_sides_that_leave_no_size_are_named() -> None:
    with pytest.raises(ValueError, match=r"most: 15x64 .* is less than 16x16"):
        snapped_size(64, 64, 4096, most=(15, 64))


def test_pixels_are_those_of_a_resize_and_a_crop() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 160, 3), dtype=np.uint8))
    geometry = plan(90, 160, 1, pixels=48 * 80, max_frames=1)
    assert (geometry.height, geometry.width) == (48, 80)
    # 48/90 covers the height; 160 * 48/90 = 85.3 wide; (85 - 80) // 2 = 2 from the left.
    expected = image.resize((85, 48), Image.Resampling.BICUBIC).crop((2, 0, 82, 48))
    np.testing.assert_array_equal(apply(image, geometry), np.asarray(expected))


def test_a_fitting_picture_is_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    geometry = plan(32, 48, 1, pixels=10**6, max_frames=1)
    np.testing.assert_array_equal(apply(Image.fromarray(pixels), geometry), pixels)


@pytest.mark.parametrize(
    ("aspect", "expected"), [(1.0, (100, 60)), (2.0, (50, 60)), (0.5, (100, 30))]
)
def test_square_pixels_reduce(aspect: float, expected: tuple[int, int]) -> None:
    assert square_pixels(100, 60, aspect) == expected
