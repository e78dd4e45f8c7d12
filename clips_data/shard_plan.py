"""The plan of ``clips shard``: which sample goes to which place of which tar, before any image is read.

Rows go from the joined tables, shard by shard, through the filters into a shuffle on disk. Which side of the held-out
split a sample is on is a draw of its image's hash, so that copies of an image never part.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import draws, executor, joined, ledger, schema, shuffle
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.filters import Filters

if TYPE_CHECKING:
    import polars as pl

TRAIN, HELDOUT = SPLITS = ("train", "heldout")
PRELOAD: Final = ("polars", "pyarrow.parquet", "clips_data.shard_plan")
EXAMPLES_KEPT: Final = 3
"""Examples of what each filter removed that are found in any case: the index of the shards names them."""
_OVERHEAD_BYTES: Final = 3072
"""About what a sample takes in a tar beside its image and texts: three headers, padding, the rest of its json."""
_HELDOUT_DRAW: Final = "heldout_draw"


@dataclass(frozen=True)
class Tar:
    """One tar to write: rows ``first_row`` … of its split."""

    unit: str
    split: str
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class HeldOut:
    """Which images are held out: those whose draw is below ``ratio``, lowest first, up to ``most`` samples (0: all).

    ``known`` are those of earlier generations of a data set that was grown. Under a limit only their copies join them.
    """

    seed: int
    ratio: float
    most: int
    known: frozenset[str] | None = None

    def draw(self, sha256: str) -> float | None:
        """The image's draw, or ``None`` where it is trained on."""
        if self.known is not None:
            return 0.0 if sha256 in self.known else None
        drawn = draws.uniform(self.seed, "heldout", 0, sha256)
        return drawn if drawn < self.ratio else None


@dataclass
class Plan:
    """The tars of a generation and the rows that they are made of, on disk until the plan's folder is removed."""

    tars: list[Tar]
    order: dict[str, shuffle.Sorted]
    num_rows: int
    dropped: int
    removed: dict[str, int]
    """What each filter removed, in their order."""

    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Some of the removed, by filter: ``explain`` of them, and not fewer than ``EXAMPLES_KEPT``."""


@dataclass(frozen=True)
class _Planning:
    """What every task of the first pass needs to know. Goes to worker processes."""

    config: ShardConfig
    given: joined.Inputs
    filters: Filters
    held_out: HeldOut
    spools: Mapping[str, shuffle.Spool]


@dataclass
class _Spooled:
    num_rows: int = 0
    dropped: int = 0
    num_heldout: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def draw_plan(
    config: ShardConfig,
    given: joined.Inputs,
    folder: Path,
    *,
    known_heldout: frozenset[str] | None = None,
    first_tar: Mapping[str, int] | None = None,
    num_processes: int = 0,
) -> Plan:
    """Draws the plan; its rows lie in ``folder``.

    A sample is dropped when a filter removes it or no column has a caption for it. ``first_tar`` is the number of the
    first tar of each split. Raises ``UserError`` when nothing is left and there are no tars before.
    """
    config = config.model_copy(update={"explain": max(config.explain, EXAMPLES_KEPT)})
    filters = Filters.prepare(config, given, given.units, num_processes=num_processes)
    num_rows = {unit: _num_rows(given.pairs, unit) for unit in given.units}
    total = sum(num_rows.values())
    held_out = HeldOut(config.seed, config.heldout_ratio, config.heldout_max, known_heldout)
    spools = {
        TRAIN: shuffle.Spool(folder / "spool-train", shuffle.num_buckets(total)),
        HELDOUT: shuffle.Spool(folder / "spool-heldout", shuffle.num_buckets(_most_heldout(held_out, total))),
        _CANDIDATES: shuffle.Spool(
            folder / "spool-candidates", shuffle.num_buckets(round(held_out.ratio * total)) if held_out.most else 1
        ),
    }
    planning = _Planning(config, given, filters, held_out, spools)
    found = _Spooled()
    work = functools.partial(_spool, planning=planning)
    tasks = list(_tasks(num_rows))
    for spooled in executor.map_units(work, tasks, num_processes=num_processes, preload=PRELOAD):
        _add(found, spooled, config)
    if _limited(held_out):
        _choose_candidates(planning)
    grows = any((first_tar or {}).values())
    if not grows and found.num_rows == found.dropped + sum(found.removed.values()):
        raise UserError(_nothing_left(found, given))
    order = {split: _sort(spools[split], folder / split, num_processes) for split in SPLITS}
    tars = [tar for split in SPLITS for tar in _cut(config, split, order[split], (first_tar or {}).get(split, 0))]
    removed = {name: found.removed[name] for name in filters.names}
    return Plan(tars, order, found.num_rows, found.dropped, removed, found.examples)


_CANDIDATES: Final = "candidates"


def _num_rows(pairs: Path, unit: str) -> int:
    sidecar = ledger.read_sidecar(pairs, unit)
    assert sidecar is not None
    return sum(sidecar.counts.values())


def _most_heldout(held_out: HeldOut, num_rows: int) -> int:
    drawn = round(held_out.ratio * num_rows)
    return min(drawn, held_out.most) if held_out.most else drawn


def _limited(held_out: HeldOut) -> bool:
    return held_out.most > 0 and held_out.known is None and held_out.ratio > 0


def _tasks(num_rows: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Neighbouring shards, together as many rows as are spooled at a time."""
    least = shuffle.rows_of_task(sum(num_rows.values()))
    units: list[str] = []
    rows = 0
    for unit, number in num_rows.items():
        units.append(unit)
        rows += number
        if rows >= least:
            yield tuple(units)
            units, rows = [], 0
    if units:
        yield tuple(units)


