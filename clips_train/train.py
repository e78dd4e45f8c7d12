"""Trains CLIPS: the loop, and what one step computes (METHOD §1–§3, §6).

Shape suffixes: N samples of a step, E embedding, L text slots, Q target slots.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from clips_data import ledger
from clips_data.errors import Interrupted, UserError
from clips_data.journal import Journal
from clips_train import checkpoint, mixed, shards, step
from clips_train.checkpoint import Progress
from clips_train.config import TrainConfig
from clips_train.data import Batch, SampleStream
from clips_train.device import pick_device
from clips_train.metrics import MetricsFile, read_metrics
from clips_train.model import build_model
from clips_train.optim import build_optimizer, learning_rate
from clips_train.tokenizer import build_tokenizer

METRICS, CONFIG, BEGUN = "metrics.jsonl", "config.json", "begun.jsonl"
UNIT = "train"
MAX_LOG_LOGIT_SCALE = math.log(100)
NOT_IN_DIGEST = frozenset({"num_workers", "cache_bytes", "checkpoint_samples", "log_steps", "device", "name"})
"""Settings that may change between a run and its resumption, because they change no gradient."""


def train(
    config: TrainConfig, *, shards: Path, out: Path, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Trains until ``config.samples`` have been seen, and returns a summary of the run.

    Writes ``config.json``, ``metrics.jsonl`` and ``checkpoints/`` under ``out``. A run that was stopped goes on from
    its last checkpoint with the batches it would have seen; a finished one is only reported. Raises ``ResumeRefused``
    when ``out`` was trained with another config or other data, ``Interrupted`` after SIGTERM or SIGINT, ``UserError``
    when the loss is no longer finite.
    """
    run = _Run.open(config, shards, out, overwrite=overwrite)
    if run is None:
        return _summary(out, skipped=True)
    bar = tqdm(
        total=run.num_steps, initial=run.progress.step, unit="step", disable=quiet or None, desc="train", mininterval=1
    )
    with run, bar, _stop_signals() as stop:
        for batch in run.batches():
            row = run.take_step(batch)
            bar.update()
            if run.progress.step % config.log_steps == 0 or run.finished:
                bar.set_postfix(loss=f"{row['loss']:.3f}")
                run.metrics.append(row)
            if run.checkpoint_due or run.finished or stop.is_set():
                run.save()
            if run.finished:
                break
            if stop.is_set():
                raise Interrupted(
                    f"Training stopped by a signal after step {run.progress.step} of {run.num_steps}. "
                    "The checkpoint is saved; run the same command again to go on."
                )
    run.commit()
    return _summary(out, skipped=False)


