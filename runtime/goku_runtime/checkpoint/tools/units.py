"""Bytes and tensors in words, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from goku_runtime.checkpoint.tree import decode

__all__ = ["count_text", "parse_size", "shape_text", "size_text", "value_text"]

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def size_text(nbytes: float) -> str:
    """As in "1.25 GiB"; below a kibibyte, "12 B"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"


def parse_size(text: str) -> int:
    """Bytes from "5GB" (10**9 each), "64 MiB" (2**20) or "65536".

    Raises:
        ValueError: anything else.
    """
    found = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(f"size is {text!r}; allowed: bytes, or a number with KB, MiB, GB, ...")
    return int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit


def count_text(number: int, noun: str) -> str:
    """As in "1 tensor" and "1,500 tensors"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shape_text(shape: Sequence[int]) -> str:
    """As in "[3, 4]"; "[]" for a scalar."""
    return f"[{', '.join(map(str, shape))}]"


def value_text(encoded: str) -> str:
    """A plain value in Python's spelling, from the JSON that state.json has for it."""
    return repr(decode(json.loads(encoded)))
