"""The captioner at work: images, and for most models a web caption with each, become captions.

``queries`` predicts all words in one pass, and its slots never see each other's words, so there is nothing to draw or
to search for (METHOD §2.3). ``teacher_forced`` writes word after word from a cache of what it has read and written.

Shape suffixes: B samples, C channels, H and W pixels, P patches, T text states, L text slots, Q target slots, R rows
that stay, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from clips_data.errors import UserError
from clips_train import checkpoint, search, transforms
from clips_train.config import ModelConfig, TrainConfig
from clips_train.decoder import CaptionDecoder
from clips_train.decoding import GREEDY, Decoding
from clips_train.device import pick_device
from clips_train.model import ClipsModel, build_model
from clips_train.search import Written
from clips_train.texts import trim
from clips_train.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True)
class Trained:
    """A checkpoint, ready to use."""

    config: ModelConfig
    model: ClipsModel
    tokenizer: Tokenizer
    device: torch.device
    folder: Path
    """Of the checkpoint."""
    condition_drop: float = 0.0
    """How often the captioner was trained without its text."""

    @property
    def reads_text(self) -> bool:
        """Whether the captioner takes a text beside the image."""
        return self.config.decoder != "none" and self.config.condition is not None

    @property
    def needs_text(self) -> bool:
        """Whether it has never been without one."""
        return self.reads_text and self.condition_drop == 0

    def encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Texts as the model was trained to read them, on its device.

        Unit features [B, E]; states [B, T, width] before the final norm; which of these are no padding (``None``: all).
        """
        ids_BL, mask_BT, positions_T = self.tokenizer.text_ids(texts, self.config.context_length), None, None
        if self.config.text_padding == "trimmed":
            pools_last_slot = self.model.towers.text_pool_type == "last"
            ids_BL, mask, positions = trim(ids_BL, self.tokenizer.eos_id, keep_last=pools_last_slot)
            mask_BT, positions_T = mask.to(self.device), positions.to(self.device)
        features_BE, states_BTW = self.model.encode_text(ids_BL.to(self.device), mask_BT, positions_T)
        return features_BE, states_BTW, None if mask_BT is None else mask_BT[:, : states_BTW.shape[1]]


@dataclass(frozen=True)
class Caption:
    """``finish`` is ``length`` where the end token did not come in time; ``ids`` are without it.

    ``log_probability`` is the natural logarithm, of the tokens and the end token: that of the caption, but for
    ``queries``, where it is the sum over slots that do not know of each other.
    """

    text: str
    ids: list[int]
    finish: Literal["stop", "length"]
    log_probability: float

    @property
    def num_tokens(self) -> int:
        return len(self.ids)