class _Run:
    """A run in progress: model, optimiser, data stream and where it stands. A context manager for its files."""

    def __init__(self, config: TrainConfig, split: shards.Split, out: Path) -> None:
        self.config, self.split, self.out = config, split, out
        self.device = pick_device(config.device)
        self.tokenizer = build_tokenizer(config.tokenizer, config.bert_vocab)
        self.model = build_model(config.model, seed=config.seed).to(self.device)
        self.optimizer = build_optimizer(
            self.model, weight_decay=config.weight_decay, beta1=config.beta1, beta2=config.beta2
        )
        self.num_steps = math.ceil(config.samples / config.batch)
        self.progress = Progress(step=0, samples=0, data={})
        self._saved_samples = 0
        newest = checkpoint.latest(out)
        if newest is not None:
            checkpoint.load_weights(newest, self.model)
            self.progress = checkpoint.load_state(newest, self.optimizer)
            self._saved_samples = self.progress.samples
        self.stream = SampleStream(split, config, self.tokenizer, self.progress.data or None)
        self.metrics = MetricsFile(out / METRICS, last_step=self.progress.step)
        self._clock = time.monotonic()

    @classmethod
    def open(cls, config: TrainConfig, folder: Path, out: Path, *, overwrite: bool) -> _Run | None:
        """The run in ``out``, new or resumed; ``None`` when it is finished."""
        split = shards.open_split(folder, shards.TRAIN)
        inputs, settings = {"shards": split.digest}, digested(config)
        if ledger.is_done(out, UNIT, inputs=inputs, config=settings, overwrite=overwrite):
            return None
        mixed.Mixed.open(split, config)  # raises for rules that make no sense, before the run's folder is begun
        out.mkdir(parents=True, exist_ok=True)
        _claim(out, inputs, settings, overwrite=overwrite)
        write_config(out / CONFIG, config)
        return cls(config, split, out)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.metrics.close()

    def batches(self) -> Generator[Batch]:
        with contextlib.closing(self.stream.batches()) as batches:
            yield from batches

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.num_steps

    @property
    def checkpoint_due(self) -> bool:
        return self.progress.samples - self._saved_samples >= self.config.checkpoint_samples

    def take_step(self, batch: Batch) -> dict[str, Any]:
        """One optimiser step. Returns its row for ``metrics.jsonl``."""
        config, number = self.config, self.progress.step
        rate = learning_rate(
            number,
            num_steps=self.num_steps,
            warmup_steps=math.ceil(config.warmup_samples / config.batch),
            peak=config.peak_lr,
        )
        self.model.train()
        losses = step.backward(self.model, batch, config, self.device)
        self._stop_unless_finite(losses, number + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if config.clamp_logit_scale:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)
        self.progress = Progress(number + 1, self.progress.samples + len(batch.keys), batch.state)
        return self._row(losses, rate)

    def _stop_unless_finite(self, losses: step.Losses, number: int) -> None:
        """Called before the update, so that the last checkpoint and the weights stay sound."""
        if not math.isfinite(losses.total):
            raise UserError(
                f"Training stopped at step {number}: the loss is {losses.total} (contrastive {losses.contrastive}, "
                f"caption {losses.caption}). The weights were not updated. Lower lr, lengthen warmup_samples, or use "
                "precision fp32, and start again with --overwrite."
            )

    def _row(self, losses: step.Losses, rate: float) -> dict[str, Any]:
        clock = time.monotonic()
        seconds, self._clock = clock - self._clock, clock
        return {
            "step": self.progress.step,
            "samples": self.progress.samples,
            "epoch": self.progress.data["epoch"],
            "loss": losses.total,
            "contrastive_loss": losses.contrastive,
            "caption_loss": losses.caption,
            "learning_rate": rate,
            "logit_scale": float(self.model.logit_scale.detach().exp()),
            "counts": self.progress.data["counts"],
            "step_s": round(seconds, 4),
            "samples_per_s": round(self.config.batch / seconds, 1),
        }

    def save(self) -> None:
        self.metrics.sync()
        resolved = self.config.model_dump(mode="json")
        checkpoint.save(self.out, self.model, self.optimizer, self.progress, resolved)
        self._saved_samples = self.progress.samples

    def commit(self) -> None:
        """Marks the run as finished. From here on it is skipped."""
        write_config(ledger.part(self.out / CONFIG), self.config)
        counts = {"steps": self.progress.step, "samples": self.progress.samples, **self.progress.data["counts"]}
        inputs = {"shards": self.split.digest}
        ledger.commit(self.out, UNIT, [CONFIG], inputs=inputs, config=digested(self.config), counts=counts)


def digested(config: TrainConfig) -> dict[str, Any]:
    """The settings on which the result depends."""
    return config.model_dump(mode="json", exclude=set(NOT_IN_DIGEST))


def write_config(path: Path, config: TrainConfig) -> None:
    ledger.write_json(path, config.model_dump(mode="json"))


def _claim(out: Path, inputs: Mapping[str, str], settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """States in the run's folder what it is made from; refuses a folder that was begun from something else.

    With ``overwrite`` such a folder is emptied of its checkpoints and metrics instead.
    """
    path = out / BEGUN
    header = {"shards": inputs["shards"], **settings}
    if overwrite and path.exists() and json.loads(path.read_text().splitlines()[0]) != header:
        shutil.rmtree(out / checkpoint.CHECKPOINTS, ignore_errors=True)
        (out / METRICS).unlink(missing_ok=True)
        path.unlink()
    Journal(path, header).close()


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
    keys = ("step", "samples", "epoch", "loss", "contrastive_loss", "caption_loss", "logit_scale")
    summary = {key: last[key] for key in keys} | mixed.facts(counts)
    return summary | {"bad_samples": bad, "loaded_samples": counts["loaded"], "skipped": skipped, "counts": counts}
