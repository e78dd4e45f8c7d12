"""A batch becomes parts on the device: micro-batches whose texts are rows for one pass through the text tower.

Shape suffixes: N samples, K texts of a view, M hard negatives, C channels, H and W pixels, R text rows, L text slots,
S captioned samples, Q target slots, P patches, U candidate tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clips_data import draws
from clips_train import transforms
from clips_train.batch import Batch
from clips_train.config import TrainConfig
from clips_train.distributed import World
from clips_train.texts import condition_view, rounded_up, trim
from clips_train.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextLayout:
    """What parts need to know of the tokenizer and the text tower."""

    bos_id: int
    eos_id: int
    empty_1L: Tensor
    """The empty text, for dropped conditions."""
    pools_last_slot: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, config: TrainConfig, *, pools_last_slot: bool) -> TextLayout:
        empty_1L = tokenizer.text_ids([""], config.context_length)
        return cls(tokenizer.bos_id, tokenizer.eos_id, empty_1L, pools_last_slot)


@dataclass(frozen=True)
class Captioned:
    """The samples of a part whose captions train the captioner, and what it reads and writes."""

    rows_S: Tensor
    condition_rows_S: Tensor | None
    """Rows of the part's texts."""
    inputs_SQ: Tensor
    """What a teacher-forced captioner is shown: the target from its start token on, without its last."""
    labels_SQ: Tensor
    mask_SQ: Tensor
    kept_SP: Tensor | None


@dataclass(frozen=True)
class Part:
    """A batch or micro-batch on the device. Images are floats, normalised."""

    image_NCHW: Tensor
    text_RL: Tensor
    text_mask_RL: Tensor | None
    positions_L: Tensor | None
    there: tuple[tuple[Tensor, Tensor], ...]
    """For each view which texts [N, K] and which hard negatives [N, M] there are; the rows of text are theirs first."""
    captioned: Captioned | None
    teacher: dict[str, Tensor]


@dataclass(frozen=True)
class Targets:
    """What the captioning loss of a whole batch is taken over, the same for all its parts and processes.

    With ``caption_negatives`` the softmax runs over ``candidates_U``: first the ``num_used`` tokens that the batch's
    captions use, sorted, then tokens drawn from all others. Each drawn one stands for many, so the logarithm of that
    number is added to its logit: the sum of exponentials then estimates that over the whole vocabulary.
    """

    num_counted: int
    candidates_U: Tensor | None = None
    correction_U: Tensor = field(default_factory=lambda: torch.empty(0))
    num_used: int = 0

    @classmethod
    def of(cls, batch: Batch, num_tokens: int, config: TrainConfig, world: World) -> Targets:
        captioned_N = _captioned(batch, config)
        counted_NQ = batch.mask_NQ & captioned_N[:, None]
        num_counted = int(world.sum(counted_NQ.sum()))
        if config.caption_negatives == 0 or num_tokens == 0:
            return cls(num_counted)
        used = torch.zeros(num_tokens, dtype=torch.int32)
        used[batch.labels_NQ[counted_NQ]] = 1
        used = world.max(used).bool()
        used_U, others = used.nonzero().squeeze(1), (~used).nonzero().squeeze(1)
        place = f"{batch.state['epoch']}/{batch.state['sample']}"
        seed = draws.integer(1 << 62, config.seed, "caption_negatives", 0, place)
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        drawn = others[order[: config.caption_negatives]]
        correction_U = torch.zeros(len(used_U) + len(drawn))
        correction_U[len(used_U) :] = math.log(len(others) / max(1, len(drawn)))
        return cls(num_counted, torch.cat([used_U, drawn]), correction_U, len(used_U))

    def to(self, device: torch.device) -> Targets:
        if self.candidates_U is None:
            return self
        return replace(self, candidates_U=self.candidates_U.to(device), correction_U=self.correction_U.to(device))


def split(batch: Batch, config: TrainConfig, layout: TextLayout, device: torch.device) -> list[Part]:
    """Micro-batches of equal size, each with the texts of its own images."""
    rows = len(batch.keys) // config.accumulation
    captioned_N = _captioned(batch, config)
    whole = range(0, len(batch.keys), rows)
    return [_part(batch, slice(start, start + rows), captioned_N, config, layout, device) for start in whole]


