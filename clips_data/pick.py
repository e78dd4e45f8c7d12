"""``clips sample``: a few samples to look at, drawn by seed, worst by a score, longest or flagged.

The data are read shard by shard, and only the samples that lead so far are kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from clips_data import draws, filters, joined, pick_sources
from clips_data.errors import UserError, did_you_mean
from clips_data.expressions import Expression, compiled
from clips_data.pick_sources import Source
from clips_data.redact import redact

if TYPE_CHECKING:
    import polars as pl

By = Literal["random", "worst", "longest", "flagged"]
BYS: Final[tuple[By, ...]] = ("random", "worst", "longest", "flagged")
_PURPOSE: Final = "sample"
_VALUE: Final = "value"
_OK: Final = "ok"
_NOT_ASKED: Final = "duplicate"
"""Code of rows whose image was captioned under another key, which says nothing against them."""


@dataclass(frozen=True)
class Wanted:
    """What to pick. ``column`` is the caption column that it is about, by default the first one that was made.

    ``score`` is an expression over the joined table by whose lowest numbers ``worst`` goes, by default the score of
    ``column``; ``where`` are conditions as those of ``clips shard``.
    """

    num: int = 24
    seed: int = 0
    by: By = "random"
    score: str | None = None
    column: str | None = None
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picked:
    """One sample. ``captions`` has ``caption``, ``code`` and ``flags`` for each column; ``value`` is what it went by.

    ``place`` is the file that the image is in. ``sub_captions`` (character offsets) and ``txt`` (the column that the
    materialised mix took) are there where shards have them.
    """

    key: str
    sha256: str
    url: str | None
    place: Path
    captions: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, Any]
    value: float | int | None
    image: bytes
    sub_captions: Mapping[str, list[list[int]]]
    txt: str | None


@dataclass
class Picks:
    """The samples, the best fitting first. ``num_rows`` were read, ``num_left`` of them left by ``where``, and
    ``num_fitting`` of these have what was asked for: a score, a caption, a flag. ``by`` says it in words."""

    by: str
    samples: list[Picked] = field(default_factory=list)
    num_rows: int = 0
    num_left: int = 0
    num_fitting: int = 0


def pick(folder: Path, wanted: Wanted) -> Picks:
    """Reads ``folder``, a work folder or one of training shards, and picks from it. Same folder and seed, same samples.

    Raises ``UserError`` for a folder, a column, a score or an expression that is not there.
    """
    source = pick_sources.open_source(folder)
    if not source.units:
        raise UserError(f"{folder} holds no samples to pick from.")
    column = _column(wanted, source, folder)
    rules = _Rules.of(wanted, column, source.known())
    picks = Picks(rules.in_words(wanted))
    best: list[tuple[float, str, str, dict[str, Any]]] = []
    for unit in source.units:
        table = source.table(unit)
        picks.num_rows += len(table)
        left = rules.left(filters.alike(rules.known.clear(), table))
        picks.num_left += len(left)
        fitting = rules.fitting(left)
        picks.num_fitting += len(fitting)
        best = heapq.nsmallest(wanted.num, [*best, *_ranked(fitting, unit, wanted)], key=lambda one: one[:2])
    picks.samples = _with_images(source, best)
    return picks


def _column(wanted: Wanted, source: Source, folder: Path) -> str:
    if wanted.column is None:
        return next((name for name in source.columns if name != joined.WEB), joined.WEB)
    if wanted.column not in source.columns:
        raise UserError(
            f"{folder} has no finished caption column {wanted.column!r}. {did_you_mean(wanted.column, source.columns)}"
        )
    return wanted.column


# --- which rows fit, and in which order -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rules:
    """Which rows are left and fit. ``known`` has no rows."""

    by: By
    column: str
    known: pl.DataFrame
    conditions: tuple[Expression, ...]
    score: Expression | None

    @classmethod
    def of(cls, wanted: Wanted, column: str, known: pl.DataFrame) -> _Rules:
        """Raises ``UserError`` for an expression that makes no sense, naming what is known."""
        conditions = [compiled(text, known, option="--where", kind="condition") for text in wanted.where]
        score = None
        if wanted.by == "worst":
            if wanted.score is None and pick_sources.SCORE not in known.columns:
                raise UserError("There are no scores here to find the worst by. Run `clips score`, or name a --score.")
            text = wanted.score or f"{pick_sources.SCORE}.{column}"
            score = compiled(text, known, option="--score", kind="number")
        return cls(wanted.by, column, known.clear(), tuple(conditions), score)

    def in_words(self, wanted: Wanted) -> str:
        return {
            "random": f"drawn by seed {wanted.seed}",
            "worst": f"lowest {self.score.text if self.score else ''}",
            "longest": f"longest {self.column} captions, in characters",
            "flagged": f"flagged or rejected {self.column} captions, drawn by seed {wanted.seed}",
        }[self.by]

    def left(self, table: pl.DataFrame) -> pl.DataFrame:
        for condition in self.conditions:
            table = table.filter(condition.values(table).fill_null(False))
        return table

    def fitting(self, table: pl.DataFrame) -> pl.DataFrame:
        """The rows that have what is asked for, with ``value``, the number that they go by (null where drawn)."""
        import polars as pl

        about = pl.col(self.column).struct
        if self.score is not None:
            value = self.score.values(table).fill_nan(None)
            return table.with_columns(value.alias(_VALUE)).filter(pl.col(_VALUE).is_not_null())
        if self.by == "longest":
            return table.with_columns(about.field("num_chars").alias(_VALUE)).filter(pl.col(_VALUE) > 0)
        if self.by == "flagged":
            rejected = ~about.field("code").is_in([_OK, _NOT_ASKED])
            kind = self.known.schema[self.column]
            assert isinstance(kind, pl.Struct)
            has_flags = "flags" in {field.name for field in kind.fields}
            flagged = about.field("flags").list.len() > 0 if has_flags else pl.lit(False)
            table = table.filter((rejected | flagged).fill_null(False))
        return table.with_columns(pl.lit(None, pl.Float64).alias(_VALUE))


def _ranked(table: pl.DataFrame, unit: str, wanted: Wanted) -> Iterator[tuple[float, str, str, dict[str, Any]]]:
    """``(rank, key, unit, row)`` of the rows that can be among the best: lowest rank first, then lowest key."""
    import polars as pl

    if wanted.by in ("random", "flagged"):
        drawn = [draws.uniform(wanted.seed, _PURPOSE, 0, key) for key in table["key"]]
        ranks = pl.Series("rank", drawn, pl.Float64)
    else:
        ranks = table[_VALUE].cast(pl.Float64) * (-1 if wanted.by == "longest" else 1)
    lowest = table.with_columns(ranks.alias("rank")).sort("rank", "key").head(wanted.num)
    for row in lowest.iter_rows(named=True):
        yield row["rank"], row["key"], unit, row


# --- the samples ------------------------------------------------------------------------------------------------------


def _with_images(source: Source, best: list[tuple[float, str, str, dict[str, Any]]]) -> list[Picked]:
    keys_of: dict[str, list[str]] = {}
    for _, key, unit, _ in best:
        keys_of.setdefault(unit, []).append(key)
    images = {(unit, key): image for unit, keys in keys_of.items() for key, image in source.images(unit, keys).items()}
    return [_picked(source, row, images[unit, key]) for _, key, unit, row in best]


def _picked(source: Source, row: Mapping[str, Any], image: pick_sources.Image) -> Picked:
    return Picked(
        key=row["key"],
        sha256=row["sha256"],
        url=redact(row["url"]) if row["url"] else None,
        place=image.place,
        captions={column: _caption(row[column]) for column in source.columns},
        scores={name: value for name, value in (row.get(pick_sources.SCORE) or {}).items() if value is not None},
        value=row[_VALUE],
        image=image.data,
        sub_captions=image.about.get("sub_captions", {}),
        txt=image.about.get("provenance", {}).get("txt"),
    )


def _caption(about: Mapping[str, Any]) -> dict[str, Any]:
    """A rejected caption shows what the model said, where the table has it."""
    found = {"caption": about["caption"] or "", "code": about.get("code") or _OK, "flags": about.get("flags") or []}
    if not found["caption"] and about.get("raw"):
        found["raw"] = about["raw"]
    return found
