"""docs/parallel_performance.md, rendered from the rows of `bench.exchange` and `bench.policies`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import exchange, harness, policies
from bench.exchange_peers import ALONE, OURS, PEERS, RAW
from bench.report import NOT_MEASURED, STALE, Shown, table

Record = Mapping[str, Any]

NAMES = (exchange.NAME, policies.NAME)

HEAD = """\
# Performance of the parallel runtime

Rendered by `python -m bench report` from `exchange.jsonl` and `policies.jsonl` of `bench/results`. Do not
edit. Measured by

    torchrun --nproc-per-node P -m bench.exchange
    torchrun --nproc-per-node P -m bench.policies      (and python -m bench.policies, one process)

on GPUs with NCCL as on CPUs with gloo. {stale} marks rows whose sources have changed since.
"""

EXCHANGE = """\
## Exchange

One attention of a packed batch: tokens to heads, the attention, heads to tokens; with its backward,
twice that. "exchange" stands a copy of q in for the attention, so that next to nothing but the
exchange is timed; "attention" computes it, by torch's own, sample by sample. Every peer's result and
gradients are compared with those of one process first. Peers take turns with a barrier before each
call, and a call takes as long as on its slowest rank.

GB/s: the bytes that the busiest rank sends to others (`exchange_bytes`) over the time. The ceiling is
`all_to_all_single` of the same bytes and splits, from buffers that lie ready, in the same rounds; %
is its time over ours. Ratios are the peer's time over ours: more than 1 means that ours is faster.
"three all-to-alls" is what one would write first: an exchange and a permute for each of q, k, v and
the result.
"""

POLICIES = """\
## Policies

One step of training (forward, backward, clipping, AdamW) of a small Goku. Loss and norm of the
gradient are compared with those of one process first. Memory is that of rank 0: the peak of a step
and what a forward leaves behind for the backward, both beside what was there before the step
(weights, optimizer states: "resident"); on a GPU as its allocator says, on a CPU as the profiler
records every allocation. "Predicted" is `goku.activation_bytes`; what a forward leaves behind holds
gathered weights too, where they are kept. The ratio is the time over that without checkpointing: less
is faster. tokens/s are of all processes together.
"""

_ON_CPU = """\
Rows of a CPU: P processes share its cores and exchange through its memory, so that they show that
the benchmark runs and what copies cost, and say nothing of a GPU or a network.{memory}

