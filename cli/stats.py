"""``clips stats``: what the sidecars under a work folder count, per folder."""

from __future__ import annotations

import json
from collections import Counter
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
        help=f"{summary}\n\nReads the sidecars only, so it is quick on any size.",
    )


def stats(work: Path | None, as_json: bool, debug: bool) -> None:
    from clips_data.errors import UserError

    root = work or Path()
    rows = folder_counts(root)
    if not rows:
        raise UserError(f"{root} holds no finished work. Point --work at the folder of a run.")
    if as_json:
        present.print_json(rows)
    else:
        shown = [{**row, "bytes": present.bytes_text(row["bytes"]), "outcomes": _outcomes(row)} for row in rows]
        print(present.table(shown, ("folder", "units", "rows", "bytes", "outcomes")))


def folder_counts(root: Path) -> list[dict[str, Any]]:
    """One row for every folder with sidecars: finished units, rows by outcome, and bytes of the files they name."""
    rows: dict[str, dict[str, Any]] = {}
    for path in sorted(root.rglob("*.done.json")):
        folder = path.parent.relative_to(root).as_posix()
        if folder.startswith("."):
            continue  # the stamps of `clips run`
        sidecar = json.loads(path.read_text())
        row = rows.setdefault(folder, {"folder": folder, "units": 0, "rows": 0, "bytes": 0, "counts": Counter()})
        row["units"] += 1
        row["rows"] += 0 if folder.startswith("runs/") else sum(sidecar["counts"].values())
        row["bytes"] += sum(file["bytes"] for file in sidecar["files"].values())
        row["counts"].update(sidecar["counts"])
    return list(rows.values())


def _outcomes(row: dict[str, Any]) -> str:
    if row["folder"].startswith("runs/"):  # steps and samples are no outcomes of rows
        return ", ".join(f"{number} {name}" for name, number in row["counts"].most_common())
    return ", ".join(f"{number} of {row['rows']} {name}" for name, number in row["counts"].most_common())
