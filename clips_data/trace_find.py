"""Which sample a person means: by the key it had elsewhere, by image hash or URL; and where it was looked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from clips_data import joined, ledger, measure, schema, trace_shards
from clips_data.errors import UserError
from clips_data.forget_plan import tables
from clips_data.forgotten import FILE, asked_for, forgotten
from clips_data.redact import host_of, redact

if TYPE_CHECKING:
    import polars as pl

KEY_DIGITS: Final = schema.SHARD_DIGITS + schema.KEY_DIGITS_IN_SHARD


def by_sha256(work: Path, sha256: str) -> list[str]:
    """Keys of the rows with this image, as stored or as downloaded, the best one first.

    Raises ``UserError`` where there is none, and ``UsageError`` for what is no hash.
    """
    import polars as pl

    (wanted,) = asked_for(images=[sha256]).images
    found = _in_pairs(work, (pl.col("sha256") == wanted) | (pl.col("raw_sha256") == wanted))
    for folder in (*tables(work), *trace_shards.folders(work)) if not found else ():
        ending = trace_shards.INDEX if folder.parent == work else ".parquet"
        files = [folder / f"{unit}{ending}" for unit in ledger.finished_units(folder)]
        if files:
            rows = pl.scan_parquet(files, glob=False, extra_columns="ignore", missing_columns="insert")
            found += measure.collect(folder, rows.filter(pl.col("sha256") == wanted).select("key"))[0]["key"].to_list()
    if not found:
        gone = _forgotten(work) if forgotten(work / schema.PAIRS).matches(None, wanted) else ""
        raise UserError(f"No sample under {work} has an image with sha256 {wanted}. {gone}{_looked_at(work)}")
    return list(dict.fromkeys(found))


def by_url(work: Path, url: str) -> list[str]:
    """Keys of the rows with this URL, in the list or after redirects, the best one first. Raises as ``by_sha256``."""
    import polars as pl

    asked_for(urls=[url])
    spellings = [redact(url.strip()), url.strip()]
    found = _in_pairs(work, pl.col("url").is_in(spellings) | pl.col("final_url").is_in(spellings))
    if not found:
        shown, host = redact(url.strip()), host_of(url.strip())
        gone = _forgotten(work) if forgotten(work / schema.PAIRS).matches(url.strip()) else ""
        of_host = len(_in_pairs(work, pl.col("host") == host))
        raise UserError(
            f"No row of {work / schema.PAIRS} has the URL {shown}. {gone}{of_host} rows there are from {host}. "
            "URLs are kept without their signatures; give it as the list has it, or name the KEY or --sha256."
        )
    return found


def by_source_key(work: Path, key: str) -> list[str]:
    """Keys of adopted samples that had ``key`` in their own tar."""
    import polars as pl

    return _in_pairs(work, pl.col("source_key") == key)


def no_such_key(work: Path, key: str) -> UserError:
    """Says that no stage has the key, where it was looked for, and what is near."""
    return UserError(f"Nothing under {work} has the key {key!r}. {_near(work, key)}{_looked_at(work)}")


def _in_pairs(work: Path, condition: pl.Expr) -> list[str]:
    """The keys of such rows: successful ones first, then the latest."""
    import polars as pl

    pairs = work / schema.PAIRS
    names = ("key", "status", "url", "final_url", "host", "sha256", "raw_sha256", "source_key")
    rows = measure.scan(pairs, ledger.finished_units(pairs), dict.fromkeys(names, pl.String)).filter(condition)
    (found,) = measure.collect(pairs, rows.select("key", good=pl.col("status") == schema.STATUS_SUCCESS))
    good, failed = found.filter("good")["key"].sort(), found.filter(~found["good"])["key"].sort(descending=True)
    return [*good, *failed]


def _near(work: Path, key: str) -> str:
    pairs = work / schema.PAIRS
    units = ledger.finished_units(pairs)
    if not (key.isascii() and key.isdigit()) or len(key) != KEY_DIGITS:
        shown = f" Did you mean {key.zfill(KEY_DIGITS)!r}?" if key.isdigit() and len(key) < KEY_DIGITS else ""
        return f"Keys have {KEY_DIGITS} digits, those of the shard first.{shown} "
    unit = key[: schema.SHARD_DIGITS]
    if unit in units:
        keys = sorted(joined.read_table(pairs / f"{unit}.parquet")["key"])
        return f"Shard {unit} of pairs has the keys {keys[0]} to {keys[-1]}. "
    return f"pairs has no finished shard {unit}. " if units else ""


def _looked_at(work: Path) -> str:
    places = list(_places(work))
    if not places:
        return f"There is no finished work in {work}: point --work at the folder of a run."
    return f"Looked at: {', '.join(places)}. A sample can also be named by --sha256 or --url."


def _places(work: Path) -> Iterator[str]:
    for folder in (work / schema.PAIRS, *tables(work), *trace_shards.folders(work)):
        if units := ledger.finished_units(folder):
            yield f"{folder.relative_to(work).as_posix()} ({len(units)} shards, {units[0]} to {units[-1]})"


def _forgotten(work: Path) -> str:
    return f"It was forgotten on request (see {work / schema.PAIRS / FILE}). "
