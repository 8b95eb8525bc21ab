"""All that bench/gpu_check leaves, in one archive, and that archive unpacked into a repository.

It holds rows, tune's logs, gpu_check.json and gpu_check.log of bench/results and the launch
configurations: what a later run, on this machine or on another, needs to go on.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from goku.whole_file import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS, CONFIGS = "bench/results", "kernels/goku_kernels/triton/configs"
FOLDERS = {RESULTS: (".jsonl", ".json", ".log", ".begun"), CONFIGS: (".json",)}
MAX_BYTES = 16 * 2**20  # of an archive
MAX_UNPACKED_BYTES = 512 * 2**20


def cut_unfinished(folder: Path) -> None:
    """Cut the last line of every .jsonl in `folder` that a killed process did not finish."""
    for file in folder.rglob("*.jsonl"):
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_whole(file, whole)


def save(file: Path, root: Path = ROOT) -> int:
    """Write the archive, whole or not at all; returns its bytes. Where it is too large, without logs.

    Raises:
        ValueError: it is larger than MAX_BYTES even so, or cannot be written.
    """
    names = [
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*"))
        if path.is_file() and not path.is_symlink()
    ]
    names = [name for name in names if _allowed(name)]
    content = _packed(names, root)
    if len(content) > MAX_BYTES:
        content = _packed([name for name in names if not name.endswith(".log")], root)
    if len(content) > MAX_BYTES:
        raise ValueError(f"--state {file} has {len(content)} bytes: allowed are {MAX_BYTES}")
    try:
        write_whole(file, content, durable=True)
    except OSError as error:
        raise ValueError(f"--state {file} cannot be written: {error}") from error
    return len(content)


def _packed(names: list[str], root: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=6) as archive:
        for name in names:
            content = (root / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), int((root / name).stat().st_mtime)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _allowed(name: str) -> bool:
    """Whether `name` is a path, in its plain form, of a file that archives may hold."""
    path = PurePosixPath(name)
    if path.as_posix() != name or path.is_absolute() or ".." in path.parts or "\\" in name:
        return False
    return any(
        PurePosixPath(folder) in path.parents and path.suffix in suffixes
        for folder, suffixes in FOLDERS.items()
    )


def unpack(file: Path, root: Path = ROOT) -> list[str]:
    """Put the archive's files into their places below `root`; returns their names.

    All of it is read and judged before the first file is written. What was running when a run of
    the tuner died is known from the archive alone: .begun files that it lacks are removed.

    Raises:
        ValueError: no archive, or one with anything but plain files of FOLDERS.
    """
    contents: dict[str, bytes] = {}
    changed: dict[str, float] = {}
    left = MAX_UNPACKED_BYTES
    try:
        with tarfile.open(file, "r:gz") as archive:
            for member in archive:
                if not member.isreg() or not _allowed(member.name):
                    raise ValueError(
                        f"{file} holds {member.name!r}: allowed are plain files "
                        + ", ".join(f"{k}/*({'|'.join(v)})" for k, v in FOLDERS.items())
                    )
                left -= member.size
                if left < 0:
                    raise ValueError(f"{file} unpacks to more than {MAX_UNPACKED_BYTES} bytes")
                stream = archive.extractfile(member)
                assert stream is not None  # a regular file
                contents[member.name], changed[member.name] = stream.read(), member.mtime
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"--from {file} is no archive of --state: {error}") from error
    for name, content in contents.items():
        try:
            write_whole(root / name, content)
            if name.endswith(".begun"):  # its time of change is the process's last sign of life
                os.utime(root / name, (changed[name], changed[name]))
        except OSError as error:
            raise ValueError(f"{name} of --from {file} cannot be written: {error}") from error
    for begun in (root / RESULTS).rglob("*.begun"):
        if begun.relative_to(root).as_posix() not in contents:
            begun.unlink()
    return list(contents)
