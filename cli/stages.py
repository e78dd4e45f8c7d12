"""The stages, left to right: which config, which call, which folders. Commands and manifests read this one table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .options import load

if TYPE_CHECKING:
    from pydantic import BaseModel

    from clips_data.executor import Job, Report

DATA_OPTIONS: Final = (
    "work", "out", "limit", "slice", "processes", "overwrite", "dry-run", "json", "debug", "quiet",
)  # fmt: skip
DOWNLOAD_OPTIONS: Final = (*DATA_OPTIONS[:5], "executor", "append", "retry", *DATA_OPTIONS[5:])
RECAPTION_OPTIONS: Final = (*DATA_OPTIONS[:5], "executor", "budget", *DATA_OPTIONS[5:])
EMBED_OPTIONS: Final = tuple(name for name in DATA_OPTIONS if name != "processes")
RUN_OPTIONS: Final = ("work", "out", "overwrite", "dry-run", "json", "debug", "quiet")
IN_RUN_OPTIONS: Final = ("work", "overwrite", "dry-run", "json", "debug", "quiet")
DEFAULT_RUN: Final = "default"


@dataclass(frozen=True)
class Stage:
    """One stage. ``config`` and ``entry`` are ``"module:name"`` and are imported only when the stage is used.

    ``folder(config, run)`` is the folder (or file) it writes and ``reads(config, run)`` those it reads, relative to the
    work folder; ``run`` is the name of the training run. ``call(stage, config, job, run)`` does the work.
    """

    name: str
    config: str
    entry: str
    folder: Callable[[Any, str], str]
    reads: Callable[[Any, str], list[str]]
    about: str
    example: str
    positional: str | None = "shards"
    options: tuple[str, ...] = DATA_OPTIONS
    call: Callable[[Stage, Any, Job, str], Report] = lambda stage, config, job, run: load(stage.entry)(config, job)
    watches: Callable[[Any], dict[str, Path]] = lambda config: {}
    """Files outside the work folder that the stage reads, by the config key that names them."""
    beside: Callable[[Any], list[str]] = lambda config: []
    """Further folders that the stage writes, relative to the work folder."""
    of_run: bool = False
    """Whether the stage works on one training run, so that a manifest's name is the run's."""

    @property
    def config_class(self) -> type[BaseModel]:
        config: type[BaseModel] = load(self.config)
        return config

    def output(self, config: Any, job: Job, run: str) -> Path:
        return job.out or job.work / self.folder(config, run)


def _shards_of(job: Job) -> Path:
    """The folder of the shards that were named, else that of the work folder."""
    return job.only[0].parent if job.only else job.work / "shards"


def _call_embed(stage: Stage, config: Any, job: Job, run: str) -> Report:
    import contextlib

    from clips_data import locks
    from clips_data.executor import Report, parse_slice

    started = time.monotonic()
    out = stage.output(config, job, run)
    with contextlib.nullcontext() if job.dry_run else locks.alone(out, "embedding", job.slice):
        done = load(stage.entry)(
            config,
            shards=_shards_of(job),
            out=out,
            runs=job.work / "runs",
            only=[path.name.removesuffix(".tar") for path in job.only] if job.only else None,
            part=parse_slice(job.slice),
            limit=job.limit,
            overwrite=job.overwrite,
            dry_run=job.dry_run,
            quiet=job.quiet,
        )
    seconds = time.monotonic() - started
    return Report(stage.name, done.files, done.made, done.skipped, dict(done.counts), done.facts, seconds=seconds)


def _call_train(stage: Stage, config: Any, job: Job, run: str) -> Report:
    started = time.monotonic()
    shards = job.only or job.work / "shards"
    out = stage.output(config, job, run)
    if job.dry_run:
        return _dry(stage, out)
    index = job.work / "index"
    facts = load(stage.entry)(config, shards=shards, out=out, index=index, overwrite=job.overwrite, quiet=job.quiet)
    return _report(stage, [out], facts, started)


def _call_eval(stage: Stage, config: Any, job: Job, run: str) -> Report:
    """A run, or the models that the config names, on the held-out split and on benchmarks."""
    from . import scores

    started = time.monotonic()
    shards = _shards_of(job)
    out = stage.output(config, job, run)
    if job.dry_run:
        return _dry(stage, out)
    asked = {"shards": shards, "overwrite": job.overwrite, "quiet": job.quiet}
    if config.model:
        return _report(stage, [out], scores.of_models(config, work=job.work, out=out, **asked), started)
    return _report(stage, [out], scores.of_run(load(stage.entry), config, job.work / "runs" / run, **asked), started)


def _call_export(stage: Stage, config: Any, job: Job, run: str) -> Report:
    """It reads a run's checkpoint and the shards, and writes into the run's folder."""
    started = time.monotonic()
    shards = _shards_of(job)
    out = stage.output(config, job, run)
    if job.dry_run:
        return _dry(stage, out)
    folder = job.work / "runs" / run
    facts = load(stage.entry)(config, run=folder, shards=shards, overwrite=job.overwrite)
    return _report(stage, [out], facts, started)


def _call_probe(stage: Stage, config: Any, job: Job, run: str) -> Report:
    """It reads a run's checkpoint and the shards, and writes into the run's folder; the truth comes from here."""
    from . import probed

    started = time.monotonic()
    shards = _shards_of(job)
    out = stage.output(config, job, run)
    if job.dry_run:
        return _dry(stage, out)
    asked = {"shards": shards, "overwrite": job.overwrite, "quiet": job.quiet}
    return _report(stage, [out], probed.of_run(load(stage.entry), config, job.work / "runs" / run, **asked), started)


def _dry(stage: Stage, out: Path) -> Report:
    from clips_data.executor import Report

    return Report(stage.name, facts={"would_write": str(out)})


def _report(stage: Stage, units: list[Path], facts: Mapping[str, Any], started: float) -> Report:
    from clips_data.executor import Report

    skipped = bool(facts.get("skipped", False))
    plain = {name: value for name, value in facts.items() if isinstance(value, int | float | str) and name != "skipped"}
    seconds = time.monotonic() - started
    return Report(stage.name, units=units, made=int(not skipped), skipped=int(skipped), facts=plain, seconds=seconds)


def _existing(config: Any, *keys: str) -> dict[str, Path]:
    """The paths among these values of a config; packaged and hub names are not files of the user."""
    paths = {key: Path(str(getattr(config, key))) for key in keys}
    return {key: path for key, path in paths.items() if path.exists()}


def _recaption_folders(config: Any) -> list[str]:
    """Of the columns that the prompt makes."""
    from clips_data.recaption import prompts

    return [f"captions/{name}" for name in prompts.load(config.prompt).column_names(config.column)]


def _recaption_reads(config: Any, run: str) -> list[str]:
    """The columns that a prompt takes in, and the scores that its gate looks at, are said by the prompt file."""
    from clips_data.recaption import prompts

    prompt = prompts.load(config.prompt)
    gate = [f"scores/{config.scores}"] if prompt.gate is not None else []
    return ["pairs", *(f"captions/{column}" for column in prompt.columns if column != "web"), *gate]


def _model(config: Any, packaged: str) -> dict[str, Path]:
    """The model's folder, when it is one."""
    path = _model_path(config.model, packaged)
    return {"model": path} if path.exists() else {}


