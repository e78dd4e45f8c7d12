"""The losses as pure functions (METHOD §2.2, §3; RECIPES §1.5).

Contrastive ones are of a global batch. ``rows`` are the samples whose share is asked for: the shares of slices that
cover the batch sum to the loss, and their gradients to its gradients, so that each process computes only its own. All
are computed in fp32 or better, whatever the autocast. Features are unit vectors, row i of each belongs to image i;
``scale`` is the exponentiated logit scale.

Shape suffixes: N samples, R of them in ``rows``, K texts of a view, M hard negatives, E embedding, F features of a
teacher, X columns, Y columns of a row's own; in the captioning loss B samples, Q slots of a target, D decoder width,
V vocabulary, C counted slots.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

SLOTS_ON_CPU, SLOTS_ON_GPU = 1024, 2048
"""Slots whose logits exist at the same time: at V = 50,000 in bf16 they take 100 and 200 MB. Fewer would add to the
head's gradient, which is as large, more often."""
SOFTMAX_SLOTS_ON_CPU = 64
"""Of them, slots whose logits exist in fp32: 13 MB at V = 50,000, so that they stay in the cache."""


def clips_contrastive_loss(image_NE: Tensor, web_NE: Tensor, short_NE: Tensor, scale: Tensor) -> Tensor:
    """Mean of two symmetric contrastive losses, image ↔ web caption and image ↔ short synthetic caption (METHOD §3).

    Captions of the two kinds are never negatives of each other.
    """
    return (contrastive_loss(image_NE, web_NE, scale) + contrastive_loss(image_NE, short_NE, scale)) / 2


