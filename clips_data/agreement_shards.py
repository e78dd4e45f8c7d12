"""Whether training shards say of the same samples what their offset indexes, ``index.json`` and the pairs say."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from clips_data import agreement, ledger, measure, schema, tars

INDEX_FILE: Final = "index.json"
SIZES_FILE: Final = "sizes.json"
SPLITS: Final = ("train", "heldout")
_INDEX_COLUMNS: Final = (
    "key", "sha256", "image_ext", "image_offset", "image_bytes", "txt_offset", "txt_bytes", "json_offset", "json_bytes",
)  # fmt: skip


def shard_unit(folder: Path, name: str, *, deep: bool) -> Iterator[agreement.Problem]:
    """A tar of training shards against its offset index; with ``deep`` every member against its row."""
    path, tar = folder / f"{name}{agreement.INDEX}", folder / f"{name}.tar"
    rows = agreement.rows_of(path, _INDEX_COLUMNS)
    promised = ledger.read_sidecar(folder, name, check_files=False)
    assert promised is not None
    if (number := sum(promised.counts.values())) != len(rows):
        yield path, f"has {len(rows)} rows and its sidecar counts {number}"
    members = {member.name: member for member in tars.read_members(tar)}
    wrong, named = [], set()
    for place, row in enumerate(rows):
        for kind, ext in (("image", row["image_ext"]), ("txt", "txt"), ("json", "json")):
            member = members.get(f"{row['key']}.{ext}")
            named.add(f"{row['key']}.{ext}")
            found = None if member is None else (member.offset, member.size_bytes)
            if found != (row[f"{kind}_offset"], row[f"{kind}_bytes"]):
                wrong.append((place, row["key"], kind, row[f"{kind}_offset"], found))
    for text in agreement.first_of(
        wrong,
        len(rows),
        lambda w: f"row {w[0]} (key {w[1]}) has its {w[2]} at byte {w[3]}, the tar at {w[4] and w[4][0]}",
    ):
        yield path, text
    strangers = [member for name, member in members.items() if name not in named]
    for text in agreement.first_of(
        strangers, len(members), lambda m: f"at byte {m.offset} has {m.name!r}, which no row names"
    ):
        yield tar, text
    if deep and not wrong:
        yield from agreement.compare_images(
            tar, path, [(r["key"], r["sha256"], None, members[_image(r)]) for r in rows], deep=True
        )
        yield from _texts(tar, rows)


def _image(row: Mapping[str, Any]) -> str:
    return f"{row['key']}.{row['image_ext']}"


def _texts(tar: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[agreement.Problem]:
    """Members that are no JSON, are about another sample, or whose ``.txt`` is not the column that they name."""
    wrong = []
    with tars.open_tar(tar) as file:
        for row in rows:
            text = tars.read_at(file, tar, row["txt_offset"], row["txt_bytes"])
            if reason := _unlike(row, tars.read_at(file, tar, row["json_offset"], row["json_bytes"]), text):
                wrong.append((row["json_offset"], row["key"], reason))
    for said in agreement.first_of(wrong, len(rows), lambda w: f"at byte {w[0]} the .json member of key {w[1]} {w[2]}"):
        yield tar, said


def _unlike(row: Mapping[str, Any], data: bytes, text: bytes) -> str | None:
    about = agreement.parse(data)
    if isinstance(about, str):
        return about
    for name in ("key", "sha256"):
        if about.get(name) != row[name]:
            return f"is about {name} {about.get(name)} instead of {row[name]}"
    provenance = about.get("provenance")
    column = provenance.get("txt") if isinstance(provenance, dict) else None
    if column is not None and str(about.get(column)).encode() != text:
        return f"names {column!r} as what .txt holds, and that holds another text"
    return None


def whole(folder: Path, pairs: Path) -> Iterator[agreement.Problem]:
    """``index.json`` against the finished tars, and all samples of the folder against each other and the pairs."""
    finished = ledger.finished_units(folder)
    path = folder / INDEX_FILE
    if path.exists():
        try:
            index = json.loads(path.read_text())
            if index["schema_version"] != schema.SCHEMA_VERSION:
                yield path, f"has schema version {index['schema_version']}, this one reads {schema.SCHEMA_VERSION}"
                return
            shards_of = {name: index["splits"][name]["shards"] for name in SPLITS}
            named = [str(shard["file"]).removesuffix(".tar") for name in SPLITS for shard in shards_of[name]]
            totals = {name: index["splits"][name]["num_samples"] for name in SPLITS}
            digest = index["digest"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            yield path, f"is not an index that clips wrote ({type(error).__name__}: {error})"
            return
        for text in _unlike_index(folder, finished, named, shards_of, totals, digest):
            yield path, text
        yield from _unlike_sizes(
            folder, {shard["file"]: shard["num_samples"] for s in SPLITS for shard in shards_of[s]}
        )
    yield from _samples(folder, finished, pairs)


def _unlike_index(
    folder: Path,
    finished: Sequence[str],
    named: Sequence[str],
    shards_of: Mapping[str, Sequence[Mapping[str, Any]]],
    totals: Mapping[str, int],
    digest: str,
) -> Iterator[str]:
    if twice := [unit for unit, number in Counter(named).items() if number > 1]:
        yield f"names {twice[0]}.tar more than once"
    if absent := [unit for unit in named if unit not in set(finished)]:
        yield f"names {absent[0]}.tar, which is not finished"
        return
    for name in SPLITS:
        for shard in shards_of[name]:
            unit = str(shard["file"]).removesuffix(".tar")
            sidecar = ledger.read_sidecar(folder, unit, check_files=False)
            assert sidecar is not None
            real = {"num_samples": sum(sidecar.counts.values()), **sidecar.files.get(f"{unit}.tar", {})}
            for field, value in real.items():
                if shard.get(field) != value:
                    yield f"promises {unit}.tar with {field} {shard.get(field)}, and its sidecar says {value}"
        if totals[name] != sum(shard["num_samples"] for shard in shards_of[name]):
            yield f"promises {totals[name]} {name} samples, and its tars have another number"
    if digest != ledger.digest_json([shard["sha256"] for name in SPLITS for shard in shards_of[name]]):
        yield "has a digest that is not the one of the tars that it names"


def _unlike_sizes(folder: Path, num_samples: Mapping[str, int]) -> Iterator[agreement.Problem]:
    path = folder / SIZES_FILE
    if not path.exists():
        return
    try:
        sizes = json.loads(path.read_text())
    except ValueError:
        yield path, "is no JSON"
        return
    if not isinstance(sizes, dict) or any(sizes.get(file, number) != number for file, number in num_samples.items()):
        yield path, f"promises other numbers of samples than {INDEX_FILE}"


def _samples(folder: Path, finished: Sequence[str], pairs: Path) -> Iterator[agreement.Problem]:
    """Keys that are there twice, images on both sides of the held-out split, samples unlike those of the pairs.

    In passes that each see the rows of their share of the hashes, so memory is bounded.
    """
    import polars as pl

    columns = dict.fromkeys(("key", "sha256"), pl.String)
    rows = pl.concat(
        measure.scan(folder, [f"{unit}.index" for unit in finished if unit.startswith(side)], columns).with_columns(
            pl.lit(side).alias("side")
        )
        for side in SPLITS
    )
    units = ledger.finished_units(pairs)
    listed = measure.scan(pairs, units, {**columns, "status": pl.String})
    listed = listed.filter(pl.col("status") == schema.STATUS_SUCCESS).select("key", pl.col("sha256").alias("wanted"))
    is_listed = pl.col("key").str.head(schema.SHARD_DIGITS).is_in(units)
    passes = -(-measure.num_rows(folder, rows) // measure.ROWS_AT_ONCE)
    found: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for number in range(passes):
        keys, hashes = (rows.filter(pl.col(name).hash() % passes == number) for name in ("key", "sha256"))
        same = listed.filter(pl.col("key").hash() % passes == number)
        compared = keys.filter(is_listed).join(same, on="key", how="left")
        twice, absent, other, leaked = measure.collect(
            folder,
            keys.group_by("key").len().filter(pl.col("len") > 1).sort("key"),
            compared.filter(pl.col("wanted").is_null()).sort("key"),
            compared.filter(pl.col("wanted") != pl.col("sha256")).sort("key"),
            hashes.group_by("sha256").agg(pl.col("side").n_unique(), pl.col("key").min())
            .filter(pl.col("side") > 1).sort("key"),
        )  # fmt: skip
        for what, table in (
            ("keys are in its tars more than once", twice),
            ("keys of its tars have no image in the pairs", absent),
            ("keys of its tars have another image in the pairs", other),
            ("images are both in train and in heldout", leaked),
        ):
            if len(table):
                found[what] += len(table)
                examples.setdefault(what, table["key"][0])
    for what, number in found.items():
        yield folder, f"{number} {what}; the first is {examples[what]}"


def is_indexed(folder: Path) -> bool:
    """Whether ``index.json`` names all finished tars; else the run that makes them was stopped. A damaged one does."""
    path = folder / INDEX_FILE
    if not path.exists():
        return False
    try:
        splits = json.loads(path.read_text())["splits"]
        named = {shard["file"] for name in SPLITS for shard in splits[name]["shards"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        return True  # which ``whole`` tells
    return all(f"{unit}.tar" in named for unit in ledger.finished_units(folder))
