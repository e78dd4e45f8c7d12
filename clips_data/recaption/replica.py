"""One engine and the shards that it captions: rows stream through it across shards, so that it never runs dry."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import caption_table, joined, ledger, schema
from clips_data.journal import Journal
from clips_data.recaption import reuse, rows
from clips_data.recaption.engine_process import EngineProcess
from clips_data.recaption.engines import Answer, Build, Request
from clips_data.recaption.rows import Item, Recipe

if TYPE_CHECKING:
    from clips_data.recaption.prompts import Prompt

FLUSH_S: Final = 10.0
MOST_OPEN_SHARDS: Final = 32
STATS: Final = "_stats.json"


@dataclass(frozen=True)
class Work:
    """All that a replica needs to know, in any process on any machine that sees the same folders."""

    prompt: Prompt
    column: str
    seed: int
    gate_min: float | None
    model: str
    model_digest: str
    engine: str
    build: Build
    batch_rows: int
    batch_deadline_s: float
    pairs: Path
    base: Path
    """Folder of the column; those of further columns lie beside it."""
    captions: Path
    """Where the columns that the prompt reads have their folders."""
    scores: Path
    inputs_of: Mapping[str, Mapping[str, str]]
    left_out: Mapping[str, frozenset[str]]
    digested: Mapping[str, Any]
    earlier: tuple[Path, ...]
    overwrite: bool
    stop_at: float | None = None
    """Seconds since the epoch after which no further row is begun."""
    lock_wait_s: float = 0.0
    """How long to wait for a journal that another process still holds."""

    def recipe(self, special_tokens: Sequence[str] = ()) -> Recipe:
        return Recipe(
            self.prompt,
            column=self.column,
            seed=self.seed,
            model_digest=self.model_digest,
            special_tokens=special_tokens,
            gate_min=self.gate_min,
        )

    def folder(self, column: str) -> Path:
        """Of one of the recipe's columns."""
        return self.base.with_name(self.base.name + column.removeprefix(self.column))

    @property
    def folders(self) -> dict[str, Path]:
        return {column: self.folder(column) for column in self.recipe().columns}

    def journal(self, unit: str) -> Path:
        return next(iter(self.folders.values())) / f"{unit}.journal.jsonl"

    def given(self, unit: str) -> joined.Inputs:
        return joined.Inputs(self.pairs, (unit,), rows.input_folders(self.prompt, self.captions, self.scores))

    def finished(self, unit: str) -> Counter[str] | None:
        """The rows by code over all columns of a unit that is finished as this work would do it; else ``None``."""
        counts: Counter[str] = Counter()
        for folder in self.folders.values():
            sidecar = ledger.read_sidecar(folder, unit)
            if sidecar is None or sidecar.inputs != self.inputs_of[unit] or sidecar.config != self.digested:
                return None
            counts.update(sidecar.counts)
        return counts


@dataclass
class Done:
    """What was done of one shard. ``counts`` has its rows by code, over all columns."""

    unit: str
    whole: bool
    counts: Counter[str]
    flags: Counter[str]
    num_new: int = 0
    num_reused: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


