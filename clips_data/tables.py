"""Any table as a stream of Arrow tables: parquet, csv, tsv, JSON, plain lists, the texts of webdataset tars.

Memory holds some thousand rows at a time, however long the table is. Values stay as they are written: columns of csv
and tsv are text throughout (no types are guessed, so leading zeros survive), JSON keeps numbers and booleans, and its
nested values become JSON text. What is damaged ends with one sentence that names the file and, where known, the line;
no message quotes a row, which may hold a signed URL.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from clips_data import files
from clips_data.errors import UserError
from clips_data.files import Budget, Part

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE: Final = 10_000
BYTES_AT_ONCE: Final = 1 << 26
_TEXT_MEMBERS: Final = (".json", ".txt")


@dataclass(frozen=True)
class Dialect:
    """What a csv or tsv does not say of itself: the ``names`` of columns without a header, and whether it quotes."""

    names: tuple[str, ...] | None = None
    quotes: bool = True


def stream(parts: Sequence[Part], scratch: Path, budget: Budget, dialect: Dialect) -> Iterator[pa.Table]:
    """The rows of all parts in order, some thousand at a time. Columns are unique; types may differ between tables."""
    readers = {"parquet": _parquet, "csv": _csv, "tsv": _csv, "jsonl": _json, "txt": _plain, "tar": _tar}
    for part in parts:
        for table in readers[part.format](part, scratch, budget, dialect):
            yield _with_partition(table, part)


def column_names(part: Part, scratch: Path, budget: Budget, dialect: Dialect) -> list[str]:
    """The columns of a file's first rows. Bytes read for this are not counted as spent."""
    spent = budget.spent
    try:
        if part.format == "parquet":
            with files.readable(part), files.seekable(part, scratch, budget) as file:
                import pyarrow.parquet as pq

                names = list(pq.read_schema(file).names)
            _check_names(names, part.label)
            return [*names, *(name for name in part.partition if name not in names)]
        for table in stream([part], scratch, budget, dialect):
            return list(table.column_names)
        return []
    finally:
        budget.spent = spent


def first_fields(part: Part, budget: Budget) -> list[str]:
    """The fields of the first line of a csv or tsv, unquoted ones as they are."""
    spent = budget.spent
    with files.readable(part), files.decompressed(part, budget) as file:
        line = next(files.lines(part, file), "")
    budget.spent = spent
    return line.rstrip("\r\n").split(_delimiter(part))


def content_digest(table: pa.Table) -> str:
    """Identifies names and values of a table, whatever its chunks, encodings and widths of types."""
    import pyarrow as pa
    import pyarrow.compute as pc

    whole = hashlib.sha256()
    for name in table.column_names:
        column = table[name].combine_chunks()
        kind, valid = column.type, pc.is_valid(column)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
            texts = pc.fill_null(column.cast(pa.large_string()), "")
            values = [pc.binary_length(texts).to_numpy().tobytes(), "".join(texts.to_pylist()).encode()]
            label = "text"
        elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            wide, nothing = (pa.float64(), 0.0) if pa.types.is_floating(kind) else (pa.int64(), 0)
            values = [pc.fill_null(column.cast(wide, safe=False), nothing).to_numpy().tobytes()]
            label = str(wide)
        else:
            values = [json.dumps(column.to_pylist(), sort_keys=True, default=str).encode()]
            label = "nested"
        about = json.dumps([name, label, len(column)]).encode()
        for piece in (about, valid.cast(pa.int8()).to_numpy().tobytes(), *values):
            whole.update(hashlib.sha256(piece).digest())
    return whole.hexdigest()


