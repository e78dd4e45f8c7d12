"""A shuffle on disk: rows are spooled into buckets by their draw, and each bucket is then sorted by itself.

In memory are the rows of one task or one bucket, however many there are in all. The order is by (draw, key), so it
does not depend on how many tasks, buckets or processes there were.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from clips_data.errors import UserError

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

DRAW: Final = "draw"
"""Column with each row's place among all, uniform in [0, 1)."""
ROWS_AT_ONCE: Final = 16_384
MOST_BUCKETS: Final = 1024
"""Above this, buckets grow with the rows: a task's file holds a batch for every bucket, and these must not be tiny."""
_BATCH_ROWS: Final = 1024


def num_buckets(num_rows: int) -> int:
    return max(1, min(MOST_BUCKETS, -(-num_rows // ROWS_AT_ONCE)))


def rows_of_task(num_rows: int) -> int:
    """How many rows to spool together, so that a task's batches are no smaller than a bucket's share of them."""
    return max(ROWS_AT_ONCE, -(-num_rows // MOST_BUCKETS))


@dataclass(frozen=True)
class Spool:
    """A folder with the files of tasks, each of which holds one batch for every bucket."""

    folder: Path
    num_buckets: int

    def write(self, table: pl.DataFrame, name: str, *, upto: float = 1.0) -> None:
        """Spools rows whose draws are below ``upto``. The same name writes the same file again."""
        import polars as pl

        self.folder.mkdir(parents=True, exist_ok=True)
        bucket = (pl.col(DRAW) * (self.num_buckets / upto)).cast(pl.Int64).clip(0, self.num_buckets - 1)
        ordered = table.with_columns(bucket.alias("bucket")).sort("bucket", "key")
        ends = ordered["bucket"].search_sorted(pl.Series(range(self.num_buckets)), side="right").to_list()
        rows = ordered.drop("bucket").to_arrow()
        with _new_file(self.folder / f"{name}.arrow", rows.schema) as file:
            for start, end in itertools.pairwise([0, *ends]):
                file.write_batch(_one_batch(rows.slice(start, end - start)))

    def read(self, bucket: int) -> pl.DataFrame | None:
        """The rows of one bucket in order, or ``None`` where nothing was spooled."""
        import polars as pl
        import pyarrow as pa

        batches = []
        for path in sorted(self.folder.glob("*.arrow")):
            with _open(path) as file:
                batches.append(pl.DataFrame(pa.Table.from_batches([file.get_batch(bucket)])))
        return pl.concat(batches).sort(DRAW, "key") if batches else None


@dataclass(frozen=True)
class Sorted:
    """Rows in their final order, in a file for each bucket; ``ends`` are the numbers of rows up to each file's end."""

    folder: Path
    ends: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.ends[-1] if self.ends else 0

    def rows(self, first: int, num_rows: int) -> pl.DataFrame:
        """``num_rows`` rows from the ``first``."""
        import polars as pl
        import pyarrow as pa

        found, start = [], 0
        for bucket, end in enumerate(self.ends):
            if start < first + num_rows and first < end:
                with _open(bucket_file(self.folder, bucket)) as file:
                    here = range(max(first - start, 0), min(first + num_rows, end) - start)
                    if here:
                        batches = range(here.start // _BATCH_ROWS, (here.stop - 1) // _BATCH_ROWS + 1)
                        table = pa.Table.from_batches([file.get_batch(number) for number in batches])
                        found.append(pl.DataFrame(table.slice(here.start - batches.start * _BATCH_ROWS, len(here))))
            start = end
        assert found, (self.folder, first, num_rows)
        return pl.concat(found)

    def column(self, name: str) -> Iterator[pl.Series]:
        """One column of all rows, in order, some at a time."""
        import polars as pl
        import pyarrow as pa

        for bucket in range(len(self.ends)):
            with _open(bucket_file(self.folder, bucket)) as file:
                for number in range(file.num_record_batches):
                    batch = file.get_batch(number)
                    yield pl.Series(name, pa.chunked_array([batch.column(name)]))


def bucket_file(folder: Path, bucket: int) -> Path:
    return folder / f"{bucket:05d}.arrow"


def sort_bucket(spool: Spool, bucket: int, folder: Path) -> int:
    """Writes one bucket in its final order and returns its number of rows. A key that is there twice is refused."""
    table = spool.read(bucket)
    if table is None:
        return 0
    if (twice := table.filter(table["key"].is_duplicated())).height:
        raise UserError(
            f"Key {twice['key'][0]} is in more than one shard of the pairs ({', '.join(sorted(set(twice['unit'])))}). "
            "Make the later one again."
        )
    folder.mkdir(parents=True, exist_ok=True)
    rows = table.drop(DRAW).to_arrow()
    with _new_file(bucket_file(folder, bucket), rows.schema) as file:
        for start in range(0, len(rows), _BATCH_ROWS):
            file.write_batch(_one_batch(rows.slice(start, _BATCH_ROWS)))
    return len(rows)


def _one_batch(rows: pa.Table) -> pa.RecordBatch:
    import pyarrow as pa

    batches = rows.combine_chunks().to_batches()
    if batches:
        return batches[0]
    return pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in rows.schema], schema=rows.schema)


@contextlib.contextmanager
def _new_file(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchFileWriter]:
    import pyarrow as pa

    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with path.open("wb") as sink, pa.ipc.new_file(sink, schema, options=options) as file:
        yield file


@contextlib.contextmanager
def _open(path: Path) -> Iterator[pa.RecordBatchFileReader]:
    import pyarrow as pa

    with path.open("rb") as source, pa.ipc.open_file(source) as file:
        yield file


def cut(sizes: Iterator[Sequence[int]], most_rows: int, most_bytes: int) -> list[int]:
    """Lengths of the runs that rows of these sizes are cut into, each within both limits but never empty."""
    lengths, rows, total = [], 0, 0
    for size in itertools.chain.from_iterable(sizes):
        if rows and (rows == most_rows or total + size > most_bytes):
            lengths.append(rows)
            rows = total = 0
        rows, total = rows + 1, total + size
    return [*lengths, rows] if rows else lengths