def contrastive_loss(image_NE: Tensor, text_NE: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: the mean of image → text and text → image cross-entropy over the whole batch."""
    return view_loss(image_NE, text_NE.unsqueeze(1), scale)


def view_loss(
    image_NE: Tensor,
    text_NKE: Tensor,
    scale: Tensor,
    *,
    there_NK: Tensor | None = None,
    negatives_NME: Tensor | None = None,
    negatives_there_NM: Tensor | None = None,
    hardest: bool = False,
    gate_N: Tensor | None = None,
    rows: slice = slice(None),
) -> Tensor:
    """Softmax loss of the images and their K texts each, all of them positives (DreamLIP, FLAIR, DCI).

    With s the scaled similarity, the sum over samples i, divided by 2N, of::

        gate_i · mean over i's texts k of
            log(1 + Σ_{texts t of other images, own negatives n} exp(s(i, t) - s(i, k)))     image → text
          + log(1 + Σ_{other images j} exp(s(j, k) - s(i, k)))                               text → image

    Texts of one image are never negatives of each other. A hard negative counts against its own image only, and of
    these only the most similar one with ``hardest`` (HQ-CLIP, DCI). Texts and negatives that are not there have no
    effect, whatever their features. With one text each, and nothing else, this is ``contrastive_loss``.
    """
    with _full_precision(image_NE):
        image_NE, text_NKE = _exact(image_NE), _exact(text_NKE)
        num_samples, num_texts = text_NKE.shape[:2]
        weight_NK = image_NE.new_full((num_samples, num_texts), 1 / num_texts)
        if there_NK is not None:
            text_NKE = text_NKE.masked_fill(~there_NK.unsqueeze(2), 0)
            weight_NK = there_NK.to(image_NE.dtype) / there_NK.sum(dim=1, keepdim=True).clamp(min=1)
        if gate_N is not None:
            weight_NK = weight_NK * gate_N.unsqueeze(1)

        own_R = torch.arange(num_samples, device=image_NE.device)[rows].unsqueeze(1)
        scaled_RE = scale * image_NE[rows]
        logits_RX = scaled_RE @ text_NKE.flatten(0, 1).T
        if there_NK is not None:
            logits_RX = logits_RX.masked_fill(~there_NK.flatten(), _lowest(logits_RX))
        own_RK = own_R * num_texts + torch.arange(num_texts, device=own_R.device)
        positive_RK, others_R = _own_and_others(logits_RX, own_RK)
        if negatives_NME is not None and negatives_NME.shape[1] > 0:
            negative_RM = _negative_logits(scaled_RE, negatives_NME[rows], _rows(negatives_there_NM, rows), hardest)
            others_R = torch.cat([others_R.unsqueeze(1), negative_RM], dim=1).logsumexp(dim=1)
        to_text_RK = -functional.logsigmoid(positive_RK - others_R.unsqueeze(1))

        logits_XN = (scale * text_NKE[rows]).flatten(0, 1) @ image_NE.T
        positive_X1, others_X = _own_and_others(logits_XN, own_R.repeat_interleave(num_texts, dim=0))
        to_image_RK = -functional.logsigmoid(positive_X1.squeeze(1) - others_X).view_as(to_text_RK)
        return ((to_text_RK + to_image_RK) * weight_NK[rows]).sum() / (2 * num_samples)


def _own_and_others(logits_RX: Tensor, own_RY: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [R, Y] in each row's own columns, and the log-sum-exp [R] of the others."""
    positive_RY = logits_RX.gather(1, own_RY)
    return positive_RY, logits_RX.scatter(1, own_RY, _lowest(logits_RX)).logsumexp(dim=1)


def _negative_logits(scaled_RE: Tensor, negatives_RME: Tensor, there_RM: Tensor | None, hardest: bool) -> Tensor:
    """Logits [R, M], or [R, 1] of the hardest; as low as can be where there is no negative."""
    negatives_RME = _exact(negatives_RME)
    if there_RM is not None:
        negatives_RME = negatives_RME.masked_fill(~there_RM.unsqueeze(2), 0)
    logits_RM = torch.einsum("re,rme->rm", scaled_RE, negatives_RME)
    if there_RM is not None:
        logits_RM = logits_RM.masked_fill(~there_RM, _lowest(logits_RM))
    return logits_RM.max(dim=1, keepdim=True).values if hardest else logits_RM


def sigmoid_loss(
    image_NE: Tensor, text_NE: Tensor, scale: Tensor, bias: Tensor, *, rows: slice = slice(None)
) -> Tensor:
    """SigLIP's (arXiv 2303.15343): -1/N Σ_ij log σ(z_ij (scale · image_i · text_j + bias)), z_ii = 1, else -1.

    The share of ``rows`` holds the pairs of their images.
    """
    with _full_precision(image_NE):
        image_NE, text_NE = _exact(image_NE), _exact(text_NE)
        logits_RN = scale * image_NE[rows] @ text_NE.T + bias
        own_R1 = torch.arange(len(image_NE), device=image_NE.device)[rows].unsqueeze(1)
        wrong_RN = logits_RN.scatter(1, own_R1, -logits_RN.gather(1, own_R1))
        return -functional.logsigmoid(-wrong_RN).sum() / len(image_NE)


def distillation_loss(
    image_NE: Tensor,
    text_NE: Tensor,
    scale: Tensor,
    teacher_image_NF: Tensor,
    teacher_text_NF: Tensor,
    teacher_scale: float,
    *,
    rows: slice = slice(None),
) -> Tensor:
    """MobileCLIP's (arXiv 2311.17049): how far the student's picture of the batch is from the teacher's.

    The mean over samples and both ways, image → text and text → image, of KL(teacher's softmax over the batch ‖
    student's); 0 where they agree. The teacher gets no gradient.
    """
    with _full_precision(image_NE):
        student = _exact(image_NE), _exact(text_NE)
        teacher = _exact(teacher_image_NF.detach()), _exact(teacher_text_NF.detach())
        total = image_NE.new_zeros((), dtype=student[0].dtype)
        for one, other in ((0, 1), (1, 0)):
            log_student_RN = (scale * student[one][rows] @ student[other].T).log_softmax(dim=1)
            log_teacher_RN = (teacher_scale * teacher[one][rows] @ teacher[other].T).log_softmax(dim=1)
            total = total + functional.kl_div(log_student_RN, log_teacher_RN, reduction="sum", log_target=True)
        return total / (2 * len(image_NE))


def alip_gates(
    image_NE: Tensor, a_NE: Tensor, b_NE: Tensor, means_3: Tensor, *, decay: float = 0.99
) -> tuple[Tensor, Tensor, Tensor]:
    """ALIP's weights [N] of each sample in the loss of view a and in that of view b, and the new means (RECIPES §1.3).

    Three similarities are compared with their moving means over all batches so far, this one included: of the two
    texts, of image and a, of image and b; in ``means_3`` in this order, ones at the start. The gate of each is
    exp(similarity - mean)², at most 1; a view's weight is the texts' gate times its own. (ALIP's code caps a view's
    own gate by the texts' similarity instead of by its own, against its paper.) All of it is detached.
    """
    with torch.no_grad(), _full_precision(image_NE):
        image_NE, a_NE, b_NE = _exact(image_NE), _exact(a_NE), _exact(b_NE)
        similarity_N3 = torch.stack([(a_NE * b_NE).sum(1), (image_NE * a_NE).sum(1), (image_NE * b_NE).sum(1)], dim=1)
        means_3 = decay * means_3 + (1 - decay) * similarity_N3.mean(dim=0)
        texts_N, own_a_N, own_b_N = (similarity_N3 - means_3).exp().square().clamp(max=1).unbind(dim=1)
        return texts_N * own_a_N, texts_N * own_b_N, means_3


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
    states_CD, labels_C = states_BQD[counted], labels_BQ[counted]
    device = states_BQD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states_CD.dtype
    chunk = chunk or (SLOTS_ON_CPU if device == "cpu" else SLOTS_ON_GPU)
    wants_grad = torch.is_grad_enabled() and (states_CD.requires_grad or head_weight_VD.requires_grad)
    summed: Any = _ChunkedCrossEntropy.apply
    total: Tensor = summed(states_CD, head_weight_VD, labels_C, dtype, chunk, wants_grad)
    return total / max(1, len(labels_C) if num_counted is None else num_counted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy whose gradients are computed with the logits, chunk by chunk; backward only scales them.

    Every chunk uses the same memory, because on a CPU the first touch of fresh memory is slow. A softmax yields both
    residual and log-sum-exp: at the largest logit it is 1 / Σ exp(logit - largest).
    """

    @staticmethod
    def forward(
        ctx: Any,
        states_CD: Tensor,
        weight_VD: Tensor,
        labels_C: Tensor,
        dtype: torch.dtype,
        chunk: int,
        wants_grad: bool,
    ) -> Tensor:
        ctx.dtypes = states_CD.dtype, weight_VD.dtype
        exact = torch.promote_types(dtype, torch.float32)
        states_CD, labels_C1 = states_CD.to(dtype), labels_C.unsqueeze(1)
        weight = weight_VD.to(dtype)
        chunk = max(1, min(chunk, len(states_CD)))
        num_exact = min(chunk, SOFTMAX_SLOTS_ON_CPU) if states_CD.device.type == "cpu" else chunk
        logits_memory = states_CD.new_empty(chunk, len(weight))
        exact_memory, share_memory = states_CD.new_empty(2, num_exact, len(weight), dtype=exact)
        total = torch.zeros((), device=states_CD.device, dtype=exact)
        grad_states = torch.empty_like(states_CD, dtype=exact) if wants_grad else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if wants_grad else None
        product_VD = torch.empty_like(weight) if wants_grad else None
        with torch.autocast(states_CD.device.type, enabled=False):
            for start in range(0, len(states_CD), chunk):
                states = states_CD[start : start + chunk]
                labels = labels_C1[start : start + chunk]
                logits = torch.mm(states, weight.T, out=logits_memory[: len(states)])
                for logits_part, labels_part in zip(logits.split(num_exact), labels.split(num_exact), strict=True):
                    logit = exact_memory[: len(logits_part)].copy_(logits_part)
                    share = torch.softmax(logit, dim=1, out=share_memory[: len(logits_part)])
                    log_sum = logit.amax(dim=1, keepdim=True) - share.amax(dim=1, keepdim=True).log()
                    total += (log_sum - logit.gather(1, labels_part)).sum()
                    share.scatter_add_(1, labels_part, -torch.ones_like(log_sum))
                    logits_part.copy_(share)
                if grad_states is not None and grad_weight is not None:
                    residual = logits  # by now
                    grad_states[start : start + chunk] = residual @ weight
                    grad_weight += torch.mm(residual.T, states, out=product_VD)
        ctx.save_for_backward(grad_states, grad_weight)
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


def _full_precision(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.autocast(tensor.device.type, enabled=False)


def _exact(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _lowest(like: Tensor) -> float:
    """Whose exponential is 0 beside any logit. Infinity would do so too, but where nothing else is summed its gradient
    is not a number."""
    return torch.finfo(like.dtype).min / 2


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]
