"""Evidence that a work folder is what its sidecars say: every finished file hashed again, every stray file named.

Where a file is not the promised one, the place of the damage is looked for; where all are, whether they fit together.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from clips_data import (
    agreement,
    agreement_runs,
    agreement_shards,
    batches,
    damage,
    embeddings,
    executor,
    ledger,
    leftovers,
    schema,
)
from clips_data.errors import UserError

PRELOAD: Final = ("pyarrow.parquet", "polars", "clips_data.verify")


@dataclass
class Verified:
    """What ``verify`` found. Paths are relative to the folder, as text; lists and mappings come sorted."""

    num_files: int = 0
    num_bytes: int = 0
    corrupt: dict[str, str] = field(default_factory=dict)
    """File to what is wrong with it, and where in it."""
    contradictions: dict[str, list[str]] = field(default_factory=dict)
    """File or folder to what it says otherwise than another one, though each is what was committed."""
    missing: dict[str, list[str]] = field(default_factory=dict)
    """Folder to the shards that were planned, or that the stage before has, and that are not finished there."""
    stale: dict[str, str] = field(default_factory=dict)
    """Sidecar to which of its inputs is another one by now."""
    orphans: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    @property
    def num_intact(self) -> int:
        return self.num_files - len(self.corrupt)

    @property
    def is_sound(self) -> bool:
        """Whether all that was promised is there and fits together. Unfinished work is no damage."""
        return not self.corrupt and not self.contradictions


@dataclass(frozen=True)
class _Checked:
    """What one worker found out about one unit."""

    num_files: int = 0
    num_bytes: int = 0
    corrupt: Mapping[Path, str] = field(default_factory=dict)
    contradictions: tuple[agreement.Problem, ...] = ()
    stale: str | None = None
    sidecar: Path = Path()


def verify(folder: Path, gc: bool = False, *, deep: bool = False, processes: int = 1, quiet: bool = True) -> Verified:
    """Hashes again what the sidecars below ``folder`` promise, compares what files say of the same samples, and looks
    for files that none of them names.

    ``deep`` also compares each image and text in the tars with its row. ``gc`` removes what killed runs left (see
    ``leftovers``), and raises ``UserError`` while a stage is at work there; nothing that is promised is ever removed.
    Raises ``UserError`` when there is no finished work.
    """
    sidecars = sorted(folder.rglob("*" + ledger.SIDECAR))
    if not sidecars:
        raise UserError(f"{folder} holds no finished work. Point --work at the folder of a run.")
    found = Verified()
    promised = {path: _promised(path) for path in sidecars}
    for checked in _check_all(promised, deep=deep, processes=processes, quiet=quiet):
        _add(found, checked, folder)
    homes = {path.parent for path in sidecars}
    unreadable = dict(_unreadable_indexes(homes))
    found.num_files += len(unreadable)
    found.corrupt |= {_name(home / agreement_shards.INDEX_FILE, folder): text for home, text in unreadable.items()}
    for path, text in _across(folder, homes - set(unreadable)):
        found.contradictions.setdefault(_name(path, folder), []).append(text)
    found.missing = dict(_missing(folder, homes))
    kept = {path.parent / name for path in sidecars for name in _files_of(path, promised[path])}
    _collect(found, folder, kept, homes, gc)
    for name in ("corrupt", "contradictions", "missing", "stale"):
        setattr(found, name, dict(sorted(getattr(found, name).items())))
    return found


def problem_with(file: Path, size_bytes: int, sha256: str) -> str | None:
    """Why a file is not the promised one, or ``None``."""
    if not file.is_file():
        return "is missing"
    if (found := file.stat().st_size) != size_bytes:
        return f"has {found} bytes instead of {size_bytes}"
    return None if ledger.digest_file(file) == sha256 else "has another content than when it was finished"


# --- units ------------------------------------------------------------------------------------------------------------


def _promised(sidecar: Path) -> dict[str, dict[str, Any]] | None:
    """The files that a sidecar names with their sizes and hashes; ``None`` for one that clips did not write."""
    try:
        files = json.loads(sidecar.read_text())["files"]
        named = {str(name): {"bytes": int(of["bytes"]), "sha256": str(of["sha256"])} for name, of in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return named if all(Path(name).name == name for name in named) else None


def _files_of(sidecar: Path, promised: Mapping[str, Any] | None) -> Iterable[str]:
    """The files of a unit; those with its name where its sidecar is damaged."""
    if promised is not None:
        return promised
    unit = sidecar.name.removesuffix(ledger.SIDECAR) + "."
    return [path.name for path in sidecar.parent.iterdir() if path.name.startswith(unit)]


def _check_all(
    promised: Mapping[Path, Mapping[str, Any] | None], *, deep: bool, processes: int, quiet: bool
) -> Iterator[_Checked]:
    from tqdm import tqdm

    sizes = {path: sum(of["bytes"] for of in (files or {}).values()) for path, files in promised.items()}
    work = functools.partial(_check_unit, deep=deep)
    num_processes = 0 if processes <= 1 else min(processes, len(promised))
    with tqdm(
        total=sum(sizes.values()), unit="B", unit_scale=True, desc="verify", disable=quiet or None, file=sys.stderr
    ) as progress:
        for checked in executor.map_units(work, list(promised), num_processes=num_processes, preload=PRELOAD):
            progress.update(sizes[checked.sidecar])
            yield checked


def _check_unit(sidecar: Path, *, deep: bool) -> _Checked:
    """One unit by itself, and what it says of the samples of the unit beside it."""
    home, unit = sidecar.parent, sidecar.name.removesuffix(ledger.SIDECAR)
    promised = _promised(sidecar)
    if promised is None:
        return _Checked(1, 0, {sidecar: "is not a sidecar that clips wrote"}, sidecar=sidecar)
    corrupt, num_bytes = {}, 0
    for name, about in sorted(promised.items()):
        problem = problem_with(home / name, about["bytes"], about["sha256"])
        if problem is None:
            num_bytes += about["bytes"]
        else:
            where = damage.place(home / name)
            corrupt[home / name] = f"{problem}: {where}" if where else problem
    try:
        known = ledger.read_sidecar(home, unit, check_files=False)
        assert known is not None
        if corrupt:  # what a damaged file says is not worth comparing
            return _Checked(len(promised), num_bytes, corrupt, sidecar=sidecar)
        problems = tuple(_contradictions(home, unit, set(promised), deep=deep))
        stale = _changed_input(home, unit, known.inputs)
    except (UserError, TypeError) as error:
        return _Checked(len(promised), num_bytes, {**corrupt, sidecar: str(error)}, sidecar=sidecar)
    return _Checked(len(promised), num_bytes, {}, problems, stale, sidecar)


def _contradictions(home: Path, unit: str, files: set[str], *, deep: bool) -> Iterator[agreement.Problem]:
    """What a unit's tables say otherwise than its tar or the pairs; which there are, the names of its files tell."""
    table, index = f"{unit}.parquet", f"{unit}{agreement.INDEX}"
    try:
        if index in files:
            yield from agreement_shards.shard_unit(home, unit, deep=deep)
        elif {f"{unit}.tar", table} <= files:
            yield from agreement.pairs_unit(home, unit, deep=deep)
        elif table in files and home.parent.name in (schema.CAPTIONS, schema.SCORES):
            yield from agreement.table_unit(home, unit, _pairs_of(home))
        elif unit + embeddings.SUFFIX in files and home.parent.name == schema.EMBEDDINGS:
            yield from embeddings.disagreements(home, unit, home.parent.parent / schema.SHARDS)
    except agreement.Disagreement as reason:
        yield home / (index if index in files else table), str(reason)
    except UserError as error:  # a tar that cannot be walked; where, its own sentence says
        yield home / f"{unit}.tar", str(error)


