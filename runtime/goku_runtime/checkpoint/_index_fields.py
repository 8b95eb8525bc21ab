"""The fields of index.json, as JSON has them: looked at before anything is made of them."""

from __future__ import annotations

from typing import Any

import torch

from goku_runtime.checkpoint.records import DTYPES

__all__ = [
    "AXES",
    "MOST",
    "Bad",
    "are_sides",
    "check_shape",
    "fields",
    "integer",
    "listed",
    "short",
    "sides_text",
    "stored_dtype",
    "string",
]

MOST = (1 << 63) - 1
"""The largest number that an index may hold."""

AXES = 64
"""Of a tensor, at most: as many as torch allows."""


class Bad(Exception):
    """What is wrong, without saying where the index lies."""


def fields(value: Any, field: str, *names: str) -> list[Any]:
    """The values of an object that has these fields and no others."""
    if not isinstance(value, dict):
        raise Bad(f"{field}: {short(value)}; must be an object")
    for name in names:
        if name not in value:
            raise Bad(f"{field}: lacks {name!r}")
    for name in value:
        if name not in names:
            raise Bad(f"{field}: unknown field {short(name)}")
    return [value[name] for name in names]


def listed(value: Any, field: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise Bad(f"{field}: {short(value)}; must be a list")
    return value


def integer(value: Any, field: str, least: int, most: int = MOST) -> int:
    """An integer within bounds; True is none."""
    if type(value) is not int or not least <= value <= most:
        raise Bad(f"{field}: {short(value)}; must be an integer from {least} to {most}")
    return value


def string(value: Any, field: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise Bad(f"{field}: {short(value)}; must be a string")
    return value


def stored_dtype(value: Any, field: str) -> torch.dtype:
    """The dtype of a tensor, by its name."""
    dtype = DTYPES.get(string(value, field))
    if dtype is None:
        raise Bad(f"{field}: {short(value)}; allowed: {', '.join(DTYPES)}")
    return dtype


def check_shape(value: Any, field: str) -> tuple[int, ...]:
    """The shape of a tensor."""
    axes = len(listed(value, field))
    if axes > AXES or not are_sides(value, axes):
        allowed = f"at most {AXES} integers from 0 to {MOST}"
        raise Bad(f"{field}: {sides_text(value)}; must be {allowed}")
    return tuple(value)


def are_sides(value: Any, axes: int) -> bool:
    """Whether these are sizes or starts: an integer from 0 for each axis."""
    return (
        type(value) is list
        and len(value) == axes
        and all(type(side) is int and 0 <= side <= MOST for side in value)
    )


def short(value: Any) -> str:
    """A value as text that is not long, however long the value is."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    if type(value) is int and not -MOST <= value <= MOST:
        return "an integer beyond 64 bits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def sides_text(value: Any) -> str:
    """A value that should be sizes or starts, as text that is not long."""
    if isinstance(value, list):
        return "[" + ", ".join(map(short, value[:8])) + (", ...]" if len(value) > 8 else "]")
    return short(value)
