"""The web view's text where it is drawn from several caption columns, by the rules that the shards' ``.txt`` follow."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clips_data.errors import UserError
from clips_data.mixing import Mix, described
from clips_train import views
from clips_train.config import TrainConfig
from clips_train.shards import INDEX_FILE, ShardError, Split

OF_THE_SHARDS = "shards"
"""What a rule reads that stands for those of ``index.json``."""


@dataclass(frozen=True)
class Mixed:
    """The rules of ``config.mix``, and the seed that they draw with."""

    mix: Mix
    seed: int

    @classmethod
    def open(cls, split: Split, config: TrainConfig) -> Mixed | None:
        """``None`` where the web view is ``web_column``.

        Raises ``UserError`` for rules that make no sense or that name a column which the shards do not have.
        """
        if not config.mix:
            return None
        rules, seed = list[str](config.mix), config.seed
        if rules[0] == OF_THE_SHARDS:
            of_the_shards, seed = _of_the_shards(split)
            rules[:1] = of_the_shards.to_json()["rules"]
        return cls(Mix.parse(rules, columns=split.columns), seed)

    def text(self, about: Mapping[str, Any], epoch: int, key: str) -> tuple[str, tuple[str, ...]]:
        """The text of a sample in an epoch, "" where all columns are empty, and what to count.

        That is ``mix.OUTCOME``, ``empty.COLUMN``, ``no_score.FIELD`` where a rule asks for one that the sample has not,
        and where there are several rules ``mix_rule.N``, the one that counted, from 1. Raises ``ShardError``.
        """
        texts = {column: views.column_text(about, column) for column in self.mix.columns}
        if not isinstance(scores := about.get("scores", {}), dict):
            raise ShardError("json_invalid")
        choice = self.mix.choose(seed=self.seed, epoch=epoch, key=key, texts=texts, scores=scores)
        counts = [f"mix.{choice.outcome}", *(f"empty.{column}" for column, text in texts.items() if not text)]
        counts += [f"no_score.{name}" for name in self.mix.score_fields if scores.get(name) is None]
        if len(self.mix.rules) > 1:
            counts.append(f"mix_rule.{choice.rule + 1}")
        return texts[choice.column] if choice.column is not None else "", tuple(counts)


def _of_the_shards(split: Split) -> tuple[Mix, int]:
    path = split.folder / INDEX_FILE
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))["mix"]
        return Mix.from_json(entry, split.columns), operator.index(entry["seed"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} does not say how its texts were mixed ({type(error).__name__}: {error}). Give rules in place of "
            f"{OF_THE_SHARDS!r}, or make the shards again."
        ) from None


def facts(counts: Mapping[str, int]) -> dict[str, str]:
    """What a run's counts tell people about its mix; nothing where there was none."""

    def under(prefix: str) -> dict[str, int]:
        return {name.removeprefix(prefix): number for name, number in counts.items() if name.startswith(prefix)}

    if not (outcomes := under("mix.")):
        return {}
    found = {"mix": described(outcomes)}
    for prefix, name in (("empty.", "empty_captions"), ("no_score.", "missing_scores"), ("mix_rule.", "mix_rules")):
        if numbers := under(prefix):
            told = ", ".join(f"{what} {number}" for what, number in sorted(numbers.items()))
            found[name] = f"{told} of {sum(outcomes.values())}"
    return found
