"""Writes a stream of tables as parquet files of one length and one schema: what img2dataset's Reader is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from clips_data.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa


PART_ROWS: Final = 100_000
"""img2dataset's Reader takes a whole file of a list into memory, so parts are about this long."""


def rows_of_a_part(shard_rows: int) -> int:
    """A whole number of shards, so that only a list's last shard is short."""
    return max(shard_rows, PART_ROWS // shard_rows * shard_rows)


class PartWriter:
    """Writes tables, whose columns may differ, as parquet files of one length, and gives all the same schema."""

    def __init__(self, folder: Path, part_rows: int, label: str) -> None:
        import pyarrow as pa

        self.folder, self.part_rows, self.label = folder, part_rows, label
        self.schema = pa.schema([])
        self.num_files = 0
        self._schemas: list[pa.Schema] = []
        self._waiting: list[pa.Table] = []
        self._rows = 0

    def add(self, table: pa.Table) -> None:
        import pyarrow as pa

        table = _with_texts(table, self.label)
        twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
        if twice:
            raise UserError(f"{self.label}: two columns would be called {twice[0]!r} in the pairs. Rename one.")
        for column in table.schema:
            try:
                self.schema = pa.unify_schemas([self.schema, pa.schema([column])], promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                before = self.schema.field(column.name).type
                raise UserError(
                    f"{self.label}: column {column.name!r} holds {before} at first and {column.type} further on. "
                    "Write it as one type."
                ) from None
        while table.num_rows:
            piece = table.slice(0, self.part_rows - self._rows)
            self._waiting.append(piece)
            self._rows += piece.num_rows
            table = table.slice(piece.num_rows)
            if self._rows == self.part_rows:
                self._flush()

    def close(self) -> None:
        """Writes the rest, then again what was written before the last column or type was seen."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._rows:
            self._flush()
        fields = [field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in self.schema]
        self.schema = pa.schema(fields)
        for number, written in enumerate(self._schemas):
            if written != self.schema:
                path = self._path(number)
                with pq.ParquetFile(path) as file:
                    table = file.read()
                pq.write_table(_conformed(table, self.schema, self.label), path)

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.concat_tables([_conformed(table, self.schema, self.label) for table in self._waiting])
        pq.write_table(table, self._path(self.num_files))
        self._schemas.append(table.schema)
        self.num_files += 1
        self._waiting, self._rows = [], 0

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.parquet"


def _with_texts(table: pa.Table, label: str) -> pa.Table:
    """URLs and captions as text; all-null ones too."""
    import pyarrow as pa

    for name in ("url", "caption"):
        place = table.schema.get_field_index(name)
        if place < 0 or table.schema.field(name).type == pa.string():
            continue
        kind = table.schema.field(name).type
        texts = (pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary, pa.types.is_large_binary)
        if not (pa.types.is_null(kind) or any(is_text(kind) for is_text in texts)):
            raise UserError(f"{label}: the column used as {name} holds {kind}, not text. Set it with --{name}-column.")
        try:
            table = table.set_column(place, name, table[name].cast(pa.string()))
        except pa.ArrowInvalid:
            raise UserError(f"{label}: the column used as {name} holds bytes that are not UTF-8.") from None
    return table


def _conformed(table: pa.Table, wanted: pa.Schema, label: str) -> pa.Table:
    import pyarrow as pa

    columns = []
    for column in wanted:
        if column.name not in table.column_names:
            columns.append(pa.nulls(table.num_rows, column.type))
            continue
        try:
            columns.append(table[column.name].cast(column.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            kinds = f"{table.schema.field(column.name).type} and {column.type}"
            raise UserError(f"{label}: column {column.name!r} mixes {kinds}. Write it as one type.") from None
    return pa.Table.from_arrays(columns, schema=wanted)
