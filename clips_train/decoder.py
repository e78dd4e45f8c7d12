"""The captioner of CLIPS: slots that read the image, and a caption where there is one, and predict the target caption.

Two ways to fill the slots. ``queries`` is the paper's: learned queries, which predict all slots in one parallel pass
and never see a token of the caption, although the authors call it autoregressive (METHOD §2.1, §2.5).
``teacher_forced`` is autoregressive: a slot holds the token before the one it predicts, start token first (OpenVision
2, METHOD §9).

Two ways to read the condition. ``concat`` is the paper's: one sequence of condition and slots through all blocks.
With ``cross_attention`` blocks alternate: among the slots, from the slots to the condition; half of the blocks each, of
an odd number the first kind has one more. A single block becomes two, or the slots would not see each other.

Shape suffixes: B samples, P image patches, T text tokens, C = P + T condition, Q slots, S = C + Q, D decoder width,
N heads, H width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from open_clip.transformer import LayerNorm
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from clips_train.blocks import Block, PrefixBlock, added, attend, compute_dtype, stack

NORM_EPS = 1e-6

Mode = Literal["queries", "teacher_forced"]
Fusion = Literal["concat", "cross_attention"]


def prefix_lm_mask(num_condition: int, num_slots: int, device: torch.device | None = None) -> Tensor:
    """Bool [S, S], true where row may attend to column.

    The condition sees the condition; a slot sees the condition, earlier slots and itself (METHOD §2.1, item 4).
    """
    size = num_condition + num_slots
    allowed = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    allowed[:num_condition, :num_condition] = True
    return allowed


class CaptionDecoder(nn.Module):
    """Projects the condition to its own width, and predicts one token from each slot.

    Condition tokens have no positions here. Padding of the text is attended to, as in the reference, but for what a
    ``token_mask`` leaves out. Without ``text_width`` the condition is the image alone.
    """

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        num_queries: int,
        vocab_size: int,
        image_width: int,
        text_width: int | None,
        mode: Mode = "queries",
        fusion: Fusion = "concat",
    ) -> None:
        super().__init__()
        self.mode, self.fusion, self.num_slots = mode, fusion, num_queries
        self.image_projection = nn.Linear(image_width, width, bias=False)
        self.text_projection = None if text_width is None else nn.Linear(text_width, width, bias=False)
        if mode == "queries":
            self.queries = nn.Parameter(torch.randn(num_queries, width))
        else:
            self.token_embedding = nn.Embedding(vocab_size, width)
            self.positional_embedding = nn.Parameter(torch.empty(num_queries, width))
        settings: dict[str, Any] = {
            "mlp_ratio": 4.0,
            "act_layer": partial(nn.GELU, approximate="tanh"),
            "norm_layer": partial(LayerNorm, eps=NORM_EPS),
        }
        if fusion == "concat":
            blocks: list[Block] = [PrefixBlock(width, heads, **settings) for _ in range(layers)]
        else:
            blocks = [
                Block(width, heads, is_cross_attention=number % 2 == 1, **settings) for number in range(max(2, layers))
            ]
        self.transformer = stack(blocks)
        self.gradient_checkpointing = False
        self.ln_final = LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(
        self,
        patch_tokens_BPW: Tensor,
        token_states_BTW: Tensor | None = None,
        inputs_BQ: Tensor | None = None,
        token_mask_BT: Tensor | None = None,
    ) -> Tensor:
        """Slot outputs after the final norm, before the head: [B, Q, D].

        ``inputs_BQ``, int64, may have fewer slots than the decoder: earlier slots do not depend on later ones.
        ``queries`` takes nothing but their number from it. ``token_mask_BT`` is true where a text token may be read.
        """
        condition_BCD = self._condition(patch_tokens_BPW, token_states_BTW)
        slots_BQD = self._slots(inputs_BQ, condition_BCD)
        condition_mask = _condition_mask(condition_BCD, token_states_BTW, token_mask_BT)
        run = self._concat if self.fusion == "concat" else self._cross
        normed_BQD: Tensor = self.ln_final(run(condition_BCD, slots_BQD, condition_mask))
        return normed_BQD

    def _condition(self, patch_tokens_BPW: Tensor, token_states_BTW: Tensor | None) -> Tensor:
        image_BPD: Tensor = self.image_projection(patch_tokens_BPW)
        assert (self.text_projection is None) == (token_states_BTW is None), "text states where there is a condition"
        if self.text_projection is None or token_states_BTW is None:
            return image_BPD
        return torch.cat([image_BPD, self.text_projection(token_states_BTW)], dim=1)

    def _slots(self, inputs_BQ: Tensor | None, condition_BCD: Tensor) -> Tensor:
        if self.mode == "queries":
            num_slots = self.num_slots if inputs_BQ is None else inputs_BQ.shape[1]
            slots_QD = self.queries[:num_slots].to(condition_BCD.dtype)
            return slots_QD.expand(len(condition_BCD), -1, -1)
        assert inputs_BQ is not None, "teacher_forced needs the tokens before the ones to predict"
        slots_BQD: Tensor = self.token_embedding(inputs_BQ) + self.positional_embedding[: inputs_BQ.shape[1]]
        return slots_BQD.to(condition_BCD.dtype)

    def _concat(self, condition_BCD: Tensor, slots_BQD: Tensor, condition_mask: Tensor | None) -> Tensor:
        num_condition, num_slots = condition_BCD.shape[1], slots_BQD.shape[1]
        allowed_QS = prefix_lm_mask(num_condition, num_slots, condition_BCD.device)[num_condition:]
        slot_mask = added(allowed_QS, compute_dtype(condition_BCD))
        if condition_mask is not None:
            slot_mask = slot_mask + functional.pad(condition_mask, (0, num_slots))
        states_BSD = torch.cat([condition_BCD, slots_BQD], dim=1)
        blocks = self.transformer.resblocks
        for number, block in enumerate(blocks):
            slots_only = number == len(blocks) - 1  # nothing reads what the last block would make of the condition
            states_BSD = self._run(block, states_BSD, num_condition, condition_mask, slot_mask, slots_only)
        return states_BSD

    def _cross(self, condition_BCD: Tensor, slots_BQD: Tensor, condition_mask: Tensor | None) -> Tensor:
        allowed_QQ = prefix_lm_mask(0, slots_BQD.shape[1], slots_BQD.device)
        slot_mask = added(allowed_QQ, compute_dtype(slots_BQD))
        for number, block in enumerate(self.transformer.resblocks):
            if number % 2 == 1:
                slots_BQD = self._run(block, slots_BQD, condition_BCD, None, condition_mask)
            else:
                slots_BQD = self._run(block, slots_BQD, None, None, slot_mask)
        return slots_BQD

    def _run(self, block: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            states: Tensor = checkpoint(block, *inputs, use_reentrant=False)
            return states
        return block(*inputs)

    @torch.no_grad()
    def prefill(
        self, patch_tokens_BPW: Tensor, token_states_BTW: Tensor | None = None, token_mask_BT: Tensor | None = None
    ) -> Cache:
        """What ``next`` needs of the condition; computed once for all slots."""
        assert self.mode == "teacher_forced", "queries predict all slots at once and have nothing to keep"
        states_BCD = self._condition(patch_tokens_BPW, token_states_BTW)
        mask = _condition_mask(states_BCD, token_states_BTW, token_mask_BT)
        concat, num_condition = self.fusion == "concat", states_BCD.shape[1]
        kept = []
        blocks = list(self.transformer.resblocks)
        for number, block in enumerate(blocks):
            if concat:
                normed_BCD = block.ln_1(states_BCD)
                queries, keys, values = block.queries_keys_values(normed_BCD)
                kept.append(_Kept.of(keys, values, num_later=self.num_slots))
                if number < len(blocks) - 1:
                    states_BCD = block.after_attention(states_BCD, attend(queries, keys, values, mask))
            elif number % 2 == 1:
                kept.append(_Kept.of(*block.keys_values(block.ln_1_kv(states_BCD)), num_later=0))
            else:
                nothing = block.keys_values(block.ln_1(states_BCD[:, :0]))
                kept.append(_Kept.of(*nothing, num_later=self.num_slots))
        return Cache(kept, mask, torch.arange(len(states_BCD), device=states_BCD.device), num_condition, 0)

    @torch.no_grad()
    def next(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """Appends a slot that holds ``ids_B`` and returns its state [B, D], ready for the head.

        At most as many slots as the decoder has positions.
        """
        assert cache.length < self.num_slots, f"a caption has at most {self.num_slots} slots"
        position_D = self.positional_embedding[cache.length]
        x_B1D = (self.token_embedding(ids_B) + position_D).unsqueeze(1)
        x_B1D = x_B1D.to(compute_dtype(x_B1D))
        for number, (block, kept) in enumerate(zip(self.transformer.resblocks, cache.kept, strict=True)):
            normed_B1D = block.ln_1(x_B1D)
            if self.fusion == "concat" or number % 2 == 0:
                query, key, value = block.queries_keys_values(normed_B1D)
                kept.append(key, value, cache.length)
            else:
                query = block.queries(normed_B1D)
            x_B1D = block.after_attention(x_B1D, attend(query, *kept.visible(cache.length + 1), cache.mask_for(kept)))
        cache.length += 1
        state_BD: Tensor = self.ln_final(x_B1D)[:, 0]
        return state_BD


def _condition_mask(
    condition_BCD: Tensor, token_states_BTW: Tensor | None, token_mask_BT: Tensor | None
) -> Tensor | None:
    """Added to the attention logits of whoever reads the condition: [B, 1, 1, C], or ``None`` where all is read."""
    if token_states_BTW is None or token_mask_BT is None:
        return None
    num_patches = condition_BCD.shape[1] - token_mask_BT.shape[1]
    allowed_BC = functional.pad(token_mask_BT, (num_patches, 0), value=True)
    return added(allowed_BC, compute_dtype(condition_BCD))[:, None, None, :]


@dataclass
class _Kept:
    """Keys and values of one block, [B, N, num_fixed + num_later, H]: of the condition first, then of the slots."""

    keys: Tensor
    values: Tensor
    num_fixed: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, *, num_later: int) -> _Kept:
        room = (0, 0, 0, num_later)
        return cls(functional.pad(keys, room), functional.pad(values, room), keys.shape[2])

    @property
    def grows(self) -> bool:
        return self.keys.shape[2] > self.num_fixed

    def append(self, key_BN1H: Tensor, value_BN1H: Tensor, slot: int) -> None:
        self.keys[:, :, self.num_fixed + slot] = key_BN1H[:, :, 0]
        self.values[:, :, self.num_fixed + slot] = value_BN1H[:, :, 0]

    def visible(self, length: int) -> tuple[Tensor, Tensor]:
        end = self.num_fixed + length if self.grows else self.num_fixed
        return self.keys[:, :, :end], self.values[:, :, :end]

    def of_rows(self, index_B: Tensor, length: int, *, same_condition: bool) -> None:
        if not same_condition:
            self.keys, self.values = self.keys[index_B], self.values[index_B]
        elif self.grows:
            at = slice(self.num_fixed, self.num_fixed + length)
            self.keys[:, :, at] = self.keys[index_B, :, at]
            self.values[:, :, at] = self.values[index_B, :, at]


@dataclass
class Cache:
    """What a teacher-forced decoder keeps between slots.

    ``reorder`` and ``repeat`` use up the cache they are called on: go on with the one that they return.
    """

    kept: list[_Kept]
    condition_mask: Tensor | None
    """[B, 1, 1, C], added to the attention logits."""
    sample_B: Tensor
    """int64, whose condition each row has."""
    num_condition: int
    length: int
    """Slots so far."""

    def mask_for(self, kept: _Kept) -> Tensor | None:
        """For the slot that is being appended."""
        if self.condition_mask is None or kept.num_fixed == 0:
            return None
        return functional.pad(self.condition_mask, (0, self.length + 1)) if kept.grows else self.condition_mask

    def reorder(self, index_B: Tensor) -> Cache:
        """The rows that ``index_B`` names (int64), in its order; some may be absent, others there more than once."""
        sample_B = self.sample_B[index_B]
        same_condition = torch.equal(sample_B, self.sample_B)  # so it is while beams of a sample change places
        for kept in self.kept:
            kept.of_rows(index_B, self.length, same_condition=same_condition)
        if not same_condition and self.condition_mask is not None:
            self.condition_mask = self.condition_mask[index_B]
        self.sample_B = sample_B
        return self

    def repeat(self, n: int) -> Cache:
        """Each row ``n`` times, one after another."""
        return self.reorder(torch.arange(len(self.sample_B), device=self.sample_B.device).repeat_interleave(n))
