"""Directories that appear whole: written beside their place, made durable, renamed once.

Temporary directories carry their purpose in a hidden name, so that what a killed process left
behind is recognised: ``.NAME.saving-*`` (being written; its writer holds a lock on it, which the
kernel drops when the process dies), ``.NAME.replaced-*`` (an old checkpoint moved out of the way)
and ``.NAME.removing-*`` (being deleted). A file ``.latest.*`` is the next pointer, being written.

Whoever makes, moves or sweeps such names holds a lock on the directory that they lie in: a sweep
never meets one whose owner has not locked it yet, or is half way through two renames. It is not held while
files are deleted, which may take minutes.

NFS and Lustre keep locks on directories to one machine. So the names say whose they are, by a digest of the
host's name and of its boot: of another machine's, or of none known, only the age is a sign.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from goku_runtime.checkpoint.journal import Journal, Operation, logged
from goku_runtime.checkpoint.manifest import MANIFEST_NAME

__all__ = [
    "POINTER_NAME",
    "NewDirectory",
    "check_name",
    "delete",
    "given_path",
    "new_token",
    "next_pointer",
    "remove",
    "remove_leftovers",
    "set_aside",
    "sole_access",
    "sync_directory",
    "unfinished",
    "write_durably",
]

POINTER_NAME = "latest"
_TEMPORARY = re.compile(
    r"\.(?P<name>.+)\.(?P<purpose>saving|replaced|removing)-(?P<token>[0-9a-f]{16})"
)
_NEXT_POINTER = re.compile(rf"\.{POINTER_NAME}\.(?P<token>[0-9a-f]{{16}})")
# When another machine's, of which nothing has been written for so long, counts as left behind.
_ABANDONED_S = 12 * 3600.0
# Of a name, on Linux's file systems; and what the longest temporary name has more than the name that it is made of.
_NAME_BYTES = 255
_LONGEST_NAME = _NAME_BYTES - len(f"..removing-{'0' * 16}")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sync_directory(path: Path, journal: Journal | None = None) -> None:
    """Makes the names in a directory durable: without it, a rename can be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with logged(journal, "fsync_directory", path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(
    path: Path, data: bytes, *, fsync: bool = True, journal: Journal | None = None
) -> None:
    """Writes a new file and hands it to the device. Raises OSError as the system does."""
    try:
        with logged(journal, "create", path):
            stream = open(path, "xb")  # noqa: SIM115 (closed below)
        with stream:
            with logged(journal, "write", path, length=len(data)):
                stream.write(data)
                stream.flush()
            if fsync:
                with logged(journal, "fsync", path):
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
        anchored: the names of the directories above are durable already, if they are there.
        journal: that all of it is logged in.
        token: that ends the temporary name, of `new_token`; None: a new one.
        deferred: what others left behind, and what this replaces, is kept in `leftovers` until `clear` is
            called: for callers whom others wait for.

    Raises:
        FileExistsError: something is there and `overwrite` is not set, or it is no checkpoint.
        OSError: the directory cannot be made.
    """

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool,
        fsync: bool = True,
        anchored: bool = False,
        journal: Journal | None = None,
        token: str | None = None,
        deferred: bool = False,
    ) -> None:
        if os.path.lexists(target):
            _check_replaceable(target, overwrite)
        self.target = target
        self.overwrite = overwrite
        self.fsync = fsync
        self.journal = journal
        self._made_parents = _make_parents(target.parent, journal)
        self._published = False
        self.path = unfinished(target, token or new_token())
        self._deferred = deferred
        self.leftovers: list[Path] = []
        try:
            if fsync and (self._made_parents or not anchored):
                _sync_above(target.parent, journal)
            self.leftovers = set_aside(target.parent, journal)
            if not deferred:
                self.clear()
            with sole_access(target.parent):
                with logged(journal, "mkdir", self.path):
                    self.path.mkdir()
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                _lock(self._lock)
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
            sync_directory(self.path, self.journal)
        replaced = None
        if self.overwrite and os.path.lexists(self.target):
            with sole_access(self.target.parent):
                replaced = _swap(self.path, self.target, self.journal)
        else:
            try:
                _rename(self.path, self.target, self.journal)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise _exists(self.target) from error
                raise
        self._published = True
        try:
            if self.fsync:
                sync_directory(self.target.parent, self.journal)
        finally:
            os.close(self._lock)
        if replaced is not None:
            self.leftovers.append(replaced)  # the new one is in place already
            if not self._deferred:
                self.clear()

    def discard(self) -> None:
        """Removes what was made, as far as the system lets it; nothing once it was published."""
        if not self._published:
            delete(self.path, self.journal)
            os.close(self._lock)
            self._remove_parents()
            if not self._deferred:
                self.clear()

    def clear(self) -> None:
        """Deletes what was set aside so far, as far as the system lets it."""
        while True:
            try:
                path = self.leftovers.pop()  # a thread may clear beside another
            except IndexError:
                return
            delete(path, self.journal)

    def _remove_parents(self) -> None:
        for parent in self._made_parents:
            try:
                with logged(self.journal, "rmdir", parent):
                    parent.rmdir()
            except OSError:
                break  # not empty: somebody uses it


def remove_leftovers(parent: Path, journal: Journal | None = None) -> None:
    """Removes what killed processes left in a directory; puts a replaced checkpoint back.

    See `set_aside` for what is left alone. Waits for others who make or sweep temporary directories there.
    """
    for path in set_aside(parent, journal):
        delete(path, journal)


def set_aside(parent: Path, journal: Journal | None = None) -> list[Path]:
    """Puts a replaced checkpoint back, and gives what killed processes left, under names that nobody puts back.

    A ``saving`` directory whose writer lives is left alone. Its lock says so if it is this machine's; another
    machine's, or one on a file system without locks, may be abandoned when nothing in it was written
    for 12 hours. So may pointers that may be being written.
    """
    with sole_access(parent) as locked:
        return _sweep(parent, locked, journal)


def _sweep(parent: Path, locked: bool, journal: Journal | None) -> list[Path]:
    found = []
    for path in list(parent.iterdir()):
        pointer = _NEXT_POINTER.fullmatch(path.name)
        if pointer and not path.is_dir() and ((locked and _is_ours(pointer)) or _is_old(path)):
            with suppress(OSError), logged(journal, "unlink", path):
                path.unlink()
        name = _TEMPORARY.fullmatch(path.name)
        if name and path.is_dir() and not path.is_symlink():
            found.append((path, name))
    if found:
        # Whoever was killed may have renamed these and not got as far as making that durable: were the
        # power lost while they are deleted, what is half deleted would have its old name again.
        sync_directory(parent, journal)
    leftovers, renamed = [], False
    for path, name in found:
        target = parent / name["name"]
        if name["purpose"] == "replaced" and not os.path.lexists(target):
            _rename(path, target, journal)
            sync_directory(parent, journal)
        elif name["purpose"] == "removing":
            leftovers.append(path)
        elif name["purpose"] == "replaced" or _is_abandoned(path, name):
            hidden = _temporary(target, "removing")
            with suppress(OSError):  # somebody else's, or gone meanwhile
                _rename(path, hidden, journal)
                leftovers.append(hidden)
                renamed = True
    if renamed:
        sync_directory(parent, journal)
    return leftovers


def remove(path: Path, journal: Journal | None = None) -> None:
    """Deletes a checkpoint so that at no moment a part of it looks like one."""
    hidden = _temporary(path, "removing")
    with sole_access(path.parent):
        _rename(path, hidden, journal)
        sync_directory(path.parent, journal)
    with logged(journal, "rmtree", hidden):
        try:
            shutil.rmtree(hidden)
        except FileNotFoundError:  # a sweep deletes the same files at the same time
            shutil.rmtree(hidden, ignore_errors=True)


@contextmanager
def sole_access(parent: Path) -> Generator[bool]:
    """Holds the lock of a directory, waiting for it; not to be nested.

    Gives False, and holds nothing, where the file system has no locks.
    """
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        locked = _lock(descriptor)
        try:
            yield locked
        finally:
            if locked:  # a process forked meanwhile has the descriptor too: closing is not enough
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def given_path(path: str | os.PathLike[str], field: str = "path") -> Path:
    """A path that a caller gave. Raises ValueError naming the field: it is an address, or no path."""
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str) or not name:
        raise ValueError(f"{field} is {path!r}; allowed: a directory, as str or os.PathLike of str")
    if "://" in name:
        raise ValueError(f"{field} is {name!r}; allowed: a directory, no address")
    return Path(name)


def check_name(target: Path) -> None:
    """Raises ValueError for a path at whose name no checkpoint would be found again.

    Names that begin with a dot are ours, or hidden; the pointer is a line of UTF-8. Longer ones than allowed
    would leave no room for what is put around them while a checkpoint is written or removed.
    """
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        raise ValueError(
            f"path: the name {name!r} has {len(os.fsencode(name))} bytes; allowed: up to {_LONGEST_NAME}"
        )
    if name in ("", POINTER_NAME) or name.startswith(".") or not name.isprintable():
        raise ValueError(
            f"path: found {os.fspath(target)!r}; the name {name!r} is not allowed: it must not be empty or "
            f"{POINTER_NAME!r}, begin with a dot, or hold what cannot be printed"
        )


def next_pointer(root: Path) -> Path:
    """A new name for a pointer that is being written. Write and rename it with `sole_access`."""
    return root / f".{POINTER_NAME}.{new_token()}"


def unfinished(target: Path, token: str) -> Path:
    """Where a NewDirectory lies until it is published."""
    return target.parent / f".{target.name}.saving-{token}"


def new_token() -> str:
    """16 hexadecimal digits: eight of this machine since it was started, eight random ones."""
    return _machine() + secrets.token_hex(4)


@cache
def _machine() -> str:
    """What tells machines apart that see the same directory, and one from itself before it was restarted."""
    boot = b""
    with suppress(OSError):  # without /proc: the name alone
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.sha256(socket.gethostname().encode() + b" " + boot).hexdigest()[:8]


def _temporary(target: Path, purpose: str) -> Path:
    return target.parent / f".{target.name}.{purpose}-{new_token()}"


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


def delete(path: Path, journal: Journal | None = None) -> None:
    """Removes a directory with all that is in it, as far as the system lets it."""
    with logged(journal, "rmtree", path):
        shutil.rmtree(path, ignore_errors=True)


def _rename(old: Path, new: Path, journal: Journal | None) -> None:
    with logged(journal, "rename", old, other=new):
        os.rename(old, new)


def _make_parents(parent: Path, journal: Journal | None) -> list[Path]:
    """Makes a directory and its parents; returns those that were not there, the deepest first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    for path in reversed(missing):
        with logged(journal, "mkdir", path):
            path.mkdir(exist_ok=True)
    return missing


def _sync_above(directory: Path, journal: Journal | None) -> None:
    """Makes the names of a directory and of those above it durable, up to the file system's root.

    Those that were there already, too: whoever made them may not have got as far as that.
    """
    while not os.path.ismount(directory):
        directory = directory.parent
        with suppress(PermissionError):  # it may be entered and not be read: then others made it
            sync_directory(directory, journal)


def _lock(descriptor: int) -> bool:
    """Takes the lock, waiting for it. False where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _is_abandoned(path: Path, name: re.Match[str]) -> bool:
    """Whether the writer of a ``saving`` directory is gone."""
    if _is_ours(name):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except (FileNotFoundError, PermissionError):  # gone meanwhile; another user's
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # no locks there
            pass
        else:
            return True
        finally:
            os.close(descriptor)
    return _is_old(path)


def _is_ours(name: re.Match[str]) -> bool:
    """Whether this machine, since it was started, has made a temporary name."""
    return name["token"].startswith(_machine())


def _is_old(path: Path) -> bool:
    """Whether nothing was written for long: to a file, or to a directory and the files in it."""
    try:
        newest = path.stat().st_mtime
        if path.is_dir():
            with os.scandir(path) as entries:
                times = (entry.stat(follow_symlinks=False).st_mtime for entry in entries)
                newest = max([newest, *times])
    except OSError:  # gone meanwhile, or another user's
        return False
    return time.time() - newest > _ABANDONED_S


def _swap(new: Path, target: Path, journal: Journal | None) -> Path:
    """Puts `new` at `target` and returns where the old one now lies.

    renameat2's exchange does it in one step. Where a file system lacks it there is a moment without
    a target; the old one then bears a name by which `remove_leftovers` puts it back.
    """
    begin = time.monotonic_ns()
    if _exchange(new, target):
        if journal is not None:
            end = time.monotonic_ns()
            journal.add(Operation(begin, end, "exchange", str(new), other=str(target)))
        return new
    old = _temporary(target, "replaced")
    _rename(target, old, journal)
    _rename(new, target, journal)
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
