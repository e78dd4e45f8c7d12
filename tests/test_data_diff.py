"""Two data sets, or two caption columns, side by side: every row and text is counted once, wherever it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.main import main
from clips_data import diff as room
from clips_data import ledger, shard
from clips_data.config import ShardConfig
from clips_data.diff import Compared, diff, word_diff
from clips_data.diff_sides import Side
from clips_data.errors import UserError
from clips_data.executor import Job

SAME = {"same": 10, "same_image_other_key": 0, "same_key_other_image": 0, "only_a": 0, "only_b": 0}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return pairsmaker.write_work(tmp_path / "work")


def counts(found: dict[str, Any]) -> dict[str, int]:
    return {name: value for name, value in found["rows"].items() if not name.startswith("first_")}


def texts(found: dict[str, Any], column: str = "caption") -> dict[str, int]:
    names = ("equal", "different", "only_a", "only_b", "neither")
    return {name: found["texts"][column][name] for name in names if found["texts"][column][name]}


# --- caption columns --------------------------------------------------------------------------------------------------


def spoil(number: int, row: pairsmaker.Row) -> None:
    if number % 4 == 0:
        row["caption"] = row["caption"].replace("box", "small crate")
    if number == 1:
        pairsmaker.reject(row)
    row["flags"] = ["hit_token_cap"] if number == 2 else []


def test_a_column_is_like_itself(work: Path) -> None:
    column = work / "captions" / "synthetic"
    found = diff(column, column)
    assert json.loads(json.dumps(found)) == found
    assert not found["differ"] and counts(found) == SAME and texts(found) == {"equal": 10}
    assert all(a == b for a, b in [*found["figures"].values(), *found["settings"].values()])


def test_columns_differ_in_texts_codes_flags_and_settings(work: Path) -> None:
    pairsmaker.write_captions(work, "other", change=spoil, seed=7)
    found = diff(work / "captions" / "synthetic", work / "captions" / "other")
    assert found["differ"] and counts(found) == SAME
    assert texts(found) == {"equal": 6, "different": 3, "only_a": 1}
    assert found["texts"]["caption"]["unequal_share"] == 0.4
    first = found["texts"]["caption"]["first"]
    assert [one["key"] for one in first] == ["000000000", "000000001", "000000004", "000010002"]
    assert first[0]["words"][:4] == [["=", "A"], ["-", "box"], ["+", "small crate"], ["=", first[0]["words"][3][1]]]
    assert found["figures"]["failures.refused"] == [0, 1] and found["figures"]["flags.hit_token_cap"] == [0, 1]
    assert found["figures"]["succeeded"] == [10, 9]
    assert found["settings"]["seed"] == ["0", "7"] and found["settings"]["model"] == ["demo", "demo"]


def test_only_the_first_texts_by_key_are_shown(work: Path) -> None:
    pairsmaker.write_captions(work, "other", change=lambda number, row: row.update(caption="quite another"))
    found = diff(work / "captions" / "synthetic", work / "captions" / "other", limit=3)
    shown = [one["key"] for one in found["texts"]["caption"]["first"]]
    assert shown == ["000000000", "000000001", "000000002"] and texts(found) == {"different": 10}
    assert (
        diff(work / "captions" / "synthetic", work / "captions" / "other", limit=0)["texts"]["caption"]["first"] == []
    )


@given(a=st.text(alphabet="ab \n", max_size=40), b=st.text(alphabet="abc ", max_size=40))
def test_a_word_diff_holds_both_texts(a: str, b: str) -> None:
    runs = word_diff(a, b)
    for signs, text in (("=-", a), ("=+", b)):
        assert " ".join(words for sign, words in runs if sign in signs).split() == text.split()
    assert all(words for _, words in runs)


# --- data sets --------------------------------------------------------------------------------------------------------


def test_work_folders_are_compared_by_all_columns_that_both_have(work: Path, tmp_path: Path) -> None:
    other = pairsmaker.write_work(tmp_path / "other", change=lambda number, row: row.update(caption="web text"))
    pairsmaker.write_captions(other, "further")
    found = diff(work, other)
    assert counts(found) == SAME and found["columns_only_b"] == ["further"] and found["columns_only_a"] == []
    assert texts(found, "web") == {"different": 10} and texts(found, "synthetic") == {"equal": 10}


def test_images_under_other_keys_are_found_and_others_are_on_one_side_only(work: Path, tmp_path: Path) -> None:
    def later(number: int, row: pairsmaker.Row) -> None:
        row["image"] = pairsmaker.image_bytes(number + 1)
        row["caption"] = pairsmaker.web_caption(number + 1)

    other = tmp_path / "other"
    pairsmaker.write_pairs(other, change=later)
    pairsmaker.write_captions(other)
    found = diff(work, other)
    # Images 0 to 11 but for the failed 3 and 9 on one side; 1 to 12 but for 4 and 10 on the other.
    assert counts(found) == {
        "same": 0, "same_key_other_image": 10, "same_image_other_key": 7, "only_a": 3, "only_b": 3
    }  # fmt: skip
    assert found["rows"]["first_only_a"] == ["000000000", "000000004", "000010004"]
    assert texts(found, "web") == {"equal": 7}
    assert found["texts"]["synthetic"]["different"] == 7  # these go by the key


def test_a_column_that_is_not_finished_is_left_out_and_named(work: Path) -> None:
    pairsmaker.write_captions(work, "half")
    ledger.forget_unit(work / "captions" / "half", "00001")
    found = diff(work, work)
    assert list(found["texts"]) == ["web", "synthetic"] and found["a"]["unfinished_columns"] == ["half"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_shuffled_shards_are_matched_whatever_their_order(
    tmp_path: Path, in_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_memory:
        monkeypatch.setattr(room, "_WAITING_BYTES", 1)
        monkeypatch.setattr(room, "_ROWS_A_BUCKET", 4)

    def change(number: int, row: pairsmaker.Row) -> None:
        row["caption"] = "something else" if number % 2 else row["caption"]

    a = pairsmaker.write_work(tmp_path / "a", num_shards=2)
    b = pairsmaker.write_work(tmp_path / "b", num_shards=3, change=change)
    shard.run(ShardConfig(shard_rows=4, web_ratio=1), Job(work=a, quiet=True))
    shard.run(ShardConfig(shard_rows=3, web_ratio=1, seed=5, heldout_ratio=0.3), Job(work=b, quiet=True))
    found = diff(a / "shards", b / "shards", scratch=tmp_path)
    assert counts(found) == {**SAME, "only_b": 5} and found["rows"]["first_only_b"][0] == "000020000"
    assert texts(found, "web") == texts(found, "txt") == {"equal": 6, "different": 4}
    assert texts(found, "synthetic") == {"equal": 10}
    assert [set(one["key"] for one in found["texts"]["web"]["first"])] == [
        {"000000001", "000000005", "000010001", "000010005"}
    ]
    two = diff(a / "shards", b / "shards", scratch=tmp_path, limit=2)["texts"]["web"]["first"]
    assert [one["key"] for one in two] == ["000000001", "000000005"]
    assert found["settings"]["shards.config.seed"] == ["0", "5"]
    assert counts(diff(b, b / "shards")) == {**SAME, "same": 15}
    assert not list(tmp_path.glob("clips-diff-*"))


ROWS = st.dictionaries(st.integers(0, 30), st.tuples(st.integers(0, 8), st.sampled_from(["", "a", "b c"])), max_size=20)


def side(rows: dict[int, tuple[int, str]], by_unit: bool) -> Side:
    """A side without files, its rows in units of ten keys."""

    class InMemory(Side):
        def frame(self, unit: str) -> pl.DataFrame:
            of_unit = [(f"{key:03d}", str(sha), text) for key, (sha, text) in rows.items() if f"{key:03d}"[:2] == unit]
            return pl.DataFrame(
                of_unit, schema=dict.fromkeys(("key", "sha256", "text.caption"), pl.String), orient="row"
            )

    units = tuple(sorted({f"{key:03d}"[:2] for key in rows}))
    return InMemory(Path("nowhere"), "captions", ("caption",), units, len(rows), by_unit)


def naive(a: dict[int, tuple[int, str]], b: dict[int, tuple[int, str]]) -> tuple[Counter[str], Counter[str]]:
    """The same by plain loops."""
    rows, said = Counter[str](), Counter[str]()

    def compare(one: str, other: str) -> None:
        said["equal" if one == other else "only_b" if not one else "only_a" if not other else "different"] += 1

    same = {key for key in a.keys() & b.keys() if a[key][0] == b[key][0]}
    rows["same"], rows["same_key_other_image"] = len(same), len(a.keys() & b.keys()) - len(same)
    for key in same:
        compare(a[key][1], b[key][1])
    for sha in range(9):
        mine, theirs = (sorted(k for k in s if k not in same and s[k][0] == sha) for s in (a, b))
        for key_a, key_b in zip(mine, theirs, strict=False):
            compare(a[key_a][1], b[key_b][1])
        both = min(len(mine), len(theirs))
        rows.update(same_image_other_key=both, only_a=len(mine) - both, only_b=len(theirs) - both)
    return rows, said


@given(a=ROWS, b=ROWS, by_unit=st.booleans())
def test_counts_are_those_of_plain_loops(
    a: dict[int, tuple[int, str]],
    b: dict[int, tuple[int, str]],
    by_unit: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    compared = Compared(["caption"], limit=2)
    compared.run(side(a, by_unit), side(b, by_unit), tmp_path_factory.mktemp("scratch"))
    rows, said = naive(a, b)
    assert Counter({name: compared.rows()[name] for name in SAME}) == rows
    found = compared.texts("caption")
    assert found["equal"] + found["neither"] == said["equal"]
    assert {name: found[name] for name in ("different", "only_a", "only_b")} == {
        name: said[name] for name in ("different", "only_a", "only_b")
    }
    assert compared.differ() == (a != b)


# --- refusals and the command -----------------------------------------------------------------------------------------


def test_a_column_and_a_data_set_are_not_compared(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a caption column and"):
        diff(work / "captions" / "synthetic", work)
    with pytest.raises(UserError, match="holds nothing that"):
        diff(work, tmp_path / "nothing")


def test_captions_about_other_images_are_refused_with_their_file(work: Path) -> None:
    table = work / "captions" / "synthetic" / "00001.parquet"
    changed = pl.read_parquet(table).with_columns(sha256=pl.lit("0" * 64))
    changed.write_parquet(ledger.part(table))
    ledger.commit(table.parent, "00001", [table.name], inputs={}, config={}, counts={"ok": 5})
    with pytest.raises(UserError, match=r"captions/synthetic/00001\.parquet are about other images"):
        diff(work, work)


@pytest.fixture
def two(work: Path) -> Iterator[list[str]]:
    pairsmaker.write_captions(work, "other", change=spoil)
    yield [str(work / "captions" / name) for name in ("synthetic", "other")]


def test_the_exit_code_tells_a_difference_only_where_it_is_asked_for(
    two: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", *two]) == 0
    said = capsys.readouterr().out
    assert "6 equal, 3 different, 1 only in A" in said and "A [-box-] {+small crate+} of colour 0" in said
    assert main(["diff", *two, "--exit-code"]) == 1
    assert main(["diff", two[0], two[0], "--exit-code"]) == 0


def test_json_is_one_object(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", *two, "--json", "--limit", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differ"] is True and len(found["texts"]["caption"]["first"]) == 1


def test_what_a_caption_says_cannot_steer_the_terminal(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairsmaker.write_captions(work, "odd", change=lambda number, row: row.update(caption="red \x1b[31m\u202etext"))
    assert main(["diff", *(str(work / "captions" / name) for name in ("synthetic", "odd"))]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said
