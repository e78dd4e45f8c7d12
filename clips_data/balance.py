"""Concept balancing as in MetaCLIP: captions without any of the listed concepts go, frequent concepts are thinned.

A concept is in a caption where it stands between spaces, as in MetaCLIP's code: the signs ``, . ; : ? ! ` `` stand
apart, line breaks and tabs are spaces, letters match in their case. Concepts are spaced by the same rule, so that
"U.S." can be found, which it cannot there. A concept in n captions draws each of them with probability min(1, cap / n),
and a sample stays if any of its concepts draws it, once however many do. Concepts of languages that write no spaces are
found only where they stand alone.

Words and n-grams are told by 64-bit hashes that are looked up in sorted arrays: polars' Aho-Corasick automaton of
500,000 concepts takes seconds and hundreds of megabytes to build and cannot be kept from shard to shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import draws, ledger
from clips_data.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    Array = np.ndarray[Any, Any]

_SPACED: Final = {**{sign: f" {sign} " for sign in ",.;:?!`"}, "\t": " ", "\n": " ", "\r": " "}
_FACTOR: Final = 0x9E3779B97F4A7C15
"""Odd, so that no word's hash is lost in that of a longer n-gram."""


@dataclass(frozen=True)
class Concepts:
    """A list of concepts, looked up by the hashes of their words."""

    texts: pl.Series
    hashes: Array
    """Of concepts and of the n-grams that go on to a longer concept, in order."""
    numbers: Array
    """For each of ``hashes`` the place of its concept in ``texts``, -1 for none."""
    goes_on: Array
    """Whether each of ``hashes`` goes on to a longer concept."""

    @classmethod
    def of(cls, texts: Iterable[str]) -> Concepts:
        """Concepts that are spaced alike count once."""
        import numpy as np
        import polars as pl

        listed = pl.Series("text", list(texts), pl.String)
        _, words, lengths = _hashed_words(listed)
        first = np.cumsum(lengths) - lengths
        grams = np.zeros(len(listed), np.uint64)
        beginnings = [grams[:0]]
        for place in range(int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > place)
            if place:
                beginnings.append(grams[longer])
            grams[longer] = _longer(grams[longer], words[first[longer] + place], place)
        concepts = np.flatnonzero(lengths)
        begun = np.unique(np.concatenate(beginnings))
        hashes = np.unique(np.concatenate([grams[concepts], begun]))
        numbers = np.full(len(hashes), -1)
        numbers[np.searchsorted(hashes, grams[concepts][::-1])] = concepts[::-1]  # of those spaced alike, the first
        return cls(listed, hashes, numbers, np.isin(hashes, begun))

    def found_in(self, captions: pl.Series) -> tuple[Array, Array]:
        """The row of a caption and the number of a concept, once for each concept that is in it, in this order."""
        import numpy as np

        rows, words, _ = _hashed_words(captions)
        places, grams = np.arange(len(words)), words
        found = [np.zeros(0, np.int64)]
        length = 1
        while len(places):
            at = np.searchsorted(self.hashes, grams)
            known = _is_at(self.hashes, at, grams)
            places, grams, at = places[known], grams[known], at[known]
            concept = self.numbers[at] >= 0
            found.append(rows[places[concept]] * len(self.texts) + self.numbers[at[concept]])
            longer = self.goes_on[at] & (places + length < len(words))
            longer[longer] = rows[places[longer] + length] == rows[places[longer]]
            places = places[longer]
            grams = _longer(grams[longer], words[places + length], length)
            length += 1
        both = np.sort(np.concatenate(found))  # several times as fast as np.unique, which hashes
        return np.divmod(both[np.flatnonzero(np.diff(both, prepend=-1))], len(self.texts))


def read(path: Path, digest: str | None = None) -> Concepts:
    """The concepts of a text file, one a line; kept in memory for the next call.

    Raises ``UserError`` where it cannot be read, holds none, or is no longer the file of this ``digest``.
    """
    found = file_digest(path)
    if digest not in (None, found):
        raise UserError(f"{path} was changed while its concepts were being counted. Run the command again.")
    return _read(path, found)


def located(path: Path) -> Path:
    """The file itself: ``demo`` is the packaged list of what the scenes of the demo world hold."""
    if path == Path("demo") and not path.exists():
        return Path(__file__).parent / "demo" / "concepts.txt"
    return path


def file_digest(path: Path) -> str:
    """Identifies the list's content."""
    try:
        return ledger.digest_file(located(path))
    except OSError as error:
        raise UserError(
            f"Cannot read --balance {path}: {error.strerror}. It is a text with one concept a line."
        ) from None


