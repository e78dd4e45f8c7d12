"""Which caption column a sample's text comes from: weights over columns, by epoch and by quality (METHOD §5).

Of the rules (``mixing_rules.py``) the last whose conditions all hold for a sample counts. The first has none, so that
there always is one:

    web=0.8,synthetic=0.2
    epoch>=10: web=0.5,synthetic=0.5
    score.web<0.25 and epoch<20: synthetic=1

One object draws the ``.txt`` of the shards, as epoch 0, and the loader's text of every epoch, so that the two agree.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any, Final, NamedTuple

from clips_data import draws
from clips_data.errors import UserError, did_you_mean
from clips_data.mixing_rules import MAX_DIGITS, Rule, example, parse_rule

NO_CAPTION: Final = "no_caption"
"""The outcome where all columns are empty."""
_INSTEAD: Final = "_for_missing_"
_EXACT: Final = Context(prec=MAX_DIGITS)
"""A share near 0 leaves 1 minus it with all these digits."""


class Choice(NamedTuple):
    """What was drawn for one sample."""

    column: str | None
    """The column that its text comes from; ``None`` where all are empty."""
    outcome: str
    """What to count: the column, ``<column>_for_missing_<wanted>``, or ``no_caption``."""
    wanted: str
    """The column drawn, whether or not it is empty."""
    rule: int
    """The place of the rule that counted in ``Mix.rules``, from 0."""
    draw: float
    """In [0, 1). The column drawn is the first whose bound in the rule is above it."""


@dataclass(frozen=True)
class Mix:
    """Rules over caption columns. Build with ``parse``, ``of`` or ``from_json``; equal rules make equal mixes."""

    columns: tuple[str, ...]
    rules: tuple[Rule, ...]

    @classmethod
    def parse(cls, rules: Sequence[str], *, columns: Sequence[str]) -> Mix:
        """Raises ``UserError`` with the rule, the character and the nearest right word when a rule makes no sense."""
        if not rules:
            raise UserError(f"The mix has no rule. Give one that always holds, such as {example(columns)}.")
        return cls(tuple(columns), tuple(parse_rule(n, text, columns) for n, text in enumerate(rules, 1)))

    @classmethod
    def of(
        cls, web_ratio: float, columns: Sequence[str], rules: Sequence[str] = (), replace_below: float | None = None
    ) -> Mix:
        """``rules``, or without any the first column with probability ``web_ratio`` and else the second.

        With ``replace_below``, a first column whose score is below it gives way to the second (Nguyen et al.), whatever
        the rules before say. Raises ``UserError`` as ``parse`` does, and when there is no second column to give way to.
        """
        written = list(rules) or [_by_ratio(web_ratio, columns)]
        if replace_below is not None:
            if len(columns) < 2:
                raise UserError(
                    f"replace_below {replace_below:g} needs a second column to replace {columns[0]!r} by. "
                    "Add one to --columns, or leave replace_below out."
                )
            written.append(f"score.{columns[0]}<{replace_below!r}: {columns[1]}=1")
        return cls.parse(written, columns=columns)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], columns: Sequence[str]) -> Mix:
        """The mix of an ``index.json``, from its ``mix`` and ``columns``.

        Shards made before there were rules state a ``web_ratio``. Raises ``UserError`` when it states neither.
        """
        if "rules" in entry:
            return cls.parse(entry["rules"], columns=entry.get("columns", columns))
        if "web_ratio" in entry:
            return cls.of(entry["web_ratio"], columns)
        raise UserError("These shards do not state how their texts were mixed. Give the rules, or shard again.")

    def to_json(self) -> dict[str, Any]:
        return {"columns": list(self.columns), "rules": [rule.text for rule in self.rules]}

    @property
    def score_fields(self) -> tuple[str, ...]:
        """The fields of scores that conditions ask for, each once."""
        return tuple(dict.fromkeys(c.field for rule in self.rules for c in rule.conditions if c.field is not None))

    def check_scores(self, known: Iterable[str]) -> None:
        """Raises ``UserError`` when a condition asks for a score that no sample can have."""
        names = [f"score.{name}" for name in known]
        for number, rule in enumerate(self.rules, 1):
            for name in (f"score.{c.field}" for c in rule.conditions if c.field is not None):
                if name not in names:
                    remedy = did_you_mean(name, names) if names else "No scores are carried; run `clips score` first."
                    raise UserError(f"Rule {number} of the mix, {rule.text!r}: there is no {name}. {remedy}")

    def choose(
        self, *, seed: int, epoch: int, key: str, texts: Mapping[str, str], scores: Mapping[str, float | None]
    ) -> Choice:
        """The column of one sample: a function of the arguments alone.

        ``texts`` holds every column, ``scores`` the fields there are, rounded or not. An empty text gives way to the
        first that is not, in the order of the columns, those without a share in the rule last.
        """
        number = len(self.rules) - 1
        while not all(condition.holds(epoch, scores) for condition in self.rules[number].conditions):
            number -= 1  # ends: the first rule has no conditions
        rule = self.rules[number]
        draw = draws.uniform(seed, "mix", epoch, key)
        wanted = self.columns[bisect_right(rule.bounds, draw)]
        if texts[wanted]:
            return Choice(wanted, wanted, wanted, number, draw)
        for column in rule.substitutes:
            if texts[column]:
                return Choice(column, f"{column}{_INSTEAD}{wanted}", wanted, number, draw)
        return Choice(None, NO_CAPTION, wanted, number, draw)


def realised(counts: Mapping[str, int]) -> dict[str, float]:
    """The share of each column among the samples that have a text, from counts by outcome; stand-ins are included."""
    taken: dict[str, int] = {}
    for outcome, number in counts.items():
        if outcome != NO_CAPTION:
            column = outcome.partition(_INSTEAD)[0]
            taken[column] = taken.get(column, 0) + number
    total = sum(taken.values())
    return {column: number / total for column, number in taken.items() if number}


def described(counts: Mapping[str, int]) -> str:
    """Counts by outcome for people: the realised shares, and what stood in for what."""
    shares = [f"{column} {share:.2%}" for column, share in sorted(realised(counts).items(), key=lambda item: -item[1])]
    texts = [", ".join(shares) + f" of {sum(counts.values()) - counts.get(NO_CAPTION, 0)} texts"]
    for outcome, number in sorted(counts.items()):
        column, instead, wanted = outcome.partition(_INSTEAD)
        if instead:
            texts.append(f"{column} stood in for an empty {wanted} {number} times")
    return "; ".join(texts)


def _by_ratio(web_ratio: float, columns: Sequence[str]) -> str:
    web = Decimal(repr(float(web_ratio)))
    if len(columns) == 1:
        return f"{columns[0]}=1"
    # Not 1 - web_ratio, which would read 0.19999999999999996: this is what the user will see.
    return f"{columns[0]}={web},{columns[1]}={_EXACT.subtract(Decimal(1), web)}"
