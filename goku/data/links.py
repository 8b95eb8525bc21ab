"""Where a dataset's files may lie: its folder, what a manifest names outside of it, and links that lead out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from goku.data.errors import DataError
from goku.data.record import not_unicode


@dataclass(frozen=True)
class Root:
    """The folder of a dataset. follow_links: links out of it are followed, not refused."""

    folder: Path
    follow_links: bool = False

    def leads_out(self, file: Path) -> str | None:
        """The refusal of a file that lies in the folder by name and, by a link, outside of it; else None."""
        if self.follow_links or not _within(os.path.normpath(file), os.path.normpath(self.folder)):
            return None
        real = os.path.realpath(file)
        if _within(real, self._real):
            return None
        return f"link to {real} outside the dataset's folder; follow_links: true allows it"

    def is_outside(self, file: Path) -> bool:
        """True when the path is not in the folder, neither by its name nor by where it leads."""
        named = _within(os.path.normpath(file), os.path.normpath(self.folder))
        return not named and not _within(os.path.realpath(file), self._real)

    @cached_property
    def _real(self) -> str:
        return os.path.realpath(self.folder)

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
            # A link that leads nowhere too: it is a file that is missing, not one that nobody listed.
            elif entry.is_file() or (entry.is_symlink() and not entry.is_dir()):
                yield Path(entry.path)


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
