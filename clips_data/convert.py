"""``clips convert``: finished training shards in the formats of others, one file for each tar, in their own folder.

The rows of a file are those of its tar, in its order. Files are committed like those of any stage, so a killed run goes
on where it was, and two runs give the same bytes. Conversions are copies: no stage reads them and nothing follows them.
"""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from clips_data import convert_tables, convert_tars, executor, ledger, locks, shard_samples
from clips_data.convert_tables import Layout
from clips_data.errors import ResumeRefused, UsageError, UserError, did_you_mean
from clips_data.executor import Job, Report
from clips_data.shard_samples import Shards, Tar

PRELOAD: Final = ("polars", "pyarrow.parquet", "clips_data.convert")
SIZES_FILE: Final = "sizes.json"


@dataclass(frozen=True)
class Conversion:
    """What to make. ``columns`` are those to write; what that means, and what none means, is the format's.

    ``mix`` and ``epoch`` are open_clip's: the rules that choose its ``.txt``, as ``clips shard --mix`` has them, and
    the epoch they are drawn for. ``images`` False leaves the image bytes out.
    """

    to: str
    columns: tuple[str, ...] = ()
    images: bool = True
    mix: tuple[str, ...] = ()
    epoch: int = 0


@dataclass(frozen=True)
class Writing:
    """What the writing of every file needs to know. Goes to worker processes."""

    conversion: Conversion
    shards: Shards
    folder: Path
    layout: Layout

    def unit(self, tar: Tar) -> str:
        """Not the tar's own name: a folder with such units would be taken for training shards."""
        return f"{self.conversion.to}-{tar.unit}"

    def inputs(self, tar: Tar) -> dict[str, str]:
        """The tar, and the name of its file, which may tell the number of tars."""
        return {"tar": tar.sha256, "file": FORMATS[self.conversion.to].file(tar, self.shards)}

    def config(self) -> dict[str, Any]:
        """As it comes back from a sidecar: lists, no tuples."""
        found = json.loads(json.dumps({**asdict(self.conversion), **asdict(self.layout)}))
        assert isinstance(found, dict)
        return found


@dataclass(frozen=True)
class Format:
    """How one format is written: where its files go under ``--out``, their names, and the writer.

    ``write(writing, tar, path)`` returns rows by outcome, or a path that the file is to be a link to, with them.
    """

    folder: str
    file: Callable[[Tar, Shards], str]
    write: Callable[[Writing, Tar, Path], tuple[Mapping[str, int], Path | None]]
    has_images: bool = True


def run(conversion: Conversion, folder: Path, job: Job) -> Report:
    """Writes the files that are not finished yet. ``job.out`` is where.

    Raises ``UserError`` for shards that are unfinished or damaged, and ``ResumeRefused`` when ``job.out`` holds files
    made from other shards or with other choices.
    """
    started = time.monotonic()
    assert job.out is not None
    shards = shard_samples.open_shards(folder)
    conversion = _checked(conversion, shards)
    form = FORMATS[conversion.to]
    target = job.out / form.folder
    if target.resolve().is_relative_to(shards.folder.resolve()):
        raise UserError(f"--out {job.out} lies in the shards that are to be converted. Name a folder beside them.")
    writing = Writing(conversion, shards, target, _layout(conversion, shards))
    report = Report("convert")
    with ledger.readable_disk_errors(job.out):
        _convert(writing, form, job, report)
    if conversion.to == "open_clip" and not job.dry_run:
        report.notes += convert_tars.training_lines(shards, job.out)
    report.seconds = time.monotonic() - started
    return report


