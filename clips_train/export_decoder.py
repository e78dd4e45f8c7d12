"""The captioner of an export, from its files alone: no run, checkpoint or shards are needed.

    from clips_train import export_decoder, generate

    trained = export_decoder.load(Path("runs/first/export"))
    generate.captions(trained, pixels_BCHW, web_captions)

``decoder.safetensors`` holds the captioner's weights, ``decoder_config.json`` the model that it belongs to; the towers
that it reads with are those beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from clips_data.errors import UserError
from clips_data.schema import SCHEMA_VERSION
from clips_train.checkpoint import weight_differences
from clips_train.config import ModelConfig
from clips_train.device import pick_device
from clips_train.export_open_clip import MODEL, VOCABULARY, plain
from clips_train.generate import Trained
from clips_train.model import build_model
from clips_train.tokenizer import build_tokenizer

DECODER, DECODER_CONFIG = "decoder.safetensors", "decoder_config.json"
SHOWN = 3


def write(trained: Trained, folder: Path) -> None:
    """Nothing where the model has no captioner."""
    if trained.model.decoder is None:
        return
    model = trained.config.model_dump(mode="json", by_alias=True)
    if trained.config.tokenizer == "bert":
        model["bert_vocab"] = VOCABULARY
    about = {"schema_version": SCHEMA_VERSION, "model": model, "condition_drop": trained.condition_drop}
    (folder / DECODER_CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
    save_file(plain(trained.model.decoder.state_dict()), folder / DECODER)


def load(folder: Path, device: str = "auto") -> Trained:
    """Towers, captioner and tokenizer of an export, for ``generate.captions``.

    Raises ``UserError`` where there is no captioner, or one that does not fit its configuration.
    """
    path = folder / DECODER_CONFIG
    if not path.is_file():
        raise UserError(f"{folder} has no {DECODER_CONFIG}: it is no export of a model with a captioner.")
    config, condition_drop = _read(path)
    if config.tokenizer == "bert":
        config = config.model_copy(update={"bert_vocab": str(folder / VOCABULARY)})
    try:
        towers, decoder = load_file(folder / MODEL), load_file(folder / DECODER)
    except (OSError, SafetensorError) as error:
        raise UserError(f"The weights in {folder} cannot be read ({error}). Export the run again.") from None
    weights = {f"towers.{name}": weight for name, weight in towers.items()}
    weights |= {f"decoder.{name}": weight for name, weight in decoder.items()}
    where = pick_device(device)
    model = build_model(config, sigmoid="logit_bias" in towers)
    if differences := weight_differences(weights, model.state_dict()):
        raise UserError(f"{folder} does not fit its {DECODER_CONFIG}: {'; '.join(differences[:SHOWN])}. Export again.")
    model.load_state_dict(weights)
    tokenizer = build_tokenizer(config.tokenizer, config.bert_vocab)
    return Trained(config, model.to(where).eval(), tokenizer, where, folder, condition_drop)


def _read(path: Path) -> tuple[ModelConfig, float]:
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if about["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {about['schema_version']} is not {SCHEMA_VERSION}")
        return ModelConfig(**about["model"]), float(about["condition_drop"])
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} was not written by this version of clips ({reason}). Export the run again with --overwrite."
        ) from None
