"""`verify` for people and programs: what is damaged as a report, not as an exception."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from goku_runtime.checkpoint.manifest import MANIFEST_NAME, CheckpointError, Manifest
from goku_runtime.checkpoint.options import CheckpointOptions
from goku_runtime.checkpoint.stored import Stored
from goku_runtime.checkpoint.tools.source import writing_rank
from goku_runtime.checkpoint.tools.units import size_text
from goku_runtime.checkpoint.verification import verify

__all__ = ["Damage", "Verification", "verify_all"]

# A fault of a data file, as `Stored.damage` words it. Names of files hold no colon.
_ALTERED = re.compile(r"([^:]+): altered, bytes (\d+) to (\d+) ")


@dataclass(frozen=True)
class Damage:
    """Bytes [start, stop) of a file that are not those that were written, the tensors that lie in them
    at least partly, and the rank that wrote them."""

    file: str
    start: int
    stop: int
    tensors: tuple[str, ...]
    rank: int | None


@dataclass(frozen=True)
class Verification:
    """What `verify_all` found: nothing wrong if `problems` is empty.

    Attributes:
        path: the checkpoint.
        files, nbytes: of the manifest; 0 where that cannot be read.
        seconds: that it took.
        problems: each fault in words.
        damages: those that are pieces of data files.
    """

    path: Path
    files: int
    nbytes: int
    seconds: float
    problems: tuple[str, ...]
    damages: tuple[Damage, ...]

    @property
    def rate(self) -> float:
        """GiB/s."""
        return self.nbytes / max(self.seconds, 1e-9) / (1 << 30)

    def to_text(self) -> str:
        """One line if it is whole, else a line for each fault."""
        if self.problems:
            return "\n".join([f"{self.path} is damaged", *(f"  {each}" for each in self.problems)])
        return (
            f"{self.path} is whole: {self.files} files, {size_text(self.nbytes)} in "
            f"{self.seconds:.1f} s ({self.rate:.2f} GiB/s)"
        )

    def to_json(self) -> str:
        """All of it for programs."""
        content = {
            "path": str(self.path),
            "whole": not self.problems,
            "files": self.files,
            "bytes": self.nbytes,
            "seconds": self.seconds,
            "gib_per_s": self.rate,
            "problems": self.problems,
            "damages": [vars(each) for each in self.damages],
        }
        return json.dumps(content, indent=1, allow_nan=False)


def verify_all(
    path: str | os.PathLike[str],
    *,
    options: CheckpointOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """`goku_runtime.checkpoint.verify` that reports damage instead of raising.

    Raises:
        ValueError: `path` is no checkpoint at all.
        OSError: a file cannot be read.
    """
    directory = Path(path)
    if not (directory / MANIFEST_NAME).exists():
        raise ValueError(f"{directory} holds no {MANIFEST_NAME}: no checkpoint")
    started = time.perf_counter()
    problems: tuple[str, ...] = ()
    damages: list[Damage] = []
    manifest: Manifest | None = None
    try:
        manifest = Manifest.read(directory)
        verify(directory, options=options, progress=progress)
    except CheckpointError as error:
        problems = error.problems or (str(error),)
        if manifest is not None:
            damages = _damages(directory, manifest, problems)
    files = {} if manifest is None else manifest.files
    return Verification(
        directory,
        len(files),
        sum(entry.size for entry in files.values()),
        time.perf_counter() - started,
        problems,
        tuple(damages),
    )


def _damages(directory: Path, manifest: Manifest, problems: tuple[str, ...]) -> list[Damage]:
    found = [match for each in problems if (match := _ALTERED.match(each))]
    if not found:
        return []
    stored = Stored(directory, manifest)  # it was opened to find them
    damages = []
    for match in found:
        name, start, stop = match[1], int(match[2]), int(match[3])
        tensors = tuple(sorted(stored.tensors_in(name, start, stop - start)))
        damages.append(Damage(name, start, stop, tensors, writing_rank(name)))
    return damages
