"""The engine that runs a captioner of our own training."""

from __future__ import annotations

from pathlib import Path

import pytest
import shardmaker
import torch

from clips_data.errors import UserError
from clips_data.recaption.clips import SPECIAL_TOKENS, BuildClips, ClipsEngine
from clips_data.recaption.engine_process import EngineProcess
from clips_data.recaption.engines import Answer, Decoding, Request
from clips_train import generate, transforms
from clips_train.config import TrainConfig
from clips_train.tokenizer import build_tokenizer
from clips_train.train import train

TARGET_LENGTH = 12


def trained(folder: Path, *, decoder: bool = True) -> Path:
    """A run of two steps, in the folder that ``clips train`` makes."""
    torch.set_num_threads(1)
    shards = shardmaker.write_shards(folder / "shards", num_heldout=0)
    config = TrainConfig(
        size="tiny", image_px=16, context_length=12, target_length=TARGET_LENGTH, batch=8, samples=16, augment="none",
        caption_negatives=50, decoder=decoder, caption_weight=2.0 if decoder else 0.0,
    )  # fmt: skip
    train(config, shards=shards, out=folder / "runs" / "first", quiet=True)
    return folder / "runs" / "first"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("clips"))


def asked(number: int, web: str | None = None, **change: object) -> Request:
    image, about = shardmaker.sample(number)
    return Request(**{"image": image, "system": None, "user": web or about["web"], "seed": number, **change})  # type: ignore[arg-type]


def test_captions_are_those_of_clips_caption_whatever_the_batch(run: Path) -> None:
    requests = [asked(number, "seven words are in this web caption" if number % 2 else None) for number in range(9)]
    model = generate.load_trained(run, "cpu")
    pixels = [transforms.squash(transforms.decode(shardmaker.sample(number)[0], 16), 16) for number in range(9)]
    expected = generate.caption_images(model, torch.stack(pixels), [request.user for request in requests])
    for batch in (2, 64):
        engine = ClipsEngine(BuildClips(str(run), max_batch_rows=batch, device="cpu"))
        answers: dict[int, Answer] = {}
        for number, request in enumerate(requests):
            engine.add(number, request)
        while len(answers) < len(requests):
            ready = engine.step()
            assert len(ready) == min(batch, len(requests) - len(answers))
            answers |= dict(ready)
        assert [answers[number].text for number in range(9)] == expected
    assert len(set(expected)) > 1


def test_tokens_are_counted_and_a_caption_that_fills_all_slots_was_cut(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ClipsEngine(BuildClips(str(run), device="cpu"))
    for ids, expected in (([320, 321, 322], ("stop", 3)), ([320] * TARGET_LENGTH, ("length", TARGET_LENGTH))):
        monkeypatch.setattr(generate, "decode_slots", lambda *_, ids=ids: [ids])
        [answer] = engine.answer([asked(0, "red circle photo")])
        assert (answer.finish_reason, answer.num_tokens) == expected
        assert (answer.code, answer.num_prompt_tokens) == ("ok", 3)


def test_seeds_and_decoding_settings_make_no_difference(run: Path) -> None:
    engine = ClipsEngine(BuildClips(str(run), device="cpu"))
    cold, hot = engine.answer([asked(0), asked(0, seed=9, decoding=Decoding(temperature=2.0, max_tokens=1))])
    assert cold == hot


def test_bytes_that_are_no_image_are_told_and_the_rest_is_captioned(run: Path) -> None:
    engine = ClipsEngine(BuildClips(str(run), device="cpu"))
    codes = [answer.code for answer in engine.answer([asked(0), asked(1, image=b"none"), asked(2)])]
    assert codes == ["ok", "unreadable_image", "ok"]
    assert [answer.code for answer in engine.answer([asked(1, image=b"none")])] == ["unreadable_image"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "a prompt without image"),
        ({"system": "Be brief."}, "a system text"),
        ({"shape": {"type": "object"}}, "several outputs"),
    ],
)
def test_what_it_cannot_do_is_said(run: Path, change: dict[str, object], message: str) -> None:
    engine = ClipsEngine(BuildClips(str(run), device="cpu"))
    with pytest.raises(UserError, match=f"cannot serve {message}.*inputs"):
        engine.add(0, asked(0, **change))


def test_a_run_without_checkpoint_or_captioner_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        ClipsEngine(BuildClips(str(tmp_path), device="cpu"))
    with pytest.raises(UserError, match="has no captioner"):
        ClipsEngine(BuildClips(str(trained(tmp_path, decoder=False)), device="cpu"))


def test_it_serves_from_a_child_process_with_its_own_checkpoint_folder(run: Path, tmp_path: Path) -> None:
    [checkpoint] = (run / "checkpoints").glob("step-*")
    engine = EngineProcess(BuildClips(str(checkpoint)), log=tmp_path / "engine.log", deadline_s=120)
    try:
        engine.start()
        assert engine.about["special_tokens"] == SPECIAL_TOKENS["bpe"]
        assert [answer.code for answer in engine.answer([asked(0), asked(1)])] == ["ok", "ok"]
    finally:
        engine.close()


def test_the_tokens_that_must_not_stand_in_a_text_are_those_that_the_tokenizer_knows(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text(
        "\n".join(["[PAD]", *(f"[unused{n}]" for n in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])
    )
    for kind, tokenizer in (("bpe", build_tokenizer("bpe")), ("bert", build_tokenizer("bert", str(vocab)))):
        for token in SPECIAL_TOKENS[kind]:
            assert len(tokenizer.pieces(token)) == 1, token
