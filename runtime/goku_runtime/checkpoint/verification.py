"""Reading a whole checkpoint to see that every byte is what was written."""

from __future__ import annotations

import os
from collections.abc import Callable

from goku_runtime.checkpoint.directory import given_path
from goku_runtime.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    Report,
    file_problem,
    file_problems,
    raise_problems,
    unless_replaced,
)
from goku_runtime.checkpoint.options import CheckpointOptions
from goku_runtime.checkpoint.stored import Stored, sums_name

__all__ = ["verify"]

# Damaged pieces of one file that are named; the rest is counted.
_SHOWN = 16


def verify(
    path: str | os.PathLike[str],
    *,
    options: CheckpointOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Reads every file of a checkpoint and compares sizes, CRC-32C of files and of chunks.

    Args:
        path: the checkpoint.
        options: of the reading engine.
        progress: called with the bytes read so far and all bytes, several times a second.

    Raises:
        CheckpointError: no checkpoint, or files missing, truncated, altered or extra: all named. Of a
            data file also which bytes, the tensors in them and the rank that wrote them.
        ValueError: `path` is an address, or no path; something else than options was given.
        OSError: a file cannot be read.
    """
    options = CheckpointOptions.given(options)
    directory = given_path(path)
    manifest = Manifest.read(directory)
    total = sum(entry.size for entry in manifest.files.values())
    done = 0

    def advance(nbytes: int) -> None:
        if progress is not None:
            progress(done + nbytes, total)

    with unless_replaced(directory, manifest):
        problems = file_problems(directory, manifest, sums=False)
        damaged = {problem.partition(":")[0] for problem in problems}
        stored: Stored | None = None
        if manifest.version > 1:
            try:
                stored = Stored(directory, manifest)
            except CheckpointError as error:
                if not problems:
                    problems.append(str(error))
        with options.engine() as engine:
            for name, wanted in manifest.files.items():
                if name in damaged:
                    pass
                elif stored is None or name not in stored.index.files:
                    problems += file_problem(directory / name, wanted)
                else:
                    reading = engine.start_checksum(directory / name, chunk=stored.index.chunk)
                    while not reading.wait(0.2):
                        advance(reading.progress[0])
                    size, crc, sums = reading.result()
                    if (size, crc) != (wanted.size, wanted.crc) or _other_sums(stored, name, sums):
                        problems += _pieces(stored, name, sums)
                done += wanted.size
                advance(0)
        raise_problems(directory, problems)
    return Report(directory, {name: entry.size for name, entry in manifest.files.items()})


def _other_sums(stored: Stored, name: str, found: bytes) -> bool:
    try:
        return stored.sums(name) != found
    except CheckpointError:  # that file's own damage is told beside it
        return False


def _pieces(stored: Stored, name: str, found: bytes) -> list[str]:
    """Which pieces of a data file are damaged, adjacent chunks as one."""
    try:
        wanted = stored.sums(name)
    except CheckpointError:
        return [f"{name}: altered, and {sums_name(name)}, which would tell where, is damaged too"]
    chunk, size = stored.index.chunk, stored.manifest.files[name].size
    pieces: list[list[int]] = []
    for start in range(0, size, chunk):
        at = start // chunk * 4
        if found[at : at + 4] != wanted[at : at + 4]:
            if pieces and pieces[-1][1] == start:
                pieces[-1][1] = min(start + chunk, size)
            else:
                pieces.append([start, min(start + chunk, size)])
    if not pieces:  # the sums of the chunks and of the file contradict each other
        return [f"{name}: altered"]
    lines = [stored.damage(name, start, stop - start) for start, stop in pieces[:_SHOWN]]
    more = len(pieces) - _SHOWN
    return lines + ([f"{name}: and {more} more damaged pieces"] if more > 0 else [])
