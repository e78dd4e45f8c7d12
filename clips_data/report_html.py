"""The pieces of the report page: escaped text, tables, curves, marked captions. Strings in, strings out."""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Sequence
from typing import Any, Final

MAX_CAPTION_CHARS: Final = 1500
# C0 and C1 controls, bidirectional overrides and isolates, line separators, byte order mark, lone surrogates.
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

STYLE: Final = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #ffffff; --ink: #1d1d1f; --soft: #62646a; --line: #dedcd7;
  --accent: #1f5fa8; --good: #1f7a4d; --bad: #b3261e; --lost: #e7a9a1; --tint-a: #dcebfa; --tint-b: #fdeccb; }
@media (prefers-color-scheme: dark) { :root { --page: #161719; --card: #1f2124; --ink: #e9e8e6; --soft: #a3a5aa;
  --line: #36383c; --accent: #7fb3ee; --good: #6cc79a; --bad: #f2a49e; --lost: #7d3b36;
  --tint-a: #1d3f60; --tint-b: #59430f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 52px 0 10px; scroll-margin-top: 12px; } header p { margin: 0; }
nav { margin: 22px 0 0; display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
code, pre { font: .88em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0 0 14px; padding: 12px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow-x: auto; max-height: 34em; } details { margin: 0 0 14px; } summary { cursor: pointer; color: var(--accent); }
details pre { margin-top: 8px; }
h3 { font-size: .95rem; margin: 0 0 6px; } h3 .soft { font-weight: 400; }
p { margin: 0 0 10px; max-width: 72ch; } .soft, caption, .num small { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 12px; margin: 20px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--soft); font-size: .85rem; line-height: 1.35; }
.scroll { overflow-x: auto; margin: 0 0 18px; } svg.bars + .scroll { margin-top: 18px; }
tbody th { font-weight: 500; } .loss { padding-left: 18px; } .loss { color: var(--soft); font-weight: 400; }
.notes { margin: -6px 0 18px; padding-left: 18px; color: var(--soft); font-size: .88rem; } .spaced { margin: 0 0 20px; }
h3.removed { margin: 18px 0 8px; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; padding: 0 0 4px; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: baseline; }
th { font-weight: 600; } thead th { color: var(--soft); font-weight: 500; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; }
.curves figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .raw { stroke: var(--accent); opacity: .3; }
svg .mean { stroke: var(--accent); stroke-width: 2; } svg path { fill: none; stroke-linejoin: round; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 18px; color: var(--soft); font-size: .88rem; margin: 0 0 14px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 16px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  display: flex; flex-direction: column; }
.small article img { height: 150px; } .absent { padding: 14px 14px 0; margin: 0; }
.first { display: flex; gap: 6px; flex-wrap: wrap; }
article .first img { width: auto; height: 72px; border-radius: 4px; }
article img { display: block; width: 100%; height: 220px; object-fit: contain; background: var(--line); }
article dl { margin: 0; padding: 12px 14px 14px; font-size: .92rem; }
dt { color: var(--soft); font-size: .8rem; margin-top: 8px; } dt:first-child { margin-top: 0; }
dd { margin: 0; overflow-wrap: anywhere; max-height: 15em; overflow: hidden auto; }
mark { color: inherit; border-radius: 3px; padding: 1px 3px; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; }
mark.a { background: var(--tint-a); } mark.b { background: var(--tint-b); }
footer { margin-top: 48px; color: var(--soft); font-size: .85rem; }
@media (max-width: 600px) { .small article { flex-direction: row; } .small article img { width: 34%; height: auto;
  object-position: top; flex: none; align-self: stretch; } .small dd { max-height: 7.6em; }
  tbody th { min-width: 8.5em; } }
"""


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole HTML document that may load nothing from anywhere, with further rules of style.

    Its policy lets no script run but ``script``, which it names by its hash.
    """
    named = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"; script-src 'sha256-{named}'" if script else ""
    at_end = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'{scripts}; base-uri 'none'; form-action 'none'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n{at_end}</body>\n</html>\n"
    )


def text(value: object) -> str:
    """``value`` for HTML: escaped, control characters out, line breaks and tabs as spaces."""
    return html.escape(_CONTROL.sub("", re.sub(r"[\t\r\n]+", " ", str(value))))


def line(value: str) -> str:
    """One line of code, its spaces kept."""
    return html.escape(_CONTROL.sub("", value))


def contents(body: str) -> str:
    """Links to the sections of ``body`` that have a name."""
    found = re.findall(r'<h2 id="([a-z]+)">([^<]+)</h2>', body)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in found)
    return f'<nav aria-label="Sections">{links}</nav>' if len(found) > 1 else ""


