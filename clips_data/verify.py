"""Evidence that a work folder is what its sidecars say: every finished file hashed again, every stray file named."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from clips_data import ledger
from clips_data.errors import UserError

_UNIT_FILE = re.compile(r"((train|heldout)-)?\d{5}(\.index)?\.(tar|parquet)")


@dataclass
class Verified:
    """What ``verify`` found. Paths are relative to the folder; ``corrupt`` and ``orphans`` come sorted."""

    num_files: int = 0
    num_bytes: int = 0
    corrupt: dict[str, str] = field(default_factory=dict)
    """File to what is wrong with it."""
    orphans: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    @property
    def num_intact(self) -> int:
        return self.num_files - len(self.corrupt)


def verify(folder: Path, gc: bool = False) -> Verified:
    """Hashes again what the sidecars below ``folder`` promise and looks for files that none of them names.

    Orphans are ``*.part`` files anywhere and unnamed files beside sidecars, as a killed run leaves them; journals of
    unfinished work are none. ``gc`` removes them; do not use it while a stage is at work in the folder. Nothing that is
    promised is ever removed. Raises ``UserError`` when there is no finished work.
    """
    found = Verified()
    sidecars = sorted(folder.rglob("*" + ledger.SIDECAR))
    if not sidecars:
        raise UserError(f"{folder} holds no finished work. Point --work at the folder of a run.")
    promised: set[Path] = set()
    for sidecar in sidecars:
        promised |= _check_unit(sidecar, folder, found)
    homes = {sidecar.parent for sidecar in sidecars}
    orphans = sorted(path for path in folder.rglob("*") if _is_orphan(path, promised, homes))
    found.orphans = [path.relative_to(folder).as_posix() for path in orphans]
    if gc:
        for path in orphans:
            path.unlink()
        for home in {path.parent for path in orphans}:
            ledger.fsync_folder(home)
        found.removed = found.orphans
    return found


def _check_unit(sidecar: Path, folder: Path, found: Verified) -> set[Path]:
    """Adds one unit's files to ``found`` and returns them."""
    try:
        files = json.loads(sidecar.read_text())["files"]
    except (ValueError, KeyError, TypeError):
        found.num_files += 1
        found.corrupt[sidecar.relative_to(folder).as_posix()] = "is not a sidecar that clips wrote"
        unit = sidecar.name.removesuffix(ledger.SIDECAR) + "."
        return {path for path in sidecar.parent.iterdir() if path.name.startswith(unit)}
    for name, about in sorted(files.items()):
        file = sidecar.parent / name
        problem = problem_with(file, about["bytes"], about["sha256"])
        found.num_files += 1
        if problem:
            found.corrupt[file.relative_to(folder).as_posix()] = problem
        else:
            found.num_bytes += about["bytes"]
    return {sidecar.parent / name for name in files}


def problem_with(file: Path, size_bytes: int, sha256: str) -> str | None:
    """Why a file is not the promised one, or ``None``."""
    if not file.is_file():
        return "is missing"
    if (found := file.stat().st_size) != size_bytes:
        return f"has {found} bytes instead of {size_bytes}"
    return None if ledger.digest_file(file) == sha256 else "has another content than when it was finished"


def _is_orphan(path: Path, promised: set[Path], homes: set[Path]) -> bool:
    """Only what clips itself may have left: a partial file, or a shard's or plan's file that no sidecar names."""
    if path in promised or not path.is_file() or path.is_symlink():
        return False
    if path.name.endswith(ledger.PART):
        return True
    if path.parent.name == "_plan" or path.parent.parent.name == "_plan":
        return path.suffix == ".parquet"
    return path.parent in homes and _UNIT_FILE.fullmatch(path.name) is not None
