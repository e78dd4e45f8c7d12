"""Any CLIP-like model: found by name, told apart by digest, and asked for unit features of images and texts.

Our runs and exports, open_clip's names, hubs and folders are all the same to who asks: teachers of ``clips embed``, the
models that ``clips eval`` compares and those that ``clips search`` looks with.

Shape suffixes: N images or texts, C channels, H and W pixels, L text slots, E embedding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.resources
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean
from clips_train import checkpoint, generate, text_tokenizers, transforms
from clips_train.device import pick_device
from clips_train.generate import Trained

DEMO: Final = "demo"
Precision = Literal["bf16", "fp16", "fp32"]
LOCAL, RUN, HUB = "local-dir:", "run:", "hf-hub:"
OPEN_CLIP_CONFIG: Final = "open_clip_config.json"
_SUFFIXES: Final = (".json", ".safetensors", ".bin", ".pt", ".txt")
UNLOADABLE: Final = (
    *(RuntimeError, ValueError, OSError, LookupError, TypeError, AttributeError, AssertionError, ImportError),
    *(pickle.UnpicklingError, SafetensorError),
)
"""What open_clip raises for folders whose configuration or weights are damaged or another library's."""
_HOW_TO_NAME: Final = (
    "Name an open_clip model with its tag (NAME:TAG), hf-hub:NAME, local-dir:FOLDER, run:NAME or the folder of a run."
)


@dataclass(frozen=True)
class Named:
    """A model that is to be loaded."""

    name: str
    """As the user gave it."""
    kind: Literal["run", "open_clip"]
    source: str
    """A run's or checkpoint's folder, or what open_clip is to load."""
    tag: str | None
    digest: str
    """Of the weights, where they are files here; else the name."""


def find(names: Sequence[str], pretrained: Sequence[str], runs: Path) -> list[Named]:
    """The models of these names, not loaded yet; open_clip names without a tag take theirs from ``pretrained`` in turn.

    Raises ``UserError`` for names that mean nothing here.
    """
    tags = list(pretrained)
    found = [_find(name, tags, runs) for name in names]
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


def run_in(folder: Path) -> Named:
    """The newest checkpoint of a run's folder. Raises ``UserError`` where there is none."""
    newest = checkpoint.find(folder)
    return Named(f"{RUN}{folder.name}", "run", str(newest), None, ledger.digest_file(newest / checkpoint.WEIGHTS))


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
    return Named(f"{model}:{tag}", "open_clip", model, tag, f"{model}:{digest}")


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the pixels of a model. The fields are open_clip's ``preprocess_cfg``."""

    size: int
    resize_mode: Literal["squash", "shortest", "longest"]
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fill_color: int = 0

    def resized(self, resize: Literal["auto", "squash", "crop"]) -> Preprocessing:
        """With another way to make a picture square; ``auto`` keeps the model's."""
        if resize == "auto":
            return self
        return dataclasses.replace(self, resize_mode="squash" if resize == "squash" else "shortest")

    def transform(self) -> Callable[[Image], Tensor]:
        """RGB picture → float32 [C, H, W], normalised: open_clip's own transform for evaluation."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        transform: Callable[[Image], Tensor] = image_transform_v2(PreprocessCfg(**self.about), is_train=False)
        return transform

    def squarer(self) -> Callable[[Image], Tensor]:
        """RGB picture → uint8 [C, H, W]: the same transform up to where it becomes floats and is normalised."""
        steps: list[Callable[[Image], Image]] = self.transform().transforms[:-2]  # type: ignore[attr-defined]

        def squared(picture: Image) -> Tensor:
            for step in steps:
                picture = step(picture)
            return transforms.to_pixels(picture)

        return squared

    @property
    def about(self) -> dict[str, Any]:
        """For result files."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Encoder:
    """A loaded model."""

    named: Named
    preprocessing: Preprocessing
    tokenizer: str
    """Name of what makes its ids, for result files."""
    context_length: int
    width: int
    """Of its features."""
    logit_scale: float
    """What its similarities are multiplied with before a softmax."""
    trained: Trained | None
    """The checkpoint, where the model is a run of ours: its captioner is there."""
    device: torch.device
    _encode_image: Callable[[Tensor], Tensor]
    _encode_text: Callable[[Sequence[str]], Tensor]
    _arithmetic: torch.dtype

    @property
    def image_px(self) -> int:
        return self.preprocessing.size

    @property
    def about(self) -> dict[str, Any]:
        """For ``index.json`` and result files."""
        named = self.named
        return {
            "model": named.name if named.tag is None else f"{named.source}:{named.tag}",
            "digest": named.digest,
            "image_px": self.image_px,
            "width": self.width,
            "logit_scale": self.logit_scale,
        }

    def image_features(self, pixels_NCHW: Tensor) -> Tensor:
        """Unit features float32 [N, E] of pixels of ``image_px`` on each side: uint8, or float32 as ``preprocessing``
        makes them."""
        pixels_NCHW = pixels_NCHW.to(self.device, non_blocking=True)
        if not pixels_NCHW.is_floating_point():
            mean, std = (
                torch.tensor(values, device=self.device).view(3, 1, 1)
                for values in (self.preprocessing.mean, self.preprocessing.std)
            )
            pixels_NCHW = (pixels_NCHW.float() / 255 - mean) / std
        with self._inference():
            image_NE = self._encode_image(pixels_NCHW)
        return functional.normalize(image_NE.float(), dim=-1)

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Unit features float32 [N, E]; over-long texts are cut at the model's own length."""
        with self._inference():
            text_NE = self._encode_text(captions)
        return functional.normalize(text_NE.float(), dim=-1)

    @contextlib.contextmanager
    def _inference(self) -> Iterator[None]:
        in_full = self._arithmetic == torch.float32
        autocast = contextlib.nullcontext() if in_full else torch.autocast(self.device.type, self._arithmetic)
        with torch.inference_mode(), autocast:
            yield


