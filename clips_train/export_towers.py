"""What the formats of other libraries need to know of two towers, read off the towers themselves.

Shape suffixes: N samples, C channels, H and W pixels, S the class token and the patches, P patches, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from clips_train.blocks import Block
from clips_train.model import ClipsModel


@dataclass(frozen=True)
class Towers:
    """A model to be exported."""

    model: ClipsModel
    """In evaluation mode, on the CPU, in float32."""
    open_clip_config: Mapping[str, Any]
    """The content of ``open_clip_config.json``."""

    @property
    def visual(self) -> Any:
        return self.model.towers.visual

    @property
    def preprocess(self) -> dict[str, Any]:
        """open_clip's ``preprocess_cfg``."""
        return dict(self.open_clip_config["preprocess_cfg"])

    @property
    def image_px(self) -> int:
        return int(self.visual.image_size[0])

    @property
    def patch_px(self) -> int:
        return int(self.visual.patch_size[0])

    @property
    def num_patches(self) -> int:
        return int(self.visual.positional_embedding.shape[0]) - 1

    @property
    def context_length(self) -> int:
        return int(self.model.towers.positional_embedding.shape[0])

    @property
    def vocab_size(self) -> int:
        return int(self.model.towers.token_embedding.weight.shape[0])

    @property
    def embed_dim(self) -> int:
        return int(self.visual.proj.shape[1])

    @property
    def has_pre_norm(self) -> bool:
        """Whether the image tower norms its tokens before the first block."""
        return not isinstance(self.visual.ln_pre, nn.Identity)

    @property
    def norms_after_pooling(self) -> bool:
        return bool(self.visual.final_ln_after_pool)

    @property
    def image(self) -> Transformer:
        return Transformer(self.visual.transformer)

    @property
    def text(self) -> Transformer:
        return Transformer(self.model.towers.transformer)

    def why_image_is_odd(self) -> str | None:
        """What no other library's plain vision transformer has, as the end of a sentence; ``None`` for a plain one."""
        if self.visual.attn_pool is not None or self.visual.pool_type not in ("avg", "tok"):
            return "its image tower pools by attention"
        return self.image.why_odd("image")

    def pooled(self, image_NCHW: Tensor) -> Tensor:
        """What is projected to the features of images, [N, W]."""
        visual = self.visual
        pooled_NW: Tensor = visual._pool(visual.transformer(visual._embeds(image_NCHW)))[0]
        return pooled_NW

    def patch_states(self, image_NCHW: Tensor, layer: int) -> Tensor:
        """Of the patches, [N, P, W]. ``layer`` counts as transformers' ``hidden_states``: 0 is before all blocks."""
        states_NSW: Tensor = self.visual._embeds(image_NCHW)
        blocks = list(self.visual.transformer.resblocks)
        for block in blocks[: layer % (len(blocks) + 1)]:
            states_NSW = block(states_NSW)
        return states_NSW[:, 1:]


@dataclass(frozen=True)
class Transformer:
    """The blocks of one tower, which are all alike."""

    module: Any

    @property
    def _first(self) -> Any:
        return self.module.resblocks[0]

    @property
    def width(self) -> int:
        return int(self._first.attn.embed_dim)

    @property
    def layers(self) -> int:
        return len(self.module.resblocks)

    @property
    def heads(self) -> int:
        return int(self._first.attn.num_heads)

    @property
    def mlp_width(self) -> int:
        return int(self._first.mlp.c_fc.out_features)

    @property
    def norm_eps(self) -> float:
        return float(self._first.ln_1.eps)

    @property
    def has_layer_scale(self) -> bool:
        return not isinstance(self._first.ls_1, nn.Identity)

    @property
    def activation(self) -> str:
        """``gelu`` (exact), ``gelu_tanh`` or ``quick_gelu``."""
        activation = self._first.mlp.gelu
        if isinstance(activation, QuickGELU):
            return "quick_gelu"
        assert isinstance(activation, nn.GELU)
        return "gelu" if activation.approximate == "none" else "gelu_tanh"

    def why_odd(self, name: str) -> str | None:
        odd = next((type(block).__name__ for block in self.module.resblocks if type(block) is not Block), None)
        return None if odd is None else f"the blocks of its {name} tower are open_clip's {odd}"

    def block_weights(self) -> Iterator[dict[str, Tensor]]:
        """Of each block, by open_clip's names."""
        for block in self.module.resblocks:
            yield {name: weight.detach() for name, weight in block.state_dict().items()}
