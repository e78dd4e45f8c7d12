"""URL lists of every kind, whole and damaged: what becomes of them, and what is said about them."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from clips_data import download, executor, parts, sources, tables
from clips_data.config import DownloadConfig
from clips_data.errors import UserError
from clips_data.sources import ListShard, UrlList

SECRET = "s3cr3tSignature0123456789"
ROWS: list[dict[str, Any]] = [
    {"url": f"http://host.test/{n}.jpg", "caption": text, "uid": f"00{n}"}
    for n, text in enumerate(["plain", 'a, "quoted" one', "zwei\nZeilen", "ünï ☃", ""])
]
ONE_LINE_ROWS = [row for row in ROWS if "\n" not in row["caption"]]


def as_csv(rows: list[dict[str, Any]], separator: str = ",") -> bytes:
    return pl.DataFrame(rows).write_csv(separator=separator).encode()


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pl.DataFrame(rows).write_parquet(file)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "parquet": as_parquet,
    "csv": as_csv,
    "tsv": lambda rows: as_csv(rows, "\t"),
    "jsonl": as_jsonl,
    "json": lambda rows: json.dumps(rows, indent=1).encode(),
    "ndjson": lambda rows: b"\n" + as_jsonl(rows) + b"\n",
}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": lambda data: (
        zstandard.ZstdCompressor().compress(data[:40]) + zstandard.ZstdCompressor().compress(data[40:])
    ),
}


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def locate(tmp_path: Path, source: Path | str, **changes: Any) -> UrlList:
    config = DownloadConfig(source=str(source), **changes)
    return sources.locate(config, tmp_path / "scratch")


def rows_of(url_list: UrlList) -> list[dict[str, Any]]:
    """The rows as img2dataset's Reader will see them."""
    files = sorted(url_list.path.glob("*.parquet")) if url_list.path.is_dir() else [url_list.path]
    table = pl.concat([pl.read_parquet(file, hive_partitioning=False) for file in files])
    renamed = {url_list.url_column: "url"} | ({url_list.caption_column: "caption"} if url_list.caption_column else {})
    return table.rename(renamed).to_dicts()


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_list_has_the_same_rows(tmp_path: Path, suffix: str, packing: str) -> None:
    source = write(tmp_path / f"list.{suffix}{packing}", PACKERS[packing](WRITERS[suffix](ROWS)))
    found = locate(tmp_path, source)
    assert rows_of(found) == ROWS
    assert found.extra_columns == ("uid",)
    assert (found.path == source) == (suffix == "parquet" and not packing)


@pytest.mark.parametrize("packing", PACKERS)
def test_a_plain_list_of_urls_has_no_captions(tmp_path: Path, packing: str) -> None:
    source = write(tmp_path / f"list.txt{packing}", PACKERS[packing](b"\xef\xbb\xbfhttp://h/1\r\n\n  http://h/2?a,b"))
    found = locate(tmp_path, source)
    assert rows_of(found) == [{"url": "http://h/1"}, {"url": "http://h/2?a,b"}]
    assert found.caption_column is None


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (as_jsonl(ROWS), ROWS),
        (as_csv(ROWS), ROWS),
        (as_csv(ROWS, "\t"), ROWS),
        (as_parquet(ROWS), ROWS),
        (gzip.compress(as_parquet(ROWS)), ROWS),
        (PACKERS[".zst"](as_csv(ROWS)), ROWS),
        (b"http://h/1,x\nhttp://h/2\n", [{"url": "http://h/1,x"}, {"url": "http://h/2"}]),
    ],
    ids=["jsonl", "csv", "tsv", "parquet", "parquet.gz", "csv.zst", "txt"],
)
def test_stdin_is_told_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, rows: list[dict[str, Any]]
) -> None:
    reading, writing = os.pipe()
    feeder = threading.Thread(target=lambda: os.fdopen(writing, "wb").write(data))
    feeder.start()
    with os.fdopen(reading) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert rows_of(locate(tmp_path, "-")) == rows
    feeder.join()


