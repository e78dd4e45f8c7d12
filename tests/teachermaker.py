"""Stores features of a teacher that needs no model, for tests of what the data side does with them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from clips_train import encoders
from clips_train.embed import Embedded, embed
from clips_train.use_config import EmbedConfig

NAME = "fake"


class FakeTeacher:
    """Says how bright images and how long texts are."""

    image_px, width = 8, 2
    about: ClassVar[dict[str, Any]] = {"model": NAME, "digest": NAME, "image_px": 8, "width": 2, "logit_scale": 1.0}

    def image_features(self, pixels_NCHW: Tensor) -> Tensor:
        return pixels_NCHW.float().mean(dim=(2, 3))[:, :2]

    def text_features(self, texts: list[str]) -> Tensor:
        return torch.tensor([[len(text), sum(text.encode())] for text in texts]).float()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "find", lambda *given: [argparse.Namespace(digest=NAME)])
    monkeypatch.setattr(encoders, "load", lambda *given: FakeTeacher())


def store(work: Path, out: Path | None = None, **given: Any) -> Embedded:
    """Of both splits, so of every training tar. Counts are of the held-out one."""
    files, made, skipped = [], 0, 0
    for name in ("train", "heldout"):
        config = EmbedConfig(**{"split": name, "num_augmentations": 2, "precision": "fp32", **given})
        done = embed(
            config,
            shards=work / "shards",
            out=out or work / "embeddings" / "teacher",
            runs=work / "runs",
            quiet=True,
        )
        files, made, skipped = files + done.files, made + done.made, skipped + done.skipped
    return Embedded(files, made, skipped, done.counts)
