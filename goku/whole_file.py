"""Files that are there whole or not at all, however many processes write one at the same time."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write the file beside its place and rename it; its folder is made where it is missing.

    durable: on the disk before it has its name, so that a machine's crash leaves no empty file under it.

    An interrupt or an error leaves nothing. A kill leaves a `.partial-...` of a name that nothing reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named before it is there: a signal's exception between making it and the `try` would leave it.
    partial = path.parent / f".partial-{uuid.uuid4().hex}"
    try:
        with open(partial, "xb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.filename == str(partial):  # a name that nobody gave
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        # Gone when it was renamed, and a signal may come between the rename and here.
        partial.unlink(missing_ok=True)
