"""Result files of ``clips eval``: one JSON file for each model and benchmark, with everything that its numbers mean.

``eval.schema.json``, beside the manifests, is the JSON schema of these files.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from clips_data import ledger
from clips_data.errors import UserError
from clips_data.schema import SCHEMA_VERSION
from clips_train.encoders import Encoder
from clips_train.evals.outcome import LEVEL, RESAMPLES, Outcome
from clips_train.use_config import Benchmark, EvalConfig

PACKAGES: Final = ("clips", "torch", "open_clip_torch", "torchvision", "pillow", "pycocoevalcap")
SETTINGS: Final = frozenset({"resize", "precision", "seed", "max_samples"})
"""Choices of an ``EvalConfig`` that change a benchmark's figures."""


class Score(BaseModel):
    """One figure with its interval."""

    model_config = ConfigDict(extra="forbid")

    value: float
    low: float = Field(description="Lower end of the bootstrap interval.")
    high: float
    chance: float | None = Field(None, description="What random answers score.")


class Result(BaseModel):
    """What one model scored on one benchmark."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    benchmark: str
    task: str
    command: str = Field(description="The command line that made this file, without paths of its program.")
    model: dict[str, Any] = Field(description="Name, digest of the weights, input size, width, logit scale.")
    preprocessing: dict[str, Any] = Field(
        description="open_clip's preprocess_cfg as it was used: resize_mode and so on."
    )
    tokenizer: dict[str, Any] = Field(description="Name, and context length in tokens.")
    data: dict[str, Any] = Field(description="Path, format, split, and a digest of keys, texts and labels.")
    scores: dict[str, Score] = Field(description="Shares are in 0…1, other figures in the unit of their name.")
    interval: dict[str, Any] = Field(description="How the intervals were made.")
    counts: dict[str, int] = Field(description="Images and texts by what became of them.")
    about: dict[str, Any] = Field(description="How the figures were computed: ties, templates, tokenizers of metrics.")
    details: dict[str, Any] = Field(description="Per class, hardest misses, captions.")
    settings: dict[str, Any] = Field(description="The benchmark and the choices that change its figures.")
    environment: dict[str, Any] = Field(description="Versions, device and arithmetic.")


def settings_of(benchmark: Benchmark, config: EvalConfig) -> dict[str, Any]:
    chosen = config.model_dump(mode="json", include={*SETTINGS, *(["judge"] if benchmark.task == "captioning" else [])})
    return {**chosen, "benchmark": benchmark.model_dump(mode="json", exclude={"data", "annotations"})}


def build(
    benchmark: Benchmark, encoder: Encoder, data: Mapping[str, Any], outcome: Outcome, config: EvalConfig, command: str
) -> Result:
    """Of one outcome. ``data`` is the data set's ``about``."""
    assert benchmark.task is not None
    return Result(
        benchmark=benchmark.name,
        task=benchmark.task,
        command=command,
        model=encoder.about,
        preprocessing=encoder.preprocessing.resized(config.resize).about,
        tokenizer={"name": encoder.tokenizer, "context_length": encoder.context_length},
        data=dict(data),
        scores={name: Score(**figure.shown(seed=config.seed)) for name, figure in outcome.figures.items()},
        interval=interval_about(config.seed, str(outcome.about.get("unit", "an image"))),
        counts=dict(outcome.counts),
        about=outcome.about,
        details=outcome.details,
        settings=settings_of(benchmark, config),
        environment=environment(encoder, config),
    )


def interval_about(seed: int, unit: str = "an image with all of its texts") -> dict[str, Any]:
    return {"method": "percentile bootstrap", "unit": unit, "level": LEVEL, "resamples": RESAMPLES, "seed": seed}


def environment(encoder: Encoder, config: EvalConfig) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": encoder.device.type,
        "precision": config.precision,
        "versions": versions,
    }


def command_line() -> str:
    """What was typed, with the program's own path left out: ``clips eval --model …``."""
    import shlex

    return shlex.join(["clips", *sys.argv[1:]]) if Path(sys.argv[0]).name in ("clips", "__main__.py") else "clips eval"


def read(path: Path) -> Result:
    """Raises ``UserError`` for a file that is none of ours."""
    try:
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is no result of `clips eval` ({reason}). Make it again with --overwrite.") from None


def write(folder: Path, result: Result, *, inputs: Mapping[str, str]) -> Path:
    """``folder/<benchmark>.json`` and its sidecar, atomically."""
    path = folder / f"{result.benchmark}.json"
    with ledger.readable_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            result.model_dump(mode="json", exclude_none=True), indent=1, sort_keys=True, ensure_ascii=False
        )
        ledger.part(path).write_text(text + "\n", encoding="utf-8")
        counts = result.counts
        ledger.commit(folder, result.benchmark, [path.name], inputs=inputs, config=result.settings, counts=counts)
    return path
