"""Python's collector of cycles, while millions of objects are made that hold none: `collector_paused`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """It looks at all objects there are whenever a quarter more has come: half the time that a large dataset takes to
    be put together, for nothing. Within another pause, or where it is off, nothing changes."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
