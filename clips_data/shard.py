"""``clips shard``: pairs, caption columns and scores become shuffled webdataset shards with offset indexes.

First a plan is drawn: which sample goes to which place of which split. Then every tar is written on its own, from the
plan's rows and the images' offsets, so memory holds the texts of one tar and one image. Shards of pairs that appear
later become a further generation of tars, shuffled among themselves; finished tars never change.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from clips_data import dataset_facts, exclude, executor, joined, ledger, locks, schema
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job, Report
from clips_data.mixing import Mix, described
from clips_data.shard_write import RESERVED
from clips_data.sharding import DROPPED, Sharding


def run(config: ShardConfig, job: Job) -> Report:
    """Writes the tars that are not finished yet, and ``index.json`` once all of a generation are there.

    Raises ``UserError`` when a column is missing, unfinished or about other images, or a filter leaves nothing, and
    ``ResumeRefused`` when finished tars were made from other inputs or choices.
    """
    started = time.monotonic()
    _check_columns(config)
    report = Report("shard")
    config = _without_absent_scores(config, job.work, report)
    units = tuple(sorted({path.stem for path in job.only})) if job.only is not None else None
    given = joined.open_inputs(job.work, config.columns, scores=config.scores, units=units, without_duplicates=True)
    if given.left_out:
        report.facts["left_out_as_duplicates"] = sum(len(keys) for keys in given.left_out.values())
    _check_mix(config, given)
    _tell_unknown(config, given, report)
    out = job.out or job.work / schema.SHARDS
    with ledger.readable_disk_errors(out), contextlib.ExitStack() as held:
        if not job.dry_run:  # a second process on the same slice would plan, and on another slicing write, the same
            held.enter_context(locks.alone(out, "sharding", job.slice))
            held.enter_context(locks.shared(out, "slicing", f"slices of {executor.parse_slice(job.slice)[1]}"))
        Sharding(config, given, out, job, report).run()
    if outcomes := {name: number for name, number in report.counts.items() if name != DROPPED}:
        report.facts["mix"] = described(outcomes)
    if job.limit is not None and not report.units and report.facts.get("shards_missing"):
        report.notes.append(f"--limit {job.limit} is less than a whole tar of --shard-rows {config.shard_rows}")
    report.seconds = time.monotonic() - started
    return report


def _check_columns(config: ShardConfig) -> None:
    if not config.columns or config.columns[0] != joined.WEB:
        raise UserError(
            f"The first of --columns is the web caption and has to be {joined.WEB!r}; it is "
            f"{(config.columns or ('nothing',))[0]!r}. For example: --columns web,synthetic."
        )
    if len(set(config.columns)) != len(config.columns):
        raise UserError(f"--columns {','.join(config.columns)} names a column twice. Name each once.")
    if taken := sorted(RESERVED.intersection(config.columns)):
        raise UserError(
            f"A sample's JSON has something else under {taken[0]!r}, so a column of shards cannot have that name. "
            f"Rename the folder captions/{taken[0]}."
        )


def _without_absent_scores(config: ShardConfig, work: Path, report: Report) -> ShardConfig:
    """Scores that nobody asked for may be absent, and the report says so; scores that were named must be there."""
    if "scores" in config.model_fields_set:
        return config
    absent = [name for name in config.scores if not (work / schema.SCORES / name).is_dir()]
    if not absent:
        return config
    report.facts["scores"] = f"none carried: {work / schema.SCORES / absent[0]} does not exist"
    return config.model_copy(update={"scores": tuple(name for name in config.scores if name not in absent)})


def _tell_unknown(config: ShardConfig, given: joined.Inputs, report: Report) -> None:
    """Samples on the list that are not there: of another download, or mistyped."""
    if config.exclude is None:
        return
    unknown, listed = exclude.num_unknown(Path(config.exclude), given.pairs, given.units)
    report.facts["exclude"] = f"{listed} samples listed, {unknown} of them unknown"
    if unknown:
        report.notes.append(
            f"{unknown} of {listed} samples in {config.exclude} are in none of the {len(given.units)} shards of "
            f"{given.pairs}"
        )


def _check_mix(config: ShardConfig, given: joined.Inputs) -> None:
    """Before anything is written: rules that make no sense, and conditions on scores that are not carried."""
    mix = Mix.of(config.web_ratio, config.columns, config.mix, config.replace_below)
    mix.check_scores(dataset_facts.score_fields(given))
