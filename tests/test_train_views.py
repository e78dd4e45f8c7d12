"""The reductions of text views: what each may return, on all small cases."""

from __future__ import annotations

import json
import typing
from collections import Counter
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest

from clips_data.split import split
from clips_train import views
from clips_train.config import Reduce, View
from clips_train.views import Draw

GOLDEN = Path(__file__).parent / "golden" / "subcaption.json"
TEXT = "one two three. four five. six. seven eight nine ten."
SPANS = split(TEXT, "period")
NUM_DRAWS = 300


class Words:
    """A tokenizer whose tokens are the words of a fixed list; full stops are tokens of their own."""

    words = (".", *TEXT.replace(".", "").split())

    def pieces(self, text: str) -> list[int]:
        return [self.words.index(word) for word in text.replace(".", " .").split()]


WORDS = Words()


def draws_of(seed: int = 0) -> list[Draw]:
    return [Draw(seed, epoch, f"{key:09d}") for epoch in range(2) for key in range(NUM_DRAWS // 2)]


def reduced(reduce: Reduce, budget: int, draw: Draw, text: str = TEXT, **view: Any) -> list[list[int]]:
    """The texts of a view as words of ``WORDS``."""
    spans = split(text, "period")
    wanted = View(source="synthetic", reduce=reduce, **view)
    return views.reduce_text(text, spans, wanted, budget=budget, tokenizer=WORDS, draw=draw)


@pytest.mark.parametrize("num_tokens", range(1, 7))
@pytest.mark.parametrize("budget", range(1, 7))
def test_token_reductions_keep_order_and_length(num_tokens: int, budget: int) -> None:
    ids = list(range(10, 10 + num_tokens))
    kept = min(num_tokens, budget)
    assert views.truncate(ids, budget) == ids[:kept]
    for draw in draws_of():
        masked = views.random_mask(ids, budget, draw)
        assert len(masked) == kept and masked == sorted(set(masked)) and set(masked) <= set(ids)
        block = views.block_mask(ids, budget, draw)
        assert block == list(range(block[0], block[0] + kept))


# --- METHOD §4 on every small case and every outcome of its draws -----------------------------------------------------


class Numbers:
    """A tokenizer whose tokens are the numbers that a text holds; a full stop is -1."""

    def pieces(self, text: str) -> list[int]:
        return [-1 if word == "." else int(word) for word in text.replace(".", " .").split()]


@dataclass(frozen=True)
class Chosen(Draw):
    """A draw whose outcome is given: ``order`` of a permutation, or ``place`` among the integers below ``of``."""

    order: tuple[int, ...] = ()
    place: int = 0
    of: int = 0

    def permutation(self, n: int, purpose: str) -> list[int]:
        assert n == len(self.order)
        return list(self.order)

    def integer(self, n: int, purpose: str) -> int:
        assert n == self.of, "another number of outcomes than there are places"
        return self.place


def in_order(order: tuple[int, ...]) -> Chosen:
    return Chosen(0, 0, "", order=order)


def text_of(lengths: tuple[int, ...]) -> tuple[str, list[tuple[int, int]], list[list[int]]]:
    """A text of pieces of so many words, all different, with its spans and the words of each piece."""
    words, text, spans = iter(range(100)), "", []
    pieces = [[next(words) for _ in range(length)] for length in lengths]
    for piece in pieces:
        start = len(text)
        text += " ".join(map(str, piece))
        spans.append((start, len(text)))
        text += ". "
    return text, spans, pieces


SMALL_TEXTS = [lengths for num in range(1, 5) for lengths in product((1, 2, 3), repeat=num)]


@pytest.mark.parametrize("num_tokens", range(7))
def test_random_keeps_the_tokens_drawn_in_their_order_and_short_captions_whole(num_tokens: int) -> None:
    ids = list(range(10, 10 + num_tokens))
    for budget in range(1, 8):
        for order in permutations(range(num_tokens)):
            kept = [token for place, token in enumerate(ids) if num_tokens <= budget or order.index(place) < budget]
            assert views.random_mask(ids, budget, in_order(order)) == kept


@pytest.mark.parametrize("num_tokens", range(9))
def test_block_begins_at_every_place_that_fits_and_the_last_one_ends_the_caption(num_tokens: int) -> None:
    ids = list(range(10, 10 + num_tokens))
    for budget in range(1, num_tokens):
        windows = [ids[start : start + budget] for start in range(num_tokens) if start + budget <= num_tokens]
        places = [Chosen(0, 0, "", place=place, of=len(windows)) for place in range(len(windows))]
        assert [views.block_mask(ids, budget, place) for place in places] == windows
        assert windows[-1][-1] == ids[-1]
    for budget in (num_tokens, num_tokens + 1):
        assert views.block_mask(ids, budget, Chosen(0, 0, "")) == ids


def test_sub_caption_is_the_papers_rule() -> None:
    num_cases = 0
    for lengths in SMALL_TEXTS:
        text, spans, pieces = text_of(lengths)
        for order, budget in product(permutations(range(len(lengths))), range(1, 11)):
            expected: list[int] = []
            for number in order:  # pick one, append it, and stop at L
                expected += [-1, *pieces[number]] if expected else pieces[number]
                if len(expected) >= budget:
                    break
            assert views.sub_caption(text, spans, budget, Numbers(), in_order(order)) == expected[:budget]
            num_cases += 1
    assert num_cases == (3 + 9 * 2 + 27 * 6 + 81 * 24) * 10


def test_one_piece_is_the_authors_rule_and_cut_at_the_budget() -> None:
    for lengths in SMALL_TEXTS:
        text, spans, pieces = text_of(lengths)
        for place, budget in product(range(len(lengths)), range(1, 5)):
            draw = Chosen(0, 0, "", place=place, of=len(lengths))
            view = View(source="synthetic", reduce="one_piece")
            ids = views.reduce_text(text, spans, view, budget=budget, tokenizer=Numbers(), draw=draw)
            assert ids == [pieces[place][:budget]]


def test_sentences_are_the_first_k_drawn_in_the_order_of_the_text() -> None:
    for lengths in SMALL_TEXTS:
        text, spans, pieces = text_of(lengths)
        for order, count in product(permutations(range(len(lengths))), range(1, 6)):
            expected: list[int] = []
            for number, piece in enumerate(pieces):
                if order.index(number) < count:
                    expected += [-1, *piece] if expected else piece
            draw, budget = in_order(order), 3 + count
            view = View(source="synthetic", reduce="sentences", pieces=count)
            ids = views.reduce_text(text, spans, view, budget=budget, tokenizer=Numbers(), draw=draw)
            assert ids == [expected[:budget]]


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["A dog", "a cat"], "A dog. a cat"),
        (["A dog.", "Is it?", "Yes!", "end."], "A dog. Is it? Yes! end."),
        (['He says "Go."', "(It is big.)", "so"], 'He says "Go." (It is big.) so'),
        (["一只猫！", "“一只狗。”", "so"], "一只猫！ “一只狗。” so"),
        (['He says "go"', "so"], 'He says "go". so'),
        ([], ""),
    ],
)
def test_joined_pieces_end_in_one_full_stop_each(pieces: list[str], text: str) -> None:
    assert views.join(pieces) == text


