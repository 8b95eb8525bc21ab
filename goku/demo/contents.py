"""What the demo's report is made of: plain data, filled in by the demo's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Item", "Pack", "Picture", "Report", "Sample"]

# A uint8 (T, H, W, 3) array, or the path of a finished .png, .jpg or .mp4.
Picture = npt.NDArray[np.uint8] | Path


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One generated medium: seed, PSNR (dB) to the captioned item, name of the nearest item."""

    seed: int
    picture: Picture
    psnr: float | None = None
    nearest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Item:
    """One training item with everything made for its caption.

    `grid` is (t, h, w) after patchify; `evolution` lists (training step, what was sampled then).
    """

    name: str
    caption: str
    modality: str
    grid: tuple[int, int, int]
    training: Picture
    reconstruction: Picture | None = None
    reconstruction_psnr: float | None = None
    samples: Sequence[Sample] = ()
    evolution: Sequence[tuple[int, Picture]] = ()
    licence: str = ""
    attribution: str = ""
    url: str = ""
    shareable: bool = False

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w


@dataclass(frozen=True, kw_only=True)
class Pack:
    """One forward pass: the names of its samples in order and the token budget it was filled to."""

    label: str
    names: Sequence[str]
    capacity: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page tells.

    Attributes:
        verdict: the dict of `goku.demo.score.verdict`.
        items: the training items, in dataset order.
        log: the events of the training log, in file order, as dicts.
        packs: some packs of the run.
        timings: (stage, seconds), in order; `timing_note` says what is not in them.
        config: the resolved configuration, as text (YAML).
        environment: facts of the machine and the versions, in order.
        commands: how to reproduce, one shell command each.
        unseen: manifest records of the held-out media, for the attribution.
        files: (relative path, what it is) of what lies beside the page.
        also: (file, what it shows) of pages beside this one.
    """

    verdict: Mapping[str, Any]
    items: Sequence[Item]
    log: Sequence[Mapping[str, Any]]
    packs: Sequence[Pack] = ()
    timings: Sequence[tuple[str, float]] = ()
    timing_note: str = ""
    config: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()
    unseen: Sequence[Mapping[str, Any]] = ()
    files: Sequence[tuple[str, str]] = ()
    also: Sequence[tuple[str, str]] = ()
    title: str = "Goku: the demo's report"
