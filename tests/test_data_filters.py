"""Tests of clips_data/filters.py, expressions.py, keep_top.py and the view of joined.py that they look at."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import pairsmaker
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips_data import draws, expressions, filters, joined, keep_top, ledger, near_duplicates, schema
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Report
from clips_data.expressions import FUNCTIONS
from clips_data.filters import Filters, Kept

SHARDS = 3
NAN, INF = math.nan, math.inf


def score_of(number: int) -> float | None:
    return None if number % 7 == 2 else number / 20


def write_scores(work: Path, name: str = "clip", fields: Callable[[int], dict[str, Any]] | None = None) -> None:
    folder = work / schema.SCORES / name
    folder.mkdir(parents=True, exist_ok=True)
    number = -1
    for unit in ledger.finished_units(work / schema.PAIRS):
        rows = []
        for pair in pl.read_parquet(work / schema.PAIRS / f"{unit}.parquet").iter_rows(named=True):
            number += 1
            if pair["status"] == schema.STATUS_SUCCESS:
                about = fields(number) if fields else {"web": score_of(number), "synthetic": 0.5}
                rows.append({"key": pair["key"], "sha256": pair["sha256"], **about})
        pl.DataFrame(rows, infer_schema_length=None).write_parquet(ledger.part(folder / f"{unit}.parquet"))
        ledger.commit(folder, unit, [f"{unit}.parquet"], inputs={}, config={}, counts={"ok": len(rows)})


def change(number: int, row: pairsmaker.Row) -> None:
    """Widths that grow, odd shards' lists with a column of their own, one caption of blanks."""
    row["width"] = 100 + number if row["status"] == schema.STATUS_SUCCESS else None
    if number // 6 % 2:
        row["likes"] = number
    if number == 4:
        row["caption"] = "  "


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    pairsmaker.write_pairs(work, num_shards=SHARDS, change=change)
    pairsmaker.write_captions(work, change=lambda number, row: pairsmaker.reject(row) if number == 5 else None)
    write_scores(work)
    write_scores(work, "labels", lambda number: {"nsfw": number / 100, "kind": "photo" if number % 2 else "drawing"})
    return work


COLUMNS = ("web", "synthetic")


def open_all(work: Path, columns: tuple[str, ...] = COLUMNS) -> joined.Inputs:
    return joined.open_inputs(work, columns, scores=("clip", "labels"))


def prepare(work: Path, **choices: Any) -> Filters:
    inputs = open_all(work)
    return Filters.prepare(ShardConfig(**choices), inputs, inputs.units)


def apply_all(ready: Filters) -> list[Kept]:
    again = pickle.loads(pickle.dumps(ready))  # as it goes to worker processes
    return [again.apply(unit, again.given.table(unit, images=False)) for unit in again.given.units]


def numbers(kept: list[Kept]) -> list[int]:
    """The row of each pair that stayed, counted through all shards."""
    return [int(key[:5]) * 6 + int(key[5:]) for some in kept for key in some.table["key"]]


def removed(kept: list[Kept]) -> dict[str, int]:
    total: dict[str, int] = {}
    for some in kept:
        for label, number in some.removed.items():
            total[label] = total.get(label, 0) + number
    return total


GOOD = [number for number in range(SHARDS * 6) if number % 6 != pairsmaker.FAILED_ROW]

# --- the joined table -------------------------------------------------------------------------------------------------


def test_the_view_has_the_rows_of_the_table_with_structs_for_what_belongs_together(work: Path) -> None:
    inputs = open_all(work)
    view, table = inputs.view("00000"), inputs.table("00000")
    assert view["key"].equals(table["key"]) and view["sha256"].equals(table["sha256"])
    assert view.columns == ["key", "sha256", "pairs", "web", "synthetic", "clip", "score", "labels"]
    rows = view.to_dicts()
    assert rows[0]["pairs"]["scene"] == "0/0" and rows[0]["pairs"]["width"] == 100
    assert rows[0]["web"] == {"caption": "photo 0 for sale", "num_chars": 16, "num_words": 4, "code": "ok"}
    assert rows[3]["web"] == {"caption": "", "num_chars": 0, "num_words": 0, "code": "empty"}
    synthetic = rows[0]["synthetic"]
    assert (synthetic["num_words"], synthetic["num_tokens"], synthetic["prompt_variant"]) == (16, 20, None)
    assert rows[4]["synthetic"]["caption"] == "" and rows[4]["synthetic"]["code"] == "refused"
    assert rows[1]["score"] == rows[1]["clip"] == {"web": 0.05, "synthetic": 0.5}
    assert rows[1]["labels"] == {"nsfw": 0.01, "kind": "photo"}


