"""The models that teach: found by name, told apart by digest, and asked for unit features of pixels and texts.

Shape suffixes: N images or texts, C channels, H and W pixels, L text slots, E embedding.
"""

from __future__ import annotations

import contextlib
import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean
from clips_train import checkpoint, generate, transforms
from clips_train.config import EmbedConfig
from clips_train.device import pick_device

DEMO: Final = "demo"
LOCAL, RUN, HUB = "local-dir:", "run:", "hf-hub:"
OPEN_CLIP_CONFIG: Final = "open_clip_config.json"
_SUFFIXES: Final = (".json", ".safetensors", ".bin", ".pt", ".txt")
_HOW_TO_NAME: Final = (
    "Name an open_clip model with its tag (NAME:TAG), hf-hub:NAME, local-dir:FOLDER, run:NAME or the folder of a run."
)


@dataclass(frozen=True)
class Named:
    """A teacher that is to be loaded."""

    name: str
    """As the user gave it."""
    kind: Literal["run", "open_clip"]
    source: str
    """A run's or checkpoint's folder, or what open_clip is to load."""
    tag: str | None
    digest: str
    """Of the weights, where they are files here; else the name."""


def find(config: EmbedConfig, runs: Path) -> list[Named]:
    """The teachers of a config, not loaded yet. Raises ``UserError`` for names that mean nothing here."""
    tags = list(config.pretrained)
    found = [_find(name, tags, runs) for name in config.model]
    if tags:
        raise UserError(f"--pretrained {tags[0]} belongs to no --model: every open_clip name has its tag already.")
    return found


def _find(name: str, tags: list[str], runs: Path) -> Named:
    """Takes its tag from ``tags`` where it has none."""
    if name == DEMO:
        return _local(name, Path(str(importlib.resources.files("clips_data"))) / "demo" / "weights" / "clip")
    if name.startswith(RUN):
        return _run(name, runs / name.removeprefix(RUN))
    if name.startswith(LOCAL):
        return _local(name, Path(name.removeprefix(LOCAL)))
    if name.startswith(HUB):
        return Named(name, "open_clip", name, None, name)
    folder = Path(name)
    if (folder / checkpoint.ABOUT).is_file() or (folder / checkpoint.CHECKPOINTS).is_dir():
        return _run(name, folder)
    if folder.is_dir():
        return _local(name, folder)
    return _pretrained(name, tags)


def _run(name: str, folder: Path) -> Named:
    if not folder.is_dir():
        known = [path.name for path in folder.parent.glob("*") if path.is_dir()] or ["none"]
        raise UserError(f"There is no run {folder}. {did_you_mean(folder.name, known)}")
    newest = checkpoint.find(folder)
    return Named(name, "run", str(newest), None, ledger.digest_file(newest / checkpoint.WEIGHTS))


def _local(name: str, folder: Path) -> Named:
    if not (folder / OPEN_CLIP_CONFIG).is_file():
        raise UserError(f"--model {name}: {folder} has no {OPEN_CLIP_CONFIG} and no checkpoints. {_HOW_TO_NAME}")
    return Named(name, "open_clip", f"{LOCAL}{folder}", None, ledger.digest_model(folder, _SUFFIXES))


def _pretrained(name: str, tags: list[str]) -> Named:
    import open_clip

    model, _, tag = name.partition(":")
    known = open_clip.list_models()
    if model not in known:
        raise UserError(f"--model {name} is no open_clip model, folder or run. {did_you_mean(model, known)}")
    if not tag:
        if not tags:
            raise UserError(
                f"--model {name} names an architecture without weights. Write --model {name}:TAG, with one of "
                f"{', '.join(open_clip.list_pretrained_tags_by_model(model)) or 'no tags that open_clip knows'}."
            )
        tag = tags.pop(0)
    weights = Path(tag)
    digest = ledger.digest_file(weights) if weights.is_file() else tag
    return Named(name, "open_clip", model, tag, f"{model}:{digest}")


