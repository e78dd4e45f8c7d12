"""How long texts are beside what a text tower reads, where its tokenizer is one of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clips_train.encoders import Encoder
from clips_train.tokenizer import Tokenizer, build_tokenizer

CLIP = "clip"
"""Name of open_clip's byte pairs, which are ours too."""


def about(encoder: Encoder, texts: Sequence[str]) -> dict[str, Any]:
    """Tokens of the texts without the special ones, and the share of texts that the tower reads but a part of."""
    tokenizer = _tokenizer(encoder)
    if tokenizer is None:
        return {"known": False, "why": f"the tokenizer {encoder.tokenizer!r} does not tell how long a text is uncut"}
    num_tokens = sorted(tokenizer.num_tokens(text) for text in texts)
    budget = tokenizer.budget(encoder.context_length)
    cut = sum(number > budget for number in num_tokens)
    return {
        "known": True,
        "tokens_read": budget,
        "median_tokens": num_tokens[len(num_tokens) // 2],
        "most_tokens": num_tokens[-1],
        "texts_cut": cut,
        "share_cut": cut / len(num_tokens),
    }


def _tokenizer(encoder: Encoder) -> Tokenizer | None:
    if encoder.trained is not None:
        return encoder.trained.tokenizer
    return build_tokenizer("bpe") if encoder.tokenizer == CLIP else None
