"""The sizes of towers and captioners, ours and open_clip's, as configurations that open_clip understands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import open_clip

from clips_data.errors import UserError, did_you_mean
from clips_train.config import ModelConfig
from clips_train.decoder import NORM_EPS
from clips_train.transforms import IMAGE_MEAN, IMAGE_STD, INTERPOLATION, RESIZE_MODE

VOCAB_SIZES = {"bpe": 49408, "bert": 32000}
"""Rows of the embedding table; the paper's has 32,000 for the 30,522 entries of its vocabulary (METHOD §1.3)."""

SIGMOID_LOGIT_SCALE, SIGMOID_LOGIT_BIAS = math.log(10), -10.0
"""Where SigLIP starts."""
HEAD_WIDTH, OPEN_CLIP_CONTEXT = 64, 77  # what open_clip's configurations leave out


@dataclass(frozen=True)
class Tower:
    """Width and depth of a transformer."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class Sizes:
    """One row of the table in METHOD §1.1. The decoder is as large as the text tower, but for ``tiny``."""

    image: Tower
    patch_px: int
    embed_dim: int
    text: Tower
    decoder: Tower
    image_std: float = 0.02
    """Initial spread of the image tower's attention and first MLP weights: the reference's, for widths from 384 up."""


_S, _B, _L, _H = Tower(384, 12, 6), Tower(512, 12, 8), Tower(768, 12, 12), Tower(1024, 24, 16)
SIZES = {
    # Shallow, so that a minute of two cores is many steps; 0.02 would leave so narrow a tower almost without signal.
    "tiny": Sizes(Tower(128, 2, 4), 16, 128, Tower(128, 1, 4), Tower(128, 1, 4), image_std=0.08),
    "S/16": Sizes(Tower(384, 12, 6), 16, 384, _S, _S),
    "B/16": Sizes(Tower(768, 12, 12), 16, 512, _B, _B),
    "L/16": Sizes(Tower(1024, 24, 16), 16, 768, _L, _L),
    "L/14": Sizes(Tower(1024, 24, 16), 14, 768, _L, _L),
    "H/14": Sizes(Tower(1280, 32, 16), 14, 1024, _H, _H),
}


def sizes_of(config: ModelConfig) -> Sizes:
    """Raises ``UserError`` for a name that is neither ours nor that of an open_clip model with our kind of towers."""
    if config.size in SIZES:
        return SIZES[config.size]
    sizes = named_sizes(_named_config(config))
    assert sizes is not None
    return sizes


def named_sizes(named: dict[str, Any]) -> Sizes | None:
    """Of a configuration of open_clip; ``None`` where a tower is no transformer of open_clip's own."""
    image, text = named["vision_cfg"], named["text_cfg"]
    if "timm_model_name" in image or "hf_model_name" in text or not isinstance(image["layers"], int):
        return None
    text_tower = Tower(text["width"], text["layers"], text["heads"])
    return Sizes(
        image=Tower(image["width"], image["layers"], image["width"] // image.get("head_width", HEAD_WIDTH)),
        patch_px=image["patch_size"],
        embed_dim=named["embed_dim"],
        text=text_tower,
        decoder=text_tower,
    )


def tower_config(config: ModelConfig) -> dict[str, Any]:
    """Constructor arguments of ``open_clip.CLIP``, as in the released configurations (METHOD §1.5)."""
    if config.size not in SIZES:
        return _named_config(config)
    sizes = SIZES[config.size]
    text: dict[str, Any] = {
        "context_length": config.context_length,
        "vocab_size": VOCAB_SIZES[config.tokenizer],
        "width": sizes.text.width,
        "heads": sizes.text.heads,
        "layers": sizes.text.layers,
        "pool_type": "last",
        "no_causal_mask": True,
        "act_kwargs": {"approximate": "tanh"},
        "norm_kwargs": {"eps": NORM_EPS},
    }
    if config.tokenizer == "bert":
        text |= {
            "hf_tokenizer_name": "bert-base-uncased",
            "tokenizer_mode": "clips",
            "tokenizer_kwargs": {"strip_sep_token": True},
        }
    return {
        "embed_dim": sizes.embed_dim,
        "vision_cfg": {
            "image_size": config.image_px,
            "patch_size": sizes.patch_px,
            "width": sizes.image.width,
            "layers": sizes.image.layers,
            "head_width": sizes.image.width // sizes.image.heads,
            "no_ln_pre": True,
            "pool_type": "avg",
            "final_ln_after_pool": True,
            "norm_kwargs": {"eps": NORM_EPS},
        },
        "text_cfg": text,
    }


def _named_config(config: ModelConfig) -> dict[str, Any]:
    """The towers of an open_clip model, for images of our size."""
    name, known = config.size, open_clip.list_models()
    if name not in known:
        raise UserError(
            f"size {name!r} is neither one of {', '.join(SIZES)} nor the name of an open_clip {open_clip.__version__} "
            f"model. {did_you_mean(name, [*SIZES, *known])}"
        )
    named: dict[str, Any] = open_clip.get_model_config(name)
    image, text = named["vision_cfg"], named["text_cfg"]
    reason = _why_not(named)
    if reason:
        raise UserError(f"size {name!r} cannot be trained here: {reason}. Choose a plain one, such as ViT-B-32.")
    if config.tokenizer != "bpe":
        raise UserError(f"size {name!r} reads open_clip's own tokens: set tokenizer to bpe instead of bert.")
    if config.context_length != text.get("context_length", OPEN_CLIP_CONTEXT):
        raise UserError(
            f"size {name!r} has texts of {text.get('context_length', OPEN_CLIP_CONTEXT)} slots, context_length is "
            f"{config.context_length}. Set context_length to {text.get('context_length', OPEN_CLIP_CONTEXT)}."
        )
    if config.image_px % image["patch_size"]:
        raise UserError(
            f"image_px {config.image_px} is not a multiple of the {image['patch_size']} px patch of size {name!r}."
        )
    return {**named, "vision_cfg": {**image, "image_size": config.image_px}}


def _why_not(named: dict[str, Any]) -> str | None:
    """What keeps a model of open_clip from being towers of ours."""
    image, text = named["vision_cfg"], named["text_cfg"]
    if "multimodal_cfg" in named:
        return "it has a captioner of its own"
    if text.get("hf_model_name"):
        return f"its text tower is {text['hf_model_name']} from Hugging Face"
    if named.get("custom_text"):
        return "it keeps its text tower apart (open_clip's CustomTextCLIP)"
    if image.get("timm_model_name"):
        return f"its image tower is {image['timm_model_name']} of timm, not open_clip's own vision transformer"
    if not isinstance(image["layers"], int):
        return "its image tower is a ResNet, not a vision transformer"
    if text.get("hf_tokenizer_name") or text["vocab_size"] != VOCAB_SIZES["bpe"]:
        return (
            f"its tokenizer is {text.get('hf_tokenizer_name')} with {text['vocab_size']:,} entries, "
            f"and not open_clip's own with {VOCAB_SIZES['bpe']:,}"
        )
    return None


def open_clip_config(config: ModelConfig, *, sigmoid: bool = False) -> dict[str, Any]:
    """``open_clip_config.json`` of an exported model, for stock open_clip's ``local-dir:``."""
    preprocess = {
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
        "interpolation": INTERPOLATION,
        "resize_mode": RESIZE_MODE,
    }
    start = {"init_logit_scale": SIGMOID_LOGIT_SCALE, "init_logit_bias": SIGMOID_LOGIT_BIAS} if sigmoid else {}
    return {"model_cfg": {**tower_config(config), **start}, "preprocess_cfg": preprocess}
