"""Makes the generations of a folder of training shards: what is finished stays, what is missing is made."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from clips_data import dataset_facts, executor, filters, joined, ledger, locks, shard_index
from clips_data.config import ShardConfig
from clips_data.dataset_card import RARE
from clips_data.errors import ResumeRefused
from clips_data.executor import Job, Report
from clips_data.shard_index import Generation
from clips_data.shard_plan import EXAMPLES_KEPT, HELDOUT, SPLITS, Plan, Tar, draw_plan
from clips_data.shard_write import Writing, config_of, write_tar
from clips_data.shuffle import Sorted

DROPPED: Final = "dropped_without_caption"
PRELOAD: Final = ("polars", "pyarrow.parquet", "clips_data.sharding")


@dataclass
class Sharding:
    """One run over one folder of shards, ``out``. What it does and finds is told in ``report``."""

    config: ShardConfig
    given: joined.Inputs
    out: Path
    job: Job
    report: Report
    replaces: bool = False
    """Whether what the index names is made anew. It goes once the plan is drawn, so not for a mistaken filter."""

    @property
    def scratch(self) -> Path:
        """A dry run has its own, since the run that it asks about may be at work."""
        name = f"dry-run-{os.getpid()}" if self.job.dry_run else locks.slice_name(self.job.slice)
        return self.out / "_plan" / name

    def run(self) -> None:
        named, done = self._generations()
        made: list[Generation] = []
        first_tar = dict.fromkeys(SPLITS, 0)
        for number, units in enumerate(named):
            generation: Generation | None = None
            if number < len(done) and self._is_whole(units, done[number]):
                generation = done[number]
                if self.config.explain:
                    with self._planned(self._given(units), number, made, first_tar) as plan:
                        self._tell(plan)
            finished = generation or self._make(named, number, made, done[number + 1 :], first_tar)
            if finished is None:  # a dry run, a slice or a limit: it stays unfinished
                return
            self._note(finished)
            made.append(finished)
            if generation is None or len(shard_index.finished(self.out)) < len(made):
                self._write_index(named, made)
            for tar in finished.tars:
                first_tar[tar.partition("-")[0]] += 1

    def _generations(self) -> tuple[list[list[str]], list[Generation]]:
        """The shards of pairs of each generation, and the generations that are finished, perhaps in another way.

        With --overwrite, what was made otherwise or in several generations is made anew in one.
        """
        if not self.job.overwrite:
            return shard_index.grown(self.out, self.given.units), shard_index.finished(self.out)
        named, done = shard_index.generations(self.out), shard_index.finished(self.out)
        if [*map(set, named)] == [set(self.given.units)] and self._is_finished(named, done):
            return named, done
        self.replaces = True
        return [list(self.given.units)], []

    # --- what is there ------------------------------------------------------------------------------------------------

    def _writing(self, given: joined.Inputs) -> Writing:
        inputs = given.digests() | filters.inputs(self.config, given)
        return Writing(self.config, given.pairs, self.out, inputs)

    def _given(self, units: list[str]) -> joined.Inputs:
        left_out = {unit: keys for unit, keys in self.given.left_out.items() if unit in set(units)}
        return replace(self.given, units=tuple(units), left_out=left_out)

    def _is_whole(self, units: list[str], generation: Generation) -> bool:
        """Whether all tars are there, made from the same inputs and config. Raises ``ResumeRefused`` if from others."""
        writing = self._writing(self._given(units))
        return all([ledger.is_done(**_unit(writing, tar), overwrite=False) for tar in generation.tars])

    def _is_finished(self, named: list[list[str]], done: list[Generation]) -> bool:
        try:
            return len(named) == len(done) and all(
                self._is_whole(units, generation) for units, generation in zip(named, done, strict=True)
            )
        except ResumeRefused:
            return False

    def _note(self, generation: Generation) -> None:
        """Adds a finished generation to the report."""
        for tar in generation.tars:
            sidecar = ledger.read_sidecar(self.out, tar)
            assert sidecar is not None
            self.report.add(dict(sidecar.counts))
            self.report.units.append(self.out / f"{tar}.tar")
        made = self.report.made
        self.report.skipped = len(self.report.units) - made
        if generation.dropped:
            self.report.add({DROPPED: generation.dropped})

    # --- making -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _planned(
        self, given: joined.Inputs, number: int, made: list[Generation], first_tar: Mapping[str, int]
    ) -> Iterator[Plan]:
        """The plan of a generation; its rows are gone at the end."""
        _make_scratch(self.scratch)
        try:
            yield draw_plan(
                self.config,
                given,
                self.scratch,
                known_heldout=_heldout_images(self.out, made) if number and self.config.heldout_max else None,
                first_tar=first_tar,
                num_processes=_num_processes(self.job),
            )
        finally:
            _remove_scratch(self.scratch, self.out)

    def _make(
        self,
        named: list[list[str]],
        number: int,
        made: list[Generation],
        later: list[Generation],
        first_tar: Mapping[str, int],
    ) -> Generation | None:
        given = self._given(named[number])
        writing = self._writing(given)
        with self._planned(given, number, made, first_tar) as plan:
            if number:
                self._tell_grown(plan, number)
            self._tell(plan)
            strangers = self._strangers([*made, *later], plan)
            if self.replaces and not self.job.dry_run:
                shard_index.remove(self.out)
            todo = self._todo(writing, plan)
            if self.job.dry_run:
                self.report.facts["shards_to_do"] = len(todo)
                return None
            if not plan.tars and number == len(named) - 1:  # they can still become one with shards that come later
                return None
            for unit in strangers:
                ledger.remove_unit(self.out, unit)
            with locks.locked(self.out):
                shard_index.write_generations(self.out, named)
            self._write_tars(writing, plan, todo)
            missing = [tar.unit for tar in plan.tars if ledger.read_sidecar(self.out, tar.unit) is None]
            if missing:
                self.report.facts["shards_missing"] = len(missing)
                self._note(Generation([tar.unit for tar in plan.tars if tar.unit not in missing], 0, 0))
                return None
            removed, examples = list(plan.removed.items()), _keys(plan.examples)
            return Generation([tar.unit for tar in plan.tars], plan.num_rows, plan.dropped, removed, examples)

    def _write_index(self, named: list[list[str]], made: list[Generation]) -> None:
        about = dataset_facts.gather(self._given([unit for units in named[: len(made)] for unit in units]), self.config)
        with locks.locked(self.out):
            shard_index.write(self.out, self.config, made, about)

    def _tell_grown(self, plan: Plan, number: int) -> None:
        if grown := sum(tar.num_rows for tar in plan.tars):
            self.report.notes.append(
                f"{grown} samples of new shards are added as generation {number}, shuffled among themselves; "
                "--overwrite shuffles all"
            )
        else:
            self.report.notes.append(f"none of the {plan.num_rows} pairs of new shards becomes a sample")

    def _tell(self, plan: Plan) -> None:
        left = plan.num_rows
        for name, removed in plan.removed.items():
            if not removed and name.endswith(RARE):
                continue
            self.report.notes.append(f"{name}: removed {removed} of {left}")
            left -= removed
            for example in plan.examples.get(name, [])[: self.config.explain]:
                self.report.notes.append(f"  {_one_line(example)}")

    def _strangers(self, others: list[Generation], plan: Plan) -> list[str]:
        """Finished tars of another plan, which would stay beside the new ones. With --overwrite they go."""
        ours = {tar.unit for tar in plan.tars}.union(*(generation.tars for generation in others))
        strangers = [unit for unit in ledger.finished_units(self.out) if unit not in ours]
        if strangers and not self.job.overwrite:
            raise ResumeRefused(
                f"{self.out} has {len(strangers)} finished shards that these inputs do not make "
                f"({', '.join(strangers[:3])}). Use --overwrite to replace them, or --out with a new folder to keep "
                "both."
            )
        return strangers

    def _todo(self, writing: Writing, plan: Plan) -> list[Tar]:
        """The tars of this slice that are missing and that ``limit`` lets through whole."""
        mine = set(executor.slice_of([tar.unit for tar in plan.tars], self.job.slice))
        todo, rows = [], 0
        for tar in plan.tars:
            overwrite, dry_run = self.job.overwrite, self.job.dry_run
            done = ledger.is_done(**_unit(writing, tar.unit), overwrite=overwrite, dry_run=dry_run)
            if tar.unit in mine:
                rows += tar.num_rows
                if not done and (self.job.limit is None or rows <= self.job.limit):
                    todo.append(tar)
        return todo

    def _write_tars(self, writing: Writing, plan: Plan, todo: list[Tar]) -> None:
        from tqdm import tqdm

        work = functools.partial(_write_planned, order=plan.order, writing=writing)
        num_processes = min(_num_processes(self.job), len(todo))
        rows = sum(tar.num_rows for tar in todo)
        with tqdm(total=rows, unit="sample", desc="shard", disable=self.job.quiet or None) as progress:
            for num_rows in executor.map_units(work, todo, num_processes=num_processes, preload=PRELOAD):
                progress.update(num_rows)
                self.report.made += 1


def _num_processes(job: Job) -> int:
    return 0 if job.processes <= 1 else job.processes


def _unit(writing: Writing, tar: str) -> dict[str, Any]:
    return {"folder": writing.out, "unit": tar, "inputs": writing.inputs, "config": config_of(writing.config)}


def _write_planned(tar: Tar, order: Mapping[str, Sorted], writing: Writing) -> int:
    """Is sent to a worker with each tar, so it takes the order and not the whole plan, which names all tars."""
    write_tar(order[tar.split].rows(tar.first_row, tar.num_rows), tar.unit, writing)
    return tar.num_rows


def _make_scratch(scratch: Path) -> None:
    """Empty: rows that a killed run spooled there may be of other shards, or on the other side of the split."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)


def _remove_scratch(scratch: Path, out: Path) -> None:
    shutil.rmtree(scratch)
    for folder in (scratch.parent, out):
        with contextlib.suppress(OSError):  # other slices plan there or took it away, or tars are finished
            folder.rmdir()


def _heldout_images(out: Path, made: list[Generation]) -> frozenset[str]:
    """Hashes of the images that earlier generations hold out."""
    import polars as pl

    files = [out / f"{tar}.index.parquet" for generation in made for tar in generation.tars if tar.startswith(HELDOUT)]
    if not files:
        return frozenset()
    return frozenset(pl.scan_parquet(files, glob=False).select("sha256").collect()["sha256"])


def _keys(examples: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, list[str]]]:
    return [(name, [row["key"] for row in rows[:EXAMPLES_KEPT]]) for name, rows in sorted(examples.items())]


def _one_line(example: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in example.items() if value not in (None, ""))
