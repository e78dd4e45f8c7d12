"""Where URL lists come from: the user's file, or the demo world's own list. Cut into shards by img2dataset's Reader."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clips_data import ledger
from clips_data.config import DownloadConfig
from clips_data.errors import UserError, did_you_mean

FORMATS = ("parquet", "csv", "tsv", "jsonl", "txt")


@dataclass(frozen=True)
class ListShard:
    """One shard of the list: its rows wait in an Arrow file; ``digest`` identifies their content."""

    number: int
    arrow_file: Path
    num_rows: int
    digest: str


@dataclass(frozen=True)
class UrlList:
    """A list on disk, with the column names that img2dataset's Reader needs."""

    path: Path
    format: str
    url_column: str
    caption_column: str | None
    extra_columns: tuple[str, ...]


def locate(config: DownloadConfig, scratch: Path) -> UrlList:
    """Finds the list and checks its columns; writes the demo's list into ``scratch`` first where that is asked for."""
    if config.source == "demo":
        return _write_demo_list(config, scratch / "demo.parquet")
    path = Path(config.source)
    if not path.exists():
        raise UserError(
            f"The URL list {path} does not exist. Give a path to a parquet, csv, tsv, jsonl or txt file, or 'demo'."
        )
    suffix = path.suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        raise UserError(f"{path} ends in {suffix!r}. URL lists are {', '.join(FORMATS)}.")
    if suffix == "txt":
        return UrlList(path, suffix, "url", None, ())
    columns = _columns(path, suffix)
    url_column = "url" if config.url_column == "auto" else config.url_column
    caption_column = "caption" if config.caption_column == "auto" else config.caption_column
    for option, column in (("--url-column", url_column), ("--caption-column", caption_column)):
        if column is not None and column not in columns:
            raise UserError(f"{path} has no column {column!r}. {did_you_mean(column, columns)} Set it with {option}.")
    extra = tuple(column for column in columns if column not in (url_column, caption_column))
    reserved = {"key", "status", "code", "error_message", "width", "height", "sha256", "url", "caption"} & set(extra)
    if reserved:
        raise UserError(
            f"{path} has columns that clips writes itself: {', '.join(sorted(reserved))}. Rename them first."
        )
    return UrlList(path, suffix, url_column, caption_column, extra)


def _columns(path: Path, suffix: str) -> list[str]:
    import pyarrow as pa
    from pyarrow import csv, parquet
    from pyarrow import json as arrow_json

    try:
        if suffix == "parquet":
            return list(parquet.read_schema(path).names)
        if suffix in ("csv", "tsv"):
            options = csv.ParseOptions(delimiter="\t" if suffix == "tsv" else ",")
            with csv.open_csv(path, parse_options=options) as reader:
                return list(reader.schema.names)
        return list(arrow_json.read_json(path).column_names)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read as {suffix}: {error}. Check that the file is complete.") from None


def _write_demo_list(config: DownloadConfig, path: Path) -> UrlList:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clips_data.demo import web

    rows = web.demo_rows(config.num_pairs, config.world)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return UrlList(path, "parquet", "url", "caption", ("scene", "captions"))


def cut(url_list: UrlList, shard_rows: int, scratch: Path) -> list[ListShard]:
    """Cuts the list into shards of ``shard_rows`` with img2dataset's Reader. Runs in a worker that has it imported."""
    import pyarrow as pa
    from img2dataset.reader import Reader

    with talk_to_log(scratch.parent):
        reader = Reader(
            str(url_list.path), url_list.format, url_list.url_column, url_list.caption_column, None, None,
            list(url_list.extra_columns) or None, shard_rows, set(), str(scratch),
        )  # fmt: skip
        try:
            files = list(reader)
        except pa.ArrowException as error:
            raise UserError(f"{url_list.path} cannot be read: {error}. Check that the file is complete.") from None
    shards = []
    for number, file in files:
        with pa.memory_map(file) as source:
            rows = pa.ipc.open_file(source).read_all().to_pylist()
        digest = ledger.digest_bytes(json.dumps(rows, sort_keys=True, default=str).encode())
        shards.append(ListShard(number, Path(file), len(rows), digest))
    return shards


@contextlib.contextmanager
def talk_to_log(folder: Path) -> Iterator[None]:
    """img2dataset prints to stdout, which is for data here; what it says is kept in a log."""
    (folder / "log").mkdir(exist_ok=True)
    with (folder / "log" / "img2dataset.log").open("a") as log, contextlib.redirect_stdout(log):
        yield


def column_names(url_list: UrlList) -> list[str]:
    """The columns of a cut shard, in the order that img2dataset's Reader gives them."""
    caption = ["caption"] if url_list.caption_column is not None else []
    return [*url_list.extra_columns, *caption, "url"]
