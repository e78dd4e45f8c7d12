"""``clips run | plan | status``: all stages of a manifest, what they would do, and where they stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import arms, present
from .options import LazyCommand, common_options
from .stages import stage_named

if TYPE_CHECKING:
    from clips_data.executor import Job, Report
    from clips_data.recaption.forecast import Forecast
    from clips_data.sample import Sample

    from .arms import Run
    from .manifest import Manifest
    from .stamps import Standing

COMMON: Final = {
    "run": ("work", "processes", "overwrite", "dry-run", "json", "debug", "quiet"),
    "plan": ("work", "json", "debug"),
    "status": ("work", "json", "debug"),
}
EXAMPLES: Final = {
    "run": "clips run quickstart --work quickstart",
    "plan": "clips plan quickstart --set train.samples=1000",
    "status": "clips status quickstart",
}
ABOUT: Final = {
    "run": "Running it again goes on where it stopped. Outputs are under the manifest's `work`, or under --work. Where "
    "it has `arms`, every arm and seed becomes a run, whose figures go into its results file and the table at the end.",
    "plan": "Nothing is written. Some URLs are tried where a download is to run, some rows captioned where pairs "
    "wait for captions. A stage after a changed one is done again only where its inputs differ.",
    "status": "Counts, sizes and times of what is finished so far.",
}


def build(name: str, summary: str) -> click.Command:
    return LazyCommand(
        name,
        callback=CALLS[name],
        parameters=lambda: [
            click.Argument(["manifest"], metavar="MANIFEST"),
            click.Option(
                ["--set", "settings"],
                multiple=True,
                metavar="STAGE.KEY=VALUE",
                help="Override one value of the manifest; may be repeated.",
            ),
            click.Option(
                ["--data"],
                metavar="URLS",
                help="Your list of image URLs: the same as --set download.source=URLS.",
            ),
            click.Option(
                ["--scale"],
                metavar="NAME",
                help="Put the values of a packaged scale over the manifest's: demo runs any recipe on the built-in "
                "demo world, in minutes, without a GPU.",
            ),
            *arms.options(),
            *(_plan_options() if name == "plan" else []),
            *common_options(COMMON[name]),
        ],
        example=EXAMPLES[name],
        help=f"{summary}\n\nMANIFEST is a path or the name of a packaged one. {ABOUT[name]}",
    )


def _plan_options() -> list[click.Parameter]:
    return [
        click.Option(
            ["--sample"],
            type=click.IntRange(min=0),
            default=64,
            metavar="ROWS",
            help="Rows to try first: URLs where a download is to run, captions where pairs wait for a captioner; "
            "0 tries none.  [default: 64]",
        ),
        click.Option(
            ["--gpus"],
            type=click.IntRange(min=1),
            default=1,
            metavar="N",
            help="Captioning engines to project the time for, each on a GPU of its own.  [default: 1]",
        ),
        click.Option(
            ["--price"],
            type=click.FloatRange(min=0),
            metavar="NUMBER",
            help="Price of one GPU for one hour, to project the cost; in any currency, shown as $.",
        ),
    ]


def run(
    manifest: str,
    settings: Sequence[str],
    data: str | None,
    scale: str | None,
    only_arms: str | None,
    only_seeds: str | None,
    as_json: bool,
    debug: bool,
    **given: Any,
) -> None:
    """Does the stages in order. Every stage decides by its own ledger what is missing."""
    from clips_data.executor import stop_on_sigterm

    from .manifest import load_manifest
    from .options import job_from

    resolved = load_manifest(manifest, _with_data(settings, data), given["work"], scale)
    runs = arms.chosen(resolved, arms.runs_of(resolved), only_arms, only_seeds)
    job = job_from({**given, "work": resolved.work})
    if job.dry_run:
        show_plan(resolved, runs, as_json=as_json)
        return
    stop_on_sigterm()
    if runs:
        arms.do_runs(resolved, runs, job, as_json=as_json)
        return
    save_resolved(resolved)
    done = [do_stage(resolved, stage, job) for stage in resolved.stages]
    if as_json:
        present.print_json({"name": resolved.name, "work": str(resolved.work), "stages": done})
    else:
        print(present.table(done, ("stage", "what", "rows", "seconds", "folder")))


def _with_data(settings: Sequence[str], data: str | None) -> list[str]:
    return [*([] if data is None else [f"download.source={data}"]), *settings]


def do_stage(manifest: Manifest, stage: str, job: Job) -> dict[str, Any]:
    """Does one stage unless its stamp holds, and returns its row of the final table."""
    from . import stamps

    before = stamps.standing(manifest, job.work, stage)
    if before.state == "finished":
        present.say(f"{stage}: finished before, {_rows_text(before)}skipped", quiet=job.quiet)
        return _row(before, "skipped", 0.0)
    present.say(f"{stage}: {before.state} ({before.why}), writing to {before.folder}", quiet=job.quiet)
    about = stage_named(stage)
    report = about.call(about, manifest.stages[stage], job, manifest.run_of(stage))
    present.say("\n".join(present.report_lines(report)), quiet=job.quiet)
    stamps.stamp(manifest, job.work, stage, report)
    after = stamps.standing(manifest, job.work, stage)
    assert after.state == "finished", f"{stage} has just finished, but it is {after.state}: {after.why}"
    return _row(after, _what(report), report.seconds)


def save_resolved(manifest: Manifest) -> Path:
    """Saves the manifest with all its defaults beside the run's outputs."""
    import yaml

    from clips_data.ledger import write_bytes

    train = "train" if "train" in manifest.stages else next(iter(manifest.stages))
    path = manifest.work / "runs" / manifest.run_of(train) / "manifest.yaml"
    write_bytes(path, yaml.safe_dump(manifest.resolved(), sort_keys=False, allow_unicode=True).encode())
    return path