@functools.lru_cache(maxsize=2)
def _read(path: Path, digest: str) -> Concepts:
    try:
        lines = located(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"--balance {path} is not UTF-8 (byte {error.start}). It is a text, one concept a line."
        ) from None
    texts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not texts:
        raise UserError(f"--balance {path} holds no concept. Write one a line.")
    return Concepts.of(texts)


@dataclass(frozen=True)
class Balance:
    """Thins captions by the concepts in them; ``probabilities`` are those of the concepts ``thinned`` (by number)."""

    path: Path
    digest: str
    column: str
    cap: int
    seed: int
    thinned: Array
    probabilities: Array

    @property
    def labels(self) -> tuple[str, str]:
        label = f"balance {self.path.name} (cap {self.cap})"
        return label, f"{label}: no concept"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def judge(self, view: pl.DataFrame) -> pl.Series:
        """0 for rows that stay, 1 for those that none of their concepts drew, 2 for those without a concept."""
        import numpy as np
        import polars as pl

        concepts = read(self.path, self.digest)
        rows, numbers = concepts.found_in(_captions(view, self.column))
        verdicts = np.full(len(view), 2, np.uint8)
        verdicts[rows] = 1
        at = np.searchsorted(self.thinned, numbers)
        rare = ~_is_at(self.thinned, at, numbers)
        verdicts[rows[rare]] = 0
        undecided = np.flatnonzero(verdicts[rows] == 1)
        keys = view["key"].gather(rows[undecided]).to_list()
        words = concepts.texts.gather(numbers[undecided]).to_list()
        for place, key, word in zip(undecided.tolist(), keys, words, strict=True):
            row = rows[place]
            if (
                verdicts[row]
                and draws.uniform(self.seed, "balance", 0, f"{key} {word}") < self.probabilities[at[place]]
            ):
                verdicts[row] = 0
        return pl.Series(verdicts)

    def tell(self, view: pl.DataFrame) -> pl.DataFrame:
        """The concepts in each row's caption."""
        import polars as pl

        concepts = read(self.path, self.digest)
        rows, numbers = concepts.found_in(_captions(view, self.column))
        texts = concepts.texts.gather(numbers).to_list()
        lists: list[list[str]] = [[] for _ in range(len(view))]
        for row, text in zip(rows.tolist(), texts, strict=True):
            lists[row].append(text)
        return pl.DataFrame({"concepts": pl.Series(lists, dtype=pl.List(pl.String))})


def find(
    path: Path, column: str, cap: int, seed: int, run: Callable[[Callable[[pl.DataFrame], Any]], Iterable[Any]]
) -> Balance:
    """``Balance`` for the rows that ``run`` passes over, in one pass. Memory holds the list and a count a concept."""
    import numpy as np

    digest = file_digest(path)
    counts = np.zeros(len(read(path, digest).texts), np.int64)
    for numbers, some in run(_Count(path, digest, column)):
        counts[numbers] += some
    thinned = np.flatnonzero(counts > cap)
    return Balance(path, digest, column, cap, seed, thinned, cap / counts[thinned])


@dataclass(frozen=True)
class _Count:
    """In how many captions of some shards each concept is. Goes to worker processes."""

    path: Path
    digest: str
    column: str

    def __call__(self, view: pl.DataFrame) -> tuple[Array, Array]:
        import numpy as np

        _, numbers = read(self.path, self.digest).found_in(_captions(view, self.column))
        found, counts = np.unique(numbers, return_counts=True)
        return found, counts


def _captions(view: pl.DataFrame, column: str) -> pl.Series:
    return view[column].struct.field("caption")


def spaced(texts: pl.Series) -> pl.Series:
    """Texts with their punctuation set apart by spaces."""
    return texts.str.replace_many(list(_SPACED), list(_SPACED.values()))


def _hashed_words(texts: pl.Series) -> tuple[Array, Array, Array]:
    """Row and hash of each word of all texts, in order, and the number of words of each text."""
    import numpy as np
    import polars as pl

    split = spaced(texts).str.split(" ")
    table = pl.DataFrame({"row": np.arange(len(texts)), "word": split}).explode("word").filter(pl.col("word") != "")
    rows = table["row"].to_numpy()
    return rows, table["word"].hash().to_numpy(), np.bincount(rows, minlength=len(texts))


def _longer(grams: Array, words: Array, length: int) -> Array:
    """The hashes of n-grams of ``length`` words with another word at their end."""
    import numpy as np

    with np.errstate(over="ignore"):
        return words if length == 0 else grams * np.uint64(_FACTOR) + words


def _is_at(ordered: Array, places: Array, wanted: Array) -> Array:
    """Whether ``wanted`` is what stands at these places."""
    import numpy as np

    if not len(ordered):
        return np.zeros(len(wanted), bool)
    found: Array = ordered[np.minimum(places, len(ordered) - 1)] == wanted
    return found
