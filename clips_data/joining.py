"""Two tables about the same images, joined by key and checked against each other.

A row that is missing on one side, or that speaks of another image, is a ``UserError`` with its key named.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_data.errors import UserError

if TYPE_CHECKING:
    import polars as pl


def join(table: pl.DataFrame, other: pl.DataFrame, where: Path, file: Path) -> pl.DataFrame:
    """``table`` (read from ``where``) with the columns of ``other`` (read from ``file``); both have key and sha256."""
    import polars as pl

    check_unique(other, file)
    _check_keys(table, other, where, file)
    _check_keys(other, table, file, where)
    joined = table.join(other, on="key", how="left", suffix=".other", maintain_order="left")
    wrong = joined.filter(pl.col("sha256").ne_missing(pl.col("sha256.other")))
    if len(wrong):
        row: dict[str, Any] = wrong.row(0, named=True)
        raise UserError(
            f"{len(wrong)} of {len(joined)} rows of {file} are about other images than {where}: key {row['key']} has "
            f"image sha256 {row['sha256.other']} there and {row['sha256']} in the pairs. "
            f"Make {file.name} again from these pairs."
        )
    return joined.drop("sha256.other")


def _check_keys(table: pl.DataFrame, other: pl.DataFrame, where: Path, file: Path) -> None:
    missing = table.join(other, on="key", how="anti", maintain_order="left")
    if len(missing):
        raise UserError(
            f"{file} lacks {len(missing)} of {len(table)} keys that {where} has, the first is {missing['key'][0]}. "
            "Make the one that is wrong again."
        )


def check_unique(table: pl.DataFrame, where: Path) -> None:
    """Refuses a table that has a key twice."""
    twice = table.filter(table["key"].is_duplicated())
    if len(twice):
        raise UserError(f"{where} has key {twice['key'][0]} more than once. Make this shard again.")