def load(named: Named, device: str, precision: Precision, *, bert_vocab: str | None = None) -> Encoder:
    """``bert_vocab`` is BERT-base-uncased's ``vocab.txt``, for CLIPS towers whose folder has no tokenizer of its own.

    Raises ``UserError`` where the model cannot be loaded, wants images that are not square, or has a CLIPS text tower
    without its tokenizer.
    """
    where = pick_device(device)
    arithmetic = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if precision == "fp16" and where.type == "cpu":
        arithmetic = torch.float32
    if named.kind == "run":
        return _load_run(named, where, arithmetic)
    return _load_open_clip(named, where, arithmetic, bert_vocab)


def _load_run(named: Named, device: torch.device, arithmetic: torch.dtype) -> Encoder:
    """A checkpoint of ``clips train``."""
    return of_trained(generate.load_trained(Path(named.source), str(device)), named, arithmetic)


def of_trained(trained: Trained, named: Named, arithmetic: torch.dtype = torch.float32) -> Encoder:
    """A checkpoint that is loaded already, or a model that is being trained."""
    model, config = trained.model, trained.config

    def encode_text(captions: Sequence[str]) -> Tensor:
        return trained.encode_texts(captions)[0]

    preprocessing = Preprocessing(
        config.image_px, transforms.RESIZE_MODE, transforms.INTERPOLATION, transforms.IMAGE_MEAN, transforms.IMAGE_STD
    )
    return Encoder(
        named,
        preprocessing,
        tokenizer={"bpe": "clip", "bert": "clips"}[config.tokenizer],
        context_length=config.context_length,
        width=_width(encode_text),
        logit_scale=float(model.logit_scale.detach().exp()),
        trained=trained,
        device=trained.device,
        _encode_image=lambda pixels_NCHW: model.encode_image(pixels_NCHW)[0],
        _encode_text=encode_text,
        _arithmetic=arithmetic,
    )


def _load_open_clip(named: Named, device: torch.device, arithmetic: torch.dtype, bert_vocab: str | None) -> Encoder:
    import open_clip

    try:
        model, _ = open_clip.create_model_from_pretrained(named.source, pretrained=named.tag, device=device)
        tokenizer = text_tokenizers.of_open_clip(named.source, bert_vocab)
    except UNLOADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"open_clip could not load --model {named.name}: {reason}. Check its name, tag and files."
        ) from error
    model.eval()
    about = open_clip.get_model_preprocess_cfg(model)
    size = about["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"--model {named.name} wants images of {height} x {width} px; only square ones are made.")

    def encode_text(captions: Sequence[str]) -> Tensor:
        features: Tensor = model.encode_text(tokenizer.ids(list(captions)).to(device))
        return features

    return Encoder(
        named,
        Preprocessing(
            height,
            about.get("resize_mode") or "shortest",
            about.get("interpolation") or "bicubic",
            tuple(about["mean"]),
            tuple(about["std"]),
            about.get("fill_color") or 0,
        ),
        tokenizer=tokenizer.name,
        context_length=tokenizer.context_length,
        width=_width(encode_text),
        logit_scale=float(model.logit_scale.detach().exp()),
        trained=None,
        device=device,
        _encode_image=model.encode_image,
        _encode_text=encode_text,
        _arithmetic=arithmetic,
    )


def _width(encode_text: Callable[[Sequence[str]], Tensor]) -> int:
    """Of a model's features, found by asking for some."""
    with torch.inference_mode():
        return int(encode_text([""]).shape[-1])
