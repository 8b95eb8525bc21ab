"""docs/checkpoint_performance.md, rendered from the rows of `bench.checkpoint`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import checkpoint, harness
from bench import checkpoint_peers as peers
from bench.checkpoint_planning import MESHES
from bench.checkpoint_runs import EMPTY, RAW, WORK
from bench.report import NOT_MEASURED, STALE, Shown, table

Record = Mapping[str, Any]

HEAD = """\
# Performance of checkpoints

Rendered by `python -m bench report` from `checkpoint.jsonl` of `bench/results`. Do not edit. Measured by

    python -m bench.checkpoint --large    (20 minutes here, 16 without the 8 GiB; --disk FOLDER for another disk)

All peers take turns in one process (or in the P processes of a case, joined by gloo), each with the
same random bytes and a fresh directory; the time is that of the slowest rank. What a peer saved is put
out of the page cache (fsync, then posix_fadvise DONTNEED, for all alike) before it is loaded, and
compared with what was saved; it is removed, and the file system has taken note, before the next one's
turn. Peers that leave fsync out get one from the benchmark, within their time, unless their name says
otherwise. Medians of a few calls (one, where it took more than 5 s), with the 20th and 80th percentile.
Before the first case most of the free memory is touched once: a virtual machine has its pages from its
host at the first touch, and files in memory are written at a third of their speed until then. A host
that takes freed memory back meanwhile (free page reporting, as here) makes such writes scatter up to
fourfold all the same: a case of tmpfs wants more rounds (here --rounds 11 with one process, 8 with
four; docs/log.md of 2026-11-22).
{stale} marks rows whose sources have changed since.

