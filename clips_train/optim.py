"""AdamW as the authors' code sets it up, and its learning rate (METHOD §6)."""

from __future__ import annotations

import math

import torch
from torch import nn

from clips_train.model import ClipsModel


def kernels(model: ClipsModel) -> list[nn.Parameter]:
    """Trained weights of linear maps and convolutions, projections and head included.

    Everything else (embeddings, positions, class token, queries, norms, biases, logit scale) is never decayed.
    """
    embeddings = {"token_embedding.weight", "positional_embedding", "class_embedding"}
    chosen = []
    for name, parameter in model.named_parameters():
        is_embedding = any(name.endswith(known) for known in embeddings) or name.endswith("decoder.queries")
        if parameter.requires_grad and parameter.ndim >= 2 and not is_embedding:
            chosen.append(parameter)
    return chosen


def build_optimizer(model: ClipsModel, *, weight_decay: float, beta1: float, beta2: float) -> torch.optim.AdamW:
    """AdamW with decay on the kernels only. The learning rate is set before each step."""
    decayed = kernels(model)
    ids = {id(parameter) for parameter in decayed}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=1e-8, fused=True)


def learning_rate(step: int, *, num_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up to ``peak``, then a cosine to 0 at ``num_steps``. ``step`` counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
