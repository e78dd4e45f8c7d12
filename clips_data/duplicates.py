"""Which images of ``pairs/`` repeat an earlier one. Marked beside the shards, which never change.

The table lies in ``pairs/_duplicates/`` and not in ``pairs/``, where every sidecar is a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from clips_data import ledger, locks, measure, schema
from clips_data.errors import UserError

if TYPE_CHECKING:
    import polars as pl

FOLDER: Final = "_duplicates"
UNIT: Final = "duplicates"
HASHES_AT_ONCE: Final = 1 << 20
"""Images whose hashes are in memory together, some hundred bytes each. Beside them, only the duplicates found are."""
Identity = Literal["sha256", "phash"]


def write(pairs: Path, by: Identity) -> int:
    """Marks all but the first (by key) of the successful pairs that share ``by``; returns how many those are.

    One row a duplicate: ``key``, ``sha256``, ``duplicate_of`` (the key that is kept) and ``by``, ordered by key. Made
    again when shards were added or ``by`` is another; else nothing is done. Raises ``UserError`` where no image has
    such a hash.
    """
    folder = pairs / FOLDER
    with ledger.readable_disk_errors(folder), locks.locked(folder):
        inputs, config = _inputs(pairs), {"by": by}
        known = ledger.read_sidecar(folder, UNIT)
        if known is None or known.inputs != inputs or known.config != config:
            found = _find(pairs, by)
            found.write_parquet(ledger.part(_table(pairs)))
            ledger.forget_unit(folder, UNIT)
            known = ledger.commit(
                folder, UNIT, [_table(pairs).name], inputs=inputs, config=config, counts={"duplicate": len(found)}
            )
    return known.counts["duplicate"]


def refresh(pairs: Path) -> int | None:
    """Makes the table again where shards came or went since it was made; ``None`` where nobody asked for one."""
    by = marked_by(pairs)
    return None if by is None else write(pairs, by)


def marked_by(pairs: Path) -> Identity | None:
    """What duplicates were told by, or ``None`` where they were not marked."""
    known = ledger.read_sidecar(pairs / FOLDER, UNIT)
    if known is None:
        return None
    return "phash" if known.config["by"] == "phash" else "sha256"


def num_without(pairs: Path, by: Identity) -> int:
    """Images whose shards were made without this hash."""
    import polars as pl

    table = measure.scan(pairs, ledger.finished_units(pairs), {"status": pl.String, by: pl.String})
    missing = (pl.col("status") == schema.STATUS_SUCCESS) & pl.col(by).is_null()
    return int(table.select(missing.sum()).collect().item() or 0)


def is_current(pairs: Path) -> bool:
    """Whether duplicates were marked, and among just the shards that are finished now."""
    known = ledger.read_sidecar(pairs / FOLDER, UNIT)
    return known is not None and known.inputs == _inputs(pairs)


def digest(pairs: Path) -> str | None:
    """Identifies which images are marked, for the stages that leave them out; ``None`` where none were."""
    known = ledger.read_sidecar(pairs / FOLDER, UNIT)
    return None if known is None else known.digest


def read(pairs: Path) -> pl.DataFrame | None:
    """The marked rows; ``None`` where duplicates were not marked.

    Whether they were marked among today's shards is for ``is_current`` to say.
    """
    import polars as pl

    if ledger.read_sidecar(pairs / FOLDER, UNIT) is None:
        return None
    return measure.collect(pairs / FOLDER, pl.scan_parquet(_table(pairs), glob=False))[0]


def left_out(pairs: Path, units: Sequence[str]) -> dict[str, pl.Series]:
    """For each shard that has any, the keys that go so that ``units`` keep just one image of a kind.

    Where the first of all lies in a shard that is not among ``units``, the first in them stays. Raises ``UserError``
    where shards came or went since duplicates were marked.
    """
    import polars as pl

    marked = read(pairs)
    if marked is None:
        return {}
    if not is_current(pairs):
        raise UserError(
            f"{pairs} has other shards than when its duplicates were marked. Run the `clips download` command again "
            f"(with --dedup {marked_by(pairs)}) to mark them anew, or delete {pairs / FOLDER} to keep duplicates."
        )
    unit = pl.col("key").str.head(schema.SHARD_DIGITS).alias("unit")
    first_is_here = pl.col("duplicate_of").str.head(schema.SHARD_DIGITS).is_in(units)
    here = marked.with_columns(unit).filter(pl.col("unit").is_in(units))
    gone = here.filter(first_is_here | (pl.col("key") != pl.col("key").min().over("duplicate_of")))
    return {str(rows["unit"][0]): rows["key"] for rows in gone.partition_by("unit", maintain_order=True)}


def count(pairs: Path, units: Sequence[str]) -> dict[str, int]:
    """How many URLs of these shards repeat an earlier one, and how many stored images do, with what they are of.

    ``urls`` are the rows of the lists, tries repeated by ``--retry`` left out; ``images`` are the successful rows.
    """
    import polars as pl

    rows = measure.scan(pairs, units, dict.fromkeys(("url", "status", "sha256", "retry_of"), pl.String))
    urls, different_urls = measure.num_different(pairs, rows.filter(pl.col("retry_of").is_null()), "url")
    good = rows.filter(pl.col("status") == schema.STATUS_SUCCESS)
    images, different_images = measure.num_different(pairs, good, "sha256")
    return {
        "urls": urls,
        "duplicate_urls": urls - different_urls,
        "images": images,
        "duplicate_images": images - different_images,
    }


def _table(pairs: Path) -> Path:
    return pairs / FOLDER / f"{UNIT}.parquet"


def _inputs(pairs: Path) -> dict[str, str]:
    digests = ledger.digests_of(pairs)
    if not digests:
        raise UserError(f"{pairs} holds no finished shards. Run `clips download` first.")
    return {schema.PAIRS: ledger.digest_json(digests)}


def _find(pairs: Path, by: Identity) -> pl.DataFrame:
    """The duplicates, found in passes that each see all rows of their share of the hashes."""
    import polars as pl

    columns = dict.fromkeys(("key", "status", "sha256", by), pl.String)
    rows = measure.scan(pairs, ledger.finished_units(pairs), columns)
    rows = rows.filter((pl.col("status") == schema.STATUS_SUCCESS) & pl.col(by).is_not_null())
    num = measure.num_rows(pairs, rows)
    if num == 0:
        wish = " Download with --dedup phash to have them made." if by == "phash" else ""
        raise UserError(f"No image in {pairs} has a {by}, so duplicates cannot be told by it.{wish}")
    passes = -(-num // HASHES_AT_ONCE)
    found = []
    for number in range(passes):
        share = rows.filter(pl.col(by).hash() % passes == number)
        kept = share.group_by(by).agg(pl.col("key").min().alias("duplicate_of"), pl.len()).filter(pl.col("len") > 1)
        marked = share.join(kept, on=by).filter(pl.col("key") != pl.col("duplicate_of"))
        about = pl.lit(by).alias("by")
        found += measure.collect(pairs, marked.select("key", "sha256", "duplicate_of", about))
    return pl.concat(found).sort("key")
