"""What a sample leaves outside the finished units: logs, unfinished files, training runs and what is made of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clips_data import ledger, schema
from clips_data.forgotten import Forgotten
from clips_data.redact import host_of

_UNIT_FILE: Final = re.compile(r"((train|heldout)-)?\d{5}(\.index)?\.(tar|parquet|safetensors)")
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>,;)\]}]+")
_HOST: Final = re.compile(r"[\w-]+(?:\.[\w-]+)+")
_KEY: Final = re.compile(rb"(?<![\w.])\d{%d}(?!\w)" % (schema.SHARD_DIGITS + schema.KEY_DIGITS_IN_SHARD))
_TEXTS: Final = (".html", ".json", ".jsonl", ".csv", ".txt", ".md")


@dataclass(frozen=True)
class SeenBy:
    """A training run whose shards held some of the samples. Nothing of it is changed."""

    run: str
    num_samples: int | None
    """Of the samples, those in its training split; ``None`` where its shards are not here any more."""
    checkpoints: list[str]
    """Folders with weights that have seen them, exports included."""


def seen_by(work: Path, in_training: Mapping[str, int], lineage: Mapping[str, str]) -> list[SeenBy]:
    """The runs under ``work`` that were trained on some of the samples.

    ``in_training`` has the number of them by digest of a ``shards/`` folder, ``lineage`` as in ``Forgotten``.
    """
    found = []
    for run in sorted(path for path in (work / schema.RUNS).glob("*") if path.is_dir()):
        digests = _trained_on(run)
        while any(digest not in in_training and digest in lineage for digest in digests):
            digests = {digest if digest in in_training else lineage.get(digest, digest) for digest in digests}
        numbers = [in_training.get(digest) for digest in digests]
        if all(number == 0 for number in numbers):
            continue
        checkpoints = [*run.glob("stages/*/checkpoints/step-*"), *run.glob("checkpoints/step-*")]
        weights = [*sorted(checkpoints), *run.glob("export")]
        known = [number for number in numbers if number is not None]
        names = [path.relative_to(work).as_posix() for path in weights]
        found.append(SeenBy(run.relative_to(work).as_posix(), max(known) if known else None, names))
    return found


def _trained_on(run: Path) -> set[str]:
    """Digests of the shards that a run was begun with, or was finished with."""
    digests = set()
    begun = run / "begun.jsonl"
    if begun.exists() and (lines := begun.read_text().splitlines()):
        digests.add(json.loads(lines[0])["shards"])
    if (sidecar := ledger.read_sidecar(run, "train", check_files=False)) is not None:
        digests.add(sidecar.inputs["shards"])
    return digests


def shown_in(work: Path, keys: set[str]) -> list[str]:
    """Texts below ``runs/`` that name one of the keys: evaluations, captions, report pages."""
    names = {key.encode() for key in keys}
    found = []
    for path in sorted((work / schema.RUNS).rglob("*")):
        if path.suffix in _TEXTS and path.is_file() and not names.isdisjoint(_KEY.findall(path.read_bytes())):
            found.append(path.relative_to(work).as_posix())
    return found


def remove_unfinished(folders: Sequence[Path]) -> int:
    """Removes what killed and limited runs left in these stages' folders; returns the number of files.

    Finished units and journals stay.
    """
    num_files = 0
    for folder in folders:
        promised = _promised(folder)
        for path in sorted(folder.iterdir()):
            is_unit_file = _UNIT_FILE.fullmatch(path.name) and not path.is_symlink() and path.name not in promised
            if not path.is_dir() and (path.name.endswith(ledger.PART) or is_unit_file):
                path.unlink()
                num_files += 1
            elif path.is_dir() and (path.name == "_plan" or path.name.startswith("_list-")):
                num_files += sum(file.is_file() for file in path.rglob("*"))
                shutil.rmtree(path)
        ledger.fsync_folder(folder)
    return num_files


def _promised(folder: Path) -> set[str]:
    promised: set[str] = set()
    for unit in ledger.finished_units(folder):
        sidecar = ledger.read_sidecar(folder, unit, check_files=False)
        assert sidecar is not None
        promised |= sidecar.files.keys()
    return promised


def clean_logs(work: Path, forgotten: Forgotten) -> None:
    """Removes what was heard from these hosts' robots.txt, and lines of logs that name a host or a URL."""
    for path in sorted((work / schema.PAIRS / "log" / "robots").glob("*/*.json")):
        if forgotten.has_host(host_of(json.loads(path.read_text())["robots_url"])):
            path.unlink()
    for folder in (work / schema.PAIRS, *(work / schema.CAPTIONS).glob("*"), *(work / schema.SCORES).glob("*")):
        for path in sorted((folder / "log").glob("*")):
            if path.is_file() and not path.name.startswith("."):
                _clean_log(path, forgotten)


def _clean_log(path: Path, forgotten: Forgotten) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if not _names(line.decode(errors="replace"), forgotten)]
    if len(kept) < len(lines):
        ledger.write_bytes(path, b"".join(kept))


def _names(line: str, forgotten: Forgotten) -> bool:
    hosts = (name.lower() for name in _HOST.findall(line))
    return any(forgotten.has_host(host) for host in hosts) or any(forgotten.matches(url) for url in _URL.findall(line))
