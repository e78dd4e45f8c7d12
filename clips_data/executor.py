"""Maps a stage over its shards: here, in local worker processes, on a Ray cluster, or as one slice of a job array.

Workers come from a forkserver that has imported the stage's heavy libraries once, so a task starts in milliseconds
where a spawned interpreter would take seconds.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from clips_data.errors import Interrupted, UsageError, UserError

RAY_RETRIES: Final = 3
WORKER_PATIENCE_S: Final = 5.0


@dataclass(frozen=True)
class Job:
    """How a stage is to be run, as opposed to what it makes. Nothing in here may change a finished file.

    ``out`` overrides the stage's folder under ``work``; ``only`` restricts the stage to these finished shards of the
    stage before (read from stdin by the commands' ``-``); ``limit`` is the number of rows after which the stage stops
    without finishing the shard it is in. ``executor`` is ``local`` or ``ray``. ``retry`` (failure codes) and ``append``
    make ``download`` add shards to a finished folder. ``budget`` (``20gpuh``) ends ``recaption`` at a point from which
    it resumes.
    """

    work: Path = Path()
    out: Path | None = None
    only: tuple[Path, ...] | None = None
    limit: int | None = None
    slice: str | None = None
    processes: int = 1
    overwrite: bool = False
    dry_run: bool = False
    quiet: bool = False
    executor: str = "local"
    retry: tuple[str, ...] = ()
    append: bool = False
    budget: str | None = None


@dataclass
class Report:
    """What a stage did. ``units`` are the finished files, in order, for stdout; ``counts`` has rows by outcome.

    ``facts`` are further figures with the unit in their name (``startup_s``, ``captions_per_s``), ``notes`` lines for
    people.
    """

    stage: str
    units: list[Path] = field(default_factory=list)
    made: int = 0
    skipped: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    facts: dict[str, float | int | str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, counts: dict[str, int]) -> None:
        for name, number in counts.items():
            self.counts[name] = self.counts.get(name, 0) + number


def parse_slice(text: str | None) -> tuple[int, int]:
    """``"2/8"`` → ``(2, 8)``: the third of eight slices. ``None`` is the whole."""
    if text is None:
        return 0, 1
    try:
        index, of = (int(piece) for piece in text.split("/"))
    except ValueError:
        raise UsageError(f"--slice {text!r} is not of the form i/n, for example 0/8.") from None
    if not 0 <= index < of:
        raise UsageError(f"--slice {text!r} is out of range: slices of {of} are 0/{of} to {of - 1}/{of}.")
    return index, of


def slice_of(units: Sequence[str], part: str | None) -> list[str]:
    """Every n-th unit, starting with the i-th: slices of one set are disjoint and together complete."""
    index, of = parse_slice(part)
    return [unit for number, unit in enumerate(units) if number % of == index]


def map_units(
    work: Callable[[Any], Any],
    tasks: Iterable[Any],
    *,
    num_processes: int,
    preload: Sequence[str] = (),
    on: str = "local",
) -> Iterator[Any]:
    """Yields ``work(task)`` as tasks finish. ``num_processes`` 0 runs them here, one after the other.

    ``preload`` names modules that the workers' parent imports once. ``on`` is ``local`` or ``ray``: then the tasks go
    to the cluster that ``RAY_ADDRESS`` names (a local one where it names none), ``num_processes`` at a time, and all
    its machines must see the stage's folders under the same paths. A worker that dies ends the stage with a
    ``UserError``; finished tasks stay finished. SIGTERM and Ctrl-C raise ``Interrupted``.
    """
    if on == "ray":
        yield from _map_on_ray(work, tasks, max(1, num_processes))
        return
    if num_processes == 0:
        for task in tasks:
            yield work(task)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    before = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(num_processes, mp_context=context, initializer=_prepare_worker)
    try:
        yield from _results(pool, work, tasks)
    except BaseException:  # stop the workers in the middle of their shards: unfinished shards are redone
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _results(
    pool: concurrent.futures.ProcessPoolExecutor, work: Callable[[Any], Any], tasks: Iterable[Any]
) -> Iterator[Any]:
    """``work(task)`` of each task as they finish; a worker that dies is a ``UserError``."""
    try:
        pending = {pool.submit(work, task) for task in tasks}
        while pending:
            finished, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "A worker process died (out of memory, or killed from outside). Finished shards are kept; "
            "run the same command again, with fewer --processes if memory is short."
        ) from None


def map_on_workers(
    make: Callable[[int, int], Any], tasks: Sequence[Any], *, num_workers: int, on: str = "local", use_gpus: bool = True
) -> Iterator[Any]:
    """Yields what handlers return, as tasks finish. Each worker makes its handler once: ``make(number, num_gpus)``.

    For handlers that are dear to make, such as models on GPUs. With ``use_gpus`` a worker picks its GPU by its number
    locally; on Ray it has one of its own, ``num_gpus`` is then 0, and there the task of a worker that is lost goes to
    another one. ``make`` and the tasks are pickled. A handler that raises ends the map.
    """
    if on == "ray":
        from clips_data.actors import map_on_actors

        yield from map_on_actors(make, tasks, num_workers=num_workers, use_gpus=use_gpus)
        return
    context = multiprocessing.get_context("spawn")
    numbers = context.Queue()
    for number in range(num_workers):
        numbers.put(number)
    before = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers,
        mp_context=context,
        initializer=_prepare_handler,
        initargs=(make, numbers, num_gpus() if use_gpus else 0),
    )
    try:
        yield from _results(pool, _handle, tasks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        workers = set(multiprocessing.active_children()) - before
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(WORKER_PATIENCE_S)
            worker.kill()


_make_handler: Callable[[], Any] | None = None
_handler: Any = None


def _prepare_handler(make: Callable[[int, int], Any], numbers: Any, gpus: int) -> None:
    global _make_handler
    _prepare_worker()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what is open is closed on the way out
    number = numbers.get()
    _make_handler = lambda: make(number, gpus)  # noqa: E731


def _handle(task: Any) -> Any:
    """The handler is made with the first task, so that what goes wrong then is told as that task's error."""
    global _handler
    if _handler is None:
        assert _make_handler is not None
        _handler = _make_handler()
    return _handler(task)


def num_gpus(on: str = "local") -> int:
    """GPUs that this process may use, or those of the Ray cluster.

    Here by the driver's own files: asking torch would cost seconds.
    """
    if on == "ray":
        from clips_data.actors import num_gpus_of_cluster

        return num_gpus_of_cluster()
    if (seen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([piece for piece in seen.split(",") if piece.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def _map_on_ray(work: Callable[[Any], Any], tasks: Iterable[Any], num_at_once: int) -> Iterator[Any]:
    """No more tasks are handed over than run at once: what is not begun is not lost, and can be stopped."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
    remote = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(work_on_ray)
    shared = ray.put(work)
    waiting = iter(tasks)
    running: list[Any] = []
    try:
        while True:
            running += [remote.remote(shared, task) for task in itertools.islice(waiting, num_at_once - len(running))]
            if not running:
                return
            finished, running = ray.wait(running, num_returns=1)
            yield ray.get(finished[0])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise UserError(
            f"A task of the Ray cluster was lost {RAY_RETRIES + 1} times ({type(error).__name__}). Finished shards are "
            "kept; run the same command again, with fewer --processes if memory is short."
        ) from None
    finally:
        for task in running:
            ray.cancel(task, force=True)


def work_on_ray(work: Callable[[Any], Any], task: Any) -> Any:
    """One task in a Ray worker, which has only what its pickled arguments bring."""
    return work(task)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent answers it
    die_with_parent()


def die_with_parent() -> None:
    """Ends this child process as soon as its parent is gone, even when the parent was killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def stop_on_sigterm() -> None:
    """Makes preemption (SIGTERM) and Ctrl-C the same clean, resumable stop. Only the main thread can install this."""

    def stop(number: int, frame: Any) -> None:
        raise Interrupted("Stopped by a signal. Finished work is kept; run the same command again to go on.")

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
