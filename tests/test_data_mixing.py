"""Mixing rules: what they draw, against plain statements of it, and what is said of rules that make no sense."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips_data import draws, mixing
from clips_data.errors import UserError
from clips_data.mixing import Choice, Mix

COLUMNS = ("web", "synthetic", "long", "tags")
FULL = {column: f"a text of {column}" for column in COLUMNS}
KEYS = [f"{number:09d}" for number in range(4000)]
FIELDS = ("web", "synthetic", "aesthetic.value")

PlainCondition = tuple[str, str, float]
"""Subject, operator, number."""
PlainRule = tuple[list[PlainCondition], dict[str, int]]


def conditions() -> st.SearchStrategy[PlainCondition]:
    operators = st.sampled_from(("<", "<=", ">", ">="))
    epochs = st.tuples(st.just("epoch"), operators, st.integers(0, 5))
    hundredths = st.integers(-20, 60).map(lambda number: number / 100)
    return epochs | st.tuples(st.sampled_from([f"score.{field}" for field in FIELDS]), operators, hundredths)


def weights() -> st.SearchStrategy[dict[str, int]]:
    return st.dictionaries(st.sampled_from(COLUMNS), st.integers(0, 9), min_size=1).filter(lambda w: any(w.values()))


@st.composite
def rules(draw: st.DrawFn) -> list[PlainRule]:
    later = draw(st.lists(st.tuples(st.lists(conditions(), min_size=1, max_size=3), weights()), max_size=4))
    return [([], draw(weights())), *later]


def written(rule: PlainRule, space: str = "") -> str:
    asked = f"{space or ' '}and ".join(f"{space}{subject}{space}{sign}{space}{x}" for subject, sign, x in rule[0])
    given = ",".join(f"{space}{column}{space}={space}{weight}" for column, weight in rule[1].items())
    return (f"{asked}{space}:{space}" if rule[0] else "") + given + space


def mix_of(plain: list[PlainRule], space: str = "") -> Mix:
    return Mix.parse([written(rule, space) for rule in plain], columns=COLUMNS)


def choose(mix: Mix, key: str = "0", **change: Any) -> Choice:
    return mix.choose(**{"seed": 0, "epoch": 0, "key": key, "texts": FULL, "scores": {}} | change)


def plainly(plain: list[PlainRule], u: float, epoch: int, texts: dict[str, str], scores: dict[str, float]) -> str:
    """What the rules say, word by word."""
    counting: dict[str, int] = {}
    for asked, shares in plain:
        if all(holds(condition, epoch, scores) for condition in asked):
            counting = shares
    running, wanted = 0.0, ""
    for column in COLUMNS:
        running += counting.get(column, 0) / sum(counting.values())
        if u < running and not wanted:
            wanted = column
    order = [wanted] + [c for c in COLUMNS if counting.get(c)] + [c for c in COLUMNS if not counting.get(c)]
    filled = [column for column in order if texts[column]]
    if not filled:
        return "no_caption"
    return wanted if filled[0] == wanted else f"{filled[0]}_for_missing_{wanted}"


def holds(condition: PlainCondition, epoch: int, scores: dict[str, float]) -> bool:
    subject, sign, number = condition
    value = epoch if subject == "epoch" else scores.get(subject.removeprefix("score."))
    if value is None:
        return False
    return {"<": value < number, "<=": value <= number, ">": value > number, ">=": value >= number}[sign]


# --- what is drawn ----------------------------------------------------------------------------------------------------


@given(
    rules(),
    st.integers(0, 6),
    st.integers(0, 2**40),
    st.sets(st.sampled_from(COLUMNS)),
    st.dictionaries(st.sampled_from(FIELDS), st.integers(-20, 60).map(lambda number: number / 100)),
)
@settings(max_examples=100)
def test_a_choice_is_what_a_plain_reading_of_the_rules_draws(
    plain: list[PlainRule], epoch: int, seed: int, empty: set[str], scores: dict[str, float]
) -> None:
    mix = mix_of(plain)
    texts = FULL | dict.fromkeys(empty, "")
    for key in KEYS[:8]:
        choice = choose(mix, key, seed=seed, epoch=epoch, texts=texts, scores=scores)
        drawn = draws.uniform(seed, "mix", epoch, key)
        assert choice.outcome == plainly(plain, drawn, epoch, texts, scores)
        assert choice.draw == drawn
        assert choice.column == (None if len(empty) == len(COLUMNS) else choice.outcome.partition("_for_")[0])


@given(weights(), st.integers(0, 2**32))
@settings(max_examples=25)
def test_the_realised_ratio_converges_to_the_weights(shares: dict[str, int], seed: int) -> None:
    mix = mix_of([([], shares)])
    counts = Counter(choose(mix, key, seed=seed).outcome for key in KEYS)
    found = mixing.realised(counts)
    for column in COLUMNS:
        share = shares.get(column, 0) / sum(shares.values())
        five_sigma = 5 * (share * (1 - share) / len(KEYS)) ** 0.5
        assert abs(found.get(column, 0) - share) <= five_sigma, column


@given(st.floats(0, 1), st.integers(0, 2**40), st.text(), st.booleans(), st.booleans())
def test_a_web_ratio_draws_what_shards_without_rules_were_made_with(
    ratio: float, seed: int, key: str, web: bool, synthetic: bool
) -> None:
    columns = COLUMNS[:2]
    texts = {"web": "a" * web, "synthetic": "b" * synthetic}
    choice = choose(Mix.of(ratio, columns), key, seed=seed, texts=texts)
    wanted = "web" if draws.uniform(seed, "mix", 0, key) < ratio else "synthetic"
    assert choice.wanted == wanted
    assert choice.column == (wanted if texts[wanted] else next((c for c in columns if texts[c]), None))


@pytest.mark.parametrize("rule", ["web=8,synthetic=2", "synthetic=0.2, web=.8", "web=80e-2,synthetic=20e-2,long=0"])
def test_equal_shares_draw_equally_however_they_are_written(rule: str) -> None:
    columns = COLUMNS[:3]
    mix, plain = Mix.parse([rule], columns=columns), Mix.of(0.8, columns)
    assert [choose(mix, key) for key in KEYS[:500]] == [choose(plain, key) for key in KEYS[:500]]
    assert mix.rules[0].shares == (0.8, 0.2, 0.0)


def test_the_last_rule_whose_conditions_all_hold_counts() -> None:
    mix = Mix.parse(
        ["web=1", "epoch>=10: synthetic=1", "score.web<0.25 and epoch<20: long=1", "score.tags.n>=3: tags=1"],
        columns=COLUMNS,
    )
    cases: list[tuple[int, dict[str, Any], str]] = [
        (0, {}, "web"),
        (9, {"web": 0.3}, "web"),
        (10, {"web": 0.25}, "synthetic"),
        (10, {"web": 0.2}, "long"),
        (20, {"web": 0.2}, "synthetic"),
        (20, {"web": 0.2, "tags.n": 3}, "tags"),
        (20, {"web": None, "tags.n": float("nan")}, "synthetic"),
        (0, {"tags.n": True, "web": True}, "web"),
    ]
    for epoch, scores, column in cases:
        assert choose(mix, epoch=epoch, scores=scores).column == column, (epoch, scores)


def test_another_epoch_or_seed_draws_anew() -> None:
    mix = Mix.of(0.5, COLUMNS)
    first = [choose(mix, key).column for key in KEYS[:200]]
    assert first == [choose(mix, key).column for key in KEYS[:200]]
    assert first != [choose(mix, key, epoch=1).column for key in KEYS[:200]]
    assert first != [choose(mix, key, seed=1).column for key in KEYS[:200]]


def test_scores_are_compared_as_the_json_members_hold_them() -> None:
    mix = Mix.parse(["web=1", "score.web<0.25: synthetic=1"], columns=COLUMNS)
    for score in (0.2499996, 0.25, 0.2499994, 0.1 + 0.15):
        in_memory, from_json = ({"web": s} for s in (score, json.loads(json.dumps(round(score, 6)))))
        assert choose(mix, scores=in_memory) == choose(mix, scores=from_json)
    assert choose(mix, scores={"web": 0.2499996}).column == "web"
    assert choose(mix, scores={"web": 0.2499994}).column == "synthetic"


def test_a_score_that_is_no_number_cannot_be_compared() -> None:
    mix = Mix.parse(["web=1", "score.label<0.25: synthetic=1"], columns=COLUMNS)
    with pytest.raises(UserError, match=r"score\.label with 0\.25.*'cat'"):
        choose(mix, scores={"label": "cat"})


def test_an_empty_text_gives_way_to_columns_of_the_rule_before_others() -> None:
    mix = Mix.parse(["long=1,tags=1"], columns=COLUMNS)
    outcomes = {choose(mix, key, texts=FULL | {"long": ""}).outcome for key in KEYS[:50]}
    assert outcomes == {"tags", "tags_for_missing_long"}
    outcomes = {choose(mix, key, texts=FULL | {"long": "", "tags": ""}).outcome for key in KEYS[:50]}
    assert outcomes == {"web_for_missing_long", "web_for_missing_tags"}
    nothing = choose(mix, texts=dict.fromkeys(COLUMNS, ""))
    assert (nothing.column, nothing.outcome) == (None, "no_caption")


def test_counts_are_told_with_shares_of_the_texts_and_stand_ins() -> None:
    counts = {"synthetic": 20, "web": 70, "web_for_missing_synthetic": 10, "no_caption": 5}
    assert mixing.realised(counts) == {"synthetic": 0.2, "web": 0.8}
    told = mixing.described(counts)
    assert told == "web 80.00%, synthetic 20.00% of 100 texts; web stood in for an empty synthetic 10 times"
    assert mixing.realised({"no_caption": 3}) == {}


# --- what is written and read -----------------------------------------------------------------------------------------


@given(rules(), st.sampled_from(("", " ", "\t", " \n ")))
def test_rules_survive_json_pickling_and_white_space(plain: list[PlainRule], space: str) -> None:
    mix = mix_of(plain, space)
    assert mix == mix_of(plain)
    assert Mix.from_json(json.loads(json.dumps(mix.to_json())), ()) == mix
    assert pickle.loads(pickle.dumps(mix)) == mix


def test_an_index_from_before_there_were_rules_is_read_as_a_web_ratio() -> None:
    entry = {"web_ratio": 0.7, "seed": 3, "counts": {"web": 5}}
    assert Mix.from_json(entry, COLUMNS) == Mix.of(0.7, COLUMNS)
    assert Mix.from_json(entry, COLUMNS[:1]) == Mix.parse(["web=1"], columns=COLUMNS[:1])
    with pytest.raises(UserError, match="do not state how"):
        Mix.from_json({"seed": 3}, COLUMNS)


@pytest.mark.parametrize(
    ("ratio", "rule"),
    [
        (0.8, "web=0.8,synthetic=0.2"),
        (0.3, "web=0.3,synthetic=0.7"),
        (1.0, "web=1.0,synthetic=0.0"),
        (0, "web=0.0,synthetic=1.0"),
    ],
)
def test_a_web_ratio_is_written_as_a_person_would(ratio: float, rule: str) -> None:
    assert Mix.of(ratio, COLUMNS).to_json() == {"columns": list(COLUMNS), "rules": [rule]}


def test_rules_take_the_place_of_the_ratio_and_replacement_comes_last() -> None:
    mix = Mix.of(0.8, COLUMNS, ["long=1", "epoch>=2: tags=1"], replace_below=0.25)
    assert mix.to_json()["rules"] == ["long=1", "epoch>=2: tags=1", "score.web<0.25: synthetic=1"]
    assert choose(mix, epoch=5, scores={"web": 0.1}).column == "synthetic"
    assert choose(mix, epoch=5, scores={"web": 0.3}).column == "tags"
    with pytest.raises(UserError, match=r"replace_below 0\.25 needs a second column"):
        Mix.of(0.8, COLUMNS[:1], replace_below=0.25)


def test_a_score_that_nobody_made_is_named_with_the_nearest_one() -> None:
    mix = Mix.parse(["web=1", "score.wbe<0.25: synthetic=1", "score.web>0.5: web=1"], columns=COLUMNS)
    assert mix.score_fields == ("wbe", "web")
    mix.check_scores(("web", "wbe"))
    with pytest.raises(UserError, match=r"Rule 2 .*no score\.wbe\. Did you mean 'score\.web'"):
        mix.check_scores(("web", "synthetic"))
    with pytest.raises(UserError, match="clips score"):
        mix.check_scores(())


# --- what makes no sense ----------------------------------------------------------------------------------------------

FIRST_RULES = [
    ("", 1, "something is missing"),
    ("  ", 3, "something is missing"),
    ("web", 1, "'web' is no weight"),
    ("web=0.8 synthetic=0.2", 5, "'0.8 synthetic=0.2' is no number"),
    ("web=", 5, "a number is missing"),
    ("web=0.8,", 9, "something is missing at the end"),
    (",web=0.8", 1, "something is missing before ',web=0.8'"),
    ("web=0.8,,long=1", 9, "something is missing before ',long=1'"),
    ("=1", 1, "no column ''"),
    ("web=0.8, synthetc=0.2", 10, "no column 'synthetc'. Did you mean 'synthetic'?"),
    ("web=0.8,zzz=1", 9, "Known are: web, synthetic, long, tags."),
    ("web=1,web=2", 7, "has a weight already"),
    ("web= -1", 6, "below 0"),
    ("web=nan", 5, "'nan' is no number"),
    ("web=inf", 5, "'inf' is no number"),
    ("web=1e999", 5, "'1e999' is no number"),
    ("web=1_0", 5, "'1_0' is no number"),
    ("web=１", 5, "is no number"),
    ("web=80%", 5, "'80%' is no number"),
    ("web=0." + "1" * 5000, 5, "is no number"),
    ("web=0,synthetic=0.0", 1, "all weights are 0"),
    ("epoch>=1: web=1", 1, "the first rule has to hold for every sample"),
]
LATER_RULES = [
    ("synthetic=1", 1, "it would undo the rules before it"),
    (": web=1", 1, "something is missing before ': web=1'"),
    ("epoch>=1:", 10, "something is missing at the end"),
    ("epoch>=1: web=1: long=1", 16, "one ':' too many"),
    ("epoch>=1:: web=1", 10, "one ':' too many"),
    ("epoch>=x: web=1", 8, "'x' is no epoch"),
    ("epoch>=1.5: web=1", 8, "'1.5' is no epoch"),
    ("epoch>= -1: web=1", 9, "'-1' is no epoch"),
    ("epoch: web=1", 1, "'epoch' is no condition"),
    ("epoch>=: web=1", 1, "'epoch>=' is no condition"),
    (">=3: web=1", 1, "'>=3' is no condition"),
    ("epoch=3: web=1", 1, "'epoch=3' is no condition"),
    ("epoch==3: web=1", 1, "'epoch==3' is no condition"),
    ("1<epoch<3: web=1", 1, "'1<epoch<3' is no condition"),
    ("epoch>1 epoch<3: web=1", 1, "is no condition"),
    ("epoch>1 and: web=1", 12, "something is missing before ': web=1'"),
    ("and epoch>1: web=1", 1, "something is missing before 'and"),
    ("epoch>1 and  and epoch<3: web=1", 14, "something is missing before 'and"),
    ("epoch>1 or epoch<3: web=1", 1, "is no condition"),
    ("epch>=3: web=1", 1, "cannot ask for 'epch'. Did you mean 'epoch'?"),
    ("epoch<3 and scor.web<1: web=1", 13, "cannot ask for 'scor.web'. Did you mean 'score.web'?"),
    ("web<0.25: web=1", 1, "cannot ask for 'web'. Did you mean 'score.web'?"),
    ("score.<0.25: web=1", 1, "cannot ask for 'score.'"),
    ("score.web<low: web=1", 11, "'low' is no number"),
    ("score.web<inf: web=1", 11, "'inf' is no number"),
    ("score.web<0.25: wb=1", 17, "no column 'wb'. Did you mean 'web'?"),
    ("score.web<0.25: web=0", 16, "all weights are 0"),
    ("score.web<0,25: web=1", 11, "'0,25' is no number"),
]


@pytest.mark.parametrize(
    ("number", "text", "character", "said"),
    [(1, *case) for case in FIRST_RULES] + [(2, *case) for case in LATER_RULES],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_rule_that_makes_no_sense_is_refused_with_its_place(
    number: int, text: str, character: int, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        Mix.parse(["web=1"] * (number - 1) + [text], columns=COLUMNS)
    message = str(caught.value)
    assert message.startswith(f"Rule {number} of the mix, {text!r}, character {character}: ")
    assert said in message and message[-1] in ".?"


def test_no_rules_at_all_are_refused() -> None:
    with pytest.raises(UserError, match=r"no rule.*web=0\.8,synthetic=0\.2"):
        Mix.parse([], columns=COLUMNS)


PARTS = ("epoch", "score.", "web", "synthetic", ">=", "<", ":", ",", "=", "0.8", "1", " ", "and", " and ", "-", "e9")


@given(st.lists(st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join), max_size=3))
@settings(max_examples=150)
def test_any_text_is_a_rule_that_can_be_drawn_from_or_a_sentence(texts: list[str]) -> None:
    try:
        mix = Mix.parse(texts, columns=COLUMNS)
    except UserError:
        return
    assert choose(mix).column in COLUMNS
    assert Mix.from_json(mix.to_json(), COLUMNS) == mix
