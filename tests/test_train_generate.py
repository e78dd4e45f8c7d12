"""The captioner at work: what it reads, and that its cache and its batches change nothing."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import runmaker
import shardmaker
import torch
from torch import Tensor

from clips_data.errors import UserError
from clips_train import generate, search, transforms
from clips_train.config import TrainConfig
from clips_train.decoding import GREEDY, Decoding
from clips_train.generate import Caption, Trained, caption_images, captions
from clips_train.model import build_model
from clips_train.tokenizer import build_tokenizer
from clips_train.train import train

TEACHER_FORCED = {"decoder": "teacher_forced"}
TOP_P = Decoding(strategy="top_p", temperature=1.5, top_p=0.95, seed=5)
BEAM = Decoding(strategy="beam", beams=3)
WEBS = ["one", "", "seven " * 9, "a red circle", "one"]
KEYS = ["a", "b", "c", "d", "e"]


@functools.cache
def trained_model(**change: object) -> Trained:
    """An untrained model whose head is spread out, so that texts and images make a difference."""
    config = TrainConfig(**{**runmaker.SMALL, **change})  # type: ignore[arg-type]
    model = build_model(config.model).eval()
    if model.decoder is not None:
        model.decoder.head.weight.data *= 8
    where = torch.device("cpu")
    return Trained(config.model, model, build_tokenizer("bpe"), where, Path("run"), config.condition_drop)


def pixels(number: int) -> Tensor:
    image, _ = shardmaker.sample(number)
    return transforms.squash(transforms.decode(image, 16), 16)


def images() -> Tensor:
    return torch.stack([pixels(4), 255 - pixels(4), pixels(4), pixels(9), pixels(17)])


def alike(found: Sequence[Caption], expected: Sequence[Caption]) -> None:
    """Equal but for the rounding of the sum."""
    for one, other in zip(found, expected, strict=True):
        assert dataclasses.replace(one, log_probability=0.0) == dataclasses.replace(other, log_probability=0.0)
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-3)


class Recomputing:
    """A ``search.Writer`` that runs the whole parallel pass, as in training, for every token."""

    def __init__(self, trained: Trained, patch_tokens: Tensor, states: Tensor | None, mask: Tensor | None) -> None:
        self.model = trained.model
        self.condition = [patch_tokens, states, mask]
        self.inputs_BQ = torch.zeros(len(patch_tokens), 0, dtype=torch.long)

    def next(self, ids_B: Tensor) -> Tensor:
        self.inputs_BQ = torch.cat([self.inputs_BQ, ids_B[:, None]], dim=1)
        image, states, mask = self.condition
        assert self.model.decoder is not None and image is not None
        return self.model.decoder.head(self.model.caption_states(image, states, self.inputs_BQ, mask)[:, -1])

    def keep(self, rows_R: Tensor) -> None:
        self.inputs_BQ = self.inputs_BQ[rows_R]
        self.condition = [None if part is None else part[rows_R] for part in self.condition]


@torch.inference_mode()
def recomputed(trained: Trained, decoding: Decoding) -> list[Caption]:
    _, patch_tokens = trained.model.encode_image(transforms.normalise(images()))
    states, mask = trained.encode_texts(WEBS)[1:] if trained.reads_text else (None, None)
    found = search.write(
        Recomputing(trained, patch_tokens, states, mask),
        start_id=trained.tokenizer.bos_id,
        end_id=trained.tokenizer.eos_id,
        keys=KEYS,
        max_tokens=generate.most_tokens(trained, decoding),
        decoding=decoding,
    )
    return [generate._caption(trained.tokenizer, one) for one in found]


# --- cache and batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", [GREEDY, TOP_P, BEAM], ids=lambda decoding: decoding.strategy)
@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
@pytest.mark.parametrize(
    "reads", [{"condition": None}, {"text_padding": "trimmed"}, {}], ids=["image", "trimmed", "both"]
)
def test_captions_from_the_cache_are_those_of_the_whole_pass(
    reads: dict[str, object], fusion: str, decoding: Decoding
) -> None:
    trained = trained_model(fusion=fusion, **TEACHER_FORCED, **reads)
    found = captions(trained, images(), WEBS, decoding=decoding, keys=KEYS)
    alike(found, recomputed(trained, decoding))
    assert len({one.text for one in found}) > 2


@pytest.mark.parametrize(
    "change",
    [{"decoder": "queries"}, {"decoder": "queries", "text_padding": "trimmed"}, {**TEACHER_FORCED},
     {**TEACHER_FORCED, "text_padding": "trimmed"}],
    ids=["queries", "queries trimmed", "teacher forced", "teacher forced trimmed"],
)  # fmt: skip
@pytest.mark.parametrize("decoding", [GREEDY, TOP_P, BEAM], ids=lambda decoding: decoding.strategy)
def test_a_caption_depends_on_its_own_image_web_caption_and_key_only(
    change: dict[str, object], decoding: Decoding
) -> None:
    if change["decoder"] == "queries" and decoding != GREEDY:
        pytest.skip("decodes greedily only")
    trained = trained_model(**change)
    together = captions(trained, images(), WEBS, decoding=decoding, keys=KEYS)
    alone = [
        captions(trained, image[None], [web], decoding=decoding, keys=[key])[0]
        for image, web, key in zip(images(), WEBS, KEYS, strict=True)
    ]
    alike(together, alone)
    order = [3, 0, 4, 2, 1]
    again = captions(
        trained, images()[order], [WEBS[n] for n in order], decoding=decoding, keys=[KEYS[n] for n in order]
    )
    alike(again, [together[n] for n in order])


@pytest.mark.parametrize("decoder", ["queries", "teacher_forced"])
def test_how_a_caption_ended_is_told(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_model(decoder=decoder, condition=None)
    plain = captions(trained, images())
    most = generate.most_tokens(trained)
    assert {one.finish for one in plain} == {"length"} and {one.num_tokens for one in plain} == {most}
    # What the second caption says in its fifth place ends a caption from now on.
    monkeypatch.setattr(trained.tokenizer, "eos_id", plain[1].ids[4])
    for one, before in zip(captions(trained, images()), plain, strict=True):
        end = before.ids.index(plain[1].ids[4]) if plain[1].ids[4] in before.ids else most
        assert one.ids == before.ids[:end] and one.finish == ("stop" if end < most else "length")
        assert before.log_probability <= one.log_probability < 0
        assert one.text == trained.tokenizer.decode(one.ids)


@pytest.mark.parametrize("decoder", ["queries", "teacher_forced"])
def test_no_more_tokens_than_were_trained_and_asked(decoder: str) -> None:
    """A target's start token has no slot of its own, so the last slot is never trained."""
    trained = trained_model(decoder=decoder, target_length=10)
    for asked, most in ((0, 9), (4, 4), (400, 9)):
        found = captions(trained, images(), WEBS, decoding=Decoding(max_tokens=asked))
        assert max(one.num_tokens for one in found) == most
        assert all((one.finish == "length") == (one.num_tokens == most) for one in found)