def test_a_view_of_some_names_reads_no_other_files(work: Path, tmp_path: Path) -> None:
    inputs = open_all(work)
    folders = {name: tmp_path / "gone" if "labels" in name else path for name, path in inputs.folders.items()}
    partial = joined.Inputs(inputs.pairs, inputs.units, folders)
    assert partial.view("00000", ["pairs", "score"]).columns == ["key", "sha256", "pairs", "score"]
    with pytest.raises(UserError, match="Cannot read"):
        partial.view("00000")


def test_further_scores_keep_their_name_in_the_table(work: Path) -> None:
    table = open_all(work).table("00000", images=False)
    assert [name for name in table.columns if name.startswith("score.")] == [
        "score.web", "score.synthetic", "score.labels.nsfw", "score.labels.kind",
    ]  # fmt: skip
    assert not any(name.startswith("place.") for name in table.columns)
    one = joined.open_inputs(work, ("web",), scores="labels").table("00000")
    assert {"score.nsfw", "place.offset"} <= set(one.columns)


def test_names_that_are_taken_are_refused_where_expressions_are_used(work: Path) -> None:
    inputs = open_all(work)
    folders = {**inputs.folders, "scores/web": inputs.folders["scores/clip"]}
    with pytest.raises(UserError, match="web would be both"):
        joined.Inputs(inputs.pairs, inputs.units, folders).view("00000")


def test_duplicates_are_in_neither(work: Path) -> None:
    inputs = open_all(work)
    gone = joined.Inputs(inputs.pairs, inputs.units, inputs.folders, {"00000": pl.Series(["000000001"])})
    assert gone.view("00000")["key"].equals(gone.table("00000")["key"])
    assert len(gone.view("00000")) == 4


def near_duplicates_of(work: Path, texts: dict[int, str]) -> joined.Inputs:
    """A work folder whose web captions are told apart, with what ``clips score --near-duplicates`` writes."""

    def caption(number: int, row: pairsmaker.Row) -> None:
        row["caption"] = texts.get(number, f"{'abcdefghijklmnopqr'[number] * 9} is number {number} of these")

    pairsmaker.write_pairs(work, change=caption)
    write_scores(work)
    plain = joined.open_inputs(work, ("web",))
    near_duplicates.write(plain, {}, ("web",), work / "scores" / "clip", Report("score"))
    return joined.open_inputs(work, ("web",), scores=("clip",))


def test_near_duplicates_are_fields_of_the_scores_and_count_among_the_inputs(tmp_path: Path) -> None:
    config = ShardConfig(columns=("web",), where=("score.web_near_duplicate_of is null",))
    inputs = near_duplicates_of(tmp_path / "a", {7: "one and the same", 8: "one and the same"})
    kept = apply_all(Filters.prepare(config, inputs, inputs.units))
    assert removed(kept)["where score.web_near_duplicate_of is null"] == 1
    assert inputs.view("00001")["clip"].struct.field("web_near_duplicate_of").to_list()[1:3] == [None, "000010001"]
    others = near_duplicates_of(tmp_path / "b", {7: "one and the same", 10: "one and the same"})
    assert filters.inputs(config, inputs) != filters.inputs(config, others)
    assert filters.inputs(ShardConfig(columns=("web",)), inputs) == {}


# --- conditions -------------------------------------------------------------------------------------------------------


def test_conditions_count_what_they_remove_one_after_the_other(work: Path) -> None:
    kept = apply_all(prepare(work, where=("pairs.width >= 104", "score.web < 0.7")))
    assert numbers(kept) == [n for n in GOOD if n >= 4 and (score := score_of(n)) is not None and score < 0.7]
    assert removed(kept) == {
        "where pairs.width >= 104": 3,
        "where pairs.width >= 104 is null": 0,
        "where score.web < 0.7": 2,
        "where score.web < 0.7 is null": 1,
    }
    assert list(kept[0].removed) == list(prepare(work, where=("pairs.width >= 104", "score.web < 0.7")).names)
    table = open_all(work).table("00001", images=False)
    assert kept[1].table.equals(table.filter(table["key"].is_in(kept[1].table["key"].to_list())))


