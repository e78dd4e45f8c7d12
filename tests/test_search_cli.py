"""``clips search`` as people and pipes meet it: what is asked, what is printed, and strangers' captions kept inert."""

from __future__ import annotations

import functools
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shardmaker

from cli import main as entry
from clips_train import encoders

HOSTILE = "<script>alert(1)</script> \x1b[31mred\x1b[0m \x9b2J \u202egnp\u202c \u2028 " + "x" * 100_000
Say = Callable[..., tuple[int, list[str], str]]
"""Exit code, lines of stdout, stderr."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def change(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return image, {**about, "synthetic": HOSTILE} if number == 0 else about

    folder = tmp_path_factory.mktemp("work")
    shardmaker.write_shards(folder / "shards", num_train=24, num_heldout=6, change=change)
    (folder / "one.jpg").write_bytes(shardmaker.sample(0)[0])
    return folder


@pytest.fixture(autouse=True)
def as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(entry.COMMANDS, "search", (".search", "Find images or captions by text or picture."))
    monkeypatch.setattr(encoders, "load", loaded)


loaded = functools.cache(encoders.load)
"""The model is read once for all tests."""


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Say:
    def run(*words: object, model: str = "demo") -> tuple[int, list[str], str]:
        code = entry.main(["search", *map(str, words), "--model", model, "--device", "cpu"])
        out, err = capfd.readouterr()
        return code, out.splitlines(), err

    return run


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_results_are_lines_of_rank_score_key_and_caption(work: Path, say: Say) -> None:
    code, lines, err = say(work / "shards", "a red circle", "--top", 3)
    cells = [line.split("\t") for line in lines]
    assert code == 0 and [line[0] for line in cells] == ["1", "2", "3"] and {len(line) for line in cells} == {4}
    scores = [float(line[1]) for line in cells]
    assert scores == sorted(scores, reverse=True) and all(len(line[2]) == 9 for line in cells)
    assert "24 images of split train" in err and "demo" in err


def test_a_folder_of_shards_a_work_folder_and_work_are_the_same_place(work: Path, say: Say) -> None:
    asked = ("a blue square", "--top", 4)
    by_shards = say(work / "shards", *asked)[1]
    assert by_shards == say(work, *asked)[1] == say(*asked, "--work", work)[1]
    assert len(by_shards) == 4 and len(list((work / "search").glob("demo-*"))) == 1


def test_several_queries_have_their_name_before_each_line(
    work: Path, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, lines, _ = say(work, "a red circle", "a blue bar", "--top", 2)
    assert [line.split("\t")[0] for line in lines] == ["a red circle"] * 2 + ["a blue bar"] * 2
    stdin = io.TextIOWrapper(io.BytesIO(b"a red circle\n\na blue bar\r\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert say(work, "-", "--top", 2)[1] == lines


def test_a_picture_searches_alone_and_with_a_text(work: Path, say: Say) -> None:
    _, alone, _ = say(work, "--image", work / "one.jpg", "--top", 1)
    assert alone[0].split("\t")[1:3] == ["1.0000", "000000000"]
    _, both, _ = say(work, "a red circle", "--image", work / "one.jpg", "--top", 1)
    assert float(both[0].split("\t")[1]) < 1


def test_captions_can_be_searched_and_come_first(work: Path, say: Say) -> None:
    _, lines, err = say(work, "green circle photo 1", "--text", "web", "--top", 1)
    assert lines[0].split("\t")[2:] == ["000000001", "green circle photo 1"] and "captions of web" in err


def test_json_has_everything_a_line_each(work: Path, say: Say) -> None:
    _, lines, _ = say(work, "a red circle", "--json", "--top", 2)
    found = json.loads(lines[1])
    assert set(found) == {"query", "image", "rank", "score", "key", "file", "sha256", "url", "captions"}
    assert found["rank"] == 2 and found["query"] == "a red circle" and set(found["captions"]) == {"web", "synthetic"}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nothing/", "a query"], 1, "nothing holds no finished shards"),
        (["nothing", "a query"], 1, "'nothing' is no folder, so it is a query"),
        (["{work}", ""], 2, "A query is empty"),
        (["{work}"], 2, "What is to be searched for"),
        (["{work}", "x", "--split", "test"], 1, "no split 'test'"),
        (["{work}", "x", "--text", "webb"], 1, "Did you mean 'web'"),
        (["{work}", "--image", "none.jpg"], 1, "--image none.jpg cannot be read"),
        (["{work}", "x", "--top", "0"], 2, "--top is 0"),
        (["{work}", "x", "--model", "run:nope"], 1, "There is no run"),
    ],
)
def test_what_cannot_be_done_is_a_sentence(
    work: Path, words: list[str], code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = [] if "--model" in words else ["--model", "demo"]
    assert entry.main(["search", *(word.format(work=work) for word in words), *model]) == code
    out, err = capfd.readouterr()
    assert said in err and out == "" and "Traceback" not in err


def test_without_any_run_and_without_a_model_it_says_what_to_name(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert entry.main(["search", str(work), "x"]) == 1
    assert "There is no run under" in capfd.readouterr().err


# --- strangers' words -------------------------------------------------------------------------------------------------


def test_hostile_captions_and_queries_steer_no_terminal(work: Path, say: Say) -> None:
    query = "a \x1b]0;title\x07 \u202e circle"
    picture = ("--image", work / "one.jpg")
    _, lines, _ = say(work, query, "second", *picture, "--top", 1)
    assert "<script>" in "".join(lines)
    _, as_json, _ = say(work, *picture, "--json", "--top", 1)
    for line in lines + as_json:
        assert not set(line) & set("\x1b\x07\x9b\u202e\u202c"), line[:200]
    assert all(len(line) < 1000 for line in lines)
    assert json.loads(as_json[0])["captions"]["synthetic"] == HOSTILE  # all of it, escaped


def test_the_page_is_one_inert_file(work: Path, say: Say, tmp_path: Path) -> None:
    page = tmp_path / "found.html"
    code, lines, err = say(work, "<img src=x onerror=alert(1)>", "--image", work / "one.jpg", "--html", page)
    html = page.read_text()
    assert code == 0 and lines and f"wrote {page}" in err
    assert "<script" not in html and "onerror=alert(1)&gt;" in html and "&lt;script&gt;" in html
    assert not set(html) & set("\x1b\x9b\u202e\u202c\u2028")
    assert "default-src 'none'" in html and "98\u2009" in html  # of the 100 kB the rest is counted
    assert html.count("<article>") == 12 and html.count("data:image/jpeg") == 13 and len(html) < 400_000
