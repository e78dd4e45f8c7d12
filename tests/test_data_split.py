"""The three splitting rules: against the authors' golden pieces, on hard sentences, and by their properties."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips_data.errors import UserError
from clips_data.split import RULES, Rule, split

GOLDEN = json.loads((Path(__file__).parent / "golden" / "subcaption.json").read_text(encoding="utf-8"))
FRAGMENTS = (
    ".", "...", "!", "?", "。", "…", " ", "  ", "\n", "\n\n", "|", '"', "“", "”", "(", ")", "'", "U.S.", "e.g.",
    "Dr.", "No. 5", "3.5", "A dog", "The", "it", "no", "一只猫", "https://example.com/a.jpg?x=1", "\ud800",
)  # fmt: skip
CAPTIONS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=6)), max_size=16).map("".join)


def pieces(text: str, rule: Rule) -> list[str]:
    return [text[start:end] for start, end in split(text, rule)]


def test_golden_file_is_there_in_full() -> None:
    assert len(GOLDEN) == 30


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: repr(case["caption"][:24]))
def test_authors_rule_gives_the_authors_pieces(case: dict[str, object]) -> None:
    assert pieces(str(case["caption"]), "authors") == case["pieces"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog runs on the grass. The sky is blue. ", ["A dog runs on the grass", "The sky is blue"]),
        ("Wow! Is it? Yes.", ["Wow! Is it? Yes"]),
        ("A pole of 3.5 m.", ["A pole of 3", "5 m"]),
        ("left|right. top", ["left|right", "top"]),
        ("  Same.\tSame .  ", ["Same", "Same"]),
        (". . .", []),
        ("", []),
    ],
)
def test_period_rule_cuts_at_full_stops_and_strips(text: str, expected: list[str]) -> None:
    assert pieces(text, "period") == expected


@pytest.mark.parametrize(
    "expected",
    [
        ["A dog runs.", "The sky is blue!", "Is it?", "Yes."],
        ["A pole of 3.5 m stands here.", "No. 5 is red.", "It costs $5.00.", "3 cats look."],
        ["The U.S. flag waves.", "It is in the U.S.", "It is large."],
        ["A lamp, e.g. a light.", "Dr. Smith and Mr. Jones wave.", "J. Smith waves."],
        ["There are approx. five dogs.", "Fig. 3 shows ca. 5 cats."],
        ['"Is it red?" she asks.', 'He says "Stop."', "Then he goes.", '"Go" is written on it.', "(It is big.)", "End"],
        ["A sign reads “Stop.”", "“No,” he says."],
        ["Wait... what?", "He waits…", "Then he leaves."],
        ["Visit https://example.com/a.jpg?x=1 now.", "The file a.jpg is gone."],
        ["a dog runs.", "the sky is blue."],
        ["It was built in 1990.", "It is old."],
    ],
    ids=lambda case: case[0],
)
def test_sentence_rule_keeps_hard_sentences_whole(expected: list[str]) -> None:
    assert pieces(" ".join(expected), "sentence") == expected


def test_sentence_rule_cuts_chinese_glued_sentences_and_paragraphs() -> None:
    assert pieces("一只猫。一只狗。好！", "sentence") == ["一只猫。", "一只狗。", "好！"]
    assert pieces("A cat sits.A dog runs.Wow!Great.", "sentence") == ["A cat sits.", "A dog runs.", "Wow!", "Great."]
    assert pieces("A title\n\nA text\nin two lines", "sentence") == ["A title", "A text\nin two lines"]


@pytest.mark.parametrize("gap", ["  ", "\n", " \n ", "\t", "\u3000"])
def test_sentence_rule_cuts_whatever_whitespace_follows(gap: str) -> None:
    assert pieces(f'A dog.{gap}It runs!{gap}"Go" it says.', "sentence") == ["A dog.", "It runs!", '"Go" it says.']
    assert pieces(f"Dr.{gap}Smith waves.", "sentence") == [f"Dr.{gap}Smith waves."]


def test_sentence_rule_drops_pieces_of_punctuation_alone() -> None:
    assert pieces("...", "sentence") == []
    assert pieces(" ! \n\n A cat.", "sentence") == ["A cat."]


def test_sentence_rule_cuts_a_text_longer_than_spacys_own_limit() -> None:
    assert pieces("A dog." + " " * 1_000_000 + "It runs.", "sentence") == ["A dog.", "It runs."]


def test_unknown_rule_names_the_nearest_one() -> None:
    with pytest.raises(UserError, match="Did you mean 'sentence'"):
        split("A dog.", "sentences")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=300)
@given(text=CAPTIONS, rule=st.sampled_from(RULES))
def test_spans_are_in_order_within_bounds_and_never_empty(text: str, rule: Rule) -> None:
    last = 0
    for start, end in split(text, rule):
        assert last <= start < end <= len(text)
        last = end


@settings(deadline=None, max_examples=300)
@given(text=CAPTIONS, rule=st.sampled_from(("period", "sentence")))
def test_pieces_are_stripped_and_never_blank(text: str, rule: Rule) -> None:
    for piece in pieces(text, rule):
        assert piece and piece == piece.strip()
        assert "." not in piece or rule == "sentence"


@settings(deadline=None, max_examples=300)
@given(text=CAPTIONS, rule=st.sampled_from(RULES))
def test_between_pieces_lie_only_separators_and_whitespace(text: str, rule: Rule) -> None:
    rest = list(text)
    for start, end in split(text, rule):
        rest[start:end] = [""] * (end - start)
    left_over = "".join(rest)
    if rule == "period":
        assert not left_over.replace(".", "").strip()
    elif rule == "authors":
        assert not re.sub(r"[.!|]", "", left_over)
    else:
        assert not any(char.isalnum() for char in left_over)
