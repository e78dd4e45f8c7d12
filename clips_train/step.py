"""One step of CLIPS: losses and gradients of a batch, at once or in micro-batches with the same result.

Each image is encoded once. Web captions and short synthetic captions go through the text tower together, as one batch
[web; short]; the halves are parted before anything else, and stay parted under accumulation.

Shape suffixes: N samples, C channels, H and W pixels, E embedding, L text slots, Q target slots, T text states,
P patches, K captioned samples, C candidate tokens, V vocabulary, D decoder width.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clips_data import draws
from clips_train import transforms
from clips_train.config import TrainConfig
from clips_train.data import Batch
from clips_train.losses import caption_loss, clips_contrastive_loss
from clips_train.model import ClipsModel


@dataclass(frozen=True)
class Losses:
    """Of one step: the two parts before weighting, and their weighted sum."""

    total: float
    contrastive: float
    caption: float


@dataclass(frozen=True)
class Part:
    """A batch or micro-batch on the device. Images are floats, normalised."""

    image_NCHW: Tensor
    text_2NL: Tensor
    captioned_K: Tensor
    """int64, rows of the part whose captions train the captioner; labels and mask are of these rows."""
    labels_KQ: Tensor
    mask_KQ: Tensor


@dataclass(frozen=True)
class Encoded:
    """What the towers make of a part: unit features, and the tokens that condition the captioner."""

    image_NE: Tensor
    web_NE: Tensor
    short_NE: Tensor
    patch_tokens_NPW: Tensor
    web_states_NTW: Tensor

    @property
    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.image_NE, self.web_NE, self.short_NE


@dataclass(frozen=True)
class Targets:
    """What the captioning loss of a whole batch is taken over, the same for all its micro-batches.

    With ``caption_negatives`` the softmax runs over ``candidates_C``: first the ``num_used`` tokens that the batch's
    captions use, sorted, then tokens drawn from all others. Each drawn one stands for many, so the logarithm of that
    number is added to its logit: the sum of exponentials then estimates that over the whole vocabulary.
    """

    num_counted: int
    candidates_C: Tensor | None = None
    correction_C: Tensor = field(default_factory=lambda: torch.empty(0))
    num_used: int = 0

    @classmethod
    def of(cls, batch: Batch, model: ClipsModel, config: TrainConfig) -> Targets:
        every = slice(None, None, config.caption_every)
        num_counted = int(batch.mask_NQ[every].sum())
        if model.decoder is None or config.caption_negatives == 0:
            return cls(num_counted)
        num_tokens = len(model.decoder.head.weight)
        used_U = torch.unique(batch.labels_NQ[every][batch.mask_NQ[every]])
        unused = torch.ones(num_tokens, dtype=torch.bool)
        unused[used_U] = False
        others = unused.nonzero().squeeze(1)
        seed = draws.integer(
            1 << 62, config.seed, "caption_negatives", batch.state["epoch"], str(batch.state["position"])
        )
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        drawn = others[order[: config.caption_negatives]]
        correction_C = torch.zeros(len(used_U) + len(drawn))
        correction_C[len(used_U) :] = math.log(len(others) / max(1, len(drawn)))
        return cls(num_counted, torch.cat([used_U, drawn]), correction_C, len(used_U))

    def to(self, device: torch.device) -> Targets:
        if self.candidates_C is None:
            return self
        return replace(self, candidates_C=self.candidates_C.to(device), correction_C=self.correction_C.to(device))


def backward(model: ClipsModel, batch: Batch, config: TrainConfig, device: torch.device) -> Losses:
    """Adds the batch's gradients to the parameters. With ``accumulation`` > 1 memory is that of one micro-batch."""
    parts = split(batch, config, device)
    targets = Targets.of(batch, model, config).to(device)
    if len(parts) == 1:
        contrastive, caption = _losses(model, parts[0], config, targets)
        total = config.contrastive_weight * contrastive + config.caption_weight * caption
        torch.autograd.backward(total)
        return Losses(total.item(), contrastive.item(), caption.item())
    return _backward_in_parts(model, parts, config, targets)


