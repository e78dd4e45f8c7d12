"""Files that a list names: its JSON, and the images that have to lie where it says.

A list may come from anywhere. It must not read what is not the data set's, and a file that is missing stops the
evaluation before it starts: figures of half a benchmark are not the benchmark's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Final

from clips_data.errors import UserError

SHOWN: Final = 5


def readers(root: Path, files: Iterable[str], source: Path) -> dict[str, Callable[[], bytes]]:
    """File → what reads its bytes, one for each file of ``root`` however often it is listed in ``source``.

    Raises ``UserError`` for paths that lead out of ``root``, and where files are missing.
    """
    found: dict[str, Callable[[], bytes]] = {
        file: functools.partial(Path.read_bytes, root / file) for file in dict.fromkeys(files)
    }
    for file in found:
        path = PurePosixPath(file)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
            raise UserError(f"{source} lists {file!r}, which does not lie in {root}. Write paths inside it.")
    missing = [file for file in found if not (root / file).is_file()]
    if missing:
        shown = ", ".join(repr(file)[1:-1] for file in missing[:SHOWN])  # control characters stay inert in a terminal
        raise UserError(
            f"{len(missing)} of the {len(found)} images that {source} lists are not in {root}: "
            f"{shown}{', …' if len(missing) > SHOWN else ''}. "
            "Complete them, or name the folder that holds them as the data."
        )
    return found


def text_of(path: Path) -> str:
    """Raises ``UserError`` where there is no UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} could not be read as UTF-8 text ({error}).") from None


def json_of(path: Path) -> Any:
    """Of a ``.jsonl``, the list of its lines. Raises ``UserError`` where there is no JSON."""
    text = text_of(path)
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}).") from None


def strings(row: Any, names: Iterable[str], where: str) -> list[str]:
    """The texts of a row under ``names``. Raises ``UserError`` for one that is missing, blank or no text."""
    values: list[str] = []
    for name in names:
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where} has no text under {name!r}.")
        values.append(value)
    return values
