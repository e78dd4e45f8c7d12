"""One mixing rule: ``[condition {and condition}:] column=weight{,column=weight}``, and what makes no sense in one.

A condition holds ``epoch`` (from 0) or ``score.FIELD`` against a number by ``<``, ``<=``, ``>`` or ``>=``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Final, NoReturn

from clips_data.errors import UserError, did_you_mean

SCORE_DIGITS: Final = 6
"""Decimal places of scores in the ``.json`` members. Conditions compare no more, so that all sides decide alike."""
MAX_DIGITS: Final = 400
"""Longest number in a rule."""
_COMPARE: Final[Mapping[str, Callable[[float, float], bool]]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_CONDITION: Final = re.compile(r"([^\s<>=]+)\s*(<=|>=|<|>)\s*([^\s<>=]+)")
_AND: Final = re.compile(r"(?<!\S)and(?!\S)")
_COMMA: Final = re.compile(",")
_EPOCH: Final = re.compile(r"\d{1,18}", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Condition:
    """``epoch`` or, with a ``field``, one score against a number."""

    field: str | None
    symbol: str
    bound: float

    def __str__(self) -> str:
        return f"{'epoch' if self.field is None else 'score.' + self.field}{self.symbol}{self.bound!r}"

    def holds(self, epoch: int, scores: Mapping[str, float | None]) -> bool:
        """A missing score makes a condition false, whatever it asks."""
        if self.field is None:
            return _COMPARE[self.symbol](epoch, self.bound)
        score = scores.get(self.field)
        if score is None:
            return False
        try:
            return _COMPARE[self.symbol](round(score, SCORE_DIGITS), self.bound)
        except TypeError:
            raise UserError(
                f"The mix compares score.{self.field} with {self.bound:g}, but that score is {score!r}, which is no "
                "number. Take another score, or none."
            ) from None


@dataclass(frozen=True)
class Rule:
    """One rule. ``shares`` and their running sums ``bounds`` are those of ``Mix.columns``, in that order."""

    text: str
    conditions: tuple[Condition, ...]
    shares: tuple[float, ...]
    bounds: tuple[float, ...]
    substitutes: tuple[str, ...]
    """Columns to try where the one drawn is empty: first those with a share, then the others."""


def parse_rule(number: int, text: str, columns: Sequence[str]) -> Rule:
    """The rule ``number``, from 1, of a mix of ``columns``.

    Raises ``UserError`` with the rule, the character and the nearest right word when it makes no sense.
    """
    return _Parser(number, text, columns).rule()


def example(columns: Sequence[str]) -> str:
    """A rule that makes sense for these columns."""
    return "web=0.8,synthetic=0.2" if len(columns) < 2 else f"{columns[0]}=0.8,{columns[1]}=0.2"


class _Parser:
    """Reads one rule and, where it makes no sense, says at which character."""

    def __init__(self, number: int, text: str, columns: Sequence[str]) -> None:
        self._number, self._text, self._columns = number, text, columns

    def rule(self) -> Rule:
        head, colon, _ = self._text.partition(":")
        start = len(head) + 1 if colon else 0
        if (second := self._text.find(":", start)) >= 0:
            self._refuse(
                second, "one ':' too many. It stands once, before the weights; conditions are joined by 'and'."
            )
        if colon and self._number == 1:
            like = example(self._columns)
            self._refuse(0, f"the first rule has to hold for every sample. Put one like {like} before it.")
        if not colon and self._number > 1:
            self._refuse(
                0,
                "without a condition it would undo the rules before it. Join the weights of one rule by commas, or "
                "begin it with a condition, such as 'epoch>=10:'.",
            )
        asked = [self._condition(at, text) for at, text in self._pieces(_AND, 0, len(head))] if colon else []
        return self._with_weights(tuple(asked), start)

    def _condition(self, at: int, text: str) -> Condition:
        match = _CONDITION.fullmatch(text)
        if match is None:
            self._refuse(
                at, f"{text!r} is no condition. They look like epoch>=10 or score.web<0.25, with < <= > or >=."
            )
        subject, symbol, value = match.groups()
        value_at = at + match.start(3)
        if subject == "epoch":
            if not _EPOCH.fullmatch(value):
                self._refuse(value_at, f"{value!r} is no epoch. They are whole numbers, counted from 0.")
            return Condition(None, symbol, int(value))
        field = subject.removeprefix("score.")
        if field in ("", subject):
            known = ("epoch", *(f"score.{column}" for column in self._columns))
            self._refuse(at, f"a condition cannot ask for {subject!r}. {did_you_mean(subject, known)}")
        return Condition(field, symbol, float(self._number_at(value_at, value)))

    def _with_weights(self, conditions: tuple[Condition, ...], start: int) -> Rule:
        weights: dict[str, Fraction] = {}
        written = []
        for at, text in self._pieces(_COMMA, start, len(self._text)):
            left, equals, right = text.partition("=")
            column, value = left.strip(), right.strip()
            if not equals:
                self._refuse(at, f"{text!r} is no weight. They look like {example(self._columns)}.")
            if column not in self._columns:
                self._refuse(at, f"there is no column {column!r}. {did_you_mean(column, self._columns)}")
            if column in weights:
                self._refuse(at, f"column {column!r} has a weight already. Give each column one.")
            value_at = at + len(text) - len(right.lstrip())
            weights[column] = self._number_at(value_at, value)
            if weights[column] < 0:
                self._refuse(value_at, f"the weight {value} is below 0. Give 0, or leave the column out.")
            written.append(f"{column}={value}")
        total = sum(weights.values())
        if not total:
            self._refuse(start, "all weights are 0. Give at least one column more than that.")
        shares = [weights.get(column, Fraction()) / total for column in self._columns]
        return Rule(
            text=(" and ".join(map(str, conditions)) + ": " if conditions else "") + ",".join(written),
            conditions=conditions,
            shares=tuple(map(float, shares)),
            bounds=tuple(map(float, accumulate(shares))),
            substitutes=tuple(sorted(self._columns, key=lambda column: not weights.get(column))),
        )

    def _number_at(self, at: int, text: str) -> Fraction:
        """Exact, so that 8 to 2 draws just what 0.8 to 0.2 does."""
        if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
            self._refuse(at, f"{text[:40]!r} is no number." if text else "a number is missing.")
        return Fraction(text)

    def _pieces(self, separator: re.Pattern[str], start: int, end: int) -> Iterator[tuple[int, str]]:
        """What stands between separators, stripped, and at which place in the rule; refused where there is nothing."""
        for match in [*separator.finditer(self._text, start, end), None]:
            stop = match.start() if match else end
            piece = self._text[start:stop]
            if not piece.strip():
                after = f"before {self._text[stop:]!r}" if stop < len(self._text) else "at the end"
                self._refuse(stop, f"something is missing {after}.")
            yield start + len(piece) - len(piece.lstrip()), piece.strip()
            start = match.end() if match else end

    def _refuse(self, at: int, what: str) -> NoReturn:
        raise UserError(f"Rule {self._number} of the mix, {self._text!r}, character {at + 1}: {what}")
