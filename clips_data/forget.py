"""``clips forget``: what came from a host, a URL or an image leaves every stage, without making any of them again.

First a plan is written, ``pairs/forgetting.json``: the keys, the units that hold them, and the digests as they were.
Then the units are rewritten from left to right, each committed on its own, and last the digests by which every stage
knows its inputs. Both steps depend on the plan alone and may be done twice, so a killed run is completed by the next
one, whatever it is asked for. Until then a stage may refuse its inputs, and nothing is read wrongly.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from clips_data import duplicates, joined, ledger, rewrite, schema
from clips_data.errors import UserError
from clips_data.forgotten import Forgotten, forgotten, remember, url_digest
from clips_data.redact import host_of, redact
from clips_data.shard import INDEX_FILE

PLAN: Final = "forgetting.json"
_UNIT_FILE: Final = re.compile(r"((train|heldout)-)?\d{5}(\.index)?\.(tar|parquet)")
_TEXTS: Final = (".html", ".json", ".jsonl", ".csv", ".txt", ".md")


@dataclass(frozen=True)
class SeenBy:
    """A training run whose shards held some of the samples."""

    run: str
    num_samples: int
    """Of the forgotten samples, those in its training split."""
    checkpoints: list[str]
    """Folders with weights that have seen them, exports included. Nothing of a run is changed."""


@dataclass
class Outcome:
    """What was removed, or would be. Paths are relative to the work folder where they lie in it."""

    removed: dict[str, tuple[int, int]] = field(default_factory=dict)
    """``pairs rows``, ``captions/<column>``, … → (removed, of how many)."""
    seen_by: list[SeenBy] = field(default_factory=list)
    shown_in: list[str] = field(default_factory=list)
    """Files of runs (evaluations, reports) that name keys of removed samples, and so may show them."""
    originals: list[str] = field(default_factory=list)
    """The user's own tars, which still hold them."""
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False

    @property
    def found(self) -> bool:
        return any(removed for removed, _ in self.removed.values())

    def add(self, other: Outcome) -> None:
        for name, (removed, of) in other.removed.items():
            before = self.removed.get(name)
            self.removed[name] = (removed, of) if before is None else (before[0] + removed, before[1])
        self.seen_by += other.seen_by
        self.shown_in += [path for path in other.shown_in if path not in self.shown_in]
        self.originals += other.originals
        self.notes += other.notes


@dataclass(frozen=True)
class Plan:
    """All that has to be known to begin, or to complete, one removal. Folders are relative to the work folder."""

    keys: list[str]
    touched: dict[str, list[str]]
    """Folder → its units that hold some of the keys."""
    digests: dict[str, dict[str, str]]
    """Folder → unit → digest, of all finished units of pairs, captions and scores, before anything was changed."""
    shards: dict[str, str]
    """Folder of training shards → the digest of its index."""
    unit_sets: list[list[str]]
    """Sets of pairs units that training shards may have been made from."""
    left_out: list[str | None]
    """For each of these sets, the digest of its images that were left out as duplicates."""
    removed: dict[str, tuple[int, int]]
    seen_by: list[SeenBy]
    originals: list[str]


def forget(work: Path, wanted: Forgotten, *, dry_run: bool = False) -> Outcome:
    """Removes all samples of ``wanted`` from every stage under ``work``, and completes what a killed run began.

    Later downloads into the same folder refuse them. Training runs are listed, not changed. Raises ``UserError`` where
    there are no pairs, or while a download is at work there.
    """
    pairs = work / schema.PAIRS
    if not ledger.finished_units(pairs):
        raise UserError(f"{pairs} holds no finished shards. Point --work at the folder of a run.")
    outcome = Outcome(dry_run=dry_run)
    if dry_run:
        if (pairs / PLAN).exists():
            outcome.notes.append("An earlier `clips forget` was stopped half-way; the next one completes it first.")
        outcome.add(_outcome(work, _plan(work, wanted)))
        return outcome
    with ledger.readable_disk_errors(work), ledger.locked(pairs, "forget", wait=False), _no_download(pairs):
        if (pairs / PLAN).exists():
            outcome.add(_carry_out(work, _read_plan(pairs)))
            outcome.notes.append("This includes what an earlier run, stopped half-way, had begun.")
        plan = _plan(work, wanted)
        remember(pairs, wanted)
        if plan.keys:
            ledger.write_json(pairs / PLAN, asdict(plan))
            outcome.add(_carry_out(work, plan))
        else:
            outcome.add(_outcome(work, plan))
    return outcome


