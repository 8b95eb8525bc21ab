"""Geometry: from a source's size to the pixels that the model sees, as one pure function.

`plan` is used by the decoder and by the doctor alike, so the doctor's prediction is what training
gets. Pixels are resized by Pillow's bicubic filter, which widens its support when it reduces (that
is, antialiased), on 8-bit RGB as stored (no linear light), then cropped at the centre.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import numpy as np
import numpy.typing as npt
from PIL import Image

from goku.data.config import SNAP

VAE_STRIDES = (4, 8, 8)
"""The (time, height, width) strides that this geometry is made for."""


@dataclass(frozen=True)
class Geometry:
    """Source display size -> resized size -> centre crop (pixels); `frames` is 4k+1.

    `source_*` is the upright size: after EXIF or display-matrix rotation and with square pixels.
    """

    source_height: int
    source_width: int
    resize_height: int
    resize_width: int
    top: int
    left: int
    height: int
    width: int
    frames: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) tokens after the VAE (4, 8, 8) and patchify 1x2x2."""
        return (self.frames - 1) // 4 + 1, self.height // SNAP, self.width // SNAP

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(T, H, W) of the latent."""
        t, h, w = self.grid
        return t, 2 * h, 2 * w


def usable_frames(available: int, max_frames: int) -> int:
    """The largest 4k+1 <= min(available, max_frames). ValueError when there is no frame."""
    if available < 1:
        raise ValueError(f"frames: {available} available, at least 1 is needed")
    return (min(available, max_frames) - 1) // 4 * 4 + 1


def snapped_size(
    height: int,
    width: int,
    pixels: int,
    *,
    upscale: bool = False,
    most: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The (height, width) to train at: multiples of 16, at most `pixels` in area, neither side
    above the source's unless `upscale`, nor above those of `most`. Of these, the size into which the whole source fits
    largest (max of min(w / width, h / height)); ties go to the smallest area, which crops least.

    Exact in integers. ValueError when the source is smaller than 16 on a side and not `upscale`.
    """
    if height < 1 or width < 1:
        raise ValueError(f"size: {height}x{width} (height x width) is empty")
    if pixels < SNAP * SNAP:
        raise ValueError(f"pixels: {pixels} is less than {SNAP * SNAP}, one {SNAP}x{SNAP} square")
    if not upscale and min(height, width) < SNAP:
        raise ValueError(
            f"size: {height}x{width} (height x width) is smaller than {SNAP}x{SNAP}, the least "
            "that the model can take without enlarging (upscale: true allows it)"
        )
    ideal = isqrt(pixels * height // width)  # height at which the budget is just filled
    highest = min(_ceil(ideal), _floor(pixels // SNAP))
    widest = _floor(pixels // SNAP)
    if not upscale:
        highest, widest = min(highest, _floor(height)), min(widest, _floor(width))
    if most is not None:
        if min(most) < SNAP:
            raise ValueError(
                f"most: {most[0]}x{most[1]} (height x width) is less than {SNAP}x{SNAP}"
            )
        highest, widest = min(highest, _floor(most[0])), min(widest, _floor(most[1]))
    best: tuple[int, int, int, int] | None = None
    # Above _ceil(ideal) the width that the budget leaves only shrinks, so no size there is better.
    for h in range(SNAP, max(highest, SNAP) + 1, SNAP):
        w = max(SNAP, min(_ceil(-(-h * width // height)), _floor(pixels // h), widest))
        score = (min(w * height, h * width), -h * w, h, w)
        if best is None or score > best:
            best = score
    assert best is not None
    return best[2], best[3]


def plan(
    source_height: int,
    source_width: int,
    available_frames: int,
    *,
    pixels: int,
    max_frames: int,
    upscale: bool = False,
) -> Geometry:
    """The geometry of one item. Sizes in pixels; ValueError as `snapped_size`, `usable_frames`."""
    height, width = snapped_size(source_height, source_width, pixels, upscale=upscale)
    # The smallest aspect-preserving size that covers the crop: one side is exact by construction.
    if height * source_width >= width * source_height:
        resize_height = height
        resize_width = max(width, _round_div(source_width * height, source_height))
    else:
        resize_width = width
        resize_height = max(height, _round_div(source_height * width, source_width))
    return Geometry(
        source_height=source_height,
        source_width=source_width,
        resize_height=resize_height,
        resize_width=resize_width,
        top=(resize_height - height) // 2,
        left=(resize_width - width) // 2,
        height=height,
        width=width,
        frames=usable_frames(available_frames, max_frames),
    )


def apply(image: Image.Image, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Resize and crop one upright RGB image -> (height, width, 3) uint8."""
    size = (geometry.resize_width, geometry.resize_height)
    resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    rows = slice(geometry.top, geometry.top + geometry.height)
    columns = slice(geometry.left, geometry.left + geometry.width)
    # A copy: a view would keep the uncropped frame alive.
    return np.array(np.asarray(resized)[rows, columns], dtype=np.uint8)


def square_pixels(height: int, width: int, aspect: float) -> tuple[int, int]:
    """Display (height, width) of a `height` x `width` frame whose pixels are `aspect` times as wide
    as high: the longer axis is reduced, so that nothing is enlarged."""
    if aspect > 1:
        return max(1, round(height / aspect)), width
    return height, max(1, round(width * aspect))


def _floor(value: int) -> int:
    return value // SNAP * SNAP


def _ceil(value: int) -> int:
    return -(-value // SNAP) * SNAP


def _round_div(a: int, b: int) -> int:
    return (2 * a + b) // (2 * b)
