"""Rows of JSON, JSON-lines, CSV and TSV files, one after the other, so that a list of any size can be begun.

ShareGPT4V's list has 1.5 GB, of which the protocol takes the first thousand rows; Karpathy's of COCO has 140 MB.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TextIO

from clips_data.errors import UserError

SUFFIXES: Final = (".json", ".jsonl", ".jsonlines", ".csv", ".tsv")
CHUNK_CHARS: Final = 1 << 20
MAX_ROW_CHARS: Final = 1 << 26
"""No row of a list comes near this."""
AFTER_VALUE: Final = frozenset(",:]} \t\r\n")
Row = dict[str, Any]


def rows(path: Path, under: str = "images") -> Iterator[Row]:
    """The objects of a list, or of the one ``under`` this name where the file holds an object.

    Raises ``UserError`` for a file that is not there, not what its name says, or has rows that are no objects.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there. Name the list of images and texts with annotations.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(_READERS[path.suffix](file, under), start=1):
                if not isinstance(row, dict):
                    raise ValueError(f"row {number} is no object with names")
                yield row
    except KeyError:
        raise UserError(f"{path} is no list that clips reads; those end in {', '.join(SUFFIXES)}.") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as {path.suffix[1:]}: {error}. Restore or mend the file.") from None


def _json_lines(file: TextIO, under: str) -> Iterator[Any]:
    while line := file.readline(MAX_ROW_CHARS):
        if line.strip():
            yield json.loads(line)


def _separated(separator: str) -> Any:
    def read(file: TextIO, under: str) -> Iterator[Any]:
        csv.field_size_limit(MAX_ROW_CHARS)
        reader = csv.DictReader(file, delimiter=separator, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"line {reader.line_num} has not as many fields as the first line")
            yield row

    return read


def _json(file: TextIO, under: str) -> Iterator[Any]:
    text = _Text(file)
    if text.next_char() == "[":
        yield from _elements(text)
    else:
        yield from _elements_under(text, under)
    if text.next_char():
        raise ValueError(f"more follows after character {text.place}")


def _elements_under(text: _Text, under: str) -> Iterator[Any]:
    text.take("{")
    found = False
    while text.next_char() != "}":
        name = text.value()
        text.take(":")
        if name == under and text.next_char() == "[":
            found = True
            yield from _elements(text)
        else:
            text.value()
        if text.next_char() != "}":
            text.take(",")
    text.take("}")
    if not found:
        raise ValueError(f"it is neither a list nor an object with a list {under!r}")


def _elements(text: _Text) -> Iterator[Any]:
    text.take("[")
    while text.next_char() != "]":
        yield text.value()
        if text.next_char() != "]":
            text.take(",")
    text.take("]")


class _Text:
    """A JSON text of which only what is being looked at is in memory."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at, self._before = "", 0, 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    @property
    def place(self) -> int:
        return self._before + self._at

    def next_char(self) -> str:
        """The next one that is no white space, which stays; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, char: str) -> None:
        if (found := self.next_char()) != char:
            raise ValueError(f"at character {self.place} is {found!r} and not {char!r}")
        self._at += 1

    def value(self) -> Any:
        self.next_char()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # What was read may end within a number: "1" of "12", or "1." of "1.5".
                if self._text[end : end + 1] in AFTER_VALUE or not self._more():
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if not self._more():
                    raise ValueError(f"{error.msg} at character {self._before + error.pos}") from None

    def _more(self) -> bool:
        """Reads as much again as is there already, so that a long value is not parsed too often."""
        if self._ended:
            return False
        rest = self._text[self._at :]
        if len(rest) > MAX_ROW_CHARS:
            raise ValueError(f"the value at character {self.place} has no end within {MAX_ROW_CHARS} characters")
        chunk = self._file.read(max(CHUNK_CHARS, len(rest)))
        self._before += self._at
        self._text, self._at = rest + chunk, 0
        self._ended = not chunk
        return not self._ended


_READERS: Final = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".jsonlines": _json_lines,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
}
