"""CLIPS: two towers of open_clip with the released switches, and the captioner beside them (METHOD §1, §2).

The towers are an ``open_clip.CLIP``, so their weights are open_clip's under open_clip's names. Tokens for the captioner
are taken on the way: patch tokens before the final norm, text states before the final norm.

Shape suffixes: B samples, C channels, H and W pixels, P patches, L text slots, T = L - 1, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional

from clips_data.errors import UserError, did_you_mean
from clips_train.blocks import added, compute_dtype, use_own_attention
from clips_train.config import ModelConfig
from clips_train.decoder import NORM_EPS, CaptionDecoder

VOCAB_SIZES = {"bpe": 49408, "bert": 32000}
"""Rows of the embedding table; the paper's has 32,000 for the 30,522 entries of its vocabulary (METHOD §1.3)."""

MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POSITION_TEMPERATURE = 10_000.0
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
SIGMOID_LOGIT_SCALE, SIGMOID_LOGIT_BIAS = math.log(10), -10.0
"""Where SigLIP starts."""
STD_OF_CUT_NORMAL = 0.87962566  # of a unit normal cut at -2 and 2
HEAD_WIDTH, OPEN_CLIP_CONTEXT = 64, 77  # what open_clip's configurations leave out
REFERENCE_DEPTH = 12  # text tower and decoder scale their output projections as for this depth, whatever theirs


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
    preprocess = {"mean": list(MEAN_RGB), "std": list(STD_RGB), "interpolation": "bilinear", "resize_mode": "squash"}
    start = {"init_logit_scale": SIGMOID_LOGIT_SCALE, "init_logit_bias": SIGMOID_LOGIT_BIAS} if sigmoid else {}
    return {"model_cfg": {**tower_config(config), **start}, "preprocess_cfg": preprocess}


class ClipsModel(nn.Module):
    """Towers (``open_clip.CLIP`` with a vision transformer) and captioner. Build with ``build_model``."""

    def __init__(self, towers: Any, decoder: CaptionDecoder | None) -> None:
        super().__init__()
        self.towers = towers
        self.decoder = decoder
        use_own_attention(towers.visual.transformer.resblocks)
        use_own_attention(towers.transformer.resblocks)

    def encode_image(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features fp32 [B, E], and patch tokens [B, P, width] before the final norm, without the class token."""
        visual = self.towers.visual
        tokens_BSW = visual.transformer(visual._embeds(image_BCHW))
        pooled_BW, _ = visual._pool(tokens_BSW)
        return _unit(pooled_BW @ visual.proj), tokens_BSW[:, 1:]

    def encode_text(
        self, ids_RL: Tensor, mask_RL: Tensor | None = None, positions_L: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Unit features fp32 [R, E], and states [R, L - 1, width] before the final norm, without the last slot.

        ``mask_RL``, bool, is true where a slot may be attended to. ``positions_L``, int64, says which slot of a whole
        text each one is, where texts were trimmed; without it they are the first.
        """
        towers, num_slots = self.towers, ids_RL.shape[1]
        whole = towers.positional_embedding
        positions_LW = whole[:num_slots] if positions_L is None else whole[positions_L]
        states_RLW = towers.token_embedding(ids_RL) + positions_LW
        states_RLW = towers.transformer(states_RLW, attn_mask=self._text_mask(states_RLW, mask_RL))
        pooled_RW = text_global_pool(states_RLW, ids_RL, towers.text_pool_type, eos_token_id=towers.text_eos_id)
        pooled_RW = towers.ln_final(pooled_RW)  # of each slot by itself: norming the pooled one is enough
        return _unit(_projected(pooled_RW, towers.text_projection)), states_RLW[:, :-1]

    def _text_mask(self, states_RLW: Tensor, mask_RL: Tensor | None) -> Tensor | None:
        """Added to the attention logits: [L, L] of a causal tower, [R, 1, 1 or L, L] where slots are masked."""
        causal_LL, dtype, num_slots = self.towers.attn_mask, compute_dtype(states_RLW), states_RLW.shape[1]
        causal = None if causal_LL is None else causal_LL[:num_slots, :num_slots].to(dtype)
        if mask_RL is None:
            return causal
        keys = added(mask_RL, dtype)[:, None, None, :]
        return keys if causal is None else keys + causal

    def caption_states(
        self,
        patch_tokens_BPW: Tensor,
        token_states_BTW: Tensor | None,
        inputs_BQ: Tensor | None = None,
        token_mask_BT: Tensor | None = None,
    ) -> Tensor:
        """Decoder outputs [B, Q, D], ready for the head; see ``CaptionDecoder.forward``."""
        assert self.decoder is not None, "this model has no captioner"
        states: Tensor = self.decoder(patch_tokens_BPW, token_states_BTW, inputs_BQ, token_mask_BT)
        return states

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Whether the blocks' activations are computed again in the backward pass instead of kept."""
        self.towers.set_grad_checkpointing(enabled)
        if self.decoder is not None:
            self.decoder.gradient_checkpointing = enabled

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the scale that all contrastive losses share."""
        scale: nn.Parameter = self.towers.logit_scale
        return scale

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """What the sigmoid loss adds to its logits."""
        bias: nn.Parameter | None = self.towers.logit_bias
        return bias


def _projected(pooled_RW: Tensor, projection: Any) -> Tensor:
    """open_clip's text projection is a matrix, a layer, or absent."""
    if projection is None:
        return pooled_RW
    projected: Tensor = projection(pooled_RW) if isinstance(projection, nn.Module) else pooled_RW @ projection
    return projected


def _unit(features_BE: Tensor) -> Tensor:
    return functional.normalize(features_BE.float(), dim=-1)


def build_model(config: ModelConfig, *, seed: int = 0, sigmoid: bool = False) -> ClipsModel:
    """A freshly initialised model; equal seeds give equal weights, whatever torch's global generator holds.

    ``sigmoid`` adds the bias that the sigmoid loss learns, and starts the scale as that loss does.
    """
    sizes = sizes_of(config)
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator; their values are replaced
        towers = open_clip.CLIP(**open_clip_config(config, sigmoid=sigmoid)["model_cfg"])
        decoder = None if config.decoder == "none" else _decoder(config, sizes)
    model = ClipsModel(towers, decoder)
    initialise(model, torch.Generator().manual_seed(seed), image_std=sizes.image_std)
    if config.pos_embed == "sincos":
        grid = config.image_px // sizes.patch_px
        model.towers.visual.positional_embedding.data.copy_(sincos_positions(grid, sizes.image.width))
        model.towers.visual.positional_embedding.requires_grad_(False)
    return model


def _decoder(config: ModelConfig, sizes: Sizes) -> CaptionDecoder:
    assert config.decoder != "none"
    return CaptionDecoder(
        width=sizes.decoder.width,
        layers=sizes.decoder.layers,
        heads=sizes.decoder.heads,
        num_queries=config.target_length,
        vocab_size=VOCAB_SIZES[config.tokenizer],
        image_width=sizes.image.width,
        text_width=None if config.condition is None else sizes.text.width,
        mode=config.decoder,
        fusion=config.fusion,
    )


def sincos_positions(grid: int, width: int) -> Tensor:
    """MoCo-v3's fixed 2-D table, fp32 [1 + grid², width]: a zero row for the class token, then patches row by row.

    open_clip's own ``sin_cos_2d`` spaces its frequencies otherwise (METHOD §1.2).
    """
    quarter = width // 4
    frequency = POSITION_TEMPERATURE ** -(torch.arange(quarter, dtype=torch.float64) / (quarter - 1))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    x_angle, y_angle = x.flatten()[:, None] * frequency, y.flatten()[:, None] * frequency
    table = torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=table.dtype), table]).float()


