"""What the demo's pages are made of alike: one HTML file each that needs no network, no library and no other file."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from goku.demo import plots
from goku.demo.contents import Picture
from goku.demo.page import SCRIPT, STYLE
from goku.media_files import media_bytes
from goku.whole_file import write_whole

__all__ = [
    "banner",
    "card",
    "clock",
    "document",
    "embed",
    "link",
    "media_table",
    "reproduction",
    "time_table",
    "write_page",
]

_KINDS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".mp4": "video/mp4"}


def document(title: str, *, lead: str, top: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A page as text. lead: below the title; top: before the links to the sections; sections: (id, title, HTML)."""
    nav = "".join(f'<a href="#{key}">{escape(name)}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{escape(name)}</h2>{html}</section>'
        for key, name, html in sections
    )
    script = SCRIPT
    for name, value in (("WIDTH", plots.WIDTH), ("LEFT", plots.LEFT), ("RIGHT", plots.RIGHT)):
        script = script.replace(f"%{name}%", str(value))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f"<header><h1>{escape(title)}</h1>{lead}</header>"
        f'<section id="verdict">{top}<nav>{nav}</nav></section>\n{body}'
        "<footer>This page is one file and asks the network for nothing. "
        "Links lead to the owners of the media.</footer>"
        f"</main><script>{script}</script></body></html>\n"
    )


def write_page(path: Path, text: str) -> None:
    """Write the page to `path`, whole or not at all."""
    write_whole(path, text.encode())


def other_pages(also: Sequence[tuple[str, str]]) -> str:
    """Links to pages beside this one, (file, what it shows) each."""
    links = [f'<a href="{escape(file, quote=True)}">{escape(what)}</a>' for file, what in also]
    return f"<p>Beside this page: {', '.join(links)}.</p>" if links else ""


def banner(passed: bool, text: str) -> str:
    """The verdict in one box; `text` is plain."""
    head = "✓ Every criterion holds" if passed else "✗ Not every criterion holds"
    kind = "verdict" if passed else "verdict failed"
    return f'<div class="{kind}"><strong>{head}</strong><p>{escape(text)}</p></div>'


def card(
    number: str, what: str, small: str, *, passed: bool | None, note: str = "not judged"
) -> str:
    """One number with its meaning; passed None: it is told and not judged, which `note` says. All plain text."""
    kind = "told" if passed is None else "passed" if passed else "failed"
    mark = note if passed is None else "✓" if passed else "✗"
    return (
        f'<div class="card {kind}"><span class="mark">{escape(mark)}</span>'
        f"<b>{escape(number)}</b>"
        f'<span class="what">{escape(what)}</span><small>{escape(small)}</small></div>'
    )


def embed(picture: Picture, alt: str) -> str:
    """An <img> or a silent looping <video> with the bytes in it. Raises ValueError for a file of another kind."""
    if isinstance(picture, Path):
        kind, data = _KINDS.get(picture.suffix.lower(), ""), picture.read_bytes()
        if not kind:
            raise ValueError(f"picture {picture}: must end in one of {', '.join(sorted(_KINDS))}")
        ratio = ""
    else:
        kind, data = media_bytes(picture)
        ratio = f' style="aspect-ratio:{picture.shape[2]}/{picture.shape[1]}"'
    source = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    label = escape(alt, quote=True)
    if kind == "video/mp4":
        return (
            f'<video src="{source}" aria-label="{label}"{ratio} autoplay loop muted playsinline>'
            "</video>"
        )
    return f'<img src="{source}" alt="{label}"{ratio}>'


def reproduction(
    commands: Sequence[str],
    environment: Mapping[str, str],
    files: Sequence[tuple[str, str]],
    config: str,
) -> str:
    """Shell commands, facts of the machine, (path, what it is) of what lies beside the page, the configuration."""
    facts = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in environment.items()
    )
    beside = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(what)}</td></tr>"
        for name, what in files
    )
    lines = escape("\n".join(commands))
    return (
        f"<pre>{lines}</pre>"
        + (f'<h3>Machine and versions</h3><table class="facts">{facts}</table>' if facts else "")
        + (f'<h3>Beside this page</h3><table class="facts">{beside}</table>' if beside else "")
        + "<details><summary>The resolved configuration</summary>"
        + f"<pre>{escape(config)}</pre></details>"
    )


def time_table(timings: Sequence[tuple[str, float]], note: str = "") -> str:
    """(what, seconds) as a table with bars and their sum."""
    total = sum(seconds for _, seconds in timings)
    longest = max((seconds for _, seconds in timings), default=0.0) or 1.0
    rows = "".join(
        f'<tr><td>{escape(what)}</td><td class="n">{clock(seconds)}</td><td class="wide">'
        f'<span class="bar" style="width:{100 * seconds / longest:.1f}%"></span></td></tr>'
        for what, seconds in timings
    )
    return (
        f'<table class="facts">{rows}<tr><th>together</th><td class="n"><b>{clock(total)}</b></td>'
        '<td class="wide"></td></tr></table>'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
    )


def media_table(rows: Iterable[tuple[str, str, str, str, str]]) -> str:
    """Owners and terms of media: (item, by, terms, address, use)."""
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{link(who, url)}</td><td>{escape(licence)}</td>"
        f"<td>{escape(use)}</td></tr>"
        for name, who, licence, url, use in rows
    )
    return (
        '<div class="scroll"><table class="facts"><thead><tr><th>item</th><th>by</th>'
        f"<th>terms</th><th>use</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def link(text: str, url: str) -> str:
    """A link to an address of the web; of anything else its text alone."""
    if not url.startswith(("https://", "http://")):
        return escape(text)
    return f'<a href="{escape(url, quote=True)}" rel="noreferrer">{escape(text)}</a>'


def clock(seconds: float) -> str:
    """Seconds as people say them: 3.2 s, 4 min 05 s."""
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 60 else f"{whole // 60} min {whole % 60:02d} s"
