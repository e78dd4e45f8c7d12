"""The two sides of ``clips diff``: whatever holds captions about images, as rows of ``key``, ``sha256`` and texts.

A side is a caption column, a work folder with all its finished columns, or a folder of training shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import joined, ledger, measure, schema, shard_samples, stats
from clips_data.errors import UserError
from clips_data.shard_samples import Shards

if TYPE_CHECKING:
    import polars as pl

CAPTION: Final = "caption"
"""What the one column of a side is called that is a caption column; its folder's name would hide it from the other."""
TXT: Final = "txt"
"""The materialised mix of training shards."""
TEXT: Final = "text."
_NOT_COMPARED: Final = ("cost", "made_by", "bands", "by_host", "by_year")
"""Figures that ``clips stats`` has: costs are those of machines, the others say again what is compared anyway."""


@dataclass(frozen=True)
class Side:
    """One side. ``frames`` yields tables of ``key``, ``sha256`` and ``text.<column>``, "" where there is no caption.

    ``by_unit`` means that the shard number that a key begins with tells the frame that it is in. ``left_out`` names
    columns that are not finished for all shards.
    """

    where: Path
    kind: str
    columns: tuple[str, ...]
    units: tuple[str, ...]
    num_rows: int
    by_unit: bool
    left_out: tuple[str, ...] = ()
    shards: Shards | None = None
    """What ``where`` holds where it holds training shards."""

    def frame(self, unit: str) -> pl.DataFrame:
        """The rows of a unit, in no particular order; none where this side has no such unit."""
        import polars as pl

        if unit not in self._known:
            return pl.DataFrame(schema=self._schema())
        if self.shards is not None:
            return self._of_shard(self.shards, unit)
        return _texts(self.where / f"{unit}.parquet", CAPTION) if self.kind == schema.CAPTIONS else self._of_work(unit)

    def frames(self) -> Iterator[pl.DataFrame]:
        for unit in self.units:
            yield self.frame(unit)

    def figures(self) -> dict[str, float | int | str]:
        """What ``clips stats`` counts here, by dotted names."""
        found = stats.gather(self.where)
        if self.kind == schema.CAPTIONS:
            ((found, *_), *_) = (list(found[schema.CAPTIONS].values()),)
        return dict(_flat(found, leave_out=_NOT_COMPARED))

    def settings(self) -> dict[str, str]:
        """Who made it and how, by dotted names: what the tables' metadata and the sidecars say. Times are not in it.

        Where shards were made differently, the values are joined by ``|``.
        """
        if self.kind == schema.CAPTIONS:
            return _made(self.where, "")
        if self.shards is not None:
            return {**_made(self.where, "shards."), "mix": json.dumps(self.shards.index.get("mix"), sort_keys=True)}
        found = _made(self.where / schema.PAIRS, "pairs.")
        for column in self.columns:
            if column != joined.WEB:
                found |= _made(self.where / schema.CAPTIONS / column, f"{column}.")
        return found

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.units)

    def _schema(self) -> dict[str, type[pl.DataType]]:
        import polars as pl

        return dict.fromkeys(("key", "sha256", *(TEXT + column for column in self.columns)), pl.String)

    def _of_shard(self, shards: Shards, unit: str) -> pl.DataFrame:
        import polars as pl

        tar = shards.tars[self.units.index(unit)]
        rows = [
            (sample.key, sample.sha256, *sample.texts.values(), sample.text)
            for sample in shard_samples.read(shards, tar, images=False)
        ]
        return pl.DataFrame(rows, schema=self._schema(), orient="row")

    def _of_work(self, unit: str) -> pl.DataFrame:
        """The pairs that have an image, and what each column says of them."""
        import polars as pl

        path = self.where / schema.PAIRS / f"{unit}.parquet"
        table = joined.read_table(path).filter(pl.col("status") == schema.STATUS_SUCCESS)
        web = _trimmed("caption") if "caption" in table.columns else pl.lit("")
        table = table.select("key", "sha256", web.alias(TEXT + joined.WEB))
        for column in self.columns:
            if column != joined.WEB:
                file = self.where / schema.CAPTIONS / column / f"{unit}.parquet"
                table = table.join(_texts(file, column), on="key", how="left", suffix=".other", maintain_order="left")
                if len(wrong := table.filter(pl.col("sha256") != pl.col("sha256.other"))):
                    raise UserError(
                        f"{len(wrong)} of {len(table)} rows of {file} are about other images than {path}, the first "
                        f"has the key {wrong['key'][0]}. Make {file.name} again from these pairs."
                    )
                table = table.drop("sha256.other").with_columns(pl.col(TEXT + column).fill_null(""))
        return table