def test_csv_keeps_text_and_json_keeps_numbers(tmp_path: Path) -> None:
    row = '"http://h/1","c","007","1e3","NA"\n'
    found = locate(tmp_path, write(tmp_path / "a.csv", ("url,caption,lot,big,gone\n" + row).encode()))
    assert rows_of(found)[0] == {"url": "http://h/1", "caption": "c", "lot": "007", "big": "1e3", "gone": "NA"}
    values = {"url": "http://h/1", "caption": None, "lot": 7, "big": 1.5, "yes": True, "tags": ["a", {"b": 1}]}
    (kept,) = rows_of(locate(tmp_path / "j", write(tmp_path / "b.jsonl", json.dumps(values).encode())))
    assert kept == values | {"tags": '["a", {"b": 1}]'}


def test_an_index_column_without_a_name_is_carried(tmp_path: Path) -> None:
    found = locate(tmp_path, write(tmp_path / "a.csv", b",url,caption\n0,http://h/1,c\n"))
    assert found.extra_columns == ("unnamed_0",)


def test_a_folder_of_parts_is_one_list_in_order(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        write(tmp_path / "list" / f"{number}.jsonl{'.gz' if number % 2 else ''}",
              PACKERS[".gz" if number % 2 else ""](as_jsonl([row])))  # fmt: skip
    write(tmp_path / "list" / "README.md", b"about")
    write(tmp_path / "list" / "_SUCCESS.jsonl", b"no json")
    write(tmp_path / "list" / ".hidden" / "x.csv", b"a,b\n")
    assert rows_of(locate(tmp_path, tmp_path / "list")) == ROWS
    assert rows_of(locate(tmp_path / "b", tmp_path / "list" / "[0-1].jsonl*")) == ROWS[:2]


def test_a_folder_of_several_kinds_is_refused_with_a_way_out(tmp_path: Path) -> None:
    write(tmp_path / "list" / "a.csv", as_csv(ROWS))
    write(tmp_path / "list" / "b.jsonl", as_jsonl(ROWS))
    with pytest.raises(UserError, match=r"several kinds: csv, jsonl.*\*\.csv"):
        locate(tmp_path, tmp_path / "list")
    assert rows_of(locate(tmp_path, tmp_path / "list" / "*.csv")) == ROWS


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_partition_folders_become_columns(tmp_path: Path, suffix: str) -> None:
    for year, row in zip(("2020", "2021", "__HIVE_DEFAULT_PARTITION__"), ROWS, strict=False):
        write(tmp_path / "list" / f"year={year}" / "lang=de%2FAT" / f"0.{suffix}", WRITERS[suffix]([row]))
    found = locate(tmp_path, tmp_path / "list")
    assert [row["year"] for row in rows_of(found)] == ["2020", "2021", None]
    assert {row["lang"] for row in rows_of(found)} == {"de/AT"}
    assert found.extra_columns == ("uid", "year", "lang")


def test_remote_addresses_are_read_through_fsspec(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for number, row in enumerate(ROWS):
        memory.pipe(f"/lists/part={number}/{number}.csv.gz", gzip.compress(as_csv([row])))
    memory.pipe("/one.parquet", as_parquet(ROWS))
    assert [row["part"] for row in rows_of(locate(tmp_path / "a", "memory://lists"))] == list("01234")
    assert rows_of(locate(tmp_path / "b", "memory://one.parquet")) == ROWS
    assert len(rows_of(locate(tmp_path / "c", "memory://lists/part=[13]/*.csv.gz"))) == 2
    with pytest.raises(UserError, match="does not exist"):
        locate(tmp_path / "d", "memory://lists/none.csv")


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            body = as_csv(ROWS) if self.path.startswith("/list.csv?") else b""
            self.send_response(200 if body else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_address[1]}"
    served.shutdown()
    served.server_close()


def test_a_list_on_a_web_server_may_have_a_signed_address(tmp_path: Path, server: str) -> None:
    assert rows_of(locate(tmp_path / "a", f"{server}/list.csv?signature={SECRET}")) == ROWS
    with pytest.raises(UserError, match=r"secret\.csv.* cannot be read") as caught:
        locate(tmp_path / "b", f"{server}/secret.csv?signature={SECRET}")
    assert SECRET not in str(caught.value)


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"s3:// address, which needs the s3 extra \(pip install 'clips\[s3\]'\)"):
        locate(tmp_path, "s3://bucket/list.parquet")
    with pytest.raises(UserError, match="no address that fsspec can open"):
        locate(tmp_path, "gopher://bucket/list.parquet")


def bomb(packing: str) -> bytes:
    return PACKERS[packing](b"url,caption\n" + b"http://h/1,c\n" * 2_000_000)


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_compression_bomb_ends_at_the_cap(tmp_path: Path, packing: str) -> None:
    source = write(tmp_path / f"list.csv{packing}", bomb(packing))
    assert source.stat().st_size < 200_000
    with pytest.raises(UserError, match=r"more than 1000000 bytes after decompression.*--max-list-bytes"):
        locate(tmp_path, source, max_list_bytes=1_000_000)
    written = sum(file.stat().st_size for file in (tmp_path / "scratch").rglob("*") if file.is_file())
    assert written < 1_000_000


@pytest.mark.parametrize("name", ["list.parquet", "list.parquet.gz"])
def test_a_parquet_bomb_ends_at_the_cap(tmp_path: Path, name: str) -> None:
    table = pa.table({"url": ["http://h/" + "x" * 1000] * 200_000, "caption": [""] * 200_000})
    pq.write_table(table, tmp_path / "bomb.parquet", use_dictionary=False, compression="zstd")
    data = (tmp_path / "bomb.parquet").read_bytes()
    source = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    assert len(data) < 500_000
    with pytest.raises(UserError, match="more than 1000000 bytes"):
        locate(tmp_path, source, max_list_bytes=1_000_000)


def test_stdin_is_capped_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/zero").open() as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        with pytest.raises(UserError, match="stdin holds more than 3000000 bytes"):
            locate(tmp_path, "-", max_list_bytes=3_000_000)


def test_a_line_without_end_is_no_row(tmp_path: Path) -> None:
    source = write(
        tmp_path / "list.jsonl.zst", PACKERS[".zst"](b'{"url": "' + b"x" * (tables.files.MAX_LINE_BYTES + 9))
    )
    with pytest.raises(UserError, match="line 1 is longer than 16777216 bytes"):
        locate(tmp_path, source)


def random_rows(number: int) -> list[dict[str, Any]]:
    return [{"url": f"http://h/{hash((n, 'x'))}", "caption": str(n * 7919)} for n in range(number)]


DAMAGED = {
    "cut.csv.gz": (gzip.compress(as_csv(random_rows(2000)))[:-200], "cannot be read as csv: .*end-of-stream"),
    "cut.csv.zst": (PACKERS[".zst"](as_csv(random_rows(2000)))[:-200], "cannot be read as csv: .*break off"),
    "noise.csv.gz": (b"\x1f\x8b" + b"noise" * 9, "cannot be read as csv"),
    "noise.csv.zst": (b"noise" * 9, "cannot be read as csv"),
    "cut.parquet": (as_parquet(ROWS)[:-30], "cannot be read as parquet"),
    "cut.parquet.gz": (gzip.compress(as_parquet(ROWS)[:-30]), "cannot be read as parquet"),
    "open.csv": (b'url,caption\nhttp://h/1,c\nhttp://h/2,"c\n', "begins in line 3 is no valid csv: unexpected end"),
    "stray.tsv": (b'url\tcaption\nhttp://h/1\t"a" cat\n', "begins in line 2 is no valid tsv"),
    "few.csv": (b"url,caption\nhttp://h/1,c\nhttp://h/2\n", "line 3 has 1 columns instead of 2 \\(url, caption\\)"),
    "many.tsv": (b"url\tcaption\nhttp://h/1\tc\td\n", "line 2 has 3 columns instead of 2"),
    "latin.csv": ("url,caption\nhttp://h/1,ok\nhttp://h/2,ü\n".encode("latin-1"), "line 3 is not UTF-8 .byte 12 of"),
    "latin.jsonl": ('{"url": "http://h/1", "caption": "ü"}'.encode("latin-1"), "line 1 is not UTF-8"),
    "latin.json": ('[{"url": "http://h/1", "caption": "ü"}]'.encode("latin-1"), "cannot be read as jsonl: .*utf-8"),
    "cut.jsonl": (as_jsonl(ROWS)[:-9], "line 5 is no JSON: .* at column"),
    "cut.json": (json.dumps(ROWS).encode()[:-9], "entry 5 is no JSON"),
    "deep.jsonl": (b'{"url": ' + b"[" * 100_000, "line 1 is no JSON"),
    "digits.jsonl": (b'{"url": "http://h/1", "caption": "c", "n": ' + b"1" * 5000 + b"}", "line 1 is no JSON"),
    "big.jsonl": (b'{"url": "http://h/1", "caption": "c", "n": 99999999999999999999}', "number beyond 64 bits"),
    "list.jsonl": (b'{"url": "http://h/1", "caption": "c"}\n[1]\n', "line 2 is no JSON object"),
    "mixed.jsonl": (b'{"url": "u", "caption": "c", "n": 1}\n{"url": "u", "n": "one"}\n', "'n' has values of several"),
    "empty.csv": (b"", "is empty"),
    "empty.jsonl": (b"\n\n", "is empty"),
    "empty.txt": (b"\n", "holds no rows"),
    "header.csv": (b"url,caption\n", "holds no rows"),
    "rows.parquet": (as_parquet([{"url": "u", "caption": "c"}]), ""),
    "twice.csv": (b"url,caption,url\nhttp://h/1,c,http://h/2\n", "more than one column called 'url'"),
    "numbers.jsonl": (b'{"url": 5, "caption": "c"}', "used as url holds int64, not text"),
    "headerless.csv": (b"http://h/1,c\nhttp://h/2,d\n", "no column 'url'.*first line looks like data.*--adapter"),
    "shards.tar": (b"", "cannot be read as tar: empty file"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_list_is_one_sentence(tmp_path: Path, name: str) -> None:
    data, message = DAMAGED[name]
    source = write(tmp_path / name, data)
    if not message:
        assert len(rows_of(locate(tmp_path, source))) == 1
        return
    with pytest.raises(UserError, match=message) as caught:
        locate(tmp_path, source)
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_rows_or_with_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    names = {"url": pl.String, "caption": pl.String}
    pl.DataFrame(schema=names).write_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match="holds no rows"):
        locate(tmp_path / "a", tmp_path / "empty.parquet")
    table = pa.Table.from_arrays(
        [pa.array(["u"]), pa.array(["c"]), pa.array(["d"])], names=["url", "caption", "caption"]
    )
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="more than one column called 'caption'"):
        locate(tmp_path / "b", tmp_path / "twice.parquet")


@pytest.mark.parametrize("name", ["few.csv", "open.csv", "cut.jsonl", "mixed.jsonl"])
def test_messages_quote_no_row(tmp_path: Path, name: str) -> None:
    data = DAMAGED[name][0].replace(b"http://h/2", f"http://h/2?signature={SECRET}".encode())
    data = data.replace(b"http://host.test", f"http://host.test/?signature={SECRET}".encode())
    with pytest.raises(UserError) as caught:
        locate(tmp_path, write(tmp_path / name, data))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "parquet", "jsonl"])
