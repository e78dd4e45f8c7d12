"""``clips forget``: what came from a host, a URL or an image leaves every stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from . import present
from .options import LazyCommand, common_options

if TYPE_CHECKING:
    from clips_data.forget import Outcome

ABOUT: Final = (
    "Rows of pairs/ keep nothing but key, status and the code `forgotten`; images, captions, scores and training "
    "samples are removed, and later downloads into the folder refuse them. Nothing else is made again. Training runs "
    "are not changed: the checkpoints that saw the samples are listed. Not while a stage is at work there."
)


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=forget,
        parameters=lambda: [
            click.Option(
                ["--host", "hosts"],
                multiple=True,
                metavar="HOST",
                help="Everything from this host and those below it: example.com also takes img.example.com.",
            ),
            click.Option(["--url", "urls"], multiple=True, metavar="URL", help="This URL; signatures do not matter."),
            click.Option(
                ["--sha256", "images"],
                multiple=True,
                metavar="HEX",
                help="The image with this sha256, as downloaded or as stored, from wherever it came.",
            ),
            click.Option(
                ["--list", "list_file"],
                type=click.Path(path_type=Path, dir_okay=False),
                metavar="FILE",
                help="File with one host, URL or sha256 a line.",
            ),
            *common_options(("work", "dry-run", "json", "debug", "quiet")),
        ],
        example="clips forget --host example.com --work laion --dry-run",
        help=f"{summary}\n\n{ABOUT}",
    )


def forget(
    hosts: Sequence[str],
    urls: Sequence[str],
    images: Sequence[str],
    list_file: Path | None,
    work: Path | None,
    dry_run: bool,
    as_json: bool,
    debug: bool,
    quiet: bool,
) -> None:
    from clips_data import forget as room
    from clips_data.errors import UsageError
    from clips_data.forgotten import asked_for, read_list

    wanted = asked_for(hosts, urls, images)
    if list_file is not None:
        wanted |= read_list(list_file)
    if not wanted:
        raise UsageError("Nothing to forget was named. Give --host, --url, --sha256, or --list FILE with some in it.")
    outcome = room.forget(work or Path(), wanted, dry_run=dry_run)
    if as_json:
        present.print_json({**asdict(outcome), "found": outcome.found, "dry_run": dry_run})
    else:
        print("\n".join(lines(outcome, dry_run=dry_run)))
    if not dry_run:
        present.say(
            "forget: later downloads into this folder refuse what was named (pairs/forgotten.json)", quiet=quiet
        )


def lines(outcome: Outcome, *, dry_run: bool) -> Iterator[str]:
    """What was removed, with denominators, and what a person still has to see to."""
    verb = "to remove" if dry_run else "removed"
    rows = [{"where": name, verb: number, "of": of} for name, (number, of) in outcome.removed.items()]
    yield present.table(rows, ("where", verb, "of"))
    if not outcome.found:
        yield "Nothing of this is here."
    for run in outcome.seen_by:
        if run.num_samples is None:
            yield f"{run.run} was trained on shards that are not here any more; it may have seen these samples:"
        else:
            yield f"{run.run} was trained on shards with {run.num_samples} of these samples:"
        yield from (f"  {path}" for path in run.checkpoints)
    if outcome.seen_by:
        yield "Runs are left as they are, and `clips train` does not go on with one whose shards have changed: train"
        yield "under another --name, or with --overwrite (`clips run` takes it, too) to train without these samples."
    if outcome.shown_in:
        yield "These files may still show them. Make them again with `clips eval --overwrite` and `clips report`:"
        yield from (f"  {path}" for path in outcome.shown_in)
    if outcome.originals:
        yield "These tars are your own and keep them; pairs/ has a copy without them in place of its link:"
        yield from (f"  {path}" for path in outcome.originals)
    yield from outcome.notes
