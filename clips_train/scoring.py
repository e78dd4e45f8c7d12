"""Retrieval scores while a model is being trained, and how well it has learned a batch by heart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clips_train import distributed, encoders, parts, shards
from clips_train.batch import Batch
from clips_train.config import TrainConfig
from clips_train.encoders import Named
from clips_train.evals import run as evals
from clips_train.evals.retrieval import retrieval_scores
from clips_train.generate import Trained
from clips_train.model import build_model
from clips_train.objective import gathered
from clips_train.tokenizer import Tokenizer
from clips_train.use_config import EvalConfig

SPLIT = "heldout"


def held_out_scores(
    weights: Mapping[str, Tensor], config: TrainConfig, tokenizer: Tokenizer, split: shards.Split, device: torch.device
) -> dict[str, float]:
    """Recall at 1 both ways of a model with these weights, among ``config.eval_images`` of the split's images.

    A plain model is built for it: what training wraps, shards or compiles stays as it is.
    """
    model = build_model(config.model, sigmoid=config.contrastive == "sigmoid")
    model.load_state_dict(dict(weights))
    trained = Trained(config.model, model.to(device).eval(), tokenizer, device, Path())
    encoder = encoders.of_trained(trained, Named("the run in training", "run", "", None, ""))
    chosen = EvalConfig(split=split.name, max_samples=config.eval_images)
    scores = evals.retrieval_by_queries(encoder, split, chosen)[chosen.queries[0]]
    return {f"eval_{name}": scores[name] for name in ("image_to_text_r1", "text_to_image_r1", "num_images")}


@torch.no_grad()
def accuracy_of(trainee: Any, batch: Batch, config: TrainConfig, world: distributed.World) -> dict[str, float]:
    """Recall at 1 both ways within the batch of all processes, by the first text of the first view."""
    if not config.views:
        return {}
    plain = distributed.unwrapped(trainee)
    whole = config.model_copy(update={"accumulation": 1})
    targets = parts.Targets.of(batch, plain.num_tokens, whole, world).to(world.device)
    (part,) = parts.split(batch, whole, plain.layout, world.device)
    features = gathered(trainee(part, targets, with_captions=False)[0], world)
    image_NE, text_NE = features.image_NE.float(), features.views[0].text_NKE[:, 0].float()
    scores = retrieval_scores(image_NE, text_NE, torch.arange(len(image_NE), device=image_NE.device))
    return {f"batch_{name}": scores[name] for name in ("image_to_text_r1", "text_to_image_r1")}
