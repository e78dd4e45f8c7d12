"""What a run minimises over a whole batch of features: its views' contrastive losses, and distillation from a teacher.

Each process may compute its own rows of the loss only: the processes' shares sum to the batch's loss.

Shape suffixes: N samples (of a process or of all), K texts of a view, M hard negatives, E embedding, F teacher's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clips_train import losses
from clips_train.config import TrainConfig
from clips_train.distributed import World


@dataclass(frozen=True)
class ViewFeatures:
    """Unit features of a view's texts and hard negatives, and which of them there are."""

    text_NKE: Tensor
    there_NK: Tensor
    negatives_NME: Tensor
    negatives_there_NM: Tensor


@dataclass(frozen=True)
class Features:
    """What the contrastive losses see of some samples: unit features."""

    image_NE: Tensor
    views: tuple[ViewFeatures, ...]
    teacher: Mapping[str, Tensor]

    @property
    def encoded(self) -> list[Tensor]:
        """The tensors that carry gradients."""
        return [self.image_NE, *(part for view in self.views for part in (view.text_NKE, view.negatives_NME))]

    def with_encoded(self, tensors: Sequence[Tensor]) -> Features:
        """These samples with other features, in the order of ``encoded``."""
        views = tuple(
            ViewFeatures(tensors[1 + 2 * number], view.there_NK, tensors[2 + 2 * number], view.negatives_there_NM)
            for number, view in enumerate(self.views)
        )
        return Features(tensors[0], views, self.teacher)


@dataclass(frozen=True)
class Shares:
    """This process's shares of the losses of the whole batch, before weighting."""

    contrastive: Tensor
    distillation: Tensor


def gathered(features: Features, world: World) -> Features:
    """The samples of all processes in the order of their ranks. Gradients of every process's use flow back."""
    if world.size == 1:
        return features
    encoded = _gather_together(features.encoded, world)
    views = tuple(
        ViewFeatures(
            view.text_NKE, world.gather(view.there_NK), view.negatives_NME, world.gather(view.negatives_there_NM)
        )
        for view in features.views
    )
    teacher = {name: world.gather(feature) for name, feature in features.teacher.items()}
    return Features(features.image_NE, views, teacher).with_encoded(encoded)


def _gather_together(tensors: Sequence[Tensor], world: World) -> list[Tensor]:
    """One exchange for all of them, side by side."""
    flat = [tensor.flatten(1) for tensor in tensors]
    whole = world.gather(torch.cat(flat, dim=1))
    parts = whole.split([tensor.shape[1] for tensor in flat], dim=1)
    return [part.reshape(len(whole), *tensor.shape[1:]) for part, tensor in zip(parts, tensors, strict=True)]


def shares(
    everyone: Features, config: TrainConfig, scale: Tensor, bias: Tensor | None, means_3: Tensor | None, rows: slice
) -> tuple[Shares, Tensor | None]:
    """The shares of ``rows`` of the batch, and the new means of the gates (``alip_gates``), where there are gates.

    ``scale`` is the exponentiated logit scale, ``bias`` belongs to the sigmoid loss.
    """
    gates: list[Tensor | None] = [None] * len(config.views)
    if means_3 is not None:
        gated = [number for number, view in enumerate(config.views) if view.gate]
        first, second = (everyone.views[number].text_NKE[:, 0] for number in gated)
        gates[gated[0]], gates[gated[1]], means_3 = losses.alip_gates(everyone.image_NE, first, second, means_3)
    total_weight = sum(view.weight for view in config.views)
    contrastive = everyone.image_NE.new_zeros(())
    for number, (view, features) in enumerate(zip(config.views, everyone.views, strict=True)):
        if config.contrastive == "sigmoid":
            assert bias is not None
            loss = losses.sigmoid_loss(everyone.image_NE, features.text_NKE[:, 0], scale, bias, rows=rows)
        else:
            loss = losses.view_loss(
                everyone.image_NE,
                features.text_NKE,
                scale,
                there_NK=None if view.count == 1 else features.there_NK,
                negatives_NME=features.negatives_NME if view.negatives else None,
                negatives_there_NM=features.negatives_there_NM if view.negatives else None,
                hardest=view.choose_negatives == "hardest",
                gate_N=gates[number],
                rows=rows,
            )
        contrastive = contrastive + loss * (view.weight / total_weight)
    return Shares(contrastive, _distillation(everyone, scale, rows)), means_3


def _distillation(everyone: Features, scale: Tensor, rows: slice) -> Tensor:
    """The mean over the views; 0 without a teacher."""
    total = everyone.image_NE.new_zeros(())
    if not everyone.teacher:
        return total
    for number, features in enumerate(everyone.views):
        total = total + losses.distillation_loss(
            everyone.image_NE,
            features.text_NKE[:, 0],
            scale,
            everyone.teacher["image"],
            everyone.teacher[f"view.{number}"],
            float(everyone.teacher["scale"][0]),
            rows=rows,
        )
    return total / len(everyone.views)
