"""Training samples as rows of a table: parquet as Hugging Face ``datasets`` reads it, jsonl, csv for spreadsheets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import shard_samples
from clips_data.errors import UserError
from clips_data.shard_samples import Shards, TrainingSample

if TYPE_CHECKING:
    import pyarrow as pa

_ROW_GROUP_BYTES: Final = 32 << 20
_ROW_GROUP_ROWS: Final = 1000
_FIXED: Final = (
    "key",
    "sha256",
    "tar",
    "url",
    "image",
    "text",
    "text_from",
    "sub_captions",
    "codes",
    "scores",
    "extra",
)
_KINDS: Final[dict[str, set[str]]] = {"bool": {"bool"}, "int64": {"int"}, "double": {"int", "float"}, "string": {"str"}}
"""Types of score columns and the Python types of the values that fit in."""
_STARTS_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_QUOTE: Final = "'"


@dataclass(frozen=True)
class Layout:
    """The columns of a table: caption columns, fields of the scores with their kinds, whether images are carried."""

    columns: tuple[str, ...]
    scores: tuple[tuple[str, str], ...]
    images: bool

    @property
    def made(self) -> tuple[str, ...]:
        """The caption columns that are cut into sub-captions and have a code; the web caption has neither."""
        return tuple(column for column in self.columns if column != "web")


def layout(shards: Shards, columns: tuple[str, ...], *, images: bool) -> Layout:
    """Reads all ``.json`` members once for the fields of the scores: a sample lacks those that it has no value for.

    Raises ``UserError`` for a caption column that has the name of one of the table's own.
    """
    for column in columns:
        if column in _FIXED:
            raise UserError(
                f"The caption column {column!r} has the name of a column that the table has anyway. "
                "Leave it out by naming the others with --column."
            )
    kinds: dict[str, set[str]] = {}
    for tar in shards.tars:
        for sample in shard_samples.read(shards, tar, images=False):
            for name, value in sample.scores.items():
                kinds.setdefault(name, set()).add(type(value).__name__)
    return Layout(columns, tuple((name, _kind(found)) for name, found in sorted(kinds.items())), images)


def _kind(types: set[str]) -> str:
    """The type of a column that holds values of these Python types; ``json`` is text that holds any of them."""
    for kind, fitting in _KINDS.items():
        if types <= fitting:
            return kind
    return "json"


def row(sample: TrainingSample, tar: str, table: Layout) -> dict[str, Any]:
    """A sample without its image: ``text`` is what ``.txt`` holds, ``text_from`` the column it was taken from.

    ``sub_captions`` are pairs of character offsets into their column, ``extra`` the URL list's own columns.
    """
    spans = sample.about.get("sub_captions", {})
    return {
        "key": sample.key,
        "sha256": sample.sha256,
        "tar": tar,
        "url": sample.provenance.get("url"),
        "text": sample.text,
        "text_from": sample.provenance.get("txt"),
        **{column: sample.texts[column] for column in table.columns},
        "sub_captions": {column: spans.get(column, []) for column in table.made},
        "codes": {column: sample.codes.get(column) for column in table.made},
        "scores": sample.scores,
        "extra": sample.about.get("extra", {}),
    }


# --- jsonl and csv ----------------------------------------------------------------------------------------------------


def write_jsonl(samples: Iterable[TrainingSample], tar: str, table: Layout, path: Path) -> int:
    """One JSON object a line, as ``row`` has it. Returns the number of rows."""
    num_rows = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for sample in samples:
            file.write(json.dumps(row(sample, tar, table), ensure_ascii=False, allow_nan=False) + "\n")
            num_rows += 1
    return num_rows


def write_csv(samples: Iterable[TrainingSample], tar: str, table: Layout, path: Path) -> int:
    """A head, then one record a row; texts in quotes and escaped, nested values as JSON text. Returns the rows.

    Numbers stand without quotes and are never escaped.
    """
    num_rows = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\r\n")
        writer.writerow(csv_head(table))
        for sample in samples:
            writer.writerow([escape(cell) if isinstance(cell, str) else cell for cell in _cells(sample, tar, table)])
            num_rows += 1
    return num_rows


def csv_head(table: Layout) -> list[str]:
    return [
        "key", "sha256", "tar", "url", "text", "text_from", *table.columns,
        *(f"sub_captions.{column}" for column in table.made), *(f"codes.{column}" for column in table.made),
        *(f"scores.{name}" for name, _ in table.scores), "extra",
    ]  # fmt: skip


def _cells(sample: TrainingSample, tar: str, table: Layout) -> list[Any]:
    about = row(sample, tar, table)
    plain = [about[name] for name in ("key", "sha256", "tar", "url", "text", "text_from", *table.columns)]
    spans = [json.dumps(about["sub_captions"][column]) for column in table.made]
    codes = [about["codes"][column] for column in table.made]
    scores = list(_scores(sample, table).values())
    extra = json.dumps(about["extra"], sort_keys=True, ensure_ascii=False)
    return ["" if cell is None else cell for cell in (*plain, *spans, *codes, *scores, extra)]


def _scores(sample: TrainingSample, table: Layout) -> dict[str, Any]:
    found = {name: sample.scores.get(name) for name, _ in table.scores}
    return {
        name: json.dumps(found[name]) if kind == "json" and found[name] is not None else found[name]
        for name, kind in table.scores
    }


def escape(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: a ``'`` goes before what could begin one, and before a ``'``.

    So a cell that begins with ``'`` always has one too many, and ``unescape`` gives back every text.
    """
    return _QUOTE + text if text.startswith((*_STARTS_FORMULA, _QUOTE)) else text


