"""``clips download``: a URL list becomes ``pairs/``, with one status row for every URL that was tried.

img2dataset does the work, through its own seams: its Reader cuts the list, its Downloader drives each shard in a worker
process (``downloader.py``). Which rows become which shards is decided once and kept (``batches.py``).
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from clips_data import (
    addresses,
    batches,
    downloader,
    duplicates,
    executor,
    fetch,
    images,
    imported,
    ledger,
    locks,
    pair_stats,
    schema,
    sources,
)
from clips_data.config import DownloadConfig
from clips_data.downloader import ShardTask
from clips_data.errors import ResumeRefused, TooFewSucceeded, UsageError
from clips_data.executor import Job, Report
from clips_data.forgotten import forgotten, refuse_unfinished

PRELOAD: Final = (
    "clips_data.engine",
    "img2dataset.downloader",
    "img2dataset.reader",
    "cv2",
    "PIL.Image",
    "clips_data.downloader",
)
# Choices that decide how the work is done but not what a finished shard holds.
NOT_IN_DIGEST: Final = {
    "source", "num_pairs", "shard_rows", "max_list_bytes", "threads", "host_connections", "host_rate", "min_success",
    "dns_servers", "env_proxy", "timeout_s", "retries", "max_wait_s",
}  # fmt: skip


def run(config: DownloadConfig, job: Job) -> Report:
    """Downloads the shards of the list that are not finished yet, and of no other list.

    ``job.append`` adds a list's new URLs as further shards, ``job.retry`` tries rows with these codes again as further
    shards. Raises ``TooFewSucceeded`` below ``min_success`` and ``ResumeRefused`` for a folder of another list.
    """
    started = time.monotonic()
    pairs = job.out or job.work / schema.PAIRS
    report = Report("download")
    num_workers = _num_workers(config, job)
    addresses.networks(config.allow_network)  # what is no address is said before anything is begun
    addresses.servers(config.dns_servers)
    refuse_unfinished(pairs)
    with ledger.readable_disk_errors(pairs), _at_work(pairs, job) as scratch:
        url_list = sources.locate(config, scratch)
        list_rows = sum(batches.file_rows(url_list))
        batch, rows = batches.choose(
            pairs, url_list, config.shard_rows, retry=job.retry, append=job.append,
            overwrite=job.overwrite, dry_run=job.dry_run, part=_part(job),
        )  # fmt: skip
        if rows is not None:
            url_list = batches.take(url_list, rows, scratch / "chosen", batch.shard_rows)
        tasks, standing = _tasks(config, job, pairs, url_list, batch, scratch)
        report.skipped = len(standing.finished)
        report.add(dict(standing.counts))
        if job.dry_run:
            report.facts.update(shards_to_do=len(tasks), urls_to_do=sum(task.num_rows for task in tasks))
            return report
        for counts in _download(config, job, pairs, url_list, tasks, num_workers):
            report.add(dict(counts))
    whole = [task for task in tasks if task.num_rows == task.shard.num_rows]
    report.made = len(whole)
    report.notes += [*_how_much(job, batch, list_rows, len(tasks) - len(whole)), *url_list.notes]
    finished = set(ledger.finished_units(pairs))
    intakes = batches.of_same_list(pairs, batch)
    units = [unit for intake in intakes for unit in map(schema.shard_name, intake.shards) if unit in finished]
    report.units = [pairs / f"{unit}.tar" for unit in units]
    if units:
        with locks.locked(pairs, "look-back"):  # the jobs of an array end when they like
            _take_carried(url_list, pairs, job, report)
            _look_back(config, pairs, units, report)
    report.seconds = time.monotonic() - started
    totals = Counter(report.counts)
    if any(intake.kind == "retry" for intake in intakes):  # what counts is what has become of the list by now
        totals = batches.latest_codes(pairs, units)
        report.notes.append(f"after retries {totals['ok']} of {_attempted(totals)} URLs of this list have succeeded")
    _check_success(config, totals, report)
    return report


def _part(job: Job) -> str:
    index, of = executor.parse_slice(job.slice)
    return f"{index}-of-{of}"


@contextlib.contextmanager
def _at_work(pairs: Path, job: Job) -> Iterator[Path]:
    """A folder for the cut list, which may hold signed URLs. Every job of an array has its own.

    Jobs of another slicing are kept out: they would write the same shards. What these left, killed, is removed.
    """
    with contextlib.ExitStack() as stack:
        if job.dry_run:
            yield Path(stack.enter_context(tempfile.TemporaryDirectory())) / "list"
            return
        slices = f"slices of {executor.parse_slice(job.slice)[1]}"
        stack.enter_context(locks.shared(pairs, "slicing", slices))
        for left in pairs.glob("_list-*"):
            if not left.name.endswith(f"-of-{executor.parse_slice(job.slice)[1]}"):
                shutil.rmtree(left)
        yield stack.enter_context(locks.scratch(pairs, f"list-{_part(job)}"))


def _how_much(job: Job, batch: batches.Batch, list_rows: int, num_cut: int) -> Iterator[str]:
    """What of the list was left out, and why."""
    if not batch.num_shards:
        what = f"failed with {', '.join(job.retry)}" if job.retry else "was never tried here"
        yield f"nothing to do: no URL of this list {what}"
    elif batch.kind == "append" and batch.num_rows < list_rows:
        yield f"{list_rows - batch.num_rows} of {list_rows} rows of the list have a URL that was tried before"
    if num_cut:
        yield (
            f"{num_cut} shard was cut by --limit: it is not finished and its rows will be fetched again "
            "(--shard-rows of at most --limit makes shards that later stages can read)"
        )


def _take_carried(url_list: sources.UrlList, pairs: Path, job: Job, report: Report) -> None:
    """Caption columns of the captions that lists bring along, so that recaptioning can be skipped.

    Columns of earlier lists are completed, with empty captions for images that came with none.
    """
    carried = imported.carried_columns(job.work)
    for column, list_column in url_list.captions.items():
        carried.setdefault(column, (list_column, url_list.adapter or "unknown"))
    for column, (list_column, model) in carried.items():
        try:
            taken = imported.import_all_carried(
                job.work, {column: list_column}, pairs=pairs, model=model, overwrite=job.overwrite
            )
        except ResumeRefused as refused:  # the pairs are finished all the same
            report.notes.append(f"captions/{column} was not taken from the list: {str(refused).splitlines()[0]}")
            continue
        good, images = taken.counts.get("ok", 0), sum(taken.counts.values())
        report.notes.append(f"captions/{column}: {good} of {images} images have one in the list")


def _look_back(config: DownloadConfig, pairs: Path, units: list[str], report: Report) -> None:
    """Failures by code and host, duplicates, and the marks of duplicates where they are wanted."""
    report.notes += pair_stats.failure_lines(pairs, units)
    found = duplicates.count(pairs, units)
    if found["duplicate_urls"] or found["duplicate_images"]:
        hint = " (--dedup sha256 leaves them out of the shards)" if config.dedup == "none" else ""
        report.notes.append(
            f"{found['duplicate_urls']} of {found['urls']} URLs and {found['duplicate_images']} of {found['images']} "
            f"images repeat an earlier one{hint}"
        )
    if config.dedup in ("sha256", "phash") and report.counts.get("ok"):
        report.facts["images_marked_as_duplicates"] = duplicates.write(pairs, config.dedup)
    else:
        duplicates.refresh(pairs)
    if duplicates.marked_by(pairs) == "phash" and (number := duplicates.num_without(pairs, "phash")):
        report.notes.append(f"{number} images have no phash and are never marked: download lists with --dedup phash")


def _num_workers(config: DownloadConfig, job: Job) -> int:
    """Processes of the whole cluster, which share the budget of connections and requests to one host."""
    workers = max(1, job.processes) * executor.parse_slice(job.slice)[1]
    if config.host_connections < workers:
        raise UsageError(
            f"--host-connections {config.host_connections} cannot be shared by {workers} workers (processes × slices), "
            "which would each open at least one. Raise it to at least that number, or use fewer workers."
        )
    if not job.quiet:
        rate = f" and {config.host_rate:g} requests/s" if config.host_rate else ""
        shared = f", shared by {workers} workers" if workers > 1 else ""
        text = f"at most {config.host_connections} connections{rate} to one host{shared}"
        print(f"download: {text}", file=sys.stderr)
    return workers


def _tasks(
    config: DownloadConfig, job: Job, pairs: Path, url_list: sources.UrlList, batch: batches.Batch, scratch: Path
) -> tuple[list[ShardTask], ledger.Standing]:
    """The shards still to do, each with the rows that the limit leaves it and those that it must not ask for."""
    allowed, left = {}, job.limit if job.limit is not None else sys.maxsize
    sizes = batches.shard_rows_of(url_list, batch)
    for unit in executor.slice_of([schema.shard_name(number) for number in batch.shards], job.slice):
        if left > 0:
            allowed[int(unit)] = min(left, sizes[int(unit)])
        left -= sizes[int(unit)]
    cut = functools.partial(
        sources.cut, url_list, batch.shard_rows, first_shard=batch.first_shard, wanted=frozenset(allowed)
    )
    (cut_shards,) = executor.map_units(cut, [scratch], num_processes=1, preload=PRELOAD) if allowed else ([],)
    shards = {schema.shard_name(shard.number): shard for shard in cut_shards}
    inputs_of = {unit: {"list": shard.digest} for unit, shard in shards.items()}
    standing = ledger.stand(pairs, inputs_of, _digested(config), overwrite=job.overwrite, dry_run=job.dry_run)
    duplicates = batches.first_of_url(url_list, batch) if config.dedup == "url" and standing.missing else {}
    skipped: dict[int, dict[int, dict[str, str]]] = {}
    for key, first in duplicates.items():
        shard_number, row = divmod(int(key), 10**schema.KEY_DIGITS_IN_SHARD)
        skipped.setdefault(shard_number, {})[row] = {"code": "duplicate", "duplicate_of": first}
    missing = [shards[unit] for unit in standing.missing]
    return [ShardTask(shard, allowed[shard.number], skipped.get(shard.number, {})) for shard in missing], standing


def _digested(config: DownloadConfig) -> dict[str, Any]:
    about = config.model_dump(mode="json", exclude=NOT_IN_DIGEST)
    return about | {"dedup": "none"} if config.dedup == "sha256" else about  # its marks lie beside the shards


def _download(
    config: DownloadConfig,
    job: Job,
    pairs: Path,
    url_list: sources.UrlList,
    tasks: list[ShardTask],
    num_workers: int,
) -> Iterator[Mapping[str, int]]:
    from tqdm import tqdm

    if not tasks:
        return
    with contextlib.ExitStack() as stack:
        settings = downloader.Settings(
            pairs=pairs,
            columns=tuple(sources.column_names(url_list)),
            hash_column=url_list.hash_column,
            policy=stack.enter_context(policy(config, pairs, num_workers)),
            images=images.ImageSettings.of(config),
            threads=config.threads,
            digested=_digested(config),
            forgotten=forgotten(pairs),
            parent_pid=os.getpid(),
        )
        work = functools.partial(downloader.download_shard, settings=settings)
        total = sum(task.num_rows for task in tasks)
        progress = stack.enter_context(
            tqdm(total=total, unit="url", desc="download", disable=job.quiet or None, file=sys.stderr)
        )
        for counts in executor.map_units(
            work, tasks, num_processes=max(1, job.processes), preload=PRELOAD, on=job.executor
        ):
            progress.update(sum(counts.values()))
            yield counts


@contextlib.contextmanager
def policy(config: DownloadConfig, pairs: Path, num_processes: int) -> Iterator[fetch.FetchPolicy]:
    """How one of ``num_processes`` may fetch; each has its share of what a host may get from the whole cluster.

    While it is open, the demo's host is served where the list is the demo's.
    """
    with contextlib.ExitStack() as stack:
        fixed_hosts = {}
        if config.source == "demo":
            from clips_data.demo import web

            fixed_hosts[web.DEMO_HOST] = stack.enter_context(web.serve())
        yield fetch.FetchPolicy(
            num_processes=num_processes,
            timeout_s=config.timeout_s,
            retries=config.retries,
            max_wait_s=config.max_wait_s,
            max_image_bytes=config.max_image_bytes,
            allow_network=config.allow_network,
            honour_opt_out=config.honour_opt_out,
            user_agent=config.user_agent,
            fixed_hosts=fixed_hosts,
            dns_servers=config.dns_servers,
            robots=config.robots,
            robots_folder=pairs / "log" / "robots",
            host_connections=config.host_connections // num_processes,
            host_rate=config.host_rate / num_processes,
            env_proxy=config.env_proxy,
        )


def _attempted(totals: Counter[str]) -> int:
    return totals.total() - totals["duplicate"] - totals["forgotten"]


def _check_success(config: DownloadConfig, totals: Counter[str], report: Report) -> None:
    """Rows that were not to be asked for are no failures."""
    attempted = _attempted(totals)
    if attempted and totals["ok"] < config.min_success * attempted:
        failures = ", ".join(f"{code} {number}" for code, number in totals.most_common() if code != "ok")
        raise TooFewSucceeded(
            f"{totals['ok']} of {attempted} URLs succeeded, less than --min-success {config.min_success:g}. "
            f"Failures: {failures}. The shards are finished; --retry CODES tries again what may succeed later, "
            "`clips stats` shows which hosts failed.",
            report,
        )
