"""``clips verify``: every finished file is hashed again and compared with what its sidecar promised."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from . import present
from .options import LazyCommand, common_options


def build(name: str, summary: str) -> click.Command:
    about = "Exit code 1 and the names of the files when something is missing, cut or changed."
    return LazyCommand(
        name,
        callback=verify,
        parameters=lambda: common_options(("work", "json", "debug", "quiet")),
        example="clips verify --work quickstart",
        help=f"{summary}\n\n{about}",
    )


def verify(work: Path | None, as_json: bool, debug: bool, quiet: bool) -> None:
    from clips_data.errors import UserError

    root = work or Path()
    num_files, num_bytes, problems = 0, 0, []
    for file, about in promised_files(root):
        num_files += 1
        problem = problem_with(file, about)
        if problem:
            problems.append(f"{file}: {problem}")
        else:
            num_bytes += int(about["bytes"])
    if not num_files:
        raise UserError(f"{root} holds no finished work. Point --work at the folder of a run.")
    num_intact = num_files - len(problems)
    if as_json:
        present.print_json({"files": num_files, "intact": num_intact, "bytes": num_bytes, "problems": problems})
    else:
        for problem in problems:
            print(problem)
    present.say(f"verify: {num_intact} of {num_files} files intact, {present.bytes_text(num_bytes)}", quiet=quiet)
    if problems:
        raise UserError(
            f"{len(problems)} of {num_files} files are not what was committed. Restore them, or delete their "
            ".done.json and run the stage again."
        )


def promised_files(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(file, {"bytes", "sha256"}) of every file that a sidecar under ``root`` names."""
    import json

    for sidecar in sorted(root.rglob("*.done.json")):
        for name, about in sorted(json.loads(sidecar.read_text())["files"].items()):
            yield sidecar.parent / name, about


def problem_with(file: Path, about: dict[str, Any]) -> str | None:
    from clips_data.ledger import digest_file

    if not file.is_file():
        return "missing"
    if file.stat().st_size != about["bytes"]:
        return f"has {file.stat().st_size} bytes instead of {about['bytes']}"
    return None if digest_file(file) == about["sha256"] else "its content has changed"