def test_columns_with_our_names_are_carried_under_another(tmp_path: Path, suffix: str) -> None:
    rows = [{"link": "http://h/1", "alt": "c", "sha256": "ab", "key": "k", "width": "5", "url": "page", "caption": "x"}]
    source = write(tmp_path / f"list.{suffix}", WRITERS[suffix](rows))
    found = locate(tmp_path, source, url_column="link", caption_column="alt", verify_hash="sha256")
    assert found.hash_column == "list_sha256"
    assert found.extra_columns == ("list_sha256", "list_key", "list_width", "list_url", "list_caption")
    assert rows_of(found) == [
        {"url": "http://h/1", "caption": "c", "list_sha256": "ab", "list_key": "k", "list_width": "5",
         "list_url": "page", "list_caption": "x"}
    ]  # fmt: skip
    assert any("list_sha256" in note for note in found.notes)


def test_swapped_names_are_no_trap(tmp_path: Path) -> None:
    source = write(tmp_path / "list.parquet", as_parquet([{"url": "a cat", "caption": "http://h/1"}]))
    found = locate(tmp_path, source, url_column="caption", caption_column="url")
    assert rows_of(found) == [{"url": "http://h/1", "caption": "a cat"}]
    with pytest.raises(UserError, match="both name 'url'"):
        locate(tmp_path / "b", source, url_column="url", caption_column="url")