class Replica:
    """A running engine. Use as a context; ``gpu`` is the one it may see."""

    def __init__(self, work: Work, *, gpu: int | None = None, quiet: bool = False, log: str = "engine") -> None:
        first = next(iter(work.folders.values()))
        self.work, self.quiet = work, quiet
        self.engine = EngineProcess(
            work.build, log=first / "log" / f"{log}.log", deadline_s=work.batch_deadline_s, gpu=gpu
        )
        self.out_of_budget = False
        self.num_deaths_told = 0
        self._done: list[Done] = []

    def __enter__(self) -> Replica:
        try:
            self.engine.launch()
            _load_libraries()  # while the engine comes up
            self.engine.wait_until_up()
        except BaseException:
            self.engine.close()
            raise
        about = self.engine.about
        self.recipe = self.work.recipe(about["special_tokens"])
        self.earlier = reuse.Earlier(self.work.earlier)
        self.say(
            f"{self.work.engine} {about['engine_version']} on {about['device']} up in {self.engine.startup_s:.1f} s"
        )
        return self

    def __exit__(self, *_: Any) -> None:
        self.engine.close()

    def say(self, text: str) -> None:
        if not self.quiet:
            print(f"recaption: {text}", file=sys.stderr, flush=True)

    def caption(self, units: Sequence[str], *, limit: int | None = None, progress: Any = None) -> Iterator[Done]:
        """Captions shards from where their journals end, each yielded once it is committed.

        What ``limit`` or the budget cuts stays in its journal, and its shard is yielded at the end.
        """
        shards: dict[str, _Shard] = {}
        last = time.monotonic()
        try:
            for (shard, item), answer in self.engine.stream(self._requests(units, shards, limit, progress)):
                now = time.monotonic()
                shard.take(item, answer, now - last)
                last = now
                yield from self._finished(shards)
            yield from self._finished(shards)
        finally:
            for shard in shards.values():
                shard.flush()
                shard.journal.close()
        for shard in shards.values():
            yield shard.done(whole=False)

    def _requests(
        self, units: Sequence[str], shards: dict[str, _Shard], limit: int | None, progress: Any
    ) -> Iterator[tuple[tuple[_Shard, Item], Request] | None]:
        """The requests of all shards, one after the other; a shard is opened when its turn comes.

        ``None`` says that some answers must come before there are more.
        """
        left = limit if limit is not None else sys.maxsize
        for unit in units:
            if left <= 0 or self._budget_is_spent():
                return
            while len(shards) >= MOST_OPEN_SHARDS:
                yield None
            shard = _Shard(self, unit, progress)
            if (counts := self.work.finished(unit)) is not None:  # by a worker that was lost, or by another process
                shard.journal.close(remove=True)
                self._done.append(Done(unit, True, counts, Counter()))
                continue
            shards[unit] = shard
            while batch := list(itertools.islice(shard.missing, min(left, self.work.batch_rows))):
                if self._budget_is_spent():
                    return
                left -= len(batch)
                for item in shard.to_ask(batch):
                    assert item.request is not None
                    yield (shard, item), item.request
            if left <= 0 and next(shard.missing, None) is not None:
                return
            shard.all_asked = True
            if shard.is_whole:  # nothing of it is in flight, so no answer will come after which it is committed
                shard.commit()
                self._done.append(shards.pop(unit).done(whole=True))

    def _budget_is_spent(self) -> bool:
        stop_at = self.work.stop_at
        self.out_of_budget = self.out_of_budget or (stop_at is not None and time.time() > stop_at)
        return self.out_of_budget

    def _finished(self, shards: dict[str, _Shard]) -> Iterator[Done]:
        while self._done:
            yield self._done.pop(0)
        for unit in [unit for unit, shard in shards.items() if shard.is_whole]:
            shards[unit].commit()
            yield shards.pop(unit).done(whole=True)


def _load_libraries() -> None:
    import polars  # noqa: F401
    import pyarrow.parquet  # noqa: F401


