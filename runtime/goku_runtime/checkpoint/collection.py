"""Stretches in which many objects are made, none of which is garbage."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["no_collection"]


@contextmanager
def no_collection() -> Generator[None]:
    """Stops the garbage collector, if it runs: it would look again and again at objects all of which stay.

    Measured with 20,000 tensors: a load takes 0.35 s instead of 0.53, a save 0.30 instead of 0.52. For the
    whole process: what other threads leave waits for the end.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
