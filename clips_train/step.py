"""One step of CLIPS: losses and gradients of a batch, at once or in micro-batches with the same result.

Each image is encoded once. Web captions and short synthetic captions go through the text tower together, as one batch
[web; short]; the halves are parted before anything else, and stay parted under accumulation.

Shape suffixes: N samples, C channels, H and W pixels, E embedding, L text slots, Q target slots, T text states,
P patches.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

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
    labels_NQ: Tensor
    mask_NQ: Tensor


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


def backward(model: ClipsModel, batch: Batch, config: TrainConfig, device: torch.device) -> Losses:
    """Adds the batch's gradients to the parameters. With ``accumulation`` > 1 memory is that of one micro-batch."""
    parts = split(batch, config.accumulation, device)
    num_counted = int(batch.mask_NQ.sum())
    if len(parts) == 1:
        contrastive, caption = _losses(model, parts[0], config, num_counted)
        total = config.contrastive_weight * contrastive + config.caption_weight * caption
        torch.autograd.backward(total)
        return Losses(total.item(), contrastive.item(), caption.item())
    return _backward_in_parts(model, parts, config, num_counted)


def split(batch: Batch, num_parts: int, device: torch.device) -> list[Part]:
    """Micro-batches of equal size, each with the web and short texts of its own images."""
    rows = len(batch.keys) // num_parts
    parts = []
    for start in range(0, len(batch.keys), rows):
        at = slice(start, start + rows)
        parts.append(
            Part(
                image_NCHW=transforms.normalise(batch.image_NCHW[at].to(device, non_blocking=True)),
                text_2NL=torch.cat([batch.web_NL[at], batch.short_NL[at]]).to(device, non_blocking=True),
                labels_NQ=batch.labels_NQ[at].to(device, non_blocking=True),
                mask_NQ=batch.mask_NQ[at].to(device, non_blocking=True),
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


def _losses(model: ClipsModel, part: Part, config: TrainConfig, num_counted: int) -> tuple[Tensor, Tensor]:
    with autocast(config, part.image_NCHW.device):
        encoded = encode(model, part)
        contrastive = clips_contrastive_loss(*encoded.features, model.logit_scale.exp())
        return contrastive, _caption_loss(model, encoded, part, num_counted)


def _caption_loss(model: ClipsModel, encoded: Encoded, part: Part, num_counted: int) -> Tensor:
    """The part's share of the batch's mean over counted slots; 0 without a captioner."""
    if model.decoder is None:
        return encoded.image_NE.new_zeros(())
    states_NQD = model.caption_states(encoded.patch_tokens_NPW, encoded.web_states_NTW)
    return caption_loss(states_NQD, model.decoder.head.weight, part.labels_NQ, part.mask_NQ, num_counted=num_counted)


def _backward_in_parts(model: ClipsModel, parts: list[Part], config: TrainConfig, num_counted: int) -> Losses:
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
            share = _caption_loss(model, again, part, num_counted)
        carried = [(mine * grad).sum() for mine, grad in zip(again.features, derivatives, strict=True)]
        torch.autograd.backward(torch.stack(carried).sum() + config.caption_weight * share)
        caption += share.item()
    total = config.contrastive_weight * contrastive.item() + config.caption_weight * caption
    return Losses(total, contrastive.item(), caption)
