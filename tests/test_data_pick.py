"""``clips sample``: the right samples for a seed, a score, a length or a flag, on pages that nothing breaks out of."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pytest

from cli.main import main
from clips_data import ledger, pick_page, schema, shard
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job
from clips_data.pick import Picks, Wanted, pick

KEYS = [schema.sample_key(shard, row) for shard in range(2) for row in range(6) if row != pairsmaker.FAILED_ROW]
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e"


def write_scores(work: Path, name: str, values: dict[str, list[float | None]]) -> None:
    """Commits a score folder: ``values`` has a number for each of ``KEYS`` by field."""
    folder = work / schema.SCORES / name
    folder.mkdir(parents=True)
    for unit in ledger.finished_units(work / schema.PAIRS):
        pairs = pl.read_parquet(work / schema.PAIRS / f"{unit}.parquet").filter(pl.col("status") == "success")
        rows = [KEYS.index(key) for key in pairs["key"]]
        columns = {
            field: pl.Series([numbers[row] for row in rows], dtype=pl.Float64) for field, numbers in values.items()
        }
        pairs.select("key", "sha256").with_columns(**columns).write_parquet(ledger.part(folder / f"{unit}.parquet"))
        ledger.commit(folder, unit, [f"{unit}.parquet"], inputs={}, config={"name": name}, counts={"ok": len(pairs)})


@pytest.fixture
def work(tmp_path: Path) -> Path:
    def spoil(number: int, row: pairsmaker.Row) -> None:
        if number == 1:
            pairsmaker.reject(row)
        row["flags"] = ["hit_token_cap"] if number in (4, 7) else []
        if number == 8:
            row["caption"] += " It is longer than all the others."

    pairsmaker.write_pairs(tmp_path)
    pairsmaker.write_captions(tmp_path, change=spoil)
    numbers = [0.1 * place for place in range(len(KEYS))]
    web: list[float | None] = [0.5 - number for number in numbers]
    write_scores(tmp_path, "clip", {"web": [math.nan, None, *web[2:]], "synthetic": [*numbers]})
    return tmp_path


@pytest.fixture
def shards(work: Path) -> Path:
    shard.run(ShardConfig(shard_rows=3, seed=1), Job(work=work, quiet=True))
    return work / "shards"


def keys(picks: Picks) -> list[str]:
    return [one.key for one in picks.samples]


def test_a_draw_depends_on_the_seed_and_the_keys_alone(work: Path, shards: Path) -> None:
    drawn = keys(pick(work, Wanted(num=6)))
    assert drawn == keys(pick(work, Wanted(num=6))) and len(set(drawn)) == 6
    assert drawn[:3] == keys(pick(work, Wanted(num=3)))
    assert drawn == keys(pick(shards, Wanted(num=6)))  # the same samples, shuffled
    assert drawn != keys(pick(work, Wanted(num=6, seed=1)))
    assert sorted(keys(pick(work, Wanted(num=99)))) == KEYS


def test_every_sample_comes_with_its_own_image_and_captions(work: Path, shards: Path) -> None:
    for folder in (work, shards):
        for one in pick(folder, Wanted(num=99)).samples:
            number = int(one.key[:5]) * 6 + int(one.key[5:])
            assert one.image == pairsmaker.image_bytes(number)
            assert one.captions["web"]["caption"] == pairsmaker.web_caption(number)
            assert ledger.digest_bytes(one.image) == one.sha256
            assert one.place.is_file() and "secret" not in str(one.url)
            assert (one.txt is None) == (folder == work)


def test_the_worst_come_first_and_those_without_a_score_are_counted_out(work: Path, shards: Path) -> None:
    for folder in (work, shards):
        picks = pick(folder, Wanted(num=3, by="worst", score="score.web"))
        assert keys(picks) == KEYS[:-4:-1]
        assert [one.value for one in picks.samples] == [pytest.approx(value) for value in (-0.4, -0.3, -0.2)]
        assert (picks.num_rows, picks.num_fitting) == (10, 8)


def test_the_score_is_that_of_the_column_unless_it_is_named(work: Path) -> None:
    assert keys(pick(work, Wanted(num=2, by="worst"))) == KEYS[:2]
    assert keys(pick(work, Wanted(num=2, by="worst", column="web"))) == KEYS[:-3:-1]
    difference = pick(work, Wanted(num=1, by="worst", score="score.web - score.synthetic"))
    assert keys(difference) == KEYS[-1:]
    assert keys(pick(work, Wanted(num=2, by="worst", score="clip.synthetic"))) == KEYS[:2]


def test_the_longest_captions_of_a_column(work: Path, shards: Path) -> None:
    for folder in (work, shards):
        picks = pick(folder, Wanted(num=2, by="longest"))
        assert keys(picks)[0] == "000010002" and picks.samples[0].value == len(
            pairsmaker.synthetic_caption(8) + " It is longer than all the others."
        )
        assert picks.num_fitting == 9


def test_flagged_are_those_with_a_flag_or_a_code(work: Path, shards: Path) -> None:
    picks = pick(work, Wanted(by="flagged"))
    assert sorted(keys(picks)) == ["000000001", "000000004", "000010001"] and picks.num_fitting == 3
    said = {one.key: one.captions["synthetic"] for one in picks.samples}
    assert said["000000001"]["code"] == "refused" and said["000000001"]["raw"] == pairsmaker.synthetic_caption(1)
    assert said["000000004"]["flags"] == ["hit_token_cap"]
    assert keys(pick(shards, Wanted(by="flagged"))) == ["000000001"]  # shards hold codes, and no flags


def test_where_leaves_what_meets_all_conditions(work: Path, shards: Path) -> None:
    where = ("score.synthetic >= 0.35", "synthetic.num_words < 20")
    for folder in (work, shards):
        picks = pick(folder, Wanted(num=99, where=where))
        assert sorted(keys(picks)) == [key for key in KEYS[4:] if key != "000010002"]
        assert (picks.num_rows, picks.num_left) == (10, 5)
    assert pick(work, Wanted(where=("pairs.width > 1000",))).samples == []


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (Wanted(column="sinthetic"), "Did you mean 'synthetic'"),
        (Wanted(by="worst", score="score.wep"), "Did you mean 'score.web'"),
        (Wanted(where=("pairs.widht > 3",)), "Did you mean 'pairs.width'"),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest_that_is(work: Path, wanted: Wanted, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        pick(work, wanted)


def test_folders_without_samples_or_scores_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished pairs"):
        pick(tmp_path, Wanted())
    work = pairsmaker.write_work(tmp_path / "plain")
    with pytest.raises(UserError, match="Run `clips score`"):
        pick(work, Wanted(by="worst"))


# --- what is shown ----------------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """The tags of a page and the addresses in their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "style") or name[:2] == "on"]


