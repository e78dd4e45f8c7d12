"""The runs of an experiment: every arm of a manifest with every seed, done once, their figures kept in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import present
from .results import Results, row_of, table
from .stages import stage_named

if TYPE_CHECKING:
    from clips_data.executor import Job

    from .manifest import Arm, Manifest

CORE: Final = "core"
"""The word by which the marked arms are asked for."""
ONLY_READ: Final = ("export", "report")
"""Stages whose settings change none of the figures."""


FINISHED: Final = "finished"


@dataclass(frozen=True)
class Run:
    """One arm with one seed. ``manifest`` is of this run alone, all stages included."""

    arm: Arm
    seed: int
    manifest: Manifest
    settings: Mapping[str, Any]
    """What its figures depend on: what its stages were told beyond the defaults, and digests of the files they name."""
    digest: str
    """Equal for runs that compute the same, whatever they are called."""

    @property
    def name(self) -> str:
        return self.manifest.run_of("train")

    @property
    def folder(self) -> Path:
        return self.manifest.work / "runs" / self.name

    @property
    def queries(self) -> Sequence[str]:
        config: Any = self.manifest.stages["eval"]
        return tuple(config.queries)

    @property
    def own_stages(self) -> list[str]:
        return [stage for stage in self.manifest.stages if stage_named(stage).of_run]


def options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--arms", "only_arms"],
            metavar="A,B,…",
            help=f"Only these arms of the manifest; {CORE} stands for those that it marks as such.",
        ),
        click.Option(["--seeds", "only_seeds"], metavar="N,M,…", help="Only these seeds of the manifest."),
    ]


def runs_of(manifest: Manifest) -> list[Run]:
    """All of them, seed by seed, so that the first comparison of all arms is there early."""
    from clips_data.ledger import digest_json

    from . import stamps

    digest_watched = cache(stamps.digest_watched)
    runs = []
    for seed in manifest.arms[0].runs if manifest.arms else ():
        for arm in manifest.arms:
            own = arm.runs[seed]
            settings: dict[str, Any] = {}
            for stage, config in own.stages.items():
                if stage not in ONLY_READ:
                    told = own.saved(stage, defaults=False)
                    settings[stage] = {key: value for key, value in told.items() if key != "name"}
                    files = stage_named(stage).watches(config)
                    settings |= {f"{stage}.{key}": digest_watched(path) for key, path in files.items()}
            runs.append(Run(arm, seed, own, settings, digest_json(settings)))
    return runs


def chosen(manifest: Manifest, runs: Sequence[Run], arms: str | None, seeds: str | None) -> list[Run]:
    """The runs that ``--arms`` and ``--seeds`` name; none where there are no arms.

    Raises ``UsageError`` for what the manifest does not have.
    """
    from clips_data.errors import UsageError, did_you_mean

    for option, value in (("--arms", arms), ("--seeds", seeds)):
        if value is not None and not manifest.arms:
            raise UsageError(f"{option} {value}: {manifest.source} has no `arms`.")
    if not manifest.arms:
        return []
    names, numbers = [arm.name for arm in manifest.arms], sorted({str(run.seed) for run in runs})
    core = [arm.name for arm in manifest.arms if arm.core]
    wanted = [name.strip() for name in (arms or ",".join(names)).split(",")]
    for name in wanted:
        if name == CORE and not core:
            raise UsageError(f"--arms {arms}: no arm in {manifest.source} is marked with `core: true`.")
        if name != CORE and name not in names:
            raise UsageError(f"--arms {arms}: the manifest has no arm {name!r}. {did_you_mean(name, [*names, CORE])}")
    wanted_seeds = [number.strip() for number in (seeds or ",".join(numbers)).split(",")]
    for number in wanted_seeds:
        if number not in numbers:
            raise UsageError(f"--seeds {seeds}: the manifest's seeds are {', '.join(numbers)}.")
    wanted += core if CORE in wanted else []
    return [run for run in runs if run.arm.name in wanted and str(run.seed) in wanted_seeds]


def do_runs(manifest: Manifest, runs: Sequence[Run], job: Job, *, as_json: bool) -> None:
    """Does those of ``runs`` that have no row in the results, after the stages that all share, and prints the table."""
    from .run import do_stage, save_resolved

    results = _results(manifest)
    missing = [run for run in runs if run.digest not in results.rows()]
    every = runs_of(manifest)
    shared: list[dict[str, Any]] = []
    if missing:
        results.check_writable()
        shared = [do_stage(manifest, stage, job) for stage in manifest.stages]
    for number, run in enumerate(missing, start=1):
        label = f"arm {run.arm.name}, seed {run.seed} ({number} of {len(missing)})"
        if run.digest in results.rows():
            present.say(f"{label}: another run of the same settings is finished, skipped", quiet=job.quiet)
            continue
        present.say(f"{label}: writing to {run.folder}", quiet=job.quiet)
        save_resolved(run.manifest)
        for stage in run.own_stages:
            do_stage(run.manifest, stage, job)
        results.add(run.digest, row_of(run))
        results.write_page(manifest.name, every)
    page = results.write_page(manifest.name, every)
    present.say(f"results are in {results.path}, the table in {page}", quiet=job.quiet)
    lines = table(every, results.rows())
    if as_json:
        found = {"name": manifest.name, "work": str(manifest.work), "stages": shared, "results": str(results.path)}
        present.print_json({**found, "arms": lines})
    else:
        print(present.table(lines, tuple(lines[0])))


def standings(manifest: Manifest, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """For ``plan`` and ``status``: a row for each run, which is finished once the results have its figures."""
    from . import stamps

    if not runs:
        return []
    results = _results(manifest)
    rows, found = results.rows(), []
    for run in runs:
        state, why = FINISHED, f"its figures are in {results.path}"
        if run.digest not in rows:
            now = [stamps.standing(run.manifest, run.manifest.work, stage) for stage in run.own_stages]
            first = next((one for one in now if one.state != FINISHED), None)
            state = first.state if first else "missing"
            why = f"{first.stage}: {first.why}" if first else f"its figures are not in {results.path}"
        found.append({"arm": run.arm.name, "seed": run.seed, "what": state, "why": why, "folder": str(run.folder)})
    return found


def show_standings(rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        print(present.table(rows, ("arm", "seed", "what", "folder", "why")))


def _results(manifest: Manifest) -> Results:
    assert manifest.results is not None
    return Results(manifest.results)
