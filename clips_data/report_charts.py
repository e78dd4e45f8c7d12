"""Pictures of the report page as inline SVG: the funnel's bars, histograms, intervals. Numbers in, strings out.

The funnel and the intervals have no view box: their widths are shares of the page and their letters keep their size,
so that they can be read on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from clips_data import report_html as h

STYLE: Final = """
svg.bars { overflow: visible; } svg.bars text { font-size: 14px; fill: var(--ink); }
svg.bars text.soft { fill: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
svg.bars .whole { fill: var(--line); } svg.bars .lost { fill: var(--lost); } svg.bars .kept { fill: var(--accent); }
svg.bars .side { fill: var(--accent); opacity: .45; }
.hist .legend { margin: 8px 0 0; }
.hist rect { fill: var(--accent); opacity: .8; } .hist rect.rest { opacity: .4; } .hist .mid { stroke: var(--ink);
  stroke-width: 1; stroke-dasharray: 3 3; }
svg.interval { display: inline-block; width: 100%; min-width: 120px; height: 18px; vertical-align: middle;
  overflow: visible; }
svg.interval line { stroke: var(--line); } svg.interval .low-high { stroke: var(--accent); stroke-width: 3; }
svg.interval circle { fill: var(--accent); } svg.interval .chance { stroke: var(--soft); stroke-dasharray: 2 2; }
"""
_ROW_PX: Final = 46
_BINS: Final = 24


@dataclass(frozen=True)
class Bar:
    """One bar: ``number`` of the longest, behind it ``before``, which is where the bar before it ended."""

    label: str
    number: int
    before: int
    share: str
    side: bool = False
    """Whether it is beside the way of the others: nothing is lost where it is shorter."""


def bars(rows: Sequence[Bar], about: str) -> str:
    """Horizontal bars, their labels above them and what was lost behind them in a colour of its own."""
    whole = max((max(row.number, row.before) for row in rows), default=0)
    if not whole:
        return ""
    parts = []
    for place, row in enumerate(rows):
        top = place * _ROW_PX
        kept, before = 100 * row.number / whole, 100 * max(row.number, row.before) / whole
        kind, behind = ("side", "whole") if row.side else ("kept", "lost")
        parts.append(
            f'<text x="0" y="{top + 15}">{h.text(row.label)}</text>'
            f'<text class="soft" x="100%" y="{top + 15}" text-anchor="end">{row.share}</text>'
            f'<rect class="{behind}" x="0" y="{top + 22}" width="{before:.3f}%" height="10" rx="2"/>'
            f'<rect class="{kind}" x="0" y="{top + 22}" width="{kept:.3f}%" height="10" rx="2"/>'
        )
    height = len(rows) * _ROW_PX
    shape = f'width="100%" height="{height}" role="img" aria-label="{h.text(about)}"'
    return f'<svg class="bars" {shape}>{"".join(parts)}</svg>'


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width from ``first`` on, and of those beyond the last bin."""

    first: float
    width: float
    counts: tuple[int, ...]
    beyond: int = 0
    whole: bool = False
    """Whether the values are whole numbers; a bin then begins at its first."""
    median: float | None = None
    ends: tuple[float, float] = field(default=(0.0, 0.0))
    """The smallest and the largest value."""


def bins_for(low: float, high: float, usual: float, *, whole: bool) -> tuple[float, float, int]:
    """First edge, width and number of bins of round widths from ``low`` on.

    They reach ``high``, unless that lies further than twice ``usual``, which is where nearly all values are.
    """
    last = min(high, max(2 * usual, low + 1)) if whole else high
    raw = max((last - low) / _BINS, 1.0 if whole else 1e-6)
    power = 10 ** math.floor(math.log10(raw) + 1e-9)
    width = next(power * step for step in (1, 2, 5, 10) if power * step >= raw * 0.999)
    first = math.floor(low / width + 1e-9) * width
    return first, width, max(1, math.floor((last - first) / width + 1e-9) + 1)


def histogram(title: str, found: Histogram, *, x_label: str) -> str:
    """A figure with its number of values and, where some lie beyond the last bin, how many."""
    total = sum(found.counts) + found.beyond
    if not total:
        return f'<figure><h3>{h.text(title)}</h3><p class="soft">No values.</p></figure>'
    columns = [*found.counts, *([found.beyond] if found.beyond else [])]
    highest = max(columns)
    step = (h.WIDTH - h.LEFT - h.RIGHT) / len(columns)
    bottom, high_px = h.HEIGHT - h.BOTTOM, h.HEIGHT - h.TOP - h.BOTTOM
    parts = []
    for tick in h.ticks(0, highest)[1:]:
        if tick <= highest:
            at = bottom - high_px * tick / highest
            parts.append(f'<path class="grid" d="M{h.LEFT} {at:.1f}H{h.WIDTH - h.RIGHT}"/>')
            parts.append(f'<text x="{h.LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{h.short(tick)}</text>')
    for place, number in enumerate(columns):
        tall, rest = high_px * number / highest, place == len(found.counts)
        start, end = found.first + place * found.width, found.first + (place + 1) * found.width
        span = f"from {start:g}" if rest else _span(start, end, found)
        parts.append(
            f'<rect{" class=" + chr(34) + "rest" + chr(34) if rest else ""} x="{h.LEFT + place * step + 0.5:.1f}" '
            f'y="{bottom - tall:.1f}" width="{max(step - 1, 0.5):.1f}" height="{tall:.1f}">'
            f"<title>{span}: {number}</title></rect>"
        )
    parts.append(f'<path class="grid" d="M{h.LEFT} {bottom}H{h.WIDTH - h.RIGHT}"/>')
    last = found.first + len(found.counts) * found.width
    for tick in h.ticks(found.first, last):
        if found.first <= tick <= last:
            at = h.LEFT + step * (tick - found.first) / found.width
            parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    if found.median is not None and found.median <= last:
        at = h.LEFT + step * (found.median - found.first + (0.5 if found.whole else 0)) / found.width
        parts.append(f'<path class="mid" d="M{at:.1f} {h.TOP}V{bottom}"/>')
    parts.append(
        f'<text x="{(h.LEFT + h.WIDTH) / 2:.0f}" y="{h.HEIGHT - 4}" text-anchor="middle">{h.text(x_label)}</text>'
    )
    beyond = f", {h.number(found.beyond)} of them from {last:g} on" if found.beyond else ""
    median = f"median {h.number(found.median)}, " if found.median is not None else ""
    ends = f"{h.number(found.ends[0])} to {h.number(found.ends[1])}"
    about = f"{title}: {total} values, {median}{ends}{beyond}"
    note = f'<p class="legend">{median}{ends}, {h.number(total)} values{beyond}</p>'
    shape = f'viewBox="0 0 {h.WIDTH} {h.HEIGHT}" role="img" aria-label="{h.text(about)}"'
    return f'<figure class="hist"><h3>{h.text(title)}</h3><svg {shape}>{"".join(parts)}</svg>{note}</figure>'


def _span(start: float, end: float, found: Histogram) -> str:
    if found.whole:
        return f"{start:g}" if found.width == 1 else f"{start:g} to {end - 1:g}"
    return f"{start:g} to {end:g}"


def interval(value: float, low: float, high: float, chance: float | None) -> str:
    """A dot with its interval on a line from 0 to 1, and a dashed line where chance is."""

    def place(x: float) -> str:
        return f"{100 * min(1.0, max(0.0, x)):.2f}%"

    dashed = ""
    if chance is not None:
        dashed = f'<line class="chance" x1="{place(chance)}" x2="{place(chance)}" y1="1" y2="17"/>'
    return (
        '<svg class="interval" aria-hidden="true"><line x1="0" x2="100%" y1="9" y2="9"/>'
        f'{dashed}<line class="low-high" x1="{place(low)}" x2="{place(high)}" y1="9" y2="9"/>'
        f'<circle cx="{place(value)}" cy="9" r="4"/></svg>'
    )
