"""Text measures: what is a token, a clause, a repetition, and how far captions of one image are apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data.recaption import caption_measures as measures

TEXTS = st.text(alphabet=st.sampled_from("ab c,.;'-and é犬の1 "), max_size=60)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("  ...!  ", []),
        ("A red, RED ball", ["a", "red", "red", "ball"]),
        ("the dog's well-made 3 bowls", ["the", "dog's", "well-made", "3", "bowls"]),
        ("snake_case", ["snake", "case"]),
        ("ＡＢＣ ﬁne", ["abc", "fine"]),
        ("犬がいる。", ["犬", "が", "い", "る"]),
        ("ein Straßenschild", ["ein", "strassenschild"]),
    ],
)
def test_tokens(text: str, found: list[str]) -> None:
    assert measures.tokens(text) == found


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 0),
        ("Dog.", 0),
        ("A red ball", 1),
        ("a red ball on a mat, a dog with a hat", 3),
        ("A red circle and a blue square. Below it, a star.", 4),
        ("It costs 3.5 or 1,000 dollars at example.com", 2),
        ("a black-and-white cat", 1),
        ("a man — an old one — who sleeps here", 3),
        ("犬がいる。猫もいる、木の下", 3),
    ],
)
def test_clauses_are_stretches_of_two_tokens_between_marks_and_joining_words(text: str, number: int) -> None:
    assert measures.clauses(text) == number


def test_a_word_that_begins_like_a_joining_word_joins_nothing() -> None:
    assert measures.clauses("a sandy island orchard thatched") == 1


def test_distinct_counts_over_all_captions_and_keeps_its_denominator() -> None:
    assert measures.distinct(["a b c d", "a b c", "x y"]) == (2, 3)
    assert measures.distinct([]) == (0, 0)


@given(st.lists(TEXTS, max_size=5))
def test_saying_it_all_again_adds_nothing_distinct(texts: list[str]) -> None:
    different, total = measures.distinct(texts)
    assert different <= total
    assert measures.distinct(texts * 2) == (different, 2 * total)


@pytest.mark.parametrize(
    ("text", "repeated"),
    [
        ("one two three four five six one two three four five six", True),
        ("one two three four five six one two three four five seven", False),
        ("la la la la la la", False),
        ("la la la la la la la", True),
        ("A red ball lies on the mat. A red ball, lies on the MAT!", True),
        ("", False),
    ],
)
def test_repeats(text: str, repeated: bool) -> None:
    assert measures.repeats(text) is repeated


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        ([], 0.0),
        (["a dog"], 0.0),
        (["a dog", "A dog, dog."], 0.0),
        (["a dog", ""], 1.0),
        (["", ""], 0.0),
        (["a dog", "a cat"], 2 / 3),
        (["a dog", "a dog", "x y"], 2 / 3),
    ],
)
def test_difference(texts: list[str], value: float) -> None:
    assert measures.difference(texts) == pytest.approx(value)


@given(st.lists(TEXTS, max_size=5))
def test_difference_is_a_share_and_does_not_depend_on_the_order(texts: list[str]) -> None:
    assert 0 <= measures.difference(texts) <= 1
    assert measures.difference(texts[::-1]) == pytest.approx(measures.difference(texts))
