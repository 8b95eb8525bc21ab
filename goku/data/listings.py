"""Listings that are made once: `Scans` by one process, `Listings` for all that prepare datasets together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from goku.data.errors import DataError
from goku.data.manifest import scan
from goku.data.record import Scan

FromMain = Callable[[Callable[[], Any]], Any]
"""Does the work on the main process and returns its result on all, as `ParallelContext.from_main`."""

_Key = tuple[str, str, bool]


class Scans:
    """`goku.data.manifest.scan` that keeps what it found, its DataError too."""

    def __init__(self) -> None:
        self._kept: dict[_Key, Scan | DataError] = {}

    def __call__(self, path: str, form: str, *, follow_links: bool) -> Scan:
        return _found(self.kept(path, form, follow_links))

    def kept(self, path: str, form: str, follow_links: bool) -> Scan | DataError:
        """What the dataset lists, or why it cannot be listed."""
        key = (path, form, follow_links)
        if key not in self._kept:
            try:
                self._kept[key] = scan(path, form, follow_links=follow_links)  # type: ignore[arg-type]
            except DataError as error:
                self._kept[key] = error
        return self._kept[key]

    def forget(self) -> None:
        """What is asked for next is listed anew."""
        self._kept.clear()


class Listings:
    """`goku.data.manifest.scan` by the main process for all of them, its DataError too; each dataset once.

    Thousands of processes that list a million files each are more than a shared file system has time for. All of them
    ask for the same datasets in the same order. What is kept grows old: `forget` it when a start is over.
    """

    def __init__(self, from_main: FromMain) -> None:
        self.alone = Scans()
        """What the main process lists with no other taking part. It is not listed again for all."""
        self._from_main = from_main
        self._told: dict[_Key, Scan | DataError] = {}

    def __call__(self, path: str, form: str, *, follow_links: bool) -> Scan:
        key = (path, form, follow_links)
        if key not in self._told:
            self._told[key] = self._from_main(lambda: self.alone.kept(*key))
        return _found(self._told[key])

    def forget(self) -> None:
        """What is asked for next is listed anew. All processes call this at the same point."""
        self.alone.forget()
        self._told.clear()


def _found(kept: Scan | DataError) -> Scan:
    if isinstance(kept, DataError):
        raise DataError(kept.summary, kept.problems)  # one that was raised would gather tracebacks
    return kept