def hostile(tmp_path: Path) -> Path:
    pairsmaker.write_pairs(tmp_path, change=lambda number, row: row.update(caption=HOSTILE, url=f"http://x/{HOSTILE}"))
    pairsmaker.write_captions(tmp_path, change=lambda number, row: row.update(caption=HOSTILE, flags=[HOSTILE]))
    return tmp_path


def test_a_gallery_is_one_file_that_runs_and_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, page = hostile(tmp_path), tmp_path / "pages" / "page.html"
    assert main(["sample", str(work), "--num", "4", "--gallery", str(page)]) == 0
    assert capsys.readouterr().out.split() == [str(page)]
    tags = Tags()
    tags.feed(page.read_text())
    assert not tags.tags & {"script", "iframe", "object", "link", "base", "form", "a"}
    assert len(tags.addresses) == 4 and all(one.startswith("data:image/jpeg;base64,") for one in tags.addresses)
    assert page.read_text().count("&lt;script&gt;alert(1)") >= 8 and "\u202e" not in page.read_text()
    assert "default-src 'none'" in page.read_text()
    before = page.read_bytes()
    assert main(["sample", str(work), "--num", "4", "--gallery", str(page), "--quiet"]) == 0
    assert page.read_bytes() == before


def test_pages_show_codes_flags_scores_and_sub_captions(work: Path, shards: Path) -> None:
    flagged = pick_page.render(pick(work, Wanted(by="flagged")), "Flagged")
    assert '<span class="code">refused</span>' in flagged and '<span class="flag">hit_token_cap</span>' in flagged
    assert "3 samples, flagged or rejected synthetic captions, drawn by seed 0 (of 10 rows, 3 with" in flagged
    assert '<mark class="b">It stands on the left</mark>' in pick_page.render(pick(shards, Wanted()), "Shards")
    assert "No sample is left" in pick_page.render(pick(work, Wanted(where=("web.num_chars < 0",))), "None")


def test_text_is_for_terminals_and_json_has_a_line_a_sample(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(work), "--num", "2", "--by", "worst"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("000000000  0  00000.tar\n  web") and "2 samples, lowest score.synthetic" in said.err
    assert main(["sample", "--work", str(work), "--by", "flagged", "--json", "--quiet"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["key"] for row in rows} == {"000000001", "000000004", "000010001"}
    assert set(rows[0]["captions"]) == {"web", "synthetic"} and "image" not in rows[0]


def test_hostile_text_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(hostile(tmp_path)), "--num", "3"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said


@pytest.mark.parametrize(
    "words", [["--score", "score.web"], ["--gallery", "x.html", "--json"], [".", "--work", "."], ["--num", "0"]]
)
def test_options_that_do_not_go_together_are_usage_errors(words: list[Any]) -> None:
    assert main(["sample", *words]) == 2


def test_flags_and_labels_among_the_scores_read_as_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairsmaker.write_pairs(tmp_path, num_shards=1)
    folder = tmp_path / "scores" / "clip"
    folder.mkdir(parents=True)
    scores = {"web": 0.25, "web_flags": ["url", "markup"], "tag": "<b>"}
    pairs = pl.read_parquet(tmp_path / "pairs" / "00000.parquet").filter(pl.col("code") == "ok")
    rows = pairs.select("key", "sha256").to_dicts()
    pl.DataFrame([row | scores for row in rows]).write_parquet(ledger.part(folder / "00000.parquet"))
    ledger.commit(folder, "00000", ["00000.parquet"], inputs={}, config={}, counts={})
    page = tmp_path / "page.html"
    assert main(["sample", str(tmp_path), "--num", "1"]) == 0
    assert "scores tag <b>, web 0.25, web_flags url, markup" in " ".join(capsys.readouterr().out.split())
    assert main(["sample", str(tmp_path), "--num", "1", "--gallery", str(page)]) == 0
    assert "tag &lt;b&gt; · web 0.25 · web_flags url, markup" in page.read_text()
