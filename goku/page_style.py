"""The look of the pages that goku writes: one style sheet, put into each page itself, for light and dark."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #fbfaf7; --card: #ffffff; --ink: #1d2024; --soft: #646a73; --rule: #e3e1db;
  --good: #157f4a; --good-bg: #e4f4ea; --bad: #b3261e; --bad-bg: #fbe9e7;
  --c0: #2563c9; --c1: #d9730d; --c2: #12876a; --c3: #a6389b; --block-l: 84%;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14161a; --card: #1c1f24; --ink: #e9e7e2; --soft: #9aa1ab; --rule: #31353c;
    --good: #5fd394; --good-bg: #15321f; --bad: #ff8a80; --bad-bg: #3c1a18;
    --c0: #7fb0ff; --c1: #ffb066; --c2: #5fd6b4; --c3: #e28bd8; --block-l: 74%;
  }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--bg); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.2rem); line-height: 1.2; margin: 0 0 6px; }
h2 {
  font-size: 1.35rem; margin: 52px 0 4px; padding-top: 14px; border-top: 1px solid var(--rule);
}
h3 { font-size: 1rem; margin: 22px 0 6px; }
p { margin: 6px 0 14px; max-width: 78ch; }
p.lead { color: var(--soft); font-size: 1.05rem; }
.note, .none, small, figcaption { color: var(--soft); font-size: .86rem; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 16px 0 0; font-size: .92rem; }
a { color: var(--c0); }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
pre {
  background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 14px;
  overflow-x: auto; font-size: .86rem; line-height: 1.5; margin: 8px 0;
}
img, video { display: block; border-radius: 6px; background: var(--rule); width: 100%; }
.scroll { overflow-x: auto; padding-bottom: 6px; }
table { border-collapse: collapse; }

.verdict {
  border: 1px solid var(--good); background: var(--good-bg); border-radius: 14px;
  padding: 16px 22px; margin: 20px 0 14px;
}
.verdict strong { font-size: 1.3rem; color: var(--good); display: block; }
.verdict p { margin: 4px 0 0; max-width: none; }
.verdict.failed { background: var(--bad-bg); border-color: var(--bad); }
.verdict.failed strong { color: var(--bad); }
.cards {
  display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr));
}
.card {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px;
  padding: 14px 16px;
}
.card b { display: block; font-size: 1.75rem; line-height: 1.2; }
.card b, td.n { font-variant-numeric: tabular-nums; }
.card .what { font-size: .95rem; }
.card small { display: block; }
.card .mark { float: right; font-size: 1.2rem; font-weight: 700; color: var(--good); }
.card.failed .mark { color: var(--bad); }
.card.told .mark { color: var(--soft); font-size: .8rem; font-weight: 400; }

.item {
  display: grid; grid-template-columns: 190px 1fr; gap: 6px 20px; padding: 16px 0;
  border-bottom: 1px solid var(--rule);
}
.item:last-of-type { border-bottom: 0; }
.item h3 { margin: 0 0 4px; }
.item .said { font-size: .95rem; margin-bottom: 8px; }
.tag {
  display: inline-block; font-size: .72rem; padding: 1px 8px; border-radius: 99px;
  border: 1px solid var(--rule); color: var(--soft); margin-right: 4px;
}
.figures {
  display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr));
}
figure { margin: 0; }
figcaption { font-size: .8rem; line-height: 1.35; margin-top: 4px; }
figcaption b { color: var(--ink); font-weight: 600; }
.hit { color: var(--good); }
.miss { color: var(--bad); }

.steps { table-layout: fixed; width: 100%; }
.steps td, .steps th { padding: 3px 5px; text-align: left; vertical-align: middle; }
.steps th { font-size: .8rem; font-weight: 600; color: var(--soft); }
.steps .first { width: 100px; }
.steps th[scope=row] { position: sticky; left: 0; background: var(--bg); z-index: 1; }

.facts { width: 100%; font-size: .92rem; }
.facts td, .facts th {
  padding: 6px 10px 6px 0; border-bottom: 1px solid var(--rule); text-align: left;
  vertical-align: top;
}
.facts td.n { text-align: right; white-space: nowrap; }
.facts th { font-weight: 600; color: var(--soft); font-size: .82rem; }
.facts td.wide { width: 45%; vertical-align: middle; }
.facts .bar {
  display: block; height: 8px; border-radius: 4px; background: var(--c0); min-width: 2px;
}

.two {
  display: grid; gap: 18px 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr));
}
.two > div { min-width: 0; }
.two h3 { margin-bottom: 2px; }
.chart { position: relative; }
.legend { font-size: .84rem; min-height: 1.6em; }
.key { margin-right: 14px; white-space: nowrap; }
.key::before {
  content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  margin: 0 6px 3px 0; background: currentColor;
}
.c0 { color: var(--c0); }
.c1 { color: var(--c1); }
.c2 { color: var(--c2); }
.c3 { color: var(--c3); }
.switch > input { position: absolute; opacity: 0; }
.switch > label {
  float: right; cursor: pointer; font-size: .78rem; padding: 0 8px; margin-left: 4px;
  border: 1px solid var(--rule); border-radius: 99px; color: var(--soft);
}
.switch > input:checked + label { color: var(--ink); border-color: var(--soft); }
.switch > input:focus-visible + label { outline: 2px solid var(--c0); }
.switch > input:nth-of-type(1):checked ~ .lin,
.switch > input:nth-of-type(2):checked ~ .log { display: none; }

svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font-size: 13px; }
svg .tick, svg .axis { fill: var(--soft); }
svg .grid { stroke: var(--rule); }
svg .line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
svg .faint { stroke-width: 1; opacity: .3; }
svg .point { fill: currentColor; }
svg .mark { stroke: var(--bad); stroke-dasharray: 4 3; }
svg .marked { fill: var(--bad); }
svg .cursor { stroke: var(--soft); }
.tip {
  position: fixed; z-index: 9; pointer-events: none; background: var(--card); font-size: .8rem;
  border: 1px solid var(--rule); border-radius: 8px; padding: 5px 9px; white-space: nowrap;
  box-shadow: 0 3px 12px #0003;
}
.tip span { display: block; }

.ruler { max-width: 980px; }
.ruler .good { fill: var(--good-bg); }
.ruler .dot { fill: var(--c0); opacity: .6; }
.ruler line.bad { stroke: var(--bad); stroke-width: 2; }
.ruler line.need { stroke: var(--good); stroke-width: 2; stroke-dasharray: 4 3; }
.ruler line.own { stroke: var(--c0); stroke-width: 3; }
.ruler line.top { stroke: var(--soft); stroke-width: 2; }
.ruler text.own { fill: var(--c0); font-weight: 600; }
.ruler text.bad { fill: var(--bad); }
.ruler text.need { fill: var(--good); }

.packs { min-width: 860px; }
.packrow {
  display: grid; grid-template-columns: 130px 1fr; gap: 10px; align-items: center; margin: 5px 0;
}
.packrow small { line-height: 1.3; }
.block { fill: hsl(var(--h) 62% var(--block-l)); stroke: hsl(var(--h) 50% 52%); }
.pack text { fill: #15181b; font-size: 11.5px; }
.pack .row0 { font-weight: 600; }
.pack .frame { stroke: #fff; opacity: .85; }
.unused { fill: none; stroke: var(--soft); stroke-dasharray: 3 3; opacity: .7; }
.mask { width: 200px; flex: none; }
.side { display: flex; gap: 20px; align-items: center; flex-wrap: wrap; margin-top: 14px; }
.side p { flex: 1 1 300px; }
details { margin: 14px 0; }
summary { cursor: pointer; }
footer { margin-top: 50px; color: var(--soft); font-size: .86rem; }

@media (max-width: 640px) {
  main { padding: 18px 14px 40px; }
  .item { grid-template-columns: 1fr; }
  .figures { gap: 10px; grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .cards { grid-template-columns: 1fr 1fr; }
  .card { padding: 10px 12px; }
  .card b { font-size: 1.3rem; }
  .card.told .mark { float: none; display: block; }
  .facts td.wide { display: none; }
  svg.plot text, svg.ruler text { font-size: 19px; }
}
@media print { nav, .switch > label { display: none; } }
"""
