"""What one step trains on: the tensors of a batch, and how samples become one.

Shape suffixes: N samples, K texts of a view, M hard negatives, C channels, H and W pixels, L text slots, Q target
slots, P kept patches, F features of a teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TEACHER = "teacher."
"""Before the name of a teacher's feature in a sample's tensors."""


@dataclass(frozen=True)
class ViewTexts:
    """The texts of one view, and the hard negatives beside them, as ids; padding where a sample has fewer."""

    ids_NKL: Tensor
    there_NK: Tensor
    """bool: which texts there are; at least one for each sample."""
    negatives_NML: Tensor
    negatives_there_NM: Tensor


@dataclass(frozen=True)
class Batch:
    """One process's share of a step. Images are uint8, ids and labels int64."""

    image_NCHW: Tensor
    views: tuple[ViewTexts, ...]
    condition_NL: Tensor | None
    """What the captioner reads; ``None`` where it reads the image alone, or a view's text (``TextMaker``)."""
    dropped_N: Tensor
    """bool: the captioner reads the empty text instead."""
    labels_NQ: Tensor
    mask_NQ: Tensor
    """bool: which labels count."""
    kept_NP: Tensor | None
    """int64, the patches that the captioner sees; ``None`` for all."""
    teacher: Mapping[str, Tensor]
    """Stored features, float32 [N, F], by ``image`` and ``view.NUMBER``."""
    keys: list[str]
    first_slot: int
    """Place of the first sample in the whole batch of all processes."""
    state: dict[str, Any]
    """State of the stream after this batch; ``SampleStream(..., state=...)`` continues with the next one."""


def collate(samples: Sequence[Mapping[str, Tensor]], keys: list[str], first_slot: int, state: dict[str, Any]) -> Batch:
    """A batch of samples as the loader makes them: equal names, one tensor each."""
    whole = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    num_views = sum(name.endswith(".ids") for name in whole)
    return Batch(
        image_NCHW=whole["image"],
        views=tuple(_view(whole, number) for number in range(num_views)),
        condition_NL=whole.get("condition"),
        dropped_N=whole["dropped"],
        labels_NQ=whole["labels"],
        mask_NQ=whole["mask"],
        kept_NP=whole.get("kept"),
        teacher={name.removeprefix(TEACHER): found for name, found in whole.items() if name.startswith(TEACHER)},
        keys=keys,
        first_slot=first_slot,
        state=state,
    )


def _view(whole: Mapping[str, Tensor], number: int) -> ViewTexts:
    about = (whole[f"view.{number}.{name}"] for name in ("ids", "there", "negatives", "negatives_there"))
    return ViewTexts(*about)
