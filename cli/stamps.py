"""Whether a stage of a manifest is finished, told without loading the stage.

After a stage has finished, a stamp is committed through the ledger: ``<work>/.stages/<stage>.done.json`` holds the
config, a digest of every folder that was read, and the counts; ``<stage>.json`` names the files that were made. A
stamp that still holds lets ``clips run`` pass over the stage. One that does not hold decides nothing: the stage is
called, and its own ledger knows what is missing and refuses what was made from something else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .stages import stage_named

if TYPE_CHECKING:
    from clips_data.executor import Report

    from .manifest import Manifest

FOLDER: Final = ".stages"
HASHED_SUFFIXES: Final = (".json", ".jsonl")
"""Files of our folders that are told apart by content: sidecars, which hold the hashes of the others, and metrics."""
HASHED_BELOW_BYTES: Final = 16 << 20
NOT_OF_A_RUN: Final = ("eval", "probe", "export", "report.html", "manifest.yaml")
NO_RESULTS: Final = "log"
"""Folder in a stage's folder for what libraries say. What they leave running may write there after the stage's end."""


@dataclass(frozen=True)
class Standing:
    """Where one stage stands. ``state`` is finished, missing, changed or damaged, ``why`` one phrase about it."""

    stage: str
    state: str
    why: str
    folder: Path
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    num_units: int = 0
    num_bytes: int = 0
    rows_in: int | None = None


def standing(manifest: Manifest, work: Path, stage: str) -> Standing:
    """Reads the stamp and the folders of ``stage``; writes nothing."""
    from clips_data.errors import UserError
    from clips_data.ledger import read_sidecar

    folder = work / stage_named(stage).folder(manifest.stages[stage], manifest.run_of(stage))
    unit, found = _unit(manifest, stage), _made(manifest, work, stage)
    now = Standing(
        stage,
        "missing",
        "begun, not finished" if found else "not begun",
        folder,
        num_units=sum(name.endswith(".done.json") for name in found),
        num_bytes=sum(found.values()),
        rows_in=_rows_in(manifest, work, stage),
    )
    try:
        last = read_sidecar(work / FOLDER, unit)
    except UserError as error:
        return replace(now, state="damaged", why=str(error))
    if last is None:
        return now
    made = json.loads((work / FOLDER / f"{unit}.json").read_text())
    now = replace(now, counts=last.counts, seconds=made["seconds"])
    changes = [
        *_changes("input", last.inputs, inputs_of(manifest, work, stage)),
        *_changes("config", last.config, manifest.saved(stage)),
    ]
    if changes:
        return replace(now, state="changed", why="; ".join(changes))
    for name, size in made["files"].items():
        if found.get(name) != size:
            return replace(now, why=f"{name} is gone or has another size")
    return replace(now, state="finished", why="nothing has changed")


def stamp(manifest: Manifest, work: Path, stage: str, report: Report) -> None:
    """Records that ``stage`` has finished. Called after the stage has committed all of its own files."""
    from clips_data import ledger

    unit = _unit(manifest, stage)
    made = {"files": _made(manifest, work, stage), "seconds": round(report.seconds, 3), "facts": report.facts}
    with ledger.readable_disk_errors(work):
        (work / FOLDER).mkdir(parents=True, exist_ok=True)
        ledger.part(work / FOLDER / f"{unit}.json").write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
        ledger.commit(
            work / FOLDER,
            unit,
            [f"{unit}.json"],
            inputs=inputs_of(manifest, work, stage),
            config=manifest.saved(stage),
            counts=report.counts,
        )


def facts_of(manifest: Manifest, work: Path, stage: str) -> dict[str, Any]:
    """What ``stage`` reported when it finished."""
    made = json.loads((work / FOLDER / f"{_unit(manifest, stage)}.json").read_text())
    return dict(made["facts"])


def _made(manifest: Manifest, work: Path, stage: str) -> dict[str, int]:
    """Bytes of each finished file of ``stage``, by its name in the stage's folder or, elsewhere, in the work folder."""
    config = manifest.stages[stage]
    found = dict(_files(work / stage_named(stage).folder(config, manifest.run_of(stage))))
    for name in stage_named(stage).beside(config):
        found |= {f"{name}/{file}": size for file, size in _files(work / name)}
    return found