def test_two_columns_that_would_get_one_name_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "list.csv", b"url,caption,key,list_key\nhttp://h/1,c,1,2\n")
    with pytest.raises(UserError, match="two columns would be called 'list_key'"):
        locate(tmp_path, source)


def test_a_hash_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "list.csv", b"url,caption,sha256\nhttp://h/1,c,1\n")
    with pytest.raises(UserError, match=r"no column 'sha265'. Did you mean 'sha256'\? Set it with --verify-hash"):
        locate(tmp_path, source, verify_hash="sha265")


def test_parts_whose_columns_differ_are_brought_together(tmp_path: Path) -> None:
    write(tmp_path / "list" / "0.parquet", as_parquet([{"url": "u0", "caption": "c", "n": 1}]))
    write(tmp_path / "list" / "1.parquet", as_parquet([{"caption": None, "url": "u1", "n": 2.5, "later": "x"}]))
    found = locate(tmp_path, tmp_path / "list", shard_rows=1)
    assert rows_of(found) == [
        {"url": "u0", "caption": "c", "n": 1.0, "later": None},
        {"url": "u1", "caption": None, "n": 2.5, "later": "x"},
    ]
    write(tmp_path / "list" / "2.parquet", as_parquet([{"url": "u2", "caption": "c", "n": "two"}]))
    with pytest.raises(UserError, match=r"column 'n' holds double at first and .*string further on"):
        locate(tmp_path / "b", tmp_path / "list")


