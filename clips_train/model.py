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

from clips_train.config import ModelConfig
from clips_train.decoder import NORM_EPS, CaptionDecoder

VOCAB_SIZES = {"bpe": 49408, "bert": 32000}
"""Rows of the embedding table; the paper's has 32,000 for the 30,522 entries of its vocabulary (METHOD §1.3)."""

MEAN_RGB, STD_RGB = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POSITION_TEMPERATURE = 10_000.0
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
STD_OF_CUT_NORMAL = 0.87962566  # of a unit normal cut at -2 and 2
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


def tower_config(config: ModelConfig) -> dict[str, Any]:
    """Constructor arguments of ``open_clip.CLIP``, as in the released configurations (METHOD §1.5)."""
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


def open_clip_config(config: ModelConfig) -> dict[str, Any]:
    """``open_clip_config.json`` of an exported model, for stock open_clip's ``local-dir:``."""
    preprocess = {"mean": list(MEAN_RGB), "std": list(STD_RGB), "interpolation": "bilinear", "resize_mode": "squash"}
    return {"model_cfg": tower_config(config), "preprocess_cfg": preprocess}


class ClipsModel(nn.Module):
    """Towers (``open_clip.CLIP``) and captioner. Build with ``build_model``."""

    def __init__(self, towers: nn.Module, decoder: CaptionDecoder | None) -> None:
        super().__init__()
        self.towers: Any = towers
        self.decoder = decoder

    def encode_image(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features fp32 [B, E], and patch tokens [B, P, width] before the final norm, without the class token."""
        visual = self.towers.visual
        pooled_BW, patch_tokens_BPW = visual._pool(visual.transformer(visual._embeds(image_BCHW)))
        return _unit(pooled_BW @ visual.proj), patch_tokens_BPW

    def encode_text(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features fp32 [B, E], and states [B, T, width] before the final norm, without the pooled last slot."""
        towers = self.towers
        states_BLW = towers.token_embedding(ids_BL) + towers.positional_embedding
        states_BLW = towers.transformer(states_BLW, attn_mask=towers.attn_mask)
        pooled_BW = text_global_pool(towers.ln_final(states_BLW), ids_BL, towers.text_pool_type)
        return _unit(pooled_BW @ towers.text_projection), states_BLW[:, :-1]

    def caption_states(self, patch_tokens_BPW: Tensor, token_states_BTW: Tensor) -> Tensor:
        """Decoder outputs [B, Q, D], ready for the head."""
        assert self.decoder is not None, "this model has no captioner"
        states: Tensor = self.decoder(patch_tokens_BPW, token_states_BTW)
        return states

    @property
    def logit_scale(self) -> nn.Parameter:
        """The logarithm of the scale that both contrastive losses share."""
        scale: nn.Parameter = self.towers.logit_scale
        return scale


def _unit(features_BE: Tensor) -> Tensor:
    return functional.normalize(features_BE.float(), dim=-1)


def build_model(config: ModelConfig, *, seed: int = 0) -> ClipsModel:
    """A freshly initialised model; equal seeds give equal weights, whatever torch's global generator holds."""
    sizes = SIZES[config.size]
    with torch.random.fork_rng(devices=[]):  # constructors draw from the global generator; their values are replaced
        towers = open_clip.CLIP(**tower_config(config))
        decoder = None
        if config.decoder:
            decoder = CaptionDecoder(
                width=sizes.decoder.width,
                layers=sizes.decoder.layers,
                heads=sizes.decoder.heads,
                num_queries=config.target_length,
                vocab_size=VOCAB_SIZES[config.tokenizer],
                image_width=sizes.image.width,
                text_width=sizes.text.width,
            )
    model = ClipsModel(towers, decoder)
    initialise(model, torch.Generator().manual_seed(seed), image_std=sizes.image_std)
    if config.pos_embed == "sincos":
        grid = config.image_px // sizes.patch_px
        model.towers.visual.positional_embedding.data.copy_(sincos_positions(grid, sizes.image.width))
        model.towers.visual.positional_embedding.requires_grad_(False)
    return model


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
    nn.init.constant_(towers.logit_scale, INITIAL_LOGIT_SCALE)
    _initialise_image_tower(towers.visual, image_std, generator)
    _initialise_blocks(towers.transformer, generator)
    nn.init.normal_(towers.token_embedding.weight, std=0.02, generator=generator)
    nn.init.normal_(towers.positional_embedding, std=0.01, generator=generator)
    nn.init.normal_(towers.text_projection, std=towers.transformer.width**-0.5, generator=generator)
    if model.decoder is not None:
        decoder = model.decoder
        _initialise_blocks(decoder.transformer, generator)
        nn.init.normal_(decoder.queries, generator=generator)
        for linear in (decoder.image_projection, decoder.text_projection, decoder.head):
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
    width = transformer.width
    output_std = width**-0.5 * (2 * REFERENCE_DEPTH) ** -0.5
    for block in transformer.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5, generator=generator)
        nn.init.normal_(block.attn.out_proj.weight, std=output_std, generator=generator)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5, generator=generator)
        nn.init.normal_(block.mlp.c_proj.weight, std=output_std, generator=generator)