def split(batch: Batch, config: TrainConfig, device: torch.device) -> list[Part]:
    """Micro-batches of equal size, each with the web and short texts of its own images."""
    rows = len(batch.keys) // config.accumulation
    captioned_N = torch.arange(len(batch.keys)) % config.caption_every == 0
    parts = []
    for start in range(0, len(batch.keys), rows):
        at = slice(start, start + rows)
        captioned_K = captioned_N[at].nonzero().squeeze(1)
        parts.append(
            Part(
                image_NCHW=transforms.normalise(batch.image_NCHW[at].to(device, non_blocking=True)),
                text_2NL=torch.cat([batch.web_NL[at], batch.short_NL[at]]).to(device, non_blocking=True),
                captioned_K=captioned_K.to(device, non_blocking=True),
                labels_KQ=batch.labels_NQ[at][captioned_K].to(device, non_blocking=True),
                mask_KQ=batch.mask_NQ[at][captioned_K].to(device, non_blocking=True),
            )
        )
    return parts


def encode(model: ClipsModel, part: Part) -> Encoded:
    image_NE, patch_tokens_NPW = model.encode_image(part.image_NCHW)
    text_2NE, states_2NTW = model.encode_text(part.text_2NL)
    web_NE, short_NE = text_2NE.chunk(2)
    return Encoded(image_NE, web_NE, short_NE, patch_tokens_NPW, states_2NTW.chunk(2)[0])


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _losses(model: ClipsModel, part: Part, config: TrainConfig, targets: Targets) -> tuple[Tensor, Tensor]:
    with autocast(config, part.image_NCHW.device):
        encoded = encode(model, part)
        contrastive = clips_contrastive_loss(*encoded.features, model.logit_scale.exp())
        return contrastive, _caption_loss(model, encoded, part, targets)


def _caption_loss(model: ClipsModel, encoded: Encoded, part: Part, targets: Targets) -> Tensor:
    """The part's share of the batch's mean over counted slots; 0 without a captioner."""
    if model.decoder is None or len(part.captioned_K) == 0:
        return encoded.image_NE.new_zeros(())
    rows_K = part.captioned_K
    states_KQD = model.caption_states(encoded.patch_tokens_NPW[rows_K], encoded.web_states_NTW[rows_K])
    weight_VD, labels_KQ = model.decoder.head.weight, part.labels_KQ
    if targets.candidates_C is not None:
        # A candidate's correction is added to its logits as one more column, which meets a one in every state.
        states_KQD = torch.cat([states_KQD, torch.ones_like(states_KQD[..., :1])], dim=-1)
        weight_VD = torch.cat([weight_VD[targets.candidates_C], targets.correction_C.unsqueeze(1)], dim=1)
        labels_KQ = torch.searchsorted(targets.candidates_C[: targets.num_used], labels_KQ.contiguous())
    return caption_loss(states_KQD, weight_VD, labels_KQ, part.mask_KQ, num_counted=targets.num_counted)


def _backward_in_parts(model: ClipsModel, parts: list[Part], config: TrainConfig, targets: Targets) -> Losses:
    """The whole batch's gradient, with the activations of one micro-batch at a time.

    First all features are computed without activations, and the contrastive loss of the whole batch is differentiated
    with respect to them. Then each part is encoded again, and its features carry those derivatives back.
    """
    device = parts[0].image_NCHW.device
    with torch.no_grad(), autocast(config, device):
        encoded = [encode(model, part).features for part in parts]
    image_NE, web_NE, short_NE = (torch.cat(kind).requires_grad_() for kind in zip(*encoded, strict=True))
    contrastive = clips_contrastive_loss(image_NE, web_NE, short_NE, model.logit_scale.exp())
    torch.autograd.backward(config.contrastive_weight * contrastive)  # reaches the logit scale here, and only here

    caption = 0.0
    rows = len(parts[0].image_NCHW)
    for number, part in enumerate(parts):
        at = slice(number * rows, (number + 1) * rows)
        derivatives = [whole.grad[at] for whole in (image_NE, web_NE, short_NE) if whole.grad is not None]
        with autocast(config, device):
            again = encode(model, part)
            share = _caption_loss(model, again, part, targets)
        carried = [(mine * grad).sum() for mine, grad in zip(again.features, derivatives, strict=True)]
        torch.autograd.backward(torch.stack(carried).sum() + config.caption_weight * share)
        caption += share.item()
    total = config.contrastive_weight * contrastive.item() + config.caption_weight * caption
    return Losses(total, contrastive.item(), caption)
