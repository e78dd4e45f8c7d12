"""Whether finished files that are each what was promised also say the same of the same samples.

Hashes find what changed after it was finished. What was wrong from the start, or was made from a file that is another
one by now, shows only between files: tables against their tars, columns and scores against the pairs, training shards
against their indexes, ``index.json`` and the pairs, a checkpoint against its own header.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from clips_data import ledger, measure, schema, tars
from clips_data.errors import UserError

Problem = tuple[Path, str]
"""A file and a sentence about it."""

INDEX: Final = ".index.parquet"
INDEX_FILE: Final = "index.json"
SIZES_FILE: Final = "sizes.json"
SPLITS: Final = ("train", "heldout")
_IMAGES: Final = (*schema.IMAGE_EXTENSIONS, *schema.ADOPTED_EXTENSIONS)
_PAIRS: Final = ("key", "status", "code", "sha256")
_INDEX_COLUMNS: Final = (
    "key", "sha256", "image_ext", "image_offset", "image_bytes", "txt_offset", "txt_bytes", "json_offset", "json_bytes",
)  # fmt: skip
_WEIGHTS, _STATE, _ABOUT = "model.safetensors", "state.pt", "checkpoint.json"


class Disagreement(Exception):
    """A table cannot be compared at all; its text is the reason."""


def unit(folder: Path, name: str, files: Iterable[str], pairs: Path, *, deep: bool) -> Iterator[Problem]:
    """What is contradictory about one finished unit, told by the names of its ``files``; nothing for other units.

    ``pairs`` are those that a table of captions or scores is about. ``deep`` also reads the members of the tars:
    images by their sha256, texts as JSON.
    """
    known, table = set(files), folder / f"{name}.parquet"
    index = folder / f"{name}{INDEX}"
    path = index if index.name in known else table
    try:
        if index.name in known:
            yield from _shard(folder, name, deep=deep)
        elif {f"{name}.tar", table.name} <= known:
            yield from _pairs(folder, name, deep=deep)
        elif table.name in known and folder.parent.name in (schema.CAPTIONS, schema.SCORES):
            yield from _table(folder, name, pairs)
    except Disagreement as reason:
        yield path, str(reason)
    except UserError as error:  # a tar that cannot be walked; where, its own sentence says
        yield path.with_name(f"{name}.tar"), str(error)


# --- tables -----------------------------------------------------------------------------------------------------------


def _rows(path: Path, needed: Sequence[str], wanted: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows with the ``needed`` columns, and of the ``wanted`` ones those that there are. Keys are checked."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            there = file.schema_arrow.names
            if missing := [name for name in needed if name not in there]:
                raise Disagreement(f"has no column {', '.join(map(repr, missing))}")
            table = file.read(columns=[name for name in (*needed, *wanted) if name in there])
            if not pa.types.is_string(kind := table.schema.field("key").type) and not pa.types.is_large_string(kind):
                raise Disagreement(f"has keys that are {kind} and not text")
            rows: list[dict[str, Any]] = table.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise Disagreement(f"cannot be read: {(str(error).splitlines() or [''])[0]}") from None
    seen: dict[str, int] = {}
    for number, row in enumerate(rows):
        if row["key"] is None:
            raise Disagreement(f"row {number} has no key")
        if row["key"] in seen:
            raise Disagreement(f"rows {seen[row['key']]} and {number} both have key {row['key']}")
        seen[row["key"]] = number
    return rows


def _first(found: Sequence[Any], of: int, text: Callable[[Any], str]) -> Iterator[str]:
    """``3 of 7 …; the first: …``"""
    if found:
        more = f" ({len(found)} of {of}; this is the first)" if len(found) > 1 else ""
        yield text(found[0]) + more


def _unlike_counts(path: Path, counts: Mapping[str, int], name: str) -> Iterator[Problem]:
    promised = ledger.read_sidecar(path.parent, name, check_files=False)
    assert promised is not None
    if dict(promised.counts) != dict(counts):
        yield path, f"its rows are {dict(counts)} by code and its sidecar counts {dict(promised.counts)}"


def _pairs(folder: Path, name: str, *, deep: bool) -> Iterator[Problem]:
    path, tar = folder / f"{name}.parquet", folder / f"{name}.tar"
    rows = _rows(path, _PAIRS, ("image_ext", "bytes", "source_key"))
    yield from _unlike_counts(path, Counter(row["code"] for row in rows), name)
    strangers = [row["key"] for row in rows if not row["key"].startswith(name)]
    for text in _first(strangers, len(rows), lambda key: f"key {key} is not one of shard {name}"):
        yield path, text
    images = {member.key: member for member in tars.read_members(tar, extensions=None) if member.ext in _IMAGES}
    good = [row for row in rows if row["status"] == schema.STATUS_SUCCESS]
    place = {row["key"]: row.get("source_key") or row["key"] for row in good}
    absent = [row["key"] for row in good if place[row["key"]] not in images]
    for text in _first(absent, len(good), lambda key: f"holds no image of key {key}, which {path.name} has"):
        yield tar, text
    strange = sorted(set(images) - set(place.values()))
    for text in _first(
        strange, len(images), lambda key: f"at byte {images[key].offset} has an image {key!r} without row"
    ):
        yield tar, text
    there = [(row, images[place[row["key"]]]) for row in good if place[row["key"]] in images]
    yield from _images(tar, path, [(row["key"], row["sha256"], row.get("bytes"), m) for row, m in there], deep=deep)


def _images(
    tar: Path, table: Path, images: Sequence[tuple[str, str, int | None, tars.Member]], *, deep: bool
) -> Iterator[Problem]:
    sizes = [(key, size, m) for key, _, size, m in images if size is not None and size != m.size_bytes]
    for text in _first(
        sizes, len(images), lambda w: f"at byte {w[2].offset} key {w[0]} has {w[2].size_bytes} bytes, not {w[1]}"
    ):
        yield tar, f"{text}, as {table.name} says"
    if not deep:
        return
    wrong = []
    with tars.open_tar(tar) as file:
        for key, sha256, _, member in images:
            found = ledger.digest_bytes(tars.read_at(file, tar, member.offset, member.size_bytes))
            if found != sha256:
                wrong.append((key, member.offset, found, sha256))
    for text in _first(
        wrong, len(images), lambda w: f"at byte {w[1]} the image of key {w[0]} has sha256 {w[2]}, not {w[3]}"
    ):
        yield tar, f"{text}, as {table.name} says"


def _table(folder: Path, name: str, pairs: Path) -> Iterator[Problem]:
    """A shard of captions or scores against the successful rows of the pairs."""
    path, beside = folder / f"{name}.parquet", pairs / f"{name}.parquet"
    rows = _rows(path, ("key", "sha256"), ("code",))
    if rows and "code" in rows[0] and folder.parent.name == schema.CAPTIONS:
        yield from _unlike_counts(path, Counter(row["code"] for row in rows), name)
    if not ledger.sidecar_path(pairs, name).exists():
        yield path, f"is about shard {name} of the pairs, which is not there"
        return
    try:
        listed = _rows(beside, _PAIRS)
    except Disagreement:
        return  # told where the pairs are looked at
    images = {row["key"]: row["sha256"] for row in listed if row["status"] == schema.STATUS_SUCCESS}
    known = {row["key"]: row["sha256"] for row in rows}
    for absent, of, what in (
        ([key for key in images if key not in known], len(images), "lacks key {}, which the pairs have"),
        ([key for key in known if key not in images], len(known), "has key {}, of which the pairs have no image"),
    ):
        for text in _first(absent, of, what.format):
            yield path, text
    wrong = [key for key in known if key in images and known[key] != images[key]]
    for text in _first(
        wrong, len(known), lambda key: f"key {key} is about image {known[key]}, and the pairs have {images[key]}"
    ):
        yield path, text


# --- training shards --------------------------------------------------------------------------------------------------


def _shard(folder: Path, name: str, *, deep: bool) -> Iterator[Problem]:
    """A tar of training shards against its offset index; with ``deep`` every member against its row."""
    path, tar = folder / f"{name}{INDEX}", folder / f"{name}.tar"
    rows = _rows(path, _INDEX_COLUMNS)
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
    for text in _first(
        wrong,
        len(rows),
        lambda w: f"row {w[0]} (key {w[1]}) has its {w[2]} at byte {w[3]}, the tar at {w[4] and w[4][0]}",
    ):
        yield path, text
    strangers = [member for name, member in members.items() if name not in named]
    for text in _first(strangers, len(members), lambda m: f"at byte {m.offset} has {m.name!r}, which no row names"):
        yield tar, text
    if deep and not wrong:
        yield from _images(tar, path, [(r["key"], r["sha256"], None, members[_image(r)]) for r in rows], deep=True)
        yield from _texts(tar, rows)


def _image(row: Mapping[str, Any]) -> str:
    return f"{row['key']}.{row['image_ext']}"


def _texts(tar: Path, rows: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """Members that are no JSON, are about another sample, or whose ``.txt`` is not the column that they name."""
    wrong = []
    with tars.open_tar(tar) as file:
        for row in rows:
            text = tars.read_at(file, tar, row["txt_offset"], row["txt_bytes"])
            if reason := _unlike(row, tars.read_at(file, tar, row["json_offset"], row["json_bytes"]), text):
                wrong.append((row["json_offset"], row["key"], reason))
    for said in _first(wrong, len(rows), lambda w: f"at byte {w[0]} the .json member of key {w[1]} {w[2]}"):
        yield tar, said


def parse(data: bytes) -> dict[str, Any] | str:
    """A ``.json`` member, or why it is none: clips writes one object, no name twice, no NaN, no half characters."""
    try:
        about = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
        json.dumps(about, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return f"is no JSON that clips wrote ({type(error).__name__})"
    return about if isinstance(about, dict) else "is no JSON object"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _unlike(row: Mapping[str, Any], data: bytes, text: bytes) -> str | None:
    about = parse(data)
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


def shards(folder: Path, pairs: Path) -> Iterator[Problem]:
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


def _unlike_sizes(folder: Path, num_samples: Mapping[str, int]) -> Iterator[Problem]:
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


def _samples(folder: Path, finished: Sequence[str], pairs: Path) -> Iterator[Problem]:
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


# --- runs -------------------------------------------------------------------------------------------------------------


def checkpoints(run: Path) -> Iterator[Problem]:
    """Checkpoints of a training run that are cut or damaged, as far as their own headers and checksums tell."""
    pointer = run / "checkpoints" / "latest"
    if pointer.is_file() and not (named := pointer.parent / pointer.read_text(errors="replace").strip()).is_dir():
        yield pointer, f"names {named.name}, which is not there"
    for folder in sorted((run / "checkpoints").glob("step-*")):
        if folder.name.endswith(ledger.PART):
            continue
        for name, problem_of in ((_WEIGHTS, _of_weights), (_STATE, _of_state), (_ABOUT, _of_about)):
            path = folder / name
            if reason := problem_of(path) if path.is_file() else "is missing":
                yield path, reason


def _of_weights(path: Path) -> str | None:
    """The header of safetensors says where each tensor ends; the last one ends where the file does."""
    size_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > size_bytes - 8:
                return f"has a header of {header_bytes} bytes in a file of {size_bytes}"
            header = json.loads(file.read(header_bytes))
        end = max((int(about["data_offsets"][1]) for n, about in header.items() if n != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"has a damaged header ({type(error).__name__})"
    wanted = 8 + header_bytes + end
    return None if size_bytes == wanted else f"has {size_bytes} bytes, and its tensors end at byte {wanted}"


def _of_state(path: Path) -> str | None:
    """torch writes zip archives, whose members have checksums. Nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"is damaged: {error}"
    return None if damaged is None else f"has a damaged member {damaged}"


def _of_about(path: Path) -> str | None:
    try:
        about = json.loads(path.read_text())
        version, step = about["schema_version"], int(about["step"])
    except (ValueError, KeyError, TypeError):
        return "is not what clips wrote"
    if version != schema.SCHEMA_VERSION:
        return f"has schema version {version}, this version of clips reads {schema.SCHEMA_VERSION}"
    wanted = f"step-{step:08d}"
    return None if path.parent.name == wanted else f"is of step {step} and lies in {path.parent.name}"
