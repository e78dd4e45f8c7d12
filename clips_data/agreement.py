"""Whether finished files that are each what was promised also say the same of the same samples: pairs and tables.

Hashes find what changed after it was finished. What was wrong from the start, or was made from a file that is another
one by now, shows only between files: tables against their tars, columns and scores against the pairs.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from clips_data import ledger, schema, tars

Problem = tuple[Path, str]
"""A file and a sentence about it."""

INDEX: Final = ".index.parquet"
"""What follows the unit's name in the name of a training tar's offset index."""
IMAGES: Final = (*schema.IMAGE_EXTENSIONS, *schema.ADOPTED_EXTENSIONS)
_PAIRS: Final = ("key", "status", "code", "sha256")


class Disagreement(Exception):
    """A table cannot be compared at all; its text is the reason."""


def rows_of(path: Path, needed: Sequence[str], wanted: Sequence[str] = ()) -> list[dict[str, Any]]:
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


def first_of(found: Sequence[Any], of: int, text: Callable[[Any], str]) -> Iterator[str]:
    """``3 of 7 …; the first: …``"""
    if found:
        more = f" ({len(found)} of {of}; this is the first)" if len(found) > 1 else ""
        yield text(found[0]) + more


def _unlike_counts(path: Path, counts: Mapping[str, int], name: str) -> Iterator[Problem]:
    promised = ledger.read_sidecar(path.parent, name, check_files=False)
    assert promised is not None
    if dict(promised.counts) != dict(counts):
        yield path, f"its rows are {dict(counts)} by code and its sidecar counts {dict(promised.counts)}"


def pairs_unit(folder: Path, name: str, *, deep: bool) -> Iterator[Problem]:
    path, tar = folder / f"{name}.parquet", folder / f"{name}.tar"
    rows = rows_of(path, _PAIRS, ("image_ext", "bytes", "source_key"))
    yield from _unlike_counts(path, Counter(row["code"] for row in rows), name)
    strangers = [row["key"] for row in rows if not row["key"].startswith(name)]
    for text in first_of(strangers, len(rows), lambda key: f"key {key} is not one of shard {name}"):
        yield path, text
    images = {member.key: member for member in tars.read_members(tar, extensions=None) if member.ext in IMAGES}
    good = [row for row in rows if row["status"] == schema.STATUS_SUCCESS]
    place = {row["key"]: row.get("source_key") or row["key"] for row in good}
    absent = [row["key"] for row in good if place[row["key"]] not in images]
    for text in first_of(absent, len(good), lambda key: f"holds no image of key {key}, which {path.name} has"):
        yield tar, text
    strange = sorted(set(images) - set(place.values()))
    for text in first_of(
        strange, len(images), lambda key: f"at byte {images[key].offset} has an image {key!r} without row"
    ):
        yield tar, text
    there = [(row, images[place[row["key"]]]) for row in good if place[row["key"]] in images]
    yield from compare_images(
        tar, path, [(row["key"], row["sha256"], row.get("bytes"), m) for row, m in there], deep=deep
    )


def compare_images(
    tar: Path, table: Path, images: Sequence[tuple[str, str, int | None, tars.Member]], *, deep: bool
) -> Iterator[Problem]:
    sizes = [(key, size, m) for key, _, size, m in images if size is not None and size != m.size_bytes]
    for text in first_of(
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
    for text in first_of(
        wrong, len(images), lambda w: f"at byte {w[1]} the image of key {w[0]} has sha256 {w[2]}, not {w[3]}"
    ):
        yield tar, f"{text}, as {table.name} says"


def table_unit(folder: Path, name: str, pairs: Path) -> Iterator[Problem]:
    """A shard of captions or scores against the successful rows of the pairs."""
    path, beside = folder / f"{name}.parquet", pairs / f"{name}.parquet"
    rows = rows_of(path, ("key", "sha256"), ("code",))
    if rows and "code" in rows[0] and folder.parent.name == schema.CAPTIONS:
        yield from _unlike_counts(path, Counter(row["code"] for row in rows), name)
    if not ledger.sidecar_path(pairs, name).exists():
        yield path, f"is about shard {name} of the pairs, which is not there"
        return
    try:
        listed = rows_of(beside, _PAIRS)
    except Disagreement:
        return  # told where the pairs are looked at
    images = {row["key"]: row["sha256"] for row in listed if row["status"] == schema.STATUS_SUCCESS}
    known = {row["key"]: row["sha256"] for row in rows}
    for absent, of, what in (
        ([key for key in images if key not in known], len(images), "lacks key {}, which the pairs have"),
        ([key for key in known if key not in images], len(known), "has key {}, of which the pairs have no image"),
    ):
        for text in first_of(absent, of, what.format):
            yield path, text
    wrong = [key for key in known if key in images and known[key] != images[key]]
    for text in first_of(
        wrong, len(known), lambda key: f"key {key} is about image {known[key]}, and the pairs have {images[key]}"
    ):
        yield path, text


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
