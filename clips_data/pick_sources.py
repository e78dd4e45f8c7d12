"""What ``clips sample`` picks from: a work folder or training shards, one table a shard, and the images afterwards.

A table has ``key``, ``sha256``, ``url``, a struct for each caption column (``caption``, ``code``, ``flags``,
``num_chars``, …), a struct ``score`` and, in a work folder, all else that ``--where`` sees.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from clips_data import filters, joined, ledger, schema, shard_samples, tars
from clips_data.diff_sides import finished_columns
from clips_data.errors import UserError
from clips_data.shard_samples import Shards

if TYPE_CHECKING:
    import polars as pl

    from clips_data.joined import Inputs

SCORE: Final = "score"
_DEFAULT_SCORES: Final = "clip"
_SOME_ROWS: Final = 1000


@dataclass(frozen=True)
class Image:
    """The image of a sample, and what only its place tells: the file it is in, and what shards add."""

    data: bytes
    place: Path
    about: Mapping[str, Any]
    """The ``.json`` member in shards; nothing in a work folder."""


class Source(Protocol):
    """Where samples come from."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The caption columns."""
        ...

    @property
    def units(self) -> tuple[str, ...]: ...

    def known(self) -> pl.DataFrame:
        """Some rows with all columns that the table of any unit has."""
        ...

    def table(self, unit: str) -> pl.DataFrame: ...

    def images(self, unit: str, keys: Sequence[str]) -> dict[str, Image]:
        """The images of these samples of a unit, by key."""
        ...


def open_source(folder: Path) -> Source:
    """Raises ``UserError`` for a folder of another kind."""
    if shard_samples.is_shards(folder):
        return ShardsSource(shard_samples.open_shards(folder))
    units = tuple(ledger.finished_units(folder / schema.PAIRS))
    if not units:
        raise UserError(
            f"{folder} holds no finished pairs/ and is no folder of training shards. Name a work folder or its shards/."
        )
    columns = (joined.WEB, *finished_columns(folder, units)[0])
    given = joined.open_inputs(folder, columns, scores=_finished_scores(folder, units), units=units)
    return WorkSource(given, columns)


def _finished_scores(work: Path, units: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the scores that all shards have, the default ones first: these are what ``score`` means."""
    parent = work / schema.SCORES
    names = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    whole = [name for name in names if set(units) <= set(ledger.finished_units(parent / name))]
    return tuple(sorted(whole, key=lambda name: name != _DEFAULT_SCORES))


# --- a work folder ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkSource:
    """Pairs with their finished columns and scores."""

    given: Inputs
    columns: tuple[str, ...]

    @property
    def units(self) -> tuple[str, ...]:
        return self.given.units

    def known(self) -> pl.DataFrame:
        """Lists differ in their columns, and labels in their fields."""
        some: dict[tuple[Any, ...], pl.DataFrame] = {}
        for unit in self.units:
            kind = filters.kind_of(self.given, unit)
            if kind not in some or some[kind].is_empty():
                some[kind] = self.table(unit).head(_SOME_ROWS)
        return functools.reduce(filters.alike, some.values())

    def table(self, unit: str) -> pl.DataFrame:
        import polars as pl

        view = self.given.view(unit)
        kind = view.schema[schema.PAIRS]
        assert isinstance(kind, pl.Struct)
        has_url = "url" in {field.name for field in kind.fields}
        url = pl.col(schema.PAIRS).struct.field("url").cast(pl.String) if has_url else pl.lit(None, pl.String)
        return view.with_columns(url.alias("url"))

    def images(self, unit: str, keys: Sequence[str]) -> dict[str, Image]:
        import polars as pl

        table = self.given.table(unit).filter(pl.col("key").is_in(list(keys)))
        place = self.given.pairs / f"{unit}.tar"
        data = joined.read_images(self.given.pairs, unit, table)
        return {key: Image(image, place, {}) for key, image in zip(table["key"], data, strict=True)}


# --- training shards --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardsSource:
    """Training shards, whose ``.json`` members say less than the tables they were made from: no flags, no sizes."""

    shards: Shards

    @property
    def columns(self) -> tuple[str, ...]:
        return self.shards.columns

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(tar.unit for tar in self.shards.tars)

    def known(self) -> pl.DataFrame:
        """Samples were shuffled over the tars, so the first tar has what there is."""
        return self.table(self.units[0])

    def table(self, unit: str) -> pl.DataFrame:
        import polars as pl

        tar = self.shards.tars[self.units.index(unit)]
        rows = [self._row(sample) for sample in shard_samples.read(self.shards, tar, images=False)]
        return pl.DataFrame(rows, infer_schema_length=None, strict=False)

    def _row(self, sample: shard_samples.TrainingSample) -> dict[str, Any]:
        captions = {
            column: {
                "caption": text,
                "code": sample.codes.get(column, "ok" if text else "empty"),
                "num_chars": len(text),
                "num_words": len(text.split()),
            }
            for column, text in sample.texts.items()
        }
        url = sample.provenance.get("url")
        return {"key": sample.key, "sha256": sample.sha256, "url": url, **captions, SCORE: sample.scores or None}

    def images(self, unit: str, keys: Sequence[str]) -> dict[str, Image]:
        import polars as pl

        path = self.shards.folder / f"{unit}.tar"
        offsets = joined.read_table(self.shards.folder / f"{unit}.index.parquet")
        found = {}
        with tars.open_tar(path) as file:
            for row in offsets.filter(pl.col("key").is_in(list(keys))).iter_rows(named=True):
                data = tars.read_at(file, path, row["image_offset"], row["image_bytes"])
                about = json.loads(tars.read_at(file, path, row["json_offset"], row["json_bytes"]))
                found[row["key"]] = Image(joined.check_image(data, path, row["key"], row["sha256"]), path, about)
        return found