def _spool(units: tuple[str, ...], planning: _Planning) -> _Spooled:
    """Filters the rows of some shards and spools them by their draws."""
    import polars as pl

    found, tables = _Spooled(), []
    for unit in units:
        table = planning.given.table(unit)
        kept = planning.filters.apply(unit, table)
        rows = _plan_rows(planning.config, kept.table, unit)
        usable = rows.filter("has_caption").drop("has_caption")
        found.num_rows += len(table)
        found.dropped += len(rows) - len(usable)
        found.removed.update(kept.removed)
        for name, examples in kept.examples.items():
            found.examples[name] = _first([*found.examples.get(name, []), *examples], planning.config)
        tables.append(usable)
    rows = pl.concat(tables)
    seed = planning.config.seed
    rows = rows.with_columns(
        pl.Series(shuffle.DRAW, [draws.uniform(seed, "shuffle", 0, key) for key in rows["key"]], pl.Float64),
        pl.Series(_HELDOUT_DRAW, [planning.held_out.draw(sha256) for sha256 in rows["sha256"]], pl.Float64),
    )
    _write(rows, units[0], planning)
    return found


def _write(rows: pl.DataFrame, name: str, planning: _Planning) -> None:
    """To the spool of each split; under a limit, the candidates are put in the order of their own draws first."""
    import polars as pl

    out = pl.col(_HELDOUT_DRAW).is_not_null()
    planning.spools[TRAIN].write(rows.filter(~out).drop(_HELDOUT_DRAW), name)
    if not _limited(planning.held_out):
        planning.spools[HELDOUT].write(rows.filter(out).drop(_HELDOUT_DRAW), name)
        return
    candidates = rows.filter(out).rename({shuffle.DRAW: "place_draw", _HELDOUT_DRAW: shuffle.DRAW})
    planning.spools[_CANDIDATES].write(candidates, name, upto=planning.held_out.ratio)


def _choose_candidates(planning: _Planning) -> None:
    """Holds out images from the lowest draw on until the next one's samples do not fit; the others are trained on."""
    import polars as pl

    spool, left, full = planning.spools[_CANDIDATES], planning.held_out.most, False
    for bucket in range(spool.num_buckets):
        rows = spool.read(bucket)
        if rows is None:
            return
        chosen: list[str] = []
        for sha256, number in rows.group_by("sha256", maintain_order=True).len().iter_rows():
            full = full or number > left
            if full:
                break
            chosen.append(sha256)
            left -= number
        rows = rows.drop(shuffle.DRAW).rename({"place_draw": shuffle.DRAW})
        out = pl.col("sha256").is_in(chosen)
        planning.spools[HELDOUT].write(rows.filter(out), f"candidates-{bucket:05d}")
        planning.spools[TRAIN].write(rows.filter(~out), f"candidates-{bucket:05d}")


