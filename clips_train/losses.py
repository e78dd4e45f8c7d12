"""The losses of CLIPS as pure functions (METHOD §2.2, §3).

Shape suffixes: B samples, E embedding, Q slots of a target, D decoder width, V vocabulary, N counted slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ON_CPU, CHUNK_ON_GPU = 128, 2048
"""Slots whose logits exist at the same time; at V = 50,000 they take 26 and 410 MB in fp32. On a CPU small ones are
twice as fast: they stay in the cache."""


def clips_contrastive_loss(image_BE: Tensor, web_BE: Tensor, short_BE: Tensor, scale: Tensor) -> Tensor:
    """Mean of two symmetric contrastive losses, image ↔ web caption and image ↔ short synthetic caption (METHOD §3).

    Features are unit vectors, row i of each belongs to image i, ``scale`` is the exponentiated logit scale. Captions of
    the two kinds are never negatives of each other.
    """
    return (contrastive_loss(image_BE, web_BE, scale) + contrastive_loss(image_BE, short_BE, scale)) / 2


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: the mean of image → text and text → image cross-entropy, in fp32 whatever the autocast."""
    with torch.autocast(image_BE.device.type, enabled=False):
        logits_BB = scale.float() * image_BE.float() @ text_BE.float().T
        target = torch.arange(len(logits_BB), device=logits_BB.device)
        return (functional.cross_entropy(logits_BB, target) + functional.cross_entropy(logits_BB.T, target)) / 2


def caption_loss(
    states_BQD: Tensor,
    head_weight_VD: Tensor,
    labels_BQ: Tensor,
    mask_BQ: Tensor,
    *,
    chunk: int | None = None,
    num_counted: int | None = None,
) -> Tensor:
    """Cross-entropy averaged over the counted slots of the whole batch; 0 when none counts (METHOD §2.2).

    Slots that do not count never reach the head, and logits exist for ``chunk`` slots at a time (by default as many as
    suit the device). The product with the head runs in the autocast dtype, the log-sum-exp in fp32. Where this is one
    part of a batch (a micro-batch, a rank), ``num_counted`` is the number of counted slots in all of it: the parts'
    losses then sum to the batch's.
    """
    counted = mask_BQ.bool()
    states_ND, labels_N = states_BQD[counted], labels_BQ[counted]
    device = states_BQD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_ND.dtype
    chunk = chunk or (CHUNK_ON_CPU if device == "cpu" else CHUNK_ON_GPU)
    wants_grad = torch.is_grad_enabled() and (states_ND.requires_grad or head_weight_VD.requires_grad)
    summed: Any = _ChunkedCrossEntropy.apply
    total: Tensor = summed(states_ND, head_weight_VD, labels_N, dtype, chunk, wants_grad)
    return total / max(1, len(labels_N) if num_counted is None else num_counted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy whose gradients are computed with the logits, chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        dtype: torch.dtype,
        chunk: int,
        wants_grad: bool,
    ) -> Tensor:
        with torch.autocast(states_ND.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            total = torch.zeros((), device=states_ND.device)
            grad_states = torch.empty_like(states_ND, dtype=torch.float32) if wants_grad else None
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wants_grad else None
            for start in range(0, len(labels_N), chunk):
                states = states_ND[start : start + chunk].to(dtype)
                labels = labels_N[start : start + chunk, None]
                logits = (states @ weight.T).float()
                log_sum = logits.logsumexp(dim=-1, keepdim=True)
                total += (log_sum - logits.gather(1, labels)).sum()
                if grad_states is not None and grad_weight is not None:
                    residual = logits.sub_(log_sum).exp_()
                    residual.scatter_add_(1, labels, -torch.ones_like(log_sum))
                    residual = residual.to(dtype)
                    grad_states[start : start + chunk] = residual @ weight
                    grad_weight += residual.T @ states
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.dtypes = states_ND.dtype, weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_total,) = grad_outputs
        grad_states, grad_weight = ctx.saved_tensors
        states_dtype, weight_dtype = ctx.dtypes
        return (
            (grad_states * grad_total).to(states_dtype),
            (grad_weight * grad_total).to(weight_dtype),
            None,
            None,
            None,
            None,
        )
