"""Weights to start from: those of another stage of ours, of another run, or of published CLIP models.

Weights alone are taken over, never the optimiser (METHOD §6). What may differ is adapted: the number of image
positions, text slots and target slots, and what the captioner reads. What may not is refused: widths, depths, the
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn import functional

from clips_data.errors import UserError
from clips_train import weights
from clips_train.config import TrainConfig
from clips_train.model import ClipsModel, sincos_positions
from clips_train.towers import SIZES, VOCAB_SIZES, named_sizes, tower_config
from clips_train.transforms import IMAGE_MEAN, IMAGE_STD
from clips_train.weights import Weights

IMAGE_POSITIONS, TEXT_POSITIONS = "towers.visual.positional_embedding", "towers.positional_embedding"
LOGIT_SCALE, LOGIT_BIAS = "towers.logit_scale", "towers.logit_bias"
SLOTS = ("decoder.queries", "decoder.positional_embedding")
TABLE_TOLERANCE = 0.01
"""What rounding to 16 bits may change of the table of positions, and some; learned positions differ by far more."""
DIFFERENCES_SHOWN = 3
SWITCHES = {
    "vision_cfg": ("no_ln_pre", "pool_type", "final_ln_after_pool", "act_kwargs", "norm_kwargs"),
    "text_cfg": ("no_causal_mask", "pool_type", "act_kwargs", "norm_kwargs"),
}
"""Settings of open_clip's towers that change what they compute, and none of their weights."""


def start_from(model: ClipsModel, config: TrainConfig, source: str) -> list[str]:
    """Loads weights into ``model``, which ``config`` describes, and returns lines for the log: what was adapted.

    ``source`` as in ``TrainConfig.init``. Raises ``UserError`` when it cannot be read or does not fit.
    """
    found = weights.read(source)
    _check_tokenizer(found, config)
    _check_shapes(found, model, config)
    own = model.state_dict()
    lines = [f"starting from {found.origin}", *_differences_in_use(found, config)]
    taken = {name: tensor for name, tensor in found.tensors.items() if name.startswith("towers.")}
    taken[IMAGE_POSITIONS] = _image_positions(taken[IMAGE_POSITIONS], own[IMAGE_POSITIONS], config, found, lines)
    keep_last = model.towers.text_pool_type == "last"
    taken[TEXT_POSITIONS] = _text_positions(taken[TEXT_POSITIONS], len(own[TEXT_POSITIONS]), keep_last, lines)
    taken = _logits(taken, own, lines) | _decoder(found, own, config, lines)
    model.load_state_dict({name: taken.get(name, tensor).reshape(tensor.shape) for name, tensor in own.items()})
    return lines


def _check_tokenizer(found: Weights, config: TrainConfig) -> None:
    if found.tokenizer in (None, config.tokenizer):
        return
    remedy = f"Set tokenizer to {found.tokenizer}" if found.tokenizer in ("bpe", "bert") else "Take other weights"
    raise UserError(
        f"{found.origin} reads tokens of the tokenizer {found.tokenizer}, this run those of {config.tokenizer}. "
        f"{remedy}, or start without init."
    )


# --- shapes -----------------------------------------------------------------------------------------------------------


def _facts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """What must be equal for one's weights to fit into the other's towers."""
    patch, embedding = tensors["towers.visual.conv1.weight"], tensors["towers.token_embedding.weight"]
    return {
        "image width": patch.shape[0],
        "patch side in pixels": patch.shape[-1],
        "number of image blocks": _num_blocks(tensors, "towers.visual.transformer."),
        "embedding width": tensors["towers.visual.proj"].shape[-1],
        "text width": embedding.shape[1],
        "number of text blocks": _num_blocks(tensors, "towers.transformer."),
        "vocabulary": embedding.shape[0],
    }


def _num_blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    start = f"{prefix}resblocks."
    return len({name.removeprefix(start).partition(".")[0] for name in tensors if name.startswith(start)})


