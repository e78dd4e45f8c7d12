"""Counts with denominators (``stats``), and evidence about finished files (``verify``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.main import main
from clips_data import languages, ledger, measure, pair_stats, schema, shard, stats, verify
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job


@pytest.fixture
def work(tmp_path: Path) -> Path:
    def spoil_caption(number: int, row: pairsmaker.Row) -> None:
        if number in (1, 2):
            pairsmaker.reject(row, "refused" if number == 1 else "loop")
        row["flags"] = ["hit_token_cap"] if number == 4 else []

    def spoil_pair(number: int, row: pairsmaker.Row) -> None:
        row["caption"] = "" if number in (2, 5) else row["caption"]

    pairsmaker.write_pairs(tmp_path, change=spoil_pair)
    pairsmaker.write_captions(tmp_path, change=spoil_caption)
    config = ShardConfig(shard_rows=4, web_ratio=1.0, heldout_ratio=0.4, heldout_max=3)
    shard.run(config, Job(work=tmp_path, quiet=True))
    return tmp_path


def test_every_stage_is_counted_with_its_denominator(work: Path) -> None:
    found = stats.gather(work)
    assert json.loads(json.dumps(found)) == found
    download = found["download"]
    assert (download["attempted"], download["succeeded"], download["failures"]) == (12, 10, {"http_4xx": 2})
    assert download["web_caption_words"]["num"] == 8 and download["web_caption_words"]["mean"] == 4
    captions = found["captions"]["synthetic"]
    assert (captions["attempted"], captions["succeeded"]) == (10, 8)
    assert captions["failures"] == {"loop": 1, "refused": 1} and captions["flags"] == {"hit_token_cap": 1}
    assert captions["caption_words"]["median"] == 16
    shards = found["shards"]
    assert (shards["attempted"], shards["succeeded"], shards["failures"]) == (10, 9, {"no_caption": 1})
    assert sum(shards["splits"].values()) == 9 and 0 < shards["splits"]["heldout"] <= 3
    assert shards["fallbacks"] == {"synthetic_for_missing_web": 1} and shards["txt"] == {"web": 8, "synthetic": 1}
    assert shards["mix"] == {
        "rules": "web=1.0,synthetic=0.0",
        "realised": {"web": round(8 / 9, 6), "synthetic": round(1 / 9, 6)},
    }
    assert shards["sub_captions"]["synthetic"] == {"num": 9, "min": 0, "mean": 2.6667, "median": 3, "p95": 3, "max": 3}


def test_an_empty_folder_has_no_stages(tmp_path: Path) -> None:
    assert stats.gather(tmp_path) == {}


# --- pairs ------------------------------------------------------------------------------------------------------------

Row = dict[str, Any]


def write_table(folder: Path, shard_number: int, rows: list[Row]) -> str:
    """Commits a shard of ``folder`` that has a table only; its columns are those that the rows have."""
    unit = schema.shard_name(shard_number)
    folder.mkdir(parents=True, exist_ok=True)
    pl.DataFrame(rows, infer_schema_length=None).write_parquet(ledger.part(folder / f"{unit}.parquet"))
    ledger.commit(folder, unit, [f"{unit}.parquet"], inputs={}, config={}, counts={})
    return unit


def pair(key: str, url: str | None, code: str = "ok", **about: Any) -> Row:
    ok = code == "ok"
    sizes: Row = {"width": 400, "height": 300, "bytes": 1000, "sha256": f"hash-{key}", "image_ext": "jpg"} if ok else {}
    status = schema.STATUS_SUCCESS if ok else "failed_to_download"
    row: Row = {"key": key, "url": url, "status": status, "code": code, "caption": f"a photo of thing {key}"}
    return row | sizes | about


def gathered(folder: Path, rows: list[Row], top: int = 20) -> Row:
    return pair_stats.gather(folder, [write_table(folder, 0, rows)], top)


def test_hosts_are_counted_by_attempts_with_their_main_failure(tmp_path: Path) -> None:
    urls = ["http://big.test/1", "http://u:p@BIG.test:8080/2", "http://big.test/3", "https://big.test/4"]
    rows = [
        pair(f"{i}", url, code) for i, (url, code) in enumerate(zip(urls, ("ok", "dns", "dns", "tls"), strict=True))
    ]
    rows += [
        pair("4", "http://small.test/a"),
        pair("5", "http://small.test/b", host="named.test"),
        pair("6", "nonsense"),
    ]
    found = gathered(tmp_path, rows, top=2)["by_host"]
    assert found["hosts"] == 4
    assert found["top"][0] == {
        "host": "big.test", "attempted": 4, "succeeded": 1, "succeeded_percent": 25.0, "main_failure": "dns",
        "main_failure_rows": 2,
    }  # fmt: skip
    assert [row["host"] for row in gathered(tmp_path, rows)["by_host"]["top"]] == [
        "big.test", "(no host)", "named.test", "small.test",
    ]  # fmt: skip


def test_the_year_stands_in_the_path_and_nowhere_else(tmp_path: Path) -> None:
    paths = {
        "/2014/05/x.jpg": "2014", "/uploads/2009/x.jpg": "2009", "/a/2016-03-02/x.jpg": "2016",
        "/1994/x.jpg": "unknown", "/9999/2011/x.jpg": "2011", "/2048/x.jpg": "unknown", "/x.jpg?at=/2014/": "unknown",
        "/20140/x.jpg": "unknown", "/2014.jpg": "unknown", "/a2014/x.jpg": "unknown",
    }  # fmt: skip
    for number, (path, year) in enumerate(paths.items()):
        folder = tmp_path / str(number)
        found = gathered(folder, [pair("0", f"http://2001.test{path}", "dns")])["by_year"]
        assert found == [{"year": year, "attempted": 1, "succeeded": 0, "succeeded_percent": 0.0}], path


def test_a_later_try_stands_for_the_row_that_it_repeats(tmp_path: Path) -> None:
    first = [pair("a", "http://x/1"), pair("b", "http://x/2", "dns"), pair("c", "http://x/3", "timeout")]
    later = [pair("d", "http://x/2", "timeout", retry_of="b"), pair("e", "http://x/3", "dns", retry_of="c")]
    last = [pair("f", "http://x/2", retry_of="b"), pair("g", "http://x/1", "duplicate", duplicate_of="a")]
    units = [write_table(tmp_path, number, rows) for number, rows in enumerate((last, later, first))]
    found = pair_stats.gather(tmp_path, units)
    assert (found["rows"], found["attempted"], found["succeeded"], found["urls"]) == (7, 6, 2, 3)
    assert found["failures"] == {"dns": 2, "timeout": 2} and found["not_asked"] == {"duplicate": 1}
    assert found["after_retries"] == {"retried": 2, "attempted": 3, "succeeded": 2, "failures": {"dns": 1}}


def test_sizes_formats_and_duplicates_have_their_denominators(tmp_path: Path) -> None:
    rows = [
        pair("0", "http://x/0", width=3000, height=1000, bytes=5_000_001, orientation=6, sha256="s", phash="p"),
        pair("1", "http://x/0", width=500, height=1000, image_ext="png", orientation=1, sha256="s", phash="p"),
        pair("2", "http://x/2", sha256="t", phash="p"),
        pair("3", "http://x/3", sha256="u", phash=None, width=0, height=0),
        pair("4", "http://x/4", "hash_mismatch"),
    ]
    found = gathered(tmp_path, rows)
    assert found["megapixels"] == {"num": 4, "min": 0, "max": 3, "mean": 0.905, "median": 0.5, "p95": 3}
    assert found["shorter_side_px"]["max"] == 1000 and found["bytes_per_image"]["max"] == 5_000_001
    assert found["aspect_ratio"]["num"] == 3 and found["aspect_ratio"]["max"] == 3
    assert found["formats"] == {"jpg": 3, "png": 1}
    assert found["orientations"] == {"not_recorded": 2, "1": 1, "6": 1}
    assert found["duplicates"] == {
        "urls": 5, "duplicate_urls": 1, "images": 4, "duplicate_images": 1,
        "images_with_phash": 3, "duplicate_images_by_phash": 2,
    }  # fmt: skip
    assert found["hash_mismatches"] == {"of": 5, "num": 1}


def test_shards_of_different_lists_are_counted_together(tmp_path: Path) -> None:
    """A table lacks columns, one has untyped nulls, one has numbers as captions, and a column of its own."""
    write_table(tmp_path, 0, [{"key": "0", "status": "failed_to_download", "code": "dns", "url": "http://x/0"}])
    write_table(tmp_path, 1, [pair("1", "http://x/1", "dns") | {"caption": None, "width": None, "host": None}])
    write_table(tmp_path, 2, [pair("2", "http://x/2") | {"caption": 12, "similarity": 0.5}])
    write_table(tmp_path, 3, [pair("3", "http://y/3") | {"similarity": "high"}])
    found = pair_stats.gather(tmp_path, ledger.finished_units(tmp_path))
    assert (found["attempted"], found["succeeded"], found["by_host"]["hosts"]) == (4, 2, 2)
    assert found["web_caption_words"]["num"] == 2 and found["web_caption_words"]["min"] == 1


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    unit = write_table(tmp_path, 0, [pair("0", "http://x/0")])
    (tmp_path / f"{unit}.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match=r"Cannot read .*00000\.parquet"):
        pair_stats.gather(tmp_path, [unit])
    unit = write_table(tmp_path, 1, [pair(f"{i}", f"http://x/{i}") for i in range(2000)])
    data = bytearray((tmp_path / f"{unit}.parquet").read_bytes())
    data[4 : len(data) // 2] = b"\xa5" * (len(data) // 2 - 4)  # the footer stays whole
    (tmp_path / f"{unit}.parquet").write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"Cannot read the tables in .*clips verify"):
        pair_stats.gather(tmp_path, [unit])


def test_failures_are_told_by_code_and_host_in_few_lines(tmp_path: Path) -> None:
    codes = ["dns", "connect", "tls", "timeout", "http_4xx", "http_5xx", "opt_out"]
    rows = [
        pair(f"{code}-{host}-{number}", f"http://h{host}.test/", code)
        for place, code in enumerate(codes)
        for host in range(4)
        for number in range((10 - place) * (4 - host))
    ]
    rows += [pair("fine", "http://h0.test/"), pair("again", "http://h0.test/", "duplicate")]
    unit = write_table(tmp_path, 0, rows)
    lines = pair_stats.failure_lines(tmp_path, [unit])
    assert lines[0] == f"failures by code and host: {len(rows) - 2} of {len(rows) - 1} URLs"
    assert lines[1] == "  100 dns (20.4 %)"
    assert lines[2:4] == ["        40 of 197 at h0.test", "        30 of 147 at h1.test"]
    assert lines[-1] == "  90 with other codes: http_5xx, opt_out"
    assert len(lines) == 17
    assert pair_stats.failure_lines(tmp_path, [write_table(tmp_path, 1, [pair("0", "http://x/")])]) == []
    unit = write_table(tmp_path, 2, [pair("0", "http://x/", "dns", host="a\x1b[2J\n\u202eb")])
    assert pair_stats.failure_lines(tmp_path, [unit])[-1] == "      1 of 1 at a�[2J��b"


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=200))
def test_spreads_from_histograms_agree_with_sorted_values(values: list[int]) -> None:
    table = pl.LazyFrame({"x": values})
    found = measure.spreads(Path(), table, {"x": pl.col("x")})["x"]
    right = stats.spread([float(value) for value in values])
    assert {name: found[name] for name in ("num", "min", "max")} == {n: right[n] for n in ("num", "min", "max")}
    assert found["mean"] == pytest.approx(right["mean"], abs=1e-3)
    for name in ("median", "p95"):
        assert found[name] == pytest.approx(right[name], rel=5.1e-3)


def test_hashes_are_counted_the_same_in_one_pass_and_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pl.LazyFrame({"x": [f"v{number % 70}" for number in range(100)] + [None] * 5})
    assert measure.num_different(Path(), table, "x") == (100, 70)
    monkeypatch.setattr(measure, "ROWS_AT_ONCE", 7)
    assert measure.num_different(Path(), table, "x") == (100, 70)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("en", "Photo of a dog in the park"), ("de", "Haus mit Garten in der Nähe von Berlin"),
        ("fr", "Maison avec jardin à vendre"), ("es", "Casa en venta con jardín"), ("pl", "Dom na sprzedaż z ogrodem"),
        ("en", "STOCK PHOTO OF A BUSINESSMAN WITH A LAPTOP"), ("ru", "Красивый дом на берегу реки в Москве"),
        ("uk", "Будинок на продаж із садом"), ("ar", "بيت للبيع مع حديقة"), ("fa", "خانه برای فروش با باغ"),
        ("hi", "बगीचे के साथ बिक्री के लिए घर"), ("zh", "红色连衣裙 iPhone 图片"), ("ja", "赤いドレスの写真"),
        ("ja", "東京駅の写真集"), ("ko", "빨간 드레스 사진"), ("th", "รูปภาพบ้านสวย"), ("el", "Σπίτι προς πώληση"),
        ("he", "בית למכירה"), ("unclear", "IMG_2034"), ("unclear", "ᚠᚢᚦ"), ("no_letters", "12-34 !!"),
        ("no_letters", ""),
    ],
)  # fmt: skip
def test_languages_of_short_captions(code: str, text: str) -> None:
    assert languages.language(text) == code


def test_languages_are_of_the_same_sample_whatever_the_order_of_shards(tmp_path: Path) -> None:
    for number in range(3):
        rows = [
            pair(
                schema.sample_key(number, i), f"http://x/{i}", caption="红色" if i % 3 else "Photo of a dog in the park"
            )
            for i in range(900)
        ]
        write_table(tmp_path, number, rows)
    units = ledger.finished_units(tmp_path)
    found = pair_stats.gather(tmp_path, units)["languages"]
    assert found["sampled"] == 3 * (pair_stats.LANGUAGE_CAPTIONS // 3)
    assert sum(found["by_language"].values()) == found["sampled"]
    assert found["by_language"]["zh"] / found["sampled"] == pytest.approx(2 / 3, abs=0.05)
    assert pair_stats.gather(tmp_path, units[::-1])["languages"] == found


# --- bands and other stages -------------------------------------------------------------------------------------------


def test_web_captions_and_success_are_held_against_their_bands(tmp_path: Path) -> None:
    words = "one two three four five six seven eight nine"
    rows = [pair("0", "http://x/0", caption=words), pair("1", "http://x/1", "dns"), pair("2", "http://x/2", "dns")]
    bands = gathered(tmp_path, rows)["bands"]
    assert bands["web_caption_words_mean"] == {"value": 9, "low": 8, "high": 20, "mark": "inside", "of": 1}
    assert bands["success_share"] == {"value": 0.333333, "low": 0.5, "high": None, "mark": "below", "of": 3}
    assert "web_caption_words_mean" not in gathered(tmp_path / "none", [pair("0", "http://x/0", caption=" ")])["bands"]


def test_captions_are_held_against_their_bands(tmp_path: Path) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        row["caption"] = "The image shows a box. It cost 3.5 euros! Nobody bought it" if number < 4 else "A box。箱子。"
        if number == 8:
            pairsmaker.reject(row, "echo")
        row["finish_reason"] = "length" if number in (5, 6) else "stop"
        row["flags"] = ["opener"] if number < 4 else []

    pairsmaker.write_pairs(tmp_path)
    pairsmaker.write_captions(tmp_path, change=change)
    found = stats.gather(tmp_path / "captions" / "synthetic")["captions"]["synthetic"]
    assert found["caption_sentences"] == {"num": 9, "min": 2, "max": 3, "mean": 2.333333, "median": 2, "p95": 3}
    bands = {name: (about["value"], about["mark"], about["of"]) for name, about in found["bands"].items()}
    assert bands == {
        "caption_words_mean": (round((3 * 12 + 6 * 2) / 9, 6), "below", 9),
        "caption_sentences_mean": (2.333333, "below", 9),
        "cap_hit_share": (0.2, "above", 10),
        "refusal_or_leak_share": (0.1, "above", 10),
        "opener_share": (round(3 / 9, 6), "above", 9),
    }


def write_figures(folder: Path, unit: str, **change: Any) -> None:
    """The figures that ``clips recaption`` writes beside a shard."""
    figures = {
        "schema_version": 1, "rows": 5, "codes": {"ok": 5}, "flags": {}, "tokens": 100, "prompt_tokens": 50,
        "seconds": 2.0, "captions_per_s": 2.0, "tokens_per_s": 50.0, "gpu_hours": 0.0, "num_gpus": 0, "device": "cpu",
        "engine": "vllm", "engine_version": "0.32.0", "engine_deaths": 0, "startup_s": 9.0, "reused": 1,
    }  # fmt: skip
    (folder / f"{unit}_stats.json").write_text(json.dumps(figures | change))


def test_who_made_a_column_and_what_it_cost_is_summed_over_its_shards(work: Path) -> None:
    folder = work / "captions" / "synthetic"
    assert stats.gather(folder)["captions"]["synthetic"]["cost"] == {}
    write_figures(folder, "00000")
    gpu: Row = {"num_gpus": 2, "gpu_hours": 0.25, "device": "NVIDIA H200", "engine_deaths": 3}
    write_figures(folder, "00001", seconds=6.0, captions_per_s=10.0, tokens_per_s=90.0, tokens=540, **gpu)
    found = stats.gather(folder)["captions"]["synthetic"]
    assert found["cost"] == {
        "shards_with_figures": 2, "shards": 2, "rows": 10, "reused": 2, "tokens": 640, "prompt_tokens": 100,
        "engine_deaths": 3, "seconds": 8.0, "captions_per_s": 8.0, "tokens_per_s": 80.0,
        "gpu_hours": 0.25, "cpu_hours": round(2 / 3600, 6),
        "engines": {"vllm 0.32.0": 2}, "devices": {"NVIDIA H200": 1, "cpu": 1},
    }  # fmt: skip
    assert found["made_by"] == [
        {"model": "demo", "model_revision": "0", "engine": "vllm", "engine_version": "0", "prompt": "describe",
         "prompt_digest": "0", "shards": 2},
    ]  # fmt: skip


def test_nothing_was_measured_where_all_rows_were_reused(work: Path) -> None:
    folder = work / "captions" / "synthetic"
    write_figures(folder, "00000", seconds=0.0, captions_per_s=None, tokens_per_s=None, reused=5, device="server")
    found = stats.gather(folder)["captions"]["synthetic"]["cost"]
    assert (found["captions_per_s"], found["tokens_per_s"], found["server_hours"]) == (None, None, 0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{", "is not valid JSON"), ("{}", "has no figure 'rows'"), ("[]", "has no figure"), ("5", "is not valid JSON")],
)
def test_unreadable_figures_are_named(work: Path, text: str, complaint: str) -> None:
    (work / "captions" / "synthetic" / "00001_stats.json").write_text(text)
    with pytest.raises(UserError, match=rf"00001_stats\.json {complaint}"):
        stats.gather(work)


def test_duplicates_that_were_not_captioned_are_no_failures(tmp_path: Path) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        if number in (0, 1):
            pairsmaker.reject(row, "duplicate" if number == 0 else "loop")
            row.update(flags=["gated"], finish_reason="length")

    pairsmaker.write_pairs(tmp_path)
    pairsmaker.write_captions(tmp_path, change=change)
    found = stats.gather(tmp_path)["captions"]["synthetic"]
    assert (found["attempted"], found["succeeded"], found["failures"]) == (9, 8, {"loop": 1})
    assert found["not_asked"] == {"duplicate": 1} and found["flags"] == {"gated": 1}
    assert found["finish_reasons"] == {"stop": 8, "length": 1}


def test_rules_that_fired_are_printed_with_their_denominator(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_figures(work / "captions" / "synthetic", "00000")
    assert main(["stats", str(work)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["hit_token_cap", "(of", "10)", "1"] in lines
    assert ["captions_per_s", "2"] in lines and ["vllm", "0.32.0", "1"] in lines


def test_a_stage_folder_gives_what_its_work_folder_gives(work: Path) -> None:
    found = stats.gather(work)
    assert stats.gather(work / "pairs") == {"download": found["download"]}
    assert stats.gather(work / "captions" / "synthetic") == stats.gather(work / "captions")
    assert stats.gather(work / "captions") == {"captions": found["captions"]}
    assert stats.gather(work / "shards") == {"shards": found["shards"]}


def test_scores_are_told_from_other_tables(tmp_path: Path) -> None:
    folder = tmp_path / "scores" / "clip"
    rows = [{"key": f"{i}", "sha256": "s", "web": i / 10, "synthetic": None if i else 0.25} for i in range(4)]
    write_table(folder, 0, rows)
    found = stats.gather(folder)
    assert found == stats.gather(tmp_path)
    similarity = found["scores"]["clip"]["similarity"]
    assert similarity["web"] == {"num": 4, "min": 0, "max": 0.3, "mean": 0.15, "median": 0.2, "p95": 0.3}
    assert similarity["synthetic"]["num"] == 1


def test_of_scores_numbers_have_a_spread_and_flags_are_counted(tmp_path: Path) -> None:
    rows = [
        {"key": f"{i}", "sha256": "s", "web": 0.5, "web_sentences": [0.5, 0.25], "web_flags": flags, "nsfw": i == 0,
         "tag": "cat"}
        for i, flags in enumerate([["url", "email"], [], ["url"], None])
    ]  # fmt: skip
    write_table(tmp_path / "scores" / "clip", 0, rows)
    found = stats.gather(tmp_path)["scores"]["clip"]
    assert set(found["similarity"]) == {"web", "nsfw"}  # neither the lists nor the texts
    assert found["similarity"]["nsfw"]["mean"] == 0.25
    assert found["flagged"] == {"web_flags": {"attempted": 3, "flags": {"url": 2, "email": 1}}}


def test_a_damaged_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is no JSON"):
        stats.gather(tmp_path)


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("x")
    (tmp_path / "page.html").rename(ledger.part(tmp_path / "page.html"))
    ledger.commit(tmp_path, "page", ["page.html"], inputs={}, config={}, counts={})
    with pytest.raises(UserError, match="Point `clips stats` at a work folder"):
        stats.gather(tmp_path)


def test_the_command_prints_hosts_bands_and_no_terminal_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        pair("0", "http://fine.test/2014/a.jpg"),
        pair("1", "http://fine.test/2014/b.jpg"),
        pair("2", "http://bad\x1b[31m\u202e.test/a.jpg", "dns"),
        pair("3", "http://other.test/a.jpg", "http\x1b]0;title\x07"),
    ]
    write_table(tmp_path, 0, rows)
    assert main(["stats", str(tmp_path), "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert not any(not character.isprintable() for character in out.replace("\n", ""))
    lines = [line.split() for line in out.splitlines()]
    assert ["succeeded", "2", "of", "4"] in lines
    assert ["fine.test", "2", "2", "100.0"] in lines
    assert ["bad�[31m�.test", "1", "0", "0.0", "dns", "1"] in lines
    assert not any("other.test" in line for line in lines)
    assert ["2014", "2", "2", "100.0"] in lines
    assert "success_share           0.5 (of 4) - band at least 0.5, inside" in out
    assert "web_caption_words_mean  5 (of 2) - band 8 to 20, below" in out
    assert "aspect_ratio            mean 1.333, median 1.33, 95 % 1.33, 1.333 to 1.333 (of 2)" in out
    assert main(["stats", str(tmp_path), "--json"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text and json.loads(text)["download"]["by_year"][0]["year"] == "2014"


def test_two_folders_at_once_are_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "pairs", "--work", str(tmp_path)]) == 2
    assert "Give one of them" in capsys.readouterr().err


# --- verify -----------------------------------------------------------------------------------------------------------


def test_an_undisturbed_folder_is_intact(work: Path) -> None:
    found = verify.verify(work)
    assert found.num_intact == found.num_files > 6 and not found.corrupt and not found.orphans


def test_corrupt_cut_and_missing_files_are_named(work: Path) -> None:
    flipped = bytearray((work / "pairs" / "00000.tar").read_bytes())
    flipped[600] ^= 1
    (work / "pairs" / "00000.tar").write_bytes(bytes(flipped))
    (work / "pairs" / "00001.parquet").write_bytes(b"cut")
    (work / "captions" / "synthetic" / "00000.parquet").unlink()
    (work / "captions" / "synthetic" / "00001.done.json").write_text("{")
    assert verify.verify(work, gc=True).corrupt == {
        "captions/synthetic/00000.parquet": "is missing",
        "captions/synthetic/00001.done.json": "is not a sidecar that clips wrote",
        "pairs/00000.tar": "has another content than when it was finished: member '000000000.jpg', whose data begin at "
        "byte 512, is an image with another sha256 than its row has",
        "pairs/00001.parquet": f"has 3 bytes instead of {_promised(work, '00001', '00001.parquet')}: at byte 0 it does "
        "not begin as parquet does",
    }
    assert (work / "pairs" / "00000.tar").exists()


def _promised(work: Path, unit: str, name: str) -> int:
    return int(json.loads((work / "pairs" / f"{unit}.done.json").read_text())["files"][name]["bytes"])


def test_gc_removes_orphans_and_nothing_else(work: Path) -> None:
    before = {path for path in work.rglob("*") if path.is_file()}
    orphans = [
        work / "shards" / "train-00009.tar.part",
        work / "shards" / "train-00009.tar",
        work / "runs" / "a.json.part",
    ]
    kept = [work / "shards" / "notes.txt", work / "captions" / "synthetic" / "00002.journal.jsonl", work / "mine.tar"]
    for path in (*orphans, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert verify.verify(work).orphans == sorted(path.relative_to(work).as_posix() for path in orphans)
    assert verify.verify(work, gc=True).removed
    assert {path for path in work.rglob("*") if path.is_file()} == before | set(kept)
    assert verify.verify(work).orphans == []


def test_a_corrupt_sidecar_keeps_its_files_from_gc(work: Path) -> None:
    ledger.sidecar_path(work / "pairs", "00000").write_text("{")
    verify.verify(work, gc=True)
    assert (work / "pairs" / "00000.tar").exists()


def test_a_folder_without_finished_work_is_clear(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished work"):
        verify.verify(tmp_path)
