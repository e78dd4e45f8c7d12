"""Downloads from the demo's real HTTP server, through the real img2dataset."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from clips_data import download, ledger, tars
from clips_data.config import DownloadConfig
from clips_data.demo import web
from clips_data.errors import ResumeRefused, TooFewSucceeded, UserError
from clips_data.executor import Job

FAULTS = {"404": "http_4xx", "500": "http_5xx", "truncated": "decode_failed", "html": "not_an_image", "noai": "opt_out"}


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    with web.serve() as (host, port):
        yield f"http://{host}:{port}"


def config(source: Path, **changes: Any) -> DownloadConfig:
    values: dict[str, Any] = {"allow_network": ("127.0.0.1/32",), "retries": 0, "min_success": 0, **changes}
    return DownloadConfig(source=str(source), **values)


def rows_of(base: str) -> list[dict[str, Any]]:
    good = [{"url": f"{base}/scenes/3/{i}.jpg", "caption": f"scene {i}", "lot": i} for i in range(6)]
    bad = [{"url": f"{base}/scenes/3/9.jpg?fault={fault}", "caption": fault, "lot": 9} for fault in FAULTS]
    refused = [
        {"url": url, "caption": "x", "lot": 0} for url in ("file:///etc/hostname", "not a url", "http://10.0.0.1/a.jpg")
    ]
    return good + bad + refused


CODES = ["ok"] * 6 + list(FAULTS.values()) + ["blocked_address", "bad_url", "blocked_address"]


def write_list(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".txt":
        path.write_text("".join(row["url"] + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "jsonl", "txt"])
def test_every_row_of_every_list_format_gets_its_code(base: str, tmp_path: Path, suffix: str) -> None:
    source = write_list(tmp_path / f"list.{suffix}", rows_of(base))
    changes = {"caption_column": None} if suffix == "txt" else {}
    report = download.run(config(source, **changes), Job(work=tmp_path, quiet=True))
    table = pl.read_parquet(tmp_path / "pairs" / "00000.parquet")
    assert table["code"].to_list() == CODES
    assert sum(report.counts.values()) == len(CODES)
    assert table["key"].to_list() == [f"{i:09d}" for i in range(len(CODES))]
    if suffix != "txt":
        kind = str if suffix in ("csv", "tsv") else int  # text lists know no types, and none are guessed
        assert table["lot"].to_list() == [kind(row["lot"]) for row in rows_of(base)]
        assert table["caption"].to_list()[0] == "scene 0"


def test_the_tar_holds_the_served_bytes_and_the_table_their_hash(base: str, tmp_path: Path) -> None:
    import urllib.request

    source = write_list(tmp_path / "list.csv", rows_of(base)[:2])
    download.run(config(source), Job(work=tmp_path, quiet=True))
    (first, _) = tars.read_samples(tmp_path / "pairs" / "00000.tar")
    with urllib.request.build_opener().open(rows_of(base)[0]["url"]) as response:
        served = response.read()
    assert first.members["jpg"] == served
    assert first.members["txt"] == b"scene 0"
    table = pl.read_parquet(tmp_path / "pairs" / "00000.parquet")
    assert table["sha256"][0] == hashlib.sha256(served).hexdigest()


def test_two_runs_give_the_same_bytes_and_a_third_does_nothing(base: str, tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.csv", rows_of(base))
    digests = []
    for work in (tmp_path / "a", tmp_path / "b"):
        download.run(config(source, shard_rows=5), Job(work=work, quiet=True, processes=2))
        files = sorted([*(work / "pairs").glob("*.tar"), *(work / "pairs").glob("*.parquet")])
        digests.append([ledger.digest_file(path) for path in files])
    assert digests[0] == digests[1]
    assert len(digests[0]) == 6
    again = download.run(config(source, shard_rows=5), Job(work=tmp_path / "a", quiet=True))
    assert (again.made, again.skipped) == (0, 3)


def test_slices_together_make_the_same_shards_as_one_run(base: str, tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.csv", rows_of(base))
    for part in ("0/2", "1/2"):
        download.run(config(source, shard_rows=5), Job(work=tmp_path, quiet=True, slice=part))
    assert ledger.finished_units(tmp_path / "pairs") == ["00000", "00001", "00002"]


def test_a_shard_cut_by_the_limit_is_not_done_and_is_finished_later(base: str, tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.csv", rows_of(base))
    download.run(config(source, shard_rows=5), Job(work=tmp_path, quiet=True, limit=7))
    assert ledger.finished_units(tmp_path / "pairs") == ["00000"]
    download.run(config(source, shard_rows=5), Job(work=tmp_path, quiet=True))
    assert ledger.finished_units(tmp_path / "pairs") == ["00000", "00001", "00002"]


def test_a_changed_list_is_refused_and_the_old_shards_stay(base: str, tmp_path: Path) -> None:
    rows = rows_of(base)
    source = write_list(tmp_path / "list.csv", rows)
    download.run(config(source), Job(work=tmp_path, quiet=True))
    before = ledger.digest_file(tmp_path / "pairs" / "00000.tar")
    rows[0]["caption"] = "another"
    write_list(source, rows)
    with pytest.raises(ResumeRefused, match="another list"):
        download.run(config(source), Job(work=tmp_path, quiet=True))
    assert ledger.digest_file(tmp_path / "pairs" / "00000.tar") == before


def test_too_few_successes_end_with_the_codes_and_finished_shards(base: str, tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.csv", rows_of(base))
    with pytest.raises(TooFewSucceeded, match=r"6 of 14 URLs succeeded.*blocked_address 2"):
        download.run(config(source, min_success=0.5), Job(work=tmp_path, quiet=True))
    assert ledger.finished_units(tmp_path / "pairs") == ["00000"]


def test_a_full_disk_is_one_sentence_and_leaves_no_finished_shard(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full answers every write with ENOSPC, as a full disk does."""
    source = write_list(tmp_path / "list.csv", rows_of(base))
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "00000.tar.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full"):
        download.run(config(source), Job(work=tmp_path, quiet=True))
    assert ledger.finished_units(tmp_path / "pairs") == []


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("list.csv", {"url_column": "ulr"}, "no column 'ulr'. Did you mean 'url'"),
        ("list.csv", {"caption_column": "alt"}, "no column 'alt'"),
        ("missing.csv", {}, "does not exist"),
        ("list.xml", {}, "URL lists are"),
        ("broken.parquet", {}, "cannot be read as parquet"),
    ],
)
def test_a_bad_list_is_one_sentence(tmp_path: Path, name: str, changes: dict[str, Any], message: str) -> None:
    write_list(tmp_path / "list.csv", [{"url": "http://x/", "caption": "c"}])
    (tmp_path / "list.xml").write_text("<x/>")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is no parquet")
    with pytest.raises(UserError, match=message):
        download.run(config(tmp_path / name, **changes), Job(work=tmp_path, quiet=True))
