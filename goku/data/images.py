"""Still images by Pillow; the rules are in `goku.data.decode`."""

from __future__ import annotations

import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from goku.data.config import DataConfig
from goku.data.errors import DecodeError, decoding
from goku.data.media import (
    Decoded,
    Media,
    check_pixels,
    first_line,
    plan_record,
    size_remarks,
    too_large,
)
from goku.data.media_source import misnamed, open_media
from goku.data.record import Record
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
)
_GREY = ("1", "L", "LA", "La", "I")
# Suffixes by Pillow's name of the format; an MPO is a JPEG with a second picture.
_SUFFIXES = {
    "BMP": (".bmp",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}


def decode_image(record: Record, config: DataConfig) -> Decoded:
    """(1, H, W, 3) pixels of a still image. Raises DecodeError."""
    with _open(record, config) as image:
        remarks = _remarks(image, record, config)
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
        except _PILLOW_ERRORS as error:
            reason = f"corrupt image: {first_line(error, record.path)}"
            raise DecodeError(record.path, reason) from error
        media = _media(record, config, upright.height, upright.width, remarks, exact=True)
        return Decoded(apply(_to_rgb(upright, record.path), media.geometry)[None], media)


def read_rgb(path: str) -> Image.Image:
    """A still image outside of a dataset: upright, 8-bit RGB, in its own size. Raises DecodeError."""
    record, config = Record(path, "given", path), DataConfig(path=path)
    with decoding(path), _open(record, config) as image:
        check_pixels(record, config, image.height, image.width)
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), path)
        except _PILLOW_ERRORS as error:
            raise DecodeError(path, f"corrupt image: {first_line(error, path)}") from error


def probe_image(record: Record, config: DataConfig) -> Media:
    """As `decode_image`, from the header alone."""
    with _open(record, config) as image:
        remarks = _remarks(image, record, config)
        height, width = _upright(image, record.path)
    return _media(record, config, height, width, remarks, exact=False)


def upright_size(path: str) -> tuple[int, int]:
    """(height, width) of what `read_rgb` gives, from the header alone. Raises DecodeError."""
    record, config = Record(path, "given", path), DataConfig(path=path)
    with decoding(path), _open(record, config) as image:
        check_pixels(record, config, image.height, image.width)
        return _upright(image, path)


def _upright(image: Image.Image, path: str) -> tuple[int, int]:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _PILLOW_ERRORS as error:
        raise DecodeError(path, f"corrupt image: {first_line(error, path)}") from error
    if orientation in _TURNED:
        return image.width, image.height
    return image.height, image.width


@contextmanager
def _open(record: Record, config: DataConfig) -> Iterator[Image.Image]:
    path = record.path
    # Pillow reads the suffix of nothing: the content decides. Sizes are checked below, and said by name.
    with open_media(record) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(file)
        except Image.DecompressionBombError as error:
            found = re.search(r"\d+", str(error))  # its size is known to the message alone
            pixels = f"{int(found[0]):,}" if found else "too many"
            raise too_large(record, config, pixels) from error
        except _PILLOW_ERRORS as error:
            reason = misnamed(record, "image") or f"{first_line(error, path)}"
            raise DecodeError(path, f"not a readable image: {reason}") from error
        with image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise DecodeError(path, "holds several pictures; split it, or make it a video")
            yield image


def _remarks(image: Image.Image, record: Record, config: DataConfig) -> tuple[str, ...]:
    """What is done to the picture as stored. DecodeError when it has too many pixels."""
    remarks = [*check_pixels(record, config, image.height, image.width)]
    suffix = Path(record.path).suffix
    if suffix.lower() not in _SUFFIXES.get(image.format or "", ()):
        remarks.append(f"holds {image.format} image, is named {suffix}")
    if image.mode == "CMYK":
        remarks.append("CMYK converted to RGB, without its colour profile")
    if image.mode in _GREY or image.mode.startswith("I;16"):
        remarks.append(f"grey (mode {image.mode}) converted to RGB")
    _check_mode(image, record.path)
    if image.has_transparency_data:
        remarks.append("alpha: transparency composited on white")
    return tuple(remarks)


def _media(
    record: Record,
    config: DataConfig,
    height: int,
    width: int,
    remarks: tuple[str, ...],
    *,
    exact: bool,
) -> Media:
    if record.start_frame or (record.num_frames not in (None, 1) and not record.at_most):
        raise DecodeError(
            record.path,
            f"a still image has 1 frame; start_frame {record.start_frame}, "
            f"num_frames {record.num_frames} were asked for",
        )
    geometry = plan_record(record, config, height, width, 1)
    return Media(geometry, 1, 1, 0.0, 0.0, exact, (*remarks, *size_remarks(geometry)))


def _check_mode(image: Image.Image, path: str) -> None:
    if image.mode == "F":
        raise DecodeError(path, "floating-point images (mode F) have no defined white; use 8 bits")


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        levels = np.asarray(image, dtype=np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise DecodeError(path, f"levels {levels.min()}..{levels.max()} are not 16-bit")
        picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8)).convert("RGB")
        clear = image.info.get("transparency")  # of grey: the one level that is not there
        if isinstance(clear, int):
            picture.paste((255, 255, 255), mask=Image.fromarray(levels == clear))
        return picture
    _check_mode(image, path)
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")
