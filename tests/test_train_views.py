"""Text views: what each reduction may return, on all small cases, and what stands in for a missing caption."""

from __future__ import annotations

import json
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from clips_data.errors import UserError
from clips_data.split import split
from clips_train import views
from clips_train.views import Draw, NoCaption, Reduce

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


def about(web: str = "four", synthetic: str = TEXT) -> dict[str, Any]:
    spans = [list(span) for span in split(synthetic, "period")]
    return {"key": "0", "sha256": "", "web": web, "synthetic": synthetic, "sub_captions": {"synthetic": spans}}


def views_of(sample: dict[str, Any], reduce: Reduce = "one_piece", **change: Any) -> views.TextViews:
    settings: dict[str, Any] = {"web_column": "web", "synthetic_column": "synthetic", "reduce": reduce}
    settings |= {"web_budget": 5, "short_budget": 4, "count": 1, "tokenizer": WORDS, "draw": Draw(0, 0, "0")}
    return views.text_views(sample, **settings | change)


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
    seen = {views.sentences(TEXT, SPANS, 2, draw) for draw in draws_of()}
    assert len(seen) == 6
    assert "four five. six" in seen
    assert views.sentences(TEXT, SPANS, 9, Draw(0, 0, "0")) == TEXT.removesuffix(".")


def test_equal_seed_epoch_and_key_draw_equal_views_and_others_do_not() -> None:
    first = [views.one_piece(TEXT, SPANS, draw) for draw in draws_of()]
    assert first == [views.one_piece(TEXT, SPANS, draw) for draw in draws_of()]
    assert first != [views.one_piece(TEXT, SPANS, draw) for draw in draws_of(seed=1)]
    assert first[: NUM_DRAWS // 2] != first[NUM_DRAWS // 2 :], "the epoch has no effect"


def test_views_stay_within_their_budgets() -> None:
    for reduce in ("none", "truncate", "random", "block", "sub_caption", "one_piece", "sentences"):
        texts = views_of(about(web=TEXT), reduce)
        assert len(texts.web) == 5
        assert 0 < len(texts.short) <= 4
        assert texts.target == TEXT
        assert texts.fallbacks == ()


@pytest.mark.parametrize("synthetic", ["", "...", ". "])
def test_a_synthetic_caption_without_a_piece_is_replaced_by_the_web_caption_and_counted(synthetic: str) -> None:
    texts = views_of(about(web="one two three", synthetic=synthetic))
    web = WORDS.pieces("one two three")
    assert (texts.web, texts.short, texts.target) == (web, web, "one two three")
    assert texts.fallbacks == ("synthetic_empty",)


def test_an_empty_web_caption_is_replaced_by_the_synthetic_one_and_counted() -> None:
    texts = views_of(about(web=" "))
    assert texts.web == WORDS.pieces(TEXT)[:5]
    assert texts.fallbacks == ("web_empty",)


def test_no_caption_at_all_is_a_reason_and_not_an_empty_text() -> None:
    with pytest.raises(NoCaption) as caught:
        views_of(about(web="", synthetic=""))
    assert caught.value.reason == "no_caption"


def test_a_column_that_the_shards_lack_is_named_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"synthetics.*'synthetic'"):
        views_of(about(), synthetic_column="synthetics")
    with pytest.raises(UserError, match="no sub-captions of column 'web'"):
        views_of(about(), synthetic_column="web")


def test_the_authors_pieces_are_what_one_piece_draws_from() -> None:
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(cases) == 30
    for case in cases:
        text = case["caption"]
        spans = split(text, "authors")
        drawn = {views.one_piece(text, spans, draw) for draw in draws_of()} if spans else set()
        assert drawn == set(case["pieces"]), text
