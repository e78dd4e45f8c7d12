"""``clips verify``: every finished file is hashed again and compared with what its sidecar promised."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from . import present
from .options import LazyCommand, common_options


def build(name: str, summary: str) -> click.Command:
    about = (
        "Prints the files that are missing, cut, changed or named by no sidecar. Exit code 1 when a promised file is "
        "not what was committed."
    )
    return LazyCommand(
        name,
        callback=verify,
        parameters=lambda: [
            click.Option(
                ["--gc"], is_flag=True, help="Remove the files of killed runs. Not while a stage is at work there."
            ),
            *common_options(("work", "json", "debug", "quiet")),
        ],
        example="clips verify --work quickstart",
        help=f"{summary}\n\n{about}",
    )


def verify(work: Path | None, gc: bool, as_json: bool, debug: bool, quiet: bool) -> None:
    from clips_data import verify as room
    from clips_data.errors import UserError

    found = room.verify(work or Path(), gc=gc)
    if as_json:
        present.print_json({**asdict(found), "num_intact": found.num_intact})
    else:
        for file, problem in found.corrupt.items():
            print(f"{file}: {problem}")
        for file in found.orphans:
            print(f"{file}: {'removed' if file in found.removed else 'is named by no sidecar'}")
    size = present.bytes_text(found.num_bytes)
    present.say(f"verify: {found.num_intact} of {found.num_files} files intact, {size}", quiet=quiet)
    if found.corrupt:
        raise UserError(
            f"{len(found.corrupt)} of {found.num_files} files are not what was committed. Restore them, or delete "
            "their .done.json and run the stage again."
        )
