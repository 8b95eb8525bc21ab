"""What decoding a file gives, whatever kind of file it is: `Media`, `Decoded`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import PIL

from goku.data.config import DataConfig
from goku.data.errors import DecodeError
from goku.data.record import Record
from goku.data.transform import Geometry, plan

DECODE_VERSION = 2
"""Part of every cache key: raise it whenever the same file would give other pixels."""

RESAMPLE_VERSION = 2
"""Part of the keys of clips taken at `data.fps`: raise it whenever they would get other frames."""


def decoder_version(record: Record) -> dict[str, str]:
    """Part of the record's cache keys: the libraries whose other version may give other pixels.

    Pillow reads images and resizes the frames of videos too, which PyAV reads by FFmpeg.
    """
    versions = {"pillow": PIL.__version__}
    if not record.is_image:
        versions["av"] = av.__version__
        for name, version in av.library_versions.items():
            versions[name] = ".".join(str(part) for part in version)
    return versions


@dataclass(frozen=True)
class Media:
    """What was found in a file, and what it becomes.

    `source_frames` and `source_fps` describe the file as its header states it (0 = not stated);
    `selected_frames` is how many frames were there to choose from within the range, after
    resampling, counted up to max_frames. `exact` is False where only headers were read. `remarks`:
    what is worth saying of a file that is used (converted, turned, resampled ...), each a sentence.
    """

    geometry: Geometry
    selected_frames: int
    source_frames: int
    source_fps: float
    seconds: float
    exact: bool
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decoded:
    """Pixels (T, H, W, 3) uint8 with T = 4k+1, and their origin."""

    pixels: npt.NDArray[np.uint8]
    media: Media


def plan_record(
    record: Record, config: DataConfig, height: int, width: int, frames: int
) -> Geometry:
    """`plan` with the record's budget; what it refuses is a DecodeError of the record's path."""
    pixels = config.image_pixels if record.is_image else config.video_pixels
    try:
        return plan(
            height,
            width,
            frames,
            pixels=pixels,
            max_frames=config.max_frames,
            upscale=config.upscale,
        )
    except ValueError as error:
        raise DecodeError(record.path, str(error)) from error


def check_pixels(record: Record, config: DataConfig, height: int, width: int) -> tuple[str, ...]:
    """DecodeError when the source has more than config.max_source_pixels; a remark when it has more than half."""
    pixels = height * width
    if pixels > config.max_source_pixels:
        raise too_large(record, config, f"{height} x {width} = {pixels:,}")
    if pixels > config.max_source_pixels // 2:
        return (f"is huge: {height} x {width} = {pixels:,} pixels",)
    return ()


def too_large(record: Record, config: DataConfig, pixels: str) -> DecodeError:
    """The refusal of a source of so many `pixels`."""
    limit = f"over data.max_source_pixels = {config.max_source_pixels:,}"
    return DecodeError(record.path, f"{pixels} pixels, {limit}", "too large")


def size_remarks(geometry: Geometry) -> tuple[str, ...]:
    """A remark on a source with an odd side, which no multiple of 16 holds whole."""
    height, width = geometry.source_height, geometry.source_width
    if height % 2 == 0 and width % 2 == 0:
        return ()
    cropped = f"cropped to {geometry.height} x {geometry.width}"
    return (f"has an odd size: {height} x {width}, {cropped}",)


def first_line(error: BaseException, path: str) -> str:
    """A library's message, short enough for a list: one line, without the full path."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text.replace(f": {path!r}", "").replace(path, Path(path).name) or type(error).__name__
