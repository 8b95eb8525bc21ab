"""docs/performance.md and its plots, rendered from the rows in bench/results.

What bench/gpu_check noted of correctness comes first. GPU rows alone make the tables, ratios and
plots; rows of a CPU stand apart at the end. What was not measured says so, and rows whose sources
have changed since are marked.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import bandwidth_report, block, fixed_length, harness, plots, running, step, step_report
from bench.block_expected import reached
from bench.correctness_report import Checked

Record = Mapping[str, Any]

NOT_MEASURED = "not measured"
STALE = "\u2020"
OURS = {"block": tuple(name for name, kind in block.PEERS.items() if kind.backend == "triton")}
_OURS_DEFAULT = ("goku triton",)

HEAD = """\
# Performance

Rendered by `python -m bench report` from the rows in `bench/results`; `python -m bench run`
measures them. Do not edit.

How it is measured: random data, inputs rotated past twice the L2 cache, peers interleaved in one
process, medians of single calls with 20th and 80th percentile between device events. Every peer's
result, gradients included, is compared with fp64 (large packs: fp32) before it is timed. The
ceilings, a device copy (bytes read and written) and a large bf16 matrix product on random data, are
measured in the same run; % is of the ceiling that bounds the operator. Bytes are the least an
operator can move, FLOPs those of the packed segments. "Best peer" is the fastest of the others that
compute the whole operator; the ratio is its time over ours, so more than 1 means that ours is
faster. {stale} marks rows whose sources have changed since they were measured.
"""

_MODULATION = (
    "The backward of eager and of torch.compile adds every token onto its sample's row by index_add, "
    "for a clip all onto one row: a weak baseline. 'torch.compile, sample by sample' sums per sample "
    "instead, at one call a sample. Parts are rated by their own traffic."
)
NOTES = {
    step.OPERATOR: step_report.NOTE,
    "varlen_attention": (
        "FLOPs: 4 x heads x head_dim x sum(len_q x len_k) forward, twice that backward. flash-attn's "
        "tables count the backward 2.5 times: their figure for a speed is 1.25 times the one here. "
        "With deterministic=True, as Goku trains, our backward multiplies seven times for five: a peer "
        "of its own; the forward is the same. Eager keeps what its backward needs, but reads the offsets "
        "back in the forward and runs one attention a sample; torch's fused attention computes the "
        "scores again in the backward, as flash-attn, cuDNN, FlexAttention and ours do. Both "
        "models' heads are 64 wide; 14 of 128 are as wide as goku-2b's 28, and 7 are what one of two or of "
        "four ranks has of them under sequence parallelism."
    ),
    **dict.fromkeys(("adaln_modulate", "gated_residual_adaln"), _MODULATION),
    "rectified_flow_noise": (
        "The % is of the copy; Box-Muller in fp64 (43 operations a number) may bound it before."
    ),
    "block": (
        "Forward and backward of one block. % is of the matrix product's ceiling, MFU of the data "
        "sheet's peak; FLOPs from `goku/flops.py`, nothing recomputed, no gradient of the text. "
        "Expected: matrix products, attention and memory-bound operators one after the other, each "
        "at its ceiling. Ours runs deterministically, as Goku trains, but where it says that dq is added "
        "up by atomics; eager and torch.compile take torch's faster attention, whose backward is not. "
        "The fastest of ours is shown. Within our operator that attention runs "
        "its forward again in the backward; the peers with varlen_attn call "
        "torch.nn.attention.varlen in its place, which keeps what its backward needs. Peak memory is "
        "what one step allocates beside what was there before."
    ),
}


@dataclass(frozen=True)
class Shown:
    """Rows of one report."""

    records: Sequence[Record]
    stale: frozenset[int]  # ids of stale records

    @classmethod
    def of(cls, records: Iterable[Record], root: Path) -> Shown:
        """The newest rows; staleness is looked up once for each set of sources."""
        newest = harness.newest(records)
        hashes: dict[tuple[str, ...], str | None] = {}
        for record in newest:
            key = tuple(record["sources"])
            if key not in hashes:
                there = all((root / source).exists() for source in key)
                hashes[key] = harness.source_hash(key, root) if there else None
        stale = {id(r) for r in newest if hashes[tuple(r["sources"])] != r["sources_sha256"]}
        return cls(newest, frozenset(stale))

    def where(self, **wanted: object) -> list[Record]:
        """The records that have all of these values."""
        return [r for r in self.records if all(r[k] == v for k, v in wanted.items())]

    def mark(self, record: Record) -> str:
        """The dagger of a stale record."""
        return STALE if id(record) in self.stale else ""


def write(results: Path, docs: Path, root: Path = harness.ROOT) -> list[Path]:
    """Render to `docs`/performance.md and `docs`/performance/*.svg; returns the files.

    Raises:
        ValueError: a row that cannot be read.
    """
    # The parallel runtime's rows have a page of their own: bench/parallel_report.py.
    rows = [r for r in harness.read(results) if r["name"] in running.BENCHMARKS]
    shown = Shown.of(rows, root)
    folder = docs / "performance"
    folder.mkdir(parents=True, exist_ok=True)
    page, checked = docs / "performance.md", Checked.read(results, root)
    page.write_text(render(shown, checked), encoding="utf-8")
    losses = folder / "training.svg"
    losses.write_text(checked.picture(), encoding="utf-8")
    files = [page, losses]
    for name in running.BENCHMARKS:
        file = folder / f"{name}.svg"
        drawn = (
            step_report.picture(shown)
            if name == step.OPERATOR
            else plots.bars(name, plot_groups(shown, name))
        )
        file.write_text(drawn, encoding="utf-8")
        files.append(file)
    return files


def render(shown: Shown, checked: Checked | None = None) -> str:
    """The page. checked: None where nothing was."""
    parts = [HEAD.format(stale=STALE), machines(shown)]
    parts += ["## Correctness\n", (checked or Checked()).section(table)]
    parts += ["## Beside a copy\n", bandwidth(shown)]
    for name in running.BENCHMARKS:
        parts += [f"## {name}\n", NOTES.get(name, ""), f"![{name}](performance/{name}.svg)\n"]
        if name == step.OPERATOR:
            parts.append(step_report.section(shown, table))
            continue
        if name == "varlen_attention":
            parts.append(attention(shown))
        else:
            parts.append(summary(shown, name, expected_groups(name)))
        parts.append(details(shown, name))
    parts += ["## Peers that were absent\n", absent(shown)]
    parts += ["## On a CPU\n", on_cpu(shown)]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


# ---- parts of the page ----


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def devices(shown: Shown) -> list[str]:
    """GPUs with rows, in the order of their names."""
    return sorted({r["hardware"]["device"] for r in shown.where(device_type="cuda")})


def machines(shown: Shown) -> str:
    """What was measured on, and both ceilings of the newest runs there."""
    lines = []
    for device in devices(shown):
        rows = [r for r in shown.where(device_type="cuda") if r["hardware"]["device"] == device]
        last = max(rows, key=lambda r: r["measured_at"])
        ceilings = {r["ceiling"]["what"]: r for r in rows}
        best = "; ".join(
            f"{what}: {_rate(r['ceiling']['value'], r['ceiling']['unit'])}"
            for what, r in sorted(ceilings.items())
        )
        versions = ", ".join(f"{k} {v}" for k, v in last["versions"].items())
        lines.append(
            f"- {device}, {versions}, clocks (SM, memory, driver) {last['hardware']['clocks']}, "
            f"commit {last['commit'][:12]}{' with changes' if last['dirty'] else ''}, "
            f"{last['measured_at'][:10]}. Ceilings: {best}.\n"
        )
    return "".join(lines) or "No GPU has been measured yet.\n"


def expected_groups(name: str) -> list[tuple[str, str, str, str]]:
    """(case, pack, dtype, direction) of everything that `run` measures on a GPU."""
    if name == block.OPERATOR:
        return [
            (s.preset, s.pack.name, s.dtype, "forward+backward") for s in block.settings("cuda")
        ]
    module = importlib.import_module(f"bench.{name}")
    return [
        (p.case, p.pack.name, str(p.dtype).removeprefix("torch."), direction)
        for p in module.problems("cuda")
        for direction in p.directions
    ]


def _group(shown: Shown, name: str, device: str, group: Sequence[str]) -> list[Record]:
    case, pack, dtype, direction = group
    found = shown.where(
        name=name, case=case, pack=pack, dtype=dtype, direction=direction, device_type="cuda"
    )
    return [r for r in found if r["hardware"]["device"] == device]


def best_of_ours(name: str, rows: Sequence[Record]) -> Record | None:
    """Our fastest measured row."""
    names = OURS.get(name, _OURS_DEFAULT)
    mine = [r for r in rows if r["peer"] in names and r["status"] == "measured"]
    return min(mine, key=lambda r: r["median_ms"], default=None)


def best_peer(name: str, rows: Sequence[Record]) -> Record | None:
    """The fastest measured row that is not ours and computes the whole operator."""
    ours = (*OURS.get(name, _OURS_DEFAULT), "goku triton, deterministic")
    others = [
        r for r in rows if r["peer"] not in ours and r["status"] == "measured" and not r["part"]
    ]
    return min(others, key=lambda r: r["median_ms"], default=None)


def bandwidth(shown: Shown) -> str:
    """Whether the operators bound by memory are as near to a copy as they are to be."""

    def ours(name: str, device: str, group: Sequence[str]) -> Record | None:
        return best_of_ours(name, _group(shown, name, device, group))

    return bandwidth_report.section(shown, devices(shown), expected_groups, ours, table)


def attention(shown: Shown) -> str:
    """Attention's tables: packs of images, which no attention is fast on, stand apart."""
    name = "varlen_attention"
    groups = expected_groups(name)
    images = [group for group in groups if "many images" in group[1]]
    lines = fixed_length.lines(shown.where(name=name, device_type="cuda"), shown.mark)
    fixed = table(fixed_length.HEAD, lines) if lines else f"{NOT_MEASURED.capitalize()}.\n"
    return "\n".join([
        "### Clips\n", summary(shown, name, [g for g in groups if g not in images]),
        "### Packs beside fixed-length batches\n", fixed_length.WORDS, fixed,
        "### Short images\n", summary(shown, name, images),
    ])  # fmt: skip


def summary(shown: Shown, name: str, groups: Sequence[tuple[str, str, str, str]]) -> str:
    """Ours beside the best peer, one line for every case of `groups`."""
    unit = "bytes" if name not in ("varlen_attention", "block") else "FLOPs"
    head = ["GPU", "case", "pack", "dtype", "direction", "ours ms", f"{unit}/s", "% of ceiling",
            "best peer", "its ms", "ratio"]  # fmt: skip
    if name == "block":
        head += ["of ours", "expected ms", "expected / ours", "tokens/s", "MFU", "peak memory"]
    lines = []
    for device in devices(shown) or ["-"]:
        for group in groups:
            case, pack, dtype, direction = group
            rows = _group(shown, name, device, group)
            ours, peer = best_of_ours(name, rows), best_peer(name, rows)
            line = [device, case, pack, dtype, direction]
            line += [NOT_MEASURED] * 3 if ours is None else [
                _ms(ours) + shown.mark(ours), _achieved(ours), f"{ours['percent_of_ceiling']:.1f}"
            ]  # fmt: skip
            line += [NOT_MEASURED] * 2 if peer is None else [
                peer["peer"], _ms(peer) + shown.mark(peer)
            ]  # fmt: skip
            if ours is None or peer is None:
                line.append(NOT_MEASURED)
            else:
                line.append(f"{peer['median_ms'] / ours['median_ms']:.2f}")
            if name == "block":
                line += _block_cells(ours)
            lines.append(line)
    body = table(head, lines)
    if shown.where(name=name, device_type="cuda"):
        return body
    # Nothing but empty cells: one line says it, the list of what is to come lies folded.
    return (
        f"{NOT_MEASURED.capitalize()} on any GPU.\n\n"
        f"<details><summary>What will be: {len(lines)} problems</summary>\n\n{body}\n</details>\n"
    )


def _block_cells(ours: Record | None) -> list[str]:
    if ours is None:
        return [NOT_MEASURED] * 6
    extra = ours["extra"]
    mfu, peak, share = extra.get("mfu"), extra.get("peak_memory_bytes"), reached(ours)
    return [
        ours["peer"].removeprefix("goku fused").removeprefix(", ") or "eager",
        f"{extra['expected_ms']:.2f} ({extra['attention_rate']})",
        NOT_MEASURED if share is None else f"{share:.2f}",
        f"{extra['tokens_per_s']:,.0f}",
        "unknown peak" if mfu is None else f"{100 * mfu:.1f}%",
        NOT_MEASURED if peak is None else f"{peak / 2**30:.2f} GiB",
    ]


def details(shown: Shown, name: str) -> str:
    """Every peer's row, folded away; nothing where nothing was measured on a GPU."""
    rows = [r for r in shown.where(name=name, device_type="cuda") if r["status"] != "absent"]
    if not rows:
        return ""
    body = _rows_table(shown, rows)
    return f"<details><summary>All peers</summary>\n\n{body}\n</details>\n"


def _rows_table(shown: Shown, rows: Iterable[Record]) -> str:
    head = ["device", "case", "pack", "dtype", "direction", "peer", "median ms (p20 to p80)",
            "rate", "% of ceiling"]  # fmt: skip
    lines = []
    for r in rows:
        line = [
            r["hardware"]["device"],
            r["case"],
            r["pack"],
            r["dtype"],
            r["direction"],
            r["peer"],
        ]
        if r["status"] == "measured":
            spread = f"{_ms(r)} ({r['p20_ms']:.3f} to {r['p80_ms']:.3f}){shown.mark(r)}"
            line += [spread, _achieved(r), f"{r['percent_of_ceiling']:.1f}"]
        else:
            line += [f"{r['status']}: {_cell(r['note'])}", "", ""]
        lines.append(line)
    return table(head, lines)


def absent(shown: Shown) -> str:
    """Peers that no row of a device has measured, and why."""
    reasons: dict[tuple[str, str, str], str] = {}
    keys = [(r["hardware"]["device"], r["name"], r["peer"]) for r in shown.records]
    there = {k for k, r in zip(keys, shown.records, strict=True) if r["status"] == "measured"}
    for key, r in zip(keys, shown.records, strict=True):
        if r["status"] == "absent" and key not in there:  # which is left out of some problems
            reasons[key] = _cell(r["note"])
    lines = [[*key, reason] for key, reason in sorted(reasons.items())]
    return table(["device", "operator", "peer", "why"], lines) if lines else "No rows say so yet.\n"


def on_cpu(shown: Shown) -> str:
    """Rows of a CPU: small shapes that say nothing of a GPU."""
    rows = [r for r in shown.where(device_type="cpu") if r["status"] != "absent"]
    if not rows:
        return f"{NOT_MEASURED.capitalize()}.\n"
    words = "Small shapes on a CPU: they show that the benchmark runs and say nothing of a GPU.\n\n"
    return words + _rows_table(shown, rows)


def plot_groups(shown: Shown, name: str) -> list[plots.Group]:
    """Bars of the plot: % of the ceiling of every whole peer, per GPU, case, pack and direction."""
    groups = []
    for device in devices(shown):
        for case, pack, dtype, direction in expected_groups(name):
            rows = _group(shown, name, device, (case, pack, dtype, direction))
            bars = [
                plots.Bar(r["peer"], r["percent_of_ceiling"], id(r) in shown.stale)
                for r in rows
                if r["status"] == "measured" and not r["part"]
            ]
            if bars:
                title = f"{device}: {case}, {pack}, {dtype}, {direction}"
                groups.append(plots.Group(title, tuple(bars)))
    return groups


# ---- cells ----


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _ms(record: Record) -> str:
    return f"{record['median_ms']:.3f}"


def _achieved(record: Record) -> str:
    return _rate(record["work"] / (1e-3 * record["median_ms"]), record["ceiling"]["unit"])


def _rate(value: float, unit: str) -> str:
    small, letter = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / small:.3g} {letter}{unit}"
