"""A table of captions joined to pairs by an identity that both have, in one pass over a table of any length.

What some shard wants is kept aside in buckets of shards; the pairs take twelve bytes of memory each.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import adapters, files, joined, measure, schema, tables
from clips_data.errors import UserError, did_you_mean
from clips_data.files import Budget
from clips_data.redact import redact
from clips_data.tables import Dialect

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import pyarrow as pa

MAX_TABLE_BYTES: Final = 1 << 42
_MAX_BUCKETS: Final = 128
_PLAIN_URL: Final = r"^https?://[^/?#@\s\x00-\x20\x7f][^?#@\s\x00-\x20\x7f]*$"


def images_of(pairs: Path, unit: str, *, columns_only: bool = False) -> pl.DataFrame:
    """The rows of a pairs shard that have an image."""
    import polars as pl

    path = pairs / f"{unit}.parquet"
    if columns_only:
        return pl.DataFrame(schema=measure.columns_of(path))
    return joined.read_table(path).filter(pl.col("status") == schema.STATUS_SUCCESS)


def resolve(spelled: str, names: Sequence[str]) -> tuple[str, list[str]] | None:
    """The column of ``a/b/c`` and the way into its values; a column's own name may have a ``/`` in it."""
    pieces = spelled.split("/")
    for length in range(len(pieces), 0, -1):
        if (name := "/".join(pieces[:length])) in names:
            return name, pieces[length:]
    return None


def follow(value: Any, path: Sequence[str]) -> Any:
    """What ``path`` leads to in a nested value or in JSON text; ``None`` where it leads nowhere."""
    for step in path:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return None
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def text_of(value: Any) -> str:
    """A caption, however it is kept: lists of sentences are joined; what is no text is none."""
    if isinstance(value, list):
        return " ".join(piece for piece in value if isinstance(piece, str))
    return value if isinstance(value, str) else ""


def comparable(keys: Sequence[Any], by: str) -> pl.Series:
    """Keys of either side in the form in which they are compared: text, URLs redacted, hashes in lower case."""
    import polars as pl

    texts = [None if key is None or key == "" or isinstance(key, list | dict) else str(key) for key in keys]
    series = pl.Series("key", texts, dtype=pl.String)
    if by == "sha256":
        return series.str.to_lowercase()
    if by == "url":
        secret = ~series.str.contains(_PLAIN_URL).fill_null(True)  # redacting a plain URL changes nothing, slowly
        if secret.any():
            changed = [redact(key) if odd and key else key for key, odd in zip(texts, secret, strict=True)]
            return pl.Series("key", changed, dtype=pl.String)
    return series


class CaptionTable:
    """A table of captions. ``digest`` tells it from others without reading it whole."""

    def __init__(self, source: str, text_column: str, by: str, key: str | None, scratch: Path) -> None:
        if source == "-":
            raise UserError("A table of captions is read from a file, a folder or an address, not from stdin.")
        advice = "Cut it into several tables and import each as a column."
        self.by, self.scratch, self.budget = by, scratch, Budget(MAX_TABLE_BYTES, advice)
        self.parts = files.find(source, scratch, self.budget, what="table of captions")
        names = tables.column_names(self.parts[0], scratch, self.budget, Dialect())
        known = adapters.recognise(names)
        self.set_name = known.name if known else "unknown"
        self.key = key or (known.key_for(by) if known and by not in names else by)
        self._key = self._resolve(self.key, names, f"the key ({by})", "--table-key")
        self._text = self._resolve(text_column, names, "the captions", "--captions")
        self.digest = files.fingerprint(self.parts)

    def _resolve(self, spelled: str, names: Sequence[str], what: str, option: str) -> tuple[str, list[str]]:
        found = resolve(spelled, names)
        if found is None:
            raise UserError(
                f"{self.parts[0].label} has no column {spelled.split('/')[0]!r} for {what}. "
                f"{did_you_mean(spelled.split('/')[0], names)} Name it with {option}."
            )
        return found

    def batches(self) -> Iterator[pl.DataFrame]:
        """``key`` and ``text`` of some thousand rows at a time, in order."""
        import polars as pl

        for batch in tables.stream(self.parts, self.scratch, self.budget, Dialect()):
            texts = [text_of(value) for value in _values(batch, *self._text)]
            yield pl.DataFrame(
                [comparable(_values(batch, *self._key), self.by), pl.Series("text", texts, dtype=pl.String)]
            )


def _values(batch: pa.Table, name: str, path: Sequence[str]) -> list[Any]:
    """A column's values; files of one table may lack it."""
    if name not in batch.column_names:
        return [None] * batch.num_rows
    values: list[Any] = batch[name].to_pylist()
    return [follow(value, path) for value in values] if path else values


