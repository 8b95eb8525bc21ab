"""A directory of checkpoints: which one is the latest, and which ones are no longer needed.

None of these is collective but ``latest(root, together=True)``: in a job of several ranks, rank 0 calls them.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from goku_runtime.checkpoint.beside import clean
from goku_runtime.checkpoint.directory import (
    POINTER_NAME,
    delete,
    given_path,
    next_pointer,
    remove,
    remove_leftovers,
    set_aside,
    sole_access,
    sync_directory,
    write_durably,
)
from goku_runtime.checkpoint.journal import Journal, logged
from goku_runtime.checkpoint.manifest import (
    MANIFEST_NAME,
    CheckpointError,
    Manifest,
    file_problems,
    name_problems,
)
from goku_runtime.checkpoint.ranks import Ranks

__all__ = ["POINTER_NAME", "latest", "newest_ns", "prune", "series_of", "set_latest"]

logger = logging.getLogger(__name__)

# What may be answered for a directory that is none of ours (lost+found; a link to itself where a manifest should
# be). A device that fails says something else, and must not let a training start anew.
_NOT_OURS = {
    errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
}  # fmt: skip
# manifest.json up to the time of the save.
_HEADER_BYTES = 256
_CREATED = re.compile(rb'"created_ns": (\d+)')


def set_latest(
    root: str | os.PathLike[str],
    name: str,
    *,
    journal: Journal | None = None,
    verified: bool = False,
) -> None:
    """Makes `name` the checkpoint that `latest` returns; durable and atomic, logged in `journal`.

    Args:
        root: the directory of checkpoints.
        name: of one of them.
        journal: that requests to the file system are logged in.
        verified: the caller has just seen that it is complete.

    Raises:
        CheckpointError: `name` is not the name of a complete checkpoint in `root`.
        ValueError: `root` is an address, or no path.
        OSError: the pointer cannot be written; the old one then stays.
    """
    root = given_path(root, "root")
    problems = [] if verified else _problems(root, name)
    if problems:
        raise CheckpointError(f"{root / name} cannot become the latest: " + "; ".join(problems))
    temporary = next_pointer(root)
    with sole_access(root):
        try:
            write_durably(temporary, f"{name}\n".encode(), journal=journal)
            with logged(journal, "rename", temporary, other=root / POINTER_NAME):
                os.replace(temporary, root / POINTER_NAME)
        finally:
            temporary.unlink(missing_ok=True)
    sync_directory(root, journal)


def latest(
    root: str | os.PathLike[str],
    *,
    together: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Path | None:
    """The checkpoint to go on from, or None where there is none.

    That is the one `set_latest` named last. Where the pointer is missing or what it names is gone
    or incomplete, it is the newest complete one. Complete means that every file of the manifest is
    there with its size; `load` also compares the sums. Directories that cannot be entered or hold no
    readable manifest are passed over, unless the pointer names them.

    A job killed between `save` and `set_latest` goes on from the one before, and meets the unnamed
    one again when it saves that step: such a job saves with ``overwrite=True``.

    Args:
        root: the directory of checkpoints.
        together: all ranks call this, and get what rank 0 finds: ranks that look for themselves may see
            different ones while another process saves or removes some, or through a file system's caches.
        process_group: of those ranks; None takes the default group where there is one.

    Raises:
        ValueError: `root` is an address, or no path; `process_group` without `together`.
        OSError: the directory, or the checkpoint that the pointer names, cannot be read, or a device fails.
            With `together` on all ranks.
    """
    leftovers: list[Path] = []
    if together:
        ranks = Ranks(process_group)
        found = ranks.collect(
            lambda: _latest(given_path(root, "root"), leftovers) if ranks.is_first else None
        )[0]
    elif process_group is not None:
        raise ValueError("process_group: given without together=True; one rank alone needs none")
    else:
        found = _latest(given_path(root, "root"), leftovers)
    if together:
        if leftovers:  # rank 0's; the others are on their way
            clean(f"sweep of {root}", lambda: _delete(leftovers))
    else:
        _delete(leftovers)
    return found


def _delete(paths: list[Path]) -> None:
    for path in paths:
        delete(path)


def _latest(root: Path, leftovers: list[Path]) -> Path | None:
    """The latest; what killed processes left there is added to `leftovers`, to be deleted."""
    if not root.is_dir():
        return None
    named = _pointed(root)
    if named is not None and not _problems(root, named):
        return root / named
    try:
        leftovers += set_aside(root)  # a replaced checkpoint may have to be put back first
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        # Nothing can be put back or removed there; what is complete loads all the same.
    complete = _complete(root)
    return complete[0].path if complete else None


def prune(
    root: str | os.PathLike[str],
    keep_last: int,
    *,
    keep_every: int = 0,
    series: str | None = None,
    sums: bool = True,
    always: Collection[str] = (),
    journal: Journal | None = None,
) -> list[Path]:
    """Deletes all complete checkpoints but the `keep_last` newest, the latest and every n-th.

    The newest one whose files still have their sums is kept too, whatever `keep_last` says: were
    all those to be kept damaged, it would be the last good one. That reads the newest once more.
    What is not a complete checkpoint is left alone, apart from the leftovers of killed processes, and so is
    what cannot be read.

    Args:
        root: the directory of checkpoints.
        keep_last: how many to keep, at least 1.
        keep_every: keeps those, too, whose number (the digits that end the name, as in step_2000) is a
            multiple of this; 0: none.
        series: only those whose names are this and a number (step_ for step_2000) are looked at; None: all.
        sums: False reads the manifests alone, which have sums of their own, of the files of the `keep_last`
            newest their sizes, and of others whether their names are there.
        always: names that are kept, whatever else is said.
        journal: that the removals are logged in.

    Returns:
        The deleted ones, the newest first.

    Raises:
        ValueError: `keep_last` is less than 1 or `keep_every` less than 0; `root` is an address, or no path.
        OSError: as the system raises it; what is half deleted no longer looks like a checkpoint.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: found {keep_last}; must be at least 1")
    if keep_every < 0:
        raise ValueError(f"keep_every: found {keep_every}; must be at least 0")
    root = given_path(root, "root")
    remove_leftovers(root, journal)
    complete = _complete(root, series=series, sizes=sums, lenient=True)
    if not sums:
        complete = _whole_first(complete, keep_last, always)
    paths = [found.path for found in complete]
    keep = {*paths[:keep_last], *(root / name for name in always)}
    named = _pointed(root)
    if named:  # without a pointer the latest is the newest
        keep.add(root / named)
    if sums:
        good = (each.path for each in complete if not _faults(each.path, each.manifest, sums=True))
        keep.add(next(good, root))
    if keep_every:
        numbers = ((path, re.search(r"\d+$", path.name)) for path in paths)
        keep |= {path for path, found in numbers if found and int(found[0]) % keep_every == 0}
    pruned = []
    for path in paths:
        if path not in keep:
            with suppress(FileNotFoundError):  # another job in this directory was faster
                remove(path, journal)
                pruned.append(path)
    return pruned


