"""The texts of a sample: views, stand-ins, hard negatives, condition and target, and how texts are trimmed."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from bytemaker import TOKENIZER, Bytes
from hypothesis import given
from hypothesis import strategies as st

from clips_data.errors import UserError
from clips_data.split import split
from clips_train.config import TrainConfig
from clips_train.shards import Split
from clips_train.texts import SampleTexts, TextMaker, condition_view, trim
from clips_train.views import NoCaption

TEXT = "A dog runs. It is brown. The sky is blue."
COLUMNS = ("web", "synthetic", "long", "wrong", "wronger")
SPLIT = Split(Path("shards"), "train", (), (), COLUMNS, "digest")
LENGTH = 64


def config(**change: Any) -> TrainConfig:
    return TrainConfig(**{"size": "tiny", "context_length": LENGTH, "target_length": LENGTH, "batch": 2} | change)


def sample(**texts: str) -> dict[str, Any]:
    columns = dict.fromkeys(COLUMNS, "") | {"web": "my dog", "synthetic": TEXT} | texts
    spans = [list(span) for span in split(columns["synthetic"], "period")]
    return {"key": "0", **columns, "sub_captions": {"synthetic": spans}, "scores": {}}


def texts_of(about: dict[str, Any], epoch: int = 0, key: str = "0", **change: Any) -> SampleTexts:
    return TextMaker(SPLIT, config(**change), TOKENIZER).texts(about, epoch, key)


def read(ids_L: torch.Tensor) -> str:
    return TOKENIZER.decode([number for number in ids_L.tolist() if number != Bytes.bos_id])


def view(texts: SampleTexts, number: int) -> list[str]:
    """The texts of a view that are there."""
    ids, there = texts.tensors[f"view.{number}.ids"], texts.tensors[f"view.{number}.there"]
    return [read(row) for row, is_there in zip(ids, there.tolist(), strict=True) if is_there]


def target(texts: SampleTexts) -> str:
    return read(texts.tensors["labels"])


def test_clips_contrasts_web_and_one_piece_and_writes_the_whole_synthetic_caption() -> None:
    pieces = Counter[str]()
    for epoch in range(60):
        texts = texts_of(sample(), epoch)
        assert view(texts, 0) == ["my dog"]
        assert target(texts) == TEXT
        assert "condition" not in texts.tensors, "the web view is what the captioner reads"
        assert not texts.counts and texts.chosen == ("web", None)
        pieces.update(view(texts, 1))
    assert set(pieces) == {"A dog runs", "It is brown", "The sky is blue"}


@pytest.mark.parametrize("synthetic", ["", "...", ". "])
def test_a_synthetic_caption_without_a_piece_gives_way_to_the_web_caption_and_is_counted(synthetic: str) -> None:
    texts = texts_of(sample(synthetic=synthetic))
    assert view(texts, 0) == view(texts, 1) == ["my dog"]
    assert target(texts) == "my dog"
    assert texts.counts == ("fallback.synthetic_empty",)
    assert texts.chosen == ("web", "web")


def test_an_empty_web_caption_gives_way_to_the_whole_synthetic_one_and_is_counted() -> None:
    texts = texts_of(sample(web=" "))
    assert view(texts, 0) == [TEXT]
    assert texts.counts == ("fallback.web_empty",)
    assert texts.chosen == ("synthetic", None)


def test_no_caption_at_all_is_a_reason_and_not_an_empty_text() -> None:
    with pytest.raises(NoCaption) as caught:
        texts_of(sample(web="", synthetic=""))
    assert caught.value.reason == "no_caption"


def test_a_text_of_no_piece_is_still_better_than_none() -> None:
    assert target(texts_of(sample(web="", synthetic="..."))) == "..."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"views": ["wbe"]}, "'wbe', which views name.*Did you mean 'web'.*clips shard --columns"),
        ({"views": ["web"], "target": "shards", "condition": "no"}, "'no', which condition names"),
        ({"views": [{"from": {"web": 1, "sinthetic": 1}}], "condition": "x"}, "'sinthetic', which views name"),
        ({"views": ["web"], "target": "synthetics"}, "'synthetics'.*Did you mean 'synthetic'"),
        ({"views": ["web"], "condition": "lnog"}, "'lnog'.*Did you mean 'long'"),
        ({"views": [{"from": "web", "negatives": ["wrng"]}]}, "'wrng'.*Did you mean 'wrong'"),
        ({"views": [{"from": {"web": 1, "sinthetic": 1}}]}, "'sinthetic'.*Did you mean 'synthetic'"),
        ({"views": [["web=1", "epoch>=1: lnog=1"]]}, "Rule 2.*'lnog'.*'long'"),
    ],
)
def test_a_column_that_the_shards_lack_is_named_with_the_nearest_one(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TextMaker(SPLIT, config(**change), TOKENIZER)


def test_a_column_to_shear_by_must_be_there() -> None:
    with pytest.raises(UserError, match=r"no caption column 'wed'.*'web'"):
        texts_of(sample(), views=[{"from": "synthetic", "length_of": "wed"}])


def test_a_column_that_was_not_split_is_named_where_pieces_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"no sub-captions of column 'web', which reduce=one_piece needs"):
        texts_of(sample(), views=[{"from": "web", "reduce": "one_piece"}])


def test_a_captioner_can_learn_the_very_text_that_was_drawn_for_the_view() -> None:
    drawn = {"web": 0.8, "synthetic": 0.2}
    seen = Counter[str]()
    for key in map(str, range(300)):
        texts = texts_of(sample(), key=key, views=[{"from": drawn}], target=drawn, condition=None)
        assert view(texts, 0) == [target(texts)]
        assert len(texts.counts) == 1, "one draw is counted once"
        seen[target(texts)] += 1
    assert seen[TEXT] / 300 == pytest.approx(0.2, abs=0.07) and set(seen) == {TEXT, "my dog"}


def test_two_mixes_are_counted_apart() -> None:
    first, second = {"web": 1, "synthetic": 1}, {"web": 1, "long": 3}
    counts = texts_of(sample(), views=[{"from": first}, {"from": second}]).counts
    assert [count.partition(".")[0] for count in counts if count.startswith("mix")] == ["mix", "mix_2"]
    assert "empty.long" in counts


def test_walking_takes_each_column_once_before_any_again() -> None:
    columns = {"web": 1, "synthetic": 1, "long": 1}
    starts = set()
    for key in map(str, range(20)):
        about = sample(long="a long one")
        seen = [view(texts_of(about, e, key, views=[{"from": columns, "walk": True}]), 0)[0] for e in range(6)]
        assert seen[:3] == seen[3:] and len(set(seen)) == 3
        starts.add(seen[0])
    assert len(starts) == 3


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({}, 0),
        ({"condition": "synthetic"}, None),
        ({"condition": "long", "views": ["web", "long"]}, 1),
        ({"condition": "web", "views": [{"from": "web", "tokens": 8}]}, None),
        ({"condition": None}, None),
        ({"decoder": "none", "caption_weight": 0}, None),
        ({"condition": {"web": 1, "long": 1}, "views": [{"from": {"web": 1, "long": 1}}]}, 0),
    ],
)
def test_the_condition_is_read_with_a_view_only_where_it_is_the_same_text(
    change: dict[str, Any], number: int | None
) -> None:
    assert condition_view(config(**change)) == number


def test_a_condition_that_is_no_view_has_ids_of_its_own() -> None:
    assert read(texts_of(sample(long="the long one"), condition="long").tensors["condition"]) == "the long one"
    assert read(texts_of(sample(), condition="long").tensors["condition"]) == "my dog", "what stands in"


def test_conditions_are_dropped_as_often_as_asked_anew_each_epoch() -> None:
    drops = {
        (key, epoch): bool(texts_of(sample(), epoch, str(key), condition_drop=0.3).tensors["dropped"])
        for key in range(100)
        for epoch in range(3)
    }
    assert sum(drops.values()) / 300 == pytest.approx(0.3, abs=0.08)
    assert any(drops[key, 0] != drops[key, 1] for key in range(100))
    assert not texts_of(sample()).tensors["dropped"]


def negatives(texts: SampleTexts) -> list[str]:
    ids, there = texts.tensors["view.0.negatives"], texts.tensors["view.0.negatives_there"]
    return [read(row) if is_there else "" for row, is_there in zip(ids, there.tolist(), strict=True)]


def test_hard_negatives_are_all_the_first_or_one_drawn_and_empty_ones_never_count() -> None:
    def of(choose: str, epoch: int = 0, **texts: str) -> list[str]:
        wanted = {"from": "web", "negatives": ["wrong", "wronger"], "choose_negatives": choose}
        return negatives(texts_of(sample(**texts), epoch, views=[wanted]))

    both = {"wrong": "a cat", "wronger": "a car"}
    assert of("all", **both) == of("hardest", **both) == ["a cat", "a car"]
    assert of("first", **both) == ["a cat"]
    assert of("first", wronger="a car") == ["a car"]
    assert of("all", wronger="a car") == ["", "a car"]
    assert {tuple(of("random", epoch, **both)) for epoch in range(30)} == {("a cat",), ("a car",)}
    assert of("random") == [""]


def test_a_sample_with_fewer_pieces_than_the_view_counts_says_which_are_there() -> None:
    texts = texts_of(sample(), views=["web", {"from": "synthetic", "reduce": "one_piece", "count": 5}])
    assert sorted(view(texts, 1)) == ["A dog runs", "It is brown", "The sky is blue"]
    assert texts.tensors["view.1.ids"].shape == (5, LENGTH)
    assert texts.tensors["view.1.there"].tolist() == [True] * 3 + [False] * 2


def test_equal_views_draw_apart() -> None:
    one = {"from": "synthetic", "reduce": "one_piece"}
    pairs = {(*view(t, 0), *view(t, 1)) for t in (texts_of(sample(), e, views=[one, one]) for e in range(60))}
    assert len(pairs) == 9


def test_views_are_cut_to_their_tokens_and_to_the_context() -> None:
    texts = texts_of(sample(web="x" * 200), views=["web", {"from": "web", "tokens": 12}])
    assert [len(view(texts, number)[0]) for number in (0, 1)] == [LENGTH - 2, 10]


def test_a_text_is_sheared_to_the_length_of_another_columns() -> None:
    views = [{"from": "synthetic", "length_of": "web"}, "web"]
    sheared = texts_of(sample(), views=views, condition="synthetic")
    assert view(sheared, 0) == [TEXT[: len("my dog")]] and sheared.chosen[0] is None
    assert view(texts_of(sample(web=TEXT + TEXT), views=views), 0) == [TEXT]
    assert view(texts_of(sample(web=""), views=views), 0) == [TEXT], "a missing text shears nothing"
    assert condition_view(config(views=views, condition="synthetic")) is None


def test_without_a_captioner_there_are_no_targets() -> None:
    texts = texts_of(sample(), decoder="none", caption_weight=0)
    assert texts.tensors["labels"].shape == texts.tensors["mask"].shape == (0,)


def test_a_maker_sent_to_a_worker_makes_the_same_texts() -> None:
    maker = TextMaker(SPLIT, config(), TOKENIZER)
    here, there = (m.texts(sample(), 3, "7").tensors for m in (maker, pickle.loads(pickle.dumps(maker))))
    assert all(torch.equal(here[name], there[name]) for name in here)


# --- trimming ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 62), min_size=1, max_size=6), st.booleans())
def test_trimmed_texts_keep_every_token_its_place_and_the_slot_that_is_pooled(
    lengths: list[int], keep_last: bool
) -> None:
    ids_RL = TOKENIZER.text_ids(["x" * length for length in lengths], LENGTH)
    kept_RT, mask_RT, positions_T = trim(ids_RL, Bytes.eos_id, keep_last=keep_last)
    assert torch.equal(kept_RT, ids_RL[:, positions_T])
    assert len(positions_T) <= min(LENGTH, max(lengths) + 3 + 7)
    assert positions_T.tolist() == sorted(set(positions_T.tolist()))
    for row, length in enumerate(lengths):
        used = set(range(length + 2))
        assert used <= set(positions_T.tolist())
        assert used - {LENGTH - 1} <= set(positions_T[:-1].tolist()), "the captioner is shown all but the last slot"
        attended = {p for p, seen in zip(positions_T.tolist(), mask_RT[row].tolist(), strict=True) if seen}
        assert attended == (used | {LENGTH - 1} if keep_last else used)