def _model_path(name: str, packaged: str) -> Path:
    """The packaged weights, or a path with or without ``local-dir:``, whether it is there or not."""
    import clips_data

    if name == "demo":
        return Path(clips_data.__file__).parent / "demo" / "weights" / packaged
    return Path(name.removeprefix("local-dir:"))


def _teachers(config: Any) -> dict[str, Path]:
    """Their folders, of those that are folders."""
    paths = {f"model {number}": _model_path(name, "clip") for number, name in enumerate(config.model)}
    return {name: path for name, path in paths.items() if path.exists()}


def _benchmark_files(config: Any) -> dict[str, Path]:
    """Tables of benchmarks. Folders of pictures are told apart when they are read, by their keys, texts and labels."""
    paths = {one.name: Path(one.annotations or one.data) for one in config.benchmark}
    return {f"benchmark {name}": path for name, path in paths.items() if path.is_file()}


def _recaption_watches(config: Any) -> dict[str, Path]:
    """The model and the prompt file. A change of either is a change of the captions."""
    from .manifest import packaged_file

    prompt = _existing(config, "prompt") or {"prompt": packaged_file(f"prompts/{config.prompt}.yaml")}
    return {**_model(config, "captioner"), **prompt}


def _columns(config: Any) -> list[str]:
    return [f"captions/{column}" for column in config.columns if column != "web"]


