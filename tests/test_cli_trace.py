"""``clips trace`` as a person reads it: every step, aligned, and nothing that a caption could do to the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pairsmaker
import polars as pl
import pytest

from cli.main import main
from cli.trace import MAX_TEXT_CHARS, lines, look_up
from clips_data import ledger, shard
from clips_data.config import ShardConfig
from clips_data.executor import Job

HOSTILE = "Red \x1b[31m\x9b2J\u202e\x07 box.\r\nA second line. " + "word " * 1000


def spoil(number: int, row: pairsmaker.Row) -> None:
    if number == 1:
        row.update(caption=HOSTILE, raw=HOSTILE + "</s>", flags=["hit_token_cap", "url"])
    if number == 2:
        pairsmaker.reject(row, "loop")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    pairsmaker.write_pairs(tmp_path, change=lambda number, row: row.update(host="a\x1b]0;title\x07b.test"))
    pairsmaker.write_captions(tmp_path, change=spoil)
    shard.run(ShardConfig(shard_rows=4, heldout_ratio=0.4), Job(work=tmp_path, quiet=True))
    return tmp_path


def printed(work: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["trace", *words, "--work", str(work)]) == 0
    return capsys.readouterr().out


def test_every_step_is_shown_and_nothing_steers_the_terminal(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(work, capsys, "000000001")
    assert not any(not character.isprintable() for character in out.replace("\n", ""))
    assert out.startswith("000000001  downloaded, 1 of 1 caption columns ok, ")
    titles = [line for line in out.splitlines() if line and not line.startswith(" ")]
    assert [title.split("  ")[0] for title in titles[1:-1]] == [
        "list row",
        "image",
        "caption synthetic",
        "shards",
        "runs",
    ]
    assert titles[-1] == "All that is here fits together."
    for line in (
        "  flags           hit_token_cap, url",
        "  model           demo, revision 0",
        "  finish_reason   stop",
    ):
        assert line in out
    assert "Red �[31m�2J�� box. A second line." in " ".join(out.split())
    assert f"{len(HOSTILE) - MAX_TEXT_CHARS} more characters, see --json" in " ".join(out.split())


def test_values_stand_beside_their_names_and_hashes_are_not_broken(work: Path) -> None:
    found = look_up(work, "000000001", None, None)
    shown = list(lines(found, 40))
    (at,) = [line for line in shown if line.startswith("  caption  ")]
    start = at.index("Red")
    following = shown[shown.index(at) + 1]
    assert following[:start].isspace() and not following[start].isspace()
    assert any(line.endswith(found["image"]["sha256"]) for line in shown)
    words = [line for line in shown if "sha256" not in line and "/" not in line and "http" not in line]
    assert max(len(line) for line in words) <= 40


def test_scores_labels_flags_and_sentences_are_all_shown(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {
        "web": 0.25,
        "web_sentences": [0.5, 0.25],
        "web_flags": ["url", "markup"],
        "tag": "cat",
        "synthetic": None,
    }
    folder = work / "scores" / "clip"
    folder.mkdir(parents=True)
    rows = pl.read_parquet(work / "pairs" / "00000.parquet", columns=["key", "sha256"]).to_dicts()
    pl.DataFrame([row | scores for row in rows]).write_parquet(ledger.part(folder / "00000.parquet"))
    ledger.commit(folder, "00000", ["00000.parquet"], inputs={}, config={}, counts={})
    out = printed(work, capsys, "000000001")
    shown = dict(line.split(maxsplit=1) for line in out[out.index("scores clip") :].splitlines()[1:6])
    assert shown["web"] == "0.2500" and shown["tag"] == "cat"
    assert shown["web_sentences"] == "0.5000, 0.2500" and shown["web_flags"] == "url, markup"
    assert shown["synthetic"] == "none, as the caption was empty"


def test_an_adopted_image_has_no_size_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairsmaker.write_pairs(tmp_path, change=lambda number, row: row.update(original_width=None, original_height=None))
    assert "as downloaded" not in printed(tmp_path, capsys, "000000001")


def test_the_raw_answer_is_shown_where_it_says_something_else(work: Path) -> None:
    names = {
        number: [line.split()[0] for line in lines(look_up(work, f"{number:09d}", None, None), 100) if line.strip()]
        for number in (0, 1, 2)
    }
    assert ("raw" in names[0], "raw" in names[1], "raw" in names[2]) == (False, True, True)
    assert "(empty)" in " ".join(lines(look_up(work, "000000002", None, None), 100))


def test_a_failed_download_is_no_error(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(work, capsys, "000000003")
    assert out.splitlines()[0] == "000000003  http_4xx"
    assert "- the download failed, so there is no image" in out and "image  pairs" not in out


def test_json_is_one_object_with_whole_texts(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(work, capsys, "000000001", "--json")
    found = json.loads(out)
    assert found["captions"]["synthetic"]["row"]["raw"] == HOSTILE + "</s>"
    assert "\x1b" not in out and found["also"] == []


def test_what_does_not_fit_is_marked_and_counted(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairsmaker.write_captions(work, change=lambda number, row: row.update(caption="Made again."))
    out = printed(work, capsys, "000000000")
    marked = [line for line in out.splitlines() if line.startswith("  ! ")]
    assert len(marked) == 2 and "reads otherwise" in marked[0]
    assert out.splitlines()[-1] == "2 lines with a ! say what does not fit."


def test_a_sample_is_named_in_one_way_only(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "--work", str(work)]) == 2
    assert "Name one sample" in capsys.readouterr().err
    assert main(["trace", "000000001", "--url", "http://images.test/1.jpg", "--work", str(work)]) == 2
    assert "Name one sample" in capsys.readouterr().err


def test_other_names_find_it_and_further_rows_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def same(number: int, row: pairsmaker.Row) -> None:
        row.update(url="http://images.test/one.jpg", source_key="mine" if number == 3 else None)

    pairsmaker.write_pairs(tmp_path, num_shards=1, shard_rows=4, change=same)
    out = printed(tmp_path, capsys, "--url", "http://images.test/one.jpg")
    assert out.splitlines()[0].startswith("000000000  downloaded")
    assert out.splitlines()[1] == "  also: 000000001, 000000002, 000000003"
    sha256 = look_up(tmp_path, "000000002", None, None)["image"]["sha256"]
    assert printed(tmp_path, capsys, "--sha256", sha256).startswith("000000002")
    assert printed(tmp_path, capsys, "mine").startswith("000000003")


def test_an_unknown_key_says_where_it_was_looked_for(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "000000042", "--work", str(work)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("clips: Nothing under") and "Looked at: pairs (2 shards, 00000 to 00001)" in error
