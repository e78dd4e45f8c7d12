"""Which rows of which list became which shards of ``pairs/``: the first list, lists appended later, retried rows.

Finished shards never change, so whatever comes later gets the next shard numbers. Each such intake is a *batch*,
planned once and kept in ``pairs/_batches/``, so that a killed run goes on with the same rows under the same numbers.
Nothing of a list is copied there but row numbers; the list itself, which may hold signed URLs, is read again.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from clips_data import ledger, locks, parts, schema
from clips_data.errors import ResumeRefused, UsageError, did_you_mean
from clips_data.parts import PartWriter
from clips_data.redact import redact
from clips_data.sources import UrlList

if TYPE_CHECKING:
    import polars as pl

FOLDER: Final = "_batches"
RETRYABLE: Final = tuple(code for code in schema.DOWNLOAD_CODES if code not in ("ok", "duplicate", "forgotten"))
FINGERPRINT_ROWS: Final = 1000


@dataclass(frozen=True)
class Batch:
    """One intake: ``num_rows`` rows of a list as shards ``first_shard`` and the ``num_shards - 1`` that follow.

    ``fingerprint`` tells the list by its size, columns, first and last rows. ``list_rows`` says whether only some of
    its rows were taken; their numbers are in the parquet file beside this batch.
    """

    number: int
    kind: Literal["list", "append", "retry"]
    fingerprint: str
    codes: tuple[str, ...]
    first_shard: int
    num_shards: int
    num_rows: int
    shard_rows: int
    list_rows: bool

    @property
    def shards(self) -> range:
        return range(self.first_shard, self.first_shard + self.num_shards)


def choose(
    pairs: Path,
    url_list: UrlList,
    shard_rows: int,
    *,
    retry: Sequence[str] = (),
    append: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    part: str = "0-of-1",
) -> tuple[Batch, pl.DataFrame | None]:
    """The batch that a run is to do: a known one of this list, or a new one, which is then saved.

    Comes with the chosen rows (``row``, ``retry_of``) where the batch takes only some. ``part`` names the slice that
    asks: the jobs of an array take part in one retry, whoever comes first. Raises ``ResumeRefused`` when the folder
    holds shards of another list and neither ``append`` nor ``overwrite`` was given, or another retry is unfinished.
    """
    _check_codes(retry)
    if retry and append:
        raise UsageError("--retry and --append are two different intakes. Give one after the other.")
    fingerprint = _fingerprint(url_list)
    with contextlib.nullcontext() if dry_run else locks.locked(pairs, "batches"):
        known, units = read_all(pairs), ledger.finished_units(pairs)
        same = [batch for batch in known if batch.fingerprint == fingerprint]
        if retry:
            found = _retry_to_join(pairs, same, retry, part)
        else:
            found = next((batch for batch in same if batch.kind != "retry"), None)
        begin_anew = len(known) == 1 and (overwrite or not units)
        if found is not None and not (found.shard_rows != shard_rows and begin_anew):
            if not dry_run:
                _mark_taken(pairs, found, part)
            return _checked(found, shard_rows), _rows_of(pairs, found)
        if retry:
            kind, rows = "retry", _failed_rows(pairs, units, url_list, retry)
        elif append and (known or units):
            kind, rows = "append", _new_rows(pairs, units, url_list)
        elif units and not overwrite:
            raise ResumeRefused(
                f"{pairs} holds the pairs of another list. Use --append to add this list's new URLs as further shards, "
                "--out with a new folder to keep both apart, or --overwrite to replace what is there."
            )
        else:
            kind, rows, known, units = "list", None, [], []
        batch = _planned(kind, fingerprint, retry, url_list, rows, shard_rows, known, units)
        if not dry_run and (batch.num_rows or kind == "list"):
            if kind == "list":
                _drop_everything(pairs, batch)
            _save(pairs, batch, rows)
            _mark_taken(pairs, batch, part)
        return batch, rows


def _retry_to_join(pairs: Path, same: Sequence[Batch], retry: Sequence[str], part: str) -> Batch | None:
    """The newest retry of these codes, where it is unfinished, or this slice of an array had no part in it yet."""
    retries = [batch for batch in same if batch.kind == "retry"]
    for batch in retries:
        if set(batch.codes) != set(retry) and _is_unfinished(pairs, batch):
            codes = ",".join(batch.codes)
            raise ResumeRefused(f"An earlier --retry {codes} is unfinished. Give it once more first: --retry {codes}")
    newest = next((batch for batch in reversed(retries) if set(batch.codes) == set(retry)), None)
    if newest is None or _is_unfinished(pairs, newest):
        return newest
    of = part.partition("-of-")[2]
    return newest if of != "1" and not _taken(pairs, newest, part).exists() else None


def _taken(pairs: Path, batch: Batch, part: str) -> Path:
    return pairs / FOLDER / f"{batch.number:05d}.taken-{part}"


def _mark_taken(pairs: Path, batch: Batch, part: str) -> None:
    if batch.kind == "retry":
        _taken(pairs, batch, part).touch()


def read_all(pairs: Path) -> list[Batch]:
    """The batches of ``pairs/`` in the order of their shards."""
    batches = []
    for path in sorted((pairs / FOLDER).glob("*.json")):
        about = json.loads(path.read_text())
        about.pop("schema_version")
        batches.append(Batch(**{**about, "codes": tuple(about["codes"])}))
    return batches


def take(url_list: UrlList, rows: pl.DataFrame, folder: Path, shard_rows: int) -> UrlList:
    """A list of the chosen rows only, with their ``retry_of``, written as parquet into ``folder``; streams."""
    import numpy as np
    import pyarrow as pa

    wanted = rows["row"].to_numpy()
    retry_of = rows["retry_of"].to_arrow().cast(pa.string())
    folder.mkdir()
    writer, first = PartWriter(folder, parts.rows_of_a_part(shard_rows), "the chosen rows"), 0
    for batch in _read_batches(url_list):
        low, high = np.searchsorted(wanted, (first, first + batch.num_rows))
        chosen = pa.Table.from_batches([batch]).take(pa.array(wanted[low:high] - first))
        writer.add(chosen.append_column("retry_of", retry_of.slice(low, high - low)))
        first += batch.num_rows
    writer.close()
    columns = (*url_list.extra_columns, "retry_of")
    return dataclasses.replace(url_list, path=folder, format="parquet", extra_columns=columns)


def latest_codes(pairs: Path, units: Sequence[str]) -> Counter[str]:
    """The rows of ``units`` by the code of their latest try, wherever that is."""
    import polars as pl

    tries = _tried(pairs, ledger.finished_units(pairs)).collect()
    own = tries.filter(pl.col("key").str.head(schema.SHARD_DIGITS).is_in(list(units)))
    roots = own.select(pl.coalesce("retry_of", "key").alias("root")).unique()
    return Counter(_latest(tries).join(roots, on="root", how="semi")["code"].to_list())


def of_same_list(pairs: Path, batch: Batch) -> list[Batch]:
    """All intakes of the batch's list, retries of it too; the batch itself where nothing is saved yet."""
    return [other for other in read_all(pairs) if other.fingerprint == batch.fingerprint] or [batch]