@torch.no_grad()
def initialise(model: ClipsModel, generator: torch.Generator, *, image_std: float = 0.02) -> None:
    """Initial values measured on the authors' JAX code (METHOD §1.2); biases 0, norms 1."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("bias", "in_proj_bias") and not isinstance(module, nn.LayerNorm):
                nn.init.zeros_(parameter)
    towers = model.towers
    sigmoid = towers.logit_bias is not None
    nn.init.constant_(towers.logit_scale, SIGMOID_LOGIT_SCALE if sigmoid else INITIAL_LOGIT_SCALE)
    if sigmoid:
        nn.init.constant_(towers.logit_bias, SIGMOID_LOGIT_BIAS)
    _initialise_image_tower(towers.visual, image_std, generator)
    _initialise_blocks(towers.transformer, generator)
    nn.init.normal_(towers.token_embedding.weight, std=0.02, generator=generator)
    nn.init.normal_(towers.positional_embedding, std=0.01, generator=generator)
    nn.init.normal_(towers.text_projection, std=towers.text_projection.shape[0] ** -0.5, generator=generator)
    if model.decoder is not None:
        _initialise_decoder(model.decoder, generator)


def _initialise_decoder(decoder: CaptionDecoder, generator: torch.Generator) -> None:
    """The reference's values; what it has no counterpart of starts as in the towers."""
    _initialise_blocks(decoder.transformer, generator)
    if decoder.mode == "queries":
        nn.init.normal_(decoder.queries, generator=generator)
    else:
        nn.init.normal_(decoder.token_embedding.weight, std=0.02, generator=generator)
        nn.init.normal_(decoder.positional_embedding, std=0.01, generator=generator)
    for linear in (decoder.image_projection, decoder.text_projection, decoder.head):
        if linear is not None:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)


def _initialise_image_tower(visual: Any, std: float, generator: torch.Generator) -> None:
    width = visual.class_embedding.shape[0]
    nn.init.normal_(visual.class_embedding, std=1e-6, generator=generator)
    nn.init.normal_(visual.positional_embedding, std=width**-0.5, generator=generator)
    nn.init.normal_(visual.proj, std=width**-0.5, generator=generator)
    fan_in = visual.conv1.weight[0].numel()
    nn.init.normal_(visual.conv1.weight, std=fan_in**-0.5, generator=generator)  # flax's default, nothing was measured
    for block in visual.transformer.resblocks:
        for weight in (block.attn.in_proj_weight, block.attn.out_proj.weight, block.mlp.c_fc.weight):
            nn.init.normal_(weight, std=std, generator=generator)
        uncut_std = math.sqrt(0.3072 / width) / STD_OF_CUT_NORMAL
        cut = 2 * uncut_std
        nn.init.trunc_normal_(block.mlp.c_proj.weight, std=uncut_std, a=-cut, b=cut, generator=generator)


def _initialise_blocks(transformer: Any, generator: torch.Generator) -> None:
    """Widths set the scale; what returns to the residual stream is scaled down as for 12 blocks."""
    width = transformer.resblocks[0].attn.embed_dim
    output_std = width**-0.5 * (2 * REFERENCE_DEPTH) ** -0.5
    for block in transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5, generator=generator)
        nn.init.normal_(block.attn.out_proj.weight, std=output_std, generator=generator)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5, generator=generator)
        nn.init.normal_(block.mlp.c_proj.weight, std=output_std, generator=generator)
