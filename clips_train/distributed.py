"""Several processes train one model: who they are, what they tell each other, and how the model is shared.

Processes are started by torchrun. Tensors travel by gloo on CPUs and by NCCL between GPUs; flags, counts and objects
always by gloo. The first process alone writes files and talks.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from clips_data.errors import ClipsError, UserError
from clips_train.config import TrainConfig
from clips_train.device import pick_device

TIMEOUT = datetime.timedelta(minutes=30)
"""How long a process waits for the others. A process that dies is noticed at once by gloo, and by torchrun."""
LAST_WORDS_S = 5.0
"""How long a process whose connection broke looks for the reason that another one left."""

_NUMBERS = itertools.count()
"""Worlds of this process so far: each has names of its own in the store."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together. Each method is a call that all of them make, in the same order."""

    rank: int
    size: int
    device: torch.device
    store: Store | None = field(default=None, repr=False)
    """Holds the last words of processes that failed."""

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> World:
        """One process: nothing is sent, everything comes back as it is."""
        return cls(0, 1, torch.device(device))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, mine_N: Tensor) -> Tensor:
        """The tensors of all processes, of equal sizes, one after the other along the first dimension.

        A gradient comes back: that of all processes' use of this one's share, summed.
        """
        if self.size == 1:
            return mine_N
        if mine_N.dtype == torch.bool:
            return self.gather(mine_N.to(torch.uint8)).bool()
        gather: Any = _Gather.apply
        gathered: Tensor = gather(mine_N, self.size)
        return gathered

    def sum(self, mine: Tensor) -> Tensor:
        """Element by element over the processes, without gradient."""
        return self._reduced(mine, dist.ReduceOp.SUM)

    def max(self, mine: Tensor) -> Tensor:
        """Element by element over the processes, without gradient."""
        return self._reduced(mine, dist.ReduceOp.MAX)

    def _reduced(self, mine: Tensor, how: Any) -> Tensor:
        total = mine.detach().clone()
        if self.size > 1:
            dist.all_reduce(total, how)
        return total

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return self.flags(flag)[0]

    def flags(self, *mine: bool) -> list[bool]:
        """Each flag: whether it is so in any process."""
        return [bool(flag) for flag in self.max(torch.tensor(mine, dtype=torch.int32)).tolist()]

    def objects(self, mine: T) -> list[T]:
        """What each process gave, by rank. For small things that are pickled, between our own processes."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def sum_counts(self, mine: Mapping[str, int]) -> Counter[str]:
        """The counts of all processes together."""
        return sum((Counter(found) for found in self.objects(dict(mine))), Counter())

    def on_first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the first process. Its ``ClipsError`` ends them all: there with the message."""
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except ClipsError as error:
                if self.size == 1:
                    raise
                outcome[1] = error
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine_N: Tensor, size: int) -> Tensor:
        ctx.size = size
        gathered = mine_N.new_empty((size * len(mine_N), *mine_N.shape[1:]))
        dist.all_gather(list(gathered.chunk(size)), mine_N.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *derivatives: Tensor) -> tuple[Tensor, None]:
        (of_all,) = derivatives
        mine = of_all.new_empty((len(of_all) // ctx.size, *of_all.shape[1:]))
        dist.reduce_scatter(mine, list(of_all.contiguous().chunk(ctx.size)))
        return mine, None


@contextlib.contextmanager
def started(device: str) -> Iterator[World]:
    """The world that torchrun's environment describes; alone without one.

    A process that fails leaves its reason to the others, whose calls then end with that reason. Where all fail alike,
    only the first one says so.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World.alone(pick_device(device))
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    where = pick_device(device, local_rank=local_rank)
    store, rank, size = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    if where.type == "cuda":
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    number = next(_NUMBERS)
    dist.init_process_group(
        backend, store=PrefixStore(f"clips.{number}", store), rank=rank, world_size=size, timeout=TIMEOUT
    )
    world = World(rank, size, where, PrefixStore(f"clips.{number}.failed", store))
    with _shared_failures(world):
        yield world
    dist.destroy_process_group()


@contextlib.contextmanager
def _shared_failures(world: World) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        broken = _is_broken_connection(error)
        words = None if broken else {"kind": type(error).__name__, "message": str(error)}
        others = _last_words(world, words)
        if not broken and others.get(0) == words and isinstance(error, ClipsError):
            raise SystemExit(error.exit_code) from error  # the first process says the same
        if not broken:
            raise
        for rank, theirs in others.items():
            raise UserError(
                f"Process {rank} of {world.size} failed, and this one stopped with it: {theirs['message']}"
            ) from error
        raise UserError(
            f"Another of the {world.size} processes ended without a word ({str(error).splitlines()[0]}). It may have "
            "been killed for want of memory. Run the same command again to go on from the last checkpoint."
        ) from error


def _is_broken_connection(error: Exception) -> bool:
    """gloo raises plain ``RuntimeError``s for some of what ``DistError`` is meant for."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed"))


