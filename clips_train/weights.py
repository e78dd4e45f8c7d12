"""Weights from wherever they lie, read as plain tensors under our names; nothing is ever unpickled.

Our names are ``towers.*``, as open_clip names them, and ``decoder.*``. Files of open_clip hold the towers alone.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import pretrained
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean
from clips_train import checkpoint
from clips_train.config import TrainConfig
from clips_train.towers import tower_config

HUB, LOCAL = "hf-hub:", "local-dir:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)
DECODER_WEIGHTS = "decoder.safetensors"
"""Beside the towers in an export of ours."""
PICKLES = (".pt", ".pth", ".bin")
WRAPPERS = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before the names."""
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")
"""Entries beside the weights in old files of CLIP."""
NAMES_SHOWN = 3


@dataclass(frozen=True)
class Weights:
    """What was found, and what is known of where it was made."""

    tensors: Mapping[str, Tensor]
    origin: str
    """For messages."""
    towers: Mapping[str, Any] = field(default_factory=dict)
    """open_clip's ``model_cfg``; empty where only the weights are known."""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    """open_clip's ``preprocess_cfg``, likewise."""
    run: TrainConfig | None = None
    """Of a run of ours."""

    @property
    def tokenizer(self) -> str | None:
        """As in ``ModelConfig``, or the name of one that is not ours; ``None`` where it is not known."""
        if not self.towers:
            return None
        name: str | None = self.towers.get("text_cfg", {}).get("hf_tokenizer_name")
        return {None: "bpe", "bert-base-uncased": "bert"}.get(name, name)

    def of_decoder(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith("decoder.")}


def read(source: str) -> Weights:
    """``source`` as in ``TrainConfig.init``. Raises ``UserError`` when it names nothing that can be read."""
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB))
    path = Path(source.removeprefix(LOCAL)).expanduser()
    if path.is_dir():
        return _from_export(path) if (path / OPEN_CLIP_CONFIG).is_file() else _from_run(path)
    if path.is_file():
        return Weights(_under_our_names(read_tensors(path), path), str(path))
    if ":" in source and not source.startswith(LOCAL):
        return _from_open_clip(*source.rsplit(":", 1))
    raise UserError(
        f"init {source!r} does not exist. Name a run, checkpoint or export folder, a weights file, {LOCAL}FOLDER, "
        f"{HUB}OWNER/NAME, or MODEL:TAG of open_clip, such as ViT-B-32:laion2b_s34b_b79k."
    )


def digest(source: str) -> str | None:
    """Tells local weights from others; ``None`` for what is named by hub or tag, and for what is not there."""
    path = Path(source.removeprefix(LOCAL)).expanduser()
    if source.startswith(HUB) or not path.exists():
        return None
    if path.is_file():
        return ledger.digest_file(path)
    if (path / OPEN_CLIP_CONFIG).is_file():
        return ledger.digest_model(path, (".json", ".safetensors", ".bin", ".pt"))
    return ledger.digest_file(checkpoint.weights_path(checkpoint.find(path)))


def _from_run(path: Path) -> Weights:
    folder = checkpoint.find(path)
    run = TrainConfig(**checkpoint.read_about(folder)["config"])
    tensors = read_tensors(checkpoint.weights_path(folder))
    return Weights(tensors, str(folder), tower_config(run), run=run)


def _from_export(folder: Path) -> Weights:
    """An export of ours, or any folder that open_clip's ``local-dir:`` takes."""
    file = next((folder / name for name in OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder} has {OPEN_CLIP_CONFIG} but no weights, such as {OPEN_CLIP_WEIGHTS[0]}.")
    tensors = _under_our_names(read_tensors(file), file)
    if (folder / DECODER_WEIGHTS).is_file():
        tensors |= {f"decoder.{name}": tensor for name, tensor in read_tensors(folder / DECODER_WEIGHTS).items()}
    return Weights(tensors, str(folder), *_read_config(folder / OPEN_CLIP_CONFIG))


def _from_hub(name: str) -> Weights:
    """``OWNER/NAME``, or ``OWNER/NAME@REVISION``."""
    model_id, _, revision = name.partition("@")

    def fetch(filename: str | None) -> Path:
        try:
            return Path(pretrained.download_pretrained_from_hf(model_id, filename, revision=revision or None))
        except (OSError, RuntimeError, ValueError) as error:
            raise _not_fetched(f"{HUB}{name}", error) from error

    file = fetch(None)
    return Weights(_under_our_names(read_tensors(file), file), f"{HUB}{name}", *_read_config(fetch(OPEN_CLIP_CONFIG)))


def _from_open_clip(model: str, tag: str) -> Weights:
    towers = open_clip.get_model_config(model) if model in open_clip.list_models() else None
    if towers is None:
        hint = did_you_mean(model, sorted({name for name, _ in open_clip.list_pretrained()}))
        raise UserError(f"init {model}:{tag} is neither a file or folder nor a model of open_clip. {hint}")
    about = open_clip.get_pretrained_cfg(model, tag)
    if not about:
        known = open_clip.list_pretrained_tags_by_model(model)
        hint = did_you_mean(tag, known) if known else "It has no published weights."
        raise UserError(f"open_clip {open_clip.__version__} knows no weights {tag!r} of {model}. {hint}")
    try:
        file = Path(pretrained.download_pretrained(about))
    except (OSError, RuntimeError, ValueError) as error:
        raise _not_fetched(f"{model}:{tag}", error) from error
    towers["quick_gelu"] = bool(about.get("quick_gelu"))
    return Weights(_under_our_names(read_tensors(file), file), f"{model}:{tag}", towers, about)


def _not_fetched(what: str, error: Exception) -> UserError:
    return UserError(
        f"{what} could not be fetched ({' '.join(str(error).split())}). Check the name and the connection, or download "
        "the weights elsewhere and name the file."
    )


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return dict(about["model_cfg"]), dict(about.get("preprocess_cfg", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no configuration of open_clip ({error}). Restore it, or name the file.") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file on the CPU. Wrappings of DDP, torch.compile and training checkpoints are taken off."""
    if path.suffix == ".safetensors":
        try:
            return _unwrapped(load_file(path), path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}). Restore it, or use another file.") from error
    if path.suffix not in PICKLES:
        raise UserError(f"{path} is no weights file: its name does not end in .safetensors, {', '.join(PICKLES)}.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(
            f"{path} cannot be read as plain weights ({reason}). Code in a file is never run: load it where you trust "
            "it, and save its state_dict with torch.save, or better as .safetensors."
        ) from error
    return _unwrapped(found, path)


def _unwrapped(found: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{path} holds no weights by name, but {type(found).__name__}. Save the model's state_dict.")
    tensors = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path} holds {name!r}, which is {type(tensor).__name__} and no tensor. Save the model's state_dict."
            )
        while name.startswith(WRAPPERS):
            name = name.partition(".")[2]
        tensors[name] = tensor
    return tensors


def _under_our_names(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    if any(name.startswith("towers.") for name in tensors):
        return dict(tensors)
    if not any(name.startswith("visual.") for name in tensors):
        shown = ", ".join(list(tensors)[:NAMES_SHOWN])
        raise UserError(
            f"{path} holds neither weights of clips nor of open_clip: its names are {shown}, … Convert it to "
            "open_clip's names (visual.*, transformer.*, token_embedding.weight, …)."
        )
    # open_clip's CustomTextCLIP keeps the text tower under "text.".
    plain = {name.removeprefix("text."): tensor for name, tensor in tensors.items()}
    return {f"towers.{name}": tensor for name, tensor in plain.items() if name not in NO_WEIGHTS}
