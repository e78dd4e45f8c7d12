"""The token ids of open_clip models, right also where stock open_clip gets them wrong.

The released CLIPS models name ``bert-base-uncased`` and no tokenizer mode, so that stock open_clip lays their texts out
as BERT does: [CLS] first, padding last. Their text tower pools the last slot and was trained with [CLS] there, and with
start and end tokens of its own (METHOD §1.4–1.5). Such a tower is known by its configuration, and gets the CLIPS layout
or nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from clips_data.errors import UserError
from clips_train.tokenizer import build_tokenizer

LOCAL, HUB = "local-dir:", "hf-hub:"
CONFIG: Final = "open_clip_config.json"
BERT: Final = "bert-base-uncased"
BERT_ENTRIES: Final = 30_522
BERT_PLACES: Final = {0: "[PAD]", 1: "[unused0]", 2: "[unused1]", 100: "[UNK]", 101: "[CLS]"}
CLIPS_MODE: Final = "clips"
VOCABULARY: Final = "vocab.txt"
MARKS: Final = {"pool_type": "last", "no_causal_mask": True, "vocab_size": 32_000}
"""What a CLIPS text tower has, and no other that reads BERT's word pieces."""


@dataclass(frozen=True)
class TextTokenizer:
    """``ids`` makes int64 [N, ``context_length``] of N texts."""

    name: str
    ids: Callable[[Sequence[str]], Tensor]
    context_length: int


def of_open_clip(source: str, bert_vocab: str | None = None) -> TextTokenizer:
    """The tokenizer of what ``open_clip.create_model_from_pretrained(source)`` loads.

    Raises ``UserError`` for a CLIPS text tower whose vocabulary is not at hand or not the right one.
    """
    import open_clip

    text = _text_config(source)
    if is_clips_tower(text):
        _check_names_bert(source, text)
        if text.get("tokenizer_mode") != CLIPS_MODE:
            return _clips(source, text, bert_vocab)
    tokenizer = open_clip.get_tokenizer(source)
    name = text.get("tokenizer_mode") or text.get("hf_tokenizer_name") or "clip"
    return TextTokenizer(str(name), tokenizer, int(text.get("context_length") or tokenizer.context_length))


def is_clips_tower(text: Mapping[str, Any]) -> bool:
    """Whether this ``text_cfg`` is that of a CLIPS tower, which pools the slot where CLIPS' tokenizer puts [CLS]."""
    return all(text.get(name) == value for name, value in MARKS.items())


def _check_names_bert(source: str, text: Mapping[str, Any]) -> None:
    named = str(text.get("hf_tokenizer_name") or "")
    if named != BERT:
        raise UserError(
            f"{source} has a CLIPS text tower, which knows the word pieces of {BERT} only, but names the tokenizer "
            f"{named or 'of CLIP'!r}: its text features would mean nothing. Set hf_tokenizer_name to {BERT} and "
            f"tokenizer_mode to {CLIPS_MODE} in its text_cfg, or use an export of `clips export`."
        )


def _clips(source: str, text: Mapping[str, Any], bert_vocab: str | None) -> TextTokenizer:
    vocabulary = bert_vocab or _beside(source) or _from_hub(source)
    _check_is_berts(Path(vocabulary))
    tokenizer = build_tokenizer("bert", vocabulary)
    length = int(text["context_length"])
    return TextTokenizer(CLIPS_MODE, lambda texts: tokenizer.text_ids(texts, length), length)


def _check_is_berts(vocabulary: Path) -> None:
    """Other vocabularies have other words at these ids, or none."""
    if not vocabulary.is_file():
        return  # the tokenizer says what to do
    entries = vocabulary.read_bytes().decode("utf-8", "replace").splitlines()
    if len(entries) != BERT_ENTRIES or any(entries[number] != entry for number, entry in BERT_PLACES.items()):
        raise UserError(
            f"{vocabulary} is not the vocabulary of {BERT}, which has {BERT_ENTRIES} entries and [CLS] in line 102: "
            "text features would mean nothing. Give its vocab.txt with --bert-vocab FILE."
        )


def _text_config(source: str) -> dict[str, Any]:
    import open_clip

    if source.startswith(LOCAL):
        about = json.loads((Path(source.removeprefix(LOCAL)) / CONFIG).read_text(encoding="utf-8"))
    elif source.startswith(HUB):
        about = json.loads(Path(_download(source.removeprefix(HUB), CONFIG)).read_text(encoding="utf-8"))
    else:
        about = {"model_cfg": open_clip.get_model_config(source) or {}}
    return dict(about.get("model_cfg", {}).get("text_cfg", {}))


def _beside(source: str) -> str | None:
    path = Path(source.removeprefix(LOCAL)) / VOCABULARY
    return str(path) if source.startswith(LOCAL) and path.is_file() else None


def _from_hub(source: str) -> str:
    try:
        return _download(BERT, VOCABULARY)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source} has a CLIPS text tower, whose vocabulary is that of {BERT}, and it could not be fetched "
            f"({reason}). Give its vocab.txt with --bert-vocab FILE."
        ) from None


def _download(model: str, filename: str) -> str:
    from open_clip import pretrained

    name, _, revision = model.partition("@")
    return str(pretrained.download_pretrained_from_hf(name, filename, revision=revision or None))