def shard_rows_of(url_list: UrlList, batch: Batch) -> dict[int, int]:
    """Rows of each shard of the batch; the list's files are cut one by one."""
    sizes: list[int] = []
    for num_rows in file_rows(url_list):
        whole, rest = divmod(num_rows, batch.shard_rows)
        sizes += [batch.shard_rows] * whole + ([rest] if rest else [])
    return dict(zip(batch.shards, sizes, strict=True))


def first_of_url(url_list: UrlList, batch: Batch) -> dict[str, str]:
    """Key of each row whose URL an earlier row has → key of that first row. Takes 16 bytes of memory a row."""
    import polars as pl

    sizes = shard_rows_of(url_list, batch)
    starts = [0, *itertools.accumulate(sizes.values())]

    def key(row: int) -> str:
        place = bisect.bisect_right(starts, row) - 1
        return schema.sample_key(batch.first_shard + place, row - starts[place])

    urls = _scan(url_list).select(pl.col(url_list.url_column).hash().alias("url")).with_row_index("row")
    firsts = pl.col("row").min().over("url").alias("first")
    later = urls.with_columns(firsts).filter(pl.col("row") != pl.col("first")).collect()
    return {key(row): key(first) for row, first in later.select("row", "first").iter_rows()}


def file_rows(url_list: UrlList) -> list[int]:
    """Rows of each file of a list, in the order that they are cut."""
    import pyarrow.parquet as pq

    return [pq.read_metadata(file).num_rows for file in _files(url_list)]


