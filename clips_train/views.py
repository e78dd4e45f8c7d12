"""The reductions of text views: which tokens of a caption the text tower sees (METHOD §4).

They are pure functions of a text, its sub-caption spans, a budget of tokens and a ``Draw``, and return token ids
without special tokens. A text within the budget is left whole by the token-level reductions. "Tokens" are the
tokenizer's pieces.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from clips_data import draws
from clips_train.config import View

Span = tuple[int, int]

SPAN_REDUCTIONS = ("sub_caption", "one_piece", "sentences", "first_piece")
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


class NoCaption(Exception):
    """None of a sample's sources holds a text; ``reason`` is ``no_caption``."""

    reason = "no_caption"


def reduce_text(
    text: str, spans: Sequence[Span], view: View, *, budget: int, tokenizer: Pieces, draw: Draw
) -> list[list[int]]:
    """``view.count`` texts, or fewer where there are fewer pieces, of at most ``budget`` token ids each."""
    match view.reduce:
        case "none" | "truncate":
            texts = [tokenizer.pieces(text)]
        case "random":
            texts = [random_mask(tokenizer.pieces(text), budget, draw)]
        case "block":
            texts = [block_mask(tokenizer.pieces(text), budget, draw)]
        case "sub_caption":
            texts = [sub_caption(text, spans, budget, tokenizer, draw)]
        case "one_piece" if view.count == 1:
            texts = [tokenizer.pieces(one_piece(text, spans, draw))]
        case "one_piece":
            chosen = draw.permutation(len(spans), "one_piece.several")[: view.count]
            texts = [tokenizer.pieces(_piece(text, spans[number])) for number in chosen]
        case "sentences":
            several = [sentences(text, spans, view.pieces_range, draw, nth) for nth in range(view.count)]
            texts = [tokenizer.pieces(joined) for joined in several]
        case "first_piece":
            texts = [tokenizer.pieces(_piece(text, spans[0]))]
    return [truncate(ids, budget) for ids in texts]


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


def sentences(text: str, spans: Sequence[Span], pieces: tuple[int, int], draw: Draw, nth: int = 0) -> str:
    """From the first to the second number of ``pieces`` drawn without replacement, joined in the order of the text.

    ``nth`` tells several such texts of one sample apart.
    """
    low, high = pieces
    purpose = f"sentences.{nth}" if nth else "sentences"
    count = low if low == high else low + draw.integer(high - low + 1, f"{purpose}.count")
    kept = sorted(draw.permutation(len(spans), purpose)[:count])
    return join([_piece(text, spans[number]) for number in kept])


def join(pieces: Sequence[str]) -> str:
    """Pieces as running text: those that lost their full stop to the splitter get it back in between."""
    texts = [piece if END_OF_SENTENCE.search(piece) else piece + "." for piece in pieces[:-1]]
    return " ".join([*texts, *pieces[-1:]])


def _piece(text: str, span: Span) -> str:
    return text[span[0] : span[1]]
