"""What a disk likes, as a table."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goku_runtime.checkpoint.native import needs_io
from goku_runtime.checkpoint.tools.units import size_text

__all__ = ["Probed", "probe"]


@dataclass(frozen=True)
class Probed:
    """What `goku_runtime._io.probe` measured."""

    content: Mapping[str, Any]

    def to_text(self) -> str:
        """A table of all trials, and the choice as arguments of `CheckpointOptions`."""
        lines = [
            f"{self.content['directory']}: files of {size_text(self.content['bytes'])}, written with fsync",
            f"  {'backend':9} {'direct':6} {'queue':>5} {'block':>10} {'threads':>7} "
            f"{'write GiB/s':>11} {'read GiB/s':>10}",
        ]
        for each in self.content["trials"]:
            lines.append(
                f"  {each['backend']:9} {each['direct']:6} {_count(each['queue_depth']):>5} "
                f"{size_text(each['block_bytes']):>10} {_count(each['threads']):>7} "
                f"{_rate(each['write_gib_s']):>11} {_rate(each['read_gib_s']):>10}"
                + (f"  {each['error']}" if each.get("error") else "")
            )
        choice = self.content["choice"]
        arguments = ", ".join(f"{name}={value!r}" for name, value in choice.items())
        if any(each["threads"] is None for each in self.content["trials"]):
            lines.append("  own: the threads that the engine keeps for files in memory")
        return "\n".join([*lines, f"choice: CheckpointOptions({arguments})"])

    def to_json(self) -> str:
        """All of it for programs."""
        return json.dumps(self.content, indent=1)


def probe(path: str | os.PathLike[str], *, seconds: float = 1.0, nbytes: int = 64 << 20) -> Probed:
    """Measures the disk under a directory; nothing stays there.

    Args:
        path: the directory.
        seconds: no trial begins later.
        nbytes: of each trial's file.

    Raises:
        ValueError: arguments that are not allowed.
        OSError: no such directory, or one that cannot be written to.
        ImportError: the compiled module is missing.
    """
    with needs_io():
        from goku_runtime import _io

    if not Path(path).is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no directory", str(path))
    return Probed(_io.probe(str(Path(path)), seconds=seconds, bytes=nbytes))


def _count(value: int | None) -> str:
    return "own" if value is None else str(value)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
