"""Charts as inline SVG text, without a plotting library: lines, bars, the PSNR ruler, the packing.

Colours come from CSS classes and variables of the page (`page.py`), so a chart follows the reader's
light or dark theme. Every function returns a self-contained HTML fragment.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "Mark",
    "PackedSample",
    "Series",
    "attention_mask",
    "line_chart",
    "packing",
    "psnr_ruler",
]

WIDTH, HEIGHT = 560, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 14, 42
MOST_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: `points` (x, y); `faint` draws it thin behind the others, without legend entry."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vertical line at `x` with its label, `level` lines of text below the top; boundary: drawn as part of the grid,
    for where something begins rather than for what happened."""

    x: float
    label: str
    boundary: bool = False
    level: int = 0


@dataclass(frozen=True, kw_only=True)
class PackedSample:
    """One sample's stretch of a pack; `hue` in degrees, `grid` = (t, h, w) after patchify."""

    name: str
    modality: str
    grid: tuple[int, int, int]
    tokens: int
    hue: int


def line_chart(
    key: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    log_option: bool = False,
    x_range: tuple[float, float] | None = None,
) -> str:
    """A chart with legend; `log_option` adds a linear/logarithmic switch for the y axis.

    `key` must be unique on the page. Non-finite points are left out, and on a logarithmic axis
    those that are not positive.
    """
    finite = [
        Series(
            label=one.label,
            points=_thin([(x, y) for x, y in one.points if math.isfinite(x) and math.isfinite(y)]),
            colour=one.colour,
            faint=one.faint,
            dots=one.dots,
        )
        for one in series
    ]
    finite = [one for one in finite if one.points]
    if not finite:
        return f'<p class="none">{escape(y_label)}: nothing was logged.</p>'
    xs = [x for one in finite for x, _ in one.points]
    span = x_range or (min(xs), max(xs))
    keys = dict.fromkeys((one.colour, one.label) for one in finite if not one.faint)
    legend = "".join(
        f'<span class="key c{colour}">{escape(label)}</span>' for colour, label in keys
    )
    head = f'<div class="legend">{legend}</div>'
    linear = _plot(finite, span, x_label, y_label, marks, log=False)
    positive = [y for one in finite for _, y in one.points if y > 0]
    if not log_option or not positive:
        return f'<div class="chart">{head}{linear}</div>'
    logarithmic = _plot(finite, span, x_label, y_label, marks, log=True)
    name = escape(key, quote=True)
    return (
        f'<div class="chart switch"><input type="radio" name="{name}" id="{name}-log" checked>'
        f'<label for="{name}-log">log</label>'
        f'<input type="radio" name="{name}" id="{name}-lin"><label for="{name}-lin">linear</label>'
        f'{head}<div class="log">{logarithmic}</div><div class="lin">{linear}</div></div>'
    )


def psnr_ruler(
    values: Sequence[float],
    *,
    median: float,
    mean_image: float,
    vae: float,
    bars: tuple[float, float],
) -> str:
    """Samples as dots on a dB axis between the mean image and the VAE's reconstruction.

    `bars` are the two thresholds (dB) that the median has to reach.
    """
    known = [v for v in (*values, median, mean_image, vae, *bars) if math.isfinite(v)]
    if not known:
        return '<p class="none">PSNR: nothing was measured.</p>'
    low, high = math.floor(min(known) - 1), math.ceil(max(known) + 1)
    width, left = 720, 12

    def at(value: float) -> float:
        return left + (value - low) / (high - low) * (width - 2 * left)

    need, parts = max(bars), []
    if math.isfinite(need):
        parts.append(
            f'<rect class="good" x="{at(need):.1f}" y="50" '
            f'width="{max(0.0, width - left - at(need)):.1f}" height="46" rx="4"/>'
        )
    for tick in range(low, high + 1, 2 if high - low > 12 else 1):
        x = at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="50" y2="100"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="118" text-anchor="middle">{tick}</text>')
    for index, value in enumerate(values):
        if math.isfinite(value):
            y = 60 + (index * 7) % 26
            parts.append(f'<circle class="dot" cx="{at(value):.1f}" cy="{y}" r="4"/>')
    # Neighbours in dB may be close, so the labels have three levels.
    for value, label, kind, level, end in (
        (mean_image, "mean image", "bad", 42, 96),
        (vae, "VAE", "top", 42, 96),
        (need, "needed", "need", 142, 128),
        (median, "generated", "own", 20, 96),
    ):
        if math.isfinite(value):
            x = at(value)
            edge = "start" if x < 80 else "end" if x > width - 80 else "middle"
            start = 24 if kind == "own" else 46
            parts.append(
                f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{start}" y2="{end}"/>'
                f'<text class="{kind}" x="{x:.1f}" y="{level}" text-anchor="{edge}">'
                f"{label} {value:.1f}</text>"
            )
    return (
        f'<svg class="ruler" viewBox="0 0 {width} 150" role="img" '
        f'aria-label="PSNR of the samples in dB">{"".join(parts)}</svg>'
    )