def _pairs_of(home: Path) -> Path:
    """Where the pairs lie that a folder of captions, scores or training shards was made from."""
    of_table = home.parent.name in (schema.CAPTIONS, schema.SCORES)
    return (home.parent.parent if of_table else home.parent) / schema.PAIRS


def _changed_input(home: Path, unit: str, inputs: Mapping[str, str]) -> str | None:
    """Which input of a shard of captions, scores or a teacher's features was made anew since; others are digests of
    more than a shard."""
    if home.parent.name not in (schema.CAPTIONS, schema.SCORES, schema.EMBEDDINGS):
        return None
    for name, digest in inputs.items():
        beside = home.parent.parent / name
        now = ledger.read_sidecar(beside, unit, check_files=False) if beside.is_dir() else None
        if now is not None and now.digest != digest:
            return f"was made from another {name}/{unit} than is there now"
    return None


# --- the whole --------------------------------------------------------------------------------------------------------


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _add(found: Verified, checked: _Checked, folder: Path) -> None:
    found.num_files += checked.num_files
    found.num_bytes += checked.num_bytes
    found.corrupt |= {_name(path, folder): text for path, text in checked.corrupt.items()}
    for path, text in checked.contradictions:
        found.contradictions.setdefault(_name(path, folder), []).append(text)
    if checked.stale is not None:
        found.stale[_name(checked.sidecar, folder)] = checked.stale