def open_side(folder: Path) -> Side:
    """What ``folder`` is, told by what it holds. Raises ``UserError`` for a folder of another kind."""
    if shard_samples.is_shards(folder):
        shards = shard_samples.open_shards(folder)
        units = tuple(tar.unit for tar in shards.tars)
        columns = (*shards.columns, TXT)
        return Side(folder, schema.SHARDS, columns, units, shards.num_samples, by_unit=False, shards=shards)
    units = tuple(ledger.finished_units(folder))
    if units and {"finish_reason", "key", "sha256"} <= set(_columns(folder, units[0])):
        return Side(folder, schema.CAPTIONS, (CAPTION,), units, _num_rows(folder, units), by_unit=True)
    if units := tuple(ledger.finished_units(folder / schema.PAIRS)):
        made, left_out = finished_columns(folder, units)
        num_rows = _num_rows(folder / schema.PAIRS, units)
        return Side(folder, schema.PAIRS, (joined.WEB, *made), units, num_rows, by_unit=True, left_out=left_out)
    raise UserError(
        f"{folder} holds nothing that `clips diff` compares. Name a caption column (captions/NAME), a work folder with "
        "finished pairs/, or a folder of finished training shards."
    )


def _columns(folder: Path, unit: str) -> list[str]:
    table = folder / f"{unit}.parquet"
    return list(measure.columns_of(table)) if table.exists() else []


def _num_rows(folder: Path, units: tuple[str, ...]) -> int:
    sidecars = (ledger.read_sidecar(folder, unit) for unit in units)
    return sum(sum(sidecar.counts.values()) for sidecar in sidecars if sidecar is not None)


def finished_columns(work: Path, units: tuple[str, ...]) -> tuple[list[str], tuple[str, ...]]:
    """The caption columns that all shards of the pairs have, and the others."""
    parent = work / schema.CAPTIONS
    names = sorted(path.name for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []
    whole = [name for name in names if set(units) <= set(ledger.finished_units(parent / name))]
    return whole, tuple(name for name in names if name not in whole)


def _trimmed(column: str) -> pl.Expr:
    import polars as pl

    return pl.col(column).cast(pl.String).fill_null("").str.strip_chars()


def _texts(file: Path, column: str) -> pl.DataFrame:
    """The usable captions of a table."""
    import polars as pl

    good = pl.when(pl.col("status") == schema.STATUS_SUCCESS).then(_trimmed("caption")).otherwise(pl.lit(""))
    return joined.read_table(file).select("key", "sha256", good.alias(TEXT + column))


def _made(folder: Path, prefix: str) -> dict[str, str]:
    import polars as pl

    values: dict[str, dict[str, None]] = {}
    for unit in ledger.finished_units(folder):
        sidecar = ledger.read_sidecar(folder, unit, check_files=False)
        assert sidecar is not None
        about = {f"config.{name}": value for name, value in _flat(sidecar.config)}
        about["tool_version"] = sidecar.tool_version
        if (table := folder / f"{unit}.parquet").exists():
            told = pl.read_parquet_metadata(table).items()
            about |= {name: _plain(text) for name, text in told if not name.startswith(("ARROW", "pandas"))}
        for name, value in about.items():
            values.setdefault(prefix + name, {})[str(value)] = None
    return {name: " | ".join(found) for name, found in values.items()}


def _plain(text: str) -> str:
    """A value of a table's metadata, which is JSON text where we wrote it; mappings and lists stay as they are."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(value, dict | list) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "", leave_out: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Nested mappings by dotted names; lists as JSON text."""
    for name, value in values.items():
        if name in leave_out:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.", leave_out)
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, list | tuple) else value
