"""``clips sample``: a few samples to look at, as text, as JSON lines or as a page with their images."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import present
from .options import LazyCommand, common_options, load
from .stats import printable

if TYPE_CHECKING:
    from clips_data.pick import Picked

ABOUT: Final = (
    "FOLDER is a work folder or a folder of training shards (default: --work). random draws by seed; worst takes the "
    "lowest score; longest the longest captions; flagged draws among captions that were flagged or rejected. Prints "
    "text, JSON lines, or the path of a page with the images that loads nothing from elsewhere."
)
WANTED: Final = "clips_data.pick:Wanted"
_WIDEST: Final = 120
_MOST_TEXT_CHARS: Final = 1500


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=sample,
        parameters=_parameters,
        example="clips sample quickstart --by worst --score score.web --num 12 --gallery worst.html",
        help=f"{summary}\n\n{ABOUT}",
    )


def _parameters() -> list[click.Parameter]:
    default = {name: field.default for name, field in load(WANTED).__dataclass_fields__.items()}
    return [
        click.Argument(["folder"], required=False, type=click.Path(path_type=Path), metavar="[FOLDER]"),
        click.Option(
            ["--num"],
            type=click.IntRange(min=1),
            default=default["num"],
            show_default=True,
            metavar="N",
            help="Number of samples.",
        ),
        click.Option(
            ["--seed"], type=int, default=default["seed"], show_default=True, metavar="INTEGER", help="Seeds the draw."
        ),
        click.Option(
            ["--by"],
            type=click.Choice(load("clips_data.pick:BYS")),
            default=default["by"],
            show_default=True,
            help="Which samples.",
        ),
        click.Option(
            ["--score"],
            metavar="TEXT",
            help="Number that worst goes by: a polars SQL expression such as score.web.  [default: score.COLUMN]",
        ),
        click.Option(
            ["--column"],
            metavar="NAME",
            help="Caption column that it is about.  [default: the first one that was made]",
        ),
        click.Option(
            ["--where"],
            multiple=True,
            metavar="TEXT",
            help="Polars SQL expression that a sample must meet, as in `clips shard --where`; may be repeated.",
        ),
        click.Option(
            ["--gallery"],
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="PAGE.html",
            help="Write a page with the images instead, and print its path.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object a line, without the images."),
        *common_options(("work", "debug", "quiet")),
    ]


def sample(
    folder: Path | None, work: Path | None, gallery: Path | None, as_json: bool, quiet: bool, debug: bool, **given: Any
) -> None:
    from clips_data import ledger, pick_page
    from clips_data.errors import UsageError
    from clips_data.pick import Wanted, pick

    if folder is not None and work is not None:
        raise UsageError(f"FOLDER {folder} and --work {work} both name what to sample. Give one of them.")
    if given["score"] is not None and given["by"] != "worst":
        raise UsageError(f"--score is what --by worst goes by, and this is --by {given['by']}.")
    if gallery is not None and as_json:
        raise UsageError("--gallery writes a page and --json prints lines. Give one of them.")
    root = folder or work or Path()
    picks = pick(root, Wanted(**given))
    present.say(pick_page.counted(picks), quiet=quiet)
    if gallery is not None:
        name = root.resolve().name or str(root)
        ledger.write_bytes(gallery, pick_page.render(picks, f"Samples of {name}").encode())
        print(gallery)
    elif as_json:
        for one in picks.samples:
            print(json.dumps(as_dict(one), ensure_ascii=False, sort_keys=True))
    else:
        for line in lines(picks.samples, min(_WIDEST, shutil.get_terminal_size().columns)):
            print(printable(line))


def as_dict(one: Picked) -> dict[str, Any]:
    """A sample for JSON; its image is named by file and sha256."""
    return {
        "key": one.key,
        "sha256": one.sha256,
        "url": one.url,
        "file": str(one.place),
        "captions": {column: dict(about) for column, about in one.captions.items()},
        "scores": dict(one.scores),
        "value": one.value,
        "txt": one.txt,
        "sub_captions": dict(one.sub_captions),
    }


def lines(samples: list[Picked], width: int) -> Iterator[str]:
    """A block for each sample: what it went by, every caption with its code and flags, its scores and where it is."""
    for number, one in enumerate(samples):
        if number:
            yield ""
        value = f"  {present.figure(one.value)}" if one.value is not None else ""
        yield f"{one.key}{value}  {one.place.name}"
        margin = max(len(name) for name in (*one.captions, "scores")) + 4
        for column, about in one.captions.items():
            yield from _wrapped(f"  {column}".ljust(margin), _said(about), width)
        if one.scores:
            scores = ", ".join(f"{name} {present.figure(value)}" for name, value in sorted(one.scores.items()))
            yield from _wrapped("  scores".ljust(margin), scores, width)
        if one.url:
            yield "  url".ljust(margin) + one.url


def _said(about: Mapping[str, Any]) -> str:
    marks = [*([about["code"]] if about["code"] != "ok" else []), *about["flags"]]
    shown = about["caption"] or about.get("raw") or "-"
    cut = shown[:_MOST_TEXT_CHARS] + ("…" if len(shown) > _MOST_TEXT_CHARS else "")
    return (f"[{', '.join(marks)}] " if marks else "") + cut


def _wrapped(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=label, subsequent_indent=" " * len(label), break_on_hyphens=False
    ) or [label]
