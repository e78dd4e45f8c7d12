from __future__ import annotations

import pickle
from functools import cache

import goldens
import open_clip
import pytest
import torch

from clips_data.errors import UserError
from clips_train.tokenizer import Tokenizer, build_tokenizer

needs_bert_vocab = pytest.mark.skipif(not goldens.BERT_VOCAB.is_file(), reason="the BERT vocabulary is not here")
TEXTS = (
    "a photo of a dog",
    "",
    "   ",
    "!",
    "Wow!!! It's 50 &amp; more…",
    "Ünïcode — naïve café ☕",
    "tab\tand\nnewline",
    "a <end_of_text> inside",
    "many words " * 60,
)


@cache
def bert() -> Tokenizer:
    return build_tokenizer("bert", str(goldens.BERT_VOCAB))


@cache
def bpe() -> Tokenizer:
    return build_tokenizer("bpe")


@needs_bert_vocab
@pytest.mark.parametrize(
    "case", goldens.cases("tokenizer"), ids=lambda case: f"{case['kind']}-{case['context_length']}"
)
def test_bert_ids_are_the_references(case: dict) -> None:
    length = case["context_length"]
    if case["truncated"] and length == 128:
        pytest.skip("the reference cuts at 77 pieces whatever the length; ours uses the slots it has")
    assert bert().text_ids([case["text"]], length).tolist() == [case["ids"]]


@needs_bert_vocab
def test_bert_uses_all_slots_of_a_longer_context() -> None:
    (ids,) = bert().text_ids(["dog " * 200], 128).tolist()
    assert ids == [1, *[3899] * 125, 2, 101]


@needs_bert_vocab
@pytest.mark.parametrize("case", goldens.cases("caption_targets"), ids=lambda case: case["web"][:20] or "empty")
def test_targets_labels_and_masks_are_the_references(case: dict) -> None:
    length = case["target_length"]
    ids, _ = bert().target_ids([case["target_text"]], length)
    labels, mask = bert().targets([case["target_text"]], length)
    assert ids.tolist() == [case["target_ids"]]
    assert labels.tolist() == [case["target_labels"]]
    assert mask.int().tolist() == [case["target_mask"]]
    assert (labels.dtype, mask.dtype) == (torch.int64, torch.bool)


@needs_bert_vocab
@pytest.mark.parametrize("case", goldens.cases("caption_targets"), ids=lambda case: case["web"][:20] or "empty")
def test_web_and_short_ids_of_the_training_code_are_ours(case: dict) -> None:
    if "[SEP]" in case["web"] + case["short_text"]:
        pytest.skip("the two references differ on special names in a text; ours follows the released tokenizer there")
    ids = bert().text_ids([case["web"], case["short_text"]], case["context_length"])
    assert ids.tolist() == [case["web_ids"], case["short_ids"]]


@needs_bert_vocab
def test_bert_decodes_up_to_the_end_token() -> None:
    labels, _ = bert().targets(["A brown dog runs. It carries a stick."])
    assert bert().decode(labels[0].tolist()) == "a brown dog runs. it carries a stick."
    assert bert().decode([101, 1, 3899, 2, 3899]) == "dog"
    assert bert().decode([3899, 31_999]) == "dog"  # the head has more rows than the vocabulary has entries


def test_bpe_ids_are_those_of_stock_open_clip() -> None:
    stock = open_clip.tokenizer.SimpleTokenizer(context_length=80)
    assert torch.equal(bpe().text_ids(TEXTS, 80), stock(list(TEXTS)))


def test_bpe_puts_padding_in_the_pooled_slot() -> None:
    (ids,) = bpe().text_ids(["a dog"], 80).tolist()
    assert ids[0] == bpe().bos_id == 49406
    assert ids[3] == bpe().eos_id == 49407
    assert ids[4:] == [bpe().pad_id] * 76 == [0] * 76


def test_bpe_mask_counts_an_exclamation_mark_though_its_id_is_that_of_padding() -> None:
    assert bpe().pieces("!~") == [0, 349]
    labels, mask = bpe().targets(["!~", "a dog and"], 6)
    assert labels[0].tolist() == [0, 349, 49407, 0, 0, 0]
    assert mask.int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert bpe().text_ids(["!~"], 6).tolist() == [[49406, 0, 349, 49407, 0, 0]]


def test_over_long_targets_end_with_the_end_token_and_never_train_the_last_query() -> None:
    labels, mask = bpe().targets(["dog " * 300], 16)
    assert labels[0].tolist() == [*bpe().pieces("dog") * 14, bpe().eos_id, bpe().pad_id]
    assert mask.int().tolist() == [[1] * 15 + [0]]


def test_targets_have_128_slots_unless_told_otherwise() -> None:
    labels, mask = bpe().targets(["a dog", "a cat"])
    assert labels.shape == mask.shape == (2, 128)


def test_pieces_and_text_agree() -> None:
    text = "Two brown dogs; one bone!"
    assert bpe().num_tokens(text) == len(bpe().pieces(text))
    assert torch.equal(bpe().from_pieces([bpe().pieces(text)], 80), bpe().text_ids([text], 80))
    assert bpe().decode(bpe().pieces(text)) == "two brown dogs; one bone!"
    assert bpe().decode([bpe().bos_id, *bpe().pieces("a dog"), bpe().eos_id, 320]) == "a dog"


def test_what_a_caller_does_to_the_pieces_stays_with_him() -> None:
    bpe().pieces("a cat").append(7)
    assert 7 not in bpe().pieces("a cat")


def test_budget_is_what_fits_beside_the_special_tokens() -> None:
    pieces = bpe().pieces("dog " * 100)
    budget = bpe().budget(80)
    full = bpe().from_pieces([pieces[:budget]], 80)
    assert torch.equal(full, bpe().from_pieces([pieces], 80))
    assert not torch.equal(full, bpe().from_pieces([pieces[: budget - 1]], 80))


def test_a_tokenizer_travels_to_worker_processes() -> None:
    twin = pickle.loads(pickle.dumps(bpe()))
    assert torch.equal(twin.text_ids(TEXTS, 80), bpe().text_ids(TEXTS, 80))


@needs_bert_vocab
def test_a_bert_tokenizer_travels_to_worker_processes() -> None:
    twin = pickle.loads(pickle.dumps(bert()))
    assert torch.equal(twin.text_ids(TEXTS, 80), bert().text_ids(TEXTS, 80))


@pytest.mark.parametrize("path", [None, "no-such-vocab.txt"])
def test_a_missing_bert_vocabulary_is_said_with_what_to_do(path: str | None) -> None:
    with pytest.raises(UserError, match="vocab"):
        build_tokenizer("bert", path)
