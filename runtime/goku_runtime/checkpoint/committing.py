"""How the files of all ranks become a checkpoint: what rank 0 writes beside them, and the rename."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from goku_runtime.checkpoint.beside import beside
from goku_runtime.checkpoint.checksum import crc32c
from goku_runtime.checkpoint.directory import NewDirectory, write_durably
from goku_runtime.checkpoint.journal import Journal
from goku_runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    FileSum,
    Manifest,
    file_problems,
    raise_problems,
)
from goku_runtime.checkpoint.options import Retention
from goku_runtime.checkpoint.root import newest_ns, prune, series_of, set_latest

__all__ = ["SmallFiles", "commit", "thin_out"]

logger = logging.getLogger(__name__)


class SmallFiles:
    """The index, the values and DCP's metadata, written by a thread while the engine writes the data.

    They need no word from the other ranks: only the manifest, which has the sums of all files, does.

    Args:
        directory: that they are written into.
        files: gives their contents by name; called in the thread.
    """

    def __init__(self, directory: NewDirectory, files: Callable[[], Mapping[str, bytes]]) -> None:
        self._written = beside(
            f"index of {directory.target.name}", lambda: _write(directory, files)
        )

    def sums(self) -> dict[str, FileSum]:
        """Waits, and gives size and CRC-32C of each file; raises what writing them raised."""
        return self._written.result()

    def wait(self) -> None:
        """Waits until nothing is written any more, and raises nothing."""
        self._written.exception()


def _write(directory: NewDirectory, files: Callable[[], Mapping[str, bytes]]) -> dict[str, FileSum]:
    sums = {}
    for name, data in files().items():
        path = directory.path / name
        write_durably(path, data, fsync=directory.fsync, journal=directory.journal)
        sums[name] = FileSum(len(data), crc32c(data))
    return sums


def commit(
    directory: NewDirectory,
    sums: Mapping[str, FileSum],
    *,
    latest: bool,
) -> None:
    """Writes the manifest, the last of all files, and gives the directory its name.

    Args:
        directory: with all other files in it, durable.
        sums: of those files.
        latest: whether `latest` is to name it then.

    Raises:
        CheckpointError: a file is missing or has another size: nothing got its name.
        OSError: as the system raises it. If `latest` could not be moved the checkpoint is in its place
            all the same, which a note says.
    """
    fsync, journal, target = directory.fsync, directory.journal, directory.target
    after = newest_ns(target.parent, series_of(target.name))
    manifest = Manifest.of(dict(sums), after=after)
    path = directory.path / MANIFEST_NAME
    write_durably(path, manifest.to_bytes(), fsync=fsync, journal=journal)
    raise_problems(directory.path, file_problems(directory.path, manifest, sums=False))
    directory.publish()
    if latest:
        try:
            set_latest(target.parent, target.name, journal=journal, verified=True)
        except OSError as error:
            error.add_note(f"{target} is saved; only `latest` was not moved to it")
            raise


def thin_out(target: Path, retention: Retention, journal: Journal | None) -> None:
    """Removes what a retention does not keep of a new checkpoint's series.

    The new one is in its place and all ranks know it: nobody waits for this, and what cannot be removed is
    logged. An old one too many does no harm.
    """
    try:
        # What was just written is good, and reading it all again takes as long as writing.
        removed = prune(
            target.parent, retention.keep_last, keep_every=retention.keep_every,
            series=series_of(target.name), sums=False, always=(target.name,), journal=journal,
        )  # fmt: skip
        for path in removed:
            logger.info("removed %s", path)
    except OSError as error:
        logger.warning("%s is saved; old ones were not removed: %s", target, error)