@dataclass(frozen=True)
class _Index:
    """Where each key is wanted: hashes in order, and the number of the unit beside each."""

    hashes: np.ndarray[Any, np.dtype[np.uint64]]
    units: np.ndarray[Any, np.dtype[np.uint32]]

    def places(self, hashes: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
        """For each unit that wants a row of ``hashes``: the row, the unit's number, whether it is the row's first."""
        import numpy as np

        first = np.searchsorted(self.hashes, hashes, side="left")
        counts = np.searchsorted(self.hashes, hashes, side="right") - first
        rows = np.repeat(np.arange(len(hashes)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        return rows, self.units[np.repeat(first, counts) + within], within == 0


class Join:
    """One pass over a table for some shards of pairs: first ``read``, then ``captions`` of each shard.

    A bucket holds neighbouring shards and the last one stays in memory, so ask for shards in their order.
    """

    def __init__(self, pairs: Path, units: Sequence[str], by: str, scratch: Path) -> None:
        self.pairs, self.units, self.by, self.scratch = pairs, list(units), by, scratch
        self.units_of_a_bucket = -(-len(self.units) // _MAX_BUCKETS)
        self._bucket: tuple[int, pl.DataFrame] | None = None
        self._index = self._build_index()

    def read(self, table: CaptionTable) -> dict[str, int]:
        """Fills the buckets. Counts rows of the table: all, those of no use, those that repeat an earlier row's key."""
        import numpy as np
        import polars as pl

        num_rows = num_used = 0
        with contextlib.ExitStack() as stack:
            writers: dict[int, Any] = {}
            for batch in table.batches():
                num_rows += len(batch)
                keyed = batch.filter(pl.col("key").is_not_null())
                rows, units, first = self._index.places(keyed["key"].hash().to_numpy())
                num_used += int(np.count_nonzero(first))
                wanted = keyed[rows].with_columns(pl.Series("unit", units), pl.Series("first", first))
                for bucket in np.unique(units // self.units_of_a_bucket).tolist():
                    part = wanted.filter(pl.col("unit") // self.units_of_a_bucket == bucket)
                    self._write(stack, writers, bucket, part)
        repeated = sum(self._num_repeated(bucket) for bucket in sorted(writers))
        return {"table_rows": num_rows, "table_rows_unused": num_rows - num_used, "table_rows_repeated": repeated}

    def captions(self, unit: str) -> tuple[pl.DataFrame, list[str], list[int]]:
        """Images of a shard, a text for each, and the numbers of the rows that the table does not know."""
        import polars as pl

        images, keys = self._keys(unit)
        number = self.units.index(unit)
        found = self._read(number // self.units_of_a_bucket).filter(pl.col("unit") == number)
        wanted = pl.DataFrame({"key": keys}).join(
            found.unique("key", keep="first", maintain_order=True), on="key", how="left", maintain_order="left"
        )
        unknown = wanted.select(pl.arg_where(pl.col("unit").is_null())).to_series().to_list()
        return images, wanted["text"].fill_null("").to_list(), unknown

    def _keys(self, unit: str) -> tuple[pl.DataFrame, pl.Series]:
        """Images and keys of a shard; shards of a list without that column have no keys."""
        import polars as pl

        images = images_of(self.pairs, unit)
        if self.by == "sha256":
            hashes = [name for name in ("raw_sha256", "sha256") if name in images.columns]
            keys = images.select(pl.coalesce(hashes)).to_series().to_list()
        elif (found := resolve(self.by, images.columns)) is not None:
            keys = [follow(value, found[1]) for value in images[found[0]].to_list()]
        else:
            keys = [None] * len(images)
        return images, comparable(keys, self.by)

    def _build_index(self) -> _Index:
        import numpy as np

        known = [images_of(self.pairs, unit, columns_only=True) for unit in self.units]
        if all(resolve(self.by, images.columns) is None for images in known):
            names = ["url", "sha256", *joined.extra_columns(known[0])]
            raise UserError(
                f"The pairs in {self.pairs} have no column {self.by!r} to join by. {did_you_mean(self.by, names)} "
                "Name another with --by."
            )
        hashes, numbers = [], []
        for number, unit in enumerate(self.units):
            keys = self._keys(unit)[1].drop_nulls().unique(maintain_order=True)
            hashes.append(keys.hash().to_numpy())
            numbers.append(np.full(len(keys), number, np.uint32))
        together = np.concatenate(hashes)
        del hashes  # at a hundred million pairs each copy counts
        order = np.argsort(together, kind="stable")
        return _Index(together[order], np.concatenate(numbers)[order])

    def _write(self, stack: contextlib.ExitStack, writers: dict[int, Any], bucket: int, part: pl.DataFrame) -> None:
        import pyarrow as pa

        text = pa.large_string()
        kinds = pa.schema({"key": text, "text": text, "unit": pa.uint32(), "first": pa.bool_()})
        if bucket not in writers:
            writers[bucket] = stack.enter_context(pa.ipc.new_file(str(self._file(bucket)), kinds))
        writers[bucket].write_table(part.to_arrow().cast(kinds))

    def _read(self, bucket: int) -> pl.DataFrame:
        import polars as pl

        if self._bucket is None or self._bucket[0] != bucket:
            kinds = {"key": pl.String, "text": pl.String, "unit": pl.UInt32, "first": pl.Boolean}
            path = self._file(bucket)
            self._bucket = bucket, pl.read_ipc(path) if path.exists() else pl.DataFrame(schema=kinds)
        return self._bucket[1]

    def _num_repeated(self, bucket: int) -> int:
        keys = self._read(bucket).filter("first")["key"]
        return len(keys) - keys.n_unique()

    def _file(self, bucket: int) -> Path:
        return self.scratch / f"{bucket}.arrow"
