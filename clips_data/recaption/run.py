"""``clips recaption``: a prompt makes its caption columns for the pairs, journalled per batch, committed per shard."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from clips_data import duplicates, executor, joined, ledger, schema
from clips_data.config import RecaptionConfig
from clips_data.errors import Interrupted, TooFewSucceeded, UsageError, UserError
from clips_data.executor import Job, Report
from clips_data.forgotten import refuse_unfinished
from clips_data.journal import remove_idle_journal
from clips_data.recaption import choose, prompts, reuse, rows
from clips_data.recaption.replica import Done, Replica, Work

IN_DIGEST: Final = ("column", "model_revision", "seed", "max_model_tokens", "gate_min")
"""What of the config a caption depends on, beside the contents of prompt and model and the engine."""
SHARDS_PER_TASK: Final = 8
LOCK_WAIT_S: Final = 60.0


def run(config: RecaptionConfig, job: Job) -> Report:
    """Captions the shards of ``pairs/`` that the prompt's columns lack.

    Raises ``TooFewSucceeded`` below ``min_success`` and ``Interrupted`` when the budget is spent, with the report.
    """
    started = time.monotonic()
    prompt = prompts.load(config.prompt)
    work, units = prepare(config, prompt, job)
    report = Report("recaption")
    if job.overwrite:  # what another config finished may hold answers to the same requests
        old = [path for folder in work.folders.values() for path in reuse.readable(folder, units)]
        work = replace(work, earlier=(*old, *work.earlier))
    missing, totals = _stand(work, units, job, report)
    out_of_budget = False
    if job.dry_run:
        report.facts["shards_to_do"] = len(missing)
    elif missing:
        out_of_budget = _caption(work, missing, job, report, totals)
    done = set.intersection(*(set(ledger.finished_units(folder)) for folder in work.folders.values()))
    report.units = [folder / f"{unit}.parquet" for folder in work.folders.values() for unit in units if unit in done]
    report.add(dict(totals))
    report.seconds = time.monotonic() - started
    if out_of_budget:
        raise Interrupted(
            f"The budget of {job.budget} is spent: {len(done)} of {len(units)} shards are finished, and what was "
            "begun is kept. Run the same command again to go on.",
            report,
        )
    _check_success(config, totals, report)
    return report


def prepare(config: RecaptionConfig, prompt: prompts.Prompt, job: Job) -> tuple[Work, list[str]]:
    """What replicas need to know, and the units that are asked for. Starts nothing."""
    made = prompt.column_names(config.column)
    if taken := sorted({config.column, *made} & {joined.WEB, *prompt.inputs}):
        raise UserError(f"Column {taken[0]!r} is an input; columns are never overwritten. Name another with --column.")
    pairs = job.work / schema.PAIRS
    if job.only and job.only[0].with_suffix(".tar").exists():  # and not the tables of another column
        pairs = job.only[0].parent
    refuse_unfinished(pairs)
    units = _units(pairs, job)
    base = job.out or job.work / schema.CAPTIONS / config.column
    scores = job.work / schema.SCORES / config.scores
    engine, build = choose.build(config, prompt)
    model_digest = choose.model_digest(config)
    left_out = {
        unit: frozenset(keys) for unit, keys in duplicates.left_out(pairs, ledger.finished_units(pairs)).items()
    }
    folders = rows.input_folders(prompt, job.work / schema.CAPTIONS, scores)
    work = Work(
        prompt=prompt,
        column=config.column,
        seed=config.seed,
        gate_min=config.gate_min,
        model=config.model,
        model_digest=model_digest,
        engine=engine,
        build=build,
        batch_rows=config.batch_rows,
        batch_deadline_s=config.batch_deadline_s,
        pairs=pairs,
        base=base,
        captions=job.work / schema.CAPTIONS,
        scores=scores,
        inputs_of={unit: _inputs(unit, pairs, folders, prompt) for unit in units},
        left_out=left_out,
        digested={
            **config.model_dump(mode="json", include=set(IN_DIGEST)),
            "engine": engine,
            "prompt_digest": prompt.digest,
            "model_digest": model_digest,
        },
        earlier=tuple(reuse.tables_of(config.reuse)),
        overwrite=job.overwrite,
    )
    return work, units


def _units(pairs: Path, job: Job) -> list[str]:
    units = list(dict.fromkeys(path.stem for path in job.only)) if job.only else ledger.finished_units(pairs)
    if not units:
        raise UserError(f"{pairs} holds no finished shards. Run clips download first, or point --work at its folder.")
    return executor.slice_of(units, job.slice)


def _inputs(
    unit: str,
    pairs: Path,
    folders: Mapping[str, Path],
    prompt: prompts.Prompt,
) -> dict[str, str]:
    """Digests of what a unit's captions are made from. Raises ``UserError`` where an input is missing."""
    digests = {}
    for name, folder in {schema.PAIRS: pairs, **folders}.items():
        sidecar = ledger.read_sidecar(folder, unit)
        if sidecar is None:
            command = "score" if name.startswith(schema.SCORES) else "recaption"
            raise UserError(
                f"Shard {unit} of {folder} is not finished, and prompt {prompt.name!r} needs it. Make it with "
                f"`clips {command if name != schema.PAIRS else 'download'}` first."
            )
        digests[name] = sidecar.digest
    return digests