def unescape(cell: str) -> str:
    return cell.removeprefix(_QUOTE)


# --- parquet ----------------------------------------------------------------------------------------------------------


def parquet_schema(table: Layout) -> pa.Schema:
    """The pinned schema, with the features of Hugging Face's ``datasets`` in its metadata.

    A struct without fields cannot be kept in parquet, so ``sub_captions``, ``codes`` and ``scores`` are there only
    where they have some. ``extra`` is JSON text: its fields are those of the user's list, and differ from row to row.
    """
    import pyarrow as pa

    text, spans = pa.string(), pa.list_(pa.struct([("start", pa.int32()), ("end", pa.int32())]))
    image = [("image", pa.struct([("bytes", pa.binary()), ("path", text)]))] if table.images else []
    nested = {
        "sub_captions": [(column, spans) for column in table.made],
        "codes": [(column, text) for column in table.made],
        "scores": [(name, _arrow(kind)) for name, kind in table.scores],
    }
    fields = [(name, text) for name in ("key", "sha256", "tar", "url")] + image
    fields += [(name, text) for name in ("text", "text_from", *table.columns)]
    fields += [(name, pa.struct(inner)) for name, inner in nested.items() if inner]
    fields.append(("extra", text))
    features = {name: {"_type": "Image"} if name == "image" else _feature(kind) for name, kind in fields}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _arrow(kind: str) -> pa.DataType:
    import pyarrow as pa

    return {"bool": pa.bool_(), "int64": pa.int64(), "double": pa.float64()}.get(kind, pa.string())


def _feature(kind: pa.DataType) -> Any:
    """A type in the JSON of ``datasets``. Lists are in the form that all its versions read alike."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    if pa.types.is_list(kind):
        return [_feature(kind.value_type)]
    return {"dtype": {"double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


def write_parquet(samples: Iterable[TrainingSample], tar: str, table: Layout, path: Path) -> int:
    """Row groups of some MB, so that memory holds one of them. Returns the number of rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, num_rows = parquet_schema(table), 0
    rows: list[dict[str, Any]] = []
    size_bytes = 0
    with pq.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows.clear()

        for sample in samples:
            rows.append(_parquet_row(sample, tar, table))
            size_bytes += len(sample.image)
            num_rows += 1
            if size_bytes >= _ROW_GROUP_BYTES or len(rows) == _ROW_GROUP_ROWS:
                flush()
                size_bytes = 0
        flush()
    return num_rows


def _parquet_row(sample: TrainingSample, tar: str, table: Layout) -> dict[str, Any]:
    about = row(sample, tar, table)
    about["sub_captions"] = {column: _spans(spans) for column, spans in about["sub_captions"].items()}
    about["scores"] = _scores(sample, table)
    about["extra"] = json.dumps(about["extra"], sort_keys=True, ensure_ascii=False)
    if table.images:
        about["image"] = {"bytes": sample.image, "path": f"{sample.key}.{sample.image_ext}"}
    return about


def _spans(spans: Sequence[Sequence[int]]) -> list[dict[str, int]]:
    return [{"start": start, "end": end} for start, end in spans]
