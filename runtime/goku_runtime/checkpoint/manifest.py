"""manifest.json: which files a checkpoint consists of, their sizes and CRC-32C values.

The manifest is written last, so a directory without one was never finished. It has a CRC of its own
and exactly one spelling (reading it and writing it again must give the same bytes), so a flipped
bit anywhere in it is found too. A CRC finds accidents, not forgeries: whoever can rewrite the files
can rewrite this one, which is why reading a checkpoint runs no code whatever the files hold.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from goku_runtime.checkpoint.checksum import crc32c, crc32c_of_file

__all__ = [
    "MANIFEST_NAME",
    "CheckpointError",
    "FileSum",
    "Manifest",
    "Report",
    "file_problem",
    "file_problems",
    "name_problems",
    "of_others",
    "raise_problems",
    "unless_replaced",
    "verified",
]

MANIFEST_NAME = "manifest.json"
FORMAT = "goku-checkpoint"
VERSION = 2
# Every version that was ever released stays readable.
READABLE = (1, 2)
# Of torch.distributed.checkpoint, which beside our manifest is ours.
_DCP_METADATA = ".metadata"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")
_CRC = re.compile(r"[0-9a-f]{8}")


class CheckpointError(ValueError):
    """A checkpoint that is not whole or not of this format, with every fault named.

    `problems` holds the faults of the files one by one, where it is raised for those.
    """

    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and CRC-32C of one file."""

    size: int
    crc: int


@dataclass(frozen=True)
class Report:
    """What `verify` found to be whole: the directory, and each file's size in bytes."""

    path: Path
    files: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together, without the manifest."""
        return sum(self.files.values())


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; `created_ns` is the wall clock in nanoseconds since 1970."""

    files: Mapping[str, FileSum]
    created_ns: int
    version: int = VERSION

    @classmethod
    def of(cls, files: Mapping[str, FileSum], *, after: int = 0) -> Manifest:
        """A manifest of these files, created now, or just `after` a time that the clock says is to come."""
        return cls(dict(sorted(files.items())), max(time.time_ns(), after + 1))

    def to_bytes(self) -> bytes:
        """The one spelling of this manifest."""
        content: dict[str, object] = {
            "format": FORMAT,
            "version": self.version,
            "created_ns": self.created_ns,
            "files": {
                name: {"size": entry.size, "crc32c": f"{entry.crc:08x}"}
                for name, entry in self.files.items()
            },
        }
        content["crc32c"] = f"{crc32c(json.dumps(content).encode()):08x}"
        return (json.dumps(content, indent=1) + "\n").encode()

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Reads and checks a directory's manifest.

        Raises:
            CheckpointError: there is none, it is damaged, or it is of another format or version.
            OSError: it cannot be read.
        """
        path = directory / MANIFEST_NAME
        try:
            data = _content(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            kind = "holds no" if directory.is_dir() else "is no directory with a"
            raise CheckpointError(
                f"{directory} {kind} {MANIFEST_NAME}: no checkpoint{of_others(directory)}"
            ) from error
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Checks the content of a manifest.json.

        Raises:
            CheckpointError: it is damaged, or of another format or version; it begins with `where`.
        """
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} is damaged: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{where} is not a manifest of the format {FORMAT!r}")
        version = content.get("version")
        if type(version) is not int or version not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise CheckpointError(f"{where} has version {version!r}; this program reads {known}")
        try:
            files = {name: _file_sum(name, entry) for name, entry in content["files"].items()}
            manifest = cls(files, content["created_ns"], version)
            same = type(manifest.created_ns) is int and manifest.to_bytes() == data
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{where} is damaged: {error!r}") from error
        if not same:
            raise CheckpointError(f"{where} is damaged: not as it was written")
        return manifest


def of_others(directory: Path) -> str:
    """What may be said of a directory without a manifest: who wrote it, where that is seen."""
    if not (directory / _DCP_METADATA).is_file():
        return ""
    return f" of ours; its {_DCP_METADATA} is torch.distributed.checkpoint's, whose load reads it"


def _file_sum(name: str, entry: Mapping[str, object]) -> FileSum:
    size, crc = entry["size"], entry["crc32c"]
    # A name that is a path could lead out of the checkpoint.
    if not _PLAIN_NAME.fullmatch(name) or name in (".", "..", MANIFEST_NAME):
        raise ValueError(f"file name {name!r}")
    if type(size) is not int or size < 0 or not isinstance(crc, str) or not _CRC.fullmatch(crc):
        raise ValueError(f"entry {entry!r} of {name!r}")
    return FileSum(size, int(crc, 16))


