"""`DataConfig`: which datasets, and what is made of each of their items."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from goku.data.record import not_unicode

SNAP = 16
"""Pixel sizes are multiples of this: VAE stride 8 times patch 2 (height and width)."""

MAX_SOURCE_PIXELS = 178_956_970
"""Pillow refuses images beyond this many pixels (0.5 GB of RGB) as decompression bombs."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several datasets. path: as `DataConfig.path`; form: of its listing, "auto" goes by what is there;
    motion_caption, follow_links: null takes those of the data section."""

    path: str
    form: Literal["auto", "sidecars", "table", "lists", "webdataset"] = "auto"
    motion_caption: str | None = None
    follow_links: bool | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: '' names no dataset; give a folder, a table or an archive")
        _check_template(self.motion_caption)


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How often a source's stills and clips are drawn, against the weights of all others; 0: not at all, such items are
    not even decoded."""

    image: float = 0.0
    video: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image", "video"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: {value} must be a finite number of at least 0")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data section of a run. Raises ValueError naming the field, its value and what is allowed.

    Attributes:
        path: one dataset: folder of media with sidecar .txt captions (or with a metadata.jsonl/json/csv, or
            videos.txt beside prompt.txt, or .tar archives), or a .jsonl/.json/.csv table or .tar archive.
        sources: several datasets by name, instead of path.
        mix: of which source how much is drawn; null: every item of every source once an epoch.
        image_pixels: most pixels (height * width) of a still image after resizing.
        video_pixels: most pixels of one video frame after resizing.
        max_frames: most frames of a clip, 4k+1; the first frames of the record's range are taken.
        max_seconds: most seconds of a clip, from the range's first frame on; null: no limit.
        fps: None keeps every frame; otherwise clips are resampled by timestamp (see `decode`).
        upscale: enlarge media smaller than the budget (False: never, on neither axis).
        min_image_pixels, min_video_pixels: stills, clips whose upright source has fewer are dropped.
        min_frames: clips with fewer frames (at fps, within the range) are dropped.
        motion_caption: template such as "{caption} motion score: {motion:.1f}" by which an item's motion score
            becomes part of its caption; null: captions as they are.
        skip_bad: go on without items that cannot be used, reporting them (False: DataError).
        follow_links: use media that are links out of the dataset's folder.
        max_source_pixels: images and frames of more pixels than this are refused before they are decoded.
        max_lost: most items that may turn out lost while training before the run stops.
        verify: at a start, read every cached latent whole ("full"), or trust one that has the size it was written
            with ("size"); damage is then found when the latent is used, and mended.
        read_ahead: packs whose cached samples are read while the steps before them run, into host memory; 0: none.
        workers: decoding processes; 0 decodes in one thread of this process.
        cache: folder of the latent and text caches; None leaves the choice to the caller.
    """

    path: str | None = None
    sources: dict[str, SourceConfig] | None = None
    mix: dict[str, MixConfig] | None = None
    image_pixels: int = 256 * 256
    video_pixels: int = 256 * 256
    max_frames: int = 17
    max_seconds: float | None = None
    fps: float | None = None
    upscale: bool = False
    min_image_pixels: int = 0
    min_video_pixels: int = 0
    min_frames: int = 1
    motion_caption: str | None = None
    skip_bad: bool = False
    follow_links: bool = False
    max_source_pixels: int = MAX_SOURCE_PIXELS
    max_lost: int = 100
    verify: Literal["full", "size"] = "full"
    read_ahead: int = 2
    workers: int = 2
    cache: str | None = None

    def __post_init__(self) -> None:
        self._check_sources()
        for name in ("image_pixels", "video_pixels"):
            value = getattr(self, name)
            if value < SNAP * SNAP:
                raise ValueError(
                    f"{name}: {value} is less than {SNAP * SNAP}, one {SNAP}x{SNAP} square "
                    "(sizes are multiples of VAE stride 8 x patch 2)"
                )
        if self.max_frames < 1 or self.max_frames % 4 != 1:
            raise ValueError(f"max_frames: {self.max_frames} is not 4k+1 (1, 5, 9, 13, 17, ...)")
        for name in ("fps", "max_seconds"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: {value} must be a finite number above 0, or null")
        for name in ("workers", "read_ahead", "max_lost", "min_image_pixels", "min_video_pixels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be 0 or more")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"min_frames: {self.min_frames} must be 1 to max_frames = {self.max_frames}"
            )
        if not 1 <= self.max_source_pixels <= MAX_SOURCE_PIXELS:
            raise ValueError(
                f"max_source_pixels: {self.max_source_pixels} must be 1 to {MAX_SOURCE_PIXELS} "
                "(what Pillow decodes)"
            )
        _check_template(self.motion_caption)

    def _check_sources(self) -> None:
        if self.path == "":
            raise ValueError("path: '' names no dataset; give a folder, a table or an archive")
        if (self.path is None) == (not self.sources):
            found = "both are given" if self.sources else "neither is given"
            raise ValueError(f"path, sources: {found}; give exactly one of them")
        for name in self.sources or {}:
            if not name or ":" in name:
                raise ValueError(f"sources: {name!r} is no name; give it letters, and no colon")
        if self.mix is None:
            return
        names = list(self.sources or {})
        for name in self.mix:
            if name not in names:
                raise ValueError(
                    f"mix.{name}: is no source; allowed: {', '.join(names) or '(data.sources is not given)'}"
                )
        if not any(weights.image or weights.video for weights in self.mix.values()):
            raise ValueError("mix: every weight is 0; give one that is not")


def _check_template(template: str | None) -> None:
    if template is None:
        return
    try:
        told = template.format(caption="\0", motion=1.0)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise ValueError(
            f"motion_caption: {template!r} cannot be filled in ({error!r}); allowed are {{caption}} and "
            "{motion}, such as '{caption} motion score: {motion:.1f}'"
        ) from error
    if "\0" not in told:
        raise ValueError(f"motion_caption: {template!r} must hold {{caption}}")
    fault = not_unicode(template)
    if fault is not None:
        raise ValueError(f"motion_caption: {template!r} {fault}")