def test_columns_that_come_late_are_in_all_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "ROWS_AT_ONCE", 2)
    monkeypatch.setattr(parts, "PART_ROWS", 4)
    rows: list[dict[str, Any]] = [{"url": f"u{n}", "caption": None} for n in range(11)]
    rows[9] |= {"late": 5, "caption": "c"}
    found = locate(tmp_path, write(tmp_path / "a.jsonl", as_jsonl(rows)), shard_rows=2)
    assert [pq.read_metadata(file).num_rows for file in sorted(found.path.glob("*"))] == [4, 4, 3]
    assert len({pq.read_schema(file) for file in found.path.glob("*")}) == 1
    assert [row["late"] for row in rows_of(found)] == [None] * 9 + [5, None]


def test_a_long_file_is_cut_at_whole_shards(tmp_path: Path) -> None:
    table = pa.table({"url": [f"http://h/{n}" for n in range(110_000)], "caption": pa.nulls(110_000, pa.string())})
    pq.write_table(table, tmp_path / "long.parquet", row_group_size=7_000)
    found = locate(tmp_path, tmp_path / "long.parquet", shard_rows=3_000)
    files = sorted(found.path.glob("*.parquet"))
    assert [pq.read_metadata(file).num_rows for file in files] == [99_000, 11_000]
    assert [row["url"] for row in rows_of(found)] == table["url"].to_pylist()


