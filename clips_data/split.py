"""Cuts a caption into the pieces that sub-captions are drawn from.

A piece is a span ``(start, end)`` of character offsets, so that it can be traced back to its caption: spans are in
order, never overlap and never blank (but see ``authors``). No rule is right for all captions; what each gets wrong is
told in its docstring.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from clips_data.errors import UserError, did_you_mean

Rule = Literal["period", "sentence", "authors"]
Span = tuple[int, int]
RULES: tuple[Rule, ...] = get_args(Rule)


def split(text: str, rule: Rule) -> list[Span]:
    """The pieces of ``text`` under ``rule``, as character spans in order.

    A text without any piece (empty, or nothing but separators) gives ``[]``; the caller falls back to the whole
    caption or to another column. Raises ``UserError`` for an unknown rule.
    """
    return split_many([text], rule)[0]


def split_many(texts: Sequence[str], rule: Rule) -> list[list[Span]]:
    """``split`` of each text, at less cost where spaCy is asked. Hand over hundreds of texts, not millions."""
    if rule == "period":
        return [split_at_periods(text) for text in texts]
    if rule == "authors":
        return [split_as_authors(text) for text in texts]
    if rule == "sentence":
        from clips_data import sentences

        return [_between(starts, text) for starts, text in zip(sentences.starts(texts), texts, strict=True)]
    raise UserError(f"There is no splitting rule {rule!r}. {did_you_mean(rule, RULES)}")


def split_at_periods(text: str) -> list[Span]:
    """The paper's rule (METHOD §4): cut at every ``.``, strip, drop what is blank. The full stops belong to no piece.

    Wrong on: decimals ("3.5 m" becomes "3" and "5 m"), abbreviations ("U.S."), host and file names; blind to ``!``,
    ``?``, CJK full stops and newlines, so that such captions stay in one piece.
    """
    return _stripped(text, ((match.start(), match.end()) for match in re.finditer(r"[^.]+", text)))


def split_as_authors(text: str) -> list[Span]:
    """The rule of the authors' released JAX code: runs of ``.`` or ``!`` become ``|``, cut there, drop what is empty.

    Kept to the letter for comparison: pieces are not stripped, and one of nothing but whitespace stays (a caption that
    ends in ". " can so give an empty text). Wrong where ``period`` is, and a literal ``|`` cuts too.
    """
    return [(match.start(), match.end()) for match in re.finditer(r"[^.!|]+", text)]


def split_at_sentences(text: str) -> list[Span]:
    """Sentences by spaCy's tokenizer and sentencizer, mended for abbreviations, quotes, lists and paragraphs.

    They keep their full stops. Whole are: decimals, "No. 5", "U.S.", "e.g.", "Dr.", initials, addresses, file names,
    "1." with the item that it numbers, and a quotation with what follows in lower case. Cut are also: CJK full stops,
    blank lines, and lines that begin with "-", "*", "•", "1." or "1)". Punctuation alone is dropped.
    Wrong on: an abbreviation that ends a sentence, unless a word that usually opens one follows ("in the U.S. It is");
    an ordinary "no." before a number; other lines without full stops; a sentence that is a short number; Chinese
    quotations with what follows ("“。”他说" is cut); English abbreviations only. One thread at a time.

    Only the sentences that hold something doubtful go through spaCy, and the others come out as if they had.
    """
    return split_many([text], "sentence")[0]


def sentences_by_spacy(text: str) -> list[Span]:
    """``split_at_sentences`` by spaCy alone, several times slower: what the way around it is tested against."""
    from clips_data import sentences

    (starts,) = sentences.starts_by_spacy([text])
    return _between(starts, text)


def _stripped(text: str, spans: Iterable[Span]) -> list[Span]:
    """The spans without the whitespace at their ends; those of nothing else are dropped."""
    pieces = []
    for start, end in spans:
        piece = text[start:end]
        left = start + len(piece) - len(piece.lstrip())
        right = end - len(piece) + len(piece.rstrip())
        if left < right:
            pieces.append((left, right))
    return pieces


def _between(starts: Iterable[int], text: str) -> list[Span]:
    """From each start to the next or to the end, stripped; what is punctuation alone is left out."""
    spans = _stripped(text, itertools.pairwise([*starts, len(text)]))
    return [(start, end) for start, end in spans if text[start].isalnum() or not _only_punctuation(text[start:end])]


def _only_punctuation(piece: str) -> bool:
    return all(char.isspace() or unicodedata.category(char).startswith("P") for char in piece)