The limit is a raw loop in the same rounds: pwrite (pread) of aligned blocks that lie ready in memory,
one file a process, in the threads and block size, with or without O_DIRECT, that were fastest in a
trial on that medium; preallocated and with fsync on the disk. The same loop "with copy and CRC-32C"
copies each block from and to other memory and sums it: what remains of the limit for whoever keeps
checksums. What a call takes beside the data (exchanges between the ranks, Python's microseconds for
each tensor, directories and small files) is that of a state with as many tensors of 8 bytes a rank.
"GiB/s" is the state's bytes over the time; "ours" is the peer's time over ours.
"""

_PAGES = (
    ("save", "Save", "From the call until the checkpoint is durable. The async ones: the stall and "
     "the wait for the end, with nothing to compute meanwhile."),
    ("load", "Load", "Into tensors that are there, of the ranks and parts that saved (torch.save: new "
     "ones). DCP's reader has nothing to tune."),
    ("empty save", "Save without the data", "As many tensors of 8 bytes a rank, saved by a Checkpointer that "
     "has saved them before, and loaded."),
    ("empty load", "Load without the data", "What the above saved."),
    ("verify", "Verify", "Reads everything and compares the checksums of files and chunks."),
)  # fmt: skip


def write(results: Path, docs: Path, root: Path = harness.ROOT) -> list[Path]:
    """Render to `docs`/checkpoint_performance.md; returns the file.

    Raises:
        ValueError: a row that cannot be read.
    """
    records = [r for r in harness.read(results) if r["name"] == checkpoint.NAME]
    docs.mkdir(parents=True, exist_ok=True)
    page = docs / "checkpoint_performance.md"
    page.write_text(render(Shown.of(records, root)), encoding="utf-8")
    return [page]


def render(shown: Shown) -> str:
    """The page."""
    parts = [HEAD.format(stale=STALE), _machines(shown)]
    for machine in _names(shown) or [""]:
        rows = Rows(shown, [r for r in shown.records if r["hardware"]["device"] == machine])
        if machine and len(_names(shown)) > 1:
            parts.append(f"# On {machine}\n")
        parts += ["## Targets\n", targets(rows)]
        for direction, title, words in _PAGES:
            parts += [f"## {title}\n", f"{words}\n", rate_table(rows, direction)]
        parts += ["## Stall\n", _STALL, stall_table(rows)]
        parts += ["## Memory\n", _MEMORY, memory_table(rows)]
        parts += ["## Planning\n", _PLANNING, planning_table(rows)]
        parts += ["## One eighth\n", _PARTIAL, partial_table(rows)]
        parts.append(_reasons(rows))
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


_STALL = """\
How long `async_save` keeps its caller, by a Checkpointer that has saved before ("first": that has not,
so that its memory is touched for the first time and the plan is made), beside one `copy_` of as many
bytes, in one piece, between buffers that have been used before. "background" (stage="background"):
the call and the wait after a step of a second of short tensor operations on one core, called from
Python; what the step takes alone and beside the staging stands behind it.
"""
_MEMORY = """\
The peak of resident memory over what the process held before, in a process of its own for each line.
"""
_PLANNING = """\
A state of 8B with Adam's moments (1,500 DTensors) on a fake process group: all that a rank does
before it copies, without the network's part. "Files of rank 0": index.json and DCP's .metadata, made
once for a layout, by the saving thread while training goes on.
"""
_PARTIAL = """\
A checkpoint of one process, 1/8 of each tensor wanted: matrices of 4096 x 4096 by rows and by columns,
cubes of 256 halved on every axis. Chunks of 64 KiB are read whole, since they are verified.
"""


@dataclass(frozen=True)
class Rows:
    """The rows of one machine."""

    shown: Shown
    records: Sequence[Record]

    def one(self, case: str, medium: str, direction: str, peer: str) -> Record | None:
        """A measured row, or None."""
        wanted = (case, medium, direction, peer)
        for r in self.records:
            if (r["case"], r["pack"], r["direction"], r["peer"]) == wanted:
                return r if r["status"] == "measured" else None
        return None

    def cases(self, direction: str) -> list[tuple[str, str]]:
        """(case, medium) of the rows of a direction."""
        return list(
            dict.fromkeys(
                (r["case"], r["pack"]) for r in self.records if r["direction"] == direction
            )
        )

    def of(self, direction: str) -> list[Record]:
        return [r for r in self.records if r["direction"] == direction]


# ---- targets ----


def targets(rows: Rows) -> str:
    """What was to be reached, and whether it was."""
    head = ["target", "case", "measured", "met", "what bounds it"]
    lines = [
        [name, case, measured, "yes" if met else "**no**", "" if met else bound]
        for name, case, measured, met, bound in (
            *_rate_targets(rows), *_stall_targets(rows), *_other_targets(rows)
        )
    ]  # fmt: skip
    return table(head, lines) if lines else f"{NOT_MEASURED.capitalize()}.\n"


_UNDER = "the call takes the state apart tensor by tensor; the copy shares the cores with the step"

Target = tuple[str, str, str, bool, str]


def _rate_targets(rows: Rows) -> Iterator[Target]:
    for direction in ("save", "load"):
        for case, medium in rows.cases(direction):
            ours = rows.one(case, medium, direction, peers.OURS)
            if ours is None:
                continue
            label, bound = f"{case}, {medium}", _bound(rows, case, medium, direction, ours)
            share = ours["percent_of_ceiling"]
            yield f"{direction} >= 90% of raw", label, f"{share:.1f}%", share >= 90, bound
            default = rows.one(case, medium, direction, peers.DCP)
            if default is not None:
                ratio, most = _faster(rows, case, medium, direction, default, ours, bound)
                yield f"{direction} >= 3 x DCP", label, f"{ratio:.2f}", ratio >= 3, most
            tuned = [
                r for name in (peers.DCP_THREADS, peers.DCP_TUNED)
                if (r := rows.one(case, medium, direction, name)) is not None
            ]  # fmt: skip
            if tuned:
                best = min(tuned, key=lambda r: r["median_ms"])
                ratio, most = _faster(rows, case, medium, direction, best, ours, bound)
                name = f"{direction} >= 1.5 x the best tuned DCP with fsync"
                yield name, label, f"{ratio:.2f}", ratio >= 1.5, most
            quick = rows.one(case, medium, direction, peers.DCP_NO_FSYNC)
            mine = rows.one(case, medium, direction, peers.OURS_NO_FSYNC)
            if quick is not None and mine is not None:
                bound = _bound(rows, case, medium, direction, mine)
                ratio, most = _faster(rows, case, medium, direction, quick, mine, bound)
                name = f"{direction} >= 1.5 x tuned DCP, both without fsync"
                yield name, label, f"{ratio:.2f}", ratio >= 1.5, most


def _faster(
    rows: Rows, case: str, medium: str, direction: str, peer: Record, ours: Record, bound: str
) -> tuple[float, str]:
    """How many times as fast as the peer ours is, and what bounds it: how many times as fast the loops are, too."""
    loops = [
        f"{name} {peer['median_ms'] / loop['median_ms']:.2f}"
        for name in (RAW, WORK)
        if (loop := rows.one(case, medium, direction, name)) is not None
    ]
    words = "; ".join(
        [bound] * bool(bound) + [f"beside this peer: {', '.join(loops)}"] * bool(loops)
    )
    return peer["median_ms"] / ours["median_ms"], words


def _bound(rows: Rows, case: str, medium: str, direction: str, ours: Record) -> str:
    """What no one with checksums can be faster than, and where ours stands to it.

    Explained is what remains of ours without the call's own part, if it is as fast as that loop, but for 5%, or
    if its 20th percentile is below the loop's 80th: more than that this run cannot tell apart.
    """
    work = rows.one(case, medium, direction, WORK)
    if work is None:
        return ""
    loop, rate = work["percent_of_ceiling"], ours["percent_of_ceiling"]
    told = (
        f"the loop that copies and sums every byte too reaches {loop:.0f}% of raw, ours {rate:.0f}%"
    )
    empty = rows.one(case, medium, f"empty {direction}", EMPTY)
    bare = 0.0 if empty is None else empty["median_ms"]
    if rate < 0.95 * loop and bare:
        part = f"{bare:.0f}" if bare < ours["median_ms"] else "all"
        told += (
            f"; {part} of its {ours['median_ms']:.0f} ms go to the call itself (as many tensors of 8 "
            f"bytes: {bare:.0f} ms)"
        )
    if 0.95 * (ours["median_ms"] - bare) <= work["median_ms"]:
        return told
    told += (
        f"; 20th to 80th percentile: the loop {work['p20_ms']:.0f} to {work['p80_ms']:.0f} ms, ours "
        f"{ours['p20_ms']:.0f} to {ours['p80_ms']:.0f}"
    )
    scattered = ours["p20_ms"] - bare <= work["p80_ms"]
    return f"within this run's scatter: {told}" if scattered else f"not explained: {told}"


def _stall_targets(rows: Rows) -> Iterator[Target]:
    for case, medium in rows.cases("stall and copy"):
        copying = rows.one(case, medium, "stall and copy", "one copy")
        ours = rows.one(case, medium, "stall and copy", peers.OURS)
        under = rows.one(case, medium, "stall and copy", f"{peers.OURS}, background")
        if copying is not None and ours is not None:
            ratio = ours["median_ms"] / copying["median_ms"]
            bound = f"{ours['median_ms'] - copying['median_ms']:.0f} ms more than the copy"
            empty = rows.one(case, medium, "stall and copy", EMPTY)
            if empty is not None:
                bound += (
                    f"; the call itself takes {empty['median_ms']:.1f} (as many tensors of 8 bytes)"
                )
            yield "stall <= 1.1 x one copy", case, f"{ratio:.2f}", ratio <= 1.1, bound
        if under is not None:
            took = under["median_ms"]
            yield "stall under a step <= 50 ms", case, f"{took:.1f} ms", took <= 50, _UNDER


def _other_targets(rows: Rows) -> Iterator[Target]:
    for r in rows.records:
        kind, _, what = r["direction"].partition(", ")
        if r["status"] != "measured" or not r["peer"].startswith(peers.OURS):
            continue
        extra, took = r["extra"], 1e-3 * r["median_ms"]
        if kind == "planning" and not r["peer"].endswith("of rank 0"):
            limit = extra["limit_seconds"]
            which = r["peer"].rpartition(", ")[2]
            name, short = f"{which} plan <= {limit:g} s", f"{took:.3g} s"
            bound = "taking the state apart" if which == "cached" else "laying out all ranks' parts"
            yield name, what, short, took <= limit, f"{bound}, tensor by tensor"
        elif kind == "memory":
            over = extra["peak_memory_bytes"] - extra["staged_bytes"]
            words = f"{over / 2**20:+.0f} MiB"
            met = over <= 256 << 20
            yield "peak memory <= staged + 256 MiB", f"{r['peer']}: {what}", words, met, ""
        elif kind == "partial":
            ratio = extra["bytes_read"] / extra["bytes_needed"]
            if what == "rows":
                yield "1/8 by rows <= 1.05 x", r["case"], f"{ratio:.3f}", ratio <= 1.05, ""


# ---- tables ----


def rate_table(rows: Rows, direction: str) -> str:
    """Every peer of every case."""
    head = ["case", "medium", "peer", "ms (p20 to p80)", "GiB/s", "% of raw", "ours", "stall ms",
            "fsync", "checksums"]  # fmt: skip
    lines = []
    for r in rows.of(direction):
        line = [r["case"], r["pack"], r["peer"]]
        if r["status"] != "measured":
            lines.append([*line, r["status"], *[""] * 6])
            continue
        ours = rows.one(r["case"], r["pack"], direction, peers.OURS)
        stall = rows.one(r["case"], r["pack"], "stall", r["peer"])
        known = r["extra"]
        rates = ["", ""] if r["peer"] == EMPTY else [
            f"{r['work'] / 2**30 / (1e-3 * r['median_ms']):.2f}", f"{r['percent_of_ceiling']:.0f}",
        ]  # fmt: skip
        lines.append([
            *line, _time(rows.shown, r), *rates,
            "" if ours is None else f"{r['median_ms'] / ours['median_ms']:.2f}",
            "" if stall is None else f"{stall['median_ms']:.0f}",
            _yes(known.get("fsync")), _yes(known.get("summed")),
        ])  # fmt: skip
    if not lines:
        return f"{NOT_MEASURED.capitalize()}.\n"
    settings = {
        (r["case"], r["pack"]): r["extra"]["setting"] for r in rows.of(direction)
        if r["peer"] == RAW and "setting" in r["extra"]
    }  # fmt: skip
    said = "; ".join(f"{case}, {medium}: {how}" for (case, medium), how in settings.items())
    return table(head, lines) + (f"\nThe loop's settings: {said}.\n" if said else "")


def stall_table(rows: Rows) -> str:
    head = [
        "case",
        "who",
        "ms (p20 to p80)",
        "over one copy",
        "the step alone, s",
        "while staging, s",
    ]
    lines = []
    for r in rows.of("stall and copy"):
        if r["status"] != "measured":
            lines.append([r["case"], r["peer"], r["status"], "", "", ""])
            continue
        copying = rows.one(r["case"], r["pack"], r["direction"], "one copy")
        ratio = "" if copying is None else f"{r['median_ms'] / copying['median_ms']:.2f}"
        alone, under = (
            f"{r['extra'][key]:.2f}" if key in r["extra"] else ""
            for key in ("step_seconds", "step_seconds_while_staging")
        )
        lines.append([r["case"], r["peer"], _time(rows.shown, r), ratio, alone, under])
    return table(head, lines) if lines else f"{NOT_MEASURED.capitalize()}.\n"


def memory_table(rows: Rows) -> str:
    lines = [
        [
            r["case"], r["peer"], r["direction"].partition(", ")[2],
            f"{r['extra']['peak_memory_bytes'] / 2**20:.0f}{rows.shown.mark(r)}",
            f"{r['extra']['staged_bytes'] / 2**20:.0f}",
        ]
        for r in rows.records
        if r["direction"].startswith("memory") and r["status"] == "measured"
    ]  # fmt: skip
    head = ["case", "peer", "doing", "peak MiB", "staged MiB"]
    return table(head, lines) if lines else f"{NOT_MEASURED.capitalize()}.\n"


def planning_table(rows: Rows) -> str:
    lines = []
    for mesh in MESHES:
        for r in rows.of(f"planning, {mesh}"):
            if r["status"] == "measured":
                what = r["peer"].partition(", ")[2]
                lines.append([mesh, what, _time(rows.shown, r)])
    head = ["ranks", "what", "ms (p20 to p80)"]
    return table(head, lines) if lines else f"{NOT_MEASURED.capitalize()}.\n"


def partial_table(rows: Rows) -> str:
    lines = []
    for r in rows.records:
        if r["direction"].startswith("partial") and r["status"] == "measured":
            extra = r["extra"]
            ratio = extra["bytes_read"] / extra["bytes_needed"]
            lines.append([
                r["direction"].partition(", ")[2], f"{extra['bytes_needed'] / 2**20:.1f}",
                f"{extra['bytes_read'] / 2**20:.1f}", f"{ratio:.3f}", _time(rows.shown, r),
            ])  # fmt: skip
    head = ["1/8 by", "MiB needed", "MiB read", "read over needed", "ms (p20 to p80)"]
    return table(head, lines) if lines else f"{NOT_MEASURED.capitalize()}.\n"


def _reasons(rows: Rows) -> str:
    """Why rows have no figure, each reason once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for r in rows.records:
        if r["status"] != "measured":
            place = f"{r['case']}, {r['pack']}"
            found.setdefault((r["peer"], r["status"], r["note"]), []).append(place)
    return "".join(
        f"- {peer}, {status}, for {'; '.join(dict.fromkeys(places))}: {note}\n"
        for (peer, status, note), places in found.items()
    )


