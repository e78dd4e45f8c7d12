"""The captioner of CLIPS: learned queries that read image and web caption, and predict the synthetic caption at once.

The authors call it autoregressive; it never sees a token of the caption. All positions are predicted in one parallel
pass by queries with a causal mask among themselves (METHOD §2.1, §2.5).

Shape suffixes: B samples, P image patches, T text tokens, Q queries, S = P + T + Q, D decoder width, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from open_clip.transformer import LayerNorm, Transformer
from torch import Tensor, nn

NORM_EPS = 1e-6


def prefix_lm_mask(num_condition: int, num_queries: int, device: torch.device | None = None) -> Tensor:
    """Bool [S, S], true where row may attend to column.

    The condition sees the condition; a query sees the condition, earlier queries and itself (METHOD §2.1, item 4).
    """
    size = num_condition + num_queries
    allowed = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    allowed[:num_condition, :num_condition] = True
    return allowed


class CaptionDecoder(nn.Module):
    """Projects both conditions to its own width, appends the queries, and attends to all of it (``concat`` fusion).

    There is no position but the queries themselves, and no padding mask: pads of the web caption are attended to, as
    in the reference.
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
        text_width: int,
    ) -> None:
        super().__init__()
        self.image_projection = nn.Linear(image_width, width, bias=False)
        self.text_projection = nn.Linear(text_width, width, bias=False)
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.transformer = Transformer(
            width, layers, heads, mlp_ratio=4.0,
            act_layer=partial(nn.GELU, approximate="tanh"), norm_layer=partial(LayerNorm, eps=NORM_EPS),
        )  # fmt: skip
        self.ln_final = LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, patch_tokens_BPW: Tensor, token_states_BTW: Tensor) -> Tensor:
        """Query outputs after the final norm, before the head: [B, Q, D]."""
        image_BPD = self.image_projection(patch_tokens_BPW)
        text_BTD = self.text_projection(token_states_BTW)
        queries_BQD = self.queries.to(image_BPD.dtype).expand(len(image_BPD), -1, -1)
        sequence_BSD = torch.cat([image_BPD, text_BTD, queries_BQD], dim=1)
        num_queries = len(self.queries)
        allowed_SS = prefix_lm_mask(sequence_BSD.shape[1] - num_queries, num_queries, sequence_BSD.device)
        # open_clip's blocks add the mask to the attention logits.
        added_SS = torch.zeros_like(allowed_SS, dtype=torch.float32).masked_fill(~allowed_SS, float("-inf"))
        states_BSD = self.transformer(sequence_BSD, attn_mask=added_SS)
        normed_BQD: Tensor = self.ln_final(states_BSD[:, -num_queries:])
        return normed_BQD
