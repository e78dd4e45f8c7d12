"""Stages that do next to nothing, through the real ledger, so that tests of the command line see real folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from clips_data import ledger
from clips_data.errors import TooFewSucceeded
from clips_data.executor import Job, Report

CALLS: list[str] = []
"""Names of the stages that were called, for tests that ask whether a stage was loaded at all."""
JOBS: list[Job] = []
CONFIGS: list[Any] = []


def download(config: Any, job: Job) -> Report:
    if config.url_column == "broken":
        raise TooFewSucceeded("1 of 10 URLs succeeded, less than --min-success 0.5.")
    if config.url_column == "bug":
        raise ZeroDivisionError("a mistake of ours")
    units = {f"{number:05d}": 4 for number in range(config.num_pairs // 4)}
    return _make("download", job.out or job.work / "pairs", units, config, job, {})


def recaption(config: Any, job: Job) -> Report:
    pairs = job.work / "pairs"
    inputs = {unit: _digest(pairs, unit) for unit in ledger.finished_units(pairs)}
    folder = job.out or job.work / "captions" / config.column
    return _make("recaption", folder, {unit: 4 for unit in inputs}, config, job, inputs)


def shard(config: Any, job: Job) -> Report:
    inputs = {"pairs": ledger.digest_json(ledger.finished_units(job.work / "pairs"))}
    return _make("shard", job.out or job.work / "shards", {"train-00000": 8}, config, job, inputs)


def _make(stage: str, folder: Path, units: dict[str, int], config: Any, job: Job, inputs: dict[str, str]) -> Report:
    CALLS.append(stage)
    JOBS.append(job)
    CONFIGS.append(config)
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(stage, units=[folder / f"{unit}.tar" for unit in units], seconds=0.5)
    values = config.model_dump(mode="json", exclude={"num_pairs"})
    for unit, rows in units.items():
        read = {name: digest for name, digest in inputs.items() if name in (unit, "pairs")}
        counts = {"ok": rows - 1, "http_4xx": 1}
        if ledger.is_done(folder, unit, inputs=read, config=values, overwrite=job.overwrite):
            report.skipped += 1
        else:
            ledger.part(folder / f"{unit}.tar").write_text(f"{unit} {values} {read}")
            ledger.commit(folder, unit, [f"{unit}.tar"], inputs=read, config=values, counts=counts)
            report.made += 1
        report.add(counts)
    return report


def _digest(folder: Path, unit: str) -> str:
    sidecar = ledger.read_sidecar(folder, unit)
    assert sidecar is not None
    return sidecar.digest


READS: dict[str, list[str]] = {"download": [], "recaption": ["pairs"], "shard": ["pairs", "captions/synthetic"]}


def install(monkeypatch: Any, stages: dict[str, Any]) -> None:
    """Puts these stages in the place of the real ones in the table that commands and manifests read."""
    for record in (CALLS, JOBS, CONFIGS):
        record.clear()
    for name, folders in READS.items():
        fake = dataclasses.replace(
            stages[name],
            entry=f"fake_stages:{name}",
            reads=lambda config, run, folders=folders: folders,
            watches=lambda config: {},
        )
        monkeypatch.setitem(stages, name, fake)
