"""Samples that people do not want: the list that ``clips shard --exclude`` takes.

It is what the gallery of ``clips report`` hands out, one JSON object a line with ``key``, ``sha256`` and ``mark``
(``flag`` or ``keep``), or a text with one key or one image sha256 a line, or a mixture. A line that has both a key and
a hash is about the sample that has both, so that a list from another download, which has other images under the same
keys, takes nothing away. Of several lines about one sample the last counts.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from clips_data import ledger, measure
from clips_data.errors import UserError

if TYPE_CHECKING:
    import polars as pl

FLAG, KEEP = MARKS = ("flag", "keep")
LABEL: Final = "exclude"
_KEY: Final = re.compile(r"[0-9]{1,40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_JOINED: Final = " "
_FORMS: Final = 'Each line is a key, an image\'s sha256, or {"key": …, "sha256": …, "mark": "flag" or "keep"}.'


class Named(NamedTuple):
    """How a line names a sample: by its key, its image's hash, or both; "" where it does not say."""

    key: str
    sha256: str


@dataclass(frozen=True)
class Exclude:
    """Leaves out the samples that the list at ``path`` flags."""

    path: Path
    digest: str

    @property
    def labels(self) -> tuple[str]:
        return (f"{LABEL} {self.path.name}",)

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def judge(self, view: pl.DataFrame) -> pl.Series:
        """1 for rows that are listed, else 0."""
        import polars as pl

        return view.select(_listed(read(self.path, self.digest)).cast(pl.UInt8)).to_series()

    def tell(self, view: pl.DataFrame) -> pl.DataFrame:
        return view.select("sha256")


def find(path: Path) -> Exclude:
    """The filter of this list. Raises ``UserError`` where it cannot be read."""
    found = Exclude(path, file_digest(path))
    read(path, found.digest)
    return found


def read(path: Path, digest: str | None = None) -> tuple[Named, ...]:
    """What the list flags, in order; kept in memory for the next call.

    Raises ``UserError`` with the line where it makes no sense, or when it is no longer the file of this ``digest``.
    """
    found = file_digest(path)
    if digest not in (None, found):
        raise UserError(f"{path} was changed while it was in use. Run the command again.")
    return _read(path, found)


def file_digest(path: Path) -> str:
    """Identifies the list's content."""
    try:
        return ledger.digest_file(path)
    except OSError as error:
        raise UserError(f"Cannot read --exclude {path}: {error.strerror}. {_FORMS}") from None


def num_unknown(path: Path, pairs: Path, units: Sequence[str]) -> tuple[int, int]:
    """How many of the flagged samples none of these shards of ``pairs`` has, and how many are flagged."""
    import polars as pl

    flagged = read(path)
    rows = measure.scan(pairs, units, dict.fromkeys(("key", "sha256"), pl.String))
    (found,) = measure.collect(pairs, rows.with_columns(pl.col("sha256").fill_null("")).filter(_listed(flagged)))
    keys, images = set(found["key"]), set(found["sha256"])
    both = set(zip(found["key"], found["sha256"], strict=True))
    known = sum(
        one in both if one.key and one.sha256 else one.key in keys or (bool(one.sha256) and one.sha256 in images)
        for one in flagged
    )
    return len(flagged) - known, len(flagged)


def _listed(flagged: Sequence[Named]) -> pl.Expr:
    """Whether a row is one of these."""
    import polars as pl

    keys = [one.key for one in flagged if not one.sha256]
    images = [one.sha256 for one in flagged if not one.key]
    both = [_JOINED.join(one) for one in flagged if one.key and one.sha256]
    row = pl.concat_str("key", "sha256", separator=_JOINED)
    return pl.any_horizontal(
        expression.is_in(pl.Series(names, dtype=pl.String).implode())
        for expression, names in ((pl.col("key"), keys), (pl.col("sha256"), images), (row, both))
    ).fill_null(False)


@functools.lru_cache(maxsize=2)
def _read(path: Path, digest: str) -> tuple[Named, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--exclude {path} is not UTF-8 (byte {error.start}). {_FORMS}") from None
    marks: dict[Named, str] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line := line.strip():
            try:
                named, mark = _marked(json.loads(line) if line.startswith("{") else line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"--exclude {path} line {number}: {error}. {_FORMS}") from None
            marks[named] = mark
    if not marks:
        raise UserError(f"--exclude {path} lists nothing. {_FORMS}")
    return tuple(named for named, mark in marks.items() if mark == FLAG)


def _marked(line: Any) -> tuple[Named, str]:
    """Raises ``ValueError`` for a line that names no sample or has another mark."""
    if isinstance(line, str):
        if _SHA256.fullmatch(line.lower()):
            return Named("", line.lower()), FLAG
        if _KEY.fullmatch(line):
            return Named(line, ""), FLAG
        raise ValueError(f"{line[:60]!r} is neither a key nor a sha256")
    named = Named(_text_of(line, "key"), _text_of(line, "sha256").lower())
    mark = line.get("mark", FLAG)
    if mark not in MARKS:
        raise ValueError(f"the mark {str(mark)[:60]!r} is neither {FLAG} nor {KEEP}")
    if not any(named):
        raise ValueError("it has neither a key nor a sha256")
    if (named.key and not _KEY.fullmatch(named.key)) or (named.sha256 and not _SHA256.fullmatch(named.sha256)):
        raise ValueError(f"{named.key[:60]!r} and {named.sha256[:70]!r} are no key and no sha256")
    return named, mark


def _text_of(line: dict[str, Any], name: str) -> str:
    value = line.get(name) or ""
    if not isinstance(value, str):
        raise ValueError(f"its {name} is no text")
    return value
