"""Both towers as stock open_clip loads them by ``local-dir:`` or, pushed, by ``hf-hub:``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
from safetensors.torch import save_file
from torch import Tensor

from clips_data.errors import UserError
from clips_train.export_check import Loaded, Output
from clips_train.export_towers import Towers

MODEL, MODEL_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
VOCABULARY = "vocab.txt"
BERT_BOS, BERT_EOS = "[unused0]", "[unused1]"


def write(towers: Towers, folder: Path) -> None:
    (folder / MODEL_CONFIG).write_text(json.dumps(towers.open_clip_config, indent=2, sort_keys=True) + "\n")
    save_file(plain(towers.model.towers.state_dict()), folder / MODEL)


def plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors takes them: none shares its memory with another."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}


def write_bert_tokenizer(bert_vocab: Path, folder: Path) -> None:
    """Tokenizer files with start and end tokens set, which open_clip's ``clips`` mode needs (METHOD §1.5), and the
    vocabulary itself."""
    try:
        from transformers.models.bert.tokenization_bert import BertTokenizer
    except ImportError:
        raise UserError(
            "Exporting a model with tokenizer=bert needs the package transformers, as stock open_clip does to load it. "
            "Run: pip install transformers"
        ) from None
    text = bert_vocab.read_text(encoding="utf-8")
    (folder / VOCABULARY).write_text(text, encoding="utf-8")
    vocabulary = {entry: number for number, entry in enumerate(text.splitlines())}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True, bos_token=BERT_BOS, eos_token=BERT_EOS)
    tokenizer.save_pretrained(folder)


def load(folder: Path, towers: Towers, *, tokenizer: bool = True) -> Loaded:
    stock: Any
    stock, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}", device="cpu")
    stock.eval()
    return Loaded(
        outputs=(
            Output("image features", "pixels", stock.encode_image, lambda image: towers.model.encode_image(image)[0]),
            Output("text features", "ids", stock.encode_text, lambda ids: towers.model.encode_text(ids)[0]),
        ),
        pixels=preprocess,
        ids=open_clip.get_tokenizer(f"local-dir:{folder}") if tokenizer else None,
    )
