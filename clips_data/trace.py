"""``clips trace``: one sample's way through the stages, from what lies under a work folder now.

A lineage is made of *steps*, plain dicts ready for JSON. Each has ``where`` it was looked for, and either what is
there or ``absent``, the reason why nothing is. ``problems`` are sentences about what does not fit together: a file that
is not the promised one, or an input that was made again since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from clips_data import duplicates, joined, ledger, measure, rewrite, schema, tars, trace_shards
from clips_data.errors import UserError
from clips_data.forget_plan import tables

Step = dict[str, Any]
JOURNAL: Final = ".journal.jsonl"
_OF_IMAGE: Final = (
    "sha256", "raw_sha256", "image_ext", "bytes", "width", "height", "original_width", "original_height", "orientation",
    "phash",
)  # fmt: skip


def trace(work: Path, key: str) -> dict[str, Any] | None:
    """The lineage of the sample ``key``; ``None`` where no stage has it. Raises ``UserError`` without a work folder.

    ``list`` (the row of the URL list), ``related`` rows, ``image``, ``captions`` by column, ``scores`` by name,
    ``shards`` (one step for each folder of training shards), ``runs`` that were trained on them and ``shown_in``, the
    files of runs that name the key. ``problems`` repeats those of all steps, each behind its ``where``.
    """
    if not work.is_dir():
        raise UserError(f"There is no folder {work}. Point --work at the folder of a run.")
    listed = _step(work, work / schema.PAIRS, key)
    row: dict[str, Any] | None = listed.get("row")
    captions = {folder.name: _made(work, folder, key, row) for folder in _folders(work, schema.CAPTIONS)}
    scores = {folder.name: _made(work, folder, key, row) for folder in _folders(work, schema.SCORES)}
    texts = {joined.WEB: (row.get("caption") or "").strip()} if row is not None else {}
    texts |= {name: _usable(step["row"]) for name, step in captions.items() if "absent" not in step}
    shards = trace_shards.places(work, key, row, texts)
    if all("absent" in step for step in (listed, *captions.values(), *scores.values(), *shards)):
        return None
    found: dict[str, Any] = {
        "key": key,
        "list": listed,
        "related": _related(work / schema.PAIRS, row) if row is not None else [],
        "image": _image(work, row) if row is not None and row["status"] == schema.STATUS_SUCCESS else None,
        "captions": captions,
        "scores": scores,
        "shards": shards,
        **trace_shards.seen(work, key, row, shards),
    }
    steps = [listed, found["image"] or {}, *captions.values(), *scores.values(), *shards]
    found["problems"] = [f"{step['where']}: {problem}" for step in steps for problem in step.get("problems", [])]
    return found


def _folders(work: Path, stage: str) -> list[Path]:
    return [folder for folder in tables(work) if folder.parent.name == stage]


def _usable(row: Mapping[str, Any]) -> str:
    """A caption as the stages to the right take it: "" unless it is good."""
    return (row["caption"] or "").strip() if row["status"] == schema.STATUS_SUCCESS else ""


# --- one table, one row -----------------------------------------------------------------------------------------------


def _step(work: Path, folder: Path, key: str) -> Step:
    """The row of ``key`` in the finished shard of ``folder`` that it belongs to, with what the sidecar says."""
    unit = key[: schema.SHARD_DIGITS]
    table = folder / f"{unit}.parquet"
    step: Step = {"where": table.relative_to(work).as_posix(), "problems": []}
    try:
        sidecar = ledger.read_sidecar(folder, unit, check_files=False)
        if sidecar is None:
            return step | {"absent": _unfinished(folder, unit, key)}
        step |= {"config": dict(sidecar.config), "tool_version": sidecar.tool_version}
        rows = joined.read_table(table)
        rows = rows.filter(rows["key"] == key)
    except UserError as error:
        return step | {"absent": "its table cannot be read", "problems": [str(error)]}
    if rows.is_empty():
        return step | {"absent": "the table has no row with this key"}
    if len(rows) > 1:
        step["problems"].append(f"the table has {len(rows)} rows with this key; the first one is shown")
    try:
        ledger.read_sidecar(folder, unit)
    except UserError as error:
        step["problems"].append(str(error))
    # NaN is no JSON
    return step | {"row": {name: None if value != value else value for name, value in rows.row(0, named=True).items()}}


def _unfinished(folder: Path, unit: str, key: str) -> str:
    if not folder.is_dir():
        return f"there is no {folder.name}/ here"
    journal = folder / f"{unit}{JOURNAL}"
    if not journal.exists():
        return f"shard {unit} is not finished here"
    lines = rewrite.read_journal(journal)[1:]
    codes = [line["code"] for line in lines if line.get("key") == key]
    this = f"this one with the code {', '.join(codes)}" if codes else "not this one"
    return f"shard {unit} is not finished here; its journal has {len(lines)} answers, {this}"


def _check_inputs(work: Path, folder: Path, step: Step, key: str, row: Mapping[str, Any] | None) -> None:
    """Adds to the problems of a step what changed on its left since it was made."""
    unit = key[: schema.SHARD_DIGITS]
    sidecar = ledger.read_sidecar(folder, unit, check_files=False)
    assert sidecar is not None
    for name, before in sidecar.inputs.items():
        for source in _sources(work, name):
            now = ledger.read_sidecar(source, unit, check_files=False)
            where = f"shard {unit} of {source.relative_to(work).as_posix()}"
            if now is None:
                step["problems"].append(f"it was made from {where}, which is not finished any more")
            elif now.digest != before:
                step["problems"].append(
                    f"{where} was made again since (its digest was {before[:12]}, and is {now.digest[:12]} now)"
                )
    if row is not None and step["row"]["sha256"] != row.get("sha256"):
        step["problems"].append(
            f"it is about another image (sha256 {step['row']['sha256']}) than pairs has now ({row.get('sha256')})"
        )


def _sources(work: Path, name: str) -> list[Path]:
    """The folder that a sidecar calls ``name``; none for a list or a table from elsewhere."""
    stages = (work,) if "/" in name or name == schema.PAIRS else (work / schema.CAPTIONS, work / schema.SCORES)
    return [stage / name for stage in stages if (stage / name).is_dir()][:1]


def _metadata(parquet: Path) -> dict[str, Any]:
    """Who made a table, as its file says: model, engine, prompt, sampling, seed."""
    import polars as pl

    found: dict[str, Any] = {}
    for name, text in pl.read_parquet_metadata(parquet).items():
        if name.startswith("ARROW"):
            continue
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text  # not ours, or not meant as JSON
    return found


# --- the steps --------------------------------------------------------------------------------------------------------


def _related(pairs: Path, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows that are about the same URL or image: tries before and after, repetitions, each with its ``relation``."""
    import polars as pl

    key, first, kept = row["key"], row.get("retry_of"), row.get("duplicate_of")
    columns = dict.fromkeys(("key", "code", "retry_of", "duplicate_of"), pl.String)
    relations = {
        "the first try": pl.col("key") == pl.lit(first, pl.String),
        "another try": pl.col("retry_of") == (first or key),
        "the row whose URL it repeats": pl.col("key") == pl.lit(kept, pl.String),
        "repeats its URL": pl.col("duplicate_of") == key,
    }
    table = measure.scan(pairs, ledger.finished_units(pairs), columns).filter(pl.col("key") != key)
    asked = [table.filter(condition).select("key", "code").sort("key") for condition in relations.values()]
    found = [
        {"relation": name, **about}
        for name, rows in zip(relations, measure.collect(pairs, *asked), strict=True)
        for about in rows.to_dicts()
    ]
    if (marked := duplicates.read(pairs)) is not None:
        for about in marked.filter((pl.col("key") == key) | (pl.col("duplicate_of") == key)).to_dicts():
            other, fate = (about["duplicate_of"], "kept") if about["key"] == key else (about["key"], "left out")
            found.append({"relation": f"has the same {about['by']} and is {fate}", "key": other})
    return found


