"""``clips adopt``: a folder of somebody else's tars becomes ``pairs/`` in place, checked and hashed, nothing copied.

Per tar ``pairs/`` gets a link to it, a table and a sidecar; their folder is only read.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from clips_data import executor, foreign, ledger, schema
from clips_data.errors import ResumeRefused, UsageError, UserError
from clips_data.executor import Job, Report
from clips_data.foreign import Choices, Content, Foreign
from clips_data.forgotten import forgotten, refuse_unfinished

PRELOAD: Final = ("pyarrow.parquet", "PIL.Image", "clips_data.adopt")
MAX_PIXELS: Final = 100_000_000
MAX_TARS: Final = 10**schema.SHARD_DIGITS
_SHOWN_REFUSALS: Final = 10


@dataclass(frozen=True)
class Adoption:
    """What the adoption of every tar needs to know. Goes to worker processes."""

    pairs: Path
    choices: Choices
    config: Mapping[str, Any]


@dataclass
class Outcome:
    """What became of one tar: its rows by code, or why it was refused. ``differences`` as in ``Content``."""

    tar: Foreign
    refused: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    differences: dict[str, list[str]] = field(default_factory=dict)


def adopt(
    folder: Path,
    job: Job,
    *,
    caption_ext: str = "txt",
    caption_key: str | None = None,
    ignore: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> Report:
    """Makes ``pairs/`` of the tars in ``folder`` that are not adopted yet.

    The caption is that of img2dataset's table, else ``caption_key`` of the ``json`` member, else the ``caption_ext``
    member; ``ignore`` names the extensions of further members that may be there and are never read. Raises
    ``UserError`` at the end when tars were refused; the others stay adopted.
    """
    started = time.monotonic()
    pairs, folder = job.out or job.work / schema.PAIRS, folder.resolve()
    _check_extensions(caption_ext, ignore)
    _check_folders(folder, pairs)
    refuse_unfinished(pairs)
    if job.overwrite and forgotten(pairs):
        raise UserError(
            f"{pairs} was told to forget some of these samples, and --overwrite would link the tars that still hold "
            "them. Adopt the folder into a new --work and forget there again."
        )
    choices = Choices(caption_ext, caption_key, max_pixels, tuple(ignore))
    about = {"caption_ext": caption_ext, "caption_key": caption_key, "max_pixels": max_pixels}
    adoption = Adoption(pairs, choices, {"adopted_from": str(folder), **about})
    tars = {tar.unit: tar for tar in _number(folder)}
    report, outcomes = Report("adopt"), list[Outcome]()
    with ledger.readable_disk_errors(pairs):
        _refuse_strangers(pairs, folder, tars, job)
        inputs_of = {unit: tars[unit].inputs() for unit in executor.slice_of(list(tars), job.slice)}
        standing = ledger.stand(pairs, inputs_of, adoption.config, overwrite=job.overwrite, dry_run=job.dry_run)
        report.skipped = len(standing.finished)
        report.add(dict(standing.counts))
        todo = _within(job.limit, [tars[unit] for unit in standing.missing], choices)
        if job.dry_run:
            report.facts["shards_to_do"] = len(todo)
        else:
            pairs.mkdir(parents=True, exist_ok=True)
            outcomes = sorted(_adopt_all(todo, adoption, job), key=lambda outcome: outcome.tar.unit)
    finished = set(ledger.finished_units(pairs))
    report.units = [pairs / f"{unit}.tar" for unit in tars if unit in finished]
    _note(outcomes, report)
    report.seconds = time.monotonic() - started
    if refused := [outcome.refused for outcome in outcomes if outcome.refused]:
        raise UserError(_refusals(refused, len(todo), len(report.units), pairs))
    return report


def _check_extensions(caption_ext: str, ignore: Sequence[str]) -> None:
    for option, ext in (("--caption-ext", caption_ext), *(("--ignore-members", ext) for ext in ignore)):
        if not re.fullmatch(r"[A-Za-z0-9_]+", ext):
            raise UsageError(f"{option} {ext!r} is no extension of members. Name it without dots, for example cls.")
        if ext in foreign.IMAGES:
            raise UsageError(f"{option} {ext!r} is an extension of images, which are what a folder is adopted for.")


def _check_folders(folder: Path, pairs: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Name the folder that holds the tars.")
    if pairs.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"{pairs} lies in the folder that is to be adopted, where nothing may be written. "
            "Name a folder elsewhere with --work."
        )


def _number(folder: Path) -> list[Foreign]:
    """Their tars in the order of names. Names that are numbers, as img2dataset's, keep them; others are counted."""
    paths = sorted(path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise UserError(f"{folder} holds no .tar files. Name the folder that holds the tars themselves.")
    if len(paths) > MAX_TARS:
        raise UserError(
            f"{folder} holds {len(paths)} tars, and a data set has at most {MAX_TARS}. Adopt it in parts: make "
            "folders of links to some of the tars, and give each a --work of its own."
        )
    numbers = [int(path.stem) for path in paths if re.fullmatch(r"[0-9]{1,9}", path.stem)]
    if len(set(numbers)) < len(paths) or max(numbers) >= MAX_TARS:
        numbers = list(range(len(paths)))
    tables = [path.with_suffix(".parquet") for path in paths]
    return [
        Foreign(schema.shard_name(number), path, table if table.exists() else None)
        for number, path, table in zip(numbers, paths, tables, strict=True)
    ]


def _refuse_strangers(pairs: Path, folder: Path, tars: Mapping[str, Foreign], job: Job) -> None:
    """Shards adopted from tars that are not there any more would stay beside the new ones; ``overwrite`` drops them."""
    strangers = []
    for unit in ledger.finished_units(pairs):
        sidecar = ledger.read_sidecar(pairs, unit, check_files=False)
        assert sidecar is not None
        if unit not in tars and "adopted_from" in sidecar.config:
            strangers.append(unit)
    if strangers and not job.overwrite:
        raise ResumeRefused(
            f"{pairs} has {len(strangers)} adopted shards that {folder} has no tar for ({', '.join(strangers[:3])}). "
            "Use --overwrite to drop them, or --work with a new folder to keep both."
        )
    for unit in () if job.dry_run else strangers:
        ledger.forget_unit(pairs, unit)


def _within(limit: int | None, missing: list[Foreign], choices: Choices) -> list[Foreign]:
    """The tars that fit as a whole into ``limit`` rows."""
    if limit is None:
        return missing
    todo, rows = [], 0
    for tar in missing:
        with contextlib.suppress(UserError):  # its worker refuses it and says why
            rows += foreign.check(tar, choices)
        if rows > limit:
            break
        todo.append(tar)
    return todo


def _adopt_all(todo: list[Foreign], adoption: Adoption, job: Job) -> Iterator[Outcome]:
    from tqdm import tqdm

    work = functools.partial(adopt_tar, adoption=adoption)
    here = job.processes <= 1 and job.executor == "local"
    num_processes = 0 if here else min(job.processes, max(1, len(todo)))
    with tqdm(total=len(todo), unit="tar", desc="adopt", disable=job.quiet or None) as progress:
        for outcome in executor.map_units(work, todo, num_processes=num_processes, preload=PRELOAD, on=job.executor):
            progress.update()
            yield outcome


def _note(outcomes: list[Outcome], report: Report) -> None:
    """Counts, and for each kind of difference its number and first example."""
    differences: dict[str, list[str]] = {}
    for outcome in outcomes:
        report.made += outcome.refused is None
        report.add(outcome.counts)
        for kind, keys in outcome.differences.items():
            differences.setdefault(kind, []).extend(f"{outcome.tar.tar.name} {key}" for key in keys)
    report.notes += [f"{len(examples)} {kind}; the first: {examples[0]}" for kind, examples in differences.items()]


def _refusals(refused: list[str], num_tried: int, num_adopted: int, pairs: Path) -> str:
    more = [f"… and {len(refused) - _SHOWN_REFUSALS} more."] if len(refused) > _SHOWN_REFUSALS else []
    return "\n  ".join(
        [
            f"{len(refused)} of {num_tried} tars were refused; {num_adopted} are adopted in {pairs} and stay so:",
            *refused[:_SHOWN_REFUSALS],
            *more,
            "Mend these (repack tars whose members lie in folders or have dots in their keys) or take them out of the "
            "folder, and run the same command again.",
        ]
    )


# --- one tar ----------------------------------------------------------------------------------------------------------


def adopt_tar(tar: Foreign, adoption: Adoption) -> Outcome:
    """Reads and commits one tar; what is wrong with it is in the outcome, so that the others go on."""
    try:
        inputs = tar.inputs()
        content = foreign.read(tar, adoption.choices)
        if tar.inputs() != inputs:
            raise UserError(f"{tar.tar} changed while it was read. Wait until whoever writes it is done.")
    except UserError as error:
        return Outcome(tar, refused=str(error))
    with ledger.readable_disk_errors(adoption.pairs):
        _commit(tar, content, inputs, adoption)
    return Outcome(tar, counts=content.counts, differences=content.differences)


def _commit(tar: Foreign, content: Content, inputs: dict[str, str], adoption: Adoption) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clips_data.pair_writer import pairs_schema

    pairs, name = adoption.pairs, f"{tar.unit}.parquet"
    table = pa.Table.from_pylist(content.rows, schema=pairs_schema(content.list_schema, content.list_schema.names))
    pq.write_table(table, ledger.part(pairs / name))
    ledger.commit(
        pairs, tar.unit, [name],
        inputs=inputs, config=adoption.config, counts=content.counts, links={f"{tar.unit}.tar": tar.tar},
    )  # fmt: skip