def _captioned(batch: Batch, config: TrainConfig) -> Tensor:
    """bool [N]: which samples train the captioner."""
    slots_N = torch.arange(batch.first_slot, batch.first_slot + len(batch.keys))
    return slots_N % config.caption_every == 0


def _part(
    batch: Batch, at: slice, captioned_N: Tensor, config: TrainConfig, layout: TextLayout, device: torch.device
) -> Part:
    rows: list[Tensor] = []
    for view in batch.views:
        rows += [view.ids_NKL[at].flatten(0, 1), view.negatives_NML[at].flatten(0, 1)]
    captioned = None
    if config.decoder != "none":
        captioned = _captioned_part(batch, at, captioned_N[at], config, rows, layout)
    text_RL = torch.cat(rows) if rows else torch.zeros(0, config.context_length, dtype=torch.long)
    mask_RL, positions_L = None, None
    if config.text_padding == "trimmed" and len(text_RL):
        text_RL, mask_RL, positions_L = trim(text_RL, layout.eos_id, keep_last=layout.pools_last_slot)

    def moved(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor.to(device, non_blocking=True)

    if captioned is not None:
        captioned = Captioned(**{name: moved(value) for name, value in vars(captioned).items()})
    return Part(
        image_NCHW=transforms.normalise(moved(batch.image_NCHW[at])),
        text_RL=moved(text_RL),
        text_mask_RL=moved(mask_RL),
        positions_L=moved(positions_L),
        there=tuple((moved(view.there_NK[at]), moved(view.negatives_there_NM[at])) for view in batch.views),
        captioned=captioned,
        teacher={name: moved(feature[at]) for name, feature in batch.teacher.items()},
    )


def _captioned_part(
    batch: Batch, at: slice, captioned_N: Tensor, config: TrainConfig, rows: list[Tensor], layout: TextLayout
) -> Captioned:
    """Appends to ``rows`` the conditions that are no view's texts, and the empty text where one is needed."""
    rows_S = captioned_N.nonzero().squeeze(1)
    mask_SQ = batch.mask_NQ[at][rows_S]
    if len(rows_S) == 0:  # every process runs the captioner in every part, as DDP and FSDP expect; here nothing counts
        rows_S, mask_SQ = torch.zeros(1, dtype=torch.long), torch.zeros_like(batch.mask_NQ[at][:1])
    labels_SQ = batch.labels_NQ[at][rows_S]
    longest = int((mask_SQ.int() * torch.arange(1, mask_SQ.shape[1] + 1)).max())
    num_slots = min(mask_SQ.shape[1], rounded_up(max(1, longest)))  # later slots count nowhere and are seen by none
    labels_SQ, mask_SQ = labels_SQ[:, :num_slots], mask_SQ[:, :num_slots]
    condition_rows_S = None
    if config.condition is not None:
        condition_rows_S = _condition_rows(batch, at, config, rows)[rows_S]
        dropped_S = batch.dropped_N[at][rows_S]
        if config.condition_drop > 0:  # at any draw, so that shapes do not depend on it
            condition_rows_S[dropped_S] = sum(map(len, rows))
            rows.append(layout.empty_1L)
    kept_SP = None if batch.kept_NP is None else batch.kept_NP[at][rows_S]
    inputs_SQ = torch.cat([torch.full((len(rows_S), 1), layout.bos_id), labels_SQ[:, :-1]], dim=1)
    return Captioned(rows_S, condition_rows_S, inputs_SQ, labels_SQ, mask_SQ, kept_SP)


def _condition_rows(batch: Batch, at: slice, config: TrainConfig, rows: list[Tensor]) -> Tensor:
    """int64 [N]: where the condition of each sample is, or comes to be, among the text rows."""
    own = torch.arange(len(batch.keys[at]))
    view = condition_view(config)
    if view is not None:
        return own + sum(map(len, rows[: 2 * view]))
    assert batch.condition_NL is not None
    rows.append(batch.condition_NL[at])
    return own + sum(map(len, rows[:-1]))
