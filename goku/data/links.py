"""Where a dataset's files may lie: its folder, what a manifest names outside of it, and links that lead out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from goku.data.errors import DataError
from goku.data.record import not_unicode


@dataclass(frozen=True)
class Root:
    """The folder of a dataset. follow_links: links out of it are followed, not refused.

    Where folders lead is found once each: it is for one listing.
    """

    folder: Path
    follow_links: bool = False
    _parents: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """Where the folders lead that files were asked for in."""
    _plain: set[str] = field(default_factory=set, repr=False, compare=False)
    """Files that were seen, by `files`, to be no links."""

    def leads_out(self, file: Path) -> str | None:
        """The refusal of a file that lies in the folder by name and, by a link, outside of it; else None."""
        if self.follow_links or not _within(os.path.normpath(file), self._named):
            return None
        real = self._leads_to(file)
        if _within(real, self._real):
            return None
        return f"link to {real} outside the dataset's folder; follow_links: true allows it"

    def is_outside(self, file: Path) -> bool:
        """True when the path is not in the folder, neither by its name nor by where it leads."""
        named = _within(os.path.normpath(file), self._named)
        return not named and not _within(self._leads_to(file), self._real)

    def is_plain(self, file: Path) -> bool:
        """True of what `files` gave that is no link."""
        return str(file) in self._plain

    @cached_property
    def _named(self) -> str:
        return os.path.normpath(self.folder)

    @cached_property
    def _real(self) -> str:
        return os.path.realpath(self.folder)

    def _leads_to(self, file: Path) -> str:
        """`os.path.realpath`, which asks of every folder above, with a call a file at most."""
        path = str(file)
        if not os.path.isabs(path) or (path not in self._plain and os.path.islink(path)):
            return os.path.realpath(path)
        parent, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir):
            return os.path.realpath(path)
        if parent not in self._parents:
            self._parents[parent] = os.path.realpath(parent)
        return os.path.join(self._parents[parent], name)

    def files(self) -> list[tuple[Path, Path]]:
        """(relative, absolute) path of every file that is not hidden, sorted. Linked folders are gone into only with
        follow_links (each folder once). DataError when a folder cannot be read."""
        return sorted(
            (path.relative_to(self.folder), path) for path in self._walk(self.folder, set())
        )

    def linked_folders(self) -> list[str]:
        """Folders that `files` passes by, since they are links."""
        if self.follow_links:
            return []
        found = []
        for parent, folders, _ in os.walk(self.folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            links = (Path(parent, name) for name in folders if os.path.islink(Path(parent, name)))
            found += [link.relative_to(self.folder).as_posix() for link in links]
        return sorted(found)

    def _walk(self, folder: Path, seen: set[str]) -> Iterator[Path]:
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above: once is enough
            return
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=self.follow_links):
                yield from self._walk(Path(entry.path), seen)
            elif _is_listed(entry):
                if not entry.is_symlink():
                    self._plain.add(entry.path)
                yield Path(entry.path)


def _is_listed(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link that leads nowhere: a file that is missing, not one that nobody listed."""
    try:
        return entry.is_file() or (entry.is_symlink() and not entry.is_dir())
    except OSError:  # a link to itself
        return entry.is_symlink()


def no_file_name(path: str) -> str | None:
    """Why no file can have the path, None where one can. Opening such a path is no OSError but a ValueError."""
    try:
        name = os.fsencode(path)  # a name that is not UTF-8 has bytes, half an emoji has none
    except UnicodeEncodeError:
        fault = not_unicode(path) or f"cannot be written in {sys.getfilesystemencoding()}"
        return f"media path {path!a} {fault}"
    return f"media path {path!a} holds a null character" if b"\0" in name else None


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
