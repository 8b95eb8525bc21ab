"""The doctor's findings as one HTML page: no scripts, nothing from elsewhere, for light and dark: `write_html`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from goku.data.layout import PackingReport
from goku.data.record import counted
from goku.data.report import (
    DoctorReport,
    as_trained,
    durations,
    fewer,
    in_bytes,
    octaves,
    spread,
    three,
)
from goku.data.stage_report import (
    STAGE_HEAD,
    NamedReport,
    RecipeReport,
    SourceReport,
    StageReport,
    dropped_words,
    group_words,
    stage_row,
    steps_words,
)
from goku.page_style import STYLE
from goku.whole_file import write_whole

__all__ = ["page", "write_html"]

# Rows of a histogram, and remarks, beyond which the page would be no help; the JSON has all.
_ROWS = 12
_REMARKS = 2000
_STYLE = """
.stack {
  display: flex; height: 16px; border-radius: 5px; overflow: hidden; background: var(--rule);
  margin: 0 0 16px;
}
p.what { margin: 0 0 4px; max-width: none; overflow-wrap: anywhere; }
.stack span { display: block; min-width: 1px; }
.images { background: var(--c0); }
.videos { background: var(--c2); }
.dropped { background: var(--c1); }
.quarantined { background: var(--bad); }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin: 0 5px 0 0; }
.key-word { margin-right: 14px; }
.facts th.n { text-align: right; }
.facts td.name { overflow-wrap: anywhere; min-width: 9em; }
.facts td.bars { width: 40%; min-width: 80px; vertical-align: middle; }
td.no { color: var(--bad); font-weight: 700; }
td.yes { color: var(--good); }
ul.reasons { margin: 8px 0; padding-left: 1.2em; color: var(--bad); overflow-wrap: anywhere; }
"""
_KINDS = ("images", "videos", "dropped", "quarantined")


def write_html(report: RecipeReport | DoctorReport, path: str | os.PathLike[str]) -> None:
    """Write the page, beside its place first and then renamed. OSError where it cannot be written."""
    # A name that is no Unicode (a lone surrogate) has no bytes in UTF-8.
    write_whole(Path(path), page(report).encode("utf-8", "backslashreplace"))


def page(report: RecipeReport | DoctorReport) -> str:
    """The whole page as text."""
    body = _recipe(report) if isinstance(report, RecipeReport) else _dataset(report)
    how = "headers only" if report.quick else "everything decoded"
    head = f"<h1>goku doctor</h1><p class='lead'><code>{escape(report.path)}</code>, {how}</p>"
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>goku doctor: {escape(report.path)}</title><style>{STYLE}{_STYLE}</style></head>"
        f"<body><main>{head}{body}<footer>Written by <code>goku doctor</code>; "
        "<code>--json</code> gives the same as data.</footer></main></body></html>\n"
    )


def _recipe(report: RecipeReport) -> str:
    reasons = [f"{s.name}: {reason}" for s in report.stages for reason in s.reasons]
    links = "".join(
        f"<a href='#stage-{escape(s.name)}'>{escape(s.name)}</a>" for s in report.stages
    )
    cache = report.cache
    parts = [
        _verdict(report.ok, report.verdict, reasons),
        f"<nav>{links}<a href='#quarantined'>quarantined</a><a href='#remarks'>remarks</a></nav>",
        "<h2>Stages</h2>",
        _stage_table(report.stages),
        f"<p>Caches of all stages, each file counted once: {escape(cache.words())}.</p>",
        _notes(report.notes),
        *(_stage(stage) for stage in report.stages),
        _named(report.quarantined, report.remarks),
    ]
    return "".join(parts)


def _dataset(report: DoctorReport) -> str:
    items = report.items
    counts = report.counts()
    source = SourceReport(
        name="",
        path=report.path,
        listed=report.listed,
        images=counts["image"],
        videos=counts["video"],
        dropped=len(report.dropped),
        quarantined=len(report.unusable),
    )
    verdict = "Ready for training." if report.ok else "Not ready for training."
    clips = [item for item in items if item.modality == "video"]
    rows: list[tuple[str, str]] = []
    if clips:
        rows += [
            ("clip seconds in the files", three(spread([c.source_seconds for c in clips]), ".2f")),
            ("clip seconds used", three(spread([c.seconds for c in clips]), ".2f")),
        ]
    if items:
        tokens = [item.tokens for item in items]
        rows.append(("tokens a sample", f"{three(spread(tokens), ',.0f')}; {sum(tokens):,} in all"))
    rows += _packing_rows(report.packing)
    rows.append(("latent cache", f"{in_bytes(report.cache_bytes)} predicted"))
    limits = Counter(dropped.reason.rpartition(", ")[2] for dropped in report.dropped)
    rows += [("dropped", f"{count:,}  {limit}") for limit, count in limits.most_common()]
    sizes = Counter(f"{item.source[1]} x {item.source[2]}" for item in items)
    charts = _charts(
        [
            ("As trained (frames x height x width)", as_trained(items)),
            ("In the files (height x width)", sizes.most_common()),
            ("Seconds of clips, as trained", durations([c.seconds for c in clips])),
            ("Tokens of a sample", octaves([item.tokens for item in items])),
        ]
    )
    bad = [NamedReport(p.source, p.name, p.reason, (), p.kind) for p in report.unusable]
    remarks = [NamedReport("", remark.name, remark.text, ()) for remark in report.remarks]
    return "".join(
        [
            _verdict(report.ok, verdict, report.reasons),
            _sources([source]),
            _facts(rows),
            charts,
            _notes(report.all_notes()),
            _named(bad, remarks),
        ]
    )


def _stage(stage: StageReport) -> str:
    name = escape(stage.name)
    start = f", from {escape(stage.start)}" if stage.start else ""
    rows = [("dropped", dropped_words(left)) for left in stage.dropped]
    if stage.quarantined:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in stage.quarantined.items())
        rows.append(("quarantined", kinds))
    rows += [("mix", group_words(group)) for group in stage.groups]
    if stage.seconds:
        rows.append(("clip seconds", f"{three(stage.seconds, '.2f')} (min / median / max)"))
    if stage.tokens_per_sample:
        tokens = three(stage.tokens_per_sample, ",.0f")
        rows.append(("tokens a sample", f"{tokens}; {stage.tokens_in_all:,} in all"))
    rows += _packing_rows(stage.packing)
    if stage.packing is not None:
        rows.append(("steps", steps_words(stage)))
    rows.append(("cache", stage.cache.words()))
    sources = [*stage.sources, *([stage.unseen] if stage.unseen else [])]
    return "".join(
        [
            f"<section><h2 id='stage-{name}'>{name}<small>{start}</small></h2>",
            _reasons(stage.reasons),
            _sources(sources),
            _facts(rows),
            _charts(
                [
                    ("As trained (frames x height x width)", stage.sizes),
                    ("Seconds of clips, as trained", stage.durations),
                    ("Tokens of a sample", stage.tokens),
                ]
            ),
            _notes(stage.notes),
            "</section>",
        ]
    )


def _verdict(ok: bool, words: str, reasons: Sequence[str]) -> str:
    failed = "" if ok else " failed"
    lines = "".join(f"<p>{escape(reason)}</p>" for reason in reasons)
    return f"<div class='verdict{failed}'><strong>{escape(words)}</strong>{lines}</div>"


def _reasons(reasons: Sequence[str]) -> str:
    if not reasons:
        return ""
    lines = "".join(f"<li>{escape(reason)}</li>" for reason in reasons)
    return f"<p><b>Cannot train:</b></p><ul class='reasons'>{lines}</ul>"


def _stage_table(stages: Sequence[StageReport]) -> str:
    # Of the columns between the two first and the last all are numbers.
    numbers = STAGE_HEAD[2:-1]
    head = "".join(
        f"<th scope='col' class='{'n' if cell in numbers else ''}'>{escape(cell)}</th>"
        for cell in STAGE_HEAD
    )
    rows = []
    for stage in stages:
        *cells, verdict = stage_row(stage)
        first = f"<td><a href='#stage-{escape(stage.name)}'>{escape(cells[0])}</a></td>"
        rest = f"<td>{escape(cells[1])}</td>" + "".join(
            f"<td class='n'>{escape(cell)}</td>" for cell in cells[2:]
        )
        kind = "yes" if stage.ok else "no"
        rows.append(f"<tr>{first}{rest}<td class='{kind}'>{verdict}</td></tr>")
    return (
        f"<div class='scroll'><table class='facts'><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _sources(sources: Sequence[SourceReport]) -> str:
    """Of each dataset a bar of what is used, dropped and quarantined."""
    key = "".join(
        f"<span class='key-word'><span class='swatch {kind}'></span>{kind}</span>"
        for kind in _KINDS
    )
    parts = [f"<p class='note'>{key}</p>"]
    for source in sources:
        numbers = [(kind, getattr(source, kind)) for kind in _KINDS]
        bar = "".join(
            f"<span class='{kind}' style='width:{100 * number / source.listed:.3f}%'></span>"
            for kind, number in numbers
            if number
        )
        told = ", ".join(f"{number:,} {kind}" for kind, number in numbers if number)
        label = escape(f"{source.name}: " if source.name else "")
        words = f"{label}{source.listed:,} listed: {told or 'nothing'}"
        parts.append(
            f"<p class='note what'>{words} <code>{escape(source.path)}</code></p>"
            f"<div class='stack' role='img' aria-label='{words}'>{bar}</div>"
        )
    return "".join(parts)


def _packing_rows(packing: PackingReport | None) -> list[tuple[str, str]]:
    if packing is None:
        return []
    return [
        (
            "one step",
            f"{packing.tokens_in_step:,.0f} tokens of at most {packing.tokens_per_step:,}, "
            f"{packing.samples_per_step:,.1f} samples",
        ),
        (
            "packs",
            f"{packing.packs_per_step:,.1f} a step of at most {packing.tokens_per_pack:,} tokens on "
            f"{counted(packing.ranks, 'rank')}, {packing.efficiency:.1%} full",
        ),
        ("one epoch", counted(packing.steps_per_epoch, "step")),
    ]


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td class='name'>{escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table class='facts'><tbody>{lines}</tbody></table>" if lines else ""


def _charts(charts: Iterable[tuple[str, Sequence[tuple[str, int]]]]) -> str:
    parts = []
    for title, rows in charts:
        if not rows:
            continue
        shown = fewer(rows, _ROWS)
        most = max(count for _, count in shown)
        lines = "".join(
            f"<tr><td>{escape(label)}</td><td class='n'>{count:,}</td><td class='bars'>"
            f"{_bar(count, most)}</td></tr>"
            for label, count in shown
        )
        parts.append(
            f"<div><h3>{escape(title)}</h3><table class='facts'><tbody>{lines}</tbody></table></div>"
        )
    return f"<div class='two'>{''.join(parts)}</div>"


def _bar(count: int, most: int) -> str:
    if count == 0:
        return ""
    return f"<span class='bar' style='width:{100 * count / most:.2f}%'></span>"


def _notes(notes: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<h3>Notes</h3><ul class='note'>{lines}</ul>" if lines else ""


def _named(bad: Sequence[NamedReport], remarks: Sequence[NamedReport]) -> str:
    """Every quarantined item with its reason, and what is said of used ones."""
    parts = [f"<h2 id='quarantined'>Quarantined ({len(bad):,})</h2>"]
    parts.append(_named_table(bad) if bad else "<p class='none'>No item.</p>")
    parts.append(f"<h2 id='remarks'>Remarks on used items ({len(remarks):,})</h2>")
    parts.append(_named_table(remarks[:_REMARKS]) if remarks else "<p class='none'>None.</p>")
    if len(remarks) > _REMARKS:
        parts.append(f"<p class='none'>{len(remarks) - _REMARKS:,} more: see --json.</p>")
    return "".join(parts)


def _named_table(rows: Sequence[NamedReport]) -> str:
    """The columns that any row has something to say in."""
    columns = [
        ("source", [row.source for row in rows]),
        ("name", [row.name for row in rows]),
        ("kind", [row.kind for row in rows]),
        ("what", [row.text for row in rows]),
        ("stages", [", ".join(row.stages) for row in rows]),
    ]
    columns = [(title, cells) for title, cells in columns if any(cells)]
    head = "".join(f"<th scope='col'>{title}</th>" for title, _ in columns)
    lines = "".join(
        "<tr>" + "".join(f"<td class='name'>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for cells in zip(*(cells for _, cells in columns), strict=True)
    )
    return (
        f"<div class='scroll'><table class='facts'><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )
