"""One tar of training samples: its members and their bytes, the offset index, and what is refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pairsmaker
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data import draws, joined, ledger, shard_write, split, tars
from clips_data.config import ShardConfig
from clips_data.errors import UserError

COLUMNS = ("web", "synthetic")
UNIT = "train-00000"


def planned(work: Path, **changes: pl.Expr) -> pl.DataFrame:
    """All samples of a work folder as rows of a plan, the last one first."""
    inputs = joined.open_inputs(work, COLUMNS)
    tables = [inputs.table(unit).with_columns(unit=pl.lit(unit)) for unit in inputs.units]
    names = ["key", "sha256", "unit", "url", "image_ext", "place.offset", "place.bytes"]
    names += [f"{kind}.{column}" for kind in ("text", "code") for column in COLUMNS]
    extra = pl.lit(json.dumps({"scene": "ü"}, ensure_ascii=False)).alias("extra")
    return pl.concat(tables).select(*names, extra).with_columns(**changes).reverse()


def write(work: Path, rows: pl.DataFrame, **options: Any) -> dict[str, int]:
    out = work / "shards"
    out.mkdir(exist_ok=True)
    writing = shard_write.Writing(ShardConfig(columns=COLUMNS, **options), work / "pairs", out, {"pairs": "0"})
    return shard_write.write_tar(rows, UNIT, writing)


def samples(work: Path) -> list[tars.Sample]:
    return list(tars.read_samples(work / "shards" / f"{UNIT}.tar"))


def index(work: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(work / "shards" / f"{UNIT}.index.parquet").to_pylist()
    return rows


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return pairsmaker.write_work(tmp_path)


def test_members_are_the_image_the_mixed_text_and_what_is_known_in_the_order_of_the_plan(work: Path) -> None:
    rows = planned(work)
    counts = write(work, rows, seed=3, web_ratio=0.5, split="sentence")
    assert [sample.key for sample in samples(work)] == rows["key"].to_list()
    for sample, row in zip(samples(work), rows.iter_rows(named=True), strict=True):
        number = 6 * int(sample.key[:5]) + int(sample.key[5:])
        chosen = "web" if draws.uniform(3, "mix", 0, sample.key) < 0.5 else "synthetic"
        web, synthetic = pairsmaker.web_caption(number), pairsmaker.synthetic_caption(number)
        about = {
            "key": sample.key, "sha256": ledger.digest_bytes(pairsmaker.image_bytes(number)),
            "web": web, "synthetic": synthetic,
            "sub_captions": {"synthetic": split.split(synthetic, "sentence")}, "scores": {}, "extra": {"scene": "ü"},
            "provenance": {"pairs": row["unit"], "url": f"http://images.test/{number}.jpg", "txt": chosen,
                           "codes": {"synthetic": "ok"}},
        }  # fmt: skip
        assert sample.members == {
            "jpg": pairsmaker.image_bytes(number),
            "txt": {"web": web, "synthetic": synthetic}[chosen].encode(),
            "json": json.dumps(about, sort_keys=True, ensure_ascii=False).encode(),
        }
    chosen_columns = [json.loads(sample.members["json"])["provenance"]["txt"] for sample in samples(work)]
    assert counts == {name: chosen_columns.count(name) for name in COLUMNS} and len(counts) == 2
    sidecar = ledger.read_sidecar(work / "shards", UNIT)
    assert sidecar is not None and sidecar.counts == counts and sidecar.inputs == {"pairs": "0"}


def test_the_index_finds_every_member_and_counts_what_the_card_tells(work: Path) -> None:
    rows = planned(work).with_row_index()
    rows = rows.with_columns(
        pl.when(pl.col("index") == 1).then(pl.lit("")).otherwise("text.synthetic").alias("text.synthetic"),
        pl.when(pl.col("index") == 1).then(pl.lit("loop")).otherwise("code.synthetic").alias("code.synthetic"),
        pl.Series("flags.synthetic", [["opener"], ["loop", "cut"]] + [[]] * (len(rows) - 2), pl.List(pl.String)),
    ).drop("index")
    counts = write(work, rows, web_ratio=0.0)
    content = (work / "shards" / f"{UNIT}.tar").read_bytes()
    for row, sample in zip(index(work), samples(work), strict=True):
        assert row["key"] == sample.key and row["image_ext"] == "jpg"
        assert row["sha256"] == ledger.digest_bytes(sample.members["jpg"])
        for member, ext in (("image", "jpg"), ("txt", "txt"), ("json", "json")):
            start = row[f"{member}_offset"]
            assert content[start : start + row[f"{member}_bytes"]] == sample.members[ext]
    second = index(work)[1]
    assert [row["outcome"] for row in index(work)][:2] == ["synthetic", "web_for_missing_synthetic"]
    assert counts == {"synthetic": 9, "web_for_missing_synthetic": 1}
    assert [row["words.web"] for row in index(work)] == [len(text.split()) for text in rows["text.web"]]
    assert (second["words.synthetic"], second["code.synthetic"], second["flags.synthetic"]) == (
        0,
        "loop",
        ["loop", "cut"],
    )


def test_scores_are_rounded_and_what_json_cannot_say_is_left_out(work: Path) -> None:
    rows = planned(work).head(4).with_columns(
        pl.Series("score.web", [0.123456789, None, math.nan, math.inf]),
        pl.Series("score.other.faces", [2, 0, None, 1]),
    )  # fmt: skip
    write(work, rows)
    found = [json.loads(sample.members["json"])["scores"] for sample in samples(work)]
    assert found == [{"web": 0.123457, "other.faces": 2}, {"other.faces": 0}, {}, {"other.faces": 1}]


def test_the_mix_sees_the_rounded_scores_of_each_sample(work: Path) -> None:
    rows = planned(work).head(3).with_columns(pl.Series("score.web", [0.25 - 4e-7, 0.249, None]))
    counts = write(work, rows, web_ratio=1.0, replace_below=0.25)
    assert [json.loads(sample.members["json"])["provenance"]["txt"] for sample in samples(work)] == [
        "web", "synthetic", "web",
    ]  # fmt: skip
    assert counts == {"web": 2, "synthetic": 1}


def test_writing_twice_makes_the_same_bytes(work: Path) -> None:
    files = []
    for _ in range(2):
        write(work, planned(work), split="sentence")
        files.append({path.name: path.read_bytes() for path in (work / "shards").iterdir()})
    assert files[0] == files[1] and set(files[0]) == {
        f"{UNIT}{end}" for end in (".tar", ".index.parquet", ".done.json")
    }


def test_an_image_that_changed_is_refused_and_nothing_is_finished(work: Path) -> None:
    rows = planned(work)
    tar = work / "pairs" / "00001.tar"
    content = bytearray(tar.read_bytes())
    content[rows["place.offset"][0] + 5] ^= 1
    tar.write_bytes(content)
    with pytest.raises(UserError, match=f"Image {rows['key'][0]} in .*00001.tar has sha256"):
        write(work, rows)
    assert ledger.finished_units(work / "shards") == [] and not (work / "shards" / f"{UNIT}.tar").exists()


def test_pairs_that_were_cut_are_refused_with_file_and_offset(work: Path) -> None:
    rows = planned(work)
    tar = work / "pairs" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[: rows["place.offset"][0] + 7])
    with pytest.raises(UserError, match=rf"00001\.tar is not a usable shard: at byte {rows['place.offset'][0]} "):
        write(work, rows)
    tar.unlink()
    with pytest.raises(UserError, match=r"Cannot read .*00001\.tar"):
        write(work, rows)


@pytest.mark.parametrize("spoiled", [False, True])
def test_few_files_are_open_and_none_stays_open(tmp_path: Path, monkeypatch: Any, spoiled: bool) -> None:
    monkeypatch.setattr(shard_write, "_OPEN_FILES", 2)
    pairsmaker.write_work(tmp_path, num_shards=5)
    rows = planned(tmp_path).sort("place.offset", "key")  # from another tar each time
    if spoiled:
        (tmp_path / "pairs" / "00004.tar").unlink()
    opened: list[int] = []
    read_at = tars.read_at

    def counting(file: Any, path: Path, offset: int, size_bytes: int) -> bytes:
        opened.append(len(list(Path("/proc/self/fd").iterdir())))
        return read_at(file, path, offset, size_bytes)

    monkeypatch.setattr(tars, "read_at", counting)
    before = len(list(Path("/proc/self/fd").iterdir()))
    if spoiled:
        with pytest.raises(UserError):
            write(tmp_path, rows)
    else:
        write(tmp_path, rows)
        assert len(samples(tmp_path)) == 25 and max(opened) <= before + 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before


URLS = st.text(st.sampled_from("hHtps:/.?#@[]%&=;é \t\n\0\"'|{}aZ09-_~!$()*+,\\^`"), max_size=40)


@given(st.one_of(URLS, URLS.map("http://images.test/".__add__), URLS.map("https://a.b:8080".__add__)))
def test_urls_lose_users_queries_and_fragments_as_the_standard_library_would_cut_them(url: str) -> None:
    try:
        parts = urlsplit(url)
        expected = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        assert shard_write.without_secrets(url) is None
    else:
        assert shard_write.without_secrets(url) == expected


def test_the_config_of_a_tar_is_what_its_bytes_depend_on(tmp_path: Path) -> None:
    plain = shard_write.config_of(ShardConfig(balance=str(tmp_path / "words.txt")))
    assert shard_write.config_of(ShardConfig(balance="words.txt", licence="mit", explain=9)) == plain
    assert shard_write.config_of(ShardConfig(balance="words.txt", web_ratio=0.7)) != plain
    assert str(tmp_path) not in json.dumps(plain) and os.sep not in str(plain["balance"])
