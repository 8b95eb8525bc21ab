"""Goku: a rectified-flow transformer for images and video, its training and its sampling."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
