"""The demo's report: one HTML page that needs no network, no library and no other file.

`write_report(path, report)` writes it; `Report` says what goes in. Pictures are uint8
`(T, H, W, 3)` arrays (encoded here: PNG, or H.264 MP4 when T > 1) or paths of finished files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from goku.demo import sections
from goku.demo.contact_sheet import SheetItem, contact_sheet
from goku.demo.contents import Item, Pack, Picture, Report, Sample
from goku.demo.document import document, write_page
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
    write_page(Path(path), render(report))


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
    return document(
        report.title,
        lead=sections.lead(report, log),
        top=sections.verdict(report, log),
        sections=parts,
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
