"""Text views: which tokens of a caption column the text tower sees (METHOD §4).

A view is a column and a reduction. Reductions are pure functions of a text, its sub-caption spans, a budget of tokens
and a ``Draw``; they return token ids without special tokens. A text within the budget is left whole by the token-level
reductions. "Tokens" are the tokenizer's pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from clips_data import draws
from clips_data.errors import UserError, did_you_mean

Reduce = Literal["none", "truncate", "random", "block", "sub_caption", "one_piece", "sentences"]
Span = tuple[int, int]

SPAN_REDUCTIONS = ("sub_caption", "one_piece", "sentences")
END_OF_SENTENCE = re.compile(r"""[.!?…。！？｡]["'”’»)\]」』）】]*\Z""")


class Pieces(Protocol):
    """The part of a tokenizer that views need."""

    def pieces(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class Draw:
    """The randomness of one sample's views: equal (seed, epoch, key) draw equal views, whoever asks."""

    seed: int
    epoch: int
    key: str

    def integer(self, n: int, purpose: str) -> int:
        return draws.integer(n, self.seed, f"view.{purpose}", self.epoch, self.key)

    def permutation(self, n: int, purpose: str) -> list[int]:
        return draws.permutation(n, self.seed, f"view.{purpose}", self.epoch, self.key)


@dataclass(frozen=True)
class TextViews:
    """What one sample contributes to a step: two contrastive texts as token ids, and the captioner's target."""

    web: list[int]
    short: list[int]
    target: str
    fallbacks: tuple[str, ...]
    """``synthetic_empty``: web stands in for short and target. ``web_empty``: synthetic stands in for web."""


class NoCaption(Exception):
    """Neither column holds a text; ``reason`` is ``no_caption``."""

    reason = "no_caption"


def text_views(
    about: Mapping[str, Any],
    *,
    web_column: str,
    synthetic_column: str,
    reduce: Reduce,
    web_budget: int,
    short_budget: int,
    count: int,
    tokenizer: Pieces,
    draw: Draw,
    mixed: str | None = None,
) -> TextViews:
    """The views of one sample from its ``.json`` member.

    As in the authors' code, a synthetic caption without a single piece is replaced by the web caption, for the short
    text and for the target. ``mixed`` is the text of the web view where that is not the web caption. Raises
    ``NoCaption`` when there is nothing to replace it with, ``UserError`` when a column is not in the shards.
    """
    web, synthetic = column_text(about, web_column), column_text(about, synthetic_column)
    spans = [(start, end) for start, end in about["sub_captions"].get(synthetic_column, [])]
    if reduce in SPAN_REDUCTIONS and synthetic_column not in about["sub_captions"]:
        known = about["sub_captions"]
        raise UserError(
            f"The shards hold no sub-captions of column {synthetic_column!r}, which reduce={reduce} needs. "
            f"{did_you_mean(synthetic_column, known)} Shard that column again, or choose reduce=truncate."
        )
    synthetic_usable = bool(spans) if synthetic_column in about["sub_captions"] else bool(synthetic.strip())
    shown = web if mixed is None else mixed
    stand_in = web if web.strip() else shown
    if not synthetic_usable and not stand_in.strip():
        raise NoCaption
    if not synthetic_usable:
        ids = truncate(tokenizer.pieces(shown if shown.strip() else stand_in), web_budget)
        short = truncate(tokenizer.pieces(stand_in), short_budget)
        return TextViews(ids, short, stand_in, ("synthetic_empty",))
    short = reduce_text(synthetic, spans, reduce, budget=short_budget, count=count, tokenizer=tokenizer, draw=draw)
    if not shown.strip():
        return TextViews(truncate(tokenizer.pieces(synthetic), web_budget), short, synthetic, ("web_empty",))
    return TextViews(truncate(tokenizer.pieces(shown), web_budget), short, synthetic, ())


def column_text(about: Mapping[str, Any], name: str) -> str:
    """Raises ``UserError`` when the sample has no such caption column."""
    text = about.get(name)
    if not isinstance(text, str):
        columns = [key for key, value in about.items() if isinstance(value, str) and key not in ("key", "sha256")]
        raise UserError(f"The shards have no caption column {name!r}. {did_you_mean(name, columns)}")
    return text


def reduce_text(
    text: str, spans: Sequence[Span], rule: Reduce, *, budget: int, count: int, tokenizer: Pieces, draw: Draw
) -> list[int]:
    """At most ``budget`` token ids of ``text`` under a reduction; ``count`` is the number of ``sentences``."""
    match rule:
        case "none" | "truncate":
            return truncate(tokenizer.pieces(text), budget)
        case "random":
            return random_mask(tokenizer.pieces(text), budget, draw)
        case "block":
            return block_mask(tokenizer.pieces(text), budget, draw)
        case "sub_caption":
            return sub_caption(text, spans, budget, tokenizer, draw)
        case "one_piece":
            return truncate(tokenizer.pieces(one_piece(text, spans, draw)), budget)
        case "sentences":
            return truncate(tokenizer.pieces(sentences(text, spans, count, draw)), budget)


def truncate(ids: list[int], budget: int) -> list[int]:
    """The first ``budget`` tokens."""
    return ids[:budget]


def random_mask(ids: list[int], budget: int, draw: Draw) -> list[int]:
    """``budget`` tokens drawn without replacement, in their original order."""
    if len(ids) <= budget:
        return ids
    kept = sorted(draw.permutation(len(ids), "random")[:budget])
    return [ids[i] for i in kept]


def block_mask(ids: list[int], budget: int, draw: Draw) -> list[int]:
    """``budget`` consecutive tokens from a start drawn among all that fit, the last one included."""
    if len(ids) <= budget:
        return ids
    start = draw.integer(len(ids) - budget + 1, "block")
    return ids[start : start + budget]


def sub_caption(text: str, spans: Sequence[Span], budget: int, tokenizer: Pieces, draw: Draw) -> list[int]:
    """The paper's rule: draw pieces without replacement and append them until the budget is reached, then truncate.

    Pieces follow each other in the order drawn. When all are used up the view is shorter than the budget.
    """
    chosen: list[str] = []
    ids: list[int] = []
    for number in draw.permutation(len(spans), "sub_caption"):
        chosen.append(_piece(text, spans[number]))
        ids = tokenizer.pieces(join(chosen))
        if len(ids) >= budget:
            break
    return ids[:budget]


def one_piece(text: str, spans: Sequence[Span], draw: Draw) -> str:
    """The authors' released rule: one piece, drawn uniformly."""
    return _piece(text, spans[draw.integer(len(spans), "one_piece")])


def sentences(text: str, spans: Sequence[Span], count: int, draw: Draw) -> str:
    """``count`` pieces drawn without replacement, joined in the order of the text."""
    kept = sorted(draw.permutation(len(spans), "sentences")[:count])
    return join([_piece(text, spans[number]) for number in kept])


def join(pieces: Sequence[str]) -> str:
    """Pieces as running text: those that lost their full stop to the splitter get it back in between."""
    texts = [piece if END_OF_SENTENCE.search(piece) else piece + "." for piece in pieces[:-1]]
    return " ".join([*texts, *pieces[-1:]])


def _piece(text: str, span: Span) -> str:
    return text[span[0] : span[1]]
