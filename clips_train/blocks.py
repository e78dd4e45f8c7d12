"""open_clip's transformer blocks, with the same parameters under the same names, that call attention themselves.

``nn.MultiheadAttention`` copies queries, keys and values once more, and takes a mask for each sample at full size only.
Here masks are whatever ``scaled_dot_product_attention`` takes: additive or bool (true = may be
attended), and of any shape that broadcasts to [B, heads, queries, keys].

Shape suffixes: B samples, S slots, K keys, N heads, H width of a head, W width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional


class Block(ResidualAttentionBlock):  # type: ignore[misc]
    """Attention among slots, or from slots to a condition (``is_cross_attention``), then the MLP."""

    ln_1: nn.Module
    ln_2: nn.Module
    ls_1: nn.Module
    ls_2: nn.Module
    mlp: nn.Module
    attn: nn.MultiheadAttention

    def attention(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """As open_clip's, for inputs that are normed already; ``v_x`` is ``k_x``."""
        if k_x is None:
            queries, keys, values = self.queries_keys_values(q_x)
        else:
            queries, (keys, values) = self.queries(q_x), self.keys_values(k_x)
        attended_BSW: Tensor = self.attn.out_proj(_join(attend(queries, keys, values, attn_mask)))
        return attended_BSW

    def queries_keys_values(self, normed_BSW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [B, N, S, H], without copies."""
        attn = self.attn
        all_BS3W = functional.linear(normed_BSW, attn.in_proj_weight, attn.in_proj_bias)
        queries, keys, values = all_BS3W.chunk(3, dim=-1)
        return self._part(queries), self._part(keys), self._part(values)

    def queries(self, normed_BSW: Tensor) -> Tensor:
        weight, bias, width = self.attn.in_proj_weight, self.attn.in_proj_bias, self.attn.embed_dim
        return self._part(functional.linear(normed_BSW, weight[:width], bias[:width]))

    def keys_values(self, normed_BKW: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias, width = self.attn.in_proj_weight, self.attn.in_proj_bias, self.attn.embed_dim
        keys, values = functional.linear(normed_BKW, weight[width:], bias[width:]).chunk(2, dim=-1)
        return self._part(keys), self._part(values)

    def _part(self, states_BSW: Tensor) -> Tensor:
        part_BNSH: Tensor = states_BSW.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2)
        return part_BNSH

    def after_attention(self, x_BSW: Tensor, *attended_BNSH: Tensor) -> Tensor:
        """The rest of the block. Several attended parts follow each other along the slots."""
        x_BSW = x_BSW + self.ls_1(self.attn.out_proj(_join(*attended_BNSH)))
        out_BSW: Tensor = x_BSW + self.ls_2(self.mlp(self.ln_2(x_BSW)))
        return out_BSW


class PrefixBlock(Block):
    """The condition attends to itself, slots to the condition and to slots up to themselves (METHOD §2.1, item 4).

    One call of attention for each, so that what a condition may not see is not computed either.
    """

    def forward(
        self,
        x_BSW: Tensor,
        num_condition: int,
        condition_mask: Tensor | None,
        slot_mask: Tensor,
        slots_only: bool = False,
    ) -> Tensor:
        """Condition and slots [B, S, W] to the same; with ``slots_only`` the slots alone come out.

        ``slot_mask`` broadcasts to [B, N, slots, S].
        """
        normed_BSW = self.ln_1(x_BSW)
        if slots_only:
            keys, values = self.keys_values(normed_BSW)
            queries = self.queries(normed_BSW[:, num_condition:])
            return self.after_attention(x_BSW[:, num_condition:], attend(queries, keys, values, slot_mask))
        queries, keys, values = self.queries_keys_values(normed_BSW)
        at = num_condition
        condition = attend(queries[:, :, :at], keys[:, :, :at], values[:, :, :at], condition_mask)
        slots = attend(queries[:, :, at:], keys, values, slot_mask)
        return self.after_attention(x_BSW, condition, slots)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attended values [B, N, S, H]."""
    if queries.device.type == "cpu" and queries.dtype == torch.bfloat16:
        return _attend_by_products(queries, keys, values, mask)
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def _attend_by_products(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Two matrix products: on a CPU two to five times as fast in bf16 as torch's fused attention.

    Logits are rounded to bf16, as in the reference's attention.
    """
    logits_BNSK = torch.matmul(queries * queries.shape[-1] ** -0.5, keys.transpose(-1, -2))
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = added(mask, logits_BNSK.dtype)
        logits_BNSK = logits_BNSK + mask.to(logits_BNSK.dtype)
    return torch.matmul(logits_BNSK.softmax(-1), values)


def _join(*attended_BNSH: Tensor) -> Tensor:
    """[B, S, W] of parts [B, N, S, H]."""
    parts = [part.transpose(1, 2) for part in attended_BNSH]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(2)


def use_own_attention(resblocks: Iterable[nn.Module]) -> None:
    """Turns open_clip's plain blocks into ``Block``, in place; blocks of other kinds stay what they are."""
    for block in resblocks:
        if type(block) is ResidualAttentionBlock:
            block.__class__ = Block


def compute_dtype(like: Tensor) -> torch.dtype:
    """What attention computes in: autocast's type where it is on, or the tensor's own."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def added(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to the attention logits, made once for all blocks."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def stack(blocks: Iterable[nn.Module]) -> Any:
    """A module with the blocks under open_clip's name for them."""
    transformer = nn.Module()
    transformer.resblocks = nn.ModuleList(blocks)
    return transformer