def _check_names(names: Sequence[str], label: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{label} has more than one column called {', '.join(map(repr, twice))}. Rename them.")


def _with_partition(table: pa.Table, part: Part) -> pa.Table:
    import pyarrow as pa

    _check_names(table.column_names, part.label)
    for name, value in part.partition.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def _parquet(part: Part, scratch: Path, budget: Budget, dialect: Dialect) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with files.readable(part), files.seekable(part, scratch, budget) as file, pq.ParquetFile(file) as opened:
        about = opened.metadata
        dataclasses.replace(budget).spend(
            sum(about.row_group(group).total_byte_size for group in range(about.num_row_groups)), part.label
        )
        for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE):
            budget.spend(batch.nbytes, part.label)
            table = pa.Table.from_batches([batch]).replace_schema_metadata(None)
            for place, column in enumerate(table.schema):
                if pa.types.is_dictionary(column.type):
                    table = table.set_column(place, column.name, table[place].cast(column.type.value_type))
            yield table


def _delimiter(part: Part) -> str:
    return "\t" if part.format == "tsv" else ","


def _csv(part: Part, scratch: Path, budget: Budget, dialect: Dialect) -> Iterator[pa.Table]:
    with files.readable(part), files.decompressed(part, budget) as file:
        names = dialect.names
        columns: list[list[str]] = []
        num_chars = 0
        for line, fields in _csv_rows(part, file, dialect):
            if names is None:
                names = tuple(name.strip() or f"unnamed_{place}" for place, name in enumerate(fields))
                _check_names(names, part.label)
                continue
            if len(fields) != len(names):
                raise UserError(
                    f"{part.label} line {line} has {len(fields)} columns instead of {len(names)}"
                    f" ({', '.join(names)}). Mend the line, or quote what holds a {_delimiter(part)!r}."
                )
            columns = columns or [[] for _ in names]
            for column, value in zip(columns, fields, strict=True):
                column.append(value)
                num_chars += len(value)
            if len(columns[0]) == ROWS_AT_ONCE or num_chars > BYTES_AT_ONCE:
                yield _text_table(names, columns)
                columns, num_chars = [], 0
        if names is not None:
            yield _text_table(names, columns or [[] for _ in names])


