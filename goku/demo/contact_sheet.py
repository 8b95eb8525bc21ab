"""The contact sheet: training items above what was generated for their captions, as one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from goku.media_files import Media, check_media

__all__ = ["SheetItem", "contact_sheet"]


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


def _strip(video: Media, height: int, clip_frames: int) -> Image.Image:
    """One frame, or several evenly spaced ones side by side, scaled to `height`."""
    check_media(video)
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
