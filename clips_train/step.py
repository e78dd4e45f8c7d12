"""One step: losses and gradients of a batch, at once or in micro-batches, on one process or many, with one result.

Each image is encoded once, and so is each text: all views, hard negatives and conditions of a batch go through the text
tower together. The contrastive loss is always that of the whole batch of all processes.

Shape suffixes: N samples, R text rows, T text states, S captioned samples, Q target slots, P patches, E embedding,
V vocabulary, D decoder width.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clips_train import distributed, objective
from clips_train.batch import Batch
from clips_train.config import TrainConfig
from clips_train.distributed import World
from clips_train.losses import caption_loss
from clips_train.model import ClipsModel
from clips_train.objective import Features, ViewFeatures
from clips_train.parts import Captioned, Part, Targets, TextLayout, split
from clips_train.tokenizer import Tokenizer


@dataclass(frozen=True)
class Losses:
    """Of one step and all processes: the parts before weighting, and their weighted sum."""

    total: float
    contrastive: float
    caption: float
    distillation: float


class Trainee(nn.Module):
    """The model with what a step asks of it in one forward pass, so that DDP and FSDP can wrap it."""

    def __init__(self, model: ClipsModel, config: TrainConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.layout = TextLayout.of(tokenizer, config, pools_last_slot=model.towers.text_pool_type == "last")
        gated = any(view.gate for view in config.views)
        self.gate_means: Tensor | None = torch.ones(3) if gated else None
        """Running means of the similarities that gates compare with."""

    @property
    def num_tokens(self) -> int:
        """Rows of the captioner's head; 0 without a captioner."""
        return 0 if self.model.decoder is None else int(self.model.decoder.head.out_features)

    def forward(self, part: Part, targets: Targets, with_captions: bool = True) -> tuple[Features, Tensor]:
        """Features of the part, and its share of the captioning loss of all processes (a mean over counted slots)."""
        with autocast(self.config, part.image_NCHW.device):
            image_NE, patch_tokens_NPW = self.model.encode_image(part.image_NCHW)
            text_RE, states_RTW = None, None
            if len(part.text_RL):
                text_RE, states_RTW = self.model.encode_text(part.text_RL, part.text_mask_RL, part.positions_L)
            features = _features(image_NE, text_RE, part)
            share = image_NE.new_zeros(())
            if with_captions and part.captioned is not None:
                share = self._caption_loss(patch_tokens_NPW, states_RTW, part, part.captioned, targets)
        return features, share

    def _caption_loss(
        self, patch_tokens_NPW: Tensor, states_RTW: Tensor | None, part: Part, captioned: Captioned, targets: Targets
    ) -> Tensor:
        assert self.model.decoder is not None
        image_SPW = patch_tokens_NPW[captioned.rows_S]
        if captioned.kept_SP is not None:
            image_SPW = image_SPW.gather(1, captioned.kept_SP[..., None].expand(-1, -1, image_SPW.shape[-1]))
        text_STW, mask_ST = None, None
        if captioned.condition_rows_S is not None:
            assert states_RTW is not None
            text_STW = states_RTW[captioned.condition_rows_S]
            if part.text_mask_RL is not None:
                mask_ST = part.text_mask_RL[captioned.condition_rows_S, : text_STW.shape[1]]
        if self.config.stop_gradient:
            image_SPW = image_SPW.detach()
            text_STW = None if text_STW is None else text_STW.detach()
        states_SQD = self.model.caption_states(image_SPW, text_STW, captioned.inputs_SQ, mask_ST)
        weight_VD, labels_SQ = self.model.decoder.head.weight, captioned.labels_SQ
        if targets.candidates_U is not None:
            # A candidate's correction is added to its logits as one more column, which meets a one in every state.
            states_SQD = torch.cat([states_SQD, torch.ones_like(states_SQD[..., :1])], dim=-1)
            weight_VD = torch.cat([weight_VD[targets.candidates_U], targets.correction_U.unsqueeze(1)], dim=1)
            labels_SQ = torch.searchsorted(targets.candidates_U[: targets.num_used], labels_SQ.contiguous())
        return caption_loss(states_SQD, weight_VD, labels_SQ, captioned.mask_SQ, num_counted=targets.num_counted)


def plain_trainee(trainee: Any) -> Trainee:
    """What DDP or FSDP wraps."""
    plain = distributed.unwrapped(trainee)
    assert isinstance(plain, Trainee)
    return plain


