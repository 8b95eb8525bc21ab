"""The demo's report: one HTML page that needs no network, no library and no other file.

`write_report(path, report)` writes it; `Report` says what goes in. Pictures are uint8
`(T, H, W, 3)` arrays (encoded here: PNG, or H.264 MP4 when T > 1) or paths of finished files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from goku.demo import plots, sections
from goku.demo.contact_sheet import SheetItem, contact_sheet
from goku.demo.contents import Item, Pack, Picture, Report, Sample
from goku.demo.page import SCRIPT, STYLE
from goku.demo.training import TrainingLog, loss_sections

__all__ = [
    "Item",
    "Pack",
    "Picture",
    "Report",
    "Sample",
    "readme_picture",
    "render",
    "write_report",
]


def write_report(path: Path, report: Report) -> None:
    """Write the page to `path`, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(render(report))
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)  # gone already when it was renamed


def render(report: Report) -> str:
    """The page as text."""
    log = TrainingLog.read(report.log)
    parts = [
        ("generated", "Generated beside the training media", sections.gallery(report)),
        ("evolution", "From noise to pictures", sections.evolution(report)),
        ("loss", "Loss", loss_sections(log)),
        ("packing", "Packing: which tokens are which sample", sections.packing(report)),
        ("timings", "Time and throughput", sections.timings(report, log)),
        ("reproduce", "How to reproduce", sections.reproduce(report)),
        ("media", "The media and their terms", sections.attribution(report)),
    ]
    nav = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in parts)
    body = "".join(
        f'<section id="{key}"><h2>{escape(title)}</h2>{html}</section>'
        for key, title, html in parts
    )
    script = SCRIPT
    for name, value in (("WIDTH", plots.WIDTH), ("LEFT", plots.LEFT), ("RIGHT", plots.RIGHT)):
        script = script.replace(f"%{name}%", str(value))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<header><h1>{escape(report.title)}</h1>{sections.lead(report, log)}</header>"
        f'<section id="verdict">{sections.verdict(report, log)}<nav>{nav}</nav></section>\n{body}'
        "<footer>This page is one file and asks the network for nothing. "
        "Links lead to the owners of the media.</footer>"
        f"</main><script>{script}</script></body></html>\n"
    )


def readme_picture(items: Sequence[Item]) -> bytes:
    """A PNG: shareable training items above the first sample of each (given as arrays), captioned.

    Raises:
        ValueError: no item is shareable with an array and a sampled array.
    """
    sheet = []
    for item in items:
        generated = item.samples[0].picture if item.samples else None
        if (
            item.shareable
            and isinstance(item.training, np.ndarray)
            and isinstance(generated, np.ndarray)
        ):
            credit = ", ".join(part for part in (item.attribution, item.licence) if part)
            sheet.append(
                SheetItem(
                    caption=item.caption,
                    training=item.training,
                    generated=generated,
                    attribution=credit,
                )
            )
    if not sheet:
        raise ValueError("readme_picture: none of the items is shareable and sampled as an array")
    return contact_sheet(sheet)
