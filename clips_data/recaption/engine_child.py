"""The child process in which an engine lives: it builds the engine and passes questions and answers on."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from clips_data import executor
from clips_data.errors import UserError
from clips_data.recaption.engines import Build, Engine, Request

_mark: Callable[[int], None] = lambda number: None  # noqa: E731 - set in the child


def mark(number: int) -> None:
    """Said by an engine before it touches a row's image: should the process die now, this row is the first suspect."""
    _mark(number)


def serve(connection: Connection, build: Build, log: Path, marked: Any, gpu: int | None) -> None:
    """Builds the engine, then answers requests until the pipe closes. All talk goes to the log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    executor.die_with_parent()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # A tracker of its own, which talks to the log: when this process is killed, the parent's would complain to the
    # user about semaphores. Python has no public way to ask for one.
    tracker: Any = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None
    if gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    global _mark
    _mark = lambda number: setattr(marked, "value", number)  # noqa: E731
    try:
        engine = build()
        _send(connection, ("up", engine.about))
        _work(connection, engine)
    except UserError as error:  # of no use to be tried again
        _send(connection, ("user_error", str(error)))
        raise
    except Exception as error:  # whatever a third-party engine raises is told to the user by the parent
        _send(connection, (_kind(error), f"{type(error).__name__}: {error}"))
        raise


def _work(connection: Connection, engine: Engine) -> None:
    inbox: queue.SimpleQueue[tuple[int, Request] | None] = queue.SimpleQueue()
    # A thread of its own empties the pipe, so that the parent never waits in a send while the engine computes.
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    num_open = 0
    while True:
        while not num_open or not inbox.empty():
            message = inbox.get()
            if message is None:
                return
            engine.add(*message)
            num_open += 1
        answers = engine.step()
        if answers:
            _send(connection, ("answers", answers))
            num_open -= len(answers)


def _read(connection: Connection, inbox: queue.SimpleQueue[tuple[int, Request] | None]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        inbox.put(None)


def _kind(error: Exception) -> str:
    told = f"{type(error).__name__} {error}".lower()
    return "out_of_memory" if "outofmemory" in told or "out of memory" in told or "memoryerror" in told else "failed"


def _send(connection: Connection, message: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone; nobody is left to be told
        connection.send(message)