def _check_shapes(found: Weights, model: ClipsModel, config: TrainConfig) -> None:
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("towers.")}
    theirs = {name: tensor for name, tensor in found.tensors.items() if name.startswith("towers.")}
    needed = {"towers.visual.conv1.weight", "towers.visual.proj", "towers.token_embedding.weight"}
    if not needed <= set(theirs):
        raise UserError(
            f"{found.origin} holds no image tower that is a plain vision transformer with a text tower beside it: "
            f"{', '.join(sorted(needed - set(theirs)))} is missing. Take weights of such a model, as ViT-B-32 is one."
        )
    ours_by_fact, theirs_by_fact = _facts(own), _facts(theirs)
    lines = [
        f"{fact} is {theirs_by_fact[fact]:,} in the weights and {ours_by_fact[fact]:,} in the model"
        for fact in ours_by_fact
        if ours_by_fact[fact] != theirs_by_fact[fact]
    ]
    if not lines:
        adapted = {IMAGE_POSITIONS, TEXT_POSITIONS, LOGIT_BIAS, LOGIT_SCALE}
        lines = [
            f"{name} is {_shape(theirs, name)} in the weights and {_shape(own, name)} in the model"
            for name in sorted((set(own) | set(theirs)) - adapted)
            if _shape(own, name) != _shape(theirs, name)
        ]
        lines += [f"{name} is missing" for name in (IMAGE_POSITIONS, TEXT_POSITIONS, LOGIT_SCALE) if name not in theirs]
    if lines:
        more = f" (and {len(lines) - DIFFERENCES_SHOWN} more)" if len(lines) > DIFFERENCES_SHOWN else ""
        raise UserError(
            f"{found.origin} does not fit a model of size {config.size} with tokenizer {config.tokenizer}: "
            f"{'; '.join(lines[:DIFFERENCES_SHOWN])}{more}. {_remedy(theirs, config)}"
        )


def _shape(tensors: Mapping[str, Tensor], name: str) -> list[int] | str:
    return list(tensors[name].shape) if name in tensors else "nothing"


def _remedy(theirs: Mapping[str, Tensor], config: TrainConfig) -> str:
    """Names the size that the weights have, where there is one."""
    facts = _facts(theirs)
    has_norm_before = "towers.visual.ln_pre.weight" in theirs
    tokenizers = {rows: name for name, rows in VOCAB_SIZES.items()}
    names = (name for name in open_clip.list_models() if "quickgelu" not in name) if has_norm_before else iter(SIZES)
    for name in names:
        if _facts_of_size(name) == {fact: value for fact, value in facts.items() if fact != "vocabulary"}:
            tokenizer = tokenizers.get(facts["vocabulary"], config.tokenizer)
            return f"The weights have the size {name} and the tokenizer {tokenizer}: set these, or take other weights."
    return "Set size and tokenizer as those of the weights, or take other weights."


def _facts_of_size(name: str) -> dict[str, int] | None:
    """``None`` for towers of another kind."""
    sizes = SIZES[name] if name in SIZES else named_sizes(open_clip.get_model_config(name))
    if sizes is None:
        return None
    return {
        "image width": sizes.image.width,
        "patch side in pixels": sizes.patch_px,
        "number of image blocks": sizes.image.layers,
        "embedding width": sizes.embed_dim,
        "text width": sizes.text.width,
        "number of text blocks": sizes.text.layers,
    }


# --- what is adapted --------------------------------------------------------------------------------------------------


def _image_positions(theirs: Tensor, own: Tensor, config: TrainConfig, found: Weights, lines: list[str]) -> Tensor:
    """The class token's row stays; the grid is interpolated, or computed anew where the table is fixed."""
    old, new = math.isqrt(len(theirs) - 1), math.isqrt(len(own) - 1)
    if old * old + 1 != len(theirs):
        raise UserError(
            f"{found.origin} has {len(theirs) - 1} image positions, which are no square. Take other weights."
        )
    change = f"image positions: {old} x {old} became {new} x {new}"
    if config.pos_embed == "sincos":
        table = sincos_positions(old, theirs.shape[1])
        if (theirs.float() - table).abs().max() > TABLE_TOLERANCE:
            raise UserError(
                f"{found.origin} has image positions of its own, this run the fixed table (pos_embed sincos). "
                "Set pos_embed to learned to take them over."
            )
        if old != new:
            lines.append(f"{change}, computed anew")
        return own
    if old == new:
        return theirs
    lines.append(f"{change}, interpolated")
    grid = theirs[1:].float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    grid = functional.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([theirs[:1].float(), grid[0].permute(1, 2, 0).flatten(0, 1)])


