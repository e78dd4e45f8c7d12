"""Caption columns from captions that somebody else has made: carried by the list itself, or in a table of their own.

A table is joined by an identity that both sides have, never by line, in one pass, however long it is: what matches is
kept aside in buckets of shards, and each shard is then committed as ``recaption`` commits its own. Every image gets a
row; one without a caption has the code ``empty``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import caption_table, joined, ledger, locks, schema
from clips_data.errors import UserError
from clips_data.executor import Report
from clips_data.recaption import clean
from clips_data.recaption.prompt_file import Cleaning
from clips_data.table_join import CaptionTable, Join, follow, images_of, resolve, text_of

if TYPE_CHECKING:
    import polars as pl

ENGINE: Final = "imported"
NOT_IN_TABLE: Final = "not_in_table"
"""Flag of the rows whose image the table does not know, as opposed to those that it has an empty caption for."""
_COLUMN: Final = re.compile(r"[a-z][a-z0-9_]*")


def import_carried(
    pairs: Path,
    unit: str,
    out: Path,
    column: str,
    list_column: str,
    *,
    model: str = "unknown",
    required: bool = True,
    overwrite: bool = False,
) -> dict[str, int]:
    """Makes shard ``unit`` of caption column ``column`` of what the pairs carry in ``list_column``; rows by code.

    A ``/`` in ``list_column`` leads into JSON text, lists and structs. ``model`` says who made the captions, as far as
    that is known. Unless ``required``, a shard of a list without that column gets empty captions. A finished shard is
    left alone; ``ResumeRefused`` when it was made of other pairs or another column.
    """
    _check_column(column)
    config = _config(column, model, {"list_column": list_column})
    inputs = {schema.PAIRS: _sidecar(pairs, unit).digest}
    out.mkdir(parents=True, exist_ok=True)
    if not ledger.is_done(out, unit, inputs=inputs, config=config, overwrite=overwrite):
        images = images_of(pairs, unit)
        found = resolve(list_column, images.columns)
        if found is not None:
            texts = [text_of(follow(value, found[1])) for value in images[found[0]].to_list()]
            _commit(out, unit, images, texts, [], inputs, config)
        elif required:
            raise UserError(
                f"{pairs / unit}.parquet has no column {list_column!r}. The lists' columns there are "
                f"{', '.join(joined.extra_columns(images))}."
            )
        else:
            _commit(out, unit, images, [""] * len(images), range(len(images)), inputs, config)
    return dict(_sidecar(out, unit).counts)


def carried_columns(work: Path) -> dict[str, tuple[str, str]]:
    """The columns under ``work`` that were carried by lists: name → (list column, model)."""
    found = {}
    for folder in sorted((work / schema.CAPTIONS).glob("*/")):
        for unit in ledger.finished_units(folder)[:1]:
            config = _sidecar(folder, unit).config
            if config.get("engine") == ENGINE and "list_column" in config:
                found[folder.name] = config["list_column"], config["model"]
    return found


def import_all_carried(
    work: Path,
    captions: Mapping[str, str],
    *,
    pairs: Path | None = None,
    model: str = "unknown",
    overwrite: bool = False,
) -> Report:
    """``import_carried`` for all finished shards of ``pairs`` (default ``work/pairs``) and several columns.

    ``captions`` maps names to list columns. Shards of other lists, which lack a column, get empty captions; a column
    that no shard has is a ``UserError``.
    """
    started = time.monotonic()
    pairs = pairs or work / schema.PAIRS
    report, units = Report("import"), _units(pairs)
    for column, list_column in captions.items():
        out = work / schema.CAPTIONS / column
        absent = all(resolve(list_column, images_of(pairs, unit, columns_only=True).columns) is None for unit in units)
        for unit in units:
            report.add(
                import_carried(pairs, unit, out, column, list_column, model=model, required=absent, overwrite=overwrite)
            )
            report.units.append(out / f"{unit}.parquet")
    report.seconds = time.monotonic() - started
    return report


def import_table(
    work: Path,
    table: Path | str,
    *,
    column: str,
    text_column: str,
    by: str,
    table_key: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Makes ``work/captions/<column>`` of the column ``text_column`` of a table, joined to the pairs.

    ``by`` is ``url`` (both sides compared without their secrets), ``sha256`` (of the bytes that were downloaded) or a
    column of the list, such as a uid; ``table_key`` is its name in the table, by default the same. A ``/`` in
    ``text_column`` and ``table_key`` leads into JSON text, lists and structs: ``captions/long`` or
    ``syn.json/syn_text/0``. Of several rows with one key the first counts; several pairs with one key all get its
    caption.

    The report counts rows by code; its facts tell how many pairs were ``matched`` of ``pairs``, and, when the table was
    read, ``table_rows``, ``table_rows_unused`` and ``table_rows_repeated``.
    """
    started = time.monotonic()
    _check_column(column)
    pairs, out = work / schema.PAIRS, work / schema.CAPTIONS / column
    units = _units(pairs)
    out.mkdir(parents=True, exist_ok=True)
    with locks.scratch(out, "import") as scratch:
        source = CaptionTable(str(table), text_column, by, table_key, scratch)
        config = _config(column, model or source.set_name, {"text_column": text_column, "by": by, "key": source.key})
        inputs_of = {unit: {schema.PAIRS: _sidecar(pairs, unit).digest, "table": source.digest} for unit in units}
        standing = ledger.stand(out, inputs_of, config, overwrite=overwrite, dry_run=False)
        report = Report("import", skipped=len(standing.finished))
        if standing.missing:
            join = Join(pairs, standing.missing, by, scratch)
            report.facts.update(join.read(source))
            for unit in standing.missing:
                images, texts, unknown = join.captions(unit)
                _commit(out, unit, images, texts, unknown, inputs_of[unit], config)
                report.made += 1
    for unit in units:
        report.add(dict(_sidecar(out, unit).counts))
        report.units.append(out / f"{unit}.parquet")
    rows = sum(report.counts.values())
    report.facts |= {"pairs": rows, "matched": rows - _num_unknown(out, units)}
    usable = report.counts.get("ok", 0)
    report.notes.append(
        f"{report.facts['matched']} of {rows} images are in the table, {usable} of {rows} have a usable caption."
    )
    report.seconds = time.monotonic() - started
    return report


