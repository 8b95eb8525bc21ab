"""The contact sheet: training above generated, captioned, wrapped to its width."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from goku.demo import contact_sheet as sheet


def test_contact_sheet_shows_training_above_generated_and_wraps() -> None:
    red = np.full((1, 16, 16, 3), (255, 0, 0), np.uint8)
    blue = np.full((5, 16, 32, 3), (0, 0, 255), np.uint8)
    item = sheet.SheetItem(
        caption="a red square of some size", training=red, generated=255 - red, attribution="me"
    )
    clip = sheet.SheetItem(caption="a blue clip", training=blue, generated=blue // 2)
    one = Image.open(io.BytesIO(sheet.contact_sheet([item], height=64)))
    pixels = np.asarray(one)
    found = {
        name: np.argwhere((pixels == colour).all(axis=-1))
        for name, colour in (("training", (255, 0, 0)), ("generated", (0, 255, 255)))
    }
    assert len(found["training"]) == len(found["generated"]) == 64 * 64
    assert found["training"][:, 0].max() < found["generated"][:, 0].min()
    assert (found["training"][:, 1].min(), 64 * 64) == (found["generated"][:, 1].min(), 64 * 64)

    wide = Image.open(
        io.BytesIO(sheet.contact_sheet([item, clip, clip, clip], height=64, max_width=700))
    )
    assert wide.width <= 700
    assert wide.height > 2 * one.height
    with pytest.raises(ValueError, match="empty"):
        sheet.contact_sheet([])
