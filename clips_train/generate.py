"""The captioner at work: image and web caption in, one decoder pass, the likeliest token per slot until the end token.

Slots never see each other's tokens, so there is nothing to sample or to search over (METHOD §2.3).

Shape suffixes: B samples, C channels, H and W pixels, P patches, T text states, Q target slots, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clips_data.errors import UserError
from clips_train import checkpoint, transforms
from clips_train.config import ModelConfig, TrainConfig
from clips_train.device import pick_device
from clips_train.model import ClipsModel, build_model
from clips_train.tokenizer import Tokenizer, build_tokenizer

SLOTS_PER_PASS = 16
"""Slots whose logits exist at the same time; samples that have ended leave before the next ones."""


@dataclass(frozen=True)
class Trained:
    """A checkpoint, ready to use."""

    config: ModelConfig
    model: ClipsModel
    tokenizer: Tokenizer
    device: torch.device
    folder: Path
    """Of the checkpoint."""


def load_trained(path: Path, device: str = "auto") -> Trained:
    """The newest checkpoint of a run's folder, or the checkpoint folder itself, in evaluation mode.

    Raises ``UserError`` when there is none or it does not fit its own config.
    """
    folder = checkpoint.find(path)
    config = TrainConfig(**checkpoint.read_about(folder)["config"]).model
    where = pick_device(device)
    model = build_model(config).to(where)
    checkpoint.load_weights(folder, model)
    return Trained(config, model.eval(), build_tokenizer(config.tokenizer, config.bert_vocab), where, folder)


@torch.inference_mode()
def caption_images(trained: Trained, pixels_BCHW: Tensor, web_captions: Sequence[str]) -> list[str]:
    """One caption per image. ``pixels_BCHW`` is uint8 at the model's size, as ``transforms.squash`` makes it.

    Raises ``UserError`` when the model was trained without a captioner.
    """
    model, device = trained.model, trained.device
    if model.decoder is None:
        raise UserError(f"{trained.folder} has no captioner: it was trained with decoder false.")
    _, patch_tokens_BPW = model.encode_image(transforms.normalise(pixels_BCHW.to(device)))
    ids_BL = trained.tokenizer.text_ids(web_captions, trained.config.context_length).to(device)
    _, web_states_BTW = model.encode_text(ids_BL)
    states_BQD = model.caption_states(patch_tokens_BPW, web_states_BTW)
    ids = decode_slots(states_BQD, model.decoder.head.weight, trained.tokenizer.eos_id)
    return [trained.tokenizer.decode(row) for row in ids]


def decode_slots(states_BQD: Tensor, head_weight_VD: Tensor, eos_id: int) -> list[list[int]]:
    """The likeliest token of each slot, per sample up to and without the first end token."""
    num_slots = states_BQD.shape[1]
    ids: list[list[int]] = [[] for _ in states_BQD]
    open_rows = list(range(len(ids)))
    for start in range(0, num_slots, SLOTS_PER_PASS):
        if not open_rows:
            break
        block = states_BQD[open_rows, start : start + SLOTS_PER_PASS]
        likeliest = (block @ head_weight_VD.T).argmax(dim=-1).tolist()
        for row, tokens in zip(open_rows, likeliest, strict=True):
            ids[row].extend(tokens)
        open_rows = [row for row in open_rows if eos_id not in ids[row]]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in ids]
