"""A sample of the list is tried before all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cli.main import main
from clips_data import sample
from clips_data.config import DownloadConfig
from clips_data.demo import web


def measured(source: Path | str, num_rows: int, **changes: Any) -> sample.Sample:
    values: dict[str, Any] = {"allow_network": ("127.0.0.1/32",), "retries": 0, "timeout_s": 5.0, **changes}
    return sample.measure(DownloadConfig(source=str(source), **values), num_rows)


def test_outcomes_and_sizes_are_those_of_the_rows_that_were_tried(tmp_path: Path) -> None:
    with web.serve() as (host, port):
        urls = [f"http://{host}:{port}/scenes/3/{number}.jpg" for number in range(4)]
        urls += [f"{urls[0]}?fault=404", "http://10.0.0.1/a.jpg"]
        pl.DataFrame({"url": urls, "caption": ["c"] * 6}).write_parquet(tmp_path / "list.parquet")
        found = measured(tmp_path / "list.parquet", 200)  # drawn with repetition: all six rows
    assert (found.num_rows, found.list_rows) == (6, 6)
    assert found.counts == {"ok": 4, "http_4xx": 1, "blocked_address": 1}
    sizes = [len(web.jpeg(3, number)) for number in range(4)]
    assert found.image_bytes_mean == round(sum(sizes) / 4)
    assert found.estimated_bytes == pytest.approx(sum(sizes), rel=0.01)
    assert found.estimated_s == pytest.approx(6 / found.urls_per_s)
    assert [path.name for path in tmp_path.iterdir()] == ["list.parquet"], "nothing is stored"


def test_hosts_that_do_not_resolve_are_counted_and_the_way_out_is_named(tmp_path: Path) -> None:
    urls = [f"http://host{number}.invalid/a.jpg" for number in range(5)] + ["http://127.0.0.1:9/a.jpg"]
    pl.DataFrame({"url": urls, "caption": ["c"] * 6}).write_parquet(tmp_path / "list.parquet")
    found = measured(tmp_path / "list.parquet", 200)
    assert (found.hosts, found.hosts_resolved) == (6, 1)
    assert found.counts == {"dns": 5, "connect": 1}
    assert "--dns-servers" in "\n".join(found.lines())


def test_the_same_rows_are_drawn_each_time() -> None:
    first, again = (measured("demo", 5, num_pairs=40) for _ in range(2))
    assert first.counts == again.counts
    assert 1 <= first.num_rows <= 5


def test_plan_shows_the_sample_where_a_download_is_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "--work", str(tmp_path / "work"), "--sample", "4"]) == 0
    heard = capsys.readouterr()
    assert "trying 4 URLs" in heard.err
    assert "of 3500 URLs" in heard.out
    assert not (tmp_path / "work").exists(), "a plan writes nothing"