def _text_positions(theirs: Tensor, length: int, keep_last: bool, lines: list[str]) -> Tensor:
    """Cut, or interpolated. With ``keep_last`` the last slot, which the tower pools, keeps its row."""
    if len(theirs) == length:
        return theirs
    how = "cut" if length < len(theirs) else "interpolated"
    lines.append(f"text positions: {len(theirs)} became {length}, {how}")
    body, last = (theirs[:-1], theirs[-1:]) if keep_last else (theirs, theirs[:0])
    wanted = length - len(last)
    if wanted <= len(body):
        return torch.cat([body[:wanted], last])
    longer = functional.interpolate(body.float().T[None], size=wanted, mode="linear", align_corners=False)[0].T
    return torch.cat([longer, last.float()])


def _logits(taken: dict[str, Tensor], own: Mapping[str, Tensor], lines: list[str]) -> dict[str, Tensor]:
    """Scale and bias of the sigmoid loss belong together, and start afresh where the weights have no bias."""
    if LOGIT_BIAS in own and LOGIT_BIAS not in taken:
        lines.append("logit scale and bias: the weights have no bias, both start as for the sigmoid loss")
        return {name: tensor for name, tensor in taken.items() if name != LOGIT_SCALE}
    if LOGIT_BIAS in taken and LOGIT_BIAS not in own:
        lines.append("logit bias: left out, the softmax loss has none")
    return {name: tensor for name, tensor in taken.items() if name in own}


def _decoder(found: Weights, own: Mapping[str, Tensor], config: TrainConfig, lines: list[str]) -> dict[str, Tensor]:
    """The captioner's weights as far as they mean the same here; the rest starts afresh."""
    theirs = found.of_decoder()
    ours = {name: tensor for name, tensor in own.items() if name.startswith("decoder.")}
    if not ours or not theirs:
        if theirs:
            lines.append("captioner: left out, this run has none")
        elif ours:
            lines.append("captioner: starts afresh, the weights have none")
        return {}
    if _fusion(theirs) != _fusion(ours):
        lines.append(f"captioner: starts afresh, that of the weights has fusion {_fusion(theirs)}")
        return {}
    for fact, of in (("width", _width), ("number of blocks", lambda some: _num_blocks(some, "decoder.transformer."))):
        if of(theirs) != of(ours):
            raise UserError(
                f"{found.origin} has a captioner whose {fact} is {of(theirs)}, that of size {config.size} has "
                f"{of(ours)}. Set size as in the weights, or start from their towers alone: an export folder without "
                f"{weights.DECODER_WEIGHTS}."
            )
    taken = {name: tensor for name, tensor in theirs.items() if name in ours}
    for name in SLOTS:
        if name in taken and len(taken[name]) != len(ours[name]):
            lines.append(f"target slots: {len(taken[name])} became {len(ours[name])}, {_how(taken[name], ours[name])}")
            taken[name] = torch.cat([taken[name], ours[name].cpu()[len(taken[name]) :]])[: len(ours[name])]
    for text, names in (("starts afresh", set(ours) - set(theirs)), ("left out", set(theirs) - set(ours))):
        if names:
            lines.append(f"captioner: {', '.join(sorted(names))} {text}")
    return taken


def _how(theirs: Tensor, ours: Tensor) -> str:
    return "cut" if len(ours) < len(theirs) else "new ones start afresh"


def _fusion(decoder: Mapping[str, Tensor]) -> str:
    return "cross_attention" if any(".ln_1_kv." in name for name in decoder) else "concat"


def _width(decoder: Mapping[str, Tensor]) -> int:
    return decoder["decoder.head.weight"].shape[1]


def _differences_in_use(found: Weights, config: TrainConfig) -> list[str]:
    """Where the weights were made by another computation than they go into: they fit, and start from worse features."""
    lines = []
    if found.towers:
        ours: dict[str, Any] = tower_config(config)
        pairs = [("quick_gelu", bool(found.towers.get("quick_gelu")), bool(ours.get("quick_gelu")))]
        for part, kind in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
            default = kind()
            for name in SWITCHES[part]:
                there, here = (towers[part].get(name, getattr(default, name)) for towers in (found.towers, ours))
                pairs.append((f"{part}.{name}", there, here))
        lines += [
            f"note: {name} was {there} for the weights, and is {here} here"
            for name, there, here in pairs
            if there != here
        ]
    for name, here in (("mean", IMAGE_MEAN), ("std", IMAGE_STD)):
        there = tuple(found.preprocessing.get(name) or here)
        if there != here:
            lines.append(f"note: images had {name} {there} for the weights, and have {here} here")
    if found.run is not None and found.run.text_padding != config.text_padding:
        lines.append(
            f"note: text_padding was {found.run.text_padding} for the weights, and is {config.text_padding} here"
        )
    return lines