def test_without_filters_all_stay_and_nothing_is_read(work: Path) -> None:
    ready = prepare(work)
    assert ready.names == ()
    table = open_all(work).table("00000", images=False)
    assert ready.apply("00000", table).table is table


def test_a_column_that_only_some_lists_have_is_null_in_the_others(work: Path) -> None:
    kept = apply_all(prepare(work, where=("pairs.likes > 7",)))
    assert numbers(kept) == [8, 10, 11]
    assert removed(kept) == {"where pairs.likes > 7": 2, "where pairs.likes > 7 is null": 10}
    assert numbers(apply_all(prepare(work, where=("pairs.likes is null",)))) == [n for n in GOOD if n // 6 != 1]


@pytest.mark.parametrize(
    ("condition", "left"),
    [
        ("synthetic.code = 'ok' and synthetic.num_words > 5", [n for n in GOOD if n != 5]),
        ("not regexp_like(web.caption, '^photo 1[0-9]')", [n for n in GOOD if n < 10]),
        ("score.labels.kind = 'photo'", None),
        ("labels.kind = 'photo' and labels.nsfw between 0.05 and 0.1", [5, 7]),
        ("case when clip.web is null then true else false end", [n for n in GOOD if score_of(n) is None]),
        ("coalesce(score.web, 1) >= 0.8", [2, 16, 17]),
        ("array_contains(synthetic.flags, 'url')", []),
        ("key in ('000000000', '000020005')", [0, 17]),
        ('pairs."width" < 101 as small', [0]),
        ("true", GOOD),
        ("try_cast(web.caption as int) is null", GOOD),
        ("pairs.caption = 'it''s (select avg(x) over now())'", []),
    ],
)
def test_conditions_see_pairs_captions_and_scores(work: Path, condition: str, left: list[int] | None) -> None:
    if left is None:
        with pytest.raises(UserError, match=r"score\.labels"):
            prepare(work, where=(condition,))
        return
    assert numbers(apply_all(prepare(work, where=(condition,)))) == left


BAD = {
    "pairs.widht > 3": r"names 'pairs.widht', which is not known. Did you mean 'pairs.width'\? Known are: pairs",
    "width > 3": "names 'width', which is not known. Did you mean 'pairs.width'",
    "scores.web > 0.3": "names 'scores.web', which is not known. Did you mean 'score.web'",
    "PAIRS.width > 3": "Did you mean 'pairs.width'",
    "pairs.likes > 'a'": "cannot be worked out: cannot compare string",
    "pairs.width": "is Int64, not true or false",
    "null": "is Null, not true or false",
    "'yes'": "is String, not true or false",
    "pairs": "not true or false",
    "pairs.width >": "cannot be worked out",
    "pairs.width > 3; drop table pairs": "cannot be worked out",
    "*": "cannot be worked out",
    "": "is empty",
    " \n": "is empty",
    "avg(score.web) > 0.3": r"calls avg\(\), which is no function of one sample",
    "score.web > median(score.web)": r"calls median\(\)",
    '"avg"(score.web) > 0.3': r"calls avg\(\)",
    "count(*) > 3": r"calls count\(\)",
    "sum (score.web) > 3": r"calls sum\(\)",
    "first(key) = key": r"calls first\(\)",
    "unnest(synthetic.flags) = 'url'": r"calls unnest\(\)",
    "columns('.*') is null": r"calls columns\(\)",
    "row_number() over (order by key) < 9": "row_number",
    "score.web over (partition by key) > 1": "holds a window",
    "lag(score.web) over () > 0": "lag",
    "pairs.width in (select 1)": "holds a subquery",
    "exists (select 1)": "holds a subquery",
    "(select * from read_csv('/etc/passwd')) is null": "holds a subquery",
    "read_csv('/etc/passwd') is null": r"calls read_csv\(\)",
    "lenght(web.caption) > 3": r"calls lenght\(\).* Did you mean length\(\)",
    "now() > '2020-01-01'": r"calls now\(\)",
    "current_date > '2020-01-01'": "asks the clock",
    "random() < 0.5": r"calls random\(\)",
    "true -- and more": "holds '--'",
    "/* */ true": "holds '/\\*'",
    "key = $$a$$": r"holds '\$'",
    "cast(web.caption as int) > 3": "cannot be worked out: conversion .* try_cast gives null",
    "regexp_like(key, '[')": "cannot be worked out: regex",
    "array_length(key) > 1": "cannot be worked out",
    "x" * 10_000: "is not known. .*Known are: key",
    "1" + " + 1" * 2_499 + "  ": "has 2499 operators",
    "1" + " + 1" * 250: "is Int32, not true or false",
    "true" + " and true" * 1_200: "has 10804 characters",
    "(" * 4_000 + "true" + ")" * 4_000: "cannot be worked out",
}


@pytest.mark.parametrize("condition", BAD, ids=[text[:40] for text in BAD])
def test_an_expression_that_makes_no_sense_is_one_sentence(work: Path, condition: str) -> None:
    with pytest.raises(UserError, match=BAD[condition]) as caught:
        prepare(work, where=(condition,))
    assert "--where" in str(caught.value) and len(str(caught.value)) < 1000


def test_what_polars_panics_at_is_a_sentence_too(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "_check_words", lambda text, option: None)
    monkeypatch.setattr(expressions, "_check_names", lambda *about: None)
    with pytest.raises(UserError, match="cannot be worked out"):
        expressions.compiled("key in (select 1)", pl.DataFrame({"key": ["a"]}), option="--where", kind="condition")


def test_a_value_that_cannot_be_cast_ends_the_shard_it_is_in(work: Path) -> None:
    number = "nullif(replace(trim(substr(web.caption, 7, 2)), '7', 'seven'), '')"
    ready = prepare(work, where=(f"cast({number} as int) >= 0",))
    assert len(ready.apply("00000", ready.given.table("00000")).table) == 4
    with pytest.raises(UserError, match="conversion"):
        ready.apply("00001", ready.given.table("00001"))
    kept = apply_all(prepare(work, where=(f"try_cast({number} as int) >= 0",)))
    assert numbers(kept) == [n for n in GOOD if n not in (4, 7, 17)]


EXAMPLES = {
    "atan2(number, other)": {"atan2", "atan2d", "pow", "power", "mod", "div", "greatest", "least", "ifnull", "nullif"},
    "coalesce(number, other)": {"coalesce"},
    "abs(number)": {
        "abs", "acos", "acosd", "asin", "asind", "atan", "atand", "cbrt", "ceil", "ceiling", "cos", "cosd", "cot",
        "cotd", "degrees", "exp", "floor", "ln", "log10", "log1p", "log2", "radians", "round", "sign", "sin", "sind",
        "sqrt", "tan", "tand", "trunc", "truncate",
    },
    "log(number, 2)": {"log"},
    "number + pi()": {"pi"},
    "bit_and(whole, 3)": {"bit_and", "bit_or", "bit_xor"},
    "bit_not(whole)": {"bit_not", "bit_count"},
    "upper(text)": {
        "bit_length", "char_length", "character_length", "initcap", "length", "lower", "ltrim", "normalize",
        "octet_length", "reverse", "rtrim", "trim", "upper",
    },
    "concat(text, 'a')": {"concat", "ends_with", "regexp_like", "starts_with", "string_to_array", "strpos"},
    "concat_ws('-', text, text)": {"concat_ws"},
    "left(text, 2)": {"left", "right", "lpad", "rpad", "substr"},
    "substring(text from 1 for 1)": {"substring"},
    "position('a' in text)": {"position"},
    "replace(text, 'a', 'b')": {"replace", "regexp_replace"},
    "split_part(text, 'a', 1)": {"split_part"},
    "if(number > 0, 1, 2)": {"if"},
    "array_contains(list, 1)": {"array_contains", "array_get"},
    "array_length(list)": {
        "array_length", "array_lower", "array_mean", "array_reverse", "array_sum", "array_upper",
    },
    "array_to_string(list, ',')": {"array_to_string"},
    "cast(number as int)": {"cast", "try_cast"},
    "date_part('year', day)": {"date_part"},
    "extract(year from day)": {"extract"},
    "strftime(day, '%Y')": {"strftime"},
    "strptime('2020', '%Y')": {"strptime"},
    "date('2020-01-01')": {"date"},
}  # fmt: skip


def test_every_function_looks_at_one_row() -> None:
    assert set().union(*EXAMPLES.values()) == FUNCTIONS
    rows = {
        "number": [0.5, -0.2, None, 3.0],
        "other": [2.0, 1.0, 1.0, None],
        "whole": [1, 2, 3, None],
        "text": ["abca", "", None, "Ä b"],
        "list": [[1, 2], [], None, [5]],
    }
    table = pl.DataFrame(rows).with_columns(pl.lit("2020-02-03").str.to_date().alias("day"))
    for example, functions in EXAMPLES.items():
        name, bracket, rest = example.partition("(")
        for function in functions:
            text = f"{name.replace(name.split()[-1], function)}{bracket}{rest}"
            found = table.select("text", pl.sql_expr(text).alias("value"))["value"]
            alone = [table[[n]].select("text", pl.sql_expr(text).alias("value"))["value"][0] for n in range(len(table))]
            assert pl.Series(alone, dtype=found.dtype).equals(found, null_equal=True), text


# --- the highest share ------------------------------------------------------------------------------------------------


def test_keep_top_counts_what_is_left_by_the_conditions(work: Path) -> None:
    kept = apply_all(prepare(work, where=("key < '00002'",), keep_top=0.35))
    left = sorted((score, n) for n in GOOD if n < 12 and (score := score_of(n)) is not None)
    assert numbers(kept) == sorted(n for _, n in left[-4:])  # a share of all ten, of which two have no score
    assert removed(kept) == {
        "where key < '00002'": 5, "where key < '00002' is null": 0,
        "keep_top 0.35 by score.web": 5, "keep_top 0.35 by score.web is null": 1,
    }  # fmt: skip


def test_keep_top_goes_by_any_number(work: Path) -> None:
    assert numbers(apply_all(prepare(work, keep_top=0.2, by="-pairs.width"))) == [0, 1, 2]
    assert numbers(apply_all(prepare(work, keep_top=0.14, by="pairs.likes"))) == [8, 10, 11]
    for by, message in [
        ("web.caption", "is String, not a number"),
        ("max(score.web)", "max"),
        ("score.wep", "'score.web'"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            prepare(work, keep_top=0.5, by=by)
        assert "--by" in str(caught.value)


def brute_force(rows: list[tuple[str, float | None]], share: float, seed: int) -> set[str]:
    valid = [(key, value) for key, value in rows if value is not None and not math.isnan(value)]
    ordered = sorted(valid, key=lambda row: (-row[1], draws.uniform(seed, "keep_top", 0, row[0]), row[0]))
    return {key for key, _ in ordered[: math.ceil(Fraction(repr(share)) * len(rows))]}


def by_value(name: str = "value") -> expressions.Expression:
    view = pl.DataFrame({"key": ["0"], name: [1.0]})
    return expressions.compiled(name, view, option="--by", kind="number")


VALUES = st.one_of(
    st.none(), st.sampled_from([0.0, -0.0, 0.25, 0.3, -1.5, NAN, INF, -INF]), st.floats(allow_subnormal=True)
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(VALUES, max_size=40), st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0]), st.integers(0, 2), st.randoms())
def test_the_highest_share_is_exact_whatever_the_order_and_sharding(
    monkeypatch: pytest.MonkeyPatch, values: list[float | None], share: float, seed: int, random: Random
) -> None:
    monkeypatch.setattr(keep_top, "MAX_COLLECTED", 3)
    monkeypatch.setattr(keep_top, "DIGITS_BITS", (8,) * 8)
    rows = [(f"{number:09d}", value) for number, value in enumerate(values)]
    random.shuffle(rows)
    kinds = {"key": pl.String, "value": pl.Float64}
    cuts = sorted(random.randrange(len(rows) + 1) for _ in range(3))
    ends = [0, *cuts, len(rows)]
    views = [pl.DataFrame(rows[a:b], schema=kinds, orient="row") for a, b in itertools.pairwise(ends)]

    def run(look: Callable[[pl.DataFrame], Any]) -> Iterator[Any]:
        return (look(view) for view in random.sample(views, len(views)))

    found = keep_top.find(by_value(), share, seed, run)
    stayed = {key for view in views for key in view.filter(found.judge(view) == 0)["key"]}
    assert stayed == brute_force(rows, share, seed)


def stay(values: list[float], share: float) -> list[str]:
    view = pl.DataFrame({"key": [f"{n}" for n in range(len(values))], "value": values})
    found = keep_top.find(by_value(), share, 0, lambda look: [look(view)])
    return view.filter(found.judge(view) == 0)["key"].to_list()


def test_a_share_is_the_decimal_that_was_written() -> None:
    assert 0.07 * 100 > 7
    assert stay([float(n) for n in range(100)], 0.07) == [str(n) for n in range(93, 100)]


def test_zeros_of_either_sign_are_equal() -> None:
    lots = [f"{n}" for n in range(40)]
    assert set(stay([0.0, -0.0] * 20, 0.5)) == brute_force([(key, 0.0) for key in lots], 0.5, 0)


def test_ties_are_drawn_and_no_more_than_the_share_stays() -> None:
    view = pl.DataFrame({"key": [f"{n:09d}" for n in range(1000)], "value": [0.5] * 1000})
    found = keep_top.find(by_value(), 0.3, 7, lambda look: [look(view[:300]), look(view[300:])])
    stayed = view.filter(found.judge(view) == 0)["key"].to_list()
    assert len(stayed) == 300
    assert set(stayed) == brute_force([(key, 0.5) for key in view["key"]], 0.3, 7)


def test_equal_draws_are_told_apart_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "uniform", lambda *about: 0.25)
    view = pl.DataFrame({"key": ["3", "1", "2"], "value": [1.0] * 3})
    found = keep_top.find(by_value(), 0.5, 0, lambda look: [look(view)])
    assert view.filter(found.judge(view) == 0)["key"].to_list() == ["1", "2"]


