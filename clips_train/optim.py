"""AdamW as the authors' code sets it up, its learning rate (METHOD §6), and a moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

EMBEDDINGS = ("token_embedding.weight", "positional_embedding", "class_embedding", "decoder.queries")


def kernels(model: nn.Module) -> list[nn.Parameter]:
    """Trained weights of linear maps and convolutions, projections and head included.

    Everything else (embeddings, positions, class token, queries, norms, biases, logit scale) is never decayed.
    """
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim >= 2 and not name.endswith(EMBEDDINGS)
    ]


def build_optimizer(model: nn.Module, *, weight_decay: float, beta1: float, beta2: float) -> torch.optim.AdamW:
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


@torch.no_grad()
def clip_gradient(parameters: Iterable[nn.Parameter], norm: float, largest: float) -> None:
    """Scales the gradient, whose whole norm is ``norm``, down to a norm of ``largest``."""
    if norm > largest:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], largest / norm)


class MovingAverage:
    """An exponential moving average of a model's trained weights, fp32, in the shards that the model has them in."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step: average = decay · average + (1 - decay) · weights."""
        trained = [parameter.detach() for parameter in self._trained.values()]
        torch._foreach_lerp_(list(self.weights.values()), trained, 1 - self._decay)