def _outcome(work: Path, plan: Plan) -> Outcome:
    return Outcome(dict(plan.removed), plan.seen_by, _shown_in(work, set(plan.keys)), plan.originals)


@contextlib.contextmanager
def _no_download(pairs: Path) -> Iterator[None]:
    """A download at work holds the lock of its list. A list without one is what a killed download left."""
    with contextlib.ExitStack() as locks:
        for folder in sorted(pairs.glob("_list-*")):
            locks.enter_context(ledger.locked(pairs, folder.name.removeprefix("_"), wait=False))
        yield


# --- the plan ---------------------------------------------------------------------------------------------------------


def _plan(work: Path, wanted: Forgotten) -> Plan:
    pairs = work / schema.PAIRS
    keys, removed = _matching(pairs, wanted)
    gone = set(keys)
    touched = {schema.PAIRS: sorted({_unit_of(key) for key in keys})}
    digests = {schema.PAIRS: _digests(pairs)}
    for folder in _tables(work):
        name = folder.relative_to(work).as_posix()
        digests[name] = _digests(folder)
        here = [unit for unit in touched[schema.PAIRS] if unit in digests[name]]
        nums = {unit: len(gone & _keys(folder / f"{unit}.parquet")) for unit in here}
        touched[name] = [unit for unit in here if nums[unit]]
        removed[name] = sum(nums.values()), _num_rows(folder)
        for path in _journals(folder):
            rows = {json.loads(line)["key"] for line in path.read_bytes().splitlines()[1:] if line.endswith(b"}")}
            if gone & rows:
                removed[f"{name} (unfinished {path.name})"] = len(gone & rows), len(rows)
    all_units, used, training, sums = list(digests[schema.PAIRS]), set[str](), dict[str, int](), dict[str, str]()
    for folder in _shards(work):
        name = folder.relative_to(work).as_posix()
        in_units = {unit: _keys(folder / f"{unit}.index.parquet") for unit in ledger.finished_units(folder)}
        touched[name] = [unit for unit, known in in_units.items() if gone & known]
        used |= {_unit_of(key) for known in in_units.values() for key in known}
        nums = {unit: len(gone & known) for unit, known in in_units.items()}
        removed[name] = sum(nums.values()), sum(map(len, in_units.values()))
        if (index := folder / INDEX_FILE).exists():
            sums[name] = json.loads(index.read_text())["digest"]
            training[sums[name]] = sum(num for unit, num in nums.items() if unit.startswith("train"))
    unit_sets = [all_units, sorted(used & set(all_units))]
    return Plan(
        keys=keys,
        touched=touched,
        digests=digests,
        shards=sums,
        unit_sets=unit_sets,
        left_out=[_left_out(pairs, units) for units in unit_sets],
        removed=removed,
        seen_by=_seen_by(work, training, forgotten(pairs).lineage),
        originals=_originals(pairs, touched[schema.PAIRS]),
    )


def _matching(pairs: Path, wanted: Forgotten) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """The keys of the rows to empty, and the counts of rows and images."""
    keys: set[str] = set()
    roots: set[str] = set()
    linked: list[tuple[str, str, str]] = []
    num_rows = num_images = num_gone = 0
    for unit in ledger.finished_units(pairs):
        for row in rewrite.read_parquet(pairs / f"{unit}.parquet").to_pylist():
            num_rows += 1
            num_images += row["status"] == schema.STATUS_SUCCESS
            key, first = row["key"], row.get("retry_of") or row["key"]
            if row["code"] == rewrite.FORGOTTEN:
                continue
            linked.append((key, first, row.get("duplicate_of") or key))
            if _matches(row, wanted):
                keys.add(key)
                if wanted.images:
                    roots.add(first)
    # An image that is named by its hash is also that of the other tries of its URL, which have no hash.
    keys |= {key for key, first, same_as in linked if first in roots or same_as in keys & roots}
    return [], {}


def _carry_out(work: Path, plan: Plan) -> Outcome:
    raise NotImplementedError
