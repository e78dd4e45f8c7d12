"""What killed runs left behind, and its removal: never while a stage is at work, never anything that is promised."""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clips_data import agreement_runs, batches, ledger, schema
from clips_data.errors import UserError

_UNIT_FILE: Final = re.compile(r"((train|heldout)-)?\d{5}(\.index)?\.(tar|parquet|safetensors)")
_JOURNAL: Final = ".journal.jsonl"
_LINK: Final = ".link"
_SCRATCH: Final = re.compile(r"_(list-\d+-of-\d+|import|plan)")
"""Folders in which a stage works and which it removes in any case; only a kill leaves them."""
RUN_QUIET_S: Final = 3600.0
"""Training takes no lock, so a half-made checkpoint counts as left behind when nothing in it changed for so long."""


@dataclass(frozen=True)
class Leftover:
    """A file, or a whole folder, that no finished or unfinished work needs."""

    path: Path
    reason: str

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir() and not self.path.is_symlink()

    def changed_at(self) -> float:
        """Seconds since the epoch of the newest change in it."""
        paths = [self.path, *self.path.rglob("*")] if self.is_folder else [self.path]
        return max(path.lstat().st_mtime for path in paths)


@contextlib.contextmanager
def nobody_at_work(folder: Path) -> Iterator[None]:
    """Holds every lock file and journal below ``folder``, so that stages which ask for one wait or are refused.

    Raises ``UserError`` while a process of this machine holds one of them. Lock files stay: another process may be
    waiting for one, and would then hold a lock that nobody else sees.
    """
    with contextlib.ExitStack() as held:
        for path in sorted(path for pattern in (".*", "*" + _JOURNAL) for path in folder.rglob(pattern)):
            if path.is_file() and not path.is_symlink() and "log" not in path.parts[len(folder.parts) :]:
                try:
                    fcntl.flock(held.enter_context(path.open("rb")), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"A clips process is at work in {path.parent} (it holds {path.name}). Nothing was removed; run "
                        "`clips verify --gc` again when it is done."
                    ) from None
        yield


def find(folder: Path, promised: set[Path], homes: set[Path]) -> list[Leftover]:
    """What is left below ``folder``, sorted. ``promised`` are the files that sidecars name, ``homes`` their folders.

    These are partial files and links, files of units and plans without a sidecar, working folders of stages, half-made
    checkpoints, intakes of lists that were never begun, and journals whose captions are committed.
    """
    found: list[Leftover] = []
    for path in sorted(folder.rglob("*")):
        if path in promised or any(path.is_relative_to(above.path) for above in found[-1:] if above.is_folder):
            continue
        if reason := _reason(path, homes):
            found.append(Leftover(path, reason))
    return found


def _reason(path: Path, homes: set[Path]) -> str | None:
    if path.is_symlink():
        return "is a link that was never committed" if path.name.endswith(_LINK) else None
    if path.is_dir():
        if path.name.endswith(ledger.PART):
            return "was not finished"
        in_stage = path.parent in homes or path.parent.name in (schema.PAIRS, schema.SHARDS)
        in_stage |= path.parent.parent.name == schema.CAPTIONS
        return "is what a killed run worked in" if _SCRATCH.fullmatch(path.name) and in_stage else None
    if path.name.endswith(ledger.PART):
        return "was not finished"
    if path.parent.name == batches.FOLDER:
        begun = path.with_name(path.name.partition(".")[0] + ".json").exists()
        return None if begun else "belongs to an intake that was never begun"
    if path.name.endswith(_JOURNAL):
        return "has only captions that are committed" if _is_committed(path) else None
    if path.parent in homes and _UNIT_FILE.fullmatch(path.name):
        return "is named by no sidecar"
    return None


def remove(left: list[Leftover], since: float) -> list[Path]:
    """Removes what has not changed since ``since`` (seconds since the epoch); returns that."""
    removed = []
    for leftover in left:
        quiet_s = RUN_QUIET_S if leftover.path.parent.name == agreement_runs.FOLDER else 0.0
        if leftover.changed_at() >= since - quiet_s:
            continue  # of a stage that began in the meantime
        with ledger.readable_disk_errors(leftover.path.parent):
            if leftover.is_folder:
                shutil.rmtree(leftover.path)
            else:
                leftover.path.unlink()
        removed.append(leftover.path)
    for home in {path.parent for path in removed}:
        if home.exists():
            ledger.fsync_folder(home)
    return removed


def _is_committed(journal: Path) -> bool:
    """Whether the shard of a caption journal is finished, from just these inputs, in every column of its recipe.

    Which columns a recipe makes is told by another shard of it, finished in all of them, as that has no journal; where
    there is none, the journal stays: its captions may have cost money, and `clips recaption` removes it for sure.
    """
    header, unit, home = _header(journal), journal.name.removesuffix(_JOURNAL), journal.parent
    if header is None or not _was_made_so(home, unit, header):
        return False
    others = [other for other in ledger.finished_units(home) if not (home / f"{other}{_JOURNAL}").exists()]
    whole = next((other for other in others if _config(home, other) == header["config"]), None)
    if whole is None:
        return False
    columns = [path for path in home.parent.iterdir() if path.is_dir() and _config(path, whole) == header["config"]]
    return all(_was_made_so(column, unit, header) for column in columns)


def _header(journal: Path) -> Mapping[str, Any] | None:
    try:
        with journal.open() as file:
            header = json.loads(file.readline())
        return header if header["inputs"] is not None and header["config"] is not None else None
    except (ValueError, KeyError, TypeError):
        return None


def _was_made_so(folder: Path, unit: str, header: Mapping[str, Any]) -> bool:
    sidecar = _sidecar(folder, unit)
    return (
        sidecar is not None and sidecar.get("inputs") == header["inputs"] and _config(folder, unit) == header["config"]
    )


def _config(folder: Path, unit: str) -> Any:
    return (_sidecar(folder, unit) or {}).get("config")


def _sidecar(folder: Path, unit: str) -> dict[str, Any] | None:
    """As it is on disk; ``None`` also for a damaged one."""
    try:
        content = json.loads(ledger.sidecar_path(folder, unit).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