def _whole_first(found: list[_Found], count: int, known: Collection[str]) -> list[_Found]:
    """Without those that stand before the `count`-th whole one and whose files have other sizes.

    They are no complete checkpoints, so they neither count nor are removed. The ones behind are not looked
    at: of thousands of ranks each has as many files. known: names of whole ones.
    """
    whole: list[_Found] = []
    rest = iter(found)
    while len(whole) < count and (each := next(rest, None)) is not None:
        if each.path.name in known or not _faults(each.path, each.manifest, sums=False):
            whole.append(each)
    return [*whole, *rest]


def newest_ns(root: Path, series: str) -> int:
    """The latest time of a save in a series; 0 if all are past.

    A new checkpoint of the series is given a later one: by a clock that went back it would be the oldest.
    """
    now, newest = time.time_ns(), 0
    try:
        paths = list(_directories(root, series, lenient=True))
    except OSError as error:  # a clock that went back is no reason to lose what is written
        logger.warning("%s cannot be listed: %s", root, error)
        return 0
    for path in paths:
        try:
            with open(path / MANIFEST_NAME, "rb") as stream:
                found = _CREATED.search(stream.read(_HEADER_BYTES))
            # Of thousands of ranks a manifest is long: read, and checked, where it matters.
            if found and int(found[1]) >= now:
                newest = max(newest, Manifest.read(path).created_ns)
        except (CheckpointError, OSError):
            continue  # such a one is never the newest
    return newest


def series_of(name: str) -> str:
    """A checkpoint's name without the number that ends it."""
    return name.rstrip("0123456789")


def _pointed(root: Path) -> str | None:
    try:
        return (root / POINTER_NAME).read_text(encoding="utf-8").rstrip("\r\n")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        return None


def _problems(root: Path, name: str) -> list[str]:
    """Why `name` in `root` cannot be used; empty if it can."""
    if not name or Path(name).name != name or name.startswith(".") or "\0" in name:
        return [f"{name!r} is not the name of a directory in {root}"]
    try:
        return file_problems(root / name, Manifest.read(root / name), sums=False)
    except (CheckpointError, FileNotFoundError) as error:  # the latter: removed meanwhile
        return [str(error)]


class _Found(NamedTuple):
    """A complete checkpoint; they sort by the time in the manifest, then by name."""

    created_ns: int
    name: list[tuple[int, str]]
    path: Path
    manifest: Manifest


def _complete(
    root: Path, *, series: str | None = None, sizes: bool = True, lenient: bool = False
) -> list[_Found]:
    """The complete checkpoints, the newest first.

    Args:
        root: the directory.
        series: only those of it; None: all.
        sizes: whether to compare the files' sizes, or only see that they are there.
        lenient: pass over what cannot be read, whatever the reason.
    """
    found = []
    for path in _directories(root, series, lenient=lenient):
        try:
            manifest = Manifest.read(path)
            if sizes:
                faults = file_problems(path, manifest, sums=False)
            else:
                faults = name_problems(path, manifest)
        except (CheckpointError, FileNotFoundError):  # the latter: removed meanwhile
            continue
        except OSError as error:
            if error.errno in _NOT_OURS:
                logger.info("%s is passed over: %s", path, error)
            elif lenient:
                logger.warning("%s cannot be read and is passed over: %s", path, error)
            else:
                raise
            continue
        if not faults:
            found.append(_Found(manifest.created_ns, _natural(path.name), path, manifest))
    return sorted(found, key=lambda each: each[:2], reverse=True)


def _faults(path: Path, manifest: Manifest, *, sums: bool) -> list[str]:
    """What is wrong with the files; that they cannot be read is a fault like another."""
    try:
        return file_problems(path, manifest, sums=sums)
    except OSError as error:
        return [str(error)]


def _directories(root: Path, series: str | None, *, lenient: bool = False) -> Iterator[Path]:
    """What may be a checkpoint, or one of a series. lenient: pass over what cannot be looked at."""
    for path in root.iterdir():
        if path.name.startswith(".") or series not in (None, series_of(path.name)):
            continue
        try:
            found = path.is_dir() and not path.is_symlink()
        except OSError as error:
            if not lenient and error.errno not in _NOT_OURS:
                raise
            logger.warning("%s cannot be looked at and is passed over: %s", path, error)
            continue
        if found:
            yield path


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key by which step-9 comes before step-10."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", name)]