def _image(work: Path, row: Mapping[str, Any]) -> Step:
    """What the table says of the image, where its bytes lie, and whether they are still the promised ones."""
    tar = work / schema.PAIRS / f"{row['key'][: schema.SHARD_DIGITS]}.tar"
    step: Step = {"where": tar.relative_to(work).as_posix(), "problems": []}
    step |= {name: row[name] for name in _OF_IMAGE if row.get(name) is not None}
    wanted = row.get("source_key") or row["key"]
    known = (*schema.IMAGE_EXTENSIONS, *schema.ADOPTED_EXTENSIONS)
    try:
        members = (m for m in tars.read_members(tar, extensions=None) if m.key == wanted and m.ext in known)
        if (member := next(members, None)) is None:
            step["problems"].append(f"the tar has no image with the key {wanted}")
            return step
        step |= {"member": member.name, "offset": member.offset, "stored_bytes": member.size_bytes}
        with tars.open_tar(tar) as file:
            data = tars.read_at(file, tar, member.offset, member.size_bytes)
        joined.check_image(data, tar, row["key"], row["sha256"])
    except UserError as error:
        step["problems"].append(str(error))
    return step


def _made(work: Path, folder: Path, key: str, row: Mapping[str, Any] | None) -> Step:
    """A row of a caption column or of scores, and ``made_by``, the metadata of its file."""
    step = _step(work, folder, key)
    if "absent" not in step:
        step["made_by"] = _metadata(work / step["where"])
        _check_inputs(work, folder, step, key, row)
    elif row is not None and row["status"] != schema.STATUS_SUCCESS:
        step["absent"] = trace_shards.no_image(row)
    return step
