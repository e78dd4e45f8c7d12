"""``clips eval``: models are scored on the held-out split and on benchmarks, each score in a file of its own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from clips_data import ledger
from clips_data.errors import UserError
from clips_data.schema import SCHEMA_VERSION
from clips_train import checkpoint, encoders, shards
from clips_train.encoders import Encoder, Named
from clips_train.evals import benchmarks, formats, heldout, result, retrieval
from clips_train.evals.heldout import Derived
from clips_train.evals.items import DataSet
from clips_train.evals.outcome import Figure, Outcome
from clips_train.use_config import Benchmark, EvalConfig

FOLDER, UNIT = "eval", "eval"
SCORES, CAPTIONS = "eval.json", "captions.jsonl"
SHARDS = "shards"
"""What stands for the work folder's shards where a benchmark's data are named."""
HELDOUT_SETTINGS = frozenset(
    {"split", "max_samples", "web_column", "synthetic_column", "captions", "queries", "resize", "precision", "seed"}
)
"""Choices that change the figures of the held-out split."""

Given = Callable[[Benchmark], DataSet | None]
"""Opens the benchmarks that this package knows nothing of; ``None`` for others."""
Task = Callable[[Encoder, DataSet, EvalConfig, Benchmark], Outcome]


def evaluate(
    config: EvalConfig,
    *,
    run: Path,
    shards: Path,
    overwrite: bool = False,
    quiet: bool = False,
    derived: Derived | None = None,
    given: Given | None = None,
) -> dict[str, Any]:
    """Scores the newest checkpoint of a run; files go to its folder ``eval/``.

    The held-out split gives retrieval both ways by every query set, and the captioner's texts. Returns the scores as
    plain figures; those of a benchmark begin with its name. Skips what was scored before from the same checkpoint, data
    and config; ``ResumeRefused`` when it was from others.
    """
    whole = _Evaluation(config, shards, derived or {}, given, overwrite, quiet)
    return whole.score(encoders.run_in(run), run / FOLDER, needs_shards=config.heldout and not config.benchmark)


def evaluate_models(
    config: EvalConfig,
    *,
    work: Path,
    shards: Path,
    out: Path,
    overwrite: bool = False,
    quiet: bool = False,
    derived: Derived | None = None,
    given: Given | None = None,
) -> dict[str, dict[str, Any]]:
    """As ``evaluate``, of the models that the config names; files go to ``out/<model>/``. Name → figures."""
    whole = _Evaluation(config, shards, derived or {}, given, overwrite, quiet)
    needs_shards = config.heldout and not config.benchmark
    found = {}
    for named in encoders.find(config.model, config.pretrained, work / "runs"):
        found[named.name] = whole.score(named, out / folder_name(named), needs_shards=needs_shards)
    return found


def folder_name(named: Named) -> str:
    """A model's folder under ``evals/``: its name as a file name, and eight digits that tell weights apart."""
    plain = "".join(char if char.isalnum() or char in "._-" else "-" for char in named.name).strip("-.")
    return f"{plain[-80:]}-{ledger.digest_json(named.digest)[:8]}"


@dataclass
class _Evaluation:
    """One config, and what is opened once for all models."""

    config: EvalConfig
    shards: Path
    derived: Derived
    given: Given | None
    overwrite: bool
    quiet: bool
    data: dict[str, DataSet] = field(default_factory=dict)

    def score(self, named: Named, out: Path, *, needs_shards: bool) -> dict[str, Any]:
        """Everything that is asked of one model, which is loaded when the first score is missing."""
        model = _Model(named, self.config)
        found: dict[str, Any] = {}
        if self.config.heldout and (needs_shards or (self.shards / "index.json").exists()):
            found |= self._heldout(model, out)
        for benchmark in map(benchmarks.resolved, self.config.benchmark):
            scored = self._benchmark(model, benchmark, out)
            found |= {f"{benchmark.name}_{name}": score.value for name, score in scored.scores.items()}
        if not found:
            raise UserError(
                f"There is nothing to score on: {self.shards} holds no shards and no --benchmark was given. Give one "
                "as --benchmark NAME=PATH, or --work the folder that holds shards/."
            )
        return found

    def _heldout(self, model: _Model, out: Path) -> dict[str, Any]:
        config = self.config
        split = heldout.open_split(self.shards, config.split)
        inputs = {"shards": split.digest, "checkpoint": model.named.digest}
        settings = config.model_dump(mode="json", include=set(HELDOUT_SETTINGS))
        if ledger.is_done(out, UNIT, inputs=inputs, config=settings, overwrite=self.overwrite, has_out=False):
            return figures(json.loads((out / SCORES).read_text()))
        counts: Counter[str] = Counter()
        encoded = heldout.encode_split(model.encoder, split, config, self.derived, counts, quiet=self.quiet)
        found = _heldout_result(model, config, split, encoded, counts)
        with ledger.readable_disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            ledger.part(out / SCORES).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in encoded.rows)
            ledger.part(out / CAPTIONS).write_text("".join(lines), encoding="utf-8")
            ledger.commit(out, UNIT, [SCORES, CAPTIONS], inputs=inputs, config=settings, counts=counts)
        return figures(found)

    def _benchmark(self, model: _Model, benchmark: Benchmark, out: Path) -> result.Result:
        if benchmark.data == SHARDS:
            benchmark = benchmark.model_copy(update={"data": str(self.shards)})
        if benchmark.name not in self.data:
            opened = self.given(benchmark) if self.given else None
            self.data[benchmark.name] = opened or formats.open_data(benchmark, self.shards.parent)
        data = self.data[benchmark.name]
        inputs = {
            "data": str(data.about["digest"]),
            "model": model.named.digest,
            **self._further_inputs(benchmark, data),
        }
        settings = result.settings_of(benchmark, self.config)
        unit, again = benchmark.name, self.overwrite
        if ledger.is_done(out, unit, inputs=inputs, config=settings, overwrite=again, has_out=False):
            return result.read(out / f"{benchmark.name}.json")
        outcome = self._task(benchmark)(model.encoder, data, self.config, benchmark)
        found = result.build(benchmark, model.encoder, data.about, outcome, self.config, result.command_line())
        result.write(out, found, inputs=inputs)
        return found

    def _further_inputs(self, benchmark: Benchmark, data: DataSet) -> dict[str, str]:
        """What else is read: images, by sizes or shards; classes and templates that are files; the judge."""
        from clips_train.evals import listed, prompts

        found = prompts.digests_of_files(benchmark.classes, benchmark.templates)
        reads = [item.read for item in data.items] + [read for pairing in data.pairings for read in pairing.images]
        if sizes := [read.num_bytes for read in reads if isinstance(read, listed.Sized)]:
            found["images"] = ledger.digest_json(sizes)
        if "shards_digest" in data.about:
            found["shards"] = str(data.about["shards_digest"])
        if benchmark.task == "captioning" and self.named_judge is not None:
            found["judge"] = self.named_judge.digest
        return found

    def _task(self, benchmark: Benchmark) -> Task:
        from clips_train.evals import captioning, compositionality, zero_shot

        if benchmark.task == "captioning":
            return partial(captioning.score, judge=self.judge)
        tasks: Mapping[str, Task] = {
            "retrieval": retrieval.score,
            "zero_shot": zero_shot.score,
            "compositionality": compositionality.score,
        }
        assert benchmark.task is not None
        return tasks[benchmark.task]

    @cached_property
    def named_judge(self) -> Named | None:
        """The model that CLIPScore asks, where it is not the one that is scored."""
        if self.config.judge is None:
            return None
        (named,) = encoders.find([self.config.judge], (), self.shards.parent / "runs")
        return named

    @cached_property
    def judge(self) -> Encoder | None:
        return None if self.named_judge is None else _Model(self.named_judge, self.config).encoder


