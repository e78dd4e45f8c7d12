"""``clips diff``: two data sets, or two caption columns, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click

from . import present
from .options import LazyCommand, common_options
from .stats import printable

ABOUT: Final = (
    "A and B are caption columns (captions/NAME, also of two work folders), or data sets: work folders with pairs/ or "
    "folders of training shards. Rows are matched by key and image sha256, then by image alone. In texts, [-words-] "
    "are of A and {+words+} of B. Figures and settings are shown where both have them and they differ; --json has all."
)
_ROWS: Final = {
    "same": "same key, same image",
    "same_image_other_key": "same image, other key",
    "same_key_other_image": "same key, other image",
    "only_a": "only in A",
    "only_b": "only in B",
}
_MOST_TEXT_CHARS: Final = 1500
_WIDEST_VALUE: Final = 48


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=diff,
        parameters=_parameters,
        example="clips diff quickstart/captions/synthetic quickstart/captions/recap --limit 5",
        help=f"{summary}\n\n{ABOUT}",
    )


def _parameters() -> list[click.Parameter]:
    folder = click.Path(path_type=Path, file_okay=False)
    return [
        click.Argument(["a"], type=folder, metavar="A"),
        click.Argument(["b"], type=folder, metavar="B"),
        click.Option(
            ["--limit"],
            type=click.IntRange(min=0),
            default=10,
            show_default=True,
            metavar="N",
            help="Number of unequal texts per column, and of keys on one side only, to show; lowest keys first.",
        ),
        click.Option(["--exit-code"], is_flag=True, help="Exit with 1 when rows, texts or columns differ."),
        click.Option(
            ["--scratch"],
            type=click.Path(path_type=Path, file_okay=False, exists=True),
            metavar="DIR",
            help="Folder for rows that wait for their partner.  [default: the system's for temporary files]",
        ),
        *common_options(("json", "debug")),
    ]


def diff(a: Path, b: Path, limit: int, exit_code: bool, scratch: Path | None, as_json: bool, debug: bool) -> None:
    from clips_data.diff import diff as compare

    found = compare(a, b, limit=limit, scratch=scratch)
    if as_json:
        present.print_json(found)
    else:
        for line in lines(found):
            print(printable(line))
    if exit_code and found["differ"]:
        click.get_current_context().exit(1)


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name in ("a", "b"):
        side = found[name]
        left_out = (
            f"; unfinished, left out: {', '.join(side['unfinished_columns'])}" if side["unfinished_columns"] else ""
        )
        yield f"{name.upper()}  {side['where']} ({side['kind']}{left_out})"
    yield ""
    yield from _rows(found["rows"])
    for column, texts in found["texts"].items():
        yield ""
        yield from _texts(column, texts)
    yield ""
    for name in ("a", "b"):
        if only := found[f"columns_only_{name}"]:
            yield f"columns only in {name.upper()}: {', '.join(only)}"
    for title in ("figures", "settings"):
        yield from _side_by_side(title, found[title])


def _rows(rows: Mapping[str, Any]) -> Iterator[str]:
    yield "rows"
    width = max(len(str(rows[name])) for name in _ROWS)
    for name, label in _ROWS.items():
        keys = rows.get(f"first_{name}") or []
        some = f": {', '.join(keys)}" + (", …" if rows[name] > len(keys) else "") if keys else ""
        yield f"  {rows[name]:>{width}}  {label}{some}"


def _texts(column: str, texts: Mapping[str, Any]) -> Iterator[str]:
    share = texts["unequal_share"]
    counted = ", ".join(
        f"{texts[name]} {label}"
        for name, label in (
            ("equal", "equal"),
            ("different", "different"),
            ("only_a", "only in A"),
            ("only_b", "only in B"),
            ("neither", "in neither"),
        )
    )
    yield f"texts of {column}: {counted}" + (f" ({100 * share:.1f} % unequal)" if share is not None else "")
    for one in texts["first"]:
        key = one["key"] if one["key"] == one["key_b"] else f"{one['key']} and {one['key_b']}"
        marked = " ".join(_marked(sign, words) for sign, words in one["words"])
        yield f"  {key}  {marked[:_MOST_TEXT_CHARS]}{'…' if len(marked) > _MOST_TEXT_CHARS else ''}"


def _marked(sign: str, words: str) -> str:
    return {"=": words, "-": f"[-{words}-]", "+": f"{{+{words}+}}"}[sign]


def _side_by_side(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    """The values that both sides have and that differ; of what only one side has, the number."""
    both = {name: pair for name, pair in values.items() if None not in pair}
    unequal = {name: pair for name, pair in both.items() if pair[0] != pair[1]}
    only_a, only_b = (sum(pair[other] is None for pair in values.values()) for other in (1, 0))
    rest = f" ({only_a} only in A, {only_b} only in B)" if only_a or only_b else ""
    yield (f"{title}: {len(unequal)} of {len(both)} differ" if both else f"{title}: none in common") + rest
    if unequal:
        rows = [{"": f"  {name}", "A": _short(a), "B": _short(b)} for name, (a, b) in unequal.items()]
        yield from present.table(rows, ["", "A", "B"]).splitlines()


def _short(value: Any) -> str:
    text = present.figure(value)
    return text if len(text) <= _WIDEST_VALUE else text[: _WIDEST_VALUE - 1] + "…"
