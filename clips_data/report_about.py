"""The report's last part: which versions made what, and the commands and settings that make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from clips_data import config as configs
from clips_data import ledger, schema
from clips_data import report_html as h
from clips_data.redact import without_secrets
from clips_data.report_evals import Result

MANIFEST: Final = "manifest.yaml"
_STAMPS: Final = ".stages"
_DEFAULTS: Final[dict[str, type[configs.StageConfig]]] = {
    "download": configs.DownloadConfig,
    "recaption": configs.RecaptionConfig,
    "score": configs.ScoreConfig,
    "shard": configs.ShardConfig,
    "report": configs.ReportConfig,
}
_ORDER: Final = ("download", "recaption", "score", "shard", "embed", "train", "eval", "export", "report")
_MOST_LINES: Final = 400


def environment(counts: Mapping[str, Any], work: Path, run: Path, results: list[Result]) -> str:
    """Versions as the stages wrote them down."""
    rows = [
        ("clips", _joined(_tool_versions(work, run))),
        ("img2dataset", _joined(_of_files((work / schema.PAIRS).glob("*_stats.json"), "img2dataset_version"))),
        ("open_clip, of the export", _joined(_of_files([run / "export" / "clips_export.json"], "open_clip_version"))),
    ]
    for column, about in counts.get("captions", {}).items():
        makers = [f"{one['engine']} {one['engine_version']}" for one in about["made_by"] if one["engine"]]
        devices = list((about["cost"] or {}).get("devices", {}))
        rows.append((f"captions {column}", _joined([*makers, *devices])))
    told: dict[str, list[str]] = {}
    for result in results:
        for name, value in _flat(result.about.get("environment") or {}):
            told.setdefault(f"evaluation, {name}", []).append(value)
    rows += [(name, _joined(values)) for name, values in told.items()]
    known = [[h.text(name), value] for name, value in rows if value]
    return '<h2 id="environment">Environment</h2>' + h.table(["", "<version"], known) if known else ""


def commands(work: Path, run: Path, results: list[Result]) -> str:
    """What makes this run again: its manifest where it has one, and a command for each stage."""
    evaluated = [str(result.about["command"]) for result in results if result.about.get("command")]
    lines = _stage_commands(work, run, evaluated)
    manifest = run / MANIFEST
    parts = []
    if manifest.exists():
        text = manifest.read_text(encoding="utf-8", errors="replace")
        parts.append(
            f"<p>Save the manifest below as <code>{MANIFEST}</code> and run <code>clips run {MANIFEST}</code>.</p>"
            f"<details><summary>{MANIFEST}, every default written out</summary><pre>{_pre(text)}</pre></details>"
        )
    if lines:
        start = "Or stage" if parts else "Stage"
        parts.append(f"<p>{start} by stage, with what differs from the defaults where the data stages know them:</p>")
        parts.append(f"<pre>{_pre(chr(10).join(dict.fromkeys(lines)))}</pre>")
    if not parts:
        return ""
    return f'<h2 id="again">Make it again</h2>{"".join(parts)}'


# --- versions ---------------------------------------------------------------------------------------------------------


def _tool_versions(work: Path, run: Path) -> list[str]:
    columns = [path for kind in (schema.CAPTIONS, schema.SCORES) for path in sorted((work / kind).glob("*"))]
    folders = [work / schema.PAIRS, *columns, work / schema.SHARDS, run, run / "eval"]
    return _of_files((path for folder in folders for path in sorted(folder.glob("*" + ledger.SIDECAR))), "tool_version")


def _of_files(paths: Iterable[Path], name: str) -> list[str]:
    """What JSON files say under this name; one that cannot be read says nothing, and the stages complain of it."""
    found = [about[name] for path in paths if isinstance((about := _json(path)), dict) and about.get(name)]
    return [str(value) for value in found]


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _flat(value: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, one in sorted(value.items()):
        if isinstance(one, dict):
            yield from _flat(one)
        else:
            yield name.replace("_", " "), str(one)


def _joined(values: Iterable[str]) -> str:
    return h.bar_figures(list(dict.fromkeys(values)))


# --- commands ---------------------------------------------------------------------------------------------------------


def _stage_commands(work: Path, run: Path, evaluated: list[str]) -> list[str]:
    """In the order of the stages; ``evaluated`` are the command lines that results name."""
    found = []
    for path in (work / _STAMPS).glob("*" + ledger.SIDECAR):
        unit, about = path.name.removesuffix(ledger.SIDECAR), _json(path)
        stage = unit.partition("-")[0]
        if isinstance(about, dict) and stage in _ORDER and _is_of(unit, run):
            found.append((stage, unit, _command(stage, about["config"], run.name)))
    if not found:
        found = [(stage, "", _command(stage, config, run.name)) for stage, config in _sidecars(work, run)]
    found += [("eval", "other benchmarks", command) for command in evaluated]
    return [line for _, _, line in sorted(found, key=lambda one: (_ORDER.index(one[0]), one[1:]))]


def _is_of(unit: str, run: Path) -> bool:
    """Stages that work on a run are stamped with its name."""
    stage, _, name = unit.partition("-")
    return stage not in ("train", "eval", "export", "report") or name == run.name


def _sidecars(work: Path, run: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """What the finished units of each stage say of their config, which is the part of it that decides the contents."""
    folders = [("download", work / schema.PAIRS)]
    folders += [("recaption", path) for path in sorted((work / schema.CAPTIONS).glob("*"))]
    folders += [("score", path) for path in sorted((work / schema.SCORES).glob("*"))]
    folders += [("shard", work / schema.SHARDS)]
    for stage, folder in folders:
        for unit in ledger.finished_units(folder)[:1]:
            sidecar = ledger.read_sidecar(folder, unit, check_files=False)
            assert sidecar is not None
            yield stage, dict(sidecar.config)
    if isinstance(trained := _json(run / "config.json"), dict):
        yield "train", trained
    if (sidecar := ledger.read_sidecar(run / "eval", "eval", check_files=False)) is not None:
        yield "eval", dict(sidecar.config)


def _command(stage: str, config: Mapping[str, Any], run: str) -> str:
    """One line; values that are the defaults of the config class are left out, where this house knows it."""
    fields = _DEFAULTS[stage].model_fields if stage in _DEFAULTS else None
    words = ["clips", stage]
    if stage == "download":
        words.append(str(without_secrets(config.get("source", "LIST"))))
    if stage in ("eval", "export") and "name" not in config:
        words += ["--name", run]
    for name, value in config.items():
        if name == "source" or value is None or (fields is not None and name not in fields):
            continue
        if fields is not None and _plain(fields[name].get_default()) == _plain(value):
            continue
        words += _option(name, value)
    return shlex.join(words)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _option(name: str, value: Any) -> list[str]:
    spelt = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [spelt if value else f"--no-{spelt[2:]}"]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        if any("," in one for one in value):
            return [word for one in value for word in (spelt, one)]
        return [spelt, ",".join(value) or "none"]
    if isinstance(value, list | dict):
        return [spelt, json.dumps(value)]
    return [spelt, str(without_secrets(value))]


def _pre(text: str) -> str:
    """Lines as they are, each escaped like any text."""
    lines = text.splitlines()
    rest = [f"… {len(lines) - _MOST_LINES} more lines"] if len(lines) > _MOST_LINES else []
    return "\n".join(h.line(one) for one in [*lines[:_MOST_LINES], *rest])
