"""``clips stats``: what a work folder holds, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from . import present
from .options import LazyCommand, common_options


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=stats,
        parameters=lambda: common_options(("work", "json", "debug")),
        example="clips stats --work quickstart",
        help=f"{summary}\n\nReads tables and sidecars of finished shards, no images.",
    )


def stats(work: Path | None, as_json: bool, debug: bool) -> None:
    from clips_data.errors import UserError
    from clips_data.stats import gather

    root = work or Path()
    found = gather(root)
    if not found:
        raise UserError(f"{root} holds no finished work. Point --work at the folder of a run.")
    if as_json:
        present.print_json(found)
    else:
        print("\n".join(indented(found)))


def indented(values: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Nested counts as indented lines; successes and failures carry the number of attempts as their denominator."""
    attempted = values.get("attempted")
    width = max((len(name) for name, value in values.items() if not isinstance(value, Mapping)), default=0)
    for name, value in values.items():
        if isinstance(value, Mapping):
            if value:
                yield "  " * depth + name
                nested = {f"{code} (of {attempted})": number for code, number in value.items()}
                yield from indented(nested if name == "failures" else value, depth + 1)
        else:
            of = f" of {attempted}" if name == "succeeded" else ""
            text = "-" if value is None else present.figure(value)
            yield "  " * depth + f"{name:<{width}}  {text}{of}"
