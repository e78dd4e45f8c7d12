"""Answers that were paid for already: found by the digest of their request, wherever their rows lie now.

The digest covers the image, the rendered texts, decoding, the seed where it matters, and the model with its revision.
So a data set that was moved, cut into other shards or captioned under another column's name does not pay twice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import joined, ledger
from clips_data.errors import UserError
from clips_data.recaption.engines import Answer

if TYPE_CHECKING:
    import polars as pl

NOT_ANSWERED: Final = ("no_input", "duplicate", "unreadable_image", "prompt_too_long", "engine_error", "engine_died")
"""Codes of rows to which no model said anything: these are asked again."""


class Earlier:
    """The finished tables of caption columns. Holds some forty bytes a row in memory, the texts stay on disk."""

    def __init__(self, tables: Sequence[Path]) -> None:
        self._tables = list(tables)
        self._index: pl.DataFrame | None = None

    def answers(self, digests: Collection[str]) -> dict[str, tuple[Answer, str]]:
        """The answer to each of these requests that was answered before, and the engine that gave it."""
        if not self._tables or not digests:
            return {}
        found = {}
        for number in self._where(digests):
            table = self._read(
                self._tables[number], ["request", "code", "raw", "finish_reason", "num_tokens", "engine"]
            )
            for row in table.filter(table["request"].is_in(list(digests))).iter_rows(named=True):
                if row["code"] not in NOT_ANSWERED:
                    answer = Answer("ok", row["raw"], row["finish_reason"], row["num_tokens"])
                    found[row["request"]] = (answer, row["engine"])
        return found

    def _where(self, digests: Collection[str]) -> list[int]:
        import polars as pl

        if self._index is None:
            parts = [
                self._read(path, ["request"]).drop_nulls().with_columns(table=pl.lit(number, pl.UInt32))
                for number, path in enumerate(self._tables)
            ]
            self._index = pl.concat(parts).sort("request")
        known, wanted = self._index["request"], pl.Series(sorted(digests), dtype=pl.String)
        places = known.search_sorted(wanted).to_list()  # the index is large and asked often
        return sorted(
            {
                int(self._index["table"][place])
                for place, digest in zip(places, wanted, strict=True)
                if place < len(known) and known[place] == digest
            }
        )

    def _read(self, path: Path, columns: list[str]) -> pl.DataFrame:
        import polars as pl

        table = joined.read_table(path)
        if "request" not in table.columns:  # imported, or made by a version that did not note requests
            table = table.with_columns(request=pl.lit(None, pl.String))
        return table.select(columns)


def answered(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[Answer, str]]:
    """The same of journal lines."""
    return {
        row["request"]: (Answer(row["code"], row["raw"], row["finish_reason"], row["num_tokens"]), row["engine"])
        for row in rows
        if row["code"] == "ok" and row["request"]
    }


def tables_of(folders: Sequence[str]) -> list[Path]:
    """The finished tables in folders of caption columns. Raises ``UserError`` for a folder that is none."""
    found = []
    for folder in map(Path, folders):
        units = ledger.finished_units(folder)
        if not units:
            raise UserError(f"{folder} holds no finished captions to reuse. Name folders such as captions/synthetic.")
        found += [folder / f"{unit}.parquet" for unit in units]
    return found


def readable(folder: Path, units: Iterable[str]) -> list[Path]:
    """The tables of these units that can be read, finished or not: each row says by its digest what it answers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    for path in (folder / f"{unit}.parquet" for unit in units):
        try:
            pq.read_table(path, columns=["request", "raw"])
        except (OSError, ValueError, pa.ArrowException):
            continue  # absent, torn, or of a column without requests: then it is asked again
        found.append(path)
    return found
