"""``clips adopt``: data that others have made become ours in place: a folder of tars, or a table of captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import present
from .options import LazyCommand, common_options, job_from

if TYPE_CHECKING:
    from clips_data.executor import Job, Report

ABOUT: Final = (
    "SOURCE is a folder of webdataset tars, made by img2dataset or by anything else: each tar is checked, every image "
    "decoded once, and pairs/ gets a link to it with a table beside it. Nothing is copied and nothing is written into "
    "that folder. With --captions SOURCE is a table of captions for pairs that are there, which becomes a column."
)
_OF_FOLDERS: Final = (
    "caption_ext", "caption_key", "ignore_members", "max_pixels", "out", "limit", "slice", "processes", "executor",
    "dry_run",
)  # fmt: skip
_OF_TABLES: Final = ("as_name", "by", "table_key")


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=adopt,
        parameters=_parameters,
        example="clips adopt laion/shards --work laion",
        help=f"{summary}\n\n{ABOUT}",
    )


def _parameters() -> list[click.Parameter]:
    from clips_data.adopt import MAX_PIXELS

    return [
        click.Argument(["source"], metavar="SOURCE"),
        click.Option(
            ["--caption-ext"],
            metavar="EXT",
            help="Extension of the members that hold captions, where there is no table of img2dataset's.  "
            "[default: txt]",
        ),
        click.Option(["--caption-key"], metavar="KEY", help="Take captions from this key of the json members instead."),
        click.Option(
            ["--ignore-members"],
            metavar="EXT,…",
            help="Extensions of further members that may be there and are never read, for example cls,npy.",
        ),
        click.Option(
            ["--max-pixels"],
            type=click.IntRange(min=1),
            metavar="INTEGER",
            help=f"Largest image in pixels, by its header, before any decoding.  [default: {MAX_PIXELS}]",
        ),
        click.Option(
            ["--captions"],
            metavar="COLUMN",
            help="Column of the table SOURCE that holds captions; a / leads into JSON and lists: captions/long.",
        ),
        click.Option(["--as", "as_name"], metavar="NAME", help="Name of the caption column to make of them."),
        click.Option(
            ["--by"],
            metavar="KEY",
            help="What tells which caption is whose: url, sha256 or a column of the list, such as uid.",
        ),
        click.Option(
            ["--table-key"], metavar="COLUMN", help="Column of the table with that key.  [default: the same name]"
        ),
        *common_options(
            ("work", "out", "limit", "slice", "processes", "executor", "overwrite", "dry-run", "json", "debug", "quiet")
        ),
    ]


def adopt(**given: Any) -> None:
    from clips_data.executor import stop_on_sigterm

    stop_on_sigterm()
    job = job_from(given)
    report = _captions(given, job) if given["captions"] else _folder(given, job)
    present.show_report(report, as_json=given["as_json"], quiet=job.quiet)


def _folder(given: dict[str, Any], job: Job) -> Report:
    from clips_data import adopt as room
    from clips_data.errors import UsageError, UserError

    _refuse(given, _OF_TABLES, "is about a table of captions: say with --captions which of its columns holds them")
    source = Path(given["source"])
    if source.is_file():
        raise UserError(f"{source} is a file. Name a folder of tars, or a table together with --captions COLUMN.")
    if given["caption_ext"] and given["caption_key"]:
        raise UsageError("--caption-ext and --caption-key name two places of the caption. Give one of them.")
    chosen = {name: given[name] for name in ("caption_ext", "caption_key", "max_pixels") if given[name] is not None}
    ignore = tuple(ext for ext in (given["ignore_members"] or "").split(",") if ext)
    return room.adopt(source, job, ignore=ignore, **chosen)


def _captions(given: dict[str, Any], job: Job) -> Report:
    from clips_data.errors import UsageError

    _refuse(given, _OF_FOLDERS, "is about a folder of tars, and --captions says that SOURCE is a table")
    if not given["as_name"] or not given["by"]:
        raise UsageError("--captions also needs --as NAME, the column to make, and --by KEY, what tells whose it is.")
    from clips_data.imported import import_table

    return import_table(
        job.work,
        given["source"],
        column=given["as_name"],
        text_column=given["captions"],
        by=given["by"],
        table_key=given["table_key"],
        overwrite=job.overwrite,
    )


def _refuse(given: dict[str, Any], names: tuple[str, ...], why: str) -> None:
    from clips_data.errors import UsageError

    for name in names:
        if given[name]:
            raise UsageError(f"--{'as' if name == 'as_name' else name.replace('_', '-')} {why}.")
