"""Files that a list names: its JSON, and the images that have to lie where it says.

A list may come from anywhere. It must not read what is not the data set's, and a file that is missing stops the
evaluation before it starts: figures of half a benchmark are not the benchmark's.
"""

from __future__ import annotations

import functools
import json
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from clips_data.errors import UserError
from clips_train.use_config import Benchmark

SHOWN: Final = 5
SHOWN_CHARS: Final = 200


@dataclass(frozen=True)
class Sized:
    """Reads an image. ``num_bytes`` is its size when it was found: another image is hardly ever as large."""

    read: Callable[[], bytes]
    num_bytes: int

    def __call__(self) -> bytes:
        return self.read()


def readers(root: Path, files: Iterable[str], source: Path) -> dict[str, Callable[[], bytes]]:
    """File → what reads its bytes, one for each file of ``root`` however often it is listed in ``source``.

    Raises ``UserError`` for paths that lead out of ``root``, and where files are missing.
    """
    wanted = list(dict.fromkeys(files))
    for file in wanted:
        path = PurePosixPath(file)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
            raise UserError(
                f"{source} lists {file[:SHOWN_CHARS]!r}, which does not lie in {root}. Write paths inside it."
            )
    size_of = {file: _size(root / file) for file in wanted}
    missing = [file for file, size in size_of.items() if size is None]
    if missing:
        shown = ", ".join(
            repr(file[:SHOWN_CHARS])[1:-1] for file in missing[:SHOWN]
        )  # control characters stay inert in a terminal
        raise UserError(
            f"{len(missing)} of the {len(wanted)} images that {source} lists are not in {root}: "
            f"{shown}{', …' if len(missing) > SHOWN else ''}. "
            "Complete them, or name the folder that holds them as the data."
        )
    return {
        file: Sized(functools.partial(Path.read_bytes, root / file), size)
        for file, size in size_of.items()
        if size is not None
    }


def _size(path: Path) -> int | None:
    """``None`` where there is no such file, or none can have that name."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_size if stat.S_ISREG(about.st_mode) else None


def only_list(benchmark: Benchmark, lists_in: Callable[[Path], Sequence[Path]], wanted: str) -> Path:
    """The file of texts: the one that ``annotations`` or ``data`` names, else the one that ``lists_in`` finds.

    ``wanted`` says how such files are named. Raises ``UserError`` where there is none, or where there are several.
    """
    if benchmark.annotations is not None:
        return Path(benchmark.annotations)
    root = Path(benchmark.data)
    if root.is_file():
        return root
    lists = lists_in(root)
    if len(lists) != 1:
        found = "these: " + ", ".join(path.name for path in lists[:5]) if lists else "none"
        raise UserError(f"{root} should have one list {wanted}, but has {found}. Name the list with annotations.")
    return lists[0]


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


def check_unicode(texts: Iterable[str], where: str) -> None:
    """Raises ``UserError`` for a text with half of a surrogate pair, which JSON can hold and no tokenizer reads."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where} has a text that is no Unicode ({error.reason}): {text[:80]!r}. Mend it."
            ) from None


def strings(row: Any, names: Iterable[str], where: str) -> list[str]:
    """The texts of a row under ``names``. Raises ``UserError`` for one that is missing, blank or no text."""
    values: list[str] = []
    for name in names:
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where} has no text under {name!r}.")
        check_unicode([value], where)
        values.append(value)
    return values
