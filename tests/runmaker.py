"""Writes the folder of a training run whose weights nobody trained: enough for everything that uses a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from clips_data.schema import SCHEMA_VERSION
from clips_train.config import TrainConfig
from clips_train.model import build_model

SMALL = {"size": "tiny", "image_px": 16, "context_length": 12, "target_length": 12, "batch": 8}


def write_run(folder: Path, *, seed: int = 0, spread: float = 1.0, **change: Any) -> Path:
    """A run with one checkpoint of step 0. ``spread`` widens the head's weights: the likeliest token differs more."""
    config = TrainConfig(**{**SMALL, **change})
    checkpoint = folder / "checkpoints" / "step-00000000"
    checkpoint.mkdir(parents=True)
    model = build_model(config.model, seed=seed, sigmoid=config.contrastive == "sigmoid")
    if model.decoder is not None:
        model.decoder.head.weight.data *= spread
    weights: dict[str, torch.Tensor] = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(weights, checkpoint / "model.safetensors")
    about = {
        "schema_version": SCHEMA_VERSION,
        "step": 0,
        "samples": 0,
        "progress": {},
        "config": config.model_dump(mode="json"),
    }
    (checkpoint / "checkpoint.json").write_text(json.dumps(about))
    (folder / "checkpoints" / "latest").write_text(checkpoint.name + "\n")
    return folder