@dataclass(frozen=True)
class TeacherModel:
    """A loaded teacher."""

    named: Named
    image_px: int
    width: int
    """Of its features."""
    logit_scale: float
    """What its similarities are multiplied with before a softmax."""
    _encode_image: Callable[[Tensor], Tensor]
    _encode_text: Callable[[Sequence[str]], Tensor]
    _device: torch.device
    _arithmetic: torch.dtype

    @property
    def about(self) -> dict[str, Any]:
        """For ``index.json``."""
        named = self.named
        return {
            "model": named.name if named.tag is None else f"{named.source}:{named.tag}",
            "digest": named.digest,
            "image_px": self.image_px,
            "width": self.width,
            "logit_scale": self.logit_scale,
        }

    def image_features(self, pixels_NCHW: Tensor) -> Tensor:
        """Unit features float32 [N, E] of uint8 pixels of ``image_px`` on each side."""
        with self._inference():
            image_NE = self._encode_image(pixels_NCHW.to(self._device, non_blocking=True))
        return functional.normalize(image_NE.float(), dim=-1)

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Unit features float32 [N, E]; over-long texts are cut at the teacher's own length."""
        with self._inference():
            text_NE = self._encode_text(captions)
        return functional.normalize(text_NE.float(), dim=-1)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        in_full = self._arithmetic == torch.float32
        autocast = contextlib.nullcontext() if in_full else torch.autocast(self._device.type, self._arithmetic)
        with torch.inference_mode(), autocast:
            yield


def load(named: Named, config: EmbedConfig) -> TeacherModel:
    """Raises ``UserError`` where the model cannot be loaded, or wants images that are not square."""
    device = pick_device(config.device)
    arithmetic = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
    if config.precision == "fp16" and device.type == "cpu":
        arithmetic = torch.float32
    make = _load_run if named.kind == "run" else _load_open_clip
    return make(named, device, arithmetic)


def _load_run(named: Named, device: torch.device, arithmetic: torch.dtype) -> TeacherModel:
    """A checkpoint of ``clips train``."""
    trained = generate.load_trained(Path(named.source), str(device))
    model, config = trained.model, trained.config

    def encode_text(captions: Sequence[str]) -> Tensor:
        return trained.encode_texts(captions)[0]

    return TeacherModel(
        named,
        config.image_px,
        _width(encode_text),
        float(model.logit_scale.detach().exp()),
        lambda pixels_NCHW: model.encode_image(transforms.normalise(pixels_NCHW))[0],
        encode_text,
        device,
        arithmetic,
    )


def _load_open_clip(named: Named, device: torch.device, arithmetic: torch.dtype) -> TeacherModel:
    import open_clip

    try:
        model, _ = open_clip.create_model_from_pretrained(named.source, pretrained=named.tag, device=device)
        tokenize = open_clip.get_tokenizer(named.source)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"open_clip could not load --model {named.name}: {reason}. Check its name, tag and files."
        ) from error
    model.eval()
    about = open_clip.get_model_preprocess_cfg(model)
    size = about["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"--model {named.name} wants images of {height} x {width} px; only square ones are augmented.")
    mean, std = (torch.tensor(about[name], device=device).view(3, 1, 1) for name in ("mean", "std"))

    def encode_text(captions: Sequence[str]) -> Tensor:
        features: Tensor = model.encode_text(tokenize(list(captions)).to(device))
        return features

    def encode_image(pixels_NCHW: Tensor) -> Tensor:
        features: Tensor = model.encode_image((pixels_NCHW.float() / 255 - mean) / std)
        return features

    embed_dim = _width(encode_text)
    scale = float(model.logit_scale.detach().exp())
    return TeacherModel(named, height, embed_dim, scale, encode_image, encode_text, device, arithmetic)


def _width(encode_text: Callable[[Sequence[str]], Tensor]) -> int:
    """Of a teacher's features, found by asking for some."""
    with torch.inference_mode():
        return int(encode_text([""]).shape[-1])