def plan(
    manifest: str,
    settings: Sequence[str],
    data: str | None,
    scale: str | None,
    only_arms: str | None,
    only_seeds: str | None,
    sample: int,
    gpus: int,
    price: float | None,
    as_json: bool,
    debug: bool,
    work: Path | None,
) -> None:
    from .manifest import load_manifest

    resolved = load_manifest(manifest, _with_data(settings, data), work, scale)
    runs = arms.chosen(resolved, arms.runs_of(resolved), only_arms, only_seeds)
    show_plan(resolved, runs, as_json=as_json, sample=sample, gpus=gpus, price=price)


def show_plan(
    manifest: Manifest,
    runs: Sequence[Run],
    *,
    as_json: bool,
    sample: int = 0,
    gpus: int = 1,
    price: float | None = None,
) -> None:
    """Prints what would run and why. What comes after a stage that is to run waits for it.

    Of an experiment these are the stages that all its runs share, and then the ``runs``.

    Where a download is to run, ``sample`` of its URLs are tried first; where captions are to be made of pairs that are
    there, ``sample`` rows are captioned.
    """
    from . import stamps

    rows, waits_for = [], ""
    of_runs = arms.standings(manifest, runs)
    needed = not of_runs or any(row["what"] != arms.FINISHED for row in of_runs)
    for stage in manifest.stages if needed else ():
        now = stamps.standing(manifest, manifest.work, stage)
        would_run = now.state != "finished"
        why = f"{now.state}: {now.why}" if would_run else now.why
        if not would_run and waits_for:
            why = f"finished, as long as {waits_for} leaves its inputs as they are"
        row = _row(now, "run" if would_run else "skip", now.seconds)
        rows.append({**row, "rows in": now.rows_in, "why": why, "bytes": present.bytes_text(now.num_bytes)})
        if would_run and not waits_for:
            waits_for = stage
    tried = forecast = None
    to_run = {stage_named(row["stage"]).name: row["stage"] for row in reversed(rows) if row["what"] == "run"}
    if sample and "download" in to_run:
        tried = _try_sample(manifest.stages[to_run["download"]], sample)
    if sample and "recaption" in to_run:
        forecast = _caption_sample(manifest, to_run["recaption"], sample)
    if as_json:
        found: dict[str, Any] = {"name": manifest.name, "work": str(manifest.work), "stages": rows}
        found["sample"] = {**asdict(tried), "estimated_s": tried.estimated_s} if tried else None
        found["recaption"] = forecast.as_dict(gpus, price) if forecast else None
        present.print_json({**found, "arms": of_runs} if of_runs else found)
    else:
        if rows:
            print(present.table(rows, ("stage", "what", "rows in", "rows", "bytes", "folder", "why")))
        arms.show_standings(of_runs)
        for line in [*(tried.lines() if tried else []), *(forecast.lines(gpus, price) if forecast else [])]:
            print(line)


