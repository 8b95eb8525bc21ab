"""The part of docs/performance.md on how near the operators bound by memory come to a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

Record = Mapping[str, Any]

WANTED = {"forward": 90.0, "backward": 85.0}  # per cent of the copy's bandwidth in the same run
OPERATORS = ("qk_norm_rope", "adaln_modulate", "gated_residual_adaln", "rectified_flow_noise")
SIZES = ("64K", "220K")  # of packs, as their names begin
NOTE = (
    "What is wanted in bf16, at both models' widths: {forward:.0f}% of the copy's bandwidth forward "
    "and {backward:.0f}% backward. Shown is the lowest of all packs of a size, and of views of QKV "
    "where there are such.\n"
).format(**WANTED)
HEAD = ("GPU", "operator", "case", "direction", "wanted", *(f"{size} packs" for size in SIZES))
NOT_MEASURED = "not measured"

Group = tuple[str, str, str, str]  # case, pack, dtype, direction
# name of an operator, GPU, group -> our row, or None
Ours = Callable[[str, str, Group], Record | None]


class Rows(Protocol):
    """What of the report's rows is needed here: `bench.report.Shown`."""

    def mark(self, record: Record) -> str: ...


def section(
    shown: Rows, devices: Sequence[str], groups: Callable[[str], Sequence[Group]], ours: Ours,
    table: Callable[[Sequence[str], Sequence[Sequence[str]]], str],
) -> str:  # fmt: skip
    """One line for each operator, width and direction of every GPU.

    Args:
        groups: everything that is measured of an operator.
    """
    lines = []
    for device in devices:
        for name in OPERATORS:
            wanted = [g for g in groups(name) if g[2] == "bfloat16"]
            for case in dict.fromkeys(_width(g) for g in wanted):
                for direction, least in WANTED.items():
                    mine = [g for g in wanted if (_width(g), g[3]) == (case, direction)]
                    if mine:
                        cells = [
                            _verdict(shown, [(g[1], ours(name, device, g)) for g in packs], least)
                            for packs in ([g for g in mine if g[1].startswith(s)] for s in SIZES)
                        ]
                        lines.append([device, name, case, direction, f"{least:.0f}%", *cells])
    body = table(HEAD, lines) if lines else f"{NOT_MEASURED.capitalize()} on any GPU.\n"
    return f"{NOTE}\n{body}"


def _width(group: Group) -> str:
    return group[0].split(",")[0]


def _verdict(shown: Rows, rows: Sequence[tuple[str, Record | None]], least: float) -> str:
    """Whether all are `least` or more; the lowest, with its pack where it is too low."""
    there = [(row["percent_of_ceiling"], pack, row) for pack, row in rows if row is not None]
    if not there:
        return NOT_MEASURED
    percent, pack, _ = min(there, key=lambda each: each[0])
    mark = "".join(sorted({shown.mark(row) for _, _, row in there}))
    if percent < least:
        return f"missed: {percent:.1f}% ({pack}){mark}"
    if len(there) < len(rows):
        return f"{NOT_MEASURED} on {len(rows) - len(there)} of {len(rows)}; {percent:.1f}%{mark}"
    return f"met: {percent:.1f}%{mark}"
