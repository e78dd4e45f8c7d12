"""The table that scores of one shard are kept in: its columns, what its rows count as, how it is committed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import ledger, schema

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

MIN_SENTENCE, SENTENCES, FLAGS, SUPPORT = "_min_sentence", "_sentences", "_flags", "_support"
"""Endings of the fields beside that of a caption column, which has the column's own name."""
NO_LABEL: Final = "no_label"


def fields(columns: tuple[str, ...], *, sentences: bool, support: bool) -> dict[str, Any]:
    """Field → polars type, in the order of the table: the cosines of all columns, then what else is told of each."""
    import polars as pl

    found: dict[str, Any] = dict.fromkeys(columns, pl.Float32)
    for column in columns:
        if sentences:
            found |= {column + MIN_SENTENCE: pl.Float32, column + SENTENCES: pl.List(pl.Float32)}
        if support:
            found[column + SUPPORT] = pl.Float32
        found[column + FLAGS] = pl.List(pl.String)
    return found


def count(table: pa.Table) -> dict[str, int]:
    """Rows by outcome. Of similarities: ``ok``, ``caption_missing`` (in some column) and ``duplicate`` (of an image
    that repeats an earlier one, so that nothing was looked at). Of labels, which the table's metadata tells by a
    ``label_key``: ``ok``, ``no_label``.
    """
    import polars as pl

    rows = pl.DataFrame(pl.from_arrow(table)).drop("key", "sha256")
    nothing = rows.select(pl.all_horizontal(pl.all().is_null())).to_series()
    if b"label_key" in (table.schema.metadata or {}):
        found = {"ok": (~nothing).sum(), NO_LABEL: nothing.sum()}
    else:
        columns = [name.removesuffix(FLAGS) for name in rows.columns if name.endswith(FLAGS)]
        missing = rows.select(pl.any_horizontal(pl.col(columns).is_null())).to_series() & ~nothing
        found = {"ok": (~missing & ~nothing).sum(), "caption_missing": missing.sum(), "duplicate": nothing.sum()}
    return {name: int(number) for name, number in found.items() if number}


def commit(
    out: Path,
    unit: str,
    scores: pl.DataFrame,
    *,
    metadata: Mapping[str, str],
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
) -> dict[str, int]:
    """Writes and commits ``out/<unit>.parquet`` and returns its ``count``. ``metadata`` has JSON texts."""
    import pyarrow.parquet as pq

    about = {"clips_schema_version": str(schema.SCHEMA_VERSION), **metadata}
    table = _plain(scores.to_arrow()).replace_schema_metadata(about)
    counts = count(table)
    with ledger.readable_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, ledger.part(out / f"{unit}.parquet"))
        ledger.commit(out, unit, [f"{unit}.parquet"], inputs=inputs, config=config, counts=counts)
    return counts


def _plain(table: pa.Table) -> pa.Table:
    """Texts and lists by Arrow's plain types, which more readers know than the large ones."""
    import pyarrow as pa

    def plain(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_large_list(kind):
            return pa.list_(plain(kind.value_type))
        return pa.string() if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else kind

    return table.cast(pa.schema([(field.name, plain(field.type)) for field in table.schema]))
