"""The right half of a lineage: a sample's places in training shards, why its text is that, and who trained on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from clips_data import duplicates, joined, ledger, measure, schema, shard_index, tars
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.forget_plan import inputs_of_shards, shard_folders, tables
from clips_data.forget_traces import seen_by, shown_in
from clips_data.forgotten import forgotten
from clips_data.mixing import Mix
from clips_data.rewrite import FORGOTTEN
from clips_data.shard_index import INDEX_FILE

Step = dict[str, Any]
INDEX: Final = ".index.parquet"


def folders(work: Path) -> list[Path]:
    """Folders of training shards under ``work``, ``shards/`` itself also where nothing in it is finished."""
    found = shard_folders(work)
    return found if found or not (work / schema.SHARDS).is_dir() else [work / schema.SHARDS]


def places(work: Path, key: str, row: Mapping[str, Any] | None, texts: Mapping[str, str]) -> list[Step]:
    """One step for each folder of training shards: the sample's place and texts there, or why it has none.

    ``row`` is its row of ``pairs/``, ``texts`` its usable captions as they are now; the shards are compared with both.
    """
    found = []
    for folder in folders(work):
        step: Step = {"where": folder.relative_to(work).as_posix(), "problems": []}
        try:
            unit = _unit_of(folder, key)
            if unit is None:
                step["absent"] = _why_absent(work, folder, key, row, texts)
            else:
                step |= _sample(folder, unit, key)
                _compare(step, row, texts)
                step["problems"] += _changed_inputs(work, folder, unit)
                shard_index.read(folder)  # a damaged one is told, too
        except UserError as error:
            step["problems"].append(str(error))
            if "split" not in step:
                step["absent"] = "it cannot be read"
        found.append(step)
    return found


def _unit_of(folder: Path, key: str) -> str | None:
    """The finished tar of ``folder`` that holds the sample."""
    import polars as pl

    files = [folder / f"{unit}{INDEX}" for unit in ledger.finished_units(folder)]
    if not files:
        return None
    scanned = pl.scan_parquet(files, glob=False, include_file_paths="file").filter(pl.col("key") == key)
    (rows,) = measure.collect(folder, scanned.select("file"))
    return Path(rows["file"][0]).name.removesuffix(INDEX) if len(rows) else None


# --- where it is ------------------------------------------------------------------------------------------------------


def _sample(folder: Path, unit: str, key: str) -> Step:
    """``split, tar, row, sha256, txt, texts, sub_captions, scores, provenance`` of the sample, as the tar has them."""
    sidecar = ledger.read_sidecar(folder, unit)
    assert sidecar is not None
    index = joined.read_table(folder / f"{unit}{INDEX}").with_row_index("row")
    (place,) = index.filter(index["key"] == key).head(1).to_dicts()
    tar = folder / f"{unit}.tar"
    with tars.open_tar(tar) as file:
        about = json.loads(tars.read_at(file, tar, place["json_offset"], place["json_bytes"]))
        image = tars.read_at(file, tar, place["image_offset"], place["image_bytes"])
        text = tars.read_at(file, tar, place["txt_offset"], place["txt_bytes"]).decode()
    joined.check_image(image, tar, key, place["sha256"])
    config = ShardConfig(**sidecar.config)
    texts = {column: about[column] for column in config.columns}
    return {
        "split": unit.partition("-")[0],
        "tar": tar.name,
        "row": place["row"],
        "image_offset": place["image_offset"],
        "sha256": place["sha256"],
        "txt": {"text": text, **_choice(config, key, about)},
        "texts": texts,
        "split_rule": config.split,
        "sub_captions": {
            column: [{"start": start, "end": end, "text": about[column][start:end]} for start, end in spans]
            for column, spans in about["sub_captions"].items()
        },
        "scores": about["scores"],
        "provenance": about["provenance"],
        "tool_version": sidecar.tool_version,
    }


def _choice(config: ShardConfig, key: str, about: Mapping[str, Any]) -> Step:
    """The column that ``.txt`` holds and ``why``: the draw of the mix, and what stood in for an empty caption."""
    mix = Mix.of(config.web_ratio, config.columns, config.mix, config.replace_below)
    choice = mix.choose(seed=config.seed, epoch=0, key=key, texts=about, scores=about["scores"])
    if len(config.columns) == 1:
        why = f"{joined.WEB} is the only column"
    else:
        why = f"the draw {choice.draw:.4f} in {mix.rules[choice.rule].text!r} asks for {choice.wanted}"
        if choice.column != choice.wanted:
            code = about["provenance"].get("codes", {}).get(choice.wanted, "ok")
            said = f" (code {code})" if code != "ok" else ""
            why += f"; that is empty{said}, so {choice.column} stands in"
    rule = mix.rules[choice.rule].text
    return {"column": choice.column, "outcome": choice.outcome, "draw": choice.draw, "rule": rule, "why": why}


def no_image(row: Mapping[str, Any]) -> str:
    """Why a row of the pairs, which did not succeed, is nowhere else."""
    if row["code"] == FORGOTTEN:
        return "it was removed by `clips forget`"
    return "the download failed, so there is no image"


def _why_absent(work: Path, folder: Path, key: str, row: Mapping[str, Any] | None, texts: Mapping[str, str]) -> str:
    if not (folder / INDEX_FILE).exists():
        return "it is in none of the tars here, and not all of them are finished"
    if row is None:
        return "it is in none of the tars here"
    if row["status"] != schema.STATUS_SUCCESS:
        return no_image(row)
    marked = duplicates.read(work / schema.PAIRS)
    repeats = marked.filter(marked["key"] == key)["duplicate_of"].to_list() if marked is not None else []
    if repeats:
        return f"left out, as it has the same image as {repeats[0]}"
    columns = (shard_index.read(folder) or {}).get("columns", [])
    if not any(texts.get(column) for column in columns):
        return f"dropped, as none of the columns {', '.join(columns)} has a usable caption for it"
    unit = key[: schema.SHARD_DIGITS]
    for generation, units in zip(shard_index.finished(folder), shard_index.generations(folder), strict=False):
        if unit in units and (filters := [name for name, number in generation.removed if number]):
            return f"left out by a filter: {' or '.join(filters)}"
    return "it is in none of the tars here: they were made from other shards of pairs, or before it had a caption"


# --- whether it still fits --------------------------------------------------------------------------------------------


def _compare(step: Step, row: Mapping[str, Any] | None, texts: Mapping[str, str]) -> None:
    """Adds to the problems what the sample has otherwise than the stages on its left have it now."""
    if row is not None and row.get("sha256") != step["sha256"]:
        step["problems"].append(
            f"its image (sha256 {step['sha256']}) is another one than pairs has now ({row.get('sha256')})"
        )
    for column, text in step["texts"].items():
        if column in texts and texts[column] != text:
            now = "is rejected or empty" if not texts[column] else "reads otherwise"
            step["problems"].append(f"its {column} caption {now} by now; the tar keeps the one that it was made with")


def _changed_inputs(work: Path, folder: Path, unit: str) -> list[str]:
    """What the tar was made from and is not there any more.

    Older folders do not record which shards of ``pairs/`` they were made from, so the digests are tried for all of them
    and for those that their keys come from.
    """
    sidecar = ledger.read_sidecar(folder, unit, check_files=False)
    assert sidecar is not None
    digests = {schema.PAIRS: ledger.digests_of(work / schema.PAIRS)}
    digests |= {table.relative_to(work).as_posix(): ledger.digests_of(table) for table in tables(work)}
    every = list(digests[schema.PAIRS])
    if not every:
        return []
    made_from = [units for units in shard_index.generations(folder) if set(units) <= set(every)]
    made_from = made_from or [every, sorted(_units_used(folder, every))]
    tried = (inputs_of_shards(work, units, digests) for units in made_from)
    now = min(tried, key=lambda found: len(_changed(sidecar.inputs, found)))
    return [
        f"{name} is not there, or not whole, any more"
        if name not in now
        else f"{name} has other contents now than when this folder was made"
        for name in _changed(sidecar.inputs, now)
    ]


def _changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Folders whose digest is another; what filters read beside them is no folder."""
    folders = (schema.PAIRS, f"{schema.CAPTIONS}/", f"{schema.SCORES}/", "left_out")
    return [name for name, digest in before.items() if name.startswith(folders) and now.get(name) != digest]


