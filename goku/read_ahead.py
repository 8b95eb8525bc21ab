"""Reads the samples of packs to come in threads, while a device is at work on the packs before.

A step's device is idle at its end, when gradients are summed and the optimizer waits for their norm; what the next pack
still needs from files by then is time lost by every process (MegaScale, section 3.4: data are prepared meanwhile).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from goku.data import CachedSample, Dataset

__all__ = ["ReadAhead"]

# Reads wait for a file system; what else they do, a copy and a CRC-32, lets the interpreter's lock go.
THREADS = 4

Pack: TypeAlias = Sequence[tuple[int, int]]
"""(item, number of its caption) of every sample."""


class ReadAhead:
    """Samples of one dataset, `data.read_ahead` packs of them at most beside the one that is taken."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self._asked: list[tuple[Pack, list[Future[CachedSample | None]]]] = []
        self._executor: ThreadPoolExecutor | None = None

    def ask(self, packs: Sequence[Pack]) -> None:
        """Begin to read these packs, in this order, but for those that are being read or were. Others are given up."""
        before, self._asked = self._asked, []
        for pack in packs:
            known = next((asked for asked in before if asked[0] == pack), None)
            if known is None:
                known = (pack, [self._submit(index, caption) for index, caption in pack])
            else:
                before.remove(known)
            self._asked.append(known)
        for _, futures in before:
            for future in futures:
                future.cancel()

    def take(self, pack: Pack) -> list[CachedSample | None]:
        """Its samples, once they are read; None for each that could not be, or that was not asked for."""
        known = next((asked for asked in self._asked if asked[0] == pack), None)
        if known is None:
            return [None] * len(pack)
        self._asked.remove(known)
        return [future.result() for future in known[1]]

    def close(self) -> None:
        """Give up what was asked for; reads under way are waited for when the interpreter ends. To ask begins anew."""
        self._asked = []
        if self._executor is not None:  # what an interrupted `take` waited for is given up, too
            self._executor.shutdown(wait=False, cancel_futures=True)
        self._executor = None

    def _submit(self, index: int, caption: int) -> Future[CachedSample | None]:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="reading ahead")
        return self._executor.submit(self.dataset.cached, index, caption)
