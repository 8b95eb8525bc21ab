"""The compiled module of the checkpoints, `goku_runtime._io`, where it is missing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["needs_io"]


@contextmanager
def needs_io() -> Generator[None]:
    """Around an import of `goku_runtime._io`, at its use: the rest of the runtime works without a compiler.

    Raises:
        ImportError: it is missing, with the step that builds it.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(
            "goku_runtime._io (checkpoint files and their sums) cannot be imported: "
            "`pip install .` in the repository builds it with a C++ compiler, no GPU is needed"
        ) from error