def load_trained(path: Path, device: str = "auto") -> Trained:
    """The newest checkpoint of a run's folder, or the checkpoint folder itself, in evaluation mode.

    Raises ``UserError`` when there is none or it does not fit its own config.
    """
    folder = checkpoint.find(path)
    try:
        config = TrainConfig(**checkpoint.read_about(folder)["config"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(
            f"{folder / checkpoint.ABOUT} holds a config of another version of clips: "
            f"{'.'.join(map(str, first['loc']))} {first['msg']}. Use the version that wrote it, or train again."
        ) from None
    where = pick_device(device)
    model = build_model(config.model, sigmoid=config.contrastive == "sigmoid").to(where)
    checkpoint.load_weights(folder, model)
    tokenizer = build_tokenizer(config.tokenizer, config.bert_vocab)
    return Trained(config.model, model.eval(), tokenizer, where, folder, config.condition_drop)


def check(trained: Trained, decoding: Decoding) -> CaptionDecoder:
    """The captioner. Raises ``UserError`` where there is none, or none that can decode so."""
    decoder = trained.model.decoder
    if decoder is None:
        raise UserError(f"{trained.folder} has no captioner: it was trained with --decoder none.")
    if trained.config.decoder == "queries":
        for asked, what in (
            (decoding.strategy == "top_p", "draw from"),
            (decoding.strategy == "beam", "search through"),
            (decoding.repetition_penalty != 1, "be held against repeating itself"),
        ):
            if asked:
                raise UserError(
                    f"The captioner of {trained.folder} predicts all words at once: its slots never see each other's "
                    f"words, so there is no sentence to {what}. Decode greedily without penalty, or train one with "
                    "--decoder teacher_forced."
                )
    return decoder


def most_tokens(trained: Trained, decoding: Decoding = GREEDY) -> int:
    """Longest caption, end token included. What follows the start token of a full target is one slot shorter."""
    trained_on = trained.config.target_length - 1
    return min(trained_on, decoding.max_tokens or trained_on)


def missing_text(trained: Trained, texts: Sequence[str]) -> str | None:
    """What to tell the user where the captioner lacks a text that it was always trained with; else ``None``."""
    if not trained.needs_text or all(text.strip() for text in texts):
        return None
    return (
        f"The captioner of {trained.folder} was never trained without a text beside the image, so captions of images "
        "without one may be poor. Give web captions, or train with --condition-drop 0.1 or --condition none."
    )


@torch.inference_mode()
def captions(
    trained: Trained,
    pixels_BCHW: Tensor,
    texts: Sequence[str] | None = None,
    *,
    decoding: Decoding = GREEDY,
    keys: Sequence[str] | None = None,
) -> list[Caption]:
    """One caption per image. ``pixels_BCHW`` is uint8 at the model's size, as ``transforms.squash`` makes it.

    ``texts`` are web captions, "" where there is none; a captioner that reads the image alone passes over them.
    ``keys`` name the images where words are drawn: equal keys and seeds draw alike, whatever the batch. Raises
    ``UserError`` when the model has no captioner, or one that cannot decode as asked.
    """
    decoder = check(trained, decoding)
    texts = [""] * len(pixels_BCHW) if texts is None else texts
    assert len(texts) == len(pixels_BCHW)
    assert keys is not None or decoding.strategy != "top_p", "what is drawn needs keys"
    _, patch_tokens_BPW = trained.model.encode_image(transforms.normalise(pixels_BCHW.to(trained.device)))
    states_BTW, mask_BT = trained.encode_texts(texts)[1:] if trained.reads_text else (None, None)
    most, end_id = most_tokens(trained, decoding), trained.tokenizer.eos_id
    if trained.config.decoder == "queries":
        unread_BQ = torch.zeros(len(texts), most, dtype=torch.long, device=trained.device)
        states_BQD = trained.model.caption_states(patch_tokens_BPW, states_BTW, unread_BQ, mask_BT)
        written = search.slot_by_slot(states_BQD, decoder.head.weight, end_id)
    else:
        written = search.write(
            _Cached(decoder, patch_tokens_BPW, states_BTW, mask_BT),
            start_id=trained.tokenizer.bos_id,
            end_id=end_id,
            keys=keys or [""] * len(texts),
            max_tokens=most,
            decoding=decoding,
        )
    return [_caption(trained.tokenizer, one) for one in written]


def caption_images(trained: Trained, pixels_BCHW: Tensor, texts: Sequence[str]) -> list[str]:
    """The texts of the likeliest captions, as ``captions`` writes them."""
    return [caption.text for caption in captions(trained, pixels_BCHW, texts)]


def _caption(tokenizer: Tokenizer, written: Written) -> Caption:
    finish: Literal["stop", "length"] = "stop" if written.ended else "length"
    return Caption(tokenizer.decode(written.ids), written.ids, finish, written.log_probability)


class _Cached:
    """A ``search.Writer``: the teacher-forced captioner, which computes each token's keys and values once."""

    def __init__(
        self, decoder: CaptionDecoder, patch_tokens_BPW: Tensor, states_BTW: Tensor | None, mask_BT: Tensor | None
    ) -> None:
        self._decoder = decoder
        self._device = patch_tokens_BPW.device
        self._cache = decoder.prefill(patch_tokens_BPW, states_BTW, mask_BT)

    def next(self, ids_B: Tensor) -> Tensor:
        logits_BV: Tensor = self._decoder.head(self._decoder.next(ids_B.to(self._device), self._cache))
        return logits_BV

    def keep(self, rows_R: Tensor) -> None:
        self._cache = self._cache.reorder(rows_R.to(self._device))
