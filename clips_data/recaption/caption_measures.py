"""What can be counted in captions without model or truth: length, clauses, variety, repetition, difference.

All of it is about words as they stand. A *token* here is a lower-cased word of letters and digits (with its inner
apostrophes and hyphens); in scripts that write without spaces (Han, kana, Thai, Lao, Khmer, Burmese) every letter is
one, so that these measures are not blind to them.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

REPEAT_WORDS: Final = 6
"""A run of so many tokens that occurs twice in one caption is a repetition."""

_UNSPACED: Final = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_TOKEN: Final = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}_])\w)+(?:['’\-](?:(?![{_UNSPACED}_])\w)+)*")
# A mark between two digits is part of a number, one between letters without a space part of a name or a compound.
_CLAUSE_MARK: Final = re.compile(r"[.,:](?=\s|[\"'”’)\]]|$)|[;!?…()\[\]\n—–。，、；：！？（）「」]|\s-+\s")
_CLAUSE_WORDS: Final = re.compile(
    r"(?<![\w-])(?:and|but|or|while|whereas|with|without|which|who|whose|that|where|when|as|because|although|though|so)"
    r"(?![\w-])",
    re.IGNORECASE,
)


def words(text: str) -> int:
    """Runs of characters between white space, as `clips stats` counts words."""
    return len(text.split())


def tokens(text: str) -> list[str]:
    """The text's tokens, in order (see above). Accents and width are folded by NFKC and case, nothing else."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def clauses(text: str) -> int:
    """Stretches of two or more tokens between punctuation and joining words ("and", "with", "which", "while", …).

    A rough count of what a caption says, for comparing recipes of one language and style: "a red ball on a mat, a dog
    with a hat" has three. It is no count of claims: "in the park" after a comma counts, "old red wooden" is one with
    its noun, and the joining words are English, so that other languages are cut at punctuation alone.
    """
    pieces = (piece for part in _CLAUSE_MARK.split(text) for piece in _CLAUSE_WORDS.split(part))
    return sum(len(tokens(piece)) >= 2 for piece in pieces)


def distinct(texts: Iterable[str], n: int = 3) -> tuple[int, int]:
    """How many different runs of ``n`` tokens the captions hold, and how many runs there are in all.

    The share of the first in the second falls as captions get more or longer, whatever they say, so it compares recipes
    by the same images and similar lengths only.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        runs = _runs(tokens(text), n)
        total += len(runs)
        seen.update(runs)
    return len(seen), total


def repeats(text: str, n: int = REPEAT_WORDS) -> bool:
    """Whether some run of ``n`` tokens occurs twice, overlapping or not: a caption that goes round in circles."""
    runs = _runs(tokens(text), n)
    return len(set(runs)) < len(runs)


def difference(texts: Sequence[str]) -> float:
    """How much captions of one image differ: mean over their pairs of the share of tokens that only one has, 0 to 1.

    That is 1 - |both| / |either|, over the sets of tokens: word order and repetition do not count. Two empty captions
    do not differ, an empty one differs wholly from any other. Fewer than two texts differ by 0.
    """
    sets = [set(tokens(text)) for text in texts]
    pairs = list(itertools.combinations(sets, 2))
    return sum(_only_one(a, b) for a, b in pairs) / len(pairs) if pairs else 0.0


def _only_one(a: set[str], b: set[str]) -> float:
    either = a | b
    return 1 - len(a & b) / len(either) if either else 0.0


def _runs(of: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(of[i : i + n]) for i in range(len(of) - n + 1)]