def list_rows(url_list: UrlList, numbers: Sequence[int]) -> list[str]:
    """The URLs of the rows with these numbers."""
    import polars as pl

    listed = _scan(url_list).select(pl.col(url_list.url_column).cast(pl.String).fill_null("")).with_row_index("row")
    return listed.filter(pl.col("row").is_in(list(numbers))).collect()[url_list.url_column].to_list()


def _check_codes(codes: Sequence[str]) -> None:
    for code in codes:
        if code not in RETRYABLE:
            raise UsageError(f"--retry {code!r} is not a failure code. {did_you_mean(code, RETRYABLE)}")


def _checked(batch: Batch, shard_rows: int) -> Batch:
    if batch.shard_rows != shard_rows:
        raise ResumeRefused(
            f"This list was cut into shards of {batch.shard_rows} rows before, and --shard-rows is {shard_rows} now. "
            "Keep the number, or use --out with a new folder."
        )
    return batch


def _is_unfinished(pairs: Path, batch: Batch) -> bool:
    return any(not ledger.sidecar_path(pairs, schema.shard_name(number)).exists() for number in batch.shards)


def _planned(
    kind: Any,
    fingerprint: str,
    codes: Sequence[str],
    url_list: UrlList,
    rows: pl.DataFrame | None,
    shard_rows: int,
    known: Sequence[Batch],
    units: Sequence[str],
) -> Batch:
    lengths = file_rows(url_list) if rows is None else _part_lengths(len(rows), shard_rows)
    return Batch(
        number=len(known),
        kind=kind,
        fingerprint=fingerprint,
        codes=tuple(codes),
        first_shard=max([0, *(batch.shards.stop for batch in known), *(int(unit) + 1 for unit in units)]),
        num_shards=sum(-(-number // shard_rows) for number in lengths),
        num_rows=sum(lengths),
        shard_rows=shard_rows,
        list_rows=rows is not None,
    )


def _part_lengths(num_rows: int, shard_rows: int) -> list[int]:
    """Rows of each file that ``take`` writes."""
    whole, rest = divmod(num_rows, parts.rows_of_a_part(shard_rows))
    return [parts.rows_of_a_part(shard_rows)] * whole + ([rest] if rest else [])


def _save(pairs: Path, batch: Batch, rows: pl.DataFrame | None) -> None:
    """The rows first: a batch that is there is complete."""
    name = f"{batch.number:05d}"
    if rows is not None:
        import io

        file = io.BytesIO()
        rows.write_parquet(file)
        ledger.write_bytes(pairs / FOLDER / f"{name}.parquet", file.getvalue())
    ledger.write_json(pairs / FOLDER / f"{name}.json", {"schema_version": schema.SCHEMA_VERSION, **asdict(batch)})


def _rows_of(pairs: Path, batch: Batch) -> pl.DataFrame | None:
    import polars as pl

    return pl.read_parquet(pairs / FOLDER / f"{batch.number:05d}.parquet") if batch.list_rows else None


def _drop_everything(pairs: Path, batch: Batch) -> None:
    """What an overwritten list leaves: its batches, and the shards that the new list has no place for."""
    for path in sorted((pairs / FOLDER).glob("*"), reverse=True):
        path.unlink()
    for unit in ledger.finished_units(pairs):
        if int(unit) not in batch.shards:
            ledger.forget_unit(pairs, unit)


def _fingerprint(url_list: UrlList) -> str:
    import polars as pl

    rows = _scan(url_list)
    num_rows = int(rows.select(pl.len()).collect().item())
    ends = [part.collect().to_dicts() for part in (rows.head(FINGERPRINT_ROWS), rows.tail(FINGERPRINT_ROWS))]
    about = [num_rows, url_list.url_column, url_list.caption_column, url_list.extra_columns, ends]
    return ledger.digest_bytes(json.dumps(about, sort_keys=True, default=str).encode())


def _new_rows(pairs: Path, units: Sequence[str], url_list: UrlList) -> pl.DataFrame:
    """The rows of the list whose URL was never tried in ``pairs/``."""
    import polars as pl

    tried = _tried(pairs, units).filter(pl.col("url") != "").select("url").unique()
    rows = _listed(url_list).join(tried.collect().lazy(), on="url", how="anti", maintain_order="left").collect()
    return rows.select("row", pl.lit(None, pl.String).alias("retry_of"))


def _failed_rows(pairs: Path, units: Sequence[str], url_list: UrlList, codes: Sequence[str]) -> pl.DataFrame:
    """The rows of the list whose latest try ended with one of ``codes``; the n-th row of a URL matches its n-th try."""
    import polars as pl

    nth = pl.int_range(pl.len()).over("url").alias("nth")
    tries = _tried(pairs, units).collect().with_columns(root=pl.coalesce("retry_of", "key"))
    latest = _latest(tries)
    roots = tries.filter(pl.col("retry_of").is_null()).sort("key").with_columns(nth)
    failed = roots.select("root", "url", "nth").join(latest.filter(pl.col("code").is_in(codes)), on="root")
    listed = _listed(url_list).join(failed.select("url").unique().lazy(), on="url", how="semi").collect().sort("row")
    chosen = listed.with_columns(nth).join(failed, on=["url", "nth"]).sort("row")
    return chosen.select("row", pl.col("root").alias("retry_of"))


def _latest(tries: pl.DataFrame) -> pl.DataFrame:
    """``root`` (the first try's key) and the ``code`` of the last try of each row."""
    import polars as pl

    return tries.group_by(pl.coalesce("retry_of", "key").alias("root")).agg(pl.col("code").sort_by("key").last())


def _tried(pairs: Path, units: Sequence[str]) -> pl.LazyFrame:
    """``url`` (redacted), ``key``, ``code`` and ``retry_of`` of every row of the finished shards."""
    import polars as pl

    empty = pl.LazyFrame(schema=dict.fromkeys(("url", "key", "code", "retry_of"), pl.String))
    tables = [pl.scan_parquet(pairs / f"{unit}.parquet", glob=False) for unit in units]
    return pl.concat([empty, *(table.select(empty.collect_schema().names()) for table in tables)])


def _listed(url_list: UrlList) -> pl.LazyFrame:
    """``row`` and redacted ``url`` of every row of the list."""
    import polars as pl

    def redacted(urls: pl.Series) -> pl.Series:
        return pl.Series([redact(url or "") for url in urls.to_list()], dtype=pl.String)

    url = pl.col(url_list.url_column).map_batches(redacted, return_dtype=pl.String).alias("url")
    return _scan(url_list).select(url).with_row_index("row").with_columns(pl.col("row").cast(pl.Int64))


def _scan(url_list: UrlList) -> pl.LazyFrame:
    import polars as pl

    return pl.scan_parquet(_files(url_list), glob=False, hive_partitioning=False)


def _files(url_list: UrlList) -> list[Path]:
    """img2dataset's Reader takes them in this order."""
    return sorted(url_list.path.glob("*.parquet")) if url_list.path.is_dir() else [url_list.path]


def _read_batches(url_list: UrlList) -> Iterator[Any]:
    import pyarrow.parquet as pq

    for file in _files(url_list):
        with pq.ParquetFile(file) as opened:
            yield from opened.iter_batches()