def _stand(work: Work, units: list[str], job: Job, report: Report) -> tuple[list[str], Counter[str]]:
    """The units that some column lacks, and the rows of the others by code."""
    missing: set[str] = set()
    inputs_of = {unit: work.inputs_of[unit] for unit in units}
    for folder in work.folders.values():
        if not job.dry_run:
            _forget_unmarked(work, folder, units)
        standing = ledger.stand(folder, inputs_of, work.digested, overwrite=job.overwrite, dry_run=job.dry_run)
        missing |= set(standing.missing)
    totals: Counter[str] = Counter()
    for unit in units:
        if unit in missing:
            continue
        report.skipped += 1
        for folder in work.folders.values():
            sidecar = ledger.read_sidecar(folder, unit)
            assert sidecar is not None
            totals.update(sidecar.counts)
        if not job.dry_run:
            remove_idle_journal(work.journal(unit))  # its shard was committed just before a kill
    return [unit for unit in units if unit in missing], totals


def _forget_unmarked(work: Work, folder: Path, units: list[str]) -> None:
    """Units with rows that were passed over as duplicates and are none any more are missing work again."""
    for unit in units:
        sidecar = ledger.read_sidecar(folder, unit, check_files=False)
        if sidecar is not None and sidecar.counts.get("duplicate", 0) > len(work.left_out.get(unit, ())):
            ledger.forget_unit(folder, unit)


# --- captioning -------------------------------------------------------------------------------------------------------


def _caption(work: Work, units: list[str], job: Job, report: Report, totals: Counter[str]) -> bool:
    """Captions the units with as many replicas as the job asks for; whether the budget ended it."""
    from tqdm import tqdm

    num_replicas = _num_replicas(work, job, len(units))
    if job.budget is not None:
        work = replace(work, stop_at=time.time() + budget_s(job.budget) / num_replicas)
    generating = time.monotonic()
    found: list[Done] = []
    facts: dict[str, Any] = {}
    with tqdm(unit="caption", desc="recaption", disable=job.quiet or None, file=sys.stderr) as progress:
        here = num_replicas == 1 and job.executor == "local"
        for done in (
            _here(work, units, job, progress, facts) if here else _spread(work, units, job, num_replicas, facts)
        ):
            found.append(done)
            totals.update(done.counts)
            report.made += done.whole
            if not here:
                progress.update(sum(done.counts.values()))
    elapsed = facts.get("generating_s", time.monotonic() - generating - facts.get("startup_s", 0.0))
    _tell(found, facts, elapsed, num_replicas, report)
    return bool(facts.get("out_of_budget"))


def _num_replicas(work: Work, job: Job, num_units: int) -> int:
    """``--processes``, or one for each GPU where these are more; never more than there are shards."""
    if job.limit is not None:
        return 1
    gpus = executor.num_gpus(job.executor) if _wants_gpu(work) else 0
    return max(1, min(max(job.processes, gpus), num_units))


def _wants_gpu(work: Work) -> bool:
    return work.engine != "endpoint"


def _here(work: Work, units: list[str], job: Job, progress: Any, facts: dict[str, Any]) -> Iterator[Done]:
    with Replica(work, quiet=job.quiet) as replica:
        generating = time.monotonic()
        facts["startup_s"] = round(replica.engine.startup_s, 1)
        yield from replica.caption(units, limit=job.limit, progress=progress)
        facts.update(_facts_of(replica), generating_s=time.monotonic() - generating)