def _csv_rows(part: Part, file: io.BufferedReader, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Number of its first line and fields of each row; blank lines are passed over."""
    lines = files.lines(part, file)
    if not dialect.quotes:
        for number, line in enumerate(lines, 1):
            if bare := line.rstrip("\r\n"):
                yield number, bare.split(_delimiter(part))
        return
    csv.field_size_limit(files.MAX_LINE_BYTES)
    reader = csv.reader(lines, delimiter=_delimiter(part), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{part.label}: the row that begins in line {number} is no valid {part.format}: {error}. A field with "
                'a quote in it is written "so ""quoted"" here".'
            ) from None
        if fields is None:
            return
        if fields:
            yield number, fields


def _text_table(names: Iterable[str], columns: Sequence[Sequence[str]]) -> pa.Table:
    import pyarrow as pa

    arrays = [pa.array(column, pa.string()) for column in columns]
    return pa.Table.from_arrays(arrays, names=list(names))


def _plain(part: Part, scratch: Path, budget: Budget, dialect: Dialect) -> Iterator[pa.Table]:
    with files.readable(part), files.decompressed(part, budget) as file:
        urls: list[str] = []
        for line in files.lines(part, file):
            if url := line.strip():
                urls.append(url)
            if len(urls) == ROWS_AT_ONCE:
                yield _text_table(["url"], [urls])
                urls = []
        yield _text_table(["url"], [urls])


def _json(part: Part, scratch: Path, budget: Budget, dialect: Dialect) -> Iterator[pa.Table]:
    with files.readable(part), files.decompressed(part, budget) as file:
        start = file.peek(1)[:1]
        while start.isspace():
            file.read(1)
            start = file.peek(1)[:1]
        values = _json_array(part, file) if start == b"[" else _json_lines(part, file)
        rows: list[dict[str, Any]] = []
        last = ""
        for last, value in values:
            if not isinstance(value, dict):
                raise UserError(f'{part.label} {last} is no JSON object. Each row is one, like {{"url": "…"}}.')
            rows.append(value)
            if len(rows) == ROWS_AT_ONCE:
                yield _json_table(rows, f"{part.label}, up to {last}")
                rows = []
        if rows:
            yield _json_table(rows, f"{part.label}, up to {last}")


def _json_lines(part: Part, file: io.BufferedReader) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(files.lines(part, file), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _no_json(part, f"line {number}", error) from None


def _json_array(part: Part, file: io.BufferedReader) -> Iterator[tuple[str, Any]]:
    """The entries of one JSON array, decoded one by one."""
    decoder, text = json.JSONDecoder(), io.TextIOWrapper(file, encoding="utf-8")
    buffer, place, number = text.read(1 << 20).lstrip()[1:], 0, 0
    while True:
        while buffer[place : place + 1] in (" ", "\t", "\r", "\n", ","):
            place += 1
        if buffer[place : place + 1] == "]":
            return
        try:
            value, place = decoder.raw_decode(buffer, place)
        except (ValueError, RecursionError) as error:
            more = text.read(1 << 20) if len(buffer) - place < files.MAX_LINE_BYTES else ""
            if not more:
                raise _no_json(part, f"entry {number + 1}", error) from None
            buffer, place = buffer[place:] + more, 0
            continue
        number += 1
        yield f"entry {number}", value


def _no_json(part: Part, where: str, error: Exception) -> UserError:
    reason = f": {error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
    return UserError(
        f"{part.label} {where} is no JSON{reason}. Rows are objects, one a line or all in one array; check that the "
        "file is complete."
    )


def _json_table(rows: Sequence[Mapping[str, Any]], where: str) -> pa.Table:
    import pyarrow as pa

    names = list(dict.fromkeys(name for row in rows for name in row))
    arrays = [_json_column(name, [row.get(name) for row in rows], where) for name in names]
    return pa.Table.from_arrays(arrays, names=names)


def _json_column(name: str, values: list[Any], where: str) -> pa.Array:
    """Text, 64-bit numbers or booleans; lists and objects as JSON text."""
    import pyarrow as pa

    kinds = {type(value) for value in values} - {type(None)}
    if kinds <= {str, dict, list}:
        texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        try:
            return pa.array(texts, pa.string() if kinds else pa.null())
        except UnicodeEncodeError:  # half a surrogate pair: JSON can spell it, no text can hold it
            return pa.array([t and t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts])
    if kinds == {bool}:
        return pa.array(values, pa.bool_())
    if kinds <= {int, float}:
        try:
            return pa.array(values, pa.int64() if kinds == {int} else pa.float64())
        except (OverflowError, pa.ArrowInvalid):
            raise UserError(f"{where}: column {name!r} has a number beyond 64 bits. Write it as text.") from None
    found = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise UserError(f"{where}: column {name!r} has values of several types ({found}). Write them all as one type.")


def _tar(part: Part, scratch: Path, budget: Budget, dialect: Dialect) -> Iterator[pa.Table]:
    """A row for each sample of a webdataset tar: its .json and .txt members by extension; others are passed over."""
    with files.readable(part), files.decompressed(part, budget) as file:
        rows: list[dict[str, Any]] = []
        with tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                key, _, extension = path.name.partition(".")
                if not member.isreg() or not path.name.endswith(_TEXT_MEMBERS):
                    continue
                if member.size > files.MAX_LINE_BYTES:
                    raise UserError(f"{part.label}: {member.name} is longer than {files.MAX_LINE_BYTES} bytes.")
                key = str(path.with_name(key))
                if not rows or rows[-1]["__key__"] != key:
                    if len(rows) == ROWS_AT_ONCE:
                        yield _json_table(rows, part.label)
                        rows = []
                    rows.append({"__key__": key})
                opened = tar.extractfile(member)
                assert opened is not None
                rows[-1][extension] = opened.read().decode(errors="replace")
        if rows:
            yield _json_table(rows, part.label)
