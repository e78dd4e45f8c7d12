"""What is done to a model before it is shared between processes: nothing idle is trained, and memory is traded."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from clips_train import distributed, step
from clips_train.batch import Batch
from clips_train.config import TrainConfig
from clips_train.distributed import World

NUM_PROBED = 2


def freeze_unused(trainee: step.Trainee, batch: Batch, config: TrainConfig, device: torch.device) -> list[str]:
    """Freezes what gets no gradient from the objective, found out by a batch's first samples. Returns the names.

    So without views the heads of the towers are not trained, nor is a text tower that nothing reads. DDP waits for the
    gradient of each parameter that is trained, and weight decay would shrink the others to nothing.
    """
    few = dataclasses.replace(_first(batch, NUM_PROBED), first_slot=0)
    gate_means = trainee.gate_means
    step.backward(trainee, few, config.model_copy(update={"accumulation": 1}), device, World.alone(device))
    trainee.gate_means = gate_means
    frozen = []
    for name, parameter in trainee.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
            frozen.append(name)
        parameter.grad = None
    return frozen


def _first(value: Any, rows: int) -> Any:
    """The first samples of whatever a batch is made of."""
    match value:
        case Tensor() | list():
            return value[:rows]
        case tuple():
            return tuple(_first(each, rows) for each in value)
        case dict() if all(isinstance(each, Tensor) for each in value.values()):
            return {name: _first(each, rows) for name, each in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: _first(getattr(value, field.name), rows) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def adapt_blocks(trainee: step.Trainee, config: TrainConfig) -> None:
    """Applies ``gradient_checkpointing`` and ``compile``: block by block, as they are alike and few are compiled."""
    if config.gradient_checkpointing:
        trainee.model.set_gradient_checkpointing(True)
    if config.compile:
        for block in distributed.blocks(trainee):
            block.compile()
