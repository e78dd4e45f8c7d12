"""``clips convert``: training shards in the formats of others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import present
from .options import LazyCommand, common_options, job_from, load

if TYPE_CHECKING:
    from clips_data.convert import Conversion

ABOUT: Final = (
    "SHARDS is a finished shards/ folder, or the work folder that it is in (default: --work). parquet is Hugging "
    "Face's, images included; jsonl and csv have a row a sample without its image; open_clip checks the tars, links to "
    "them and writes sizes.json, or writes tars with another .txt; datacompdr has the synthetic captions as .syn.json. "
    "In csv, a text that begins with = + - @ a tab, a line break or ' has a ' before it, so that no spreadsheet runs "
    "it; take one leading ' off to read it back. Conversions are copies: `clips forget` does not reach them."
)
FORMATS: Final = "clips_data.convert:FORMATS"


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=convert,
        parameters=_parameters,
        example="clips convert quickstart/shards --to parquet --out quickstart-parquet",
        help=f"{summary}\n\n{ABOUT}",
    )


def _parameters() -> list[click.Parameter]:
    return [
        click.Argument(["shards"], required=False, type=click.Path(path_type=Path), metavar="[SHARDS]"),
        click.Option(["--to"], type=click.Choice(list(load(FORMATS))), required=True, help="Format to write."),
        click.Option(
            ["--out"],
            type=click.Path(path_type=Path, file_okay=False),
            required=True,
            metavar="DIR",
            help="Folder to write, one file for each tar.",
        ),
        click.Option(
            ["--column", "columns"],
            multiple=True,
            metavar="NAME",
            help="Caption column to write; may be repeated. For open_clip the one that .txt holds, for datacompdr "
            "those of syn_text.  [default: all; open_clip: .txt as it is; datacompdr: all but web]",
        ),
        click.Option(
            ["--mix"],
            multiple=True,
            metavar="TEXT",
            help="open_clip only: rules that choose .txt anew, as in `clips shard --mix`, with the shards' own seed; "
            "may be repeated.",
        ),
        click.Option(
            ["--epoch"],
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            metavar="N",
            help="Epoch that --mix is drawn for, as the trainer's loader would.",
        ),
        click.Option(
            ["--images/--no-images"],
            default=True,
            show_default=True,
            help="Carry the image bytes (parquet, datacompdr); without them images are named by URL and sha256.",
        ),
        *common_options(("work", "slice", "processes", "overwrite", "dry-run", "json", "debug", "quiet")),
    ]


def convert(**given: Any) -> None:
    from clips_data.convert import run
    from clips_data.errors import UsageError
    from clips_data.executor import stop_on_sigterm

    if given["shards"] is not None and given["work"] is not None:
        raise UsageError(f"SHARDS {given['shards']} and --work {given['work']} both name what to convert. Give one.")
    if str(given["shards"]) == "-":
        raise UsageError("clips convert takes a whole folder, not names on stdin. Name shards/, or its work folder.")
    stop_on_sigterm()
    folder = given.pop("shards") or given["work"] or Path()
    job = job_from({**given, "shards": None})
    report = run(_conversion(given), folder, job)
    present.show_report(report, as_json=given["as_json"], quiet=job.quiet)


def _conversion(given: dict[str, Any]) -> Conversion:
    from clips_data.convert import Conversion

    return Conversion(
        given["to"], tuple(given["columns"]), images=given["images"], mix=tuple(given["mix"]), epoch=given["epoch"]
    )
