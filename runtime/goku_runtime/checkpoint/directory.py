"""Directories that appear whole: written beside their place, made durable, renamed once.

Temporary directories carry their purpose in a hidden name, so that what a killed process left
behind is recognised: ``.NAME.saving-*`` (being written; its writer holds a lock on it, which the
kernel drops when the process dies), ``.NAME.replaced-*`` (an old checkpoint moved out of the way)
and ``.NAME.removing-*`` (being deleted). A file ``.latest.*`` is the next pointer, being written.

Whoever makes, moves or sweeps such names holds a lock on the directory that they lie in: a sweep
never meets one whose owner has not locked it yet, or is half way through two renames.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from goku_runtime.checkpoint.manifest import MANIFEST_NAME

__all__ = [
    "POINTER_NAME",
    "NewDirectory",
    "next_pointer",
    "remove",
    "remove_leftovers",
    "sole_access",
    "sync_directory",
    "write_durably",
]

POINTER_NAME = "latest"
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<purpose>saving|replaced|removing)-[0-9a-f]{16}")
_NEXT_POINTER = re.compile(rf"\.{POINTER_NAME}\.[0-9a-f]{{16}}")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable: without it, a rename can be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes, *, fsync: bool = True) -> None:
    """Writes a new file and hands it to the device. Raises OSError as the system does."""
    try:
        with open(path, "xb") as stream:
            stream.write(data)
            stream.flush()
            if fsync:
                os.fsync(stream.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


class NewDirectory:
    """A directory in the making, beside its place and locked for as long as this process lives.

    Args:
        target: where it is to appear.
        overwrite: whether a checkpoint may be there already.
        fsync: whether the names in directories are made durable.

    Raises:
        FileExistsError: something is there and `overwrite` is not set, or it is no checkpoint.
        OSError: the directory cannot be made.
    """

    def __init__(self, target: Path, *, overwrite: bool, fsync: bool = True) -> None:
        if os.path.lexists(target):
            _check_replaceable(target, overwrite)
        self.target = target
        self.overwrite = overwrite
        self.fsync = fsync
        self._made_parents = _make_parents(target.parent)
        self._published = False
        self.path = _temporary(target, "saving")
        try:
            remove_leftovers(target.parent)
            with sole_access(target.parent):
                self.path.mkdir()
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                _lock(self._lock, wait=True)
        except OSError:
            self._remove_parents()
            raise

    def publish(self) -> None:
        """Puts the directory in its place, at once. Its files must be durable already.

        Raises:
            FileExistsError: something has appeared there meanwhile, and `overwrite` is not set.
            OSError: as the system raises it.
        """
        if self.fsync:
            sync_directory(self.path)
        replaced = None
        if self.overwrite and os.path.lexists(self.target):
            with sole_access(self.target.parent):
                replaced = _swap(self.path, self.target)
        else:
            try:
                os.rename(self.path, self.target)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise _exists(self.target) from error
                raise
        self._published = True
        if self.fsync:
            for directory in (self.target, *self._made_parents):
                sync_directory(directory.parent)
        os.close(self._lock)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)  # the new one is in place already

    def discard(self) -> None:
        """Removes what was made, as far as the system lets it; nothing once it was published."""
        if not self._published:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._remove_parents()

    def _remove_parents(self) -> None:
        for parent in self._made_parents:
            try:
                parent.rmdir()
            except OSError:
                break  # not empty: somebody uses it


def remove_leftovers(parent: Path) -> None:
    """Removes what killed processes left in a directory; puts a replaced checkpoint back.

    A ``saving`` directory whose writer lives is left alone. Where the file system has no locks, all
    of them are, and pointers that may be being written. Waits for others who make or sweep temporary directories there.
    """
    with sole_access(parent) as locked:
        _sweep(parent, locked)


def _sweep(parent: Path, locked: bool) -> None:
    for path in list(parent.iterdir()):
        if locked and _NEXT_POINTER.fullmatch(path.name) and not path.is_dir():
            with suppress(OSError):
                path.unlink()
        found = _TEMPORARY.fullmatch(path.name)
        if not found or path.is_symlink() or not path.is_dir():
            continue
        target = parent / found["name"]
        if found["purpose"] == "saving":
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        elif found["purpose"] == "replaced" and not os.path.lexists(target):
            os.rename(path, target)
            sync_directory(parent)
        else:
            shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Deletes a checkpoint so that at no moment a part of it looks like one."""
    hidden = _temporary(path, "removing")
    with sole_access(path.parent):  # a sweep would delete the same files at the same time
        os.rename(path, hidden)
        sync_directory(path.parent)
        shutil.rmtree(hidden)


@contextmanager
def sole_access(parent: Path) -> Generator[bool]:
    """Holds the lock of a directory, waiting for it; not to be nested.

    Gives False, and holds nothing, where the file system has no locks.
    """
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        locked = _lock(descriptor, wait=True)
        try:
            yield locked
        finally:
            if locked:  # a process forked meanwhile has the descriptor too: closing is not enough
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def next_pointer(root: Path) -> Path:
    """A new name for a pointer that is being written. Write and rename it with `sole_access`."""
    return root / f".{POINTER_NAME}.{secrets.token_hex(8)}"


def _temporary(target: Path, purpose: str) -> Path:
    return target.parent / f".{target.name}.{purpose}-{secrets.token_hex(8)}"


def _exists(target: Path) -> FileExistsError:
    text = "exists already; pass overwrite=True to replace it"
    return FileExistsError(errno.EEXIST, text, str(target))


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuses to replace anything but a checkpoint: a wrong path must not cost a home directory."""
    if not overwrite:
        raise _exists(target)
    if target.is_symlink() or not (target / MANIFEST_NAME).is_file():
        text = f"is not replaced: it is no checkpoint (no directory with a {MANIFEST_NAME})"
        raise FileExistsError(errno.EEXIST, text, str(target))


def _make_parents(parent: Path) -> list[Path]:
    """Makes a directory and its parents; returns those that were not there, the deepest first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
    return missing


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Takes the lock; without `wait` only if it is free. False where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _is_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        return _lock(descriptor, wait=False)
    finally:
        os.close(descriptor)


def _swap(new: Path, target: Path) -> Path:
    """Puts `new` at `target` and returns where the old one now lies.

    renameat2's exchange does it in one step. Where a file system lacks it there is a moment without
    a target; the old one then bears a name by which `remove_leftovers` puts it back.
    """
    if _exchange(new, target):
        return new
    old = _temporary(target, "replaced")
    os.rename(target, old)
    os.rename(new, target)
    return old


def _exchange(left: Path, right: Path) -> bool:
    """Exchanges two directories atomically; False where that is not possible."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    names = os.fsencode(left), os.fsencode(right)
    if function(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(right))