def _sort(spool: shuffle.Spool, folder: Path, num_processes: int) -> shuffle.Sorted:
    work = functools.partial(_sort_bucket, spool=spool, folder=folder)
    lengths = dict(executor.map_units(work, range(spool.num_buckets), num_processes=num_processes, preload=PRELOAD))
    ends, total = [], 0
    for bucket in range(spool.num_buckets):
        total += lengths[bucket]
        ends.append(total)
    return shuffle.Sorted(folder, tuple(ends))


def _sort_bucket(bucket: int, spool: shuffle.Spool, folder: Path) -> tuple[int, int]:
    return bucket, shuffle.sort_bucket(spool, bucket, folder)


def _cut(config: ShardConfig, split: str, order: shuffle.Sorted, first_tar: int) -> Iterator[Tar]:
    first = 0
    if config.shard_bytes:
        sizes = (column.to_list() for column in order.column("sample_bytes"))
        lengths: Sequence[int] = shuffle.cut(sizes, config.shard_rows, config.shard_bytes)
    else:
        whole, rest = divmod(order.num_rows, config.shard_rows)
        lengths = [config.shard_rows] * whole + [rest] * bool(rest)
    for number, num_rows in enumerate(lengths, first_tar):
        yield Tar(f"{split}-{schema.shard_name(number)}", split, first, num_rows)
        first += num_rows


def _plan_rows(config: ShardConfig, table: pl.DataFrame, unit: str) -> pl.DataFrame:
    """What one tar's writer has to know of each sample, nested values as JSON text."""
    import polars as pl

    texts = [f"text.{column}" for column in config.columns]
    # Without extra columns there is nothing to iterate over, so the empty object is written for each row.
    extras = [_extra(row) for row in table.select(joined.extra_columns(table)).iter_rows(named=True)]
    scores = [name for name in table.columns if name.startswith("score.") and _is_number(table.schema[name])]
    sizes = [pl.col(name).str.len_bytes() for name in texts]
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
        *[f"flags.{column}" for column in config.columns if column != joined.WEB],
        *[pl.col(name).cast(pl.Float64).fill_nan(None) for name in scores],
        pl.any_horizontal(pl.col(texts) != "").alias("has_caption"),
        (pl.col("place.bytes") + 2 * pl.sum_horizontal(sizes).cast(pl.Int64) + _OVERHEAD_BYTES).alias("sample_bytes"),
    )


def _is_number(kind: Any) -> bool:
    import polars as pl

    return bool(kind.is_numeric() or kind == pl.Boolean)


def _extra(row: dict[str, Any]) -> str:
    """The list's own columns as JSON text; a ``captions`` column holds JSON itself, and is kept as the list it is."""
    captions = row.get("captions")
    if isinstance(captions, str) and captions.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):  # a text that only looks like a list stays a text
            found = json.loads(captions)
            json.dumps(found, ensure_ascii=False).encode()  # fails for half characters, which JSON can spell
            row = {**row, "captions": found}
    try:
        return _encode(row)
    except ValueError:
        return _encode(_known(row))


_encode: Final = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str, allow_nan=False).encode


def _known(value: Any) -> Any:
    """``value`` with nulls in place of what JSON has no numbers for."""
    if isinstance(value, dict):
        return {name: _known(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _add(found: _Spooled, more: _Spooled, config: ShardConfig) -> None:
    found.num_rows += more.num_rows
    found.dropped += more.dropped
    found.removed.update(more.removed)
    for name, examples in more.examples.items():
        found.examples[name] = _first([*found.examples.get(name, []), *examples], config)


def _first(rows: list[dict[str, Any]], config: ShardConfig) -> list[dict[str, Any]]:
    """Of the examples of several shards those that are drawn first, so that they do not depend on the sharding."""
    return sorted(rows, key=lambda row: draws.uniform(config.seed, "explain", 0, row["key"]))[: config.explain]


def _nothing_left(found: _Spooled, given: joined.Inputs) -> str:
    if found.num_rows == found.dropped:
        return f"None of the {found.num_rows} pairs in {given.pairs} has a caption, so there is nothing to shard."
    removed = "; ".join(f"{name}: {number}" for name, number in found.removed.items() if number)
    return (
        f"Of the {found.num_rows} pairs in {given.pairs} none is left (removed by {removed}; without a caption: "
        f"{found.dropped}). Loosen the filters; --explain 10 shows samples that each of them removed."
    )
