"""Samples that turn out lost while training: made again from their media, or left out with weight 0, never silently."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from goku.data import CachedSample, Dataset, DecodeError, Problem
from goku.data.record import counted
from goku.vae import VideoVAE

__all__ = ["LostItems", "TooManyLost"]


class TooManyLost(RuntimeError):
    """More items were lost than data.max_lost allows; the message names some of them."""


@dataclass(frozen=True)
class _Loss:
    name: str
    reason: str


class LostItems:
    """Reads samples such that a damaged or removed cache file, or even its media, does not end the run.

    report: called as report(kind, fields) with "repaired" {name, reason} when an item was made again (the same bits on
    the same machine), and "lost" {name, reason} when it could not be; quarantine: called with the Problem of a lost
    one. Both are called once an item. limit: so many items may be lost; `check` raises beyond it. source: what items
    without one of their own are listed under.
    """

    def __init__(
        self,
        limit: int,
        report: Callable[[str, dict[str, Any]], None] | None = None,
        quarantine: Callable[[Problem], None] | None = None,
        source: str = "",
    ) -> None:
        if limit < 0:
            raise ValueError(f"limit is {limit}; allowed: 0 or more")
        self.limit = limit
        self._report, self._quarantine, self._source = report, quarantine, source
        self._lost: dict[int, _Loss] = {}
        self._elsewhere: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        """Items of this process that are lost: once each, however often they are drawn."""
        return len(self._lost)

    @property
    def names(self) -> dict[str, str]:
        """Their names, and why each is lost."""
        return {loss.name: loss.reason for loss in self._lost.values()}

    def read(
        self,
        dataset: Dataset,
        index: int,
        vae: VideoVAE,
        empty_text: Tensor,
        caption: int = 0,
        ahead: CachedSample | None = None,
    ) -> tuple[CachedSample, bool]:
        """(sample, True); or, for a lost item, (zeros of its shapes with empty_text, False): it is to have weight 0 in
        the step, whose denominator stays.

        empty_text: (length, dim) embedding of the empty prompt, which the caller holds: to read it here could fail, in
        the middle of a step. ahead: what `dataset.cached` gave of it before, to be used in the place of a read.

        A read that fails (ValueError: damaged, OSError: removed or unreadable) is tried again from the media. A lost
        item is not tried a second time: a run's steps must not depend on when its media come back.
        """
        if index not in self._lost and dataset.items[index].name not in self._elsewhere:
            if ahead is not None:
                return ahead, True
            try:
                return dataset.read(index, caption), True
            except (ValueError, OSError) as error:
                reason = str(error)
            known = dataset.lost.get(index)
            try:
                dataset.repair(index, vae)
                sample = dataset.read(index, caption)
            except (ValueError, OSError, ArithmeticError) as error:
                same = isinstance(error, DecodeError) and known and error.reason == known.reason
                again = "" if str(error) == reason else f"; making it again: {error}"
                # What was found lost when it was prepared has its line in the quarantine: it is that one.
                self._lose(dataset, index, reason + again, known if same else None)
            except RuntimeError as error:
                # A GPU that holds a step's activations has seldom room for a clip's too: TooManyLost's own place is
                # `check`, and a fault of the device shows in the next forward.
                torch.cuda.empty_cache()
                why = f"{reason}; making it again: {str(error).splitlines()[0] if str(error) else repr(error)}"
                self._lose(
                    dataset, index, f"{why} (`goku cache latents` mends it ahead of training)"
                )
            else:
                self._tell("repaired", dataset.items[index].name, reason)
                return sample, True
        return _zeros(dataset, index, vae, empty_text), False

    def adopt(self, names: Iterable[str]) -> None:
        """Items of these names are lost to all processes from now on: one that can read them must not train on them
        where it happens to hold them, and leave them out where another does."""
        self._elsewhere = frozenset(names)

    def check(self, lost: Mapping[str, str]) -> None:
        """Raise TooManyLost when the items lost by any process (`names`, united) are more than the limit."""
        if len(lost) <= self.limit:
            return
        some = "; ".join(f"{name}: {reason}" for name, reason in list(lost.items())[:3])
        raise TooManyLost(
            f"{counted(len(lost), 'item')} lost, over data.max_lost = {self.limit}: {some}"
        )

    def _lose(
        self, dataset: Dataset, index: int, reason: str, problem: Problem | None = None
    ) -> None:
        item = dataset.items[index]
        if problem is None:
            problem = Problem(item.name, reason, "damaged", item.source or self._source)
        self._lost[index] = _Loss(item.name, problem.reason)
        self._tell("lost", item.name, problem.reason)
        if self._quarantine is not None:
            self._quarantine(problem)

    def _tell(self, kind: str, name: str, reason: str) -> None:
        if self._report is not None:
            self._report(kind, {"name": name, "reason": reason.removeprefix(f"{name}: ")})


def _zeros(dataset: Dataset, index: int, vae: VideoVAE, empty_text: Tensor) -> CachedSample:
    t, h, w = dataset.items[index].grid
    mean = torch.zeros(vae.channels, t, 2 * h, 2 * w)
    frame = mean[:, :1]
    frames = {} if dataset.items[index].frames == 1 else {0: frame, -1: frame}
    # Its caption may be unreadable too; with weight 0 any text does.
    return CachedSample(mean, torch.zeros_like(mean), empty_text, frames)
