"""The plan of ``clips shard``: which sample goes to which place of which tar, before any image is read."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import draws, joined, schema
from clips_data.config import ShardConfig
from clips_data.errors import UserError

if TYPE_CHECKING:
    import polars as pl

SPLITS: Final = ("train", "heldout")


@dataclass(frozen=True)
class Tar:
    """One tar to write: rows ``first_row`` … of the plan."""

    unit: str
    first_row: int
    num_rows: int


def draw_plan(config: ShardConfig, given: joined.Inputs, plan: Path) -> tuple[list[Tar], int]:
    """Writes the plan, one row a sample in the order of the tars, and returns the tars and the samples dropped.

    A sample is dropped when no column has a caption for it.
    """
    import polars as pl

    known, files = [], []
    for unit in given.units:
        rows = _plan_rows(config, given, unit)
        files.append(plan.with_name(f"{unit}.rows.parquet"))
        rows.write_parquet(files[-1])
        known.append(rows.select("key", "sha256", "has_caption"))
    samples = pl.concat(known)
    twice = samples.filter(samples["key"].is_duplicated())
    if len(twice):
        raise UserError(f"Key {twice['key'][0]} is in more than one shard of {given.pairs}. Make the later one again.")
    usable = samples.filter("has_caption")
    if usable.is_empty():
        raise UserError(
            f"None of the {len(samples)} pairs in {given.pairs} has a caption, so there is nothing to shard."
        )
    places, tars = _places(config, usable["key"].to_list(), usable["sha256"].to_list())
    rows_of_all = pl.scan_parquet(files, glob=False)
    rows_of_all.join(places.lazy(), on="key").sort("place").sink_parquet(plan, row_group_size=config.shard_rows)
    return tars, len(samples) - len(usable)


def _plan_rows(config: ShardConfig, given: joined.Inputs, unit: str) -> pl.DataFrame:
    """What one tar's writer has to know of each sample, nested values as JSON text."""
    import polars as pl

    table = given.table(unit)
    texts = [f"text.{column}" for column in config.columns]
    # Without extra columns there is nothing to iterate over, so the empty object is written for each row.
    extras = [_extra(row) for row in table.select(joined.extra_columns(table)).iter_rows(named=True)]
    scores = [name for name in table.columns if name.startswith("score.")]
    return table.select(
        "key",
        "sha256",
        pl.lit(unit).alias("unit"),
        pl.col("url").cast(pl.String) if "url" in table.columns else pl.lit(None, pl.String).alias("url"),
        "image_ext",
        "place.offset",
        "place.bytes",
        pl.Series("extra", extras or [_extra({})] * len(table), pl.String),
        *texts,
        *[f"code.{column}" for column in config.columns],
        *[pl.col(name).cast(pl.Float64).fill_nan(None) for name in scores],
        pl.any_horizontal(pl.col(texts) != "").alias("has_caption"),
    )


def _extra(row: dict[str, Any]) -> str:
    """The list's own columns as JSON text; a ``captions`` column holds JSON itself, and is kept as the list it is."""
    captions = row.get("captions")
    if isinstance(captions, str) and captions.startswith("["):
        with contextlib.suppress(ValueError):  # a text that only looks like a list stays a text
            row = {**row, "captions": json.loads(captions)}
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


def _places(config: ShardConfig, keys: list[str], hashes: list[str]) -> tuple[pl.DataFrame, list[Tar]]:
    """The row of each sample in the plan, held-out samples last, and the tars they make."""
    import polars as pl

    held_out = choose_heldout(config, hashes)
    members = {
        "train": [row for row, sha256 in enumerate(hashes) if sha256 not in held_out],
        "heldout": [row for row, sha256 in enumerate(hashes) if sha256 in held_out],
    }
    order: list[int] = []
    tars = []
    for name in SPLITS:
        rows = members[name]
        for number, first in enumerate(range(0, len(rows), config.shard_rows)):
            num_rows = min(config.shard_rows, len(rows) - first)
            tars.append(Tar(f"{name}-{schema.shard_name(number)}", len(order) + first, num_rows))
        order += [rows[i] for i in draws.permutation(len(rows), config.seed, "shuffle", 0, name)]
    return pl.DataFrame({"key": [keys[row] for row in order], "place": range(len(order))}), tars


def choose_heldout(config: ShardConfig, hashes: Iterable[str]) -> set[str]:
    """The image hashes to hold out: a share of all, drawn by hash, so that copies of an image never part.

    With ``heldout_max`` the lowest draws are taken as long as their samples fit.
    """
    num_samples = Counter(hashes)
    drawn = {sha256: draws.uniform(config.seed, "heldout", 0, sha256) for sha256 in num_samples}
    chosen: set[str] = set()
    taken = 0
    for sha256 in sorted((s for s in drawn if drawn[s] < config.heldout_ratio), key=lambda s: (drawn[s], s)):
        if config.heldout_max == 0 or taken + num_samples[sha256] <= config.heldout_max:
            chosen.add(sha256)
            taken += num_samples[sha256]
    return chosen