def _config(column: str, model: str, about: Mapping[str, str]) -> dict[str, Any]:
    return {"column": column, "engine": ENGINE, "model": model, **about}


def _check_column(column: str) -> None:
    if column == joined.WEB or not _COLUMN.fullmatch(column):
        raise UserError(
            f"{column!r} cannot be the name of a caption column: it is lower-case letters, digits and _, and "
            f"{joined.WEB!r} is the one that the download made. Choose another."
        )


def _units(pairs: Path) -> list[str]:
    units = ledger.finished_units(pairs)
    if not units:
        raise UserError(f"{pairs} holds no finished shards. Run `clips download` or `clips adopt` first.")
    return units


def _sidecar(folder: Path, unit: str) -> ledger.Sidecar:
    sidecar = ledger.read_sidecar(folder, unit)
    if sidecar is None:
        raise UserError(f"Shard {unit} of {folder} is not finished. Run the command that makes it again.")
    return sidecar


def _commit(
    out: Path,
    unit: str,
    images: pl.DataFrame,
    texts: Sequence[str],
    unknown: Sequence[int],
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Writes one shard of the column. How many tokens a caption has, nobody said."""
    not_there = set(unknown)
    rows = []
    for number, (key, sha256, text) in enumerate(zip(images["key"], images["sha256"], texts, strict=True)):
        judged = clean.finish(text, "stop", Cleaning(), "")
        flags = [*([NOT_IN_TABLE] if number in not_there else []), *judged.flags]
        rows.append({
            "key": key, "sha256": sha256, "caption": judged.caption,
            "status": "success" if judged.code == "ok" else "failed", "code": judged.code, "finish_reason": None,
            "num_tokens": None, "flags": flags, "raw": text, "seed": None, "engine": ENGINE,
        })  # fmt: skip
    metadata = schema.caption_metadata(
        model=config["model"], model_revision=None, engine=ENGINE, engine_version=None, prompt=None, prompt_digest=None,
        sampling={}, seed=None,
    )  # fmt: skip
    caption_table.commit(out, unit, rows, metadata=metadata, inputs=inputs, config=config)


def _num_unknown(out: Path, units: Sequence[str]) -> int:
    import polars as pl

    scanned = pl.scan_parquet([out / f"{unit}.parquet" for unit in units], glob=False)
    return int(scanned.select(pl.col("flags").list.contains(NOT_IN_TABLE).sum()).collect().item() or 0)
