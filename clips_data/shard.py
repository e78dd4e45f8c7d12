"""``clips shard``: pairs, caption columns and scores become shuffled webdataset shards with offset indexes.

First a plan is drawn: which sample goes to which place of which split, and which caption its ``.txt`` holds. Then every
tar is written on its own, from the plan and the images' offsets, so memory holds the texts of one tar and one image.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clips_data import draws, executor, joined, ledger, locks, schema, tars
from clips_data.config import ShardConfig
from clips_data.errors import ResumeRefused, UserError
from clips_data.executor import Job, Report
from clips_data.shard_plan import SPLITS, Tar, draw_plan
from clips_data.split import split

INDEX_FILE: Final = "index.json"
PRELOAD: Final = ("polars", "pyarrow.parquet", "clips_data.shard")
_INDEX_COLUMNS: Final = ("image_offset", "image_bytes", "txt_offset", "txt_bytes", "json_offset", "json_bytes")


@dataclass(frozen=True)
class Writing:
    """What the writing of every tar needs to know. Goes to worker processes."""

    config: ShardConfig
    pairs: Path
    out: Path
    plan: Path
    inputs: dict[str, str]


def run(config: ShardConfig, job: Job) -> Report:
    """Writes the tars that are not finished yet, and ``index.json`` once all are there.

    Raises ``UserError`` when a column is missing, unfinished or about other images, and ``ResumeRefused`` when finished
    tars were made from other inputs or choices.
    """
    started = time.monotonic()
    _check_columns(config)
    report = Report("shard")
    config = _without_absent_scores(config, job.work, report)
    units = tuple(sorted({path.stem for path in job.only})) if job.only is not None else None
    given = joined.open_inputs(job.work, config.columns, scores=config.scores, units=units, without_duplicates=True)
    if given.left_out:
        report.facts["left_out_as_duplicates"] = sum(len(keys) for keys in given.left_out.values())
    out = job.out or job.work / schema.SHARDS
    plan = out / "_plan" / (job.slice or "all").replace("/", "-of-") / "plan.parquet"
    writing = Writing(config, given.pairs, out, plan, given.digests())
    overwrite = job.overwrite and not job.dry_run
    if not _finished_before(writing, overwrite, report):
        with ledger.readable_disk_errors(out):
            _write(writing, given, job, overwrite, report)
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


def _without_absent_scores(config: ShardConfig, work: Path, report: Report) -> ShardConfig:
    """Scores that nobody asked for may be absent, and the report says so; scores that were named must be there."""
    if config.scores is None or "scores" in config.model_fields_set:
        return config
    if (folder := work / schema.SCORES / config.scores).is_dir():
        return config
    report.facts["scores"] = f"none carried: {folder} does not exist"
    return config.model_copy(update={"scores": None})


def _finished_before(writing: Writing, overwrite: bool, report: Report) -> bool:
    """Whether ``index.json`` and all tars it names are there, made from the same inputs and config."""
    path = writing.out / INDEX_FILE
    if not path.exists():
        return False
    index = json.loads(path.read_text())
    files = [shard["file"] for name in SPLITS for shard in index["splits"][name]["shards"]]
    try:
        done = [_is_done(writing, Path(file).stem, overwrite=False) for file in files]
    except ResumeRefused:
        if not overwrite:
            raise
        return False
    if not all(done):
        return False
    for file in files:
        _note(writing.out, Path(file).stem, report)
    report.add({"dropped_without_caption": index["dropped"]} if index["dropped"] else {})
    report.skipped = len(files)
    return True


def _is_done(writing: Writing, unit: str, overwrite: bool) -> bool:
    config = writing.config.model_dump(mode="json")
    return ledger.is_done(writing.out, unit, inputs=writing.inputs, config=config, overwrite=overwrite)


def _note(out: Path, unit: str, report: Report) -> None:
    """Adds a finished tar to the report."""
    sidecar = ledger.read_sidecar(out, unit)
    assert sidecar is not None
    report.add(dict(sidecar.counts))
    report.units.append(out / f"{unit}.tar")


def _write(writing: Writing, given: joined.Inputs, job: Job, overwrite: bool, report: Report) -> None:
    writing.plan.parent.mkdir(parents=True, exist_ok=True)  # what a killed run left there is written over
    try:
        planned, dropped = draw_plan(writing.config, given, writing.plan)
        _refuse_strangers(writing.out, {tar.unit for tar in planned}, overwrite)
        todo = _todo(writing, planned, job, overwrite, report)
        if job.dry_run:
            report.facts["shards_to_do"] = len(todo)
            return
        if todo:
            (writing.out / INDEX_FILE).unlink(missing_ok=True)  # it may name tars that are about to change
        _write_tars(writing, todo, job, report)
        finished = set(ledger.finished_units(writing.out))
        for tar in planned:
            if tar.unit in finished:
                _note(writing.out, tar.unit, report)
        report.add({"dropped_without_caption": dropped} if dropped else {})
        if all(tar.unit in finished for tar in planned):
            with locks.locked(writing.out):
                ledger.write_json(writing.out / INDEX_FILE, _index(writing, planned, dropped))
        else:
            report.facts["shards_missing"] = sum(tar.unit not in finished for tar in planned)
    finally:
        shutil.rmtree(writing.plan.parent)
        for folder in (writing.plan.parent.parent, writing.out):
            with contextlib.suppress(OSError):  # not empty: other slices plan there, or tars are finished
                folder.rmdir()


def _refuse_strangers(out: Path, units: set[str], overwrite: bool) -> None:
    """Tars of another plan would stay beside the new ones; with ``overwrite`` they go."""
    strangers = [unit for unit in ledger.finished_units(out) if unit not in units]
    if strangers and not overwrite:
        raise ResumeRefused(
            f"{out} has {len(strangers)} finished shards that these inputs do not make ({', '.join(strangers[:3])}). "
            "Use --overwrite to replace them, or --out with a new folder to keep both."
        )
    for unit in strangers:
        sidecar = ledger.read_sidecar(out, unit)
        assert sidecar is not None
        ledger.sidecar_path(out, unit).unlink()
        for name in sidecar.files:
            (out / name).unlink()


def _todo(writing: Writing, planned: list[Tar], job: Job, overwrite: bool, report: Report) -> list[Tar]:
    """The tars of this slice that are missing and that ``limit`` lets through whole."""
    mine = set(executor.slice_of([tar.unit for tar in planned], job.slice))
    todo, rows = [], 0
    for tar in planned:
        done = _is_done(writing, tar.unit, overwrite)
        if tar.unit not in mine:
            continue
        rows += tar.num_rows
        if done:
            report.skipped += 1
        elif job.limit is None or rows <= job.limit:
            todo.append(tar)
    return todo


def _write_tars(writing: Writing, todo: list[Tar], job: Job, report: Report) -> None:
    from tqdm import tqdm

    work = functools.partial(write_tar, writing=writing)
    num_processes = 0 if job.processes <= 1 else min(job.processes, len(todo))
    rows = sum(tar.num_rows for tar in todo)
    with tqdm(total=rows, unit="sample", desc="shard", disable=job.quiet or None) as progress:
        for num_rows in executor.map_units(work, todo, num_processes=num_processes, preload=PRELOAD):
            progress.update(num_rows)
            report.made += 1


def _index(writing: Writing, planned: list[Tar], dropped: int) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {name: {"num_samples": 0, "shards": []} for name in SPLITS}
    digests, counts = [], Counter[str]()
    for tar in planned:
        sidecar = ledger.read_sidecar(writing.out, tar.unit)
        assert sidecar is not None
        about = sidecar.files[f"{tar.unit}.tar"]
        entry = splits[tar.unit.partition("-")[0]]
        entry["num_samples"] += tar.num_rows
        entry["shards"].append({"file": f"{tar.unit}.tar", "num_samples": tar.num_rows, **about})
        digests.append(about["sha256"])
        counts.update(sidecar.counts)
    config = writing.config
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "splits": splits,
        "columns": list(config.columns),
        "mix": {"web_ratio": config.web_ratio, "seed": config.seed, "counts": dict(counts)},
        "dropped": dropped,
        "digest": ledger.digest_json(digests),
    }


# --- one tar ----------------------------------------------------------------------------------------------------------


def write_tar(tar: Tar, writing: Writing) -> int:
    """Writes and commits one tar with its offset index. Returns its number of samples."""
    import polars as pl

    out, unit = writing.out, tar.unit
    plan = pl.scan_parquet(writing.plan, glob=False).slice(tar.first_row, tar.num_rows).collect()
    counts: Counter[str] = Counter()
    index = []
    with ledger.readable_disk_errors(out), ledger.part(out / f"{unit}.tar").open("wb") as file:
        writer = tars.TarWriter(file)
        for row in plan.iter_rows(named=True):
            image = _image(writing.pairs, row)
            text, about, outcome = sample_texts(writing.config, row)
            counts[outcome] += 1
            entry: dict[str, Any] = {name: row[name] for name in ("key", "sha256", "image_ext")}
            for member, ext, data in (
                ("image", row["image_ext"], image),
                ("txt", "txt", text),
                ("json", "json", about),
            ):
                entry[f"{member}_offset"] = writer.add(f"{row['key']}.{ext}", data)
                entry[f"{member}_bytes"] = len(data)
            index.append(entry)
        writer.close()
    _write_index(out / f"{unit}.index.parquet", index)
    files, config = [f"{unit}.tar", f"{unit}.index.parquet"], writing.config.model_dump(mode="json")
    ledger.commit(out, unit, files, inputs=writing.inputs, config=config, counts=counts)
    return len(index)


def _image(pairs: Path, row: dict[str, Any]) -> bytes:
    tar = pairs / f"{row['unit']}.tar"
    with tars.open_tar(tar) as file:
        data = tars.read_at(file, tar, row["place.offset"], row["place.bytes"])
    return joined.check_image(data, tar, row["key"], row["sha256"])


def _write_index(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = [(name, pa.string()) for name in ("key", "sha256", "image_ext")]
    fields += [(name, pa.int64()) for name in _INDEX_COLUMNS]
    with ledger.readable_disk_errors(path):
        pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(fields)), ledger.part(path))


def sample_texts(config: ShardConfig, row: dict[str, Any]) -> tuple[bytes, bytes, str]:
    """The ``.txt`` and ``.json`` members of a planned sample, and the outcome of the mix to count."""
    columns = {column: row[f"text.{column}"] for column in config.columns}
    chosen, outcome = mix(config, row["key"], columns)
    about = {
        "key": row["key"],
        "sha256": row["sha256"],
        **columns,
        "sub_captions": {
            column: split(text, config.split) if text else []
            for column, text in columns.items()
            if column != joined.WEB
        },
        "scores": {
            name.removeprefix("score."): round(value, 6)
            for name, value in row.items()
            if name.startswith("score.") and value is not None
        },
        "extra": json.loads(row["extra"]),
        "provenance": {
            "pairs": row["unit"],
            "url": _without_secrets(row["url"]),
            "txt": chosen,
            "codes": {column: row[f"code.{column}"] for column in config.columns if column != joined.WEB},
        },
    }
    text = json.dumps(about, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return columns[chosen].encode(), text.encode(), outcome


def mix(config: ShardConfig, key: str, columns: dict[str, str]) -> tuple[str, str]:
    """The column that ``.txt`` holds (METHOD §5), and an outcome: the column, or which column stood in for which.

    Web with probability ``web_ratio``, else the second column; any other column only where both are empty.
    """
    wanted = joined.WEB
    if len(config.columns) > 1 and draws.uniform(config.seed, "mix", 0, key) >= config.web_ratio:
        wanted = config.columns[1]
    if columns[wanted]:
        return wanted, wanted
    chosen = next(column for column in config.columns if columns[column])
    return chosen, f"{chosen}_for_missing_{wanted}"


def _without_secrets(url: str | None) -> str | None:
    """The URL without query, fragment and user: those may be signatures and passwords."""
    from urllib.parse import urlsplit, urlunsplit

    if url is None:
        return None
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