def _caption_sample(manifest: Manifest, stage: str, num_rows: int) -> Forecast | None:
    """A trial of the captioner on the pairs that are there; ``None`` while the prompt's inputs are not."""
    from clips_data.errors import UserError
    from clips_data.executor import Job
    from clips_data.recaption import prompts
    from clips_data.recaption.forecast import measure
    from clips_data.recaption.rows import open_inputs

    config: Any = manifest.stages[stage]
    try:
        open_inputs(manifest.work, prompts.load(config.prompt), config.scores)
    except UserError as error:
        present.say(f"{stage}: no caption is tried yet. {error}")
        return None
    present.say(f"{stage}: captioning {num_rows} rows (--sample 0 leaves this out)")
    return measure(config, Job(work=manifest.work), num_rows)


def _try_sample(config: Any, num_rows: int) -> Sample | None:
    from clips_data.sample import measure

    if config.source == "-":
        present.say("The list comes from stdin and can be read once only, so no URL is tried.")
        return None
    present.say(f"download: trying {num_rows} URLs (--sample 0 leaves this out)")
    return measure(config, num_rows)


def status(
    manifest: str,
    settings: Sequence[str],
    data: str | None,
    scale: str | None,
    only_arms: str | None,
    only_seeds: str | None,
    as_json: bool,
    debug: bool,
    work: Path | None,
) -> None:
    """Prints where every stage stands."""
    from . import stamps
    from .manifest import load_manifest

    resolved = load_manifest(manifest, _with_data(settings, data), work, scale)
    of_runs = arms.standings(resolved, arms.chosen(resolved, arms.runs_of(resolved), only_arms, only_seeds))
    rows = []
    for stage in resolved.stages:
        now = stamps.standing(resolved, resolved.work, stage)
        row = _row(now, now.state, now.seconds)
        rows.append({**row, "units": now.num_units or None, "bytes": present.bytes_text(now.num_bytes)})
    if as_json:
        found = {"name": resolved.name, "work": str(resolved.work), "stages": rows}
        present.print_json({**found, "arms": of_runs} if of_runs else found)
    else:
        print(present.table(rows, ("stage", "what", "units", "rows", "bytes", "seconds", "folder")))
        arms.show_standings(of_runs)


def _row(standing: Standing, what: str, seconds: float | None) -> dict[str, Any]:
    return {
        "stage": standing.stage,
        "what": what,
        "counts": dict(standing.counts),
        "rows": _rows_text(standing).removesuffix(", ") or None,
        "seconds": seconds,
        "folder": str(standing.folder),
    }


def _rows_text(standing: Standing) -> str:
    """``"2384 of 2500 ok, "``, or nothing for a stage that counts no rows."""
    total = sum(standing.counts.values())
    good = next((name for name in present.GOOD if name in standing.counts), None)
    if not total:
        return ""
    return f"{standing.counts[good]} of {total} {good}, " if good else f"{total}, "


def _what(report: Report) -> str:
    return "skipped" if report.skipped and not report.made else "made"


CALLS: Final[dict[str, Callable[..., None]]] = {"run": run, "plan": plan, "status": status}
