"""``clips forget``: what came from a host, a URL or an image leaves every stage, without making any of them again.

First a plan is written, ``pairs/forgetting.json``: the keys, the units that hold them, and the digests as they were.
Then the units are rewritten from left to right, each committed on its own, and last the digests by which every stage
knows its inputs. Both depend on the plan alone and may be done twice, so what a killed run began is completed by the
next one, whatever that is asked for. In between a stage may refuse its inputs; none reads anything wrong.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from clips_data import duplicates, forget_traces, joined, ledger, rewrite, schema, tars
from clips_data.errors import UserError
from clips_data.forget_traces import SeenBy
from clips_data.forgotten import Forgotten, forgotten, remember, url_digest
from clips_data.shard import INDEX_FILE

PLAN: Final = "forgetting.json"
_IDENTITY: Final = frozenset(
    ("key", "status", "code", "url", "final_url", "host", "sha256", "raw_sha256", "retry_of", "duplicate_of")
)


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

    @property
    def found(self) -> bool:
        return any(number for number, _ in self.removed.values())

    def add(self, other: Outcome) -> None:
        for name, (number, of) in other.removed.items():
            before, before_of = self.removed.get(name, (0, of))
            self.removed[name] = before + number, before_of
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
    """Folder of pairs, captions or scores → unit → digest, before anything was changed."""
    unit_sets: list[list[str]]
    """Sets of pairs units that training shards may have been made from, and for each …"""
    inputs: list[dict[str, str]]
    """… the digests that such shards know their inputs by."""
    shards: dict[str, str]
    """Folder of finished training shards → the digest of its index."""
    removed: dict[str, tuple[int, int]]
    seen_by: list[SeenBy]
    originals: list[str]


def forget(work: Path, wanted: Forgotten, *, dry_run: bool = False) -> Outcome:
    """Removes all samples of ``wanted`` from every stage under ``work``, and completes what a killed run began.

    Later downloads into the same folder refuse them. Training runs are listed, not changed. No other stage may be at
    work in the folder. Raises ``UserError`` where there are no pairs, or while a download is at work there.
    """
    pairs = work / schema.PAIRS
    if not ledger.finished_units(pairs):
        raise UserError(f"{pairs} holds no finished shards. Point --work at the folder of a run.")
    outcome = Outcome()
    with ledger.readable_disk_errors(work), ledger.locked(pairs, "forget", wait=False), _no_download(pairs):
        if (pairs / PLAN).exists() and dry_run:
            raise UserError(
                f"An earlier `clips forget` was stopped half-way, see {pairs / PLAN}. Run it again without --dry-run "
                "to complete it."
            )
        if (pairs / PLAN).exists():
            outcome.add(_carry_out(work, _read_plan(pairs)))
            outcome.notes.append("This includes what an earlier run, stopped half-way, had begun.")
        matching = _match(pairs, wanted)
        plan = _plan(work, matching)
        if not dry_run:
            remember(pairs, wanted | Forgotten(urls=frozenset(matching.urls)))
        if plan.keys and not dry_run:
            ledger.write_json(pairs / PLAN, {"schema_version": schema.SCHEMA_VERSION, **asdict(plan)})
            outcome.add(_carry_out(work, plan))
        else:
            outcome.add(_outcome(work, plan))
    return outcome


def refuse_unfinished(pairs: Path) -> None:
    """For the stages that read ``pairs/``: raises ``UserError`` where a ``clips forget`` was stopped half-way."""
    if (pairs / PLAN).exists():
        raise UserError(
            f"A `clips forget` was stopped half-way in {pairs}. Run it again, which completes it, before anything else."
        )


@contextlib.contextmanager
def _no_download(pairs: Path) -> Iterator[None]:
    """A download at work holds the lock of its list. A list without one is what a killed download left."""
    with contextlib.ExitStack() as locks:
        for folder in sorted(pairs.glob("_list-*")):
            locks.enter_context(ledger.locked(pairs, folder.name.removeprefix("_"), wait=False))
        yield


# --- which rows -------------------------------------------------------------------------------------------------------


@dataclass
class _Matching:
    """The keys of the rows to empty, and the digests of those of their URLs that ``wanted`` does not name itself."""

    keys: set[str] = field(default_factory=set)
    urls: set[str] = field(default_factory=set)
    num_rows: int = 0
    num_images: int = 0
    num_images_gone: int = 0


def _match(pairs: Path, wanted: Forgotten) -> _Matching:
    found, roots = _Matching(), set()
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


def _take(row: Mapping[str, Any], wanted: Forgotten, found: _Matching) -> None:
    found.keys.add(row["key"])
    found.num_images_gone += row["status"] == schema.STATUS_SUCCESS
    if row["url"] and not wanted.matches(row["url"]):
        found.urls.add(url_digest(row["url"]))


# --- the plan ---------------------------------------------------------------------------------------------------------


def _plan(work: Path, matching: _Matching) -> Plan:
    """Where the keys are, and every digest that will be another one."""
    pairs, gone = work / schema.PAIRS, matching.keys
    touched = {schema.PAIRS: sorted({_unit_of(key) for key in gone})}
    digests = {schema.PAIRS: _digests(pairs)}
    removed = {
        "pairs rows": (len(gone), matching.num_rows),
        "pairs images": (matching.num_images_gone, matching.num_images),
    }
    for folder in _tables(work):
        name = folder.relative_to(work).as_posix()
        digests[name] = _digests(folder)
        holds = {
            unit: gone & _keys(folder / f"{unit}.parquet") for unit in touched[schema.PAIRS] if unit in digests[name]
        }
        touched[name] = [unit for unit, keys in holds.items() if keys]
        removed[name] = sum(map(len, holds.values())), _num_rows(folder)
        for path in _journals(folder):
            rows = [row["key"] for row in rewrite.read_journal(path)[1:]]
            removed[path.relative_to(work).as_posix()] = len(gone.intersection(rows)), len(rows)
    used, in_training, shards = set(), {}, {}
    for folder in _shards(work):
        name = folder.relative_to(work).as_posix()
        keys_of = {unit: _keys(folder / f"{unit}.index.parquet") for unit in ledger.finished_units(folder)}
        used |= {_unit_of(key) for keys in keys_of.values() for key in keys}
        touched[name] = [unit for unit, keys in keys_of.items() if gone & keys]
        removed[name] = sum(len(gone & keys) for keys in keys_of.values()), sum(map(len, keys_of.values()))
        if (folder / INDEX_FILE).exists():
            shards[name] = json.loads((folder / INDEX_FILE).read_text())["digest"]
            in_training[shards[name]] = sum(
                len(gone & keys) for unit, keys in keys_of.items() if unit.startswith("train-")
            )
    every = list(digests[schema.PAIRS])
    unit_sets = [units for units in (every, sorted(used.intersection(every))) if units]
    return Plan(
        keys=sorted(gone),
        touched=touched,
        digests=digests,
        unit_sets=unit_sets,
        inputs=[_inputs_of_shards(work, units, digests) for units in unit_sets],
        shards=shards,
        removed=removed,
        seen_by=forget_traces.seen_by(work, in_training, forgotten(pairs).lineage) if gone else [],
        originals=[str(tar.resolve()) for tar in _originals(pairs, touched[schema.PAIRS], gone)],
    )


def _unit_of(key: str) -> str:
    return key[: schema.SHARD_DIGITS]


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for unit in ledger.finished_units(folder):
        sidecar = ledger.read_sidecar(folder, unit)
        assert sidecar is not None
        found[unit] = sidecar.digest
    return found


def _num_rows(folder: Path) -> int:
    rows = 0
    for unit in ledger.finished_units(folder):
        sidecar = ledger.read_sidecar(folder, unit)
        assert sidecar is not None
        rows += sum(sidecar.counts.values())
    return rows


def _keys(parquet: Path) -> set[str]:
    return set(rewrite.read_parquet(parquet, {"key"})["key"].to_pylist())


def _tables(work: Path) -> list[Path]:
    """The folders of caption columns and scores."""
    parents = [work / schema.CAPTIONS, work / schema.SCORES]
    return [folder for parent in parents for folder in sorted(parent.glob("*")) if folder.is_dir()]


def _journals(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.journal.jsonl"))


def _shards(work: Path) -> list[Path]:
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


def _inputs_of_shards(work: Path, units: list[str], digests: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """The digests that training shards made from these units would record, for every folder that they could use."""
    pairs = work / schema.PAIRS
    folders = {
        name: work / name for name, known in digests.items() if name != schema.PAIRS and known.keys() >= {*units}
    }
    left_out = duplicates.left_out(pairs, units) if duplicates.is_current(pairs) else {}
    return joined.Inputs(pairs, tuple(units), folders, left_out).digests()


# --- carrying it out --------------------------------------------------------------------------------------------------


def _read_plan(pairs: Path) -> Plan:
    content = json.loads((pairs / PLAN).read_text())
    if (version := content.pop("schema_version")) != schema.SCHEMA_VERSION:
        raise UserError(
            f"{pairs / PLAN} has schema version {version}, this version of clips reads {schema.SCHEMA_VERSION}. "
            "Complete that removal with the clips version that began it."
        )
    content["seen_by"] = [SeenBy(**run) for run in content["seen_by"]]
    content["removed"] = {name: (number, of) for name, (number, of) in content["removed"].items()}
    return Plan(**content)


def _outcome(work: Path, plan: Plan) -> Outcome:
    shown_in = forget_traces.shown_in(work, set(plan.keys)) if plan.keys else []
    return Outcome(dict(plan.removed), list(plan.seen_by), shown_in, list(plan.originals))


def _carry_out(work: Path, plan: Plan) -> Outcome:
    pairs, gone, outcome = work / schema.PAIRS, set(plan.keys), _outcome(work, plan)
    if num_files := forget_traces.remove_unfinished([pairs, *_tables(work), *_shards(work)]):
        outcome.notes.append(f"{num_files} files of unfinished work were removed: nothing tells whose rows they hold.")
    forget_traces.clean_logs(work, forgotten(pairs))
    for unit in _still_finished(pairs, plan.touched[schema.PAIRS]):
        rewrite.pairs_unit(pairs, unit, gone)
    _mark_duplicates(pairs, outcome)
    for folder in _tables(work):
        count = rewrite.count_captions if folder.parent.name == schema.CAPTIONS else rewrite.count_scores
        for unit in _still_finished(folder, plan.touched.get(folder.relative_to(work).as_posix(), [])):
            rewrite.table_unit(folder, unit, gone, count)
    lineage = {}
    for folder in _shards(work):
        name = folder.relative_to(work).as_posix()
        if name in plan.shards:
            for unit in _still_finished(folder, plan.touched[name]):
                rewrite.shard_unit(folder, unit, gone)
            lineage[plan.shards[name]] = rewrite.index_of_shards(folder)
        elif num_tars := _drop_shards(folder):
            outcome.notes.append(
                f"{name}/ was not finished, so its {num_tars} tars were removed: run `clips shard` again."
            )
    renamed = _renamed(work, plan)
    for folder in (*_tables(work), *_shards(work)):
        for unit in ledger.finished_units(folder):
            rewrite.rename_inputs(folder, unit, renamed)
        for path in _journals(folder):
            rewrite.journal(path, gone, renamed)
    remember(pairs, Forgotten(lineage={before: after for before, after in lineage.items() if before != after}))
    (pairs / PLAN).unlink()
    ledger.fsync_folder(pairs)
    return outcome


def _still_finished(folder: Path, units: list[str]) -> list[str]:
    """Somebody may have deleted a unit since the plan was made."""
    return [unit for unit in units if ledger.sidecar_path(folder, unit).exists()]


def _mark_duplicates(pairs: Path, outcome: Outcome) -> None:
    """What repeated a forgotten image is now the first of its kind."""
    if duplicates.marked_by(pairs) is None:
        return
    try:
        duplicates.refresh(pairs)
    except UserError as error:  # no image is left that could have duplicates
        ledger.forget_unit(pairs / duplicates.FOLDER, duplicates.UNIT)
        (pairs / duplicates.FOLDER / f"{duplicates.UNIT}.parquet").unlink(missing_ok=True)
        outcome.notes.append(f"Duplicates are not marked any more: {error}")


def _drop_shards(folder: Path) -> int:
    """The rest of an unfinished folder would be planned from other samples than these tars, and overlap with them."""
    units = ledger.finished_units(folder)
    for unit in units:
        sidecar = ledger.read_sidecar(folder, unit, check_files=False)
        assert sidecar is not None
        ledger.forget_unit(folder, unit)
        for name in sidecar.files:
            (folder / name).unlink(missing_ok=True)
    return len(units)


def _renamed(work: Path, plan: Plan) -> dict[str, str | None]:
    """Digest of an input before → now; ``None`` where there is no such input any more."""
    renamed: dict[str, str | None] = {}
    for name, before in plan.digests.items():
        now = _digests(work / name)
        renamed |= {digest: now[unit] for unit, digest in before.items() if unit in now}
    for units, before in zip(plan.unit_sets, plan.inputs, strict=True):
        if all(
            ledger.sidecar_path(work / name, unit).exists() for name in plan.digests for unit in units if name in before
        ):
            after = _inputs_of_shards(work, units, plan.digests)
            renamed |= {digest: after.get(name) for name, digest in before.items()}
    return renamed