# --- all together -----------------------------------------------------------------------------------------------------


def test_processes_change_nothing(work: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("photo 1\nsale\n1\n")
    choices = ShardConfig(where=("key > '000000000'",), balance=str(tmp_path / "words.txt"), balance_cap=3)
    inputs = open_all(work)
    here = Filters.prepare(choices, inputs, inputs.units)
    there = Filters.prepare(choices, inputs, inputs.units, num_processes=2)
    found = [[some.table["key"].to_list() for some in apply_all(ready)] for ready in (here, there)]
    assert found[0] == found[1] and 0 < len(found[0][0]) < 5


def test_balance_comes_last_and_counts_captions_without_a_concept_apart(work: Path, tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("1\nphoto\n")
    kept = apply_all(prepare(work, where=("pairs.width < 112",), keep_top=0.8, balance=str(path), balance_cap=1))
    label = "balance words.txt (cap 1)"
    counts = removed(kept)
    assert list(counts)[-2:] == [label, f"{label}: no concept"]
    stayed = numbers(kept)
    assert 1 in stayed and counts[label] == 8 - counts[f"{label}: no concept"] - len(stayed)
    with pytest.raises(UserError, match=r"--balance-column wep is none of --columns web,synthetic. Did you mean 'web'"):
        prepare(work, balance=str(path), balance_column="wep")


def test_examples_show_what_a_filter_looked_at(work: Path) -> None:
    ready = prepare(work, where=("pairs.width >= 103", "score.web > 0.2"), keep_top=0.5, explain=2)
    kept = apply_all(ready)
    examples = kept[0].examples["where pairs.width >= 103"]
    keys = ["000000000", "000000001", "000000002"]
    drawn = sorted(keys, key=lambda key: draws.uniform(0, "explain", 0, key))
    assert [example["key"] for example in examples] == drawn[:2]
    for example in examples:
        assert example["pairs.width"] == 100 + int(example["key"])
        assert example["captions"]["web"] == f"photo {int(example['key'])} for sale"
        assert "secret" not in example["url"]
    assert json.dumps(kept[1].examples)
    assert kept[2].examples["where score.web > 0.2 is null"][0]["score.web"] is None
    assert "score.web" in kept[1].examples["keep_top 0.5 by score.web"][0]
    assert not apply_all(prepare(work, where=("pairs.width >= 103",)))[0].examples


def test_examples_hold_no_secrets_and_need_no_fields(work: Path) -> None:
    for condition in ("pairs.url = ''", "pairs is null", "false"):
        (examples,) = apply_all(prepare(work, where=(condition,), explain=1))[0].examples.values()
        assert examples[0]["captions"] and "secret" not in json.dumps(examples)
