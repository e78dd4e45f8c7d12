"""Which pairs go on to the shards: exclusions, conditions, the best share by a score, and balancing, in this order.

A filter judges rows by the joined table (``Inputs.view``) and by what a pass over all shards found before. So what it
says of a sample does not depend on the sharding, on the order of rows or on how many processes work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from clips_data import balance, draws, exclude, executor, expressions, joined, keep_top, ledger, measure, schema
from clips_data.config import ShardConfig
from clips_data.errors import UserError, did_you_mean
from clips_data.expressions import Expression
from clips_data.redact import redact, without_secrets

if TYPE_CHECKING:
    import polars as pl

PRELOAD: Final = ("polars", "clips_data.filters")
_UNITS_OF_TASK: Final = 16


class Filter(Protocol):
    """One filter. ``labels`` name those that it removes and perhaps those about which it has nothing to go by."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of the view that it looks at."""
        ...

    def judge(self, view: pl.DataFrame) -> pl.Series:
        """For each row 0 where it stays, else 1 or 2 for the label under which it goes."""
        ...

    def tell(self, view: pl.DataFrame) -> pl.DataFrame:
        """What the filter looked at, for people."""
        ...


@dataclass(frozen=True)
class Where:
    """Keeps what meets a condition."""

    condition: Expression

    @property
    def labels(self) -> tuple[str, str]:
        return f"where {self.condition.text}", f"where {self.condition.text} is null"

    @property
    def columns(self) -> tuple[str, ...]:
        return self.condition.columns

    def judge(self, view: pl.DataFrame) -> pl.Series:
        import polars as pl

        met = self.condition.values(view)
        return pl.select(pl.when(met.is_null()).then(2).when(met).then(0).otherwise(1).cast(pl.UInt8)).to_series()

    def tell(self, view: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

        fields = [name.partition(".") for name in dict.fromkeys(("key", *self.condition.fields))]
        return view.select(
            (pl.col(head).struct.field(rest) if rest else pl.col(head)).alias(head + dot + rest)
            for head, dot, rest in fields
        )


@dataclass(frozen=True)
class Kept:
    """What the filters left of a shard.

    ``removed`` has the rows that went by label, in the order of the filters; each counts among those that the filters
    before it left. ``examples`` has some of them: key, URL, captions and what the filter looked at.
    """

    table: pl.DataFrame
    removed: dict[str, int]
    examples: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Filters:
    """All filters of a ``clips shard``, ready to judge. Goes to worker processes."""

    given: joined.Inputs
    seed: int
    explain: int
    known: pl.DataFrame | None = None
    """The columns of the view in any of the shards, without rows; ``None`` where there are no filters."""
    steps: tuple[Filter, ...] = ()
    columns: frozenset[str] = field(default=frozenset())
    """Those of the view that are read."""

    @classmethod
    def prepare(
        cls, config: ShardConfig, given: joined.Inputs, units: Sequence[str], *, num_processes: int = 0
    ) -> Filters:
        """The filters that ``config`` asks for, for these shards.

        ``keep_top`` passes two to seven times over the views of all shards, ``balance`` once. A pass holds one view a
        process; for the rest see ``keep_top`` and ``balance``. Raises ``UserError`` for an expression that makes no
        sense, naming what is known, and for a list of concepts that cannot be read.
        """
        filters = cls(given, config.seed, config.explain)
        chosen = (config.exclude, config.where or None, config.keep_top, config.balance)
        if not units or all(choice is None for choice in chosen):
            return filters
        known, example = _known(given, units), _example(given, units)
        filters = replace(filters, known=known)
        if config.exclude is not None:
            filters = filters._and(exclude.find(Path(config.exclude)))
        for text in config.where:
            condition = expressions.compiled(text, alike(known, example), option="--where", kind="condition")
            filters = filters._and(Where(condition))
        if config.keep_top is not None:
            by = expressions.compiled(config.by, alike(known, example), option="--by", kind="number")
            run = functools.partial(filters._passes, units, by.columns, num_processes)
            filters = filters._and(keep_top.find(by, config.keep_top, config.seed, run))
        if config.balance is not None:
            column = _balanced_column(config)
            run = functools.partial(filters._passes, units, (column,), num_processes)
            found = balance.find(Path(config.balance), column, config.balance_cap, config.seed, run)
            filters = filters._and(found)
        return filters

    @property
    def names(self) -> tuple[str, ...]:
        """All labels under which rows may go, in the order of the filters."""
        return tuple(label for step in self.steps for label in step.labels)

    def apply(self, unit: str, table: pl.DataFrame) -> Kept:
        """The rows of ``table``, which is ``Inputs.table(unit)``, that stay.

        Raises ``UserError`` where an expression cannot be worked out for one of them.
        """
        if not self.steps:
            return Kept(table, {}, {})
        view = self._view(unit).with_row_index(_PLACE)
        assert view["key"].equals(table["key"]), f"the table is not that of shard {unit}"
        removed: dict[str, int] = {}
        examples: dict[str, list[dict[str, Any]]] = {}
        for step in self.steps:
            verdicts = step.judge(view)
            for number, label in enumerate(step.labels, 1):
                gone = view.filter(verdicts == number)
                removed[label] = removed.get(label, 0) + len(gone)
                if self.explain and len(gone):
                    examples[label] = self._examples(step, gone, table)
            view = view.filter(verdicts == 0)
        return Kept(table[view[_PLACE]], removed, examples)

    def _and(self, step: Filter) -> Filters:
        return replace(self, steps=(*self.steps, step), columns=self.columns | {*step.columns})

    def _view(self, unit: str, further: Sequence[str] = ()) -> pl.DataFrame:
        assert self.known is not None
        wanted = {*self.columns, *further}
        return alike(
            self.known.select("key", "sha256", *sorted(wanted - {"key", "sha256"})), self.given.view(unit, wanted)
        )

    def _passes(
        self, units: Sequence[str], further: Sequence[str], num_processes: int, look: Callable[[pl.DataFrame], Any]
    ) -> Iterator[Any]:
        """``look`` at what these filters leave of each shard, with the columns that it looks at."""
        tasks = [units[first : first + _UNITS_OF_TASK] for first in range(0, len(units), _UNITS_OF_TASK)]
        work = functools.partial(_look, filters=self, further=tuple(further), look=look)
        for found in executor.map_units(work, tasks, num_processes=num_processes, preload=PRELOAD):
            yield from found

    def _examples(self, step: Filter, gone: pl.DataFrame, table: pl.DataFrame) -> list[dict[str, Any]]:
        drawn = [draws.uniform(self.seed, "explain", 0, key) for key in gone["key"]]
        some = gone[sorted(range(len(drawn)), key=drawn.__getitem__)[: self.explain]]
        told = step.tell(some.drop(_PLACE)).to_dicts()
        return [
            {"key": row["key"], "url": redact(row.get("url") or ""), "captions": _texts(row), **_public(values)}
            for row, values in zip(table[some[_PLACE]].iter_rows(named=True), told, strict=True)
        ]


_PLACE: Final = "place"


def _look(
    units: Sequence[str], filters: Filters, further: tuple[str, ...], look: Callable[[pl.DataFrame], Any]
) -> list[Any]:
    found = []
    for unit in units:
        view = filters._view(unit, further)
        for step in filters.steps:
            view = view.filter(step.judge(view) == 0)
        found.append(look(view))
    return found


def _public(value: Any) -> Any:
    """``value`` with the URLs in it redacted."""
    if isinstance(value, dict):
        return {name: _public(one) for name, one in value.items()}
    return [_public(one) for one in value] if isinstance(value, list) else without_secrets(value)


def _texts(row: Mapping[str, Any]) -> dict[str, str]:
    return {name.removeprefix("text."): text for name, text in row.items() if name.startswith("text.")}


def _balanced_column(config: ShardConfig) -> str:
    if config.balance_column not in config.columns:
        raise UserError(
            f"--balance-column {config.balance_column} is none of --columns {','.join(config.columns)}. "
            f"{did_you_mean(config.balance_column, config.columns)}"
        )
    return config.balance_column


def inputs(config: ShardConfig, given: joined.Inputs) -> dict[str, str]:
    """Digests of what the filters read beside ``given``: lists of samples and concepts, near duplicates they name."""
    from clips_data import near_duplicates

    found = {}
    if config.exclude is not None:
        found["exclude"] = exclude.file_digest(Path(config.exclude))
    if config.balance is not None:
        found["balance"] = balance.file_digest(Path(config.balance))
    if any(_NEAR_DUPLICATE in text for text in (*config.where, config.by)):
        for name, folder in given.folders.items():
            told = ledger.read_sidecar(folder / near_duplicates.FOLDER, near_duplicates.UNIT)
            if told is not None:
                files = {unit: told.files.get(f"{unit}.parquet", {}).get("sha256") for unit in given.units}
                found[f"near duplicates of {name}"] = ledger.digest_json(files)
    return found


_NEAR_DUPLICATE: Final = "near_duplicate_of"


# --- one view for shards of different lists ---------------------------------------------------------------------------


def _known(given: joined.Inputs, units: Sequence[str]) -> pl.DataFrame:
    """A view without rows that has what the view of any shard has: lists differ in their columns, labels may too."""
    kinds: dict[tuple[Any, ...], pl.DataFrame] = {}
    for unit in units:
        kind = kind_of(given, unit)
        if kind not in kinds:
            kinds[kind] = given.view(unit).clear()
    return functools.reduce(alike, kinds.values())


def kind_of(given: joined.Inputs, unit: str) -> tuple[Any, ...]:
    """The columns of a shard's tables of pairs and scores: views of shards of one kind have the same columns."""
    folders = [given.pairs, *(path for name, path in given.folders.items() if name.startswith(schema.SCORES))]
    return tuple(tuple(measure.columns_of(folder / f"{unit}.parquet").items()) for folder in folders)


def _example(given: joined.Inputs, units: Sequence[str]) -> pl.DataFrame:
    """The first view that has rows: what polars has against an expression it often says only then."""
    view = given.view(units[0])
    for unit in units[1:]:
        if len(view):
            break
        view = given.view(unit)
    return view


def alike(known: pl.DataFrame, view: pl.DataFrame) -> pl.DataFrame:
    """``view`` with nulls where it lacks what is known, and in wider types where others need these."""
    import polars as pl

    try:
        return pl.concat([known, view], how="diagonal_relaxed")
    except pl.exceptions.PolarsError as error:
        raise UserError(
            f"Shards hold values of types that do not go together ({str(error).splitlines()[0]}), so no expression can "
            "be about all of them. Shard them apart, with the names of the shards on stdin."
        ) from None
