"""``clips verify``: every finished file is hashed again and compared with what its sidecar promised."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import present
from .options import LazyCommand, common_options

if TYPE_CHECKING:
    from clips_data.verify import Verified

_SHARDS_SHOWN = 5


def build(name: str, summary: str) -> click.Command:
    about = (
        "Prints the files that are missing, cut, changed or named by no sidecar, with the first damaged byte, member "
        "or row group, and where intact files contradict each other: tables and their tars, columns or scores and the "
        "pairs, training shards and their indexes. Exit code 1 when a promised file is not what was committed, or "
        "contradicts another one."
    )
    return LazyCommand(
        name,
        callback=verify,
        parameters=lambda: [
            click.Option(
                ["--deep"],
                is_flag=True,
                help="Also compare every image in the tars with its sha256, and texts of training shards with their "
                "JSON. Reads every tar twice.",
            ),
            click.Option(
                ["--gc"], is_flag=True, help="Remove what killed runs left; refused while a stage is at work there."
            ),
            *common_options(("work", "processes", "json", "debug", "quiet")),
        ],
        example="clips verify --work quickstart --processes 2",
        help=f"{summary}\n\n{about}",
    )


def verify(
    work: Path | None, deep: bool, gc: bool, processes: int | None, as_json: bool, debug: bool, quiet: bool
) -> None:
    from clips_data import verify as room
    from clips_data.errors import UserError

    found = room.verify(work or Path(), gc, deep=deep, processes=processes or 1, quiet=quiet)
    if as_json:
        present.print_json({**asdict(found), "num_intact": found.num_intact, "is_sound": found.is_sound})
    else:
        print("".join(f"{line}\n" for line in _lines(found)), end="")
    size = present.bytes_text(found.num_bytes)
    present.say(f"verify: {found.num_intact} of {found.num_files} files intact, {size}", quiet=quiet)
    if not found.is_sound:
        raise UserError(_what_next(found))


def _lines(found: Verified) -> list[str]:
    contradictions = [f"{file}: {text}" for file, texts in found.contradictions.items() for text in texts]
    missing = [
        f"{folder}: {len(units)} not finished yet ({', '.join(units[:_SHARDS_SHOWN])}"
        f"{', …' if len(units) > _SHARDS_SHOWN else ''})"
        for folder, units in found.missing.items()
    ]
    return [
        *(f"{file}: {problem}" for file, problem in found.corrupt.items()),
        *contradictions,
        *(f"{file}: {text}" for file, text in found.stale.items()),
        *missing,
        *(f"{file}: {'removed' if file in found.removed else 'is named by no sidecar'}" for file in found.orphans),
    ]


def _what_next(found: Verified) -> str:
    said = []
    if found.corrupt:
        said.append(
            f"{len(found.corrupt)} of {found.num_files} files are not what was committed. Restore them, or delete "
            "their .done.json and run the stage again."
        )
    if found.contradictions:
        said.append(
            f"{len(found.contradictions)} files contradict others, though each is what was committed. Delete the "
            ".done.json of the one that is wrong and run its stage again."
        )
    return " ".join(said)
