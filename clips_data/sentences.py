"""Where sentences begin: by spaCy's tokenizer and sentencizer, mended, and without spaCy where nothing is in doubt.

What is wrong with its sentences is told by ``split.split_at_sentences``. Works on one thread at a time.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Token


def starts(texts: Sequence[str]) -> list[list[int]]:
    """The offsets at which the sentences of each text begin, 0 first. spaCy sees all doubtful stretches at once."""
    stretches = [_stretches(text) for text in texts]
    doubtful = [
        text[start:end] for text, found in zip(texts, stretches, strict=True) for start, end, doubt in found if doubt
    ]
    seen = iter(starts_by_spacy(doubtful) if doubtful else ())
    every = []
    for found in stretches:
        begins: list[int] = []
        for start, _, doubt in found:
            begins.extend([start + offset for offset in next(seen)] if doubt else (start,))
        every.append(begins)
    return every


# --- words and marks --------------------------------------------------------------------------------------------------

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
# Further words that spaCy keeps together with a full stop.
_KEEP_THEIR_STOP = frozenset(
    ("ak", "ala", "apr", "ariz", "ark", "aug", "bros", "calif", "co", "colo", "conn", "corp", "dec", "del", "feb",
     "fla", "ga", "ia", "id", "ill", "inc", "ind", "jan", "jr", "jul", "jun", "kan", "kans", "ky", "la", "ltd", "mar",
     "mass", "md", "mich", "minn", "miss", "mo", "mont", "neb", "nebr", "nev", "nov", "oct", "okla", "ore", "pa",
     "sep", "sept", "tenn", "va", "wash", "wis")
)  # fmt: skip
# Words whose last letters spaCy parts ("he|d") and then takes for an initial ("d.").
_PARTED = frozenset(
    ("hed", "hes", "howd", "hows", "im", "ima", "itd", "ma", "shes", "thatd", "thats", "thered", "theres", "thesed",
     "theyd", "thisd", "thiss", "thosed", "wed", "whatd", "whats", "whend", "whens", "whered", "wheres", "whod",
     "whos", "whyd", "whys", "youd")
)  # fmt: skip
_OPENING_MARKS = frozenset("([{“‘«‹「『（【《¿¡")
_STRAIGHT_QUOTES = frozenset("\"'")
_CLOSING_QUOTES = frozenset("\"'”’»›」』")
_CJK_STOPS = frozenset("。！？｡")
_CJK_CLOSERS = frozenset("”’」』）】》〉")
_ELLIPSES = frozenset(("...", "..", "…", "……"))


# --- where nothing is in doubt ----------------------------------------------------------------------------------------

_STOPS = ".!?"
_CLOSERS = "\"')]”’»"
_HARMLESS = re.escape("\t\r \u00a0,;:'\"()[]{}<>/\\|@#$%&*+=-~^`“”‘’«»–—°€£×•‣◦▪")
_EVENT = re.compile(rf"[^\w{_HARMLESS}]+(?:(?<!\n)[{re.escape(_CLOSERS)}]+)?\s*")
"""Whatever may open a sentence after it: stops, line breaks, and all characters of which this room knows nothing."""
_ITEM = re.compile(r"(?:[-*•‣◦▪–]|[0-9]{1,3}[.)])\s")
_DOUBTFUL_WORDS = frozenset(
    (
        *(word.rstrip(".") for word in _NEVER_FINAL),
        *_ABBREVIATED,
        *_ABBREVIATED_BEFORE_NUMBER,
        *_KEEP_THEIR_STOP,
        *_PARTED,
    )
)
_LONGEST = 2 + max(map(len, _DOUBTFUL_WORDS))
_LAST_LETTERS = re.compile(r"[A-Za-z]*\Z")


def _stretches(text: str) -> list[tuple[int, int, bool]]:
    """``(start, end, doubtful)``: the text cut where a sentence begins beyond doubt. Only doubtful ones may hold more.

    spaCy's tokens never reach across whitespace and what it is asked about a token lies in the few before it, so that a
    stretch is cut alike with and without the text around it.
    """
    found, start, doubtful, length = [], 0, False, len(text)
    for match in _EVENT.finditer(text):
        event, end = match[0], match.end()
        marks = event.rstrip()
        at, gap = match.start(), len(event) - len(marks)
        if gap and len(marks) == 1 and end < length and text[end].isalnum() and _is_plain_stop(text, at):
            found.append((start, end, doubtful))
            start, doubtful = end, False
        elif end == length or (gap and _is_paragraph(text, end - gap, end)):
            doubtful = doubtful or marks.rstrip(_CLOSERS).strip(_STOPS) != ""
            found.append((start, end, doubtful))
            start, doubtful = end, False
        elif marks and not (marks == "." and not gap and _is_inside_word(text, at)):
            doubtful = True
    if start < length:
        found.append((start, length, doubtful))
    return found


def _is_plain_stop(text: str, at: int) -> bool:
    """Whether the mark at ``at`` is a full stop (not a bullet, say) after a word that no rule knows."""
    if text[at] not in _STOPS:
        return False
    word = text[max(0, at - _LONGEST) : at]
    word = word[word.rfind(" ") + 1 :]
    if not (word.isascii() and word.isalpha()):
        match = _LAST_LETTERS.search(word)
        word = match[0] if match else ""
    last = word[-2:]
    return len(last) == 2 and (last.islower() or last.isupper()) and word.lower() not in _DOUBTFUL_WORDS


def _is_inside_word(text: str, at: int) -> bool:
    """Whether the full stop at ``at`` is that of a decimal or of a file's or host's name."""
    around = text[at - 1 : at] + text[at + 1 : at + 2]
    return len(around) == 2 and around.isascii() and (around.isdigit() or (around.isalpha() and around.islower()))


def _is_paragraph(text: str, start: int, end: int) -> bool:
    """Whether the whitespace from ``start`` to ``end`` holds a blank line or comes before an item of a list."""
    num_breaks = text.count("\n", start, end)
    return num_breaks > 1 or (num_breaks == 1 and _ITEM.match(text, end) is not None)


# --- by spaCy ---------------------------------------------------------------------------------------------------------


_MAX_KNOWN_WORDS = 1 << 16


def starts_by_spacy(texts: Sequence[str]) -> list[list[int]]:
    """The offsets at which the sentences of each text begin, 0 first."""
    nlp = _sentence_pipeline()
    found = []
    # Known words are looked up, new ones are several times dearer. Beyond this many they are kept for one batch only.
    with nlp.memory_zone() if len(nlp.vocab.strings) > _MAX_KNOWN_WORDS else contextlib.nullcontext():
        for text in texts:
            doc = nlp(re.sub("[\ud800-\udfff]", "\ufffd", text))  # spaCy cannot encode lone surrogates
            starts = {_after_closers(text, doc[i].idx) for i in _sentence_starts(doc, text)}
            found.append(sorted({0, *starts}))
    return found


@functools.lru_cache(maxsize=1)
def _sentence_pipeline() -> Language:
    """A blank English pipeline (no model), made to see full stops that are glued to the next sentence."""
    import spacy
    from spacy.util import compile_infix_regex

    nlp = spacy.blank("en")
    glued = [rf"[{''.join(sorted(_CJK_STOPS))}]+", r"(?<=[a-z])[!?]+(?=[A-Z])"]
    infixes = [*(nlp.Defaults.infixes or ()), *glued]
    nlp.tokenizer.infix_finditer = compile_infix_regex(infixes).finditer  # type: ignore[union-attr]
    nlp.add_pipe("sentencizer")
    nlp.max_length = 1 << 30  # the limit is meant for parsers, of which there is none here
    return nlp


def _sentence_starts(doc: Doc, text: str) -> list[int]:
    """Indices of the tokens that open a sentence: the sentencizer's word, mended from what stands before and after."""
    starts = []
    for token in list(doc)[1:]:
        if token.is_space:
            if _is_paragraph(text, token.idx, token.idx + len(token)):
                starts.append(token.i)
            continue
        before = _word_before(doc, token.i)
        if before is None:
            continue
        after_space = doc[token.i - 1]  # the sentencizer gives the start to a run of whitespace before the sentence
        if token.is_sent_start or (after_space.is_space and after_space.is_sent_start):
            opens = not _continues(doc, before, token) and not _numbers_item(doc, before, starts)
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


def _numbers_item(doc: Doc, before: Token, starts: Sequence[int]) -> bool:
    """Whether the full stop ``before`` is that of a short number with which the present sentence begins."""
    first = starts[-1] if starts else 0
    while doc[first].is_space:
        first += 1
    number = doc[first]
    return before.text == "." and before.i == first + 1 and number.is_digit and len(number) <= 3


def _after_closers(text: str, start: int) -> int:
    """Where a sentence begins whose CJK predecessor left its closing quotes and brackets behind."""
    if text[start - 1 : start] in _CJK_STOPS:
        while text[start : start + 1] in _CJK_CLOSERS:
            start += 1
    return start


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