class _Shard:
    """One shard in the making: its journal, the rows that wait for an answer, and those that still lack a request."""

    def __init__(self, replica: Replica, unit: str, progress: Any) -> None:
        work = replica.work
        self.replica, self.work, self.recipe, self.unit, self.progress = replica, work, replica.recipe, unit, progress
        self.inputs = work.inputs_of[unit]
        header = {"inputs": dict(self.inputs), "config": dict(work.digested)}
        path, wait_s = work.journal(unit), work.lock_wait_s
        self.journal = Journal(path, header, overwrite=work.overwrite, lock_wait_s=wait_s)
        given = work.given(unit)
        self.table = given.table(unit)
        self.lines = {(line["key"], line["sample"]): line for line in self.journal.rows}
        samples = work.prompt.sampling.num_samples
        self.num_wanted = len(self.table) * samples
        done = {key for key, sample in self.lines if all((key, other) in self.lines for other in range(samples))}
        todo = self.table.filter([key not in done for key in self.table["key"]])
        self.missing = rows.read_rows(given, unit, work.prompt, todo, work.left_out.get(unit, ()))
        self.known = reuse.answered([*self.journal.rows, *self.journal.dropped])
        self.waiting: dict[str, list[Item]] = {}
        self.unsaved: list[dict[str, Any]] = []
        self.rows: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
        self.saved_at = time.monotonic()
        self.all_asked = False
        self.num_new = self.num_reused = self.num_new_tokens = 0
        self.seconds = 0.0
        self._tell(len(done))

    def to_ask(self, batch: list[rows.Row]) -> Iterator[Item]:
        """The items of ``batch`` that an engine must answer; what is known or needs none is taken at once."""
        samples = range(self.work.prompt.sampling.num_samples)
        items = [item for row in batch if not self._has(row.key, samples) for item in self.recipe.items(row)]
        items = [item for item in items if (item.key, item.sample) not in self.lines]
        unknown = {item.digest for item in items if item.request is not None and item.digest not in self.known}
        self.known.update(self.replica.earlier.answers(unknown))
        for item in items:
            if item.answer is not None:
                self._note(item, item.answer, "", 0.0)
            elif item.digest in self.known:
                answer, engine = self.known[item.digest]
                self.num_reused += 1
                self._note(item, answer, engine, 0.0)
            elif item.digest in self.waiting:  # the same image with the same texts: asked once
                self.waiting[item.digest].append(item)
            else:
                self.waiting[item.digest] = [item]
                yield item

    def _has(self, key: str, samples: range) -> bool:
        return all((key, sample) in self.lines for sample in samples)

    def take(self, asked: Item, answer: Answer, seconds: float) -> None:
        self.num_new_tokens += answer.num_tokens
        for number, item in enumerate(self.waiting.pop(asked.digest)):
            self.num_new += 1
            self._note(item, answer, self.work.engine, 0.0 if number else seconds)
        if answer.code == "ok":
            self.known[asked.digest] = (answer, self.work.engine)

    def _note(self, item: Item, answer: Answer, engine: str, seconds: float) -> None:
        line = {**self.recipe.line(item, answer, engine), "seconds": round(seconds, 6)}
        self.lines[item.key, item.sample] = line
        self.unsaved.append(line)
        self._tell(1)
        if len(self.unsaved) >= self.work.batch_rows or time.monotonic() - self.saved_at > FLUSH_S:
            self.flush()

    def _tell(self, number: int) -> None:
        if self.progress is not None:
            self.progress.update(number)

    def flush(self) -> None:
        if self.unsaved:
            self.journal.append(self.unsaved)
            self.unsaved = []
        self.saved_at = time.monotonic()

    @property
    def is_whole(self) -> bool:
        return self.all_asked and len(self.lines) == self.num_wanted

    # --- the end ------------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Writes the shard's figures, commits it in all its columns, and removes the journal last."""
        self.flush()
        num_deaths = self.replica.engine.num_deaths
        for column, table in self._columns().items():
            folder = self.work.folder(column)
            folder.mkdir(parents=True, exist_ok=True)
            ledger.write_json(folder / f"{self.unit}{STATS}", self._stats(table))
            caption_table.commit(
                folder, self.unit, table, metadata=self._metadata(), inputs=self.inputs, config=self.work.digested
            )
        self.replica.num_deaths_told = num_deaths
        self.journal.close(remove=True)

    def _columns(self) -> dict[str, list[dict[str, Any]]]:
        """Each column's rows in the order of the pairs."""
        found: dict[str, list[dict[str, Any]]] = {}
        for key in self.table["key"]:
            for sample in range(self.work.prompt.sampling.num_samples):
                if (line := self.lines.get((key, sample))) is not None:
                    if (key, sample) not in self.rows:  # cleaning is the dearest that is done to a row here
                        self.rows[key, sample] = self.recipe.column_rows(line)
                    for column, row in self.rows[key, sample].items():
                        found.setdefault(column, []).append(row)
        return found or {column: [] for column in self.recipe.columns}

    def _metadata(self) -> dict[str, str]:
        return schema.caption_metadata(
            model=self.work.model,
            model_revision=self.replica.engine.about.get("model_commit") or self.work.model_digest,
            engine=self.work.engine,
            engine_version=self.replica.engine.about["engine_version"],
            prompt=self.work.prompt.name,
            prompt_digest=self.work.prompt.digest,
            sampling=self.work.prompt.sampling.model_dump(mode="json"),
            seed=self.work.seed,
        )

    def _stats(self, table: list[dict[str, Any]]) -> dict[str, Any]:
        """What the shard cost, all sessions that worked on it together; the figures are those of the whole recipe."""
        about, lines = self.replica.engine.about, self.lines.values()
        asked = [line for line in lines if line["seconds"]]
        seconds = sum(line["seconds"] for line in asked)
        tokens = sum(line["num_tokens"] for line in asked)
        num_gpus = about.get("num_gpus", 0)
        return {
            "schema_version": schema.SCHEMA_VERSION,
            "rows": len(table),
            "codes": dict(Counter(row["code"] for row in table)),
            "flags": dict(Counter(flag for row in table for flag in row["flags"])),
            "tokens": tokens,
            "prompt_tokens": sum(line["num_prompt_tokens"] for line in asked),
            "seconds": round(seconds, 3),
            "captions_per_s": round(len(asked) / seconds, 2) if seconds else None,
            "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
            "gpu_hours": round(seconds * num_gpus / 3600, 6),
            "num_gpus": num_gpus,
            "device": about["device"],
            "engine": self.work.engine,
            "engine_version": about["engine_version"],
            "engine_deaths": self.replica.engine.num_deaths - self.replica.num_deaths_told,
            "startup_s": round(self.replica.engine.startup_s, 1),
            "reused": self.num_reused,
        }

    def done(self, *, whole: bool) -> Done:
        tables = self._columns().values()
        found = Done(
            self.unit,
            whole,
            Counter(row["code"] for table in tables for row in table),
            Counter(flag for table in tables for row in table for flag in row["flags"]),
        )
        found.num_new, found.num_reused = self.num_new, self.num_reused
        found.num_tokens = self.num_new_tokens
        found.seconds = sum(line["seconds"] for line in self.lines.values())
        return found