def _unreadable_indexes(homes: set[Path]) -> Iterator[tuple[Path, str]]:
    """Folders whose ``index.json``, which no sidecar promises, is no JSON, and why."""
    for home in homes:
        path = home / agreement_shards.INDEX_FILE
        try:
            if path.is_file():
                json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            command = "embed" if home.parent.name == schema.EMBEDDINGS else "shard"
            yield home, f"is not an index that clips wrote ({error}): delete it and run `clips {command}` again"


def _across(folder: Path, homes: set[Path]) -> Iterator[agreement.Problem]:
    """What only whole folders can contradict: training shards, and the checkpoints of runs."""
    for home in sorted(homes):
        if list(home.glob("*" + agreement.INDEX)):
            try:
                yield from agreement_shards.whole(home, _pairs_of(home))
            except UserError as error:  # of a table that is told of by itself
                yield home, f"cannot be compared: {error}"
    for checkpoints in sorted(folder.rglob(agreement_runs.FOLDER)):
        yield from agreement_runs.compare(checkpoints.parent)


def _missing(folder: Path, homes: set[Path]) -> Iterator[tuple[str, list[str]]]:
    for home in sorted(homes):
        finished = set(ledger.finished_units(home))
        if home.parent.name in (schema.CAPTIONS, schema.SCORES):
            wanted = ledger.finished_units(_pairs_of(home))
        elif home.parent.name == schema.EMBEDDINGS:
            begun = {unit.partition("-")[0] for unit in finished}
            shards = ledger.finished_units(home.parent.parent / schema.SHARDS)
            wanted = [unit for unit in shards if unit.partition("-")[0] in begun]
        elif list(home.glob("*" + agreement.INDEX)):
            wanted = [] if agreement_shards.is_indexed(home) else [agreement_shards.INDEX_FILE]
        else:
            wanted = _planned(home)
        if absent := [unit for unit in wanted if unit not in finished]:
            yield _name(home, folder), absent


def _planned(pairs: Path) -> list[str]:
    """The shards of all intakes of lists."""
    try:
        return [schema.shard_name(number) for batch in batches.read_all(pairs) for number in batch.shards]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{pairs / batches.FOLDER} holds an intake that clips did not write ({type(error).__name__}: {error}). "
            "Restore it, or move it away; then only --append and --retry miss it."
        ) from None


def _collect(found: Verified, folder: Path, promised: set[Path], homes: set[Path], gc: bool) -> None:
    """Names what killed runs left, and removes it where that is asked for."""
    if not gc:
        found.orphans = [_name(left.path, folder) for left in leftovers.find(folder, promised, homes)]
        return
    started = time.time()
    with leftovers.nobody_at_work(folder):
        left = leftovers.find(folder, promised, homes)
        found.orphans = [_name(leftover.path, folder) for leftover in left]
        found.removed = [_name(path, folder) for path in leftovers.remove(left, started)]
