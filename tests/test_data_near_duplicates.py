"""Captions that nearly repeat an earlier one: what counts, that order and shards do not matter, where it is kept."""

from __future__ import annotations

import itertools
import random
import tempfile
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips_data import joined, ledger, near_duplicates, shingles
from clips_data.errors import UserError
from clips_data.executor import Report
from clips_data.near_duplicates import Captions

LONG = "a very long caption about an old red wooden boat that lies on the sand beside the calm blue sea in the evening"


def found(folder: Path, *shards: list[tuple[str, str]]) -> dict[str, str | None]:
    """Key → key of the first that it nearly repeats; the shards hold (key, caption)."""
    captions = Captions(folder / "captions")
    keys = []
    for shard in shards:
        captions.add(
            pl.Series([key for key, _ in shard], dtype=pl.String),
            pl.Series([text for _, text in shard], dtype=pl.String),
        )
        keys += [key for key, _ in shard]
    return dict(zip(keys, captions.keys_of(captions.near_duplicates()).to_list(), strict=True))


def of_texts(texts: list[str], folder: Path) -> list[int | None]:
    told = found(folder, [(f"{number:09d}", text) for number, text in enumerate(texts)])
    return [None if first is None else int(first) for first in told.values()]


@pytest.mark.parametrize(
    ("first", "second", "near"),
    [
        ("Red boat, on the sea!", "red BOAT on the sea", True),
        ("ｒｅｄ boat", "red boat", True),
        ("untitled", "Untitled.", True),
        ("red boat on the sea", "red boat on the lake", False),
        ("the sea on boat red", "red boat on the sea", False),
        (LONG, LONG + " today", True),
        (LONG, LONG.replace("wooden", "broken"), True),
        (LONG, LONG.replace("wooden", "broken").replace("calm", "wild"), False),
        ("图片里有一个圆形", "图片里有一个圆形。", True),
        ("图片里有一个圆形", "图片里有一个心形", False),
        ("!!!", "!!!", False),
        ("", "", False),
    ],
)
def test_case_signs_and_one_word_of_twenty_do_not_count(first: str, second: str, near: bool, tmp_path: Path) -> None:
    assert of_texts([first, second], tmp_path) == [None, 0 if near else None]


def test_the_first_by_key_is_told_of_equal_and_of_near_ones(tmp_path: Path) -> None:
    near = LONG + " today"
    assert of_texts(["other", LONG, near, LONG, near, "other", "else"], tmp_path) == [None, None, 1, 1, 1, 0, None]


def test_of_many_that_are_near_the_very_first_is_told(tmp_path: Path) -> None:
    assert of_texts([f"{LONG} {end}" for end in "abcdefghijklmnopqrstuvwxyz"], tmp_path) == [None] + [0] * 25


def test_what_stands_before_and_after_a_text_does_not_change_it() -> None:
    texts = ["old red boat", "", "boat", LONG, "boat on the sea", "!", "boat boat boat boat", "sea"]
    together = shingles.shingled(pl.Series(texts))
    alone = [shingles.shingled(pl.Series([text], dtype=pl.String)) for text in texts]
    assert together.lengths_N.tolist() == [one.lengths_N[0] for one in alone] == [2, 0, 1, 22, 3, 0, 1, 1]
    assert together.flat.tolist() == [shingle for one in alone for shingle in one.flat.tolist()]
    assert together.texts_N.tolist() == [one.texts_N[0] for one in alone]
    assert together.bands_BN.T.tolist() == [one.bands_BN[:, 0].tolist() for one in alone]


WORDS = st.sampled_from(["red", "blue", "boat", "sea", "sand", "old", "house", "tree", "on", "the", "a", "near", "big"])
TEXTS = st.lists(st.lists(WORDS, max_size=12).map(" ".join), min_size=1, max_size=24)


def reference(texts: list[str]) -> list[int | None]:
    """By the definition, every pair compared."""

    def pairs(words: list[str]) -> set[tuple[str, ...]]:
        return set(itertools.pairwise(words)) if len(words) > 1 else {(word,) for word in words}

    of = [text.split() for text in texts]
    told: list[int | None] = []
    for number, words in enumerate(of):
        told.append(
            next(
                (
                    n
                    for n, other in enumerate(of[:number])
                    if words
                    and (words == other or len(pairs(words) & pairs(other)) >= 0.8 * len(pairs(words) | pairs(other)))
                ),
                None,
            )
        )
    return told


@settings(max_examples=60)
@given(TEXTS)
def test_found_are_just_the_pairs_of_the_definition(texts: list[str]) -> None:
    """All pairs told are near. Bands may overlook some, but hardly any, and never an equal one."""
    with tempfile.TemporaryDirectory() as folder:
        for text, told, right in zip(texts, of_texts(texts, Path(folder)), reference(texts), strict=True):
            if told is None or right is None or text in texts[: texts.index(text) + 1][:-1]:
                assert told is None or right is not None
            else:
                assert told >= right