def _last_words(world: World, mine: dict[str, str] | None) -> dict[int, dict[str, str]]:
    """Leaves this process's reason, if any, and returns what others left; empty when nothing comes."""
    assert world.store is not None
    found: dict[int, dict[str, str]] = {}
    with contextlib.suppress(RuntimeError):  # the store is gone when the process that held it is
        if mine is not None:
            world.store.set(str(world.rank), json.dumps(mine))
            if world.is_first:
                return found
        wanted = [0] if mine is not None else [rank for rank in range(world.size) if rank != world.rank]
        end = time.monotonic() + (LAST_WORDS_S if mine is None else 1.0)
        while not found and time.monotonic() < end:
            found = {rank: json.loads(world.store.get(str(rank))) for rank in wanted if world.store.check([str(rank)])}
            time.sleep(0.05)
    return found


def check_shares(config: TrainConfig, world: World) -> None:
    """Raises ``UserError`` where the batch cannot be shared out evenly."""
    shares = config.accumulation * world.size
    if config.batch % shares:
        fitting = max(shares, config.batch // shares * shares)
        raise UserError(
            f"batch {config.batch} cannot be shared out: {world.size} processes with accumulation "
            f"{config.accumulation} make {shares} equal parts. Use a multiple of {shares}, such as {fitting}."
        )


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of transformers, outermost first: the members of module lists that hold parameters."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found += [block for block in child if any(True for _ in block.parameters())]
        else:
            found += blocks(child)
    return found


def loose(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trained scalars, such as the logit scale: used outside of the shared module's forward pass, and never sharded."""
    return {name: p for name, p in module.named_parameters() if p.ndim == 0 and p.requires_grad}


def wrap(trainee: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """``trainee``, shared between the processes by copies or by shards; itself when there is one process only.

    Gradients are averaged over the processes as they come, those of ``loose`` parameters by ``average_loose``.
    """
    if world.size == 1:
        return trainee
    if config.parallel == "fsdp":
        # Features are views of what the towers return, and nothing is done to them in place.
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in blocks(trainee):
            fully_shard(block, mesh=mesh)
        scalars = {parameter for parameter in trainee.parameters() if parameter.ndim == 0}
        fully_shard(trainee, mesh=mesh, ignored_params=scalars)
        return trainee
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trainee, list(loose(trainee)))
    return DistributedDataParallel(trainee, broadcast_buffers=False, gradient_as_bucket_view=True)


def unwrapped(trainee: nn.Module) -> Any:
    """The module that was given to ``wrap``."""
    return trainee.module if isinstance(trainee, DistributedDataParallel) else trainee


@contextlib.contextmanager
def no_sync(trainee: nn.Module) -> Iterator[None]:
    """Gradients of the backward passes within are added up, and averaged by the first one after it."""
    if isinstance(trainee, DistributedDataParallel):
        with trainee.no_sync():
            yield
    elif isinstance(trainee, FSDPModule):
        trainee.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            trainee.set_requires_gradient_sync(True)
    else:
        yield


def average_loose(trainee: nn.Module, world: World) -> None:
    """Averages what ``wrap`` left out. Called once a step, after all backward passes."""
    if world.size == 1:
        return
    for parameter in loose(unwrapped(trainee)).values():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world.size
