"""Launch configurations, shipped as data: configs/<op>.json, one row per kernel, size and chip.

A configuration depends on (op, kernel, width or head_dim, dtype, chip) and on nothing that changes
from batch to batch, so that no pack ever waits for a tuner. `python -m bench tune OP` measures
candidates on a GPU and rewrites the rows.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources

import torch

Config = Mapping[str, int]


def find(op: str, kernel: str, size: int, dtype: torch.dtype, chip: int) -> Config | None:
    """Meta-parameters and launch options of `kernel` of operator `op`; None where there are none.

    Args:
        op, kernel: names as in configs/<op>.json.
        size: width or head_dim; the row of the smallest size that is not less holds.
        dtype: of the tokens.
        chip: 80, 90 or 100 (see `launch.CHIPS`).
    """
    rows = [row for row in _rows(op, kernel, dtype, chip) if row["size"] >= size]
    row = min(rows, key=lambda row: row["size"], default=None)
    return None if row is None or row.get("unused") else row["config"]


def config(op: str, kernel: str, size: int, dtype: torch.dtype, chip: int) -> Config:
    """As `find`, where there has to be one.

    Raises:
        ValueError: no row for these, with what there is.
    """
    found = find(op, kernel, size, dtype, chip)
    if found is None:
        name = str(dtype).removeprefix("torch.")
        largest = max((row["size"] for row in _rows(op, kernel, dtype, chip)), default=None)
        raise ValueError(
            f"{op}: no configuration of its {kernel} kernel for size {size}, {name}, sm_{chip}: "
            f"the largest size there is {largest}"
        )
    return found


def _rows(op: str, kernel: str, dtype: torch.dtype, chip: int) -> list[Mapping]:
    name = str(dtype).removeprefix("torch.")
    return [
        row
        for row in table(op)
        if row["kernel"] == kernel and name in row["dtypes"] and row["chip"] == chip
    ]


@functools.cache
def table(op: str) -> tuple[Mapping, ...]:
    """All rows of configs/<op>.json: {kernel, size, dtypes, chip, config}.

    One with "unused": true is of a kernel that could run, but lost to what runs without it or was
    never timed beside that; to leave the row out would hand its sizes to the next larger one.
    """
    file = resources.files(__package__) / "configs" / f"{op}.json"
    return tuple(json.loads(file.read_text(encoding="utf-8"))["rows"])
