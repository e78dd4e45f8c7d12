"""Trains CLIPS: the loop over batches, its stops and its checkpoints (METHOD §6)."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from clips_data import ledger
from clips_data.errors import Interrupted, UserError
from clips_data.journal import Journal
from clips_train import checkpoint, distributed, features, foreign, shards, sources, weights
from clips_train.config import TrainConfig
from clips_train.distributed import World
from clips_train.metrics import check_packages, read_metrics
from clips_train.run import EMBEDDINGS, METRICS, Run
from clips_train.stages import stages_of
from clips_train.texts import TextMaker
from clips_train.tokenizer import Tokenizer, build_tokenizer

CONFIG, BEGUN, STAGES = "config.json", "begun.jsonl", "stages"
UNIT = "train"
NOT_IN_DIGEST = frozenset(
    (
        "name", "device", "parallel", "local_loss", "compile", "accumulation", "gradient_checkpointing", "num_workers",
        "cache_bytes", "max_skipped_steps", "checkpoint_samples", "checkpoints_kept", "eval_samples", "eval_images",
        "log_steps", "log_to", "peak_tflops",
    )
)  # fmt: skip
"""Settings that may change between a run and its resumption, because they change no gradient but in its rounding."""
_OF_MEMORY = re.compile("allocate memory|out of memory|ALLOC_FAILED")
"""How allocators and libraries say it that raise a plain ``RuntimeError``."""


def train(
    config: TrainConfig,
    *,
    shards: Path | Sequence[Path],
    out: Path,
    index: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Trains until ``config.samples`` have been seen, in each of ``config.stages``, and returns a summary of the run.

    Writes ``config.json``, ``metrics.jsonl`` and ``checkpoints/`` under ``out``; for the stages before the last one
    under ``out/stages/NUMBER``. A run that was stopped goes on from its last checkpoint with the batches it would have
    seen, on any number of processes; a finished one is only reported. Started by torchrun, its processes train
    together. ``shards`` may also be webdataset tars of others, by path, glob or braces, whose indexes go to ``index``.

    Raises ``ResumeRefused`` when ``out`` was trained with another config or other data, ``Interrupted`` after SIGTERM
    or SIGINT, ``UserError`` when the loss is no longer finite, memory or disk is full.
    """
    if config.views and config.contrastive_weight == 0:
        raise UserError(
            "contrastive_weight 0 trains no view: weight decay alone would shrink the text tower. Set views to none, "
            "or give the contrastive loss a weight."
        )
    stages = stages_of(config)
    with distributed.started(config.device) as world:
        for stage in stages:
            distributed.check_shares(stage, world)
        split = _open(shards, index or out / "index", world)
        before: Path | None = None
        for number, stage in enumerate(stages):
            is_last = number == len(stages) - 1
            folder = out if is_last else out / STAGES / str(number)
            work = _Work(stage, config if is_last else stage, split, folder, before, world)
            summary = work.do(overwrite=overwrite, quiet=quiet or not world.is_first)
            if work.stopped and not is_last:
                raise Interrupted(
                    f"Training stopped by a signal after stage {number} of {len(stages) - 1}, which is finished. Run "
                    "the same command again to go on with the next one."
                )
            before = folder
        return summary


def _open(given: Path | Sequence[Path], index: Path, world: World) -> shards.Split:
    """The first process alone indexes tars of others; then all read what it found."""
    world.on_first(lambda: foreign.open_shards(given, shards.TRAIN, index=index).digest)
    return foreign.open_shards(given, shards.TRAIN, index=index)


