"""A run in progress: model, optimiser and data of one stage in one process, and where it stands."""

from __future__ import annotations

import math
import sys
from collections.abc import Generator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

from clips_data.errors import UserError
from clips_train import checkpoint, distributed, foreign, guard, preparing, scoring, sharded, shards, step
from clips_train.batch import Batch
from clips_train.checkpoint import Progress, State
from clips_train.checkpoint_writer import CheckpointWriter
from clips_train.config import TrainConfig
from clips_train.data import SampleStream
from clips_train.distributed import World
from clips_train.initial import start_from
from clips_train.meter import Meter
from clips_train.metrics import MetricsFile, Sink, open_sinks
from clips_train.model import build_model
from clips_train.optim import MovingAverage, build_optimizer, clip_gradient, learning_rate
from clips_train.sample_digest import order_digest
from clips_train.teacher import Teacher
from clips_train.tokenizer import Tokenizer

METRICS, EMBEDDINGS = "metrics.jsonl", "embeddings"
MAX_LOG_LOGIT_SCALE = math.log(100)


class Run:
    """Takes steps, and knows what to log and save. A context manager for its files; only the first process has any.

    A new run starts from ``source``, or from weights drawn by the seed; another from its last checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        split: shards.Split,
        tokenizer: Tokenizer,
        out: Path,
        world: World,
        *,
        source: str | None,
        quiet: bool,
    ) -> None:
        self.config, self.split, self.out, self.world, self.quiet = config, split, out, world, quiet
        self.tokenizer = tokenizer
        self.num_steps = math.ceil(config.samples / config.batch)
        self.model = build_model(config.model, seed=config.seed, sigmoid=config.contrastive == "sigmoid")
        self.progress = Progress(step=0, samples=0, data={})
        newest = checkpoint.latest(out)
        if newest is not None:
            checkpoint.load_weights(newest, self.model, averaged=False)
            self.progress = checkpoint.read_progress(newest)
        elif source is not None:
            for line in start_from(self.model, config, source):
                self._say(line)
        self._saved_samples = self.progress.samples
        self._whole = {name: torch.empty_like(whole, device="meta") for name, whole in self.model.state_dict().items()}
        plain = step.Trainee(self.model.to(world.device), config, self.tokenizer)
        if self.progress.gate_means is not None:
            plain.gate_means = torch.tensor(self.progress.gate_means)
        self._held_out = _held_out(split, config)
        self._first, self._stream = self._open_data()
        preparing.freeze_unused(plain, self._first, config, world.device)
        self._prepare(plain, newest)
        self._open_files()

    def _open_data(self) -> tuple[Batch, Generator[Batch]]:
        teacher = Teacher.open(self.split, self.config, self.split.folder.parent / EMBEDDINGS)
        state, world = self.progress.data or None, self.world
        stream = SampleStream(
            self.split, self.config, self.tokenizer, state, rank=world.rank, world_size=world.size, teacher=teacher
        ).batches()
        return next(stream), stream

    def _prepare(self, plain: step.Trainee, newest: Path | None) -> None:
        config, world = self.config, self.world
        preparing.adapt_blocks(plain, config)
        self._meter = Meter(plain, world, peak=config.peak_tflops)
        self.trainee = distributed.wrap(plain, config, world)
        self._optimizer = build_optimizer(
            self.model, weight_decay=config.weight_decay, beta1=config.beta1, beta2=config.beta2
        )
        self._trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        self._average = MovingAverage(self.model, config.ema) if config.ema else None
        if newest is not None:
            checkpoint.load_optimizer(newest, self._optimizer, self._names)
            if self._average is not None:
                checkpoint.load_averaged(newest, self._average.weights, self._whole)
        is_sharded = world.size > 1 and config.parallel == "fsdp"
        self._cpu_mesh = init_device_mesh("cpu", (world.size,)) if is_sharded else None

    def _open_files(self) -> None:
        last_step = self.progress.step
        self.writer = CheckpointWriter(self.out, self.world, kept=self.config.checkpoints_kept)
        self._metrics: list[Sink] = []

        def open_metrics() -> None:
            about = self.config.model_dump(mode="json")
            self._file = MetricsFile(self.out / METRICS, last_step=last_step)
            self._metrics = [self._file, *open_sinks(self.config.log_to, self.out, about, last_step=last_step)]

        self.world.on_first(open_metrics)
        self._bar = tqdm(
            total=self.num_steps,
            initial=last_step,
            unit="step",
            disable=self.quiet or None,
            desc="train",
            mininterval=1,
        )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.close()
        self._bar.close()
        self._stream.close()
        for place in self._metrics:
            place.close()

    def _say(self, line: str) -> None:
        """To people, on stderr."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)

    # --- steps --------------------------------------------------------------------------------------------------------

    def batches(self) -> Generator[Batch]:
        """This process's share of each step's batch, without end."""
        batches = chain([self._first], self._stream)
        del self._first
        while True:
            with self._meter.waiting():
                batch = next(batches)
            yield batch

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.num_steps

    def take_step(self, batch: Batch, stop: bool) -> bool:
        """One optimiser step. Returns whether any process was told to ``stop``."""
        config, world, number = self.config, self.world, self.progress.step
        plain = distributed.unwrapped(self.trainee)
        gate_means = plain.gate_means
        losses = vars(step.backward(self.trainee, batch, config, world.device, world))
        distributed.average_loose(self.trainee, world)
        self._norm = sharded.gradient_norm(self._trained, world)
        fault = guard.fault(losses["total"], self._norm, self.progress, config)
        stop, disk_failed = world.flags(stop, self.writer.failed)
        if disk_failed:
            self.writer.wait()  # raises
        progress = guard.after(self.progress, losses, fault)
        guard.stop_if_hopeless(progress, losses, fault, number + 1, config)
        self._used_rate = learning_rate(
            number,
            num_steps=self.num_steps,
            warmup_steps=math.ceil(config.warmup_samples / config.batch),
            peak=config.peak_lr,
        )
        if fault is None:
            self._update(self._used_rate)
        else:
            plain.gate_means = gate_means  # else what is not finite would stay in them
            self._say(f"The update of step {number + 1} was left out: {fault}.")
        self._optimizer.zero_grad(set_to_none=True)
        self.progress = replace(
            progress,
            step=number + 1,
            samples=self.progress.samples + config.batch,
            data=batch.state,
            digest=order_digest(self.progress.digest, batch, world),
            gate_means=None if plain.gate_means is None else plain.gate_means.tolist(),
        )
        self._last = batch
        self._meter.step_done(config.batch)
        self._bar.update()
        return stop

    def _update(self, rate: float) -> None:
        if self.config.grad_clip:
            clip_gradient(self._trained, self._norm, self.config.grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        if self.config.clamp_logit_scale:
            with torch.no_grad():
                self.model.logit_scale.clamp_(0, MAX_LOG_LOGIT_SCALE)
        if self._average is not None:
            self._average.update()

    # --- what is left behind ------------------------------------------------------------------------------------------

    def scores_when_due(self) -> dict[str, float]:
        """Retrieval on held-out samples, once every ``eval_samples``, by the weights that ``clips eval`` would take."""
        config, samples = self.config, self.progress.samples
        if self._held_out is None or samples // config.eval_samples == (samples - config.batch) // config.eval_samples:
            return {}
        split, weights = self._held_out, self._weights(averaged=self._average is not None)
        with self._meter.apart():
            return self.world.on_first(
                lambda: scoring.held_out_scores(weights, config, self.tokenizer, split, self.world.device)
            )

    def log_when_due(self, scores: dict[str, float]) -> None:
        """Writes a row every ``log_steps``, at the end, and when there are ``scores``."""
        due = self.progress.step % self.config.log_steps == 0 or self.finished or scores
        if not due or not self.progress.losses:
            return
        row = self._row() | scores
        self.progress = replace(self.progress, logged_loss=0.0, logged_steps=0)
        self._bar.set_postfix(loss=f"{row['loss']:.3f}")
        for place in self._metrics:
            place.append(row)

    def _row(self) -> dict[str, Any]:
        progress = self.progress
        losses = {f"{name}_loss": value for name, value in progress.losses.items() if name != "total"}
        if not self.config.teacher:
            del losses["distillation_loss"]
        return {
            "step": progress.step,
            "samples": progress.samples,
            "epoch": progress.data["epoch"],
            "loss": progress.losses["total"],
            "loss_mean": progress.logged_loss / max(1, progress.logged_steps),
            **losses,
            "grad_norm": self._norm if math.isfinite(self._norm) else None,
            "learning_rate": self._used_rate,
            "logit_scale": float(self.model.logit_scale.detach().exp()),
            "skipped_steps": progress.skipped_steps,
            "batch_digest": progress.digest,
            "counts": dict(self.world.sum_counts(progress.data["counts"])),
            **self._meter.figures(),
        }

    def save(self) -> None:
        """Begins to write a checkpoint; ``writer.wait`` ends it."""
        if self.world.is_first:
            self._file.sync()
        counts = dict(self.world.sum_counts(self.progress.data["counts"]))
        tensors = checkpoint.optimizer_tensors(self._optimizer, self._names)
        state = State(
            weights=self._weights(averaged=False),
            averaged=self._weights(averaged=True) if self._average is not None else {},
            optimizer={name: sharded.copied_to_cpu(tensor, self._cpu_mesh) for name, tensor in tensors.items()},
            progress=replace(self.progress, data={**self.progress.data, "counts": counts}),
            config=self.config.model_dump(mode="json"),
        )
        self.writer.save(state)
        self._saved_samples = self.progress.samples

    @property
    def checkpoint_due(self) -> bool:
        return self.progress.samples - self._saved_samples >= self.config.checkpoint_samples

    def _weights(self, *, averaged: bool) -> dict[str, Tensor]:
        """Copies of whole weights on the CPU, in the first process; the others help and have nothing."""
        average = self._average.weights if averaged and self._average is not None else {}
        found = {}
        for name, tensor in self.model.state_dict().items():
            whole = sharded.full(average.get(name, tensor).detach())
            if self.world.is_first:
                found[name] = whole.to("cpu", copy=True).contiguous()
        return found

    def closing_facts(self) -> dict[str, float]:
        """How well the last batch is known, which is what ``overfit`` asks."""
        if not self.config.overfit:
            return {}
        facts = scoring.accuracy_of(self.trainee, self._last, self.config, self.world)
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in facts.items())
        self._say(
            f"Overfit: loss {self.progress.losses['total']:.4f} on the last batch; {told or 'no views to score'}."
        )
        return facts


def _held_out(split: shards.Split, config: TrainConfig) -> shards.Split | None:
    """What to score on during training, where that is asked for."""
    if not config.eval_samples:
        return None
    if isinstance(split, foreign.ForeignSplit):
        raise UserError(
            f"eval_samples {config.eval_samples} asks for scores on held-out samples, which tars that `clips shard` "
            "did not write have none of. Set eval_samples to 0."
        )
    found = shards.open_split(split.folder, scoring.SPLIT)
    if found.num_samples == 0:
        raise UserError(
            f"{split.folder} holds no held-out samples, which eval_samples {config.eval_samples} asks to score on. "
            "Shard again with --heldout-ratio above 0, or set eval_samples to 0."
        )
    return found
