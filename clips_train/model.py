"""CLIPS: two towers of open_clip with the released switches, and the captioner beside them (METHOD §1, §2).

The towers are an ``open_clip.CLIP``, so their weights are open_clip's under open_clip's names. Tokens for the captioner
are taken on the way: patch tokens before the final norm, text states before the final norm.

Shape suffixes: B samples, C channels, H and W pixels, P patches, L text slots, T = L - 1, E embedding.
"""

from __future__ import annotations

import math
from typing import Any

import open_clip
import torch
from open_clip.transformer import text_global_pool
from torch import Tensor, nn
from torch.nn import functional

from clips_train.blocks import added, compute_dtype, use_own_attention
from clips_train.config import ModelConfig
from clips_train.decoder import CaptionDecoder
from clips_train.towers import SIGMOID_LOGIT_BIAS, SIGMOID_LOGIT_SCALE, VOCAB_SIZES, Sizes, open_clip_config, sizes_of

POSITION_TEMPERATURE = 10_000.0
INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
STD_OF_CUT_NORMAL = 0.87962566  # of a unit normal cut at -2 and 2
REFERENCE_DEPTH = 12  # text tower and decoder scale their output projections as for this depth, whatever theirs


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
