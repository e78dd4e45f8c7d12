"""What ``clips forget`` will do: which rows match, where their samples are, and every digest that will change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from clips_data import duplicates, embeddings, joined, ledger, rewrite, schema, shard_index, tars
from clips_data.errors import UserError
from clips_data.forget_traces import SeenBy, seen_by
from clips_data.forgotten import Forgotten, forgotten, url_digest
from clips_data.shard_index import INDEX_FILE
from clips_data.verify import problem_with

_IDENTITY: Final = frozenset(
    ("key", "status", "code", "url", "final_url", "host", "sha256", "raw_sha256", "retry_of", "duplicate_of")
)


@dataclass(frozen=True)
class Plan:
    """All that has to be known to begin, or to complete, one removal. Folders are relative to the work folder."""

    keys: list[str]
    touched: dict[str, list[str]]
    """Folder → its units that hold some of the keys."""
    digests: dict[str, dict[str, str]]
    """Folder of pairs, captions, scores or ``shards/`` → unit → digest, before anything was changed."""
    unit_sets: list[list[str]]
    """Sets of pairs units that training shards may have been made from, and for each …"""
    inputs: list[dict[str, str]]
    """… the digests that such shards know their inputs by."""
    shards: dict[str, str]
    """Folder of finished training shards → the digest of its index."""
    removed: dict[str, tuple[int, int]]
    seen_by: list[SeenBy]
    originals: list[str]


# --- which rows -------------------------------------------------------------------------------------------------------


@dataclass
class Matching:
    """The keys of the rows to empty, and the digests of those of their URLs that ``wanted`` does not name itself."""

    keys: set[str] = field(default_factory=set)
    urls: set[str] = field(default_factory=set)
    num_rows: int = 0
    num_images: int = 0
    num_images_gone: int = 0


def match(pairs: Path, wanted: Forgotten) -> Matching:
    """The rows of ``pairs/`` that are wanted and not forgotten yet."""
    found, roots = Matching(), set()
    for row in _identities(pairs):
        found.num_rows += 1
        found.num_images += row["status"] == schema.STATUS_SUCCESS
        if row["code"] != rewrite.FORGOTTEN and _is_wanted(row, wanted):
            _take(row, wanted, found)
            roots.add(row["retry_of"] or row["key"])
    # Other tries of a URL, and other rows with it, have no hash of the image that came of it.
    for row in _identities(pairs) if wanted.images and roots else ():
        related = row["retry_of"] in roots or row["key"] in roots or row["duplicate_of"] in roots
        if related and row["code"] != rewrite.FORGOTTEN and row["key"] not in found.keys:
            _take(row, wanted, found)
    return found


def _identities(pairs: Path) -> Iterator[dict[str, Any]]:
    for unit in ledger.finished_units(pairs):
        for row in rewrite.read_parquet(pairs / f"{unit}.parquet", _IDENTITY).to_pylist():
            yield {**dict.fromkeys(_IDENTITY), **row}


def _is_wanted(row: Mapping[str, Any], wanted: Forgotten) -> bool:
    """By the URL of the list or the one that redirects ended at, by the stored or the downloaded bytes."""
    if row["host"] and wanted.has_host(row["host"]):
        return True
    return wanted.matches(row["url"], row["sha256"]) or wanted.matches(row["final_url"], row["raw_sha256"])


def _take(row: Mapping[str, Any], wanted: Forgotten, found: Matching) -> None:
    found.keys.add(row["key"])
    found.num_images_gone += row["status"] == schema.STATUS_SUCCESS
    if row["url"] and not wanted.matches(row["url"]):
        found.urls.add(url_digest(row["url"]))


# --- the plan ---------------------------------------------------------------------------------------------------------


def draw_plan(work: Path, matching: Matching) -> Plan:
    """Where the keys are, and every digest that will be another one."""
    pairs, gone = work / schema.PAIRS, matching.keys
    touched = {schema.PAIRS: sorted({_unit_of(key) for key in gone})}
    digests = {schema.PAIRS: ledger.digests_of(pairs)}
    removed = {
        "pairs rows": (len(gone), matching.num_rows),
        "pairs images": (matching.num_images_gone, matching.num_images),
    }
    for folder in tables(work):
        name = folder.relative_to(work).as_posix()
        digests[name] = ledger.digests_of(folder)
        holds = {
            unit: gone & _keys(folder / f"{unit}.parquet") for unit in touched[schema.PAIRS] if unit in digests[name]
        }
        touched[name] = [unit for unit, keys in holds.items() if keys]
        removed[name] = sum(map(len, holds.values())), _num_rows(folder)
        for path in journals(folder):
            rows = [row["key"] for row in rewrite.read_journal(path)[1:]]
            removed[path.relative_to(work).as_posix()] = len(gone.intersection(rows)), len(rows)
    used, in_training, shards = set(), {}, {}
    generations: list[list[str]] = []
    for folder in shard_folders(work):
        name = folder.relative_to(work).as_posix()
        keys_of = {unit: _keys(folder / f"{unit}.index.parquet") for unit in ledger.finished_units(folder)}
        used |= {_unit_of(key) for keys in keys_of.values() for key in keys}
        touched[name] = [unit for unit, keys in keys_of.items() if gone & keys]
        removed[name] = sum(len(gone & keys) for keys in keys_of.values()), sum(map(len, keys_of.values()))
        generations += shard_index.generations(folder)
        if (folder / INDEX_FILE).exists():
            shards[name] = json.loads((folder / INDEX_FILE).read_text())["digest"]
            in_training[shards[name]] = sum(
                len(gone & keys) for unit, keys in keys_of.items() if unit.startswith("train-")
            )
    for name, units in touched.items():
        _check_intact(work / name, units)
    every = list(digests[schema.PAIRS])
    digests[schema.SHARDS] = ledger.digests_of(work / schema.SHARDS)
    for folder in embeddings.folders(work):
        name = folder.relative_to(work).as_posix()
        files = {unit: folder / (unit + embeddings.SUFFIX) for unit in ledger.finished_units(folder)}
        keys_of = {unit: set(embeddings.read(file).keys()) for unit, file in files.items()}
        touched[name] = [unit for unit, keys in keys_of.items() if gone & keys]
        removed[name] = sum(len(gone & keys) for keys in keys_of.values()), sum(map(len, keys_of.values()))
    # Folders that tell their generations were made from these; older ones from all shards, or those of their samples.
    unit_sets = [units for units in (every, sorted(used.intersection(every)), *generations) if units]
    unit_sets = [units for units in unit_sets if digests[schema.PAIRS].keys() >= {*units}]
    return Plan(
        keys=sorted(gone),
        touched=touched,
        digests=digests,
        unit_sets=unit_sets,
        inputs=[inputs_of_shards(work, units, digests) for units in unit_sets],
        shards=shards,
        removed=removed,
        seen_by=seen_by(work, in_training, forgotten(pairs).lineage) if gone else [],
        originals=[str(tar.resolve()) for tar in _originals(pairs, touched[schema.PAIRS], gone)],
    )


def _unit_of(key: str) -> str:
    return key[: schema.SHARD_DIGITS]


def _check_intact(folder: Path, units: list[str]) -> None:
    """What is rewritten is promised anew, so damage that nobody has noticed yet would never be noticed again."""
    for unit in units:
        sidecar = ledger.read_sidecar(folder, unit)
        assert sidecar is not None
        for name, about in sidecar.files.items():
            if problem := problem_with(folder / name, about["bytes"], about["sha256"]):
                raise UserError(
                    f"{folder / name} {problem}. Nothing was removed. Restore it, or delete {unit}.done.json beside it "
                    "and make it again."
                )


def _num_rows(folder: Path) -> int:
    rows = 0
    for unit in ledger.finished_units(folder):
        sidecar = ledger.read_sidecar(folder, unit)
        assert sidecar is not None
        rows += sum(sidecar.counts.values())
    return rows


def _keys(parquet: Path) -> set[str]:
    return set(rewrite.read_parquet(parquet, {"key"})["key"].to_pylist())


def tables(work: Path) -> list[Path]:
    """The folders of caption columns and scores."""
    parents = [work / schema.CAPTIONS, work / schema.SCORES]
    return [folder for parent in parents for folder in sorted(parent.glob("*")) if folder.is_dir()]


def journals(folder: Path) -> list[Path]:
    """Captions of shards that are not finished yet."""
    return sorted(folder.glob("*.journal.jsonl"))


def shard_folders(work: Path) -> list[Path]:
    """The folders of training shards: ``shards/``, and what ``--out`` put beside it."""
    folders = [folder for folder in sorted(work.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    return [f for f in folders if any(u.startswith(("train-", "heldout-")) for u in ledger.finished_units(f))]


def _originals(pairs: Path, units: list[str], gone: set[str]) -> Iterator[Path]:
    """Links to the user's own tars that hold a sample that is to go."""
    for tar in (pairs / f"{unit}.tar" for unit in units):
        if tar.is_symlink():
            rows = rewrite.read_parquet(tar.with_suffix(".parquet"), {"key", "source_key"}).to_pylist()
            theirs = {row["source_key"] for row in rows if row["key"] in gone}
            if any(member.key in theirs for member in tars.read_members(tar, extensions=None)):
                yield tar


def inputs_of_shards(work: Path, units: list[str], digests: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The digests that training shards made from these units would record, for every folder that they could use."""
    pairs = work / schema.PAIRS
    folders = {
        name: work / name for name, known in digests.items() if name != schema.PAIRS and known.keys() >= {*units}
    }
    left_out = duplicates.left_out(pairs, units) if duplicates.is_current(pairs) else {}
    return joined.Inputs(pairs, tuple(units), folders, left_out).digests()
