"""The three splitting rules: against the authors' golden pieces, on hard sentences, and by their properties."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clips_data import sentences
from clips_data.demo import scenes
from clips_data.errors import UserError
from clips_data.split import RULES, Rule, sentences_by_spacy, split, split_many

GOLDEN = json.loads((Path(__file__).parent / "golden" / "subcaption.json").read_text(encoding="utf-8"))
FRAGMENTS = (
    ".", "...", "!", "?", "。", "…", " ", "  ", "\n", "\n\n", "|", '"', "“", "”", "(", ")", "'", "U.S.", "e.g.",
    "Dr.", "No. 5", "3.5", "A dog", "The", "it", "no", "一只猫", "https://example.com/a.jpg?x=1", "\ud800",
    "- ", "\n* ", "\n1. ", "\r\n", "\t", "\u3000", "？", "；", "）", "”", "🐕", "runs. ", "walks! The ", "wed",
    "TV", "vs",
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
        # wrong, as the rule's docstring says
        ("The U.S. flag, e.g. at No. 5.", ["The U", "S", "flag, e", "g", "at No", "5"]),
        ("See https://example.com or a.jpg.", ["See https://example", "com or a", "jpg"]),
        ("Wait... what", ["Wait", "what"]),
        ("一只猫。一只狗？\n- A cat", ["一只猫。一只狗？\n- A cat"]),
    ],
)
def test_period_rule_cuts_at_full_stops_and_strips(text: str, expected: list[str]) -> None:
    assert pieces(text, "period") == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog. ", ["A dog", " "]),
        ("left|right.", ["left", "right"]),
        ("The U.S. flag is 3.5 m long", ["The U", "S", " flag is 3", "5 m long"]),
        ("Is it? 一只猫。\n- A cat", ["Is it? 一只猫。\n- A cat"]),
    ],
)
def test_authors_rule_is_wrong_where_its_docstring_says(text: str, expected: list[str]) -> None:
    assert pieces(text, "authors") == expected


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
        ["Write to a.b@example.com.", "The site www.example.com/a?b=c&d=e!f is down.", "It is over."],
        ["The cat, vs. the dog, wins.", "It weighs approx. 3.5 kg, i.e. little.", "See p. 5 and vol. 2."],
        ["They wed.", "The dog is hers!", "iPhone, TV and café.", "Éclairs are sold."],
        ["A dog 🐕 runs.", "🐕 barks at 2 p.m. daily.", "Good 🙂!", "He sleeps."],
        ["Red; green; blue: all there.", "It is 5'10\" tall.", "Look (at this)!", "[It is big.]"],
        ["1. A dog runs.", "2. A cat sleeps.", "10. Nothing moves."],
        ["He says 'Stop!'", "She asks ‘Why?’", "«Non.»", "They go."],
    ],
    ids=lambda case: case[0],
)
def test_sentence_rule_keeps_hard_sentences_whole(expected: list[str]) -> None:
    assert pieces(" ".join(expected), "sentence") == expected


def test_sentence_rule_cuts_chinese_glued_sentences_and_paragraphs() -> None:
    assert pieces("一只猫。一只狗。好！", "sentence") == ["一只猫。", "一只狗。", "好！"]
    assert pieces("A cat sits.A dog runs.Wow!Great.", "sentence") == ["A cat sits.", "A dog runs.", "Wow!", "Great."]
    assert pieces("A title\n\nA text\nin two lines", "sentence") == ["A title", "A text\nin two lines"]


@pytest.mark.parametrize("mark", ["- ", "* ", "• ", "– ", "{}. ", "{}) "])
@pytest.mark.parametrize("gap", ["\n", "\n\n", "\r\n", "\n   ", " \n\t"])
def test_sentence_rule_gives_each_item_of_a_list_its_own_piece(mark: str, gap: str) -> None:
    items = [f"{mark.format(number)}{text}" for number, text in enumerate(("A dog", "A cat runs. ", "no tail, 3.5 cm"))]
    expected = ["It shows:", *(item.strip() for item in items[:2]), items[2]]
    assert pieces(gap.join(["It shows:", *items]), "sentence") == expected


def test_sentence_rule_cuts_cjk_sentences_behind_their_closing_marks() -> None:
    assert pieces("（一只猫。）一只狗？“好！”是的；对。", "sentence") == [
        "（一只猫。）",
        "一只狗？",
        "“好！”",
        "是的；对。",
    ]
    assert pieces("一只猫。 一只狗！？\n好", "sentence") == ["一只猫。", "一只狗！？", "好"]
    assert pieces("一只猫｡A dog.", "sentence") == ["一只猫｡", "A dog."]
    assert pieces("一只猫。”", "sentence") == ["一只猫。”"]


@pytest.mark.parametrize(
    "wrong",
    [
        ["She lives in the U.S. Bears live there too."],  # an abbreviation at the end, and no word that usually opens
        ["Is it red?", "The answer is no. 5 dogs agree."],  # an ordinary "no." before a number
        ["A title\nA text below it"],  # lines without full stops
        ["How many?", "12. He counts."],  # a sentence that is a short number
        ["“一只猫。”", "他说。"],  # a Chinese quotation with what follows
        ["Das sind bzw.", "Hunde."],  # abbreviations of other languages
        ["There are", "3. He sees them all."],  # a line that begins with a number and is no item
    ],
    ids=lambda case: case[0],
)
def test_sentence_rule_is_wrong_where_its_docstring_says(wrong: list[str]) -> None:
    assert pieces("\n".join(wrong), "sentence") == wrong


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


# --- the way around spaCy ---------------------------------------------------------------------------------------------


def assert_spacy_agrees(texts: list[str]) -> None:
    for text, spans in zip(texts, split_many(texts, "sentence"), strict=True):
        assert spans == sentences_by_spacy(text), text


@settings(max_examples=500)
@given(texts=st.lists(CAPTIONS, max_size=3))
@example(texts=["They wed. The dog runs. Mr. X. wed.\tHe", "3.5. A cat", "co. The"])
def test_sentences_are_those_that_spacy_gives_for_the_whole_text(texts: list[str]) -> None:
    assert_spacy_agrees(texts)


@pytest.mark.parametrize("after", [" The cat.", "\nno cat", " 5 cats", "\n\n- A cat", ' "The cat', ""])
def test_every_word_that_spacy_treats_in_its_own_way_is_known_where_spacy_is_not_asked(after: str) -> None:
    known = list(sentences._sentence_pipeline().tokenizer.rules)  # type: ignore[union-attr]
    assert len(known) > 1000
    assert_spacy_agrees([f"A dog {word}{stop}{after}" for word in known for stop in ("", ".", "!")])
    assert_spacy_agrees([f"({word.lower()}.{after} {word.upper()}.{after}" for word in known])


def test_no_character_by_which_spacy_ends_a_sentence_is_taken_for_harmless() -> None:
    from spacy.pipeline import Sentencizer

    stops = [*Sentencizer.default_punct_chars, "…"]
    assert len(stops) > 100
    assert [stop for stop in stops if not sentences._EVENT.search(f"a{stop}b")] == []
    assert_spacy_agrees([f"A dog{gap}{stop}{gap}The cat" for stop in stops for gap in ("", " ")])


def test_demo_captions_are_cut_as_by_spacy_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [scenes.describe(scenes.make_scene(3, number)) for number in range(200)]
    texts += [scenes.web_caption(scenes.make_scene(3, number)) for number in range(200)]
    assert_spacy_agrees(texts)
    monkeypatch.setattr(sentences, "starts_by_spacy", None)
    assert all(len(spans) >= 4 for spans in split_many(texts[:200], "sentence"))


def test_words_that_spacy_remembers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    strings = sentences._sentence_pipeline().vocab.strings
    monkeypatch.setattr(sentences, "_MAX_KNOWN_WORDS", 0)
    before = len(strings)
    for first in range(0, 300, 100):
        texts = [f"It reads “word{first + number}x.” today." for number in range(100)]
        assert_spacy_agrees(texts)
    assert len(strings) == before


@pytest.mark.parametrize("rule", RULES)
def test_many_texts_are_cut_as_each_alone(rule: Rule) -> None:
    texts = ["A dog. The cat.", "", "In the U.S. It is e.g. big! 3.5 m.", "一只猫。一只狗。", '"Go." No.']
    assert split_many(texts, rule) == [split(text, rule) for text in texts]
    assert split_many([], rule) == []


# --- what holds for all rules -----------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(text=CAPTIONS, rule=st.sampled_from(RULES))
def test_spans_are_in_order_within_bounds_and_never_empty(text: str, rule: Rule) -> None:
    last = 0
    for start, end in split(text, rule):
        assert last <= start < end <= len(text)
        last = end


@settings(max_examples=300)
@given(text=CAPTIONS, rule=st.sampled_from(("period", "sentence")))
def test_pieces_are_stripped_and_never_blank(text: str, rule: Rule) -> None:
    for piece in pieces(text, rule):
        assert piece and piece == piece.strip()
        assert "." not in piece or rule == "sentence"


@settings(max_examples=300)
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