def _checked(conversion: Conversion, shards: Shards) -> Conversion:
    """The conversion with the columns that it means. Raises ``UsageError`` for choices that the format has not."""
    to, columns = conversion.to, conversion.columns
    for column in columns:
        if column not in shards.columns:
            raise UserError(f"{shards.folder} has no column {column!r}. {did_you_mean(column, shards.columns)}")
        if columns.count(column) > 1:
            raise UserError(f"--column {column} is given twice. Name each column once.")
    if not conversion.images and not FORMATS[to].has_images:
        raise UsageError(f"--images is about formats that hold images, and {to} is none of them.")
    if to == "open_clip" and not conversion.images:
        raise UsageError("--to open_clip is for training, which needs the images.")
    if to != "open_clip" and (conversion.mix or conversion.epoch):
        raise UsageError(f"--mix and --epoch choose the .txt of --to open_clip; --to {to} carries the columns as such.")
    if to == "open_clip" and (len(columns) > 1 or (columns and conversion.mix)):
        raise UsageError("open_clip trains on one text: name one --column, or weigh several with --mix.")
    if to == "open_clip" and conversion.epoch and not conversion.mix:
        raise UsageError("--epoch is the epoch that --mix is drawn for. Give --mix, or leave --epoch out.")
    if not columns and to == "datacompdr":
        columns = shards.columns[1:]
        if not columns:
            raise UserError(f"{shards.folder} has the web caption only, and --to datacompdr is for synthetic captions.")
    if not columns and to in ("parquet", "jsonl", "csv"):
        columns = shards.columns
    return Conversion(to, columns, conversion.images, conversion.mix, conversion.epoch)


def _layout(conversion: Conversion, shards: Shards) -> Layout:
    """Only tables with columns for each score have to know beforehand which there are."""
    if conversion.to not in ("parquet", "csv"):
        return Layout(conversion.columns, (), conversion.images)
    return convert_tables.layout(shards, conversion.columns, images=conversion.images)


# --- what is to be done -----------------------------------------------------------------------------------------------


def _convert(writing: Writing, form: Format, job: Job, report: Report) -> None:
    tars = {writing.unit(tar): tar for tar in writing.shards.tars}
    inputs = {unit: writing.inputs(tar) for unit, tar in tars.items()}
    _refuse_others(writing, inputs, job)
    config = writing.config()
    standing = ledger.stand(writing.folder, inputs, config, overwrite=job.overwrite, dry_run=job.dry_run)
    mine = set(executor.slice_of(list(tars), job.slice))
    todo = [tars[unit] for unit in standing.missing if unit in mine]
    report.skipped = sum(unit in mine for unit in standing.finished)
    if job.dry_run:
        report.facts["files_to_do"] = len(todo)
        return
    writing.folder.mkdir(parents=True, exist_ok=True)
    _write_all(writing, todo, job, report)
    finished = set(ledger.finished_units(writing.folder))
    for unit, tar in tars.items():
        if unit in finished:
            sidecar = ledger.read_sidecar(writing.folder, unit)
            assert sidecar is not None
            report.add(dict(sidecar.counts))
            report.units.append(writing.folder / form.file(tar, writing.shards))
    if missing := len(tars) - len(finished):
        report.facts["files_missing"] = missing
    elif writing.conversion.to == "open_clip":
        with locks.locked(writing.folder):
            sizes = {tar.file: tar.num_samples for tar in writing.shards.tars}
            ledger.write_json(writing.folder / SIZES_FILE, sizes)


def _refuse_others(writing: Writing, inputs: Mapping[str, Mapping[str, str]], job: Job) -> None:
    """Files of another conversion would stay beside the new ones and be read with them; ``overwrite`` removes them."""
    folder, config = writing.folder, writing.config()
    for unit in ledger.finished_units(folder):
        sidecar = ledger.read_sidecar(folder, unit, check_files=False)
        assert sidecar is not None
        if unit in inputs and not ledger.differences("", sidecar.inputs, inputs[unit]) + ledger.differences(
            "", sidecar.config, config
        ):
            continue
        if job.overwrite and not job.dry_run:
            for name in sidecar.files:
                (folder / name).unlink(missing_ok=True)
            ledger.forget_unit(folder, unit)
        elif unit not in inputs and not job.overwrite:
            raise ResumeRefused(
                f"{folder} has files that this conversion does not make ({unit}). Use --overwrite to replace them, or "
                "--out with a new folder to keep both."
            )


