"""What training sees of a dataset: `Item`, `CachedSample`, the face of a `Dataset`, and what `prepare` reports."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from goku.data.errors import Dropped, Problem, Remark
from goku.data.record import Record
from goku.data.transform import Geometry
from goku.vae import VideoVAE

if TYPE_CHECKING:
    from goku.data.item_list import ItemList


@dataclass(frozen=True)
class Item:
    """One sample as training sees it.

    Attributes:
        name, caption, weight: as the dataset lists them; of several captions the heaviest.
        frames, height, width: of the pixels that were encoded; frames = 4k+1.
        grid: (t, h, w) tokens after the VAE (4, 8, 8) and patchify 1x2x2; tokens = t * h * w.
        modality: "image" for one frame, whatever kind of file it came from, else "video".
        source: the name of its source; "" where there is one dataset alone.
        captions, caption_weights: every caption and its weight, the heaviest first; empty for one.
    """

    name: str
    caption: str
    frames: int
    height: int
    width: int
    grid: tuple[int, int, int]
    tokens: int
    modality: Literal["image", "video"]
    weight: float
    source: str = ""
    captions: tuple[str, ...] = ()
    caption_weights: tuple[float, ...] = ()

    def choose_caption(self, uniform: float) -> int:
        """Which caption a number of [0, 1) picks, each by its weight: what `Dataset.read` takes."""
        if len(self.captions) < 2:
            return 0
        sums = list(accumulate(self.caption_weights))
        return min(bisect_right(sums, uniform * sums[-1]), len(sums) - 1)


@dataclass(frozen=True)
class CachedSample:
    """mean, logvar: (C, T, H, W) fp32, un-normalised; text: (length, dim) fp32, or exact in bf16, un-padded.

    frames: mean (C, 1, H, W) fp32, un-normalised, of single frames (0 the first, -1 the last) as the
    VAE encodes them alone; those that `prepare` was asked for, and none for an image.
    """

    mean: Tensor
    logvar: Tensor
    text: Tensor
    frames: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    listed = used + len(problems) + len(dropped), where what a run going on misses is a problem, and what is new to it
    is dropped. made, present: latents (with latents=False captions) of this rank's share that were made and that were
    there already; nbytes: of the files of both.
    """

    listed: int
    used: int
    problems: tuple[Problem, ...] = ()
    remarks: tuple[Remark, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    made: int = 0
    present: int = 0
    nbytes: int = 0


class SampleStream(Protocol):
    """Which item stands at which position of an endless stream; the position is the whole state."""

    def item(self, position: int) -> int:
        """The item's index, for any position >= 0."""
        ...


class Dataset(Protocol):
    """What training needs of a dataset, be it one or several mixed."""

    items: list[Item]
    skipped: tuple[Problem, ...]
    report: PrepareReport

    @property
    def lost(self) -> Mapping[int, Problem]:
        """Items, by their place, of a run that goes on which cannot be had now."""
        ...

    def __len__(self) -> int: ...

    @property
    def empty_text(self) -> Tensor:
        """(length, dim) embedding of the empty prompt."""
        ...

    def reading(self) -> AbstractContextManager[object]:
        """Reads within it share what only damage needs, a text encoder; it goes at the end."""
        ...

    def read(self, index: int, caption: int = 0) -> CachedSample:
        """The cached sample; ValueError when damaged, FileNotFoundError when removed."""
        ...

    def cached(self, index: int, caption: int = 0) -> CachedSample | None:
        """As `read`, for any thread: None where it is damaged or gone, and nothing is mended."""
        ...

    def repair(self, index: int, vae: VideoVAE) -> CachedSample:
        """The sample made again from its media and written; DecodeError or OSError when they are gone."""
        ...

    def stream(self, seed: int) -> SampleStream:
        """The order in which training takes the items."""
        ...

    def item_list(self) -> ItemList:
        """What training sees of every item, by which a run goes on with the same ones."""
        ...

    def fingerprint(self) -> str:
        """Hash of all that training sees."""
        ...

    def pixels(self, index: int) -> Tensor:
        """(3, T, H, W) uint8: what the latent was encoded from."""
        ...


def item_of(record: Record, geometry: Geometry, source: str, prefix: str) -> Item:
    """The item of a record that decodes to `geometry`."""
    several = len(record.captions) > 1
    return Item(
        name=prefix + record.name,
        caption=record.text,
        frames=geometry.frames,
        height=geometry.height,
        width=geometry.width,
        grid=geometry.grid,
        tokens=geometry.tokens,
        modality="image" if geometry.frames == 1 else "video",
        weight=record.weight,
        source=source,
        captions=record.prompts if several else (),
        caption_weights=tuple(weight for _, weight in record.captions) if several else (),
    )
