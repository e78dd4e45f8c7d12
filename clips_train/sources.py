"""Where a text comes from: a caption column, or one of several, drawn anew each epoch by the rules of the shards.

Views, the captioner's condition and its target all name sources; equal ones draw equal columns, so that a captioner can
learn the very text that its image is contrasted with (CoCa at 80/20, METHOD §5).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from clips_data import draws
from clips_data.errors import UserError, did_you_mean
from clips_data.mixing import Mix, described
from clips_train.config import Source, TrainConfig
from clips_train.shards import INDEX_FILE, ShardError, Split

OF_THE_SHARDS = "shards"
"""The source, or first rule of one, that stands for the mix and the seed of ``index.json``."""
NOT_COLUMNS = ("key", "sha256")


class Text(NamedTuple):
    """What a source gives for one sample in one epoch."""

    text: str
    column: str | None
    """The column that it is, ``None`` where all are empty."""
    counts: tuple[str, ...]


class Column(NamedTuple):
    """A source that is one column."""

    name: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    def text(self, about: Mapping[str, Any], epoch: int, key: str) -> Text:
        return Text(column_text(about, self.name), self.name, ())


@dataclass(frozen=True)
class Walk:
    """Columns taken in turn, one an epoch, from a start drawn per sample; empty ones are passed over."""

    columns: tuple[str, ...]
    seed: int
    label: str

    def text(self, about: Mapping[str, Any], epoch: int, key: str) -> Text:
        start = draws.integer(len(self.columns), self.seed, "walk", 0, key) + epoch
        for step in range(len(self.columns)):
            column = self.columns[(start + step) % len(self.columns)]
            if text := column_text(about, column):
                return Text(text, column, (f"{self.label}{column}",))
        return Text("", None, (f"{self.label}no_caption",))


@dataclass(frozen=True)
class Mixed:
    """A source of several columns, and the seed that it draws with."""

    mix: Mix
    seed: int
    label: str
    """Before the outcome in counts: ``mix.``, or ``mix_2.`` and so on where a run has several mixes."""

    @property
    def columns(self) -> tuple[str, ...]:
        return self.mix.columns

    def text(self, about: Mapping[str, Any], epoch: int, key: str) -> Text:
        """Counts the outcome, empty columns, scores that a rule asks for in vain, and which of several rules counted.

        Raises ``ShardError`` for a sample whose scores are none.
        """
        texts = {column: column_text(about, column) for column in self.mix.columns}
        if not isinstance(scores := about.get("scores", {}), dict):
            raise ShardError("json_invalid")
        choice = self.mix.choose(seed=self.seed, epoch=epoch, key=key, texts=texts, scores=scores)
        counts = [f"{self.label}{choice.outcome}", *(f"empty.{column}" for column, text in texts.items() if not text)]
        counts += [f"no_score.{name}" for name in self.mix.score_fields if scores.get(name) is None]
        if len(self.mix.rules) > 1:
            counts.append(f"{self.label.replace('mix', 'mix_rule')}{choice.rule + 1}")
        return Text(texts[choice.column] if choice.column is not None else "", choice.column, tuple(counts))


AnySource = Column | Walk | Mixed


class TextSources:
    """The sources of a run, each distinct one once. Build with ``open``; picklable."""

    def __init__(self, sources: Mapping[tuple[str, bool], AnySource]) -> None:
        self._sources = dict(sources)

    @classmethod
    def open(cls, split: Split, config: TrainConfig) -> TextSources:
        """Raises ``UserError`` for rules that make no sense, and for a column that the shards do not have."""
        wanted = [("views", view.source, view.walk) for view in config.views]
        if config.decoder != "none":
            of_captioner = (("condition", config.condition), ("target", config.target))
            wanted += [(setting, source, False) for setting, source in of_captioner if source is not None]
        found: dict[tuple[str, bool], AnySource] = {}
        for setting, source, walk in wanted:
            if isinstance(source, dict):
                _check_columns(source, split, setting)
            if _name(source, walk) not in found:
                num_mixed = sum(not isinstance(known, Column) for known in found.values())
                label = "mix." if num_mixed == 0 else f"mix_{num_mixed + 1}."
                found[_name(source, walk)] = _open(source, walk, split, config.seed, label)
            _check_columns(found[_name(source, walk)].columns, split, setting)
        beside = [name for view in config.views for name in (*view.negatives, view.length_of) if name is not None]
        _check_columns(beside, split, "views")
        return cls(found)

    def columns(self, source: Source, walk: bool = False) -> tuple[str, ...]:
        """Those that a source may take its text from."""
        return self._sources[_name(source, walk)].columns

    def texts(self, about: Mapping[str, Any], epoch: int, key: str) -> Texts:
        """The text of every source. Raises ``ShardError``."""
        return Texts({name: source.text(about, epoch, key) for name, source in self._sources.items()})


class Texts:
    """What the sources of a run give for one sample in one epoch."""

    def __init__(self, found: Mapping[tuple[str, bool], Text]) -> None:
        self._found = found

    def of(self, source: Source, walk: bool = False) -> Text:
        return self._found[_name(source, walk)]

    @property
    def counts(self) -> tuple[str, ...]:
        """Each once, although sources may share columns."""
        return tuple(dict.fromkeys(count for text in self._found.values() for count in text.counts))


def column_text(about: Mapping[str, Any], name: str) -> str:
    """Raises ``UserError`` when the sample has no such caption column."""
    text = about.get(name)
    if not isinstance(text, str):
        columns = [key for key, value in about.items() if isinstance(value, str) and key not in NOT_COLUMNS]
        raise UserError(f"The shards have no caption column {name!r}. {did_you_mean(name, columns)}")
    return text


def label_of(source: Source) -> str:
    """A source's name in counts: the column's, or ``mix``."""
    return source if isinstance(source, str) and not _is_rule(source) else "mix"


def _name(source: Source, walk: bool) -> tuple[str, bool]:
    return json.dumps(source), walk


def _is_rule(source: str) -> bool:
    return source == OF_THE_SHARDS or "=" in source


def _open(source: Source, walk: bool, split: Split, seed: int, label: str) -> AnySource:
    if isinstance(source, str) and not _is_rule(source):
        return Column(source)
    if isinstance(source, dict):
        if walk:
            return Walk(tuple(source), seed, label)
        rules = [",".join(f"{column}={weight!r}" for column, weight in source.items())]
    else:
        rules = [source] if isinstance(source, str) else list(source)
        if not rules:
            raise UserError("A view's `from` is empty. Name a caption column, or weights of several.")
        if rules[0] == OF_THE_SHARDS:
            of_the_shards, seed = _of_the_shards(split)
            rules[:1] = of_the_shards.to_json()["rules"]
    columns = tuple(source) if isinstance(source, dict) else split.columns
    return Mixed(Mix.parse(rules, columns=columns), seed, label)


def _check_columns(names: Iterable[str], split: Split, setting: str) -> None:
    without = "" if setting == "views" else ", train without a captioner (decoder none, caption_weight 0)"
    for name in names:
        if name not in split.columns:
            raise UserError(
                f"The data have no caption column {name!r}, which {setting} names. "
                f"{did_you_mean(name, split.columns)} Change {setting}{without}, or make shards with that column: "
                "clips shard --columns."
            )


def _of_the_shards(split: Split) -> tuple[Mix, int]:
    path = split.folder / INDEX_FILE
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))["mix"]
        return Mix.from_json(entry, split.columns), operator.index(entry["seed"])
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} does not say how its texts were mixed ({type(error).__name__}: {error}). Give rules in place of "
            f"{OF_THE_SHARDS!r}, or make the shards again."
        ) from None


def facts(counts: Mapping[str, int]) -> dict[str, str]:
    """What a run's counts tell people about its mixes; nothing where there was none."""

    def under(prefix: str) -> dict[str, int]:
        return {name.removeprefix(prefix): number for name, number in counts.items() if name.startswith(prefix)}

    mixes = sorted({name.partition(".")[0] for name in counts if name.startswith("mix") and "rule" not in name})
    if not mixes:
        return {}
    found = {mix: described(under(f"{mix}.")) for mix in mixes}
    total = sum(under(f"{mixes[0]}.").values())
    rules = [(f"{mix.replace('mix', 'mix_rule')}.", mix.replace("mix", "mix_rules")) for mix in mixes]
    for prefix, name in (("empty.", "empty_captions"), ("no_score.", "missing_scores"), *rules):
        if numbers := under(prefix):
            told = ", ".join(f"{what} {number}" for what, number in sorted(numbers.items()))
            found[name] = f"{told} of {total}"
    return found
