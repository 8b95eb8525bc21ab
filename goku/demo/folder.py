"""The demo's folder: made, known again, and cleared of what an earlier demo left, but nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from goku.demo.media import DemoError

__all__ = ["clear", "refuse_folders"]

_MARKER = ".goku-demo"


def clear(out: Path, files: Sequence[str], folders: Sequence[str]) -> None:
    """Make `out`, and remove these of it; downloaded media and everything else stay.

    Raises DemoError for a folder that holds something and is not an earlier demo's: nothing is then removed.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _MARKER).exists())):
        raise DemoError(
            f"--out is {out}, which holds something else; allowed: an empty or new folder, or an earlier demo's"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).touch()
    for name in files:
        (out / name).unlink(missing_ok=True)
    for name in folders:
        if (out / name).exists():
            shutil.rmtree(out / name)


def refuse_folders(overrides: Sequence[str], kept: Sequence[str]) -> None:
    """Raises DemoError for an override of one of the keys `kept`, whose folders belong to the demo."""
    for override in overrides:
        if override.split("=", 1)[0].strip() in kept:
            raise DemoError(
                f"{override!r}: the demo keeps its folders together; allowed: --out FOLDER"
            )
