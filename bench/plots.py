"""Charts as SVG, written by hand: self-contained, readable on light and on dark pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
WIDTH, LEFT, RIGHT = 900, 210, 60
TITLE, BAR, GAP = 22, 16, 14
_STYLE = (
    "text{font:12px sans-serif;fill:#1f2328}.t{font-weight:bold}.s{opacity:.45}.n{fill:#111}"
    "line{stroke:#8c959f}@media(prefers-color-scheme:dark){text{fill:#e6edf3}}"
)


@dataclass(frozen=True)
class Bar:
    """One bar: its label, per cent of the ceiling, and whether its row is stale (drawn pale)."""

    label: str
    percent: float
    stale: bool = False


@dataclass(frozen=True)
class Group:
    """Bars that share a title."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Stack:
    """One bar made of parts: its title, (kind, amount) of each part, and whether its row is stale."""

    title: str
    parts: tuple[tuple[str, float], ...]
    stale: bool = False


@dataclass(frozen=True)
class Curve:
    """One number a step, None where it is none, and whether it is stale (drawn pale)."""

    label: str
    values: Sequence[float | None]
    stale: bool = False


def curves(title: str, drawn: Sequence[Curve], height: float = 200) -> str:
    """Numbers over steps, from 0 to the largest; says "not measured" where there are none."""
    top = 18 + TITLE
    parts = [_text(8, 18, title, "t")]
    if not drawn:
        return _svg(title, top + TITLE, [*parts, _text(8, top, "not measured")])
    highest = max([1e-9, *(v for curve in drawn for v in curve.values if v is not None)])
    steps = max(2, *(len(curve.values) for curve in drawn))
    left, bottom, width = 48, top + height, WIDTH - 48 - RIGHT
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * height
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{share * highest:.2f}", anchor="end"))
    parts.append(_text(left, bottom + 18, "1"))
    parts.append(_text(left + width, bottom + 18, str(steps), anchor="end"))
    for i, curve in enumerate(drawn):
        points = " ".join(
            f"{left + n * width / (steps - 1):.1f},{bottom - v / highest * height:.1f}"
            for n, v in enumerate(curve.values)
            if v is not None
        )
        colour, shade = COLOURS[i % len(COLOURS)], ' class="s"' if curve.stale else ""
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{shade}/>'
        )
        y = bottom + 20 + (i + 1) * (BAR + 2)
        parts.append(f'<rect x="{left}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        parts.append(_text(left + 17, y, curve.label + (" (stale)" if curve.stale else "")))
    return _svg(title, bottom + 28 + len(drawn) * (BAR + 2) + GAP, parts)


def stacked(title: str, kinds: Sequence[str], stacks: Sequence[Stack]) -> str:
    """Bars as wide as the page, each divided by the shares of its parts; a key of the kinds that occur.

    Every colour serves two kinds, hatched for the second: eight are all that can be told apart.
    """
    there = [kind for kind in kinds if any(kind == k for stack in stacks for k, _ in stack.parts)]
    look = {kind: f"k{i}" for i, kind in enumerate(there)}
    width, y = WIDTH - 16, 18 + TITLE
    parts = [_text(8, 18, title, "t")]
    if not stacks:
        parts.append(_text(8, y, "not measured"))
    for number, kind in enumerate(there):
        x = 8 + number % 4 * width / 4
        parts.append(
            f'<rect x="{x:.1f}" y="{y - 10}" width="12" height="12" fill="url(#{look[kind]})"/>'
        )
        parts.append(_text(x + 17, y, kind))
        y += BAR + 2 if number % 4 == 3 or number == len(there) - 1 else 0
    y += GAP if stacks else 0
    for stack in stacks:
        parts.append(_text(8, y, stack.title + (" (stale)" if stack.stale else "")))
        y += 6
        total, x = sum(amount for _, amount in stack.parts), 8.0
        shade = ' class="s"' if stack.stale else ""
        for kind, amount in stack.parts:
            length, percent = width * amount / total, 100 * amount / total
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{BAR}" fill="url(#{look[kind]})"'
                f"{shade}><title>{escape(kind)}: {percent:.1f}%</title></rect>"
            )
            if length > 34:
                parts.append(_text(x + length / 2, y + BAR - 4, f"{percent:.0f}", "n", "middle"))
            x += length
        y += BAR + GAP + 6
    return _svg(title, y, [_fills(list(look.values())), *parts])


def _fills(names: Sequence[str]) -> str:
    """A pattern for each of `names`: plain colours first, hatched ones when these are used up."""
    found = []
    for i, name in enumerate(names):
        hatch = '<path d="M0 6L6 0" stroke="#fff" stroke-width="2"/>' if i >= len(COLOURS) else ""
        found.append(
            f'<pattern id="{name}" width="6" height="6" patternUnits="userSpaceOnUse">'
            f'<rect width="6" height="6" fill="{COLOURS[i % len(COLOURS)]}"/>{hatch}</pattern>'
        )
    return f"<defs>{''.join(found)}</defs>"


def bars(name: str, groups: Sequence[Group]) -> str:
    """Horizontal bars of per cent of the ceiling; says "not measured" where there are none."""
    labels = list(dict.fromkeys(bar.label for group in groups for bar in group.bars))
    colour = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    full = max([100.0, *(bar.percent for group in groups for bar in group.bars)])
    scale = (WIDTH - LEFT - RIGHT) / full
    parts: list[str] = [_text(8, 18, f"{name}: per cent of the ceiling of the same run", "t")]
    y = 18 + TITLE
    if not groups:
        parts.append(_text(8, y, "not measured"))
    for group in groups:
        parts.append(_text(8, y, group.title))
        y += 6
        for bar in group.bars:
            length = max(1.0, bar.percent * scale)
            shade = ' class="s"' if bar.stale else ""
            parts.append(_text(LEFT - 6, y + BAR - 4, bar.label, anchor="end"))
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" '
                f'fill="{colour[bar.label]}"{shade}/>'
            )
            words = f"{bar.percent:.1f}" + (" (stale)" if bar.stale else "")
            parts.append(_text(LEFT + length + 4, y + BAR - 4, words))
            y += BAR
        y += GAP + 6
    if groups:
        limit = LEFT + 100 * scale
        parts.append(f'<line x1="{limit:.1f}" y1="26" x2="{limit:.1f}" y2="{y - GAP}"/>')
    return _svg(name, y, parts)


def _svg(label: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(label)}">\n<style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, words: str, kind: str = "", anchor: str = "") -> str:
    attributes = (f' class="{kind}"' if kind else "") + (
        f' text-anchor="{anchor}"' if anchor else ""
    )
    return f'<text x="{x:.1f}" y="{y:.1f}"{attributes}>{escape(words)}</text>'
