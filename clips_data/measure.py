"""Figures over all tables of a folder, however many rows these have: lazy scans, spreads from histograms, bands.

Polars streams, so memory holds the groups of a figure, not the rows it is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data.errors import UserError

if TYPE_CHECKING:
    import polars as pl

BANDS: Final[dict[str, tuple[float | None, float | None]]] = {
    "success_share": (0.5, None),
    "web_caption_words_mean": (8, 20),
    "caption_words_mean": (45, 110),
    "caption_sentences_mean": (3, 10),
    "cap_hit_share": (None, 0.05),
    "refusal_or_leak_share": (None, 0.005),
    "opener_share": (None, 0.2),
}
"""Lowest and highest value that is no reason to look closer, both included.

``success_share`` begins at the lowest figure published for a public set (50 to 60 % of GRIT's URLs in 2025; PixelProse
73 %, CC12M 79 % in 2022, DataComp 86 to 94 % in 2023). Captions are judged as long ones of a multimodal model: columns
of short captions lie outside on purpose.
"""
ROWS_AT_ONCE: Final = 1 << 22
"""Rows whose hashes or keys are held in memory together; more are counted in several passes."""


def scan(folder: Path, units: Sequence[str], columns: Mapping[str, type[pl.DataType] | pl.DataType]) -> pl.LazyFrame:
    """These columns of ``folder/<unit>.parquet`` for all ``units``; null where a table lacks one.

    Shards of different lists have different columns, and a column of nulls has no type, so each table's own schema is
    read first. Rows come in no particular order. A damaged table is a ``UserError``.
    """
    import polars as pl

    groups: dict[tuple[tuple[str, pl.DataType], ...], list[Path]] = {}
    for unit in units:
        path = folder / f"{unit}.parquet"
        found = columns_of(path)
        groups.setdefault(tuple((name, found[name]) for name in columns if name in found), []).append(path)
    frames = [pl.LazyFrame(schema=dict(columns))]
    for known, files in groups.items():
        table = pl.scan_parquet(
            files, schema=dict(known), extra_columns="ignore", glob=False, hive_partitioning=False
        )  # fmt: skip
        present = dict(known)
        frames.append(
            table.select(
                pl.col(name).cast(kind, strict=False) if name in present else pl.lit(None, kind).alias(name)
                for name, kind in columns.items()
            )
        )
    return pl.concat(frames)


def columns_of(path: Path) -> dict[str, pl.DataType]:
    """The columns of one table and their types."""
    import polars as pl

    try:
        return dict(pl.read_parquet_schema(path))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"Cannot read {path}: {_first_line(error)}. Restore it, or delete its .done.json and make it again."
        ) from None


def collect(where: Path, *frames: pl.LazyFrame) -> list[pl.DataFrame]:
    """The answers to several questions about the tables in ``where``, streamed."""
    import polars as pl

    apart = pl.QueryOptFlags(comm_subplan_elim=False)  # or what they have in common is held in memory
    try:
        return pl.collect_all(frames, engine="streaming", optimizations=apart)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"Cannot read the tables in {where}: {_first_line(error)}. `clips verify` names the damaged file; restore "
            "it, or delete its .done.json and make it again."
        ) from None


def spreads(where: Path, table: pl.LazyFrame, values: Mapping[str, pl.Expr]) -> dict[str, dict[str, float | int]]:
    """Number, smallest, largest, mean, median and 95th percentile (nearest rank) of each expression, nulls left out.

    Median and percentile are of the values rounded to three significant digits, which bounds the histogram.
    """
    import polars as pl

    frames = []
    for value in values.values():
        exact = table.select(value.cast(pl.Float64).fill_nan(None).alias("value")).filter(pl.col("value").is_not_null())
        frames.append(
            exact.group_by(about=pl.col("value").round_sig_figs(3)).agg(
                pl.len().alias("num"),
                pl.col("value").sum().alias("sum"),
                pl.col("value").min().alias("min"),
                pl.col("value").max().alias("max"),
            )
        )
    return {name: _spread(found) for name, found in zip(values, collect(where, *frames), strict=True)}


def counts(where: Path, table: pl.LazyFrame, column: pl.Expr, null: str = "none") -> dict[str, int]:
    """How often each value occurs, most frequent first, then by name; ``null`` names what has none."""
    import polars as pl

    named = table.select(column.cast(pl.String).fill_null(null).alias("value"))
    (found,) = collect(where, named.group_by("value").len())
    return by_number(dict(found.iter_rows()))


def by_number(found: Mapping[str, int]) -> dict[str, int]:
    """Most frequent first, then by name."""
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def num_rows(where: Path, table: pl.LazyFrame) -> int:
    import polars as pl

    return int(collect(where, table.select(pl.len()))[0].item())


def num_different(where: Path, table: pl.LazyFrame, column: str) -> tuple[int, int]:
    """Rows that have a value in ``column``, and how many different values these are.

    Values are told apart by a 64-bit hash: among 100 million, one is missed with a chance of 1 in 3,700.
    """
    import polars as pl

    hashed = table.filter(pl.col(column).is_not_null()).select(pl.col(column).hash().alias("hash"))
    num = num_rows(where, hashed)
    passes = -(-num // ROWS_AT_ONCE)
    different = 0
    for number in range(passes):
        these = hashed.filter(pl.col("hash") % passes == number).select(pl.col("hash").n_unique())
        different += int(collect(where, these)[0].item())
    return num, different


def banded(name: str, value: float | int, of: int) -> dict[str, Any]:
    """``value`` beside its band, whether it is ``inside``, ``below`` or ``above`` it, and of how many rows it is."""
    low, high = BANDS[name]
    mark = "below" if low is not None and value < low else "above" if high is not None and value > high else "inside"
    return {"value": round(value, 6), "low": low, "high": high, "mark": mark, "of": of}


def banded_share(name: str, part: int, whole: int) -> dict[str, dict[str, Any]]:
    """``{name: banded}`` of ``part`` of ``whole``; nothing where there is no whole."""
    return {name: banded(name, part / whole, whole)} if whole else {}


def banded_mean(name: str, spread: Mapping[str, float | int]) -> dict[str, dict[str, Any]]:
    """``{name: banded}`` of the mean of a spread; nothing where nothing was measured."""
    return {name: banded(name, spread["mean"], int(spread["num"]))} if spread["num"] else {}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _spread(histogram: pl.DataFrame) -> dict[str, float | int]:
    if histogram.is_empty():
        return {"num": 0}
    ordered = histogram.sort("about")
    num = int(ordered["num"].sum())
    up_to = ordered["num"].cum_sum()

    def rank(share: float) -> float | int:
        place = up_to.search_sorted(min(num - 1, int(share * num)), side="right")
        return _plain(ordered["about"][int(place)])

    ends = {"min": _plain(ordered["min"].min()), "max": _plain(ordered["max"].max())}
    mean = _plain(ordered["sum"].sum() / num)
    return {"num": num, **ends, "mean": mean, "median": rank(0.5), "p95": rank(0.95)}


def _plain(value: Any) -> float | int:
    """Whole numbers as such, others to six digits."""
    return int(value) if float(value).is_integer() else round(float(value), 6)