class _Work:
    """One stage of a run: what it is made from, and the folder that says so. Its files are the first process's."""

    def __init__(
        self,
        config: TrainConfig,
        stated: TrainConfig,
        split: shards.Split,
        out: Path,
        before: Path | None,
        world: World,
    ) -> None:
        self.config, self.split, self.out, self.before, self.world = config, split, out, before, world
        self.stated = stated
        """What stands in ``config.json``: for the last stage the config of the whole run."""
        self.stopped = False
        """Whether a signal came in the last step."""

    def do(self, *, overwrite: bool, quiet: bool) -> dict[str, Any]:
        world, split = self.world, self.split
        source = str(self.before) if self.before else self.config.init
        inputs = world.on_first(lambda: self._inputs(source))
        settings = digested(self.stated)
        if world.on_first(lambda: ledger.is_done(self.out, UNIT, inputs=inputs, config=settings, overwrite=overwrite)):
            return world.on_first(lambda: _summary(self.out, skipped=True))
        with contextlib.ExitStack() as files:
            stop = files.enter_context(_stop_signals())  # a signal during the set-up stops after the first step
            check_packages(self.config.log_to)
            tokenizer = build_tokenizer(self.config.tokenizer, self.config.bert_vocab)
            world.on_first(lambda: self._begin(split, tokenizer, inputs, settings, files, overwrite=overwrite))
            try:
                with _readable_memory_errors(self.config, world, lambda: "before the first step"):
                    run = Run(self.config, split, tokenizer, self.out, world, source=source, quiet=quiet)
            except UserError:
                self._take_back()
                raise
            files.enter_context(run)
            world.on_first(lambda: shutil.rmtree(self._aside, ignore_errors=True))
            facts = _loop(run, stop)
            self.stopped = world.any(stop.is_set())
            world.on_first(lambda: self._commit(run, inputs, settings))
        return world.on_first(lambda: _summary(self.out, skipped=False)) | facts

    def _inputs(self, source: str | None) -> dict[str, str]:
        """Digests of what the stage is made from: shards, weights to start from, a teacher's features."""
        inputs = {"shards": self.split.digest}
        if source is not None and (digest := weights.digest(source)) is not None:
            inputs["weights"] = digest
        if self.config.teacher is not None:
            index = features.read_index(self.split.folder.parent / EMBEDDINGS / self.config.teacher)
            inputs["teacher"] = ledger.digest_json(
                {key: index[key] for key in ("shards", "teachers", "augment", "seed")}
            )
        return inputs

    def _begin(
        self,
        split: shards.Split,
        tokenizer: Tokenizer,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        files: contextlib.ExitStack,
        *,
        overwrite: bool,
    ) -> None:
        """States in the run's folder what it is made from, and holds the folder against other runs.

        A folder that was begun from something else is refused; with ``overwrite`` what it holds is set aside instead,
        until the new run stands.
        """
        TextMaker(split, self.config, tokenizer)  # raises for texts that are not there, before the folder is begun
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / BEGUN
        header = {**inputs, **settings}
        if overwrite and path.exists() and json.loads(path.read_text().splitlines()[0]) != header:
            shutil.rmtree(self._aside, ignore_errors=True)
            self._aside.mkdir()
            _move(self.out, self._aside)
        files.callback(Journal(path, header).close)
        ledger.write_json(self.out / CONFIG, self.stated.model_dump(mode="json"))

    @property
    def _aside(self) -> Path:
        return ledger.part(self.out / "overwritten")

    def _take_back(self) -> None:
        """Unsays what ``_begin`` did where nothing came of it: a mended config is not refused, an old run not lost."""
        if not self.world.is_first:
            return
        if checkpoint.latest(self.out) is None:
            (self.out / BEGUN).unlink(missing_ok=True)
            (self.out / CONFIG).unlink(missing_ok=True)
        if self._aside.is_dir():
            _move(self._aside, self.out)
            self._aside.rmdir()

    def _commit(self, run: Run, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Marks the stage as finished. From here on it is skipped."""
        ledger.write_json(ledger.part(self.out / CONFIG), self.stated.model_dump(mode="json"))
        progress = run.progress
        counts = {"steps": progress.step, "samples": progress.samples, **read_metrics(self.out / METRICS)[-1]["counts"]}
        ledger.commit(self.out, UNIT, [CONFIG], inputs=inputs, config=settings, counts=counts)


def _move(run: Path, to: Path) -> None:
    """What belongs to a run that was begun."""
    for name in (checkpoint.CHECKPOINTS, METRICS, BEGUN, CONFIG):
        if (run / name).exists():
            (run / name).replace(to / name)


def _loop(run: Run, stop: threading.Event) -> dict[str, float]:
    """Takes all steps that are left, and returns what there is to tell at the end."""
    told = _readable_memory_errors(run.config, run.world, lambda: f"in step {run.progress.step + 1}")
    with contextlib.closing(run.batches()) as batches, told:
        while not run.finished:
            stopping = run.take_step(next(batches), stop.is_set())
            run.log_when_due(run.scores_when_due())
            if run.checkpoint_due or run.finished or stopping:
                run.save()
            if stopping and not run.finished:
                run.writer.wait()
                raise Interrupted(
                    f"Training stopped by a signal after step {run.progress.step} of {run.num_steps}. "
                    "The checkpoint is saved; run the same command again to go on."
                )
        run.writer.wait()
        return run.closing_facts()


@contextlib.contextmanager
def _readable_memory_errors(config: TrainConfig, world: World, when: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not _OF_MEMORY.search(str(error)):
            raise
        share = config.batch // config.accumulation // world.size
        raise UserError(
            f"Out of memory on {world.device} {when()}, with {share} samples at a time "
            f"(batch {config.batch} in {config.accumulation} parts on {world.size} processes). Try a larger "
            "accumulation, gradient_checkpointing, or more processes, which change no result; or caption_every 2 or "
            "more, image_tokens_kept below 1, a smaller batch. Finished checkpoints are kept."
        ) from error


def digested(config: TrainConfig) -> dict[str, Any]:
    """The settings on which the result depends."""
    return config.model_dump(mode="json", exclude=set(NOT_IN_DIGEST))


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """SIGTERM and SIGINT only set the event; the loop stops after the step in hand, with a checkpoint."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def set_stop(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, set_stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(out: Path, *, skipped: bool) -> dict[str, Any]:
    """The last row of the metrics in plain figures."""
    last = read_metrics(out / METRICS)[-1]
    counts = last.pop("counts")
    bad = sum(number for name, number in counts.items() if name.startswith("bad."))
    keys = ("step", "samples", "epoch", "loss", "contrastive_loss", "caption_loss", "logit_scale", "skipped_steps")
    summary = {key: last[key] for key in keys if key in last} | sources.facts(counts)
    return summary | {"bad_samples": bad, "loaded_samples": counts["loaded"], "skipped": skipped, "counts": counts}