def test_fewer_slots_of_queries_are_the_first_ones() -> None:
    trained = trained_model(decoder="queries")
    whole = captions(trained, images(), WEBS)
    cut = captions(trained, images(), WEBS, decoding=Decoding(max_tokens=4))
    assert [one.ids for one in cut] == [one.ids[:4] for one in whole]


# --- what it reads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["queries", "teacher_forced"])
def test_a_captioner_of_the_image_alone_passes_over_texts(decoder: str) -> None:
    trained = trained_model(decoder=decoder, condition=None)
    assert not trained.reads_text and not trained.needs_text
    alike(captions(trained, images(), WEBS), captions(trained, images()))
    assert captions(trained, images())[0] != captions(trained, images())[1]


@pytest.mark.parametrize("decoder", ["queries", "teacher_forced"])
def test_no_text_is_the_empty_text(decoder: str) -> None:
    trained = trained_model(decoder=decoder)
    alike(captions(trained, images()), captions(trained, images(), [""] * 5))
    assert captions(trained, images()) != captions(trained, images(), WEBS)


def test_a_captioner_that_never_lacked_its_text_is_told_when_it_does() -> None:
    assert generate.missing_text(trained_model(), ["a", "b"]) is None
    assert generate.missing_text(trained_model(condition=None), [""]) is None
    assert generate.missing_text(trained_model(condition_drop=0.1), [""]) is None
    warning = generate.missing_text(trained_model(), ["a", " "])
    assert warning is not None and "never trained without" in warning


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_without_captioner_says_so() -> None:
    with pytest.raises(UserError, match="no captioner"):
        caption_images(trained_model(decoder="none", caption_weight=0), images()[:1], ["one"])


@pytest.mark.parametrize("decoding", [TOP_P, BEAM, Decoding(repetition_penalty=1.2)], ids=["top_p", "beam", "penalty"])
def test_slots_that_never_see_each_other_are_only_decoded_greedily(decoding: Decoding) -> None:
    with pytest.raises(UserError, match=r"never see each other's words.*teacher_forced"):
        captions(trained_model(decoder="queries"), images(), WEBS, decoding=decoding, keys=KEYS)


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    run = runmaker.write_run(tmp_path / "run", spread=8.0, condition_drop=0.25, contrastive="sigmoid", **TEACHER_FORCED)
    trained = generate.load_trained(run, "cpu")
    assert trained.condition_drop == 0.25 and trained.reads_text and not trained.needs_text
    alike(captions(trained, images(), WEBS), captions(trained_model(**TEACHER_FORCED), images(), WEBS))


def test_a_config_of_another_version_is_a_sentence(tmp_path: Path) -> None:
    run = runmaker.write_run(tmp_path / "run")
    [path] = run.glob("checkpoints/*/checkpoint.json")
    about = json.loads(path.read_text())
    about["config"]["telepathy"] = True
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match="another version of clips: telepathy"):
        generate.load_trained(run, "cpu")


# --- trained ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", ["queries", "teacher_forced"])
def test_a_trained_captioner_says_what_all_captions_say(decoder: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    shards = shardmaker.write_shards(tmp_path / "shards", num_heldout=0)
    config = TrainConfig(
        size="tiny", image_px=16, context_length=8, target_length=20, batch=8, samples=400, lr=2e-3,
        warmup_samples=40, augment="none", caption_negatives=50, log_steps=50, decoder=decoder,
    )  # fmt: skip
    train(config, shards=shards, out=tmp_path / "run", quiet=True)
    trained = generate.load_trained(tmp_path / "run", "cpu")
    found = caption_images(trained, torch.stack([pixels(n) for n in range(4)]), ["red circle photo 0"] * 4)
    for caption in found:
        assert caption.startswith("there is a") and caption.endswith("the ground is gray."), caption
