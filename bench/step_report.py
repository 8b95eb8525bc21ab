"""The part of docs/performance.md on whole steps: how fast, how much memory, where the time goes.

The page's own tables compare ours with peers; here all rows are ours and differ by what is computed
again, so that they have tables of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from bench import longest, plots, step
from bench.block_expected import reached
from bench.step_profile import CATEGORIES, shares

Record = Mapping[str, Any]

NOTE = (
    "Noise, forward, backward, clipping, AdamW and EMA of a whole model on one GPU, latents and text "
    "on the device. MFU counts nothing that is computed again. Expected: the blocks' matrix "
    "products, attention and memory-bound operators, what the policy computes again, and the weights' "
    "own traffic, one after the other, each at its ceiling. Estimate: what `goku train --dry-run` says. "
    "Before it is timed, loss and norm of the gradient are compared with those of the eager operators."
)
HEAD = ("GPU", "model", "pack", "kept for the backward", "ms", "tokens/s", "MFU", "expected ms",
        "expected / measured", "peak memory", "estimate", "peak / estimate")  # fmt: skip
LONGEST_HEAD = ("GPU", "model", "kept for the backward", "tokens", "estimated tokens",
                "peak memory", "a step on one clip of them", "tokens/s")  # fmt: skip
NOT_MEASURED = "not measured"


class Rows(Protocol):
    """What of the report's rows is needed here: `bench.report.Shown`."""

    def where(self, **wanted: object) -> list[Record]: ...

    def mark(self, record: Record) -> str: ...


Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def section(shown: Rows, table: Table) -> str:
    """All tables; where no GPU has a row, that alone."""
    if not shown.where(name=step.OPERATOR, device_type="cuda"):
        return f"{NOT_MEASURED.capitalize()} on any GPU.\n"
    parts = [
        table(HEAD, [_line(shown, r) for r in _steps(shown)] or [_empty(len(HEAD))]),
        "### Where the time goes\n",
        _where(shown, table),
        "### The longest sequence on one GPU\n",
        table(
            LONGEST_HEAD,
            [_longest_line(shown, r) for r in _longest(shown)] or [_empty(len(LONGEST_HEAD))],
        ),
    ]
    return "\n".join(parts)


def picture(shown: Rows) -> str:
    """Stacked bars of where the time goes, a bar for every measured step."""
    bars = [
        plots.Stack(
            f"{r['hardware']['device']}: {r['case']}, {r['pack']}, {r['peer']}"
            f" ({r['median_ms']:.0f} ms)",
            tuple((kind, ms) for kind, ms in r["extra"]["where_ms"].items()),
            stale=bool(shown.mark(r)),
        )
        for r in _profiled(shown)
    ]
    return plots.stacked("step: where the time goes, per cent", CATEGORIES, bars)


def _empty(columns: int) -> list[str]:
    return ["-", *[NOT_MEASURED] * (columns - 1)]


def _steps(shown: Rows) -> list[Record]:
    rows = shown.where(name=step.OPERATOR, device_type="cuda")
    return [r for r in rows if r["pack"] != longest.PACK]


def _profiled(shown: Rows) -> list[Record]:
    return [r for r in _steps(shown) if r["extra"].get("where_ms")]


def _longest(shown: Rows) -> list[Record]:
    return shown.where(name=step.OPERATOR, device_type="cuda", pack=longest.PACK)


def _line(shown: Rows, r: Record) -> list[str]:
    head = [r["hardware"]["device"], r["case"], r["pack"], r["peer"]]
    if r["status"] != "measured":
        return [*head, f"{r['status']}: {r['note']}", *[""] * (len(HEAD) - 5)]
    extra, share = r["extra"], reached(r)
    peak, estimate = extra["peak_memory_bytes"], extra["estimated_memory_bytes"]
    return [
        *head,
        f"{r['median_ms']:.1f}{shown.mark(r)}",
        f"{extra['tokens_per_s']:,.0f}",
        _percent(extra.get("mfu")),
        f"{extra['expected_ms']:.1f} ({extra['attention_rate']})",
        NOT_MEASURED if share is None else f"{share:.2f}",
        _gib(peak),
        _gib(estimate),
        f"{peak / estimate:.2f}",
    ]


def _where(shown: Rows, table: Table) -> str:
    rows = _profiled(shown)
    if not rows:
        return f"{NOT_MEASURED.capitalize()} on any GPU.\n"
    there = [kind for kind in CATEGORIES if any(kind in r["extra"]["where_ms"] for r in rows)]
    lines = []
    for r in rows:
        percent = shares(r["extra"]["where_ms"])
        cells = [f"{percent.get(kind, 0.0):.1f}" for kind in there]
        lines.append(
            [r["hardware"]["device"], r["case"], r["pack"], r["peer"] + shown.mark(r), *cells]
        )
    words = (
        "Per cent of one step by the operator that launched the kernels; nothing: no kernel ran.\n"
    )
    return f"{words}\n" + table(["GPU", "model", "pack", "kept", *there], lines)


def _longest_line(shown: Rows, r: Record) -> list[str]:
    extra = r["extra"]
    took = r["note"]
    if r["status"] == "measured":
        took = f"{1e-3 * r['median_ms']:.1f} s{shown.mark(r)}"
        if extra.get("clip_tokens", extra["longest_tokens"]) != extra["longest_tokens"]:
            took += f" for {extra['clip_tokens']:,}"
    return [
        r["hardware"]["device"],
        r["case"],
        r["peer"],
        f"{extra['longest_tokens']:,}",
        f"{extra['estimated_tokens']:,}",
        _gib(extra["peak_memory_bytes"]),
        took,
        f"{extra['tokens_per_s']:,.0f}" if "tokens_per_s" in extra else NOT_MEASURED,
    ]


def _percent(share: float | None) -> str:
    return "unknown peak" if share is None else f"{100 * share:.1f}%"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