# --- the draws themselves ---------------------------------------------------------------------------------------------


def test_random_mask_can_draw_every_subset_and_block_every_start() -> None:
    ids = list(range(5))
    masks = {tuple(views.random_mask(ids, 2, draw)) for draw in draws_of()}
    assert len(masks) == 10
    assert {views.block_mask(ids, 2, draw)[0] for draw in draws_of()} == {0, 1, 2, 3}


def test_one_piece_draws_each_piece_about_equally_often() -> None:
    pieces = Counter(views.one_piece(TEXT, SPANS, draw) for draw in draws_of())
    assert set(pieces) == {"one two three", "four five", "six", "seven eight nine ten"}
    assert min(pieces.values()) > NUM_DRAWS / 4 * 0.7


@pytest.mark.parametrize("budget", range(1, 16))
def test_sub_caption_appends_whole_pieces_without_replacement_until_the_budget(budget: int) -> None:
    texts = [TEXT[start:end] for start, end in SPANS]
    allowed = set()
    for order in permutations(texts):
        for used in range(1, len(texts) + 1):
            ids = WORDS.pieces(". ".join(order[:used]))
            if len(ids) >= budget or used == len(texts):
                allowed.add(tuple(ids[:budget]))
                break
    seen = {tuple(views.sub_caption(TEXT, SPANS, budget, WORDS, draw)) for draw in draws_of()}
    assert seen <= allowed
    assert len(seen) > 1


def test_sentences_are_drawn_without_replacement_and_stand_in_the_order_of_the_text() -> None:
    seen = {views.sentences(TEXT, SPANS, (2, 2), draw) for draw in draws_of()}
    assert len(seen) == 6
    assert "four five. six" in seen
    assert views.sentences(TEXT, SPANS, (9, 9), Draw(0, 0, "0")) == TEXT.removesuffix(".")


def test_equal_seed_epoch_and_key_draw_equal_views_and_others_do_not() -> None:
    first = [views.one_piece(TEXT, SPANS, draw) for draw in draws_of()]
    assert first == [views.one_piece(TEXT, SPANS, draw) for draw in draws_of()]
    assert first != [views.one_piece(TEXT, SPANS, draw) for draw in draws_of(seed=1)]
    assert first[: NUM_DRAWS // 2] != first[NUM_DRAWS // 2 :], "the epoch has no effect"


@pytest.mark.parametrize("reduce", typing.get_args(Reduce))
def test_views_stay_within_their_budgets(reduce: Reduce) -> None:
    for draw in draws_of()[:50]:
        (ids,) = reduced(reduce, 4, draw)
        assert 0 < len(ids) <= 4


def test_first_piece_is_the_first_sentence() -> None:
    assert reduced("first_piece", 9, Draw(0, 0, "0")) == [WORDS.pieces("one two three")]


def test_several_pieces_are_different_ones_and_no_more_than_there_are() -> None:
    known = [WORDS.pieces(TEXT[start:end]) for start, end in SPANS]
    firsts = Counter[int]()
    for draw in draws_of():
        texts = reduced("one_piece", 9, draw, count=3)
        numbers = [known.index(ids) for ids in texts]
        assert len(set(numbers)) == 3
        firsts[numbers[0]] += 1
        assert len(reduced("one_piece", 9, draw, count=9)) == len(known) == 4
    assert len(firsts) == 4


def test_several_joined_texts_have_a_drawn_number_of_pieces_each() -> None:
    lengths, texts = Counter[int](), Counter[tuple[int, ...]]()
    for draw in draws_of():
        found = reduced("sentences", 99, draw, count=2, pieces="1-3")
        assert len(found) == 2
        lengths.update(ids.count(0) + 1 for ids in found)  # joined by full stops
        texts.update(map(tuple, found))
    assert set(lengths) == {1, 2, 3} and min(lengths.values()) > NUM_DRAWS * 2 / 3 * 0.7
    assert len(texts) == 4 + 6 + 4


def test_the_authors_pieces_are_what_one_piece_draws_from() -> None:
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(cases) == 30
    for case in cases:
        text = case["caption"]
        spans = split(text, "authors")
        drawn = {views.one_piece(text, spans, draw) for draw in draws_of()} if spans else set()
        assert drawn == set(case["pieces"]), text