def _names(shown: Shown) -> list[str]:
    return sorted({r["hardware"]["device"] for r in shown.records})


def _machines(shown: Shown) -> str:
    lines = []
    for name in _names(shown):
        rows = [r for r in shown.records if r["hardware"]["device"] == name]
        last = max(rows, key=lambda r: r["measured_at"])
        systems = {
            r["pack"]: r["shape"]["file_system"] for r in rows if "file_system" in r["shape"]
        }
        media = ", ".join(f"{medium} {kind}" for medium, kind in sorted(systems.items()))
        versions = ", ".join(f"{k} {v}" for k, v in last["versions"].items())
        lines.append(
            f"- {name} with {last['hardware'].get('cores', '?')} cores, {versions}; file systems: "
            f"{media or 'unknown'}; commit {last['commit'][:12]}"
            f"{' with changes' if last['dirty'] else ''}, {last['measured_at'][:10]}.\n"
        )
    return "".join(lines) or f"{NOT_MEASURED.capitalize()}.\n"


def _yes(value: Any) -> str:
    return "" if value is None else "yes" if value else "no"


def _time(shown: Shown, r: Record) -> str:
    return f"{r['median_ms']:.1f} ({r['p20_ms']:.1f} to {r['p80_ms']:.1f}){shown.mark(r)}"