class _Model:
    """A model that is loaded when it is asked for."""

    def __init__(self, named: Named, config: EvalConfig) -> None:
        self.named, self._config = named, config
        self._encoder: Encoder | None = None

    @property
    def encoder(self) -> Encoder:
        if self._encoder is None:
            config = self._config
            self._encoder = encoders.load(self.named, config.device, config.precision, bert_vocab=config.bert_vocab)
        return self._encoder


def retrieval_by_queries(
    encoder: Encoder, split: shards.Split, config: EvalConfig, *, derived: Derived | None = None, quiet: bool = True
) -> dict[str, dict[str, Any]]:
    """The scores of each query set, with its ``num_images`` and ``num_texts``; for models that are in training too."""
    without = config.model_copy(update={"captions": False})
    encoded = heldout.encode_split(encoder, split, without, derived or {}, Counter(), quiet=quiet)
    return {name: _plain(encoded, name, found) for name, found in encoded.figures().items()}


def figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """A held-out result without its nesting. Scores of the second and further query sets begin with the set's name."""
    further: Sequence[tuple[str, Any]] = [(name, found["retrieval_by_queries"][name]) for name in found["queries"][1:]]
    return {
        "num_images": found["num_images"],
        "num_texts": found["num_texts"],
        "unreadable": found["unreadable"],
        **found["retrieval"],
        **{f"{name}_{key}": value for name, scores in further for key, value in scores.items()},
    }


def _heldout_result(
    model: _Model, config: EvalConfig, split: shards.Split, encoded: heldout.Encoded, counts: Counter[str]
) -> dict[str, Any]:
    found = encoded.figures()
    by_queries = {name: _plain(encoded, name, figures) for name, figures in found.items()}
    first = by_queries[config.queries[0]]
    trained = model.encoder.trained
    about = checkpoint.read_about(trained.folder) if trained else {}
    return {
        "schema_version": SCHEMA_VERSION,
        "benchmark": "heldout",
        "task": "retrieval",
        "command": result.command_line(),
        **({"checkpoint": trained.folder.name, "step": about["step"], "samples": about["samples"]} if trained else {}),
        "model": model.encoder.about,
        "preprocessing": model.encoder.preprocessing.resized(config.resize).about,
        "tokenizer": {"name": model.encoder.tokenizer, "context_length": model.encoder.context_length},
        "data": {"path": str(split.folder), "format": "shards", "split": config.split, "digest": split.digest},
        "split": config.split,
        "num_images": encoded.num_images,
        "num_texts": first["num_texts"],
        "unreadable": sum(number for name, number in counts.items() if name.startswith("bad.")),
        "counts": dict(counts),
        "ties": retrieval.ABOUT["ties"],
        "queries": list(config.queries),
        "retrieval": {name: score for name, score in first.items() if not name.startswith("num_")},
        "retrieval_by_queries": by_queries,
        "scores": {
            name if queries == config.queries[0] else f"{queries}_{name}": figure.shown(seed=config.seed)
            for queries, figures in found.items()
            for name, figure in figures.items()
        },
        "details": {"hardest": encoded.hardest(config.queries[0])},
        "interval": result.interval_about(config.seed),
        "environment": result.environment(model.encoder, config),
    }


def _plain(encoded: heldout.Encoded, name: str, found: Mapping[str, Figure]) -> dict[str, Any]:
    queries = encoded.queries[name]
    scores = {key: figure.value for key, figure in found.items()}
    chance = {f"chance_{key}": figure.chance for key, figure in found.items() if figure.chance is not None}
    return {"num_images": len(queries.images), "num_texts": len(queries.image_of_text_M), **scores, **chance}
