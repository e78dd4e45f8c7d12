"""Texts as sets of shingles, many at a time: hashes of words and of neighbouring words, the same on any machine.

A text is its words: runs of letters, marks and digits, folded by NFKC and to lower case, so that case, punctuation and
width do not count; every letter of a script without spaces is a word. A shingle is two neighbouring words (the word
itself where a text has just one), which tells captions of ten words apart and still lets one word of twenty differ.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from clips_data import draws

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

MOST_WORDS: Final = 1000
"""Words from which shingles are made; those of a longer text count only for whether it is equal to another."""
BANDS: Final = 16
ROWS_OF_BAND: Final = 5
"""Texts are compared when all five minima of one of 16 bands agree: of pairs that share 80 % of their shingles 99.8 %
are, of those that share 90 % all but one in a million, of those that share half 40 % (and are told apart then)."""
_UNSPACED: Final = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD: Final = rf"[{_UNSPACED}]|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+"


@dataclass(frozen=True)
class Shingled:
    """Of N texts: ``texts_N`` identifies each as a whole (0: it has no words), ``lengths_N`` counts its different
    shingles, which lie one after the other in ``flat`` (uint32, ascending within a text), and ``bands_BN`` are the
    hashes of its bands."""

    texts_N: np.ndarray[Any, np.dtype[np.uint64]]
    lengths_N: np.ndarray[Any, np.dtype[np.int64]]
    flat: np.ndarray[Any, np.dtype[np.uint32]]
    bands_BN: np.ndarray[Any, np.dtype[np.uint64]]


def shingled(texts: pl.Series) -> Shingled:
    import numpy as np
    import polars as pl

    words = texts.str.normalize("NFKC").str.to_lowercase().str.extract_all(_WORD)
    num_words_N = words.list.len().to_numpy().astype(np.int64)
    hashes = _hashes(words.explode().drop_nulls() if len(words) else pl.Series([], dtype=pl.String))
    row_of = np.repeat(np.arange(len(texts)), num_words_N)
    place = np.arange(len(row_of)) - np.repeat(np.cumsum(num_words_N) - num_words_N, num_words_N)
    texts_N = _whole(hashes, row_of, place, len(texts))
    few = place < MOST_WORDS
    hashes, row_of = hashes[few], row_of[few]
    pairs = row_of[:-1] == row_of[1:]
    alone = num_words_N[row_of] == 1
    of_two = _mix(hashes[:-1][pairs] * np.uint64(3) + _mix(hashes[1:][pairs]))
    rows = np.concatenate([row_of[:-1][pairs], row_of[alone]]).astype(np.uint64)
    both = np.concatenate([of_two, _mix(hashes[alone])])
    different = np.unique(rows << np.uint64(32) | both >> np.uint64(32))
    flat = (different & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    lengths_N = np.bincount((different >> np.uint64(32)).astype(np.int64), minlength=len(texts))
    return Shingled(texts_N, lengths_N, flat, _bands(flat, lengths_N))


def jaccard(
    flat: np.ndarray[Any, Any], starts_2P: np.ndarray[Any, Any], lengths_2P: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of P pairs of texts, whose shingles begin at ``starts_2P`` in ``flat``, the shared of all different shingles."""
    import numpy as np

    num_pairs = starts_2P.shape[1]
    marked = []
    for starts_P, lengths_P in zip(starts_2P, lengths_2P, strict=True):
        within = np.arange(int(lengths_P.sum())) - np.repeat(np.cumsum(lengths_P) - lengths_P, lengths_P)
        pair = np.repeat(np.arange(num_pairs, dtype=np.uint64), lengths_P)
        marked.append(pair << np.uint64(32) | flat[np.repeat(starts_P, lengths_P) + within].astype(np.uint64))
    ordered = np.sort(np.concatenate(marked))
    shared = ordered[1:][ordered[1:] == ordered[:-1]] >> np.uint64(32)
    shared_P = np.bincount(shared.astype(np.int64), minlength=num_pairs)
    found: np.ndarray[Any, np.dtype[np.float64]] = shared_P / (lengths_2P.sum(axis=0) - shared_P)
    return found


def _hashes(words: pl.Series) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """64 bits of each word; the different words are hashed once."""
    import polars as pl

    different = words.unique().to_list()
    digests = [int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in different]
    table = pl.DataFrame({"word": different, "hash": digests}, schema={"word": pl.String, "hash": pl.UInt64})
    found = words.rename("word").to_frame().join(table, on="word", how="left", maintain_order="left")["hash"]
    hashes: np.ndarray[Any, np.dtype[np.uint64]] = found.to_numpy()
    return hashes


def _whole(hashes: Any, row_of: Any, place: Any, num_texts: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    import numpy as np

    powers = np.cumprod(np.full(int(place.max(initial=-1)) + 2, 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)
    texts_N = np.zeros(num_texts, np.uint64)
    filled, starts = np.unique(row_of, return_index=True)
    if len(filled):
        texts_N[filled] = np.maximum(_mix(np.add.reduceat(_mix(hashes) * powers[place], starts)), np.uint64(1))
    return texts_N


def _bands(flat: Any, lengths_N: Any) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """MinHash: 80 functions of the shingles, of each the least value in a text, five of them to a band."""
    import numpy as np

    bands_BN = np.zeros((BANDS, len(lengths_N)), np.uint64)
    filled = np.flatnonzero(lengths_N)
    if not len(filled):
        return bands_BN
    starts = (np.cumsum(lengths_N) - lengths_N)[filled]
    wide = flat.astype(np.uint64)
    for number, (times, plus) in enumerate(_functions()):
        least = np.minimum.reduceat((wide * times + plus) >> np.uint64(32), starts)
        band = number // ROWS_OF_BAND
        bands_BN[band, filled] = _mix(bands_BN[band, filled] * np.uint64(31) + least + np.uint64(band + 1))
    return bands_BN


@functools.lru_cache(maxsize=1)
def _functions() -> Sequence[tuple[np.uint64, np.uint64]]:
    import numpy as np

    def number(name: str) -> np.uint64:
        return np.uint64(draws.integer(1 << 63, 0, "minhash", 0, name))

    return [
        (number(f"times.{i}") * np.uint64(2) + np.uint64(1), number(f"plus.{i}")) for i in range(BANDS * ROWS_OF_BAND)
    ]


def _mix(values: Any) -> Any:
    """The finisher of splitmix64, which spreads every bit over all others; sums and products wrap around."""
    import numpy as np

    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