def packing(samples: Sequence[PackedSample], capacity: int) -> str:
    """One pack as a strip: a block per sample, thin lines between latent frames, the unused end."""
    width, height = 1100.0, 52.0
    scale = width / max(capacity, sum(one.tokens for one in samples), 1)
    parts, x = [], 0.0
    for one in samples:
        extent = one.tokens * scale
        t, h, w = one.grid
        title = f"{one.name}: {one.modality}, {t} × {h} × {w} (t × h × w) = {one.tokens} tokens"
        parts.append(
            f'<g style="--h:{one.hue}"><title>{escape(title)}</title>'
            f'<rect class="block" x="{x:.2f}" y="0" width="{max(extent - 1.5, 0.5):.2f}" '
            f'height="{height:g}" rx="3"/>'
        )
        for frame in range(1, t):
            at = x + extent * frame / t
            parts.append(
                f'<line class="frame" x1="{at:.2f}" x2="{at:.2f}" y1="4" y2="{height - 4:g}"/>'
            )
        size, room = f"{t}×{h}×{w}", int((extent - 8) / 6.6)
        rows = (
            (one.name, f"{one.name[: max(0, room - 1)]}…"),
            (f"{one.modality} {size}", size),
            (f"{one.tokens} tokens", str(one.tokens)),
        )
        for row, texts in enumerate(rows):
            text = next((text for text in texts if 1 < len(text) <= room), "")
            parts.append(
                f'<text class="row{row}" x="{x + 5:.2f}" y="{16 + 14 * row}">{escape(text)}</text>'
            )
        parts.append("</g>")
        x += extent
    if width - x > 1:
        parts.append(
            f"<g><title>{capacity - sum(one.tokens for one in samples)} tokens unused</title>"
            f'<rect class="unused" x="{x:.2f}" y="0.5" width="{width - x - 0.5:.2f}" '
            f'height="{height - 1:g}" rx="3"/></g>'
        )
    return f'<svg class="pack" viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>'


def attention_mask(samples: Sequence[PackedSample]) -> str:
    """Which tokens of a pack attend to each other: squares on the diagonal, one a sample."""
    total = sum(one.tokens for one in samples)
    if total == 0:
        return ""
    parts, at = ['<rect class="unused" x="0.5" y="0.5" width="199" height="199"/>'], 0.0
    for one in samples:
        side = 200 * one.tokens / total
        parts.append(
            f'<rect class="block" style="--h:{one.hue}" x="{at:.2f}" y="{at:.2f}" '
            f'width="{side:.2f}" height="{side:.2f}"><title>{escape(one.name)}</title></rect>'
        )
        at += side
    return f'<svg class="mask" viewBox="0 0 200 200" role="img">{"".join(parts)}</svg>'


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: neighbours averaged, the last one kept."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points) - 1, size)]
    thin = [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]
    return [*thin, points[-1]]


def _plot(
    series: Sequence[Series],
    span: tuple[float, float],
    x_label: str,
    y_label: str,
    marks: Sequence[Mark],
    *,
    log: bool,
) -> str:
    """One SVG of the series on linear or logarithmic y."""
    if log:
        series = [
            Series(
                label=one.label,
                points=[(x, y) for x, y in one.points if y > 0],
                colour=one.colour,
                faint=one.faint,
                dots=one.dots,
            )
            for one in series
        ]
    ys = [y for one in series for _, y in one.points]
    ticks = _log_ticks(min(ys), max(ys)) if log else _ticks(min(0.0, min(ys)), max(ys))
    low, high = (min(ticks[0], min(ys)), max(ticks[-1], max(ys)))
    x0, x1 = span if span[1] > span[0] else (span[0] - 0.5, span[0] + 0.5)
    plot_width, plot_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * plot_width

    def py(y: float) -> float:
        if log:
            part = math.log(y / low) / math.log(high / low) if high > low else 0.5
        else:
            part = (y - low) / (high - low) if high > low else 0.5
        return TOP + (1 - part) * plot_height

    parts = []
    for tick in ticks:
        y = py(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    for tick in _ticks(x0, x1):
        if x0 <= tick <= x1:
            parts.append(
                f'<text class="tick" x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 18}" '
                f'text-anchor="middle">{tick:,.4g}</text>'
            )
    parts.append(
        f'<text class="axis" x="{LEFT + plot_width / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" x="14" y="{TOP + plot_height / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {TOP + plot_height / 2})">{escape(y_label)}</text>'
    )
    for mark in marks:
        if x0 <= mark.x <= x1:
            x = px(mark.x)
            # What begins here lies to the right of the line; other words go where there is more room.
            right = mark.boundary or x <= LEFT + plot_width / 2
            side, anchor = (5, "start") if right else (-5, "end")
            line, text = ("grid", "tick") if mark.boundary else ("mark", "marked")
            y = TOP + 12 + 16 * mark.level
            parts.append(
                f'<line class="{line}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                f'<text class="{text}" x="{x + side:.1f}" y="{y}" text-anchor="{anchor}">'
                f"{escape(mark.label)}</text>"
            )
    for one in sorted(series, key=lambda one: not one.faint):
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in one.points)
        kind = f"line c{one.colour}{' faint' if one.faint else ''}"
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if one.dots:
            parts += [
                f'<circle class="point c{one.colour}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3"/>'
                for x, y in one.points
            ]
    readable = [
        [one.label, one.colour, [[round(x, 3), float(f"{y:.5g}")] for x, y in one.points]]
        for one in series
        if not one.faint
    ]
    data = escape(json.dumps({"x": [x0, x1], "s": readable}, separators=(",", ":")), quote=True)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_label, quote=True)}" data-plot="{data}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    """About five round values that cover low..high."""
    if high <= low:
        return [low]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten around low..high; powers of ten alone over a wide range."""
    wide = high / low > 1e4
    values = [
        m * 10.0**k
        for k in range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for m in ((1,) if wide else (1, 2, 5))
    ]
    below = max(value for value in values if value <= low * 1.0001)
    above = min((value for value in values if value >= high * 0.9999), default=high)
    return [value for value in values if below <= value <= above]
