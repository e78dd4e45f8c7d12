"""``clips forget``: what came from a host, a URL or an image leaves every stage, without making any of them again.

First a plan is written, ``pairs/forgetting.json``: the keys, the units that hold them, and the digests as they were.
Then the units are rewritten from left to right, each committed on its own, and last the digests by which every stage
knows its inputs. Both depend on the plan alone and may be done twice, so what a killed run began is completed by the
next one, whatever that is asked for. In between a stage may refuse its inputs; none reads anything wrong.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from clips_data import (
    duplicates,
    embeddings,
    forget_traces,
    ledger,
    locks,
    near_duplicates,
    rewrite,
    schema,
    score_table,
    shard_index,
)
from clips_data.errors import UserError
from clips_data.forget_plan import (
    Plan,
    draw_plan,
    inputs_of_shards,
    journals,
    match,
    shard_folders,
    tables,
)  # fmt: skip
from clips_data.forget_traces import SeenBy
from clips_data.forgotten import PLAN, Forgotten, forgotten, remember


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


def forget(work: Path, wanted: Forgotten, *, dry_run: bool = False) -> Outcome:
    """Removes all samples of ``wanted`` from every stage under ``work``, and completes what a killed run began.

    Later downloads into the same folder refuse them. Training runs are listed, not changed. No other stage may be at
    work in the folder. Raises ``UserError`` where there are no pairs, or while a download is at work there.
    """
    pairs = work / schema.PAIRS
    if not ledger.finished_units(pairs):
        raise UserError(f"{pairs} holds no finished shards. Point --work at the folder of a run.")
    outcome = Outcome()
    with ledger.readable_disk_errors(work), locks.locked(pairs, "forget", wait=False), _no_download(pairs):
        if (pairs / PLAN).exists() and dry_run:
            raise UserError(
                f"An earlier `clips forget` was stopped half-way, see {pairs / PLAN}. Run it again without --dry-run "
                "to complete it."
            )
        if (pairs / PLAN).exists():
            outcome.add(_carry_out(work, _read_plan(pairs)))
            outcome.notes.append("This includes what an earlier run, stopped half-way, had begun.")
        matching = match(pairs, wanted)
        plan = draw_plan(work, matching)
        if not dry_run:
            remember(pairs, wanted | Forgotten(urls=frozenset(matching.urls)))
        if plan.keys and not dry_run:
            ledger.write_json(pairs / PLAN, {"schema_version": schema.SCHEMA_VERSION, **asdict(plan)})
            outcome.add(_carry_out(work, plan))
        else:
            outcome.add(_outcome(work, plan))
    return outcome


@contextlib.contextmanager
def _no_download(pairs: Path) -> Iterator[None]:
    """A download at work holds the lock of its list. A list without one is what a killed download left."""
    with contextlib.ExitStack() as held:
        for folder in sorted(pairs.glob("_list-*")):
            held.enter_context(locks.locked(pairs, folder.name.removeprefix("_"), wait=False))
        yield


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
    if num_files := forget_traces.remove_unfinished(_stage_folders(work)):
        outcome.notes.append(f"{num_files} files of unfinished work were removed: nothing tells whose rows they hold.")
    forget_traces.clean_logs(work, forgotten(pairs))
    for unit in _still_finished(pairs, plan.touched[schema.PAIRS]):
        rewrite.pairs_unit(pairs, unit, gone)
    _mark_duplicates(pairs, outcome)
    for folder in tables(work):
        count = rewrite.count_captions if folder.parent.name == schema.CAPTIONS else score_table.count
        for unit in _still_finished(folder, plan.touched.get(folder.relative_to(work).as_posix(), [])):
            rewrite.table_unit(folder, unit, gone, count)
        if gone and near_duplicates.forget(folder):
            outcome.notes.append(
                f"Near-duplicate captions of {folder.name} are not told any more: run `clips score --near-duplicates`."
            )
    lineage = {}
    for folder in shard_folders(work):
        name = folder.relative_to(work).as_posix()
        if name in plan.shards:
            for unit in _still_finished(folder, plan.touched[name]):
                rewrite.shard_unit(folder, unit, gone)
            lineage[plan.shards[name]] = rewrite.index_of_shards(folder, work)
        if num_tars := _drop_unfinished(folder):
            outcome.notes.append(f"{name}/ was not finished, so {num_tars} tars were removed: run `clips shard` again.")
    for folder in embeddings.folders(work):
        for unit in _still_finished(folder, plan.touched.get(folder.relative_to(work).as_posix(), [])):
            rewrite.features_unit(folder, unit, gone)
        embeddings.refresh_index(folder, lineage)
    for name, why in ((schema.COMPARE, "its pages show images"), (schema.SEARCH, "it has features of images")):
        if gone and (work / name).is_dir():
            shutil.rmtree(work / name)
            outcome.notes.append(f"{name}/ was removed, as {why}. Run `clips {name}` again.")
    renamed = _renamed(work, plan)
    for folder in _stage_folders(work)[1:]:
        for unit in ledger.finished_units(folder):
            rewrite.rename_inputs(folder, unit, renamed)
        for path in journals(folder):
            rewrite.journal(path, gone, renamed)
    remember(pairs, Forgotten(lineage={before: after for before, after in lineage.items() if before != after}))
    (pairs / PLAN).unlink()
    ledger.fsync_folder(pairs)
    return outcome


def _stage_folders(work: Path) -> list[Path]:
    """The pairs first, then all that is made of them, but for runs."""
    return [work / schema.PAIRS, *tables(work), *shard_folders(work), *embeddings.folders(work)]


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


def _drop_unfinished(folder: Path) -> int:
    """The rest of an unfinished generation would be planned from other samples than its tars, and overlap with them."""
    index = shard_index.read(folder)
    splits = index["splits"].values() if index is not None else ()
    finished = {shard["file"].removesuffix(".tar") for split in splits for shard in split["shards"]}
    units = [unit for unit in ledger.finished_units(folder) if unit not in finished]
    for unit in units:
        ledger.remove_unit(folder, unit)
    if index is None:
        shard_index.remove(folder)
    return len(units)


def _renamed(work: Path, plan: Plan) -> dict[str, str | None]:
    """Digest of an input before → now; ``None`` where there is no such input any more."""
    renamed: dict[str, str | None] = {}
    for name, before in plan.digests.items():
        now = ledger.digests_of(work / name)
        renamed |= {digest: now[unit] for unit, digest in before.items() if unit in now}
    for units, before in zip(plan.unit_sets, plan.inputs, strict=True):
        folders = [work / name for name in plan.digests if name in before]
        if all(ledger.sidecar_path(folder, unit).exists() for folder in folders for unit in units):
            after = inputs_of_shards(work, units, plan.digests)
            renamed |= {digest: after.get(name) for name, digest in before.items()}
    return renamed
