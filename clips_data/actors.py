"""Handlers that are dear to make, as Ray actors: a task that loses its actor goes to another one.

Only actors that answer get a task, so one whose node is gone, or that waits for a place in the cluster, delays nothing.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from clips_data.errors import UserError

MOST_LOSSES: Final = 3
"""Actors that one task may lose before it is at fault itself."""
PLACE_WAIT_S: Final = 900.0
"""How long nothing may run while all wait for a place in the cluster or for their handler to be made."""


class _Actor:
    def __init__(self, make: Callable[[int, int], Any], number: int) -> None:
        self._make, self._number = make, number

    def prepare(self) -> None:
        """Makes the handler; here and not before, so that what goes wrong is told as it is."""
        self._handler = self._make(self._number, 0)

    def handle(self, task: Any) -> Any:
        return self._handler(task)


def map_on_actors(
    make: Callable[[int, int], Any], tasks: Sequence[Any], *, num_workers: int, use_gpus: bool
) -> Iterator[Any]:
    """Yields the results of tasks as they finish. With ``use_gpus`` each actor has a GPU, if the cluster has any.

    Raises ``UserError`` when a task has lost several actors, or when the cluster has no place for any.
    """
    import ray

    gpus = num_gpus_of_cluster() if use_gpus else 0
    num_workers = min(num_workers, len(tasks))
    remote: Any = ray.remote(num_cpus=1, num_gpus=int(gpus > 0))(_Actor)
    shared = ray.put(make)
    actors: dict[Any, Any] = {}  # what an actor is at -> (actor, its task; None while it is being made)
    waiting, losses = deque(enumerate(tasks)), Counter[int]()

    def begin(number: int) -> None:
        actor: Any = remote.remote(shared, number)
        actors[actor.prepare.remote()] = (actor, None)

    try:
        for number in range(num_workers):
            begin(number)
        num_made, last = num_workers, time.monotonic()
        while waiting or any(task is not None for _, task in actors.values()):
            finished, _ = ray.wait(list(actors), num_returns=1, timeout=5)
            running = any(task is not None for _, task in actors.values())
            if not finished and not running and time.monotonic() - last > PLACE_WAIT_S:
                raise UserError(
                    f"The Ray cluster had no place for a worker within {PLACE_WAIT_S:.0f} s: each needs a CPU"
                    f"{' and a GPU' if gpus else ''}. Finished shards are kept; add nodes and run the same command "
                    "again."
                )
            for reference in finished:
                last = time.monotonic()
                actor, task = actors.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                except ray.exceptions.RayError as error:
                    print(f"A worker of the Ray cluster was lost ({type(error).__name__})", file=sys.stderr)
                    losses[task[0] if task is not None else -1] += 1
                    _check_losses(losses, num_workers)
                    if task is not None:
                        waiting.appendleft(task)
                    begin(num_made)
                    num_made += 1
                    continue
                if task is not None:
                    yield result
                if waiting:
                    following = waiting.popleft()
                    actors[actor.handle.remote(following[1])] = (actor, following)
    finally:
        for actor, _ in actors.values():
            ray.kill(actor)


def num_gpus_of_cluster() -> int:
    """Of the cluster that ``RAY_ADDRESS`` names, or of a local one that is started where it names none."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return int(resources.get("GPU", 0))


def _check_losses(losses: Counter[int], num_workers: int) -> None:
    """Under -1 are those that were lost before they had a task."""
    of_one_task = max((number for task, number in losses.items() if task >= 0), default=0)
    if of_one_task >= MOST_LOSSES or losses[-1] >= MOST_LOSSES * num_workers:
        raise UserError(
            f"The same work lost its worker on the Ray cluster {MOST_LOSSES} times. Finished shards are kept; look at "
            "the logs beside them, and run the same command again, with smaller batches if memory is short."
        )