def _spread(work: Work, units: list[str], job: Job, num_replicas: int, facts: dict[str, Any]) -> Iterator[Done]:
    """Several replicas, each of which takes some shards at a time and keeps its engine between them."""
    num_per_task = max(1, min(SHARDS_PER_TASK, math.ceil(len(units) / (4 * num_replicas))))
    tasks = [tuple(units[start : start + num_per_task]) for start in range(0, len(units), num_per_task)]
    # On a cluster the process that a lost node leaves behind may hold its journal for a moment.
    make = _MakeReplica(replace(work, lock_wait_s=LOCK_WAIT_S if job.executor == "ray" else 0.0), job.quiet)
    for done, told in executor.map_on_workers(
        make, tasks, num_workers=num_replicas, on=job.executor, use_gpus=_wants_gpu(work)
    ):
        facts["startup_s"] = max(facts.get("startup_s", 0.0), told["startup_s"])
        facts["engine_deaths"] = facts.get("engine_deaths", 0) + told["engine_deaths"]
        facts["num_gpus"] = told["num_gpus"]
        facts["out_of_budget"] = facts.get("out_of_budget") or told["out_of_budget"]
        yield from done


class _MakeReplica:
    """Picklable: what makes a replica's handler of tasks in a worker, and is called with the worker's number."""

    def __init__(self, work: Work, quiet: bool) -> None:
        self.work, self.quiet = work, quiet

    def __call__(self, number: int, num_gpus: int) -> _Handler:
        gpu = number % num_gpus if num_gpus else None
        return _Handler(Replica(self.work, gpu=gpu, quiet=self.quiet, log=f"engine-{number}").__enter__())


class _Handler:
    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.num_deaths_told = 0

    def __call__(self, units: tuple[str, ...]) -> tuple[list[Done], dict[str, Any]]:
        done = list(self.replica.caption(units))
        told = _facts_of(self.replica)
        told["engine_deaths"], self.num_deaths_told = (
            told["engine_deaths"] - self.num_deaths_told,
            told["engine_deaths"],
        )
        return done, told

    def close(self) -> None:
        self.replica.engine.close()


def _facts_of(replica: Replica) -> dict[str, Any]:
    return {
        "startup_s": round(replica.engine.startup_s, 1),
        "engine_deaths": replica.engine.num_deaths,
        "num_gpus": replica.engine.about.get("num_gpus", 0),
        "out_of_budget": replica.out_of_budget,
    }


def _tell(found: list[Done], facts: dict[str, Any], elapsed: float, num_replicas: int, report: Report) -> None:
    """The run's figures and the rules that fired, with their denominators."""
    new, tokens = sum(done.num_new for done in found), sum(done.num_tokens for done in found)
    hours = num_replicas * (elapsed + facts.get("startup_s", 0.0)) / 3600
    report.facts.update(
        startup_s=facts.get("startup_s", 0.0),
        captions_per_s=round(new / elapsed, 1) if elapsed > 0 else 0.0,
        tokens_per_s=round(tokens / elapsed) if elapsed > 0 else 0,
        engine_deaths=facts.get("engine_deaths", 0),
    )
    report.facts["gpu_hours" if facts.get("num_gpus") else "replica_hours_without_gpu"] = round(hours, 4)
    if reused := sum(done.num_reused for done in found):
        report.facts["reused"] = reused
    flags: Counter[str] = sum((done.flags for done in found), Counter())
    captions = sum(sum(done.counts.values()) for done in found)
    report.notes += [f"{number} of {captions} flagged {flag}" for flag, number in flags.most_common()]


def budget_s(text: str) -> float:
    """``20gpuh`` → seconds of one replica on one GPU. Also ``90min`` and ``3h``; without a GPU a replica counts alike.

    Raises ``UsageError`` for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gpuh|h|gpumin|min|s)", text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--budget {text!r} is not understood. Write GPU-hours such as 20gpuh or 0.5gpuh, or 90min.")
    return float(match[1]) * {"gpuh": 3600.0, "h": 3600.0, "gpumin": 60.0, "min": 60.0, "s": 1.0}[match[2]]


def _check_success(config: RecaptionConfig, totals: Counter[str], report: Report) -> None:
    captioned = Counter({code: number for code, number in totals.items() if code != "duplicate"})
    wanted = sum(captioned.values())
    if wanted and captioned["ok"] < config.min_success * wanted:
        others = ", ".join(f"{code} {number}" for code, number in captioned.most_common() if code != "ok")
        raise TooFewSucceeded(
            f"{captioned['ok']} of {wanted} rows got a caption, less than --min-success {config.min_success:g}. "
            f"The others: {others}. Look at the code and raw columns of the parquet files, or lower --min-success to "
            "go on without the others.",
            report,
        )


def describe_metadata(parquet: Path) -> dict[str, Any]:
    """Who made the captions in ``parquet``: model, engine, prompt, sampling, seed."""
    import pyarrow.parquet as pq

    metadata = pq.read_schema(parquet).metadata or {}
    return {key.decode(): json.loads(value) for key, value in metadata.items() if not key.startswith(b"ARROW")}
