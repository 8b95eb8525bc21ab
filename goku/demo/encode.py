"""Pictures and clips as the files a browser shows: PNG by Pillow, H.264 MP4 by PyAV, contact sheet.

Media are uint8 `(T, H, W, 3)` arrays; T = 1 is a photograph and becomes PNG, T > 1 a clip, MP4.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "SheetItem",
    "contact_sheet",
    "media_bytes",
    "mp4_bytes",
    "png_bytes",
    "save",
    "to_uint8",
]

Media = npt.NDArray[np.uint8]


def to_uint8(video: Any) -> Media:
    """A `(3, T, H, W)` video as `(T, H, W, 3)` uint8: uint8 stays, floats run from -1 to 1.

    Takes anything NumPy can view (a detached CPU tensor, an array).
    """
    x = np.asarray(video)
    if x.ndim != 4 or x.shape[0] != 3:
        raise ValueError(f"video of shape {x.shape}: must be (3, frames, height, width)")
    x = np.moveaxis(x, 0, -1)
    if x.dtype == np.uint8:
        return np.ascontiguousarray(x)
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"video of dtype {x.dtype}: must be uint8 or floating in [-1, 1]")
    if not np.isfinite(x).all():
        raise ValueError("video holds non-finite values: it must be in [-1, 1]")
    return np.rint(np.clip(x.astype(np.float64) * 127.5 + 127.5, 0.0, 255.0)).astype(np.uint8)


def png_bytes(frame: npt.NDArray[np.uint8]) -> bytes:
    """One `(H, W, 3)` uint8 frame as PNG."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "PNG")
    return out.getvalue()


def mp4_bytes(video: Media, *, fps: int = 10, crf: int = 16) -> bytes:
    """A `(T, H, W, 3)` uint8 clip as H.264 MP4 that browsers play (yuv420p).

    4:2:0 chroma needs even sides; an odd one repeats its last row or column.
    """
    _check(video)
    height, width = video.shape[1:3]
    padded = np.pad(video, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        options = {"crf": str(crf), "preset": "medium"}
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width, stream.height = padded.shape[2], padded.shape[1]
        stream.pix_fmt = "yuv420p"
        for picture in padded:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def media_bytes(video: Media, *, fps: int = 10) -> tuple[str, bytes]:
    """(MIME type, bytes): PNG for one frame, MP4 for more."""
    _check(video)
    if len(video) == 1:
        return "image/png", png_bytes(video[0])
    return "video/mp4", mp4_bytes(video, fps=fps)


def save(stem: Path, video: Media, *, fps: int = 10) -> Path:
    """Write `stem`.png or `stem`.mp4 and return that path."""
    kind, data = media_bytes(video, fps=fps)
    path = stem.with_name(stem.name + (".png" if kind == "image/png" else ".mp4"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@dataclass(frozen=True, kw_only=True)
class SheetItem:
    """One column of the contact sheet: a training item above what was generated for its caption."""

    caption: str
    training: Media
    generated: Media
    attribution: str = ""


def contact_sheet(
    items: Sequence[SheetItem], *, height: int = 128, max_width: int = 1240, clip_frames: int = 3
) -> bytes:
    """A PNG with the training item above the generated one, captioned; clips as a few frames.

    Args:
        items: the columns, in order; only items whose licence allows it belong in a public picture.
        height: of every picture, in pixels; widths keep the aspect ratio.
        max_width: columns wrap to a new band beyond this width, in pixels.
        clip_frames: frames shown of a clip, first and last included.
    """
    if not items:
        raise ValueError("contact_sheet: items is empty; there must be at least one")
    margin, gap, label_width, line = 14, 12, 82, 17
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=11)
    strips = [
        (_strip(item.training, height, clip_frames), _strip(item.generated, height, clip_frames))
        for item in items
    ]
    bands: list[list[int]] = [[]]
    used = label_width
    for index, (above, _) in enumerate(strips):
        if bands[-1] and used + above.width + gap > max_width - 2 * margin:
            bands.append([])
            used = label_width
        bands[-1].append(index)
        used += above.width + gap

    captions = [
        _wrap(item.caption, font, max(strip[0].width, 90))
        for item, strip in zip(items, strips, strict=True)
    ]
    credits = [
        _wrap(item.attribution, small, max(strip[0].width, 90)) if item.attribution else []
        for item, strip in zip(items, strips, strict=True)
    ]
    text_heights = [
        max(len(captions[i]) * line + len(credits[i]) * 13 for i in band) for band in bands
    ]
    widths = [
        label_width + sum(max(strips[i][0].width, 90) + gap for i in band) - gap for band in bands
    ]
    band_height = 2 * height + 4 + 8
    total = sum(band_height + text + 18 for text in text_heights) + 2 * margin - 18
    sheet = Image.new("RGB", (max(widths) + 2 * margin, total), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    y = margin
    for band, text_height in zip(bands, text_heights, strict=True):
        draw.text((margin, y + height // 2 - 8), "training", font=font, fill=(90, 90, 90))
        middle = y + height + 4 + height // 2 - 8
        draw.text((margin, middle), "generated", font=font, fill=(20, 20, 20))
        x = margin + label_width
        for index in band:
            above, below = strips[index]
            sheet.paste(above, (x, y))
            sheet.paste(below, (x, y + height + 4))
            row = y + band_height
            for text in captions[index]:
                draw.text((x, row), text, font=font, fill=(20, 20, 20))
                row += line
            for text in credits[index]:
                draw.text((x, row), text, font=small, fill=(120, 120, 120))
                row += 13
            x += max(above.width, 90) + gap
        y += band_height + text_height + 18
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _check(video: Media) -> None:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ValueError(
            f"media of shape {video.shape}, {video.dtype}: must be uint8 (frames, height, width, 3)"
        )


def _strip(video: Media, height: int, clip_frames: int) -> Image.Image:
    """One frame, or several evenly spaced ones side by side, scaled to `height`."""
    _check(video)
    count = 1 if len(video) == 1 else min(clip_frames, len(video))
    chosen = np.rint(np.linspace(0, len(video) - 1, count)).astype(int)
    width = max(1, round(video.shape[2] * height / video.shape[1]))
    strip = Image.new("RGB", (count * width + (count - 1) * 2, height), (250, 250, 248))
    for slot, index in enumerate(chosen):
        frame = Image.fromarray(video[index])
        strip.paste(
            frame.resize((width, height), Image.Resampling.BICUBIC), (slot * (width + 2), 0)
        )
    return strip


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Words in lines no wider than `width`; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