def file_problem(path: Path, wanted: FileSum, *, sums: bool = True) -> list[str]:
    """What is wrong with one file, as one line; empty if nothing. See `file_problems`."""
    if path.is_symlink() or not path.is_file():
        return [f"{path.name}: missing"]
    size = path.stat().st_size
    if size != wanted.size:
        kind = "truncated" if size < wanted.size else "too long"
        return [f"{path.name}: {kind}, {size} bytes instead of {wanted.size}"]
    if sums:
        return _sum_problem(path.name, FileSum(*crc32c_of_file(path)), wanted)
    return []


def _sum_problem(name: str, found: FileSum, wanted: FileSum) -> list[str]:
    crcs = f"CRC-32C {found.crc:08x} instead of {wanted.crc:08x}"
    return [] if found == wanted else [f"{name}: altered, {crcs}"]


def file_problems(
    directory: Path, manifest: Manifest, *, sums: bool = True, share: tuple[int, int] = (0, 1)
) -> list[str]:
    """What is wrong with the files that a manifest names, one line each; empty if nothing.

    Args:
        directory: the checkpoint.
        manifest: its manifest.
        sums: whether to read the files and compare their CRC-32C, or only look at their sizes.
        share: (rank, ranks): which part of the files to read. Files are dealt out by size, the
            largest first; the first rank also looks for files that do not belong.
    """
    rank, ranks = share
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    problems = []
    for name in by_size[rank::ranks]:
        problems += file_problem(directory / name, manifest.files[name], sums=sums)
    if rank == 0:
        problems += _extra(os.listdir(directory), manifest)
    return problems


def name_problems(directory: Path, manifest: Manifest) -> list[str]:
    """Which files are missing or do not belong, one line each, by one look at the directory's names."""
    names = os.listdir(directory)
    missing = sorted(manifest.files.keys() - set(names))
    return [f"{name}: missing" for name in missing] + _extra(names, manifest)


def _extra(names: Iterable[str], manifest: Manifest) -> list[str]:
    extra = sorted(set(names) - {*manifest.files, MANIFEST_NAME})
    return [f"{name}: extra, not named in {MANIFEST_NAME}" for name in extra]


def raise_problems(directory: Path, problems: list[str]) -> None:
    """Raises CheckpointError with all the problems, if there are any."""
    if problems:
        error = CheckpointError(f"{directory} is damaged: " + "; ".join(sorted(problems)))
        error.problems = tuple(sorted(problems))
        raise error


def verified(directory: Path, manifest: Manifest, name: str) -> bytes:
    """What a small file of a checkpoint holds: the very bytes whose sum was compared.

    Raises:
        CheckpointError: the manifest does not name it, or it is missing, truncated, too long or altered.
        OSError: it cannot be read.
    """
    wanted = manifest.files.get(name)
    if wanted is None:
        raise CheckpointError(f"{directory} is damaged: {name}: missing")
    with unless_replaced(directory, manifest):
        raise_problems(directory, file_problem(directory / name, wanted, sums=False))
        data = _content(directory / name)
        raise_problems(directory, _sum_problem(name, FileSum(len(data), crc32c(data)), wanted))
    return data


@contextmanager
def unless_replaced(directory: Path, manifest: Manifest) -> Generator[None]:
    """Around reads of a checkpoint: one that was replaced or removed meanwhile is not called damaged.

    A save with ``overwrite=True`` and a retention do that while others read; what they have read by then was
    compared with the sums of the manifest that they began with, so nothing is ever mixed.

    Raises:
        CheckpointError: instead of another one, or of a file that is not there.
    """
    try:
        yield
    except (CheckpointError, FileNotFoundError) as error:
        try:
            same = Manifest.read(directory) == manifest
        except CheckpointError:
            same = False
        if same:
            raise
        raise CheckpointError(
            f"{directory} was replaced or removed while it was read: read it again, or another one"
        ) from error


def _content(path: Path) -> bytes:
    """What a file holds. CheckpointError where it is none, a pipe for one, which would be waited at."""
    with open(path, "rb", opener=_at_once) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise CheckpointError(f"{path} is no regular file")
        return file.read()


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
