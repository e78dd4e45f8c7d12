"""Caption columns made of captions that others wrote: joined by identity, never by line."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips_data import imported, joined, ledger, shard, stats
from clips_data.config import ShardConfig
from clips_data.errors import ResumeRefused, UserError
from clips_data.executor import Job
from clips_data.recaption.run import describe_metadata
from clips_data.redact import redact
from clips_data.table_join import comparable

NUM_PAIRS = 12
FAILED = (3, 9)
IMAGES = [number for number in range(NUM_PAIRS) if number not in FAILED]


def identify(number: int, row: pairsmaker.Row) -> None:
    row |= {"uid": f"u{number}", "url": redact(row["url"]), "dense": dense(number), "id": number}
    row["nested"] = json.dumps({"captions": {"long": [f"One {number}.", "Two."]}})


def dense(number: int) -> str | None:
    return {4: None, 5: "  ", 6: "I'm sorry, I cannot help."}.get(number, f"A dense\ncaption {number}.")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    pairsmaker.write_pairs(work, change=identify)
    return work


@pytest.fixture
def work(tmp_path: Path) -> Path:
    pairsmaker.write_pairs(tmp_path, change=identify)
    return tmp_path


def column(work: Path, name: str) -> pl.DataFrame:
    """The finished column, read as the stages to the right read it."""
    inputs = joined.open_inputs(work, (name,))
    return pl.concat([inputs.table(unit) for unit in inputs.units], how="vertical_relaxed")


def texts(work: Path, name: str) -> dict[str, str]:
    return dict(column(work, name).select("uid", f"text.{name}").iter_rows())


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pl.DataFrame(rows).write_parquet(path)
    return path


def test_a_carried_column_becomes_a_caption_column(work: Path) -> None:
    report = imported.import_all_carried(work, {"dense": "dense"}, model="pixelprose")
    assert report.counts == {"ok": 7, "empty": 2, "refused": 1}
    assert texts(work, "dense")["u0"] == "A dense caption 0."
    codes = dict(column(work, "dense").select("uid", "code.dense").iter_rows())
    assert (codes["u4"], codes["u5"], codes["u6"], codes["u7"]) == ("empty", "empty", "refused", "ok")
    assert "u3" not in codes
    about = describe_metadata(report.units[0])
    assert (about["model"], about["engine"], about["prompt"]) == ("pixelprose", "imported", None)


def test_an_imported_table_is_of_the_shape_that_recaption_writes(work: Path) -> None:
    (first, _) = imported.import_all_carried(work, {"dense": "dense"}).units
    schema = pq.read_schema(first)
    assert {field.name: str(field.type) for field in schema} == {
        "key": "string", "sha256": "string", "caption": "string", "status": "string", "code": "string",
        "finish_reason": "string", "num_tokens": "int32", "flags": "list<element: string>", "raw": "string",
        "seed": "int64", "engine": "string", "prompt_variant": "string", "request": "string",
    }  # fmt: skip
    assert pl.read_parquet(first)["raw"][0] == "A dense\ncaption 0."


def test_stats_and_shard_read_an_imported_column(work: Path) -> None:
    imported.import_all_carried(work, {"dense": "dense"})
    found = stats.gather(work)["captions"]["dense"]
    assert (found["attempted"], found["succeeded"], found["failures"]) == (10, 7, {"empty": 2, "refused": 1})
    shard.run(ShardConfig(columns=("web", "dense"), scores=None, web_ratio=0.0), Job(work=work, quiet=True))
    assert (work / "shards" / "index.json").exists()


def test_nested_carried_captions_are_reached_by_a_path(work: Path) -> None:
    imported.import_all_carried(work, {"long": "nested/captions/long"})
    assert texts(work, "long")["u1"] == "One 1. Two."


def test_a_finished_shard_is_left_alone_and_another_source_is_refused(work: Path) -> None:
    (first, _) = imported.import_all_carried(work, {"dense": "dense"}).units
    before = first.stat().st_mtime_ns
    assert imported.import_all_carried(work, {"dense": "dense"}).counts["ok"] == 7
    assert first.stat().st_mtime_ns == before
    with pytest.raises(ResumeRefused, match="list_column"):
        imported.import_all_carried(work, {"dense": "uid"})
    assert imported.import_all_carried(work, {"dense": "uid"}, overwrite=True).counts == {"ok": 10}


def test_a_list_column_that_no_shard_has_is_refused(work: Path) -> None:
    with pytest.raises(UserError, match="no column 'dence'"):
        imported.import_all_carried(work, {"x": "dence"})
    assert not ledger.finished_units(work / "captions" / "x")


def test_shards_of_other_lists_have_empty_captions(tmp_path: Path) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        if number < 6:
            identify(number, row)

    pairsmaker.write_pairs(tmp_path, change=change)
    report = imported.import_all_carried(tmp_path, {"dense": "dense"})
    assert report.counts == {"ok": 3, "empty": 7}
    table = write_table(tmp_path / "t.parquet", [{"uid": "u1", "text": "one"}])
    joined_report = imported.import_table(tmp_path, table, column="one", text_column="text", by="uid")
    assert joined_report.counts == {"ok": 1, "empty": 9}


@pytest.mark.parametrize("name", ["web", "Dense", "../x", ""])
def test_a_column_needs_a_name_of_its_own(work: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a caption column"):
        imported.import_all_carried(work, {name: "dense"})


Entry = tuple[int, str]
entries = st.lists(
    st.tuples(st.integers(0, NUM_PAIRS + 4), st.sampled_from(["", "one cat", "a  dog\nhere", "<image> ‮x"])), max_size=30
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=entries)
def test_a_join_gives_every_image_the_first_caption_of_its_key(
    shared: Path, tmp_path: Path, table: list[Entry]
) -> None:
    rows = [{"uid": f"u{number}", "text": text} for number, text in table] or [{"uid": "nobody", "text": "x"}]
    source = write_table(tmp_path / "table.parquet", rows)
    report = imported.import_table(shared, source, column="any", text_column="text", by="uid", overwrite=True)
    first: dict[int, str] = {}
    for number, text in table:
        first.setdefault(number, text)
    expected = {f"u{number}": " ".join(first.get(number, "").split()) for number in IMAGES}
    assert texts(shared, "any") == expected
    known = [number for number in IMAGES if number in first]
    used = [number for number, _ in table if number in IMAGES]
    assert report.facts == {
        "pairs": len(IMAGES), "matched": len(known), "table_rows": len(rows),
        "table_rows_unused": len(rows) - len(used), "table_rows_repeated": len(used) - len(known),
    }  # fmt: skip
    assert sum(report.counts.values()) == len(IMAGES)


def test_urls_are_compared_without_their_secrets(work: Path) -> None:
    secret = "http://images.test/{}.jpg?signature={}"
    rows = [{"link": secret.format(number, f"renewed{number}"), "text": f"t{number}"} for number in reversed(IMAGES)]
    table = write_table(work / "table.parquet", rows)
    imported.import_table(work, table, column="dense", text_column="text", by="url", table_key="link")
    assert texts(work, "dense") == {f"u{number}": f"t{number}" for number in IMAGES}
    for file in (work / "captions").rglob("*"):
        assert file.is_dir() or b"renewed" not in file.read_bytes()


urls = st.one_of(
    st.text(max_size=30).map(lambda rest: "http://h/" + rest),
    st.text(max_size=30),
    st.from_regex(
        r"[hH]ttps?://[a-zA-Z0-9.:@\[\]]{0,9}(/[a-z]{0,3}){0,2}(\?(token=[a-z]{0,3}|\w{24,30}))?", fullmatch=True
    ),
)


@given(st.lists(urls, max_size=5))
def test_the_short_way_for_plain_urls_is_redaction_all_the_same(many: list[str]) -> None:
    assert comparable(many, "url").to_list() == [redact(url) if url else None for url in many]


def test_hashes_are_those_of_the_downloaded_bytes(tmp_path: Path) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        identify(number, row)
        row["raw_sha256"] = f"{number:064x}" if number == 10 else None

    pairsmaker.write_pairs(tmp_path, change=change)
    stored = dict(pl.read_parquet(tmp_path / "pairs" / "00000.parquet").select("uid", "sha256").iter_rows())
    rows = [{"sha256": f"{10:064X}", "text": "raw"}, {"sha256": stored["u0"].upper(), "text": "stored"}]
    table = write_table(tmp_path / "t.parquet", rows)
    imported.import_table(tmp_path, table, column="c", text_column="text", by="sha256")
    assert {uid: text for uid, text in texts(tmp_path, "c").items() if text} == {"u10": "raw", "u0": "stored"}


def test_numbers_and_their_text_are_the_same_key(work: Path) -> None:
    (work / "t.csv").write_text("id,text\n7,seven\n07,no\n8,\n")
    report = imported.import_table(work, work / "t.csv", column="c", text_column="text", by="id")
    assert texts(work, "c")["u7"] == "seven"
    assert (report.facts["matched"], report.counts) == (2, {"ok": 1, "empty": 9})
    flags = pl.concat([pl.read_parquet(unit) for unit in report.units]).select("key", "flags")
    assert dict(flags.iter_rows())["000010002"] == []  # in the table, with an empty caption
    assert dict(flags.iter_rows())["000000000"] == ["not_in_table"]


def test_images_of_one_url_all_get_its_caption(tmp_path: Path) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        identify(number, row)
        row["uid"] = f"u{number % 2}"

    pairsmaker.write_pairs(tmp_path, num_shards=3, change=change)
    table = write_table(tmp_path / "t.parquet", [{"uid": "u1", "text": "odd"}, {"uid": "u1", "text": "later"}])
    report = imported.import_table(tmp_path, table, column="c", text_column="text", by="uid")
    assert report.counts == {"ok": 6, "empty": 9}
    assert (report.facts["table_rows_unused"], report.facts["table_rows_repeated"]) == (0, 1)


def as_tar(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for row in rows:
            members = {
                "json": json.dumps({"uid": row["uid"], "sha256": "0"}),
                "syn.json": json.dumps({"syn_text": ["first", row["text"]]}),
                "url.txt": "http://h/",
                "npz": "no text",
            }
            for extension, text in members.items():
                info = tarfile.TarInfo(f"{row['uid']}.{extension}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    return file.getvalue()


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    nested = [{"uid": row["uid"], "captions": {"long": row["text"]}} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in nested).encode()


KINDS: dict[str, tuple[Callable[[list[dict[str, Any]]], bytes], str, str | None]] = {
    "table.csv": (lambda rows: pl.DataFrame(rows).write_csv().encode(), "text", None),
    "table.jsonl.gz": (lambda rows: gzip.compress(as_jsonl(rows)), "captions/long", None),
    "table.tar": (as_tar, "syn.json/syn_text/1", "json/uid"),
}


@pytest.mark.parametrize("name", KINDS)
def test_tables_of_every_kind_are_joined(work: Path, name: str) -> None:
    make, text_column, table_key = KINDS[name]
    rows = [{"uid": f"u{number}", "text": f"t{number}"} for number in reversed(range(NUM_PAIRS + 5))]
    folder = work / "tables"
    folder.mkdir()
    for part, some in enumerate((rows[:5], rows[5:])):
        (folder / f"{part}-{name}").write_bytes(make(some))
    imported.import_table(work, folder, column="c", text_column=text_column, by="uid", table_key=table_key)
    assert texts(work, "c") == {f"u{number}": f"t{number}" for number in IMAGES}


def test_a_known_set_brings_its_own_key_and_name(work: Path) -> None:
    rows = [{"uid": f"u{number}", "text": f"t{number}"} for number in range(NUM_PAIRS)]
    (work / "0.tar").write_bytes(as_tar(rows))
    report = imported.import_table(work, work / "0.tar", column="c", text_column="syn.json/syn_text/0", by="uid")
    assert report.counts == {"ok": 10}
    assert describe_metadata(report.units[0])["model"] == "datacompdr"


def test_an_import_goes_on_with_the_missing_shards_and_refuses_another_table(work: Path) -> None:
    rows = [{"uid": f"u{number}", "text": f"t{number}"} for number in range(NUM_PAIRS)]
    table = write_table(work / "t.parquet", rows)
    whole = imported.import_table(work, table, column="c", text_column="text", by="uid")
    before = [unit.read_bytes() for unit in whole.units]
    ledger.forget_unit(work / "captions" / "c", "00001")
    (work / "captions" / "c" / "_import").mkdir()  # what a killed run leaves
    again = imported.import_table(work, table, column="c", text_column="text", by="uid")
    assert (again.made, again.skipped, again.counts) == (1, 1, whole.counts)
    assert [unit.read_bytes() for unit in again.units] == before
    assert not (work / "captions" / "c" / "_import").exists()
    nothing = imported.import_table(work, table, column="c", text_column="text", by="uid")
    assert (nothing.made, nothing.facts) == (0, {"pairs": 10, "matched": 10})
    write_table(table, rows[:-1])
    with pytest.raises(ResumeRefused, match="input table"):
        imported.import_table(work, table, column="c", text_column="text", by="uid")
    assert [unit.read_bytes() for unit in whole.units] == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"by": "uidd"}, r"no column 'uidd' to join by. Did you mean 'uid'\? Name another with --by"),
        ({"table_key": "uit"}, r"no column 'uit' for the key .uid.. Did you mean 'uid'\? Name it with --table-key"),
        ({"text_column": "txet"}, r"no column 'txet' for the captions. Did you mean 'text'"),
        ({"table": "none.parquet"}, r"table of captions .* does not exist"),
        ({"table": "-"}, "not from stdin"),
    ],
)
def test_a_join_that_cannot_be_is_one_sentence(work: Path, changes: dict[str, Any], message: str) -> None:
    given = {"table": "t.parquet", "column": "c", "text_column": "text", "by": "uid", **changes}
    write_table(work / "t.parquet", [{"uid": "u1", "uidd": "u1", "text": "t"}])
    table = given.pop("table")
    with pytest.raises(UserError, match=message):
        imported.import_table(work, table if table == "-" else work / table, **given)
    assert not ledger.finished_units(work / "captions" / "c")
