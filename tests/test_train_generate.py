"""The captioner's decoding."""

from __future__ import annotations

from pathlib import Path

import pytest
import shardmaker
import torch

from clips_data.errors import UserError
from clips_train import generate, transforms
from clips_train.config import ModelConfig, TrainConfig
from clips_train.generate import Trained, caption_images, decode_slots
from clips_train.model import build_model
from clips_train.tokenizer import build_tokenizer
from clips_train.train import train

EOS = 2


def states_that_say(ids: list[list[int]], vocabulary: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """States whose likeliest tokens under an identity head are ``ids``."""
    return torch.nn.functional.one_hot(torch.tensor(ids), vocabulary).float(), torch.eye(vocabulary)


@pytest.mark.parametrize("slots_per_pass", [1, 2, 3, 16])
def test_each_slot_gives_its_likeliest_token_until_the_end_token(
    slots_per_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "SLOTS_PER_PASS", slots_per_pass)
    ids = [[5, 6, EOS, 7, 8, EOS], [EOS, 5, 5, 5, 5, 5], [3, 4, 5, 6, 7, 8], [4, 4, 4, 4, 4, EOS]]
    found = decode_slots(*states_that_say(ids), EOS)
    assert found == [[5, 6], [], [3, 4, 5, 6, 7, 8], [4, 4, 4, 4, 4]]


def trained_model(**change: object) -> Trained:
    config = ModelConfig(size="tiny", image_px=16, context_length=12, target_length=8, **change)
    tokenizer = build_tokenizer("bpe")
    return Trained(config, build_model(config).eval(), tokenizer, torch.device("cpu"), Path("run"))


def pixels(number: int) -> torch.Tensor:
    image, _ = shardmaker.sample(number)
    return transforms.squash(transforms.decode(image, 16), 16)


def test_a_caption_depends_on_its_own_image_and_web_caption_only() -> None:
    trained = trained_model()
    light, dark = pixels(4), 255 - pixels(4)
    together = caption_images(trained, torch.stack([light, dark, light]), ["one", "one", "seven " * 9])
    for image, web, caption in (
        (light, "one", together[0]),
        (dark, "one", together[1]),
        (light, "seven " * 9, together[2]),
    ):
        assert caption_images(trained, image.unsqueeze(0), [web]) == [caption]
    assert len(set(together)) == 3


def test_a_model_without_captioner_says_so() -> None:
    with pytest.raises(UserError, match="no captioner"):
        caption_images(trained_model(decoder=False), pixels(0).unsqueeze(0), ["one"])


def test_a_trained_captioner_says_what_all_captions_say(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    shards = shardmaker.write_shards(tmp_path / "shards", num_heldout=0)
    config = TrainConfig(
        size="tiny", image_px=16, context_length=8, target_length=20, batch=8, samples=400, lr=2e-3,
        warmup_samples=40, augment="none", caption_negatives=50, log_steps=50,
    )  # fmt: skip
    train(config, shards=shards, out=tmp_path / "run", quiet=True)
    trained = generate.load_trained(tmp_path / "run", "cpu")
    captions = caption_images(trained, torch.stack([pixels(n) for n in range(4)]), ["red circle photo 0"] * 4)
    for caption in captions:
        assert caption.startswith("there is a") and caption.endswith("the ground is gray."), caption