def caption(value: str) -> str:
    """A caption, cut where it is too long for anybody to read."""
    return text(value[:MAX_CAPTION_CHARS]) + _rest(value)


def marked_caption(value: str, spans: Sequence[Sequence[int]]) -> str:
    """A caption with its sub-captions marked in two alternating tints; ``spans`` are character offsets in order."""
    parts, position = [], 0
    for number, (start, end) in enumerate(spans):
        if not position <= start < end <= min(len(value), MAX_CAPTION_CHARS):
            break
        tint = "ab"[number % 2]
        parts.append(f'{text(value[position:start])}<mark class="{tint}">{text(value[start:end])}</mark>')
        position = end
    return "".join(parts) + text(value[position:MAX_CAPTION_CHARS]) + _rest(value)


def _rest(value: str) -> str:
    left = len(value) - MAX_CAPTION_CHARS
    return f' <span class="soft">… {number(left)} more characters</span>' if left > 0 else ""


def number(value: object) -> str:
    """``12345`` → ``12 345`` (thin spaces), floats to four digits, ``None`` → a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u2009")
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def percent(part: float, whole: float = 1.0) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> str:
    """A table of HTML cells. The first column is the row's head; cells after it are right-aligned numbers.

    A column whose head starts with ``<`` is left-aligned text.
    """
    kinds = ["" if i == 0 or name.startswith("<") else ' class="num"' for i, name in enumerate(head)]
    heads = "".join(f"<th{kind}>{text(name.lstrip('<'))}</th>" for name, kind in zip(head, kinds, strict=True))
    lines = []
    for row in rows:
        cells = [f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)]
        lines.append(f'<tr><th scope="row">{row[0]}</th>{"".join(cells[1:])}</tr>')
    above = f"<caption>{text(caption)}</caption>" if caption else ""
    inside = f"{above}<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{inside}</table></div>'


def tile(figure: str, label: str) -> str:
    return f'<div class="tile"><b>{figure}</b><span>{text(label)}</span></div>'


# --- curves -----------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 220, 44, 10, 10, 34


def curve(title: str, points: Sequence[tuple[float, float]], *, x_label: str) -> str:
    """An inline SVG of one series: every point faint, their running mean over a fortieth of them in full colour."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not points:
        return f'<figure><h3>{text(title)}</h3><p class="soft">No finite values.</p></figure>'
    window = max(1, len(points) // 40)
    means = [(x, _mean([y for _, y in points[max(0, i + 1 - window) : i + 1]])) for i, (x, _) in enumerate(points)]
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    low, high = y_ticks[0], y_ticks[-1]
    x_last = max(x for x, _ in points)
    x_ticks = [tick for tick in ticks(0, x_last) if tick <= x_last]

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / x_last if x_last else LEFT
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    parts = []
    for y in y_ticks:
        _, at = place(0, y)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        at, _ = place(x, low)
        anchor = "end" if at > WIDTH - 30 else "middle"
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="{anchor}">{short(x)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{text(x_label)}</text>')
    for name, series in (("raw", points), ("mean", means)):
        line = "L".join(f"{px:.1f} {py:.1f}" for px, py in (place(x, y) for x, y in thin(series)))
        parts.append(f'<path class="{name}" d="M{line}"/>')
    about = f"{title}: from {points[0][1]:.3g} to {means[-1][1]:.3g} over {len(points)} points"
    shape = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(about)}"'
    last = f'<span class="soft"> last mean {means[-1][1]:.3g}</span>'
    return f"<figure><h3>{text(title)}{last}</h3><svg {shape}>{''.join(parts)}</svg></figure>"


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers that enclose ``low`` … ``high``: at least two, about ``wanted`` steps apart."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float]], most: int = 600) -> list[tuple[float, float]]:
    """Every n-th point and the last one."""
    step = math.ceil(len(points) / most)
    kept = list(points[::step])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{unit}"
    return f"{value:g}"


def bar_figures(values: Sequence[Any]) -> str:
    """Cells joined by a middle dot, for short lists of facts."""
    return " · ".join(text(value) for value in values)