def backward(trainee: Any, batch: Batch, config: TrainConfig, device: torch.device, world: World) -> Losses:
    """Adds the gradients of this process to the parameters; their mean over processes is the whole batch's.

    ``trainee`` is a ``Trainee``, or DDP's or FSDP's wrapping of one. With ``accumulation`` > 1 memory is that of one
    micro-batch.
    """
    plain = plain_trainee(trainee)
    targets = Targets.of(batch, plain.num_tokens, config, world).to(device)
    parts = split(batch, config, plain.layout, device)
    if len(parts) == 1:
        features, caption = trainee(parts[0], targets)
        shares = _shares(features, config, plain, world)
        torch.autograd.backward(_weighted(shares, config, world) + _caption_weight(config, world) * caption)
    else:
        shares, caption = _backward_in_parts(trainee, parts, targets, config, world)
    found = torch.stack([shares.contrastive.detach(), shares.distillation.detach(), caption.detach()]).float()
    if not config.local_loss:
        found[:2] /= world.size
    contrastive, distilled, captioned = world.sum(found).tolist()
    total = (
        config.contrastive_weight * contrastive
        + config.caption_weight * captioned
        + (config.distillation_weight * distilled if config.teacher else 0)
    )
    return Losses(total, contrastive, captioned, distilled)


def _backward_in_parts(
    trainee: Any, parts: list[Part], targets: Targets, config: TrainConfig, world: World
) -> tuple[objective.Shares, Tensor]:
    """The whole batch's gradient, with the activations of one micro-batch at a time.

    First all features are computed without activations, and the contrastive loss of the whole batch is differentiated
    with respect to them. Then each part is encoded again, and its features carry those derivatives back.
    """
    plain = plain_trainee(trainee)
    with torch.no_grad():
        encoded = [trainee(part, targets, with_captions=False)[0] for part in parts]
    leaves = [torch.cat(kind).requires_grad_() for kind in zip(*(found.encoded for found in encoded), strict=True)]
    shares = _shares(_joined(encoded).with_encoded(leaves), config, plain, world)
    weighted = _weighted(shares, config, world)
    if weighted.requires_grad:
        torch.autograd.backward(weighted)  # reaches the logit scale here, and only here

    caption = torch.zeros((), device=leaves[0].device)
    rows = len(parts[0].image_NCHW)
    for number, part in enumerate(parts):
        at = slice(number * rows, (number + 1) * rows)
        last = number == len(parts) - 1
        with contextlib.nullcontext() if last else distributed.no_sync(trainee):
            again, share = trainee(part, targets)
            total = _caption_weight(config, world) * share
            for mine, leaf in zip(again.encoded, leaves, strict=True):
                if leaf.grad is not None:
                    total = total + (mine * leaf.grad[at]).sum()
            for parameter in (plain.model.logit_scale, plain.model.logit_bias):
                if parameter is not None and config.views:
                    total = total + 0 * parameter.sum()  # DDP reduces a gradient when this backward pass reaches it
            torch.autograd.backward(total)
        caption += share.detach()
    return shares, caption


def _shares(features: Features, config: TrainConfig, plain: Trainee, world: World) -> objective.Shares:
    if not config.views:
        nothing = features.image_NE.new_zeros(())
        return objective.Shares(nothing, nothing)
    everyone = objective.gathered(features, world)
    rows = slice(None)
    if config.local_loss:
        own = len(features.image_NE)
        rows = slice(world.rank * own, (world.rank + 1) * own)
    bias = plain.model.logit_bias
    means = None if plain.gate_means is None else plain.gate_means.to(features.image_NE.device)
    found, new_means = objective.shares(everyone, config, plain.model.logit_scale.exp(), bias, means, rows)
    if new_means is not None:
        plain.gate_means = new_means.cpu()
    return found


def _weighted(shares: objective.Shares, config: TrainConfig, world: World) -> Tensor:
    """What is differentiated here: gradients are averaged over processes, shares are to be summed."""
    factor = world.size if config.local_loss else 1
    weighted = config.contrastive_weight * shares.contrastive
    if config.teacher:
        weighted = weighted + config.distillation_weight * shares.distillation
    return factor * weighted


def _caption_weight(config: TrainConfig, world: World) -> float:
    return config.caption_weight * world.size


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if config.precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


# --- features of a part -----------------------------------------------------------------------------------------------


def _features(image_NE: Tensor, text_RE: Tensor | None, part: Part) -> Features:
    """The rows of text as views: for each its texts, then its hard negatives."""
    views = []
    start = 0
    for there_NK, negatives_there_NM in part.there:
        assert text_RE is not None
        found = []
        for there in (there_NK, negatives_there_NM):
            stop = start + there.numel()
            found.append(text_RE[start:stop].reshape(*there.shape, text_RE.shape[-1]))
            start = stop
        views.append(ViewFeatures(found[0], there_NK, found[1], negatives_there_NM))
    return Features(image_NE, tuple(views), part.teacher)


def _joined(parts: list[Features]) -> Features:
    """The samples of all parts; their features are put in by the caller."""
    first = parts[0]
    views = tuple(
        ViewFeatures(
            view.text_NKE,
            torch.cat([part.views[number].there_NK for part in parts]),
            view.negatives_NME,
            torch.cat([part.views[number].negatives_there_NM for part in parts]),
        )
        for number, view in enumerate(first.views)
    )
    teacher = {name: torch.cat([part.teacher[name] for part in parts]) for name in first.teacher}
    return Features(first.image_NE, views, teacher)
