"""Appending lists, retrying failures, duplicates and secrets: what happens to ``pairs/`` after its first list."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from clips_data import batches, download, forgotten, ledger, locks, tars
from clips_data.config import DownloadConfig
from clips_data.demo import web
from clips_data.errors import ResumeRefused, TooFewSucceeded, UsageError, UserError
from clips_data.executor import Job

SECRET = "s3cr3tSignature0123456789abcdefXYZ"


class Web:
    """Serves ``/N.jpg``; those in ``broken`` answer with a status instead. Counts what it is asked for."""

    def __init__(self) -> None:
        self.broken: dict[int, int] = {}
        self.hits: Counter[int] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                number = int(self.path.partition(".")[0][1:])
                outer.hits[number] += 1
                status = outer.broken.get(number, 200)
                body = web.jpeg(5, number) if status == 200 else b"no"
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def url(self, number: int, query: str = "") -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{number}.jpg{query}"


@pytest.fixture
def pages() -> Iterator[Web]:
    served = Web()
    yield served
    served.server.shutdown()
    served.server.server_close()


def write_list(path: Path, urls: list[str], **columns: list[Any]) -> Path:
    pl.DataFrame(
        {"url": urls, "caption": [f"caption of {number}" for number in range(len(urls))], **columns}
    ).write_parquet(path)
    return path


def run(source: Path, work: Path, *, job: dict[str, Any] | None = None, **changes: Any) -> Any:
    values: dict[str, Any] = {"allow_network": ("127.0.0.1/32",), "retries": 0, "min_success": 0, "shard_rows": 4}
    config = DownloadConfig(source=str(source), **{**values, **changes})
    return download.run(config, Job(work=work, quiet=True, **(job or {})))


def rows(work: Path) -> pl.DataFrame:
    units = ledger.finished_units(work / "pairs")
    return pl.concat([pl.read_parquet(work / "pairs" / f"{unit}.parquet") for unit in units])


def digests(work: Path) -> dict[str, str]:
    return {path.name: ledger.digest_file(path) for path in (work / "pairs").glob("0*.tar")}


def test_retry_tries_only_the_named_failures_again_and_leaves_finished_shards_alone(pages: Web, tmp_path: Path) -> None:
    pages.broken = {1: 500, 2: 404, 5: 500}
    source = write_list(tmp_path / "list.parquet", [pages.url(number) for number in range(8)])
    run(source, tmp_path)
    before, asked = digests(tmp_path), pages.hits.copy()
    pages.broken = {5: 500}
    report = run(source, tmp_path, job={"retry": ("http_5xx", "dns")})
    assert pages.hits - asked == Counter({1: 1, 5: 1})
    assert (report.made, [path.name for path in report.units]) == (1, ["00000.tar", "00001.tar", "00002.tar"])
    again = rows(tmp_path).tail(2)
    assert again["code"].to_list() == ["ok", "http_5xx"]
    assert again["retry_of"].to_list() == ["000000001", "000010001"]
    assert again["caption"].to_list() == ["caption of 1", "caption of 5"]
    assert digests(tmp_path).items() >= before.items()


def test_a_second_retry_takes_only_what_still_fails_and_a_third_finds_nothing(pages: Web, tmp_path: Path) -> None:
    pages.broken = {1: 500, 3: 500}
    source = write_list(tmp_path / "list.parquet", [pages.url(number) for number in range(4)])
    run(source, tmp_path)
    pages.broken = {3: 500}
    run(source, tmp_path, job={"retry": ("http_5xx",)})
    pages.broken = {}
    run(source, tmp_path, job={"retry": ("http_5xx",)})
    assert rows(tmp_path)["retry_of"].to_list()[4:] == ["000000001", "000000003", "000000003"]
    report = run(source, tmp_path, job={"retry": ("http_5xx",)})
    assert report.made == 0
    assert len(rows(tmp_path)) == 7


def test_a_retry_that_was_cut_goes_on_with_the_same_rows(pages: Web, tmp_path: Path) -> None:
    pages.broken = dict.fromkeys(range(8), 500)
    source = write_list(tmp_path / "list.parquet", [pages.url(number) for number in range(8)])
    run(source, tmp_path)
    pages.broken = {}
    run(source, tmp_path, job={"retry": ("http_5xx",), "limit": 5})
    assert ledger.finished_units(tmp_path / "pairs") == ["00000", "00001", "00002"]
    run(source, tmp_path, job={"retry": ("http_5xx",)})
    assert rows(tmp_path)["retry_of"].to_list()[8:] == rows(tmp_path)["key"].to_list()[:8]


def test_the_same_url_with_two_captions_is_retried_with_each_of_them(pages: Web, tmp_path: Path) -> None:
    pages.broken = {0: 500}
    source = write_list(tmp_path / "list.parquet", [pages.url(0), pages.url(1), pages.url(0)])
    run(source, tmp_path)
    pages.broken = {}
    run(source, tmp_path, job={"retry": ("http_5xx",)})
    again = rows(tmp_path).tail(2)
    assert again["caption"].to_list() == ["caption of 0", "caption of 2"]
    assert again["retry_of"].to_list() == ["000000000", "000000002"]


def test_another_list_is_refused_and_says_how_to_add_it(pages: Web, tmp_path: Path) -> None:
    run(write_list(tmp_path / "a.parquet", [pages.url(0)]), tmp_path)
    other = write_list(tmp_path / "b.parquet", [pages.url(1)])
    with pytest.raises(ResumeRefused, match="--append"):
        run(other, tmp_path)
    assert len(rows(tmp_path)) == 1


def test_append_adds_the_urls_that_were_never_tried_and_nothing_twice(pages: Web, tmp_path: Path) -> None:
    pages.broken = {1: 404}
    run(write_list(tmp_path / "a.parquet", [pages.url(number) for number in range(3)]), tmp_path)
    before = digests(tmp_path)
    longer = write_list(tmp_path / "b.parquet", [pages.url(number) for number in (2, 7, 1, 8, 0)])
    report = run(longer, tmp_path, job={"append": True})
    assert [path.name for path in report.units] == ["00001.tar"]
    added = rows(tmp_path).tail(2)
    assert added["url"].to_list() == [pages.url(7), pages.url(8)]
    assert added["caption"].to_list() == ["caption of 1", "caption of 3"]
    assert digests(tmp_path).items() >= before.items()
    again = run(longer, tmp_path, job={"append": True})
    assert (again.made, again.skipped) == (0, 1)
    assert run(longer, tmp_path).made == 0, "an appended list is known without --append too"


def test_an_interrupted_first_list_keeps_its_shard_numbers_beside_an_appended_one(pages: Web, tmp_path: Path) -> None:
    first = write_list(tmp_path / "a.parquet", [pages.url(number) for number in range(8)])
    run(first, tmp_path, job={"limit": 4})
    run(write_list(tmp_path / "b.parquet", [pages.url(20)]), tmp_path, job={"append": True})
    assert ledger.finished_units(tmp_path / "pairs") == ["00000", "00002"]
    run(first, tmp_path)
    assert ledger.finished_units(tmp_path / "pairs") == ["00000", "00001", "00002"]


def test_overwrite_with_another_list_leaves_no_shard_of_the_old_one(pages: Web, tmp_path: Path) -> None:
    run(write_list(tmp_path / "a.parquet", [pages.url(number) for number in range(8)]), tmp_path)
    run(write_list(tmp_path / "b.parquet", [pages.url(9)]), tmp_path, job={"overwrite": True})
    assert rows(tmp_path)["url"].to_list() == [pages.url(9)]


def test_a_dry_run_of_an_append_plans_nothing(pages: Web, tmp_path: Path) -> None:
    run(write_list(tmp_path / "a.parquet", [pages.url(0)]), tmp_path)
    other = write_list(tmp_path / "b.parquet", [pages.url(1), pages.url(2)])
    report = run(other, tmp_path, job={"append": True, "dry_run": True})
    assert (report.facts["shards_to_do"], report.facts["urls_to_do"]) == (1, 2)
    assert len(batches.read_all(tmp_path / "pairs")) == 1


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        ({"retry": ("timeuot",)}, UsageError, "Did you mean 'timeout'"),
        ({"retry": ("dns",), "append": True}, UsageError, "different intakes"),
        ({"processes": 20}, UsageError, "--host-connections 16 cannot be shared by 20 workers"),
    ],
)
def test_what_makes_no_sense_is_said(
    pages: Web, tmp_path: Path, job: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(write_list(tmp_path / "a.parquet", [pages.url(0)]), tmp_path, job=job)


def test_two_downloads_into_one_folder_do_not_meet(pages: Web, tmp_path: Path) -> None:
    source = write_list(tmp_path / "a.parquet", [pages.url(0)])
    with (
        locks.locked(tmp_path / "pairs", "list-0-of-1"),
        pytest.raises(UserError, match="Another clips process is at work"),
    ):
        run(source, tmp_path)


def test_later_rows_with_a_url_of_the_list_are_not_asked_for_on_request(pages: Web, tmp_path: Path) -> None:
    urls = [pages.url(number) for number in (0, 1, 0, 2, 1, 3, 0)]
    run(write_list(tmp_path / "a.parquet", urls), tmp_path, dedup="url")
    table = rows(tmp_path)
    assert table["code"].to_list() == ["ok", "ok", "duplicate", "ok", "duplicate", "ok", "duplicate"]
    assert table["duplicate_of"].to_list() == [None, None, "000000000", None, "000000001", None, "000000000"]
    assert set(pages.hits.values()) == {1}


def test_rows_whose_bytes_are_not_the_listed_ones_are_failures(pages: Web, tmp_path: Path) -> None:
    import hashlib

    right = [
        hashlib.new(name, web.jpeg(5, number)).hexdigest() for number, name in enumerate(("sha256", "md5", "sha1"))
    ]
    source = write_list(
        tmp_path / "a.parquet", [pages.url(number) for number in range(5)], digest=[*right, "0" * 64, None]
    )
    run(source, tmp_path, verify_hash="digest", shard_rows=5)
    assert rows(tmp_path)["code"].to_list() == ["ok", "ok", "ok", "hash_mismatch", "ok"]


def test_secrets_of_signed_urls_are_in_no_file(pages: Web, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pages.broken = {1: 500}
    signed = [
        pages.url(0, f"?X-Amz-Signature={SECRET}&w=1"),
        pages.url(1, f"?token={SECRET}"),
        pages.url(2, f"?{SECRET}"),
    ]
    signed += [f"http://user:{SECRET}@127.0.0.1:1/x.jpg", f"not a url?sig={SECRET}", f"gopher://h/?sig={SECRET}"]
    source = write_list(tmp_path / "a.parquet", signed)
    work = tmp_path / "work"
    run(source, work)
    run(source, work, job={"retry": ("http_5xx", "connect")})
    table = rows(work)
    assert table["code"].to_list()[:3] == ["ok", "http_5xx", "ok"]
    assert table["url"][0] == pages.url(0, "?X-Amz-Signature=REDACTED&w=1")
    files = [path for path in work.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        text = str(pl.read_parquet(path).to_dicts()) if path.suffix == ".parquet" else path.read_text(errors="replace")
        assert SECRET not in text, path
    heard = capfd.readouterr()
    assert SECRET not in heard.out + heard.err


def test_many_images_behind_one_slow_row_wait_on_disk_and_come_out_in_order(tmp_path: Path) -> None:
    import io

    import pyarrow as pa

    from clips_data import pair_writer

    done: list[dict[str, int]] = []
    columns = pa.schema([("caption", pa.string()), ("url", pa.string())])
    writer = pair_writer.PairWriter(
        0, str(tmp_path), True, 5, columns, "jpg", urls=[f"http://h/{n}" for n in range(40)],
        finish=lambda folder, unit, counts: done.append(counts),
    )  # fmt: skip
    for number in reversed(range(40)):
        image = pair_writer.StoredImage(io.BytesIO(bytes([number]) * (4 << 20)).getvalue())
        image.evidence = {"code": "ok", "detail": "", "image_ext": "jpg"}
        sizes = dict.fromkeys(("width", "height", "original_width", "original_height"), 1)
        writer.write(image, f"{number:09d}", "c", {"caption": "c", "url": "row", "error_message": None, **sizes})
        if number == 1:
            assert (tmp_path / "00000.waiting.part").stat().st_size > (80 << 20)
    writer.close()
    assert done == [{"ok": 40}]
    (tmp_path / "00000.tar.part").rename(tmp_path / "00000.tar")
    firsts = [sample.members["jpg"][0] for sample in tars.read_samples(tmp_path / "00000.tar")]
    assert firsts == list(range(40))
    assert not (tmp_path / "00000.waiting.part").exists()


def test_after_a_retry_success_is_judged_by_what_the_list_has_come_to(pages: Web, tmp_path: Path) -> None:
    pages.broken = {0: 500, 1: 404}
    source = write_list(tmp_path / "list.parquet", [pages.url(number) for number in range(4)])
    run(source, tmp_path, min_success=0.5)
    report = run(source, tmp_path, job={"retry": ("http_5xx", "http_4xx")}, min_success=0.5)
    assert report.counts == {"http_5xx": 1, "http_4xx": 1}
    pages.broken = {1: 404}
    run(source, tmp_path, job={"retry": ("http_5xx",)}, min_success=0.75)
    with pytest.raises(TooFewSucceeded, match="3 of 4 URLs succeeded"):
        run(source, tmp_path, job={"retry": ("http_4xx",)}, min_success=0.9)
    plain = run(source, tmp_path, min_success=0.75)
    assert plain.made == 0
    assert [path.name for path in plain.units] == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    other = write_list(tmp_path / "other.parquet", [pages.url(8), pages.url(9)])
    assert run(other, tmp_path, job={"append": True}, min_success=1.0).counts == {"ok": 2}


def test_another_unfinished_retry_is_given_first(pages: Web, tmp_path: Path) -> None:
    pages.broken = {0: 500, 1: 404, 2: 500}
    source = write_list(tmp_path / "list.parquet", [pages.url(number) for number in range(4)])
    run(source, tmp_path)
    run(source, tmp_path, job={"retry": ("http_5xx",), "limit": 1})
    with pytest.raises(ResumeRefused, match="--retry http_5xx"):
        run(source, tmp_path, job={"retry": ("http_4xx",)})
    run(source, tmp_path, job={"retry": ("http_5xx",)})
    run(source, tmp_path, job={"retry": ("http_4xx",)})
    assert rows(tmp_path)["retry_of"].to_list()[4:] == ["000000000", "000000002", "000000001"]


def test_slices_take_part_in_one_retry_whoever_comes_first(pages: Web, tmp_path: Path) -> None:
    pages.broken = {1: 404}
    source = write_list(tmp_path / "list.parquet", [pages.url(number) for number in range(4)])
    run(source, tmp_path)
    for part in ("0/2", "1/2"):
        run(source, tmp_path, job={"retry": ("http_4xx",), "slice": part})
    assert [batch.kind for batch in batches.read_all(tmp_path / "pairs")] == ["list", "retry"]
    assert len(rows(tmp_path)) == 5


def test_jobs_of_another_slicing_are_kept_out_and_their_leavings_removed(pages: Web, tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.parquet", [pages.url(number) for number in range(8)])
    with (
        locks.shared(tmp_path / "pairs", "slicing", "slices of 2"),
        pytest.raises(UserError, match="slices of 2; this one: slices of 1"),
    ):
        run(source, tmp_path)
    with locks.shared(tmp_path / "pairs", "slicing", "slices of 2"):
        run(source, tmp_path, job={"slice": "1/2"})
    (tmp_path / "pairs" / "_list-0-of-2").mkdir()
    run(source, tmp_path)
    assert ledger.finished_units(tmp_path / "pairs") == ["00000", "00001"]
    assert not list((tmp_path / "pairs").glob("_list-*"))


def test_marking_duplicates_later_downloads_nothing_again(pages: Web, tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.parquet", [pages.url(0), pages.url(1), pages.url(0)])
    run(source, tmp_path)
    asked = pages.hits.copy()
    report = run(source, tmp_path, dedup="sha256")
    assert pages.hits == asked
    assert report.facts["images_marked_as_duplicates"] == 1


def test_more_patience_is_no_other_config(pages: Web, tmp_path: Path) -> None:
    source = write_list(tmp_path / "list.parquet", [pages.url(0)])
    run(source, tmp_path)
    assert run(source, tmp_path, timeout_s=99.0, retries=5, max_wait_s=1.0).skipped == 1


def test_what_an_append_or_a_limit_leaves_out_is_said(pages: Web, tmp_path: Path) -> None:
    cut = run(write_list(tmp_path / "a.parquet", [pages.url(0), pages.url(1), ""]), tmp_path, job={"limit": 1})
    assert cut.made == 0
    assert "cut by --limit" in cut.notes[0]
    run(write_list(tmp_path / "a.parquet", [pages.url(0), pages.url(1), ""]), tmp_path)
    longer = write_list(tmp_path / "b.parquet", [pages.url(1), pages.url(2), ""])
    report = run(longer, tmp_path, job={"append": True})
    assert "1 of 3 rows of the list have a URL that was tried before" in report.notes
    assert report.counts == {"ok": 1, "bad_url": 1}


def test_a_dry_run_writes_nothing_at_all(pages: Web, tmp_path: Path) -> None:
    source = write_list(tmp_path / "a.parquet", [pages.url(0)])
    assert run(source, tmp_path / "work", job={"dry_run": True}).facts["urls_to_do"] == 1
    assert not (tmp_path / "work").exists()


def test_columns_that_a_first_list_carried_are_completed_for_a_second(pages: Web, tmp_path: Path) -> None:
    columns = {"re_caption": ["one", "two"], "org_caption": ["a", "b"], "sha256": ["0" * 64] * 2}
    recap = write_list(tmp_path / "recap.parquet", [pages.url(0), pages.url(1)], **columns)
    run(recap, tmp_path)
    run(write_list(tmp_path / "plain.parquet", [pages.url(2)]), tmp_path, job={"append": True})
    tables = [pl.read_parquet(path) for path in sorted((tmp_path / "captions" / "recap").glob("*.parquet"))]
    assert [table["caption"].to_list() for table in tables] == [["one", "two"], [""]]


def test_urls_in_other_columns_lose_their_secrets_too(pages: Web, tmp_path: Path) -> None:
    source = write_list(tmp_path / "a.parquet", [pages.url(0)], thumb=[f"http://u:{SECRET}@h/t.jpg?w=1"])
    run(source, tmp_path)
    assert rows(tmp_path)["thumb"].to_list() == ["http://REDACTED@h/t.jpg?w=1"]
    (sample,) = tars.read_samples(tmp_path / "pairs" / "00000.tar")
    assert SECRET not in sample.members["json"].decode()


def test_too_few_successes_come_with_the_report_of_what_was_made(pages: Web, tmp_path: Path) -> None:
    pages.broken = dict.fromkeys(range(4), 404)
    source = write_list(tmp_path / "list.parquet", [pages.url(number) for number in range(4)])
    with pytest.raises(TooFewSucceeded) as refused:
        run(source, tmp_path, min_success=0.5)
    assert [path.name for path in refused.value.report.units] == ["00000.tar"]
    assert any("127.0.0.1" in note for note in refused.value.report.notes)


def test_an_append_or_retry_without_anything_to_do_says_so(pages: Web, tmp_path: Path) -> None:
    source = write_list(tmp_path / "a.parquet", [pages.url(0), pages.url(1)])
    run(source, tmp_path)
    assert run(source, tmp_path, job={"retry": ("dns",)}).notes == [
        "nothing to do: no URL of this list failed with dns"
    ]
    fewer = write_list(tmp_path / "b.parquet", [pages.url(1)])
    assert "was never tried" in run(fewer, tmp_path, job={"append": True}).notes[0]


def test_forgotten_hosts_urls_and_images_are_not_brought_back(pages: Web, tmp_path: Path) -> None:
    port = pages.server.server_address[1]
    (tmp_path / "pairs").mkdir()
    asked = forgotten.asked_for(
        hosts=["localhost"], urls=[pages.url(1)], images=[ledger.digest_bytes(web.jpeg(5, 2))]
    )  # fmt: skip
    forgotten.remember(tmp_path / "pairs", asked)
    urls = [pages.url(number) for number in range(4)] + [f"http://localhost:{port}/9.jpg"]
    run(write_list(tmp_path / "a.parquet", urls), tmp_path, shard_rows=5)
    table = rows(tmp_path)
    assert table["code"].to_list() == ["ok", "forgotten", "forgotten", "ok", "forgotten"]
    assert not pages.hits[1]
    assert not pages.hits[9]
    gone = table.filter(pl.col("code") == "forgotten").drop("key", "status", "code")
    assert all(value is None for row in gone.iter_rows() for value in row)


def test_a_mistake_of_ours_costs_its_row_and_says_nothing_of_the_url(tmp_path: Path) -> None:
    import io

    from clips_data import downloader

    class Broken:
        def check(self, data: bytes) -> Any:
            raise ZeroDivisionError(SECRET)

    resizer = downloader._Resizer(Broken(), None, forgotten.Forgotten())  # type: ignore[arg-type]
    opener = downloader._Opener(None, [f"http://h/?{SECRET}"], {})  # type: ignore[arg-type]

    class Request:
        full_url = "row:0"

    packed = opener.open(Request())
    *_, failure = resizer(packed)
    assert '"code": "internal"' in failure
    *_, failure = resizer(downloader._packed({"code": "ok", "detail": "", "row": 0}, b"bytes"))
    assert "ZeroDivisionError" in failure
    assert SECRET not in failure
    assert isinstance(packed, io.BytesIO)


def test_a_list_that_came_to_nothing_can_be_mended_and_begun_anew(pages: Web, tmp_path: Path) -> None:
    run(write_list(tmp_path / "a.parquet", [pages.url(0), pages.url(1)]), tmp_path, job={"limit": 1})
    run(write_list(tmp_path / "a.parquet", [pages.url(0), pages.url(2)]), tmp_path)
    assert rows(tmp_path)["url"].to_list() == [pages.url(0), pages.url(2)]
    assert len(batches.read_all(tmp_path / "pairs")) == 1


def test_other_shard_rows_are_refused_and_never_cost_other_lists(pages: Web, tmp_path: Path) -> None:
    first = write_list(tmp_path / "a.parquet", [pages.url(number) for number in range(4)])
    run(first, tmp_path)
    with pytest.raises(ResumeRefused, match="--shard-rows is 2 now"):
        run(first, tmp_path, shard_rows=2)
    assert run(first, tmp_path, job={"overwrite": True}, shard_rows=2).made == 2
    second = write_list(tmp_path / "b.parquet", [pages.url(9)])
    run(second, tmp_path, job={"append": True}, shard_rows=2)
    with pytest.raises(ResumeRefused, match="--shard-rows is 3 now"):
        run(second, tmp_path, job={"overwrite": True}, shard_rows=3)
    assert len(rows(tmp_path)) == 5


def test_images_that_came_without_a_phash_are_counted_where_duplicates_are_told_by_it(
    pages: Web, tmp_path: Path
) -> None:
    first = run(write_list(tmp_path / "a.parquet", [pages.url(0), pages.url(0)]), tmp_path, dedup="phash")
    assert first.facts["images_marked_as_duplicates"] == 1
    report = run(write_list(tmp_path / "b.parquet", [pages.url(1)]), tmp_path, job={"append": True})
    assert any(note.startswith("1 images have no phash") for note in report.notes)