def test_bands_find_nearly_all_near_pairs(tmp_path: Path) -> None:
    draw = random.Random(3)
    vocabulary = [f"word{number}" for number in range(500)]
    originals = [draw.choices(vocabulary, k=30) for _ in range(300)]
    changed = [[*words[:-2], "else"] for words in originals]  # 27 of 31 pairs are shared
    told = of_texts([" ".join(words) for words in originals + changed], tmp_path)
    assert told[:300] == [None] * 300
    assert sum(first == number for number, first in enumerate(told[300:])) >= 297


@settings(max_examples=30)
@given(TEXTS, st.data())
def test_shards_and_the_order_in_them_do_not_matter(texts: list[str], data: Any) -> None:
    rows = [(f"{number:09d}", text) for number, text in enumerate(texts)]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    shards = [rows[start:end] for start, end in itertools.pairwise([0, *cuts, len(rows)])]
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        assert found(whole, rows) == found(cut, *shards)


def test_passes_over_the_hashes_find_what_one_pass_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(1)
    few = ["red", "blue", "boat", "sea", "sand", "old"]
    texts = [" ".join(draw.choices(few, k=draw.randint(0, 6))) for _ in range(300)]
    texts += [f"{LONG} {draw.choice('abcd')}" for _ in range(50)]
    once = of_texts(texts, tmp_path / "once")
    monkeypatch.setattr(near_duplicates, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(near_duplicates, "SHINGLES_AT_ONCE", 50)
    assert of_texts(texts, tmp_path / "often") == once and sum(first is not None for first in once) > 60


def test_a_very_long_caption_is_compared_by_its_first_words(tmp_path: Path) -> None:
    long = [f"word{number}" for number in range(shingles.MOST_WORDS)]
    more = [f"more{number}" for number in range(5000)]
    texts = [" ".join([*long, "one"]), " ".join([*long, *more]), " ".join(long[::-1])]
    assert of_texts(texts, tmp_path) == [None, 0, None]


# --- in a folder of scores --------------------------------------------------------------------------------------------


def scored(work: Path, change: Any = None) -> tuple[joined.Inputs, Path]:
    """Pairs whose scores are finished, as far as anyone can tell from their sidecars."""
    pairsmaker.write_pairs(work, change=change)
    given, out = joined.open_inputs(work, ("web",)), work / "scores" / "clip"
    out.mkdir(parents=True)
    for unit in given.units:
        pl.DataFrame({"key": []}).write_parquet(ledger.part(out / f"{unit}.parquet"))
        ledger.commit(out, unit, [f"{unit}.parquet"], inputs=given.unit_digests(unit), config={}, counts={})
    return given, out


def same_caption(number: int, row: pairsmaker.Row) -> None:
    if number in (1, 2, 8):
        row["caption"] = "The same words"


def test_tables_lie_beside_the_scores_and_are_made_once(tmp_path: Path) -> None:
    given, out = scored(tmp_path, same_caption)
    assert near_duplicates.read(out, "00000") is None
    report = Report("score")
    near_duplicates.write(given, {}, ("web",), out, report)
    assert report.facts == {"near_duplicates_web": 2}
    table = near_duplicates.read(out, "00001")
    assert table is not None and table.columns == ["key", "web_near_duplicate_of"]
    assert dict(table.iter_rows())["000010002"] == "000000001" and table["web_near_duplicate_of"].null_count() == 4
    before = [path.stat().st_mtime_ns for path in sorted((out / near_duplicates.FOLDER).glob("*.parquet"))]
    near_duplicates.write(given, {}, ("web",), out, report)
    assert [path.stat().st_mtime_ns for path in sorted((out / near_duplicates.FOLDER).glob("*.parquet"))] == before
    assert not (out / near_duplicates.FOLDER / "_work").exists()


def test_images_that_are_left_out_are_neither_told_nor_the_first(tmp_path: Path) -> None:
    given, out = scored(tmp_path, same_caption)
    near_duplicates.write(given, {"00000": pl.Series(["000000001"])}, ("web",), out, Report("score"))
    first, second = near_duplicates.read(out, "00000"), near_duplicates.read(out, "00001")
    assert first is not None and second is not None
    assert "000000001" not in first["key"] and dict(second.iter_rows())["000010002"] == "000000002"


def test_they_wait_for_the_last_shard_and_are_refused_for_others(tmp_path: Path) -> None:
    given, out = scored(tmp_path)
    ledger.sidecar_path(out, "00001").rename(tmp_path / "aside")
    report = Report("score")
    near_duplicates.write(given, {}, ("web",), out, report)
    assert "1 are not yet" in report.notes[0] and near_duplicates.read(out, "00000") is None
    (tmp_path / "aside").rename(ledger.sidecar_path(out, "00001"))
    near_duplicates.write(given, {}, ("web",), out, report)
    ledger.part(out / "00000.parquet").write_bytes(b"")
    ledger.commit(out, "00000", ["00000.parquet"], inputs={"pairs": "others"}, config={}, counts={})
    with pytest.raises(UserError, match="--near-duplicates` again"):
        near_duplicates.read(out, "00000")
    near_duplicates.forget(out)
    assert near_duplicates.read(out, "00000") is None and not list((out / near_duplicates.FOLDER).glob("*.parquet"))
