"""The highest share of all samples by a number, exactly, whatever their order and sharding, in bounded memory.

The threshold is found as a radix sort would: a pass counts the leading bits of all numbers, the next ones look only
at numbers that begin as the threshold does, and once few enough are left they are sorted. So memory holds one
histogram (32 MB) or ``MAX_COLLECTED`` numbers (8 MB), and there are two or three passes, up to four more where the
threshold itself is shared by more samples than may stay: these are drawn by their keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

from clips_data import draws
from clips_data.expressions import Expression

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

    Words = np.ndarray[Any, np.dtype[np.uint64]]

MAX_COLLECTED: Final = 1 << 20
DIGITS_BITS: Final = (22, 21, 21)
_DRAW_BITS: Final = 53

Pass = Callable[[Callable[["pl.DataFrame"], Any]], Iterable[Any]]
"""Applies a (picklable) measure to the rows of all shards, some shards at a time, in any order."""


@dataclass(frozen=True)
class KeepTop:
    """Keeps what is above ``threshold``, and of those at it the ones up to a draw, then up to a key."""

    by: Expression
    share: float
    seed: int
    threshold: int
    draw: int
    key: str

    @property
    def labels(self) -> tuple[str, str]:
        label = f"keep_top {self.share:g} by {self.by.text}"
        return label, f"{label} is null"

    @property
    def columns(self) -> tuple[str, ...]:
        return self.by.columns

    def judge(self, view: pl.DataFrame) -> pl.Series:
        """0 for rows that stay, 1 for those below, 2 for those without a number."""
        import numpy as np
        import polars as pl

        valid, words = _valid_words(self.by, view)
        verdicts = np.full(len(view), 2, np.uint8)
        verdicts[valid] = words < self.threshold
        ties = valid[words == self.threshold]
        if self.draw < 1 << _DRAW_BITS and len(ties):
            keys = view["key"].gather(ties).to_list()
            verdicts[ties] = [(_draw(self.seed, key), key) > (self.draw, self.key) for key in keys]
        return pl.Series(verdicts)

    def tell(self, view: pl.DataFrame) -> pl.DataFrame:
        """The numbers by which rows were judged."""
        return view.select(self.by.values(view).alias(self.by.text))


def find(by: Expression, share: float, seed: int, run: Pass) -> KeepTop:
    """``KeepTop`` for the rows that ``run`` passes over: at most ``ceil(share × rows)`` stay.

    Rows whose number is null or NaN count among the rows and never stay.
    """
    exact = Fraction(repr(share))
    rank = lambda num_rows, num_valid: min(math.ceil(exact * num_rows), num_valid)  # noqa: E731
    found = _nth_largest(run, _ByValue(by), rank)
    if found is None:
        return KeepTop(by, share, seed, (1 << 64) - 1, -1, "")
    threshold, num_wanted, num_equal = found
    if num_wanted == num_equal:
        return KeepTop(by, share, seed, threshold, 1 << _DRAW_BITS, "")
    lowest = _nth_largest(run, _ByDraw(by, threshold, seed), lambda *_: num_wanted)
    assert lowest is not None
    draw = (1 << _DRAW_BITS) - 1 - lowest[0]
    keys = sorted(key for some in run(_KeysAt(by, threshold, seed, draw)) for key in some)
    return KeepTop(by, share, seed, threshold, draw, keys[lowest[1] - 1])


def _nth_largest(
    run: Pass, source: Callable[[pl.DataFrame], Words], rank: Callable[[int, int], int]
) -> tuple[int, int, int] | None:
    """The word of this rank, how many of those equal to it are within the rank, and how many are equal to it.

    ``rank`` is told the number of rows and of words. ``None`` for rank 0.
    """
    import numpy as np

    left: int | None = None
    prefix, shift = 0, 64
    for width in DIGITS_BITS:
        shift -= width
        counts = np.zeros(1 << width, np.int64)
        num_rows = num_words = 0
        for rows, words, digits, numbers in run(_Count(source, prefix, shift, width)):
            counts[digits] += numbers
            num_rows, num_words = num_rows + rows, num_words + words
        if left is None:
            left = rank(num_rows, num_words)
        if left == 0:
            return None
        above = np.cumsum(counts[::-1])
        place = int(np.searchsorted(above, left))
        left -= int(above[place - 1]) if place else 0
        digit = len(counts) - 1 - place
        prefix, num = prefix << width | digit, int(counts[digit])
        if shift and num <= MAX_COLLECTED:
            words = np.sort(np.concatenate(list(run(_Collect(source, prefix, shift)))))[::-1]
            word = words[left - 1]
            return int(word), left - int(np.count_nonzero(words > word)), int(np.count_nonzero(words == word))
    assert left is not None
    return prefix, left, num


# --- measures: picklable, from the rows of some shards to numbers -----------------------------------------------------


@dataclass(frozen=True)
class _ByValue:
    """Words in the order of the numbers, which are 64-bit floats."""

    by: Expression

    def __call__(self, view: pl.DataFrame) -> Words:
        return _valid_words(self.by, view)[1]


@dataclass(frozen=True)
class _ByDraw:
    """Words of the rows at the threshold, the larger the lower their draw."""

    by: Expression
    threshold: int
    seed: int

    def __call__(self, view: pl.DataFrame) -> Words:
        import numpy as np

        draws_of = [(1 << _DRAW_BITS) - 1 - _draw(self.seed, key) for key in _keys_at(self.by, self.threshold, view)]
        return np.array(draws_of, np.uint64)


@dataclass(frozen=True)
class _KeysAt:
    by: Expression
    threshold: int
    seed: int
    draw: int

    def __call__(self, view: pl.DataFrame) -> list[str]:
        return [key for key in _keys_at(self.by, self.threshold, view) if _draw(self.seed, key) == self.draw]


@dataclass(frozen=True)
class _Count:
    """Rows, words, and how many words that begin with ``prefix`` go on with each digit of ``width`` bits."""

    source: Callable[[pl.DataFrame], Words]
    prefix: int
    shift: int
    width: int

    def __call__(self, view: pl.DataFrame) -> tuple[int, int, Words, Words]:
        import numpy as np

        words = self.source(view)
        begun = _beginning(words, self.prefix, self.shift + self.width)
        digits = (begun >> np.uint64(self.shift)) & np.uint64((1 << self.width) - 1)
        return len(view), len(words), *np.unique(digits, return_counts=True)


@dataclass(frozen=True)
class _Collect:
    """The words that begin with ``prefix``."""

    source: Callable[[pl.DataFrame], Words]
    prefix: int
    shift: int

    def __call__(self, view: pl.DataFrame) -> Words:
        return _beginning(self.source(view), self.prefix, self.shift)


def _beginning(words: Words, prefix: int, shift: int) -> Words:
    import numpy as np

    return words if shift == 64 else words[words >> np.uint64(shift) == prefix]


def _valid_words(by: Expression, view: pl.DataFrame) -> tuple[np.ndarray[Any, Any], Words]:
    """The places of the rows that have a number, and for each a word that is larger where the number is."""
    import numpy as np

    numbers = by.values(view).fill_null(math.nan).to_numpy()
    valid = np.flatnonzero(~np.isnan(numbers))
    bits = (numbers[valid] + 0.0).view(np.uint64)  # adding makes -0.0 the 0.0 that it equals
    sign = np.uint64(1 << 63)
    return valid, np.where(bits & sign, ~bits, bits | sign)


def _keys_at(by: Expression, threshold: int, view: pl.DataFrame) -> list[str]:
    valid, words = _valid_words(by, view)
    keys: list[str] = view["key"].gather(valid[words == threshold]).to_list()
    return keys


def _draw(seed: int, key: str) -> int:
    return int(draws.uniform(seed, "keep_top", 0, key) * (1 << _DRAW_BITS))