"""


def write(results: Path, docs: Path, root: Path = harness.ROOT) -> list[Path]:
    """Render to `docs`/parallel_performance.md; returns the file.

    Raises:
        ValueError: a row that cannot be read.
    """
    records = [r for r in harness.read(results) if r["name"] in NAMES]
    docs.mkdir(parents=True, exist_ok=True)
    page = docs / "parallel_performance.md"
    page.write_text(render(Shown.of(records, root)), encoding="utf-8")
    return [page]


def render(shown: Shown) -> str:
    """The page."""
    parts = [HEAD.format(stale=STALE), machines(shown)]
    for words, name, body in (
        (EXCHANGE, exchange.NAME, exchange_table),
        (POLICIES, policies.NAME, policy_table),
    ):
        parts.append(words)
        for kind, title in (("cuda", "GPU"), ("cpu", "CPU")):
            rows = shown.where(name=name, device_type=kind)
            parts.append(f"### {name.capitalize()} on a {title}\n")
            if not rows:
                parts.append(f"{NOT_MEASURED.capitalize()}.\n")
                continue
            if kind == "cpu":
                memory = {r["extra"]["memory"] for r in rows if "memory" in r["extra"]}
                said = f" Memory of new tensors: {', '.join(sorted(memory))}." if memory else ""
                parts.append(_ON_CPU.format(memory=said))
            parts.append(body(shown, rows))
            parts.append(_unmeasured(rows))
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


def machines(shown: Shown) -> str:
    """What was measured on, by the newest row of each machine."""
    newest: dict[str, Record] = {}
    for r in shown.records:
        newest[f"{r['device_type']} {r['hardware']['device']}"] = r
    lines = []
    for r in newest.values():
        versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
        cores = f" with {r['hardware']['cores']} cores" if "cores" in r["hardware"] else ""
        lines.append(
            f"- {r['device_type'].upper()}: {r['hardware']['device']}{cores}, {versions}, commit "
            f"{r['commit'][:12]}{' with changes' if r['dirty'] else ''}, {r['measured_at'][:10]}.\n"
        )
    found = {r["extra"]["version"] for r in shown.records if "version" in r["extra"]}
    lines += [f"- DeepSpeed {version}.\n" for version in sorted(found)]
    return "".join(lines) or "Nothing has been measured yet.\n"


def _groups(rows: Sequence[Record], *keys: str) -> Iterator[dict[str, Record]]:
    """Rows by peer of each group that has the same `keys`, in the order of the rows."""
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in rows:
        key = (r["hardware"]["device"], *(r[k] for k in keys))
        groups.setdefault(key, {})[r["peer"]] = r
    yield from groups.values()


def exchange_table(shown: Shown, rows: Sequence[Record]) -> str:
    """Ours in figures, the others as ratios."""
    others = [peer.name for peer in PEERS if peer.name != OURS]
    head = ["device", "case", "pack", "dtype", "direction", "ours ms (p20 to p80)", "GB/s",
            "ceiling GB/s", "%", *others, "attention alone, ms"]  # fmt: skip
    lines = []
    for group in _groups(rows, "case", "pack", "dtype", "direction"):
        any_row = next(iter(group.values()))
        ours = group.get(OURS)
        line = [any_row["hardware"]["device"]]
        line += [any_row[key] for key in ("case", "pack", "dtype", "direction")]
        if ours is None or ours["status"] != "measured":
            line += [NOT_MEASURED if ours is None else ours["status"]] * 4
        else:
            line += [
                _time(shown, ours),
                f"{ours['extra']['bandwidth_bytes_per_s'] / 1e9:.2f}",
                f"{ours['ceiling']['value'] / 1e9:.2f}",
                f"{ours['percent_of_ceiling']:.0f}",
            ]
        for name in others:
            line.append(_ratio(shown, group.get(name)))
        alone = group.get(ALONE)
        line.append("" if alone is None else f"{alone['median_ms']:.2f}")
        lines.append(line)
    return table(head, lines)


def policy_table(shown: Shown, rows: Sequence[Record]) -> str:
    """Every policy of every arrangement."""
    head = ["device", "model, arrangement", "dtype", "policy", "ms (p20 to p80)", "ratio",
            "tokens/s", "peak MiB", "left by a forward MiB", "predicted MiB",
            "resident MiB"]  # fmt: skip
    lines = []
    for r in rows:
        line = [r["hardware"]["device"], r["case"], r["dtype"], r["peer"]]
        if r["status"] != "measured":
            lines.append([*line, r["status"], *[""] * 6])
            continue
        extra = r["extra"]
        ratio = f"{extra['ratio']:.2f}" if "ratio" in extra else ""
        line += [_time(shown, r), ratio, f"{extra['tokens_per_s']:,.0f}"]
        line += [
            f"{extra[key] / 2**20:.1f}"
            for key in (
                "peak_memory_bytes", "kept_bytes", "predicted_kept_bytes", "resident_bytes"
            )
        ]  # fmt: skip
        lines.append(line)
    return table(head, lines)


def _unmeasured(rows: Sequence[Record]) -> str:
    """Why rows have no figure, each reason once, and what else is said of rows."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for r in rows:
        if r["note"] and r["peer"] != RAW:
            cases = reasons.setdefault((r["peer"], r["status"], r["note"]), [])
            if r["case"] not in cases:
                cases.append(r["case"])
    lines = [
        f"- {peer}, {status}, for {'; '.join(cases)}: {' '.join(note.split())}\n"
        for (peer, status, note), cases in reasons.items()
    ]
    return "".join(lines)


def _time(shown: Shown, r: Record) -> str:
    return f"{r['median_ms']:.2f} ({r['p20_ms']:.2f} to {r['p80_ms']:.2f}){shown.mark(r)}"


def _ratio(shown: Shown, r: Record | None) -> str:
    if r is None:
        return ""
    if r["status"] != "measured" or "ratio" not in r["extra"]:
        return str(r["status"])
    return f"{r['extra']['ratio']:.2f}{shown.mark(r)}"
