"""The version of the package that this is."""

from __future__ import annotations

import importlib.metadata

__all__ = ["own_version"]


def own_version() -> str | None:
    """Of the installed package; None where it is used from a source tree, or being installed at this very moment."""
    try:
        return importlib.metadata.version("goku") or None
    except importlib.metadata.PackageNotFoundError:
        return None
