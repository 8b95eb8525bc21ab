"""`DataConfig`: which dataset, and what is made of each of its items."""

from __future__ import annotations

import math
from dataclasses import dataclass

SNAP = 16
"""Pixel sizes are multiples of this: VAE stride 8 times patch 2 (height and width)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data section of a run. Raises ValueError naming the field, its value and what is allowed.

    Attributes:
        path: folder of media with sidecar .txt captions (or with a metadata.jsonl/metadata.csv), or
            a .jsonl/.csv manifest.
        image_pixels: most pixels (height * width) of a still image after resizing.
        video_pixels: most pixels of one video frame after resizing.
        max_frames: most frames of a clip, 4k+1; the first frames of the record's range are taken.
        fps: None keeps every frame; otherwise clips are resampled by timestamp (see `decode`).
        upscale: enlarge media smaller than the budget (False: never, on neither axis).
        skip_bad: go on without items that cannot be used, reporting them (False: DataError).
        workers: decoding processes; 0 decodes in one thread of this process.
        cache: folder of the latent and text caches; None leaves the choice to the caller.
    """

    path: str
    image_pixels: int = 256 * 256
    video_pixels: int = 256 * 256
    max_frames: int = 17
    fps: float | None = None
    upscale: bool = False
    skip_bad: bool = False
    workers: int = 2
    cache: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: '' names no dataset; give a folder, a .jsonl or a .csv file")
        for name in ("image_pixels", "video_pixels"):
            value = getattr(self, name)
            if value < SNAP * SNAP:
                raise ValueError(
                    f"{name}: {value} is less than {SNAP * SNAP}, one {SNAP}x{SNAP} square "
                    "(sizes are multiples of VAE stride 8 x patch 2)"
                )
        if self.max_frames < 1 or self.max_frames % 4 != 1:
            raise ValueError(f"max_frames: {self.max_frames} is not 4k+1 (1, 5, 9, 13, 17, ...)")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps: {self.fps} must be a finite number above 0, or null")
        if self.workers < 0:
            raise ValueError(f"workers: {self.workers} must be 0 or more")