def cut(url_list: UrlList, shard_rows: int, folder: Path, **options: Any) -> list[ListShard]:
    """As ``download`` does it: in a worker."""
    folder.mkdir(parents=True)
    call = _Cut(url_list, shard_rows, options)
    (shards,) = executor.map_units(call, [folder], num_processes=1, preload=download.PRELOAD)
    return list(shards)


class _Cut:
    def __init__(self, url_list: UrlList, shard_rows: int, options: dict[str, Any]) -> None:
        self.url_list, self.shard_rows, self.options = url_list, shard_rows, options

    def __call__(self, folder: Path) -> list[ListShard]:
        return sources.cut(self.url_list, self.shard_rows, folder, **self.options)


def test_only_wanted_shards_are_cut_and_numbered_from_the_first(tmp_path: Path) -> None:
    for number in range(3):
        rows = [{"url": f"u{number}-{n}", "caption": None if n else "c"} for n in range(5)]
        write(tmp_path / "list" / f"{number}.parquet", as_parquet(rows))
    found = locate(tmp_path, tmp_path / "list")
    everything = cut(found, 2, tmp_path / "a" / "cut", first_shard=7)
    assert [shard.number for shard in everything] == list(range(7, 16))
    assert [shard.num_rows for shard in everything] == [2, 2, 1] * 3
    some = cut(found, 2, tmp_path / "b" / "cut", first_shard=7, wanted=frozenset((8, 15)))
    assert [(shard.number, shard.digest) for shard in some] == [
        (shard.number, shard.digest) for shard in everything if shard.number in (8, 15)
    ]
    assert sorted(file.name for file in (tmp_path / "b" / "cut").iterdir()) == ["15.feather", "8.feather"]
    with pa.ipc.open_file(everything[0].arrow_file) as reader:
        assert reader.read_all().to_pylist() == [{"caption": "c", "url": "u0-0"}, {"caption": "", "url": "u0-1"}]


def test_a_digest_is_of_the_content_alone() -> None:
    plain = pa.table(
        {"url": ["a", None, "", "b"], "n": pa.array([1, None, 0, 3], pa.int64()), "l": [[1], None, [], [2]]}
    )
    other = pa.table(
        {
            "url": pa.chunked_array([pa.array(["x", "a"]).slice(1), pa.array([None, "", "b"], pa.string())]),
            "n": pa.array([1, None, 0, 3], pa.int32()),
            "l": pa.array([[1], None, [], [2]], pa.large_list(pa.int8())),
        }
    ).replace_schema_metadata({"a": "b"})
    assert tables.content_digest(plain) == tables.content_digest(other)
    changed = [
        plain.set_column(0, "url", pa.array(["a", "", "", "b"])),
        plain.set_column(0, "url", pa.array(["", None, "a", "b"])),
        plain.set_column(0, "URL", plain["url"]),
        plain.set_column(1, "n", pa.array([1, 0, 0, 3])),
        plain.set_column(1, "n", pa.array([1.0, None, 0.0, 3.0])),
        plain.set_column(2, "l", pa.array([[1], [], None, [2]])),
        plain.slice(0, 3),
        plain.select(["n", "url", "l"]),
    ]
    assert len({tables.content_digest(table) for table in [plain, *changed]}) == len(changed) + 1


MEASURE = """
import sys, pathlib
from clips_data import sources
from clips_data.config import DownloadConfig
folder = pathlib.Path(sys.argv[1])
sources.locate(DownloadConfig(source=str(folder / "list.csv.gz"), shard_rows=1000), folder / "scratch")
(peak,) = [line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(peak.split()[1])
"""


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    peaks = []
    for repeats in (2, 10):
        folder = tmp_path / str(repeats)
        block = as_csv([{"url": f"http://host.test/{n}/{'x' * 60}.jpg", "caption": "c" * 80} for n in range(60_000)])
        header, _, body = block.partition(b"\n")
        data = gzip.compress(header + b"\n" + body * repeats, 1)
        write(folder / "list.csv.gz", data)
        done = subprocess.run([sys.executable, "-c", MEASURE, str(folder)], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 40, peaks  # eight more blocks are 75 MB of text
