"""Reports and tables for people on stderr, paths and JSON for programs on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clips_data.executor import Report

GOOD = ("ok", "success")


def say(text: str, *, quiet: bool = False) -> None:
    """Talk and progress: a line on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def show_report(report: Report, *, as_json: bool, quiet: bool) -> None:
    """A stage's end: what it did on stderr; on stdout the paths of its finished files, or one JSON object."""
    say("\n".join(report_lines(report)), quiet=quiet)
    if as_json:
        print_json({**asdict(report), "units": [str(path) for path in report.units]})
    else:
        for path in report.units:
            print(path)


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1, default=str))


def report_lines(report: Report) -> list[str]:
    """``download: 3 made, 0 skipped, 12.4 s`` and one line for every count, with its denominator."""
    lines = [f"{report.stage}: {report.made} made, {report.skipped} skipped, {report.seconds:.1f} s"]
    total = sum(report.counts.values())
    for name, number in sorted(report.counts.items(), key=lambda item: (item[0] not in GOOD, -item[1], item[0])):
        verb = "succeeded" if name in GOOD else name
        lines.append(f"  {number:>{len(str(total))}} of {total} {verb}")
    width = max((len(name) for name in report.facts), default=0)
    lines += [f"  {name:<{width}}  {figure(value)}" for name, value in report.facts.items()]
    return lines + [f"  {note}" for note in report.notes]


def figure(value: Any) -> str:
    """A number to four digits, a text as it is, the values of a list one after the other."""
    if isinstance(value, list):
        return ", ".join(map(figure, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """An aligned table with a head; numbers stand right, words left, and a column without any value is left out."""
    shown = [column for column in columns if any(row.get(column) not in (None, "") for row in rows)]
    cells = [[_cell(row.get(column)) for column in shown] for row in rows]
    right = [any(isinstance(row.get(column), int | float) for row in rows) for column in shown]
    widths = [max([len(head), *(len(line[i]) for line in cells)]) for i, head in enumerate(shown)]
    lines = []
    for line in [list(shown), *cells]:
        padded = [
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}"
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def bytes_text(number: int) -> str:
    """``1536000`` → ``"1.5 MB"``."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