def _write_all(writing: Writing, todo: list[Tar], job: Job, report: Report) -> None:
    from tqdm import tqdm

    work = functools.partial(write_file, writing=writing)
    num_processes = 0 if job.processes <= 1 else min(job.processes, len(todo))
    with tqdm(
        total=sum(tar.num_samples for tar in todo), unit="sample", desc="convert", disable=job.quiet or None
    ) as bar:
        for num_samples in executor.map_units(work, todo, num_processes=num_processes, preload=PRELOAD):
            bar.update(num_samples)
            report.made += 1


def write_file(tar: Tar, writing: Writing) -> int:
    """Writes and commits the file of one tar. Returns its number of samples."""
    form, folder = FORMATS[writing.conversion.to], writing.folder
    name = form.file(tar, writing.shards)
    with ledger.readable_disk_errors(folder):
        counts, link = form.write(writing, tar, ledger.part(folder / name))
        ledger.commit(
            folder,
            writing.unit(tar),
            [name] if link is None else [],
            inputs=writing.inputs(tar),
            config=writing.config(),
            counts=counts,
            links={} if link is None else {name: link},
        )
    return tar.num_samples


# --- the formats ------------------------------------------------------------------------------------------------------


def _parquet_name(tar: Tar, shards: Shards) -> str:
    """The name by which Hugging Face tells splits from each other."""
    units = [other.unit for other in shards.tars if other.split == tar.split]
    return f"{tar.split}-{units.index(tar.unit):05d}-of-{len(units):05d}.parquet"


def _table(writing: Writing, tar: Tar, path: Path) -> tuple[Mapping[str, int], None]:
    samples = shard_samples.read(writing.shards, tar, images=writing.layout.images)
    write = {
        "parquet": convert_tables.write_parquet,
        "jsonl": convert_tables.write_jsonl,
        "csv": convert_tables.write_csv,
    }[writing.conversion.to]
    return {"ok": write(samples, tar.file, writing.layout, path)}, None


def _datacompdr(writing: Writing, tar: Tar, path: Path) -> tuple[Mapping[str, int], None]:
    samples = shard_samples.read(writing.shards, tar, images=writing.conversion.images)
    return convert_tars.write_datacompdr(samples, writing.shards.columns, writing.conversion.columns, path), None


def _open_clip(writing: Writing, tar: Tar, path: Path) -> tuple[Mapping[str, int], Path | None]:
    conversion, shards = writing.conversion, writing.shards
    samples = shard_samples.read(shards, tar)
    rules = conversion.mix or tuple(f"{column}=1" for column in conversion.columns)
    if not rules:
        tar_path = (shards.folder / tar.file).resolve()
        counts = Counter(convert_tars.check(sample, tar_path) for sample in samples)
        if ledger.digest_file(tar_path) != tar.sha256:
            raise UserError(
                f"{tar_path} is not the tar that {shards.folder / shard_samples.INDEX_FILE} promises (its sha256 is "
                "another). Restore it, or make the shards again."
            )
        return counts, tar_path
    chosen = convert_tars.Chosen.of(rules, shards, conversion.epoch)
    return convert_tars.write_open_clip(samples, chosen, path), None


FORMATS: Final[dict[str, Format]] = {
    "parquet": Format("data", _parquet_name, _table),
    "jsonl": Format("", lambda tar, _: f"{tar.unit}.jsonl", _table, has_images=False),
    "csv": Format("", lambda tar, _: f"{tar.unit}.csv", _table, has_images=False),
    "datacompdr": Format("", lambda tar, _: tar.file, _datacompdr),
    "open_clip": Format("", lambda tar, _: tar.file, _open_clip),
}
