"""What the demo's second page is made of: plain data, filled in by the recipe's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np

from goku.demo.contents import Picture
from goku.demo.training import TrainingLog

__all__ = ["Drawn", "Given", "Kill", "RecipeReport", "Shown", "StageReport", "frames"]


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A SIGKILL: the stage and the last step that its log names, and, for one that fell between two stages, the step of
    the next one (None: it fell inside)."""

    stage: str
    step: int
    next_step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Given:
    """A first frame: an image file of a clip that was trained on, or not."""

    name: str
    caption: str
    trained: bool
    image: Path


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A clip that `goku sample --image` made; the PSNRs (dB) that it printed, to the given image: of the first frame,
    and of what the VAE alone makes of that image."""

    path: Path
    psnr: float
    vae_psnr: float


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A picture or clip of a caption beside the training item, with its PSNR to that (dB), and the VAE's."""

    caption: str
    training: Picture
    drawn: Picture
    psnr: float
    vae_psnr: float


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """One stage: how it was trained and what came of it.

    mix, sizes: in words; tokens: trained on in all steps; seconds: in all processes that worked on it; shown: what the
    averaged weights draw at its end.
    """

    name: str
    start: str
    carry: str
    mix: str
    sizes: str
    steps: int
    shift: float
    lr: float
    tokens: int
    seconds: float
    log: TrainingLog
    shown: Sequence[Shown] = ()


@dataclass(frozen=True, kw_only=True)
class RecipeReport:
    """Everything the page tells.

    verdict: of `goku.demo.recipe_verdict.judge`; stages: in their order; drawn: (given image, its clip without and with
    --hold); vae_psnr: (step, dB) of the VAE's training; timings, config, environment, commands, files: as on the first
    page; media: the manifest records of all media, each with how it was used; also: (file, what it shows) of pages
    beside this one.
    """

    verdict: Mapping[str, Any]
    stages: Sequence[StageReport]
    kills: Sequence[Kill] = ()
    drawn: Sequence[tuple[Given, Drawn, Drawn]] = ()
    vae_psnr: Sequence[tuple[float, float]] = ()
    timings: Sequence[tuple[str, float]] = ()
    timing_note: str = ""
    config: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    commands: Sequence[str] = ()
    files: Sequence[tuple[str, str]] = ()
    media: Sequence[tuple[Mapping[str, Any], str]] = ()
    also: Sequence[tuple[str, str]] = ()
    title: str = "Goku: the whole recipe, in miniature"


def frames(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The frames of an MP4 file, (T, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