def inputs_of(manifest: Manifest, work: Path, stage: str) -> dict[str, str]:
    """Name -> digest of everything that ``stage`` reads: folders to its left, and files its config names."""
    config, run = manifest.stages[stage], manifest.run_of(stage)
    digests = {name: digest_tree(work / name) for name in stage_named(stage).reads(config, run)}
    for name, path in stage_named(stage).watches(config).items():
        digests[name] = digest_watched(path)
    return digests


def digest_tree(folder: Path) -> str:
    """Identifies what the stages have finished in ``folder``, by its sidecars and by the sizes of all files."""
    from clips_data.ledger import digest_file, digest_json

    about: dict[str, Any] = {}
    for name, size in _files(folder):
        hashed = name.endswith(HASHED_SUFFIXES) and size < HASHED_BELOW_BYTES
        about[name] = digest_file(folder / name) if hashed else size
    return digest_json(about)


def digest_watched(path: Path) -> str:
    """Identifies a user's file or folder: small files by content, large ones by size and time of change.

    Of YAML the values count, so that a comment in a prompt file makes nothing out of date.
    """
    from clips_data.ledger import digest_file, digest_json

    if path.suffix == ".yaml" and path.is_file():
        return digest_json(_values_of(path))
    about: dict[str, Any] = {}
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        state = file.stat()
        hashed = state.st_size < HASHED_BELOW_BYTES
        about[file.relative_to(path).as_posix()] = digest_file(file) if hashed else [state.st_size, state.st_mtime_ns]
    return digest_json(about)


def _values_of(path: Path) -> Any:
    import yaml

    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return yaml.load(text, yaml.BaseLoader)  # every value a text: dates would be no JSON
    except yaml.YAMLError:  # told where the file is used
        return text


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """(name relative to ``folder``, bytes) of its finished files, sorted; what other stages put there is left out.

    A stage that writes one file has that for a folder.
    """
    if folder.is_file():
        yield folder.name, folder.stat().st_size
    for place, folders, names in os.walk(folder):
        here = Path(place)
        skip = NOT_OF_A_RUN if here == folder and here.parent.name == "runs" else ()
        folders[:] = sorted(name for name in folders if name not in (*skip, NO_RESULTS) and not name.endswith(".part"))
        for name in sorted(names):
            if name not in skip and not name.startswith(".") and not name.endswith(".part"):
                file = here / name
                yield file.relative_to(folder).as_posix(), file.stat().st_size


def _unit(manifest: Manifest, stage: str) -> str:
    """The stamp's name: one for every folder that the stage may write under one work folder."""
    folder = stage_named(stage).folder(manifest.stages[stage], manifest.run_of(stage))
    kind = stage_named(stage)
    if kind.of_run:
        return f"{kind.name}-{manifest.run_of(stage)}"
    return f"{kind.name}-{folder.rpartition('/')[2]}" if "/" in folder else kind.name


def _rows_in(manifest: Manifest, work: Path, stage: str) -> int | None:
    """Rows that the finished units of the first folder the stage reads hold, as far as sidecars tell."""
    from clips_data.ledger import SIDECAR

    config = manifest.stages[stage]
    if stage_named(stage).name == "download":
        return getattr(config, "num_pairs", None) if getattr(config, "source", "") == "demo" else None
    folders = stage_named(stage).reads(config, manifest.run_of(stage))
    rows = [
        sum(json.loads(sidecar.read_text())["counts"].values()) for sidecar in (work / folders[0]).glob("*" + SIDECAR)
    ]
    return sum(rows) if rows else None


def _changes(kind: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for every difference: of inputs the name, of a config both values."""
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if kind == "input":
        return [f"{name} changed" for name in names]
    return [f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names]
