"""Cuts a caption into the pieces that sub-captions are drawn from.

A piece is a span ``(start, end)`` of character offsets, so that it can be traced back to its caption: spans are in
order, never overlap and never blank (but see ``authors``). No rule is right for all captions; what each gets wrong is
told in its docstring.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

from clips_data.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Token

Rule = Literal["period", "sentence", "authors"]
Span = tuple[int, int]
RULES: tuple[Rule, ...] = get_args(Rule)


def split(text: str, rule: Rule) -> list[Span]:
    """The pieces of ``text`` under ``rule``, as character spans in order.

    A text without any piece (empty, or nothing but separators) gives ``[]``; the caller falls back to the whole
    caption or to another column. Raises ``UserError`` for an unknown rule.
    """
    if rule == "period":
        return split_at_periods(text)
    if rule == "authors":
        return split_as_authors(text)
    if rule == "sentence":
        return split_at_sentences(text)
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
    """Sentences by spaCy's tokenizer and sentencizer, mended for abbreviations, quotes and paragraphs.

    They keep their full stops. Whole are: decimals, "No. 5", "U.S.", "e.g.", "Dr.", initials, addresses, and a
    quotation with what follows in lower case. Cut are also: CJK full stops, blank lines. Punctuation alone is dropped.
    Wrong on: an abbreviation that ends a sentence, unless a word that usually opens one follows ("in the U.S. It is");
    an ordinary "no." before a number; lists without full stops; English abbreviations only. One thread at a time.
    """
    nlp = _sentence_pipeline()
    with nlp.memory_zone():  # without it every new word of every caption is kept for as long as the process lives
        doc = nlp(re.sub("[\ud800-\udfff]", "\ufffd", text))  # spaCy cannot encode lone surrogates
        starts = sorted({0, *(doc[i].idx for i in _sentence_starts(doc)), len(text)})
    spans = _stripped(text, itertools.pairwise(starts))
    return [(start, end) for start, end in spans if not _only_punctuation(text[start:end])]


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


def _only_punctuation(piece: str) -> bool:
    return all(char.isspace() or unicodedata.category(char).startswith("P") for char in piece)


# --- sentences --------------------------------------------------------------------------------------------------------

# Tokens (lower case) that never end a sentence: what they abbreviate is always followed by something.
_NEVER_FINAL = frozenset(
    ("adm.", "capt.", "cf.", "col.", "dr.", "e.g.", "fig.", "gen.", "gov.", "hon.", "i.e.", "lt.", "messrs.", "mr.",
     "mrs.", "ms.", "mt.", "pres.", "prof.", "rep.", "rev.", "sen.", "sgt.", "st.", "vs.", "v.s.")
)  # fmt: skip
# Words that spaCy parts from their full stop. The first end no sentence, the second none before a number.
_ABBREVIATED = frozenset(
    ("approx", "ca", "capt", "cf", "col", "dept", "est", "fig", "figs", "hon", "lt", "mt", "pres", "sgt", "viz")
)
_ABBREVIATED_BEFORE_NUMBER = frozenset(
    ("art", "ch", "eq", "max", "min", "no", "nos", "nr", "p", "pp", "pt", "sec", "vol")
)
_OPENERS = frozenset(
    ("a", "an", "another", "at", "behind", "below", "beside", "both", "he", "here", "his", "her", "in", "it", "its",
     "my", "near", "next", "on", "one", "our", "she", "some", "that", "the", "their", "there", "these", "they", "this",
     "those", "to", "two", "we")
)  # fmt: skip
_OPENING_MARKS = frozenset("([{“‘«‹「『（【《¿¡")
_STRAIGHT_QUOTES = frozenset("\"'")
_CLOSING_QUOTES = frozenset("\"'”’»›」』")
_ELLIPSES = frozenset(("...", "..", "…", "……"))


@functools.lru_cache(maxsize=1)
def _sentence_pipeline() -> Language:
    """A blank English pipeline (no model), made to see full stops that are glued to the next sentence."""
    import spacy
    from spacy.util import compile_infix_regex

    nlp = spacy.blank("en")
    glued = [r"[。！？｡]+", r"(?<=[a-z])[!?]+(?=[A-Z])"]
    infixes = [*(nlp.Defaults.infixes or ()), *glued]
    nlp.tokenizer.infix_finditer = compile_infix_regex(infixes).finditer  # type: ignore[union-attr]
    nlp.add_pipe("sentencizer")
    nlp.max_length = 1 << 30  # the limit is meant for parsers, of which there is none here
    return nlp


def _sentence_starts(doc: Doc) -> list[int]:
    """Indices of the tokens that open a sentence: the sentencizer's word, mended from what stands before and after."""
    starts = []
    for token in list(doc)[1:]:
        if token.is_space:
            if token.text.count("\n") > 1:
                starts.append(token.i)
            continue
        before = _word_before(doc, token.i)
        if before is None:
            continue
        after_space = doc[token.i - 1]  # the sentencizer gives the start to a run of whitespace before the sentence
        if token.is_sent_start or (after_space.is_space and after_space.is_sent_start):
            opens = not _continues(doc, before, token)
        elif before.text.lower() in _NEVER_FINAL:
            opens = False
        elif before.text in _ELLIPSES:
            opens = token.text[:1].isupper()
        else:  # an abbreviation may be the end of a sentence all the same
            opens = before.text[-1:] == "." and len(before.text) > 1 and token.is_title and token.lower_ in _OPENERS
        if opens:
            starts.append(_opening_mark(doc, token.i))
    return starts


def _word_before(doc: Doc, i: int) -> Token | None:
    """The last token before ``i`` that is neither whitespace nor an opening mark."""
    i = _opening_mark(doc, i) - 1
    while i >= 0 and doc[i].is_space:
        i -= 1
    return doc[i] if i >= 0 else None


def _continues(doc: Doc, before: Token, token: Token) -> bool:
    """Whether the sentencizer was misled and ``token`` belongs to the sentence that ``before`` is in."""
    if before.text in _CLOSING_QUOTES:
        return token.text[:1].islower()
    if before.text != "." or before.i == 0:
        return False
    word = doc[before.i - 1]
    if word.whitespace_:
        return False
    return word.lower_ in _ABBREVIATED or (word.lower_ in _ABBREVIATED_BEFORE_NUMBER and token.text[:1].isdigit())


def _opening_mark(doc: Doc, i: int) -> int:
    """Index of the quote or bracket that opens right before token ``i``, or ``i``: the sentencizer leaves it behind."""
    while i > 0 and not doc[i - 1].whitespace_:
        mark = doc[i - 1].text
        free = i < 2 or bool(doc[i - 2].whitespace_) or doc[i - 2].is_space
        if mark in _OPENING_MARKS or (mark in _STRAIGHT_QUOTES and free):
            i -= 1
        else:
            break
    return i
