"""Still images by Pillow; the rules are in `goku.data.decode`."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps

from goku.data.config import DataConfig
from goku.data.errors import DecodeError
from goku.data.manifest import Record
from goku.data.media import Decoded, Media, first_line, plan_record
from goku.data.transform import apply

_TURNED = (5, 6, 7, 8)  # EXIF orientations that turn by 90 or 270 degrees
# What Pillow raises for damaged files, format by format.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(record: Record, config: DataConfig) -> Decoded:
    """(1, H, W, 3) pixels of a still image. Raises DecodeError."""
    with _open(record.path) as image:
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except _PILLOW_ERRORS as error:
            reason = f"corrupt image: {first_line(error, record.path)}"
            raise DecodeError(record.path, reason) from error
        media = _media(record, config, upright.height, upright.width, exact=True)
        return Decoded(apply(_to_rgb(upright, record.path), media.geometry)[None], media)


def probe_image(record: Record, config: DataConfig) -> Media:
    """As `decode_image`, from the header alone."""
    with _open(record.path) as image:
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        except _PILLOW_ERRORS as error:
            reason = f"corrupt image: {first_line(error, record.path)}"
            raise DecodeError(record.path, reason) from error
        sides = image.height, image.width
    height, width = reversed(sides) if orientation in _TURNED else sides
    return _media(record, config, height, width, exact=False)


def _open(path: str) -> Image.Image:
    try:
        image = Image.open(path)
    except _PILLOW_ERRORS as error:
        raise DecodeError(path, f"not a readable image: {first_line(error, path)}") from error
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        image.close()
        raise DecodeError(path, "holds several pictures; split it, or make it a video")
    return image


def _media(record: Record, config: DataConfig, height: int, width: int, *, exact: bool) -> Media:
    if record.start_frame or record.num_frames not in (None, 1):
        raise DecodeError(
            record.path,
            f"a still image has 1 frame; start_frame {record.start_frame}, "
            f"num_frames {record.num_frames} were asked for",
        )
    geometry = plan_record(record, config, height, width, 1)
    return Media(geometry, 1, 1, 0.0, 0.0, exact)


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image, dtype=np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise DecodeError(path, f"levels {levels.min()}..{levels.max()} are not 16-bit")
        return Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise DecodeError(path, "floating-point images (mode F) have no defined white; use 8 bits")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")
