"""Work done ahead of who needs it: chunks by threads or worker processes, in order, and whole batches by a thread.

How far ahead is bounded: each worker holds a finished chunk at most, and finished batches wait up to a number and a
number of bytes. Everything ends with the generator that asked for it.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

import torch

from clips_data.errors import ClipsError, UserError

Task = TypeVar("Task")
Made = TypeVar("Made")

BATCHES_AHEAD = 4
BYTES_AHEAD = 1 << 30
"""Finished batches wait up to this number and size; one may always wait."""
TASKS_AHEAD = 2
"""Tasks that a worker has: the one at work, and the next, so that it need not wait for it."""
MAX_THREADS = 4
START_METHOD = "forkserver"
"""Not fork: the training process has threads, whose locks a forked child would inherit."""
PATIENCE_S = 10
"""How long a worker may take to end before it is killed."""


def loaded(
    load: Callable[[Task], Made], tasks: Iterable[Task], num_workers: int, *, preload: Sequence[str] = ()
) -> Generator[Made]:
    """``load`` of each task, in order: by worker processes, or by threads where there are none.

    ``preload`` are modules that workers need, imported once for all of them. What ``load`` raises is raised here, and
    ``UserError`` when a worker process dies.
    """
    return _by_processes(load, tasks, num_workers, preload) if num_workers else _by_threads(load, tasks)


def made_ahead(make: Callable[[], Generator[Made]], num_bytes: Callable[[Made], int]) -> Generator[Made]:
    """What the generator of ``make`` yields, made by a thread of its own. ``num_bytes`` tells what a thing weighs."""
    line: _Line[Made] = _Line()

    def work() -> None:
        try:
            with contextlib.closing(make()) as things:
                for thing in things:
                    if not line.put(thing, num_bytes(thing)):
                        return
            line.end(None)
        except BaseException as error:  # raised again by ``take``
            line.end(error)

    thread = threading.Thread(target=work, name="clips-batches", daemon=True)
    thread.start()
    try:
        while (thing := line.take()) is not None:
            yield thing
    finally:
        line.stop()
        thread.join()


class _Line(Generic[Made]):
    """Finished things, waiting between the thread that makes them and the one that takes them."""

    def __init__(self) -> None:
        self._things: deque[tuple[Made, int]] = deque()
        self._changed = threading.Condition()
        self._stopped = self._ended = False
        self._error: BaseException | None = None

    def put(self, thing: Made, size_bytes: int) -> bool:
        """Waits for room. False when nothing is wanted any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room(size_bytes))
            self._things.append((thing, size_bytes))
            self._changed.notify_all()
            return not self._stopped

    def _has_room(self, size_bytes: int) -> bool:
        waiting_bytes = sum(size for _, size in self._things)
        return not self._things or (len(self._things) < BATCHES_AHEAD and waiting_bytes + size_bytes <= BYTES_AHEAD)

    def take(self) -> Made | None:
        """``None`` after the last one. Raises what ended the making."""
        with self._changed:
            self._changed.wait_for(lambda: self._things or self._ended)
            if self._things:
                thing, _ = self._things.popleft()
                self._changed.notify_all()
                return thing
            if self._error is not None:
                raise self._error
            return None

    def end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def _by_threads(load: Callable[[Task], Made], tasks: Iterable[Task]) -> Generator[Made]:
    num_threads = max(2, min(MAX_THREADS, len(os.sched_getaffinity(0))))
    flying: deque[Future[Made]] = deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="clips-loader")
    try:
        for task in tasks:
            flying.append(pool.submit(load, task))
            if len(flying) > num_threads:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _by_processes(
    load: Callable[[Task], Made], tasks: Iterable[Task], num_workers: int, preload: Sequence[str]
) -> Generator[Made]:
    """Worker n has tasks n, n + num_workers, …, so that asking the workers in turn keeps the order."""
    context = multiprocessing.get_context(START_METHOD)
    context.set_forkserver_preload(list(preload))
    workers: list[_Worker] = []
    busy: deque[_Worker] = deque()
    try:
        for number in range(num_workers):
            workers.append(_Worker(context, number, load))
        for number, task in enumerate(tasks):
            if len(busy) == TASKS_AHEAD * num_workers:
                yield busy.popleft().receive()
            workers[number % num_workers].send(task)
            busy.append(workers[number % num_workers])
        while busy:
            yield busy.popleft().receive()
    finally:
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.join()


class _Worker:
    """A process that loads, and the pipe to it. It ends when our end of the pipe is closed, or gone with us."""

    def __init__(self, context: Any, number: int, load: Callable[[Any], Any]) -> None:
        self._pipe, theirs = context.Pipe()
        name = f"clips-loader-{number}"
        self._process = context.Process(target=_work, args=(theirs, load), name=name, daemon=True)
        self._process.start()
        theirs.close()

    def send(self, task: Any) -> None:
        try:
            self._pipe.send(task)
        except OSError:
            raise self._died() from None

    def receive(self) -> Any:
        try:
            made, error = _receive(self._pipe)
        except (EOFError, OSError):
            raise self._died() from None
        if error is not None:
            raise error
        return made

    def _died(self) -> UserError:
        self._process.join(PATIENCE_S)
        return UserError(
            f"The process {self._process.name}, which loads samples, ended with code {self._process.exitcode} before "
            "its work was done; -9 mostly means that memory ran out. Lower num_workers, or set it to 0 to load in "
            "threads; the same command goes on from the last checkpoint."
        )

    def dismiss(self) -> None:
        self._pipe.close()

    def join(self) -> None:
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def _work(pipe: Connection, load: Callable[[Any], Any]) -> None:
    """A worker's life. Signals are its parent's to answer, which needs batches to the end of its step."""
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):  # of the pipe: the parent wants no more, or is gone
        while True:
            task = pipe.recv()
            _send(pipe, _tried(load, task))


def _tried(load: Callable[[Any], Any], task: Any) -> tuple[Any, ClipsError | None]:
    try:
        return load(task), None
    except ClipsError as error:
        return None, error
    except OSError as error:
        return None, UserError(f"A sample cannot be read ({error}). Restore the file or make the shards again.")


class _Pickler(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        if isinstance(thing, torch.Tensor):
            return torch.from_numpy, (thing.numpy(),)
        return NotImplemented


def _send(pipe: Connection, reply: tuple[Any, ClipsError | None]) -> None:
    """Tensors go through the pipe as they lie in memory. Containers have little shared memory to offer instead."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, pickle.HIGHEST_PROTOCOL, buffer_callback=buffers.append).dump(reply)
    pipe.send((file.getvalue(), [buffer.raw().nbytes for buffer in buffers]))
    for buffer in buffers:
        pipe.send_bytes(buffer.raw())


def _receive(pipe: Connection) -> tuple[Any, ClipsError | None]:
    content, sizes = pipe.recv()
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        pipe.recv_bytes_into(buffer)
    reply: tuple[Any, ClipsError | None] = pickle.loads(content, buffers=buffers)
    return reply
