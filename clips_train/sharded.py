"""Tensors that may be in shards, one with each process: their norm, their whole, their copies."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from clips_train.distributed import World


def gradient_norm(parameters: list[nn.Parameter], world: World) -> float:
    """The 2-norm of the whole gradient, whether whole or in shards. Not finite where any part of it is not."""
    squares = {True: torch.zeros((), device=world.device), False: torch.zeros((), device=world.device)}
    for is_sharded in squares:
        grads = [p.grad for p in parameters if p.grad is not None and isinstance(p.grad, DTensor) == is_sharded]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        if local:
            squares[is_sharded] = torch.stack(torch._foreach_norm(local)).float().square().sum()
    return float((world.sum(squares[True]) + squares[False]).sqrt())


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """``whole``, cut and placed as ``parameter`` is. Nothing is sent: each process has the whole."""
    whole = whole.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return whole


def copied_to_cpu(tensor: Tensor, cpu_mesh: DeviceMesh | None) -> Tensor:
    """A copy on the CPU, in the same shards."""
    if isinstance(tensor, DTensor):
        assert cpu_mesh is not None
        local = tensor.to_local().detach().to("cpu", copy=True)
        return DTensor.from_local(local, cpu_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())
    return tensor.detach().to("cpu", copy=True)