def _units_used(folder: Path, every: Sequence[str]) -> set[str]:
    import polars as pl

    files = [folder / f"{unit}{INDEX}" for unit in ledger.finished_units(folder)]
    keys = pl.scan_parquet(files, glob=False).select(pl.col("key").str.head(schema.SHARD_DIGITS).unique())
    return set(measure.collect(folder, keys)[0]["key"]).intersection(every)


# --- who saw it -------------------------------------------------------------------------------------------------------


def seen(work: Path, key: str, row: Mapping[str, Any] | None, steps: list[Step]) -> dict[str, Any]:
    """``runs`` that were trained on the sample's shards, and the texts of runs that name its key, ``shown_in``.

    A run has the ``shards`` folder that it was trained on and ``split``, the sample's split there: what is held out was
    not trained on. ``shards`` is ``None`` where a run's shards are not here any more, so that it may have seen the
    sample or not.
    """
    folder_of = {digest: step for step in steps if (digest := _digest(work / step["where"])) is not None}
    nothing = dict.fromkeys(folder_of, 0)
    lineage = forgotten(work / schema.PAIRS).lineage
    runs = []
    for digest, step in folder_of.items():
        if "absent" not in step:
            about = {"shards": step["where"], "split": step["split"]}
            runs += [
                {**asdict(run), **about} for run in seen_by(work, nothing | {digest: 1}, lineage) if run.num_samples
            ]
    if row is None or row["status"] == schema.STATUS_SUCCESS:
        unknown = [run for run in seen_by(work, nothing, lineage) if run.num_samples is None]
        runs += [{**asdict(run), "shards": None, "split": None} for run in unknown]
    for run in runs:
        del run["num_samples"]
    return {"runs": runs, "shown_in": shown_in(work, {key})}


def _digest(folder: Path) -> str | None:
    try:
        return (shard_index.read(folder) or {}).get("digest")
    except UserError:  # told in the folder's step
        return None
