"""What a run's time goes to: samples, tokens and arithmetic per second, and the share spent waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from clips_train.distributed import World
from clips_train.flops import StepShape, peak_tflops
from clips_train.parts import Part
from clips_train.step import Trainee


class Meter:
    """Adds up what passes through ``trainee`` from one call of ``figures`` to the next.

    Tokens are image patches, text slots and target slots, padding included: what is computed. Arithmetic is that of the
    model, three times the forward pass: what gradient checkpointing and accumulation compute again is not counted.
    """

    def __init__(self, trainee: Trainee, world: World, *, peak: float) -> None:
        """``peak`` is the device's in TFLOP/s; 0 looks it up."""
        self._world = world
        self._shape = StepShape.of(trainee)
        self._share = 1 / (world.size * trainee.config.accumulation)
        self._peak = peak or peak_tflops(world.device)
        trainee.register_forward_pre_hook(self._add, with_kwargs=True)
        self._begin()

    def _begin(self) -> None:
        self._since = time.monotonic()
        self._waited_s = 0.0
        self._steps = self._samples = 0
        self._tokens = 0
        self._flops = 0.0

    def _add(self, trainee: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if torch.is_grad_enabled():  # accumulation first encodes all parts without
            part: Part = arguments[0]
            self._tokens += self._shape.tokens(part)
            self._flops += self._shape.flops(part, arguments[1], self._share)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for data."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - began

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no training, and is not to count as its time."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began

    def step_done(self, num_samples: int) -> None:
        """After each step; ``num_samples`` are those of all processes."""
        self._steps += 1
        self._samples += num_samples

    def figures(self) -> dict[str, float]:
        """Of all processes together, since the last call; ``mfu`` only where the peak is known. All processes call it.

        ``data_wait_share`` is that of the first process.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        tokens, flops = self._world.sum(torch.tensor([self._tokens, self._flops], dtype=torch.float64)).tolist()
        found = {
            "step_s": round(seconds / max(1, self._steps), 4),
            "samples_per_s": round(self._samples / seconds, 1),
            "tokens_per_s": round(tokens / seconds, 1),
            "data_wait_share": round(self._waited_s / seconds, 4),
        }
        tflops = flops / seconds / 1e12
        found["model_tflops_per_s"] = round(tflops, 4)
        if self._peak:
            found["mfu"] = round(tflops / (self._peak * self._world.size), 4)
        self._begin()
        return found