STAGES: Final[dict[str, Stage]] = {
    stage.name: stage
    for stage in (
        Stage(
            "download",
            "clips_data.config:DownloadConfig",
            "clips_data.download:run",
            folder=lambda config, run: "pairs",
            reads=lambda config, run: [],
            watches=lambda config: _existing(config, "source"),
            about="Every URL gets one row that says what became of it. Finished shards are never fetched again.",
            example="clips download urls.parquet --url-column url --caption-column alt --processes 2",
            positional="source",
            options=DOWNLOAD_OPTIONS,
        ),
        Stage(
            "recaption",
            "clips_data.config:RecaptionConfig",
            "clips_data.recaption.run:run",
            folder=lambda config, run: _recaption_folders(config)[0],
            beside=lambda config: _recaption_folders(config)[1:],
            reads=_recaption_reads,
            watches=_recaption_watches,
            about="A new prompt or model is a new column. A kill loses at most the batch in flight.",
            example="clips recaption --column synthetic --prompt describe --model llava-hf/llava-1.5-7b-hf",
            options=RECAPTION_OPTIONS,
        ),
        Stage(
            "score",
            "clips_data.config:ScoreConfig",
            "clips_data.score:run",
            folder=lambda config, run: f"scores/{config.name}",
            reads=lambda config, run: ["pairs"] if config.labels else ["pairs", *_columns(config)],
            watches=lambda config: _existing(config, "labels") if config.labels else _model(config, "clip"),
            about="Similarities are cosines between the image's and the caption's features of one CLIP model.",
            example="clips score --columns web,synthetic --model ViT-B-32 --pretrained laion2b_s34b_b79k",
        ),
        Stage(
            "shard",
            "clips_data.config:ShardConfig",
            "clips_data.shard:run",
            folder=lambda config, run: "shards",
            reads=lambda config, run: [
                "pairs",
                *_columns(config),
                *(f"scores/{name}" for name in config.scores),
            ],
            watches=lambda config: _existing(config, *(key for key in ("balance", "exclude") if getattr(config, key))),
            about="The tars are plain webdataset shards; image bytes are copied unchanged. New shards of pairs become "
            "further tars.",
            example="clips shard --where 'score.web >= 0.2 AND pairs.width >= 200' --split sentence --web-ratio 0.8",
        ),
        Stage(
            "embed",
            "clips_train.use_config:EmbedConfig",
            "clips_train.embed:embed",
            folder=lambda config, run: f"embeddings/{config.name}",
            reads=lambda config, run: [
                "shards",
                *(f"runs/{name.removeprefix('run:')}" for name in config.model if name.startswith("run:")),
            ],
            watches=_teachers,
            about="`clips train --teacher NAME` distils from it. Several --model are an ensemble, as MobileCLIP's.",
            example="clips embed --name two --model ViT-L-14:openai --model ViT-L-14:datacomp_xl_s13b_b90k",
            options=EMBED_OPTIONS,
            call=_call_embed,
        ),
        Stage(
            "train",
            "clips_train.config:TrainConfig",
            "clips_train.train:train",
            folder=lambda config, run: f"runs/{run}",
            reads=lambda config, run: ["shards", *([f"embeddings/{config.teacher}"] if config.teacher else [])],
            about="A stopped run goes on from its last checkpoint when the same command is given again.",
            example="clips train --name first --size tiny --image-px 96 --samples 20000 --batch 64",
            options=RUN_OPTIONS,
            call=_call_train,
            of_run=True,
        ),
        Stage(
            "eval",
            "clips_train.use_config:EvalConfig",
            "clips_train.evals.run:evaluate",
            folder=lambda config, run: "evals" if config.model else f"runs/{run}/eval",
            reads=lambda config, run: ["shards", *([] if config.model else [f"runs/{run}"])],
            watches=_benchmark_files,
            about="Without --model it is the run --name, on the held-out shards. Scores are files, with intervals.",
            example="clips eval --model run:first --model ViT-B-32:openai --benchmark coco=/data/coco --compare",
            options=IN_RUN_OPTIONS,
            call=_call_eval,
            of_run=True,
        ),
        Stage(
            "probe",
            "clips_train.use_config:ProbeConfig",
            "clips_train.probe:probe",
            folder=lambda config, run: f"runs/{run}/probe",
            reads=lambda config, run: ["shards", f"runs/{run}"],
            about="The run's image tower, frozen, is given to a small language model through a projector, as in LLaVA. "
            "These are trained on the captions of the training shards, then they caption the held-out images.",
            example="clips probe --name first --column synthetic --work quickstart",
            options=IN_RUN_OPTIONS,
            call=_call_probe,
            of_run=True,
        ),
        Stage(
            "export",
            "clips_train.use_config:ExportConfig",
            "clips_train.export:export",
            folder=lambda config, run: f"runs/{run}/export",
            reads=lambda config, run: ["shards", f"runs/{run}"],
            about="Each format is loaded by its own library and compared with ours; a difference above --tolerance is "
            "an error.",
            example="clips export --name first --work quickstart",
            options=IN_RUN_OPTIONS,
            call=_call_export,
            of_run=True,
        ),
        Stage(
            "report",
            "clips_data.config:ReportConfig",
            "clips_data.report:run",
            folder=lambda config, run: f"runs/{run}/report.html",
            reads=lambda config, run: ["pairs", "captions", "scores", "shards", f"runs/{run}", f"runs/{run}/eval"],
            about="The page is static, loads nothing from elsewhere, and escapes every caption.",
            example="clips report --name first --gallery 24 --work quickstart",
            positional=None,
            options=RUN_OPTIONS,
            of_run=True,
        ),
    )
}


def stage_named(key: str) -> Stage:
    """The stage of a manifest's key: ``recaption``, or with a label where it is done several times, ``score fused``."""
    return STAGES[key.partition(" ")[0]]


def run_name(stage: Stage, config: Any, given: str | None) -> str:
    """The training run that a stage works on: its config's ``name``, or what was given beside it."""
    if not stage.of_run:
        return given or DEFAULT_RUN
    return str(getattr(config, "name", None) or given or DEFAULT_RUN)
