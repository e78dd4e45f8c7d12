"""What an engine is: something that answers a batch of prompts about images, each answer with how it ended.

Engines run in a child process of ours. An engine that dies or hangs then costs its child, not the run: the batch is
halved until the row that kills the engine is alone, that row is marked, and the rest is done by a fresh engine.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from clips_data import executor
from clips_data.errors import UserError


@dataclass(frozen=True)
class Request:
    """One row: the encoded image (``None`` for text-only prompts), the texts, and the row's own seed."""

    image: bytes | None
    system: str | None
    user: str
    seed: int


@dataclass(frozen=True)
class Answer:
    """What became of a request. ``code`` is one of ``schema.CAPTION_CODES``; ``text`` is empty unless it is ``ok``."""

    code: str
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0


class Engine(Protocol):
    """Lives in the child. ``about`` must hold ``engine_version``, ``special_tokens`` and may hold more."""

    about: dict[str, Any]

    def answer(self, requests: list[Request]) -> list[Answer]: ...


class EngineDied(Exception):
    """The child is gone, or did not answer in time and was killed."""


class EngineProcess:
    """A child process with one engine in it, restarted when it dies.

    ``build`` runs in the child, must be importable there, and returns the engine. ``about`` is the engine's own.
    """

    def __init__(
        self, build: Callable[[], Engine], *, log: Path, deadline_s: float, startup_deadline_s: float = 900.0
    ) -> None:
        self._build, self._log = build, log
        self._deadline_s, self._startup_deadline_s = deadline_s, startup_deadline_s
        self.about: dict[str, Any] = {}
        self.startup_s = 0.0
        self.num_deaths = 0
        self._process: Any = None
        self._connection: Connection | None = None

    def start(self) -> None:
        """Starts the child and waits until its engine is up. Raises ``UserError`` with the engine's own words."""
        started = time.monotonic()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._build, self._log), daemon=True)
        self._process.start()
        theirs.close()
        try:
            kind, value = self._receive(self._startup_deadline_s)
        except EngineDied as death:
            raise UserError(f"The captioning engine did not start: {death}. Its log is {self._log}.") from None
        if kind == "failed":
            raise UserError(f"The captioning engine did not start: {value}. Its log is {self._log}.")
        self.about, self.startup_s = value, time.monotonic() - started

    def answer(self, requests: list[Request]) -> list[Answer]:
        """Answers in order. A row on which the engine dies twice gets the code ``engine_died``."""
        if not requests:
            return []
        try:
            return self._ask(requests)
        except EngineDied:
            self._restart()
        if len(requests) == 1:
            try:
                return self._ask(requests)
            except EngineDied:
                self._restart()
                return [Answer("engine_died")]
        half = len(requests) // 2
        return self.answer(requests[:half]) + self.answer(requests[half:])

    def _restart(self) -> None:
        self.num_deaths += 1
        self.close()
        self.start()

    def _ask(self, requests: list[Request]) -> list[Answer]:
        assert self._connection is not None
        try:
            self._connection.send(requests)
        except OSError:
            raise EngineDied("its process is gone") from None
        kind, value = self._receive(self._deadline_s)
        if kind == "failed":
            raise EngineDied(str(value))
        answers: list[Answer] = value
        return answers

    def _receive(self, deadline_s: float) -> tuple[str, Any]:
        assert self._connection is not None
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            if self._connection.poll(0.2):
                try:
                    kind, value = self._connection.recv()
                    return kind, value
                except (EOFError, OSError):
                    break
            if not self._process.is_alive() and not self._connection.poll(0):
                break
        else:
            self.close()
            raise EngineDied(f"no answer within {deadline_s:g} s")
        self._process.join(5)
        raise EngineDied(f"its process ended with exit code {self._process.exitcode}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return int(self._process.pid)

    def close(self, *, patience_s: float = 0.0) -> None:
        """Ends the child, which has nothing to save; with patience, by letting it leave by itself."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            if patience_s:
                self._process.join(patience_s)
            self._process.kill()
            self._process.join()


def _serve(connection: Connection, build: Callable[[], Engine], log: Path) -> None:
    """The child: builds the engine, then answers batches until the pipe closes. All its talk goes to the log."""
    import os

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    executor.die_with_parent()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        engine = build()
    except Exception as error:  # whatever a third-party engine raises is told to the user by the parent
        _send(connection, ("failed", f"{type(error).__name__}: {error}"))
        raise
    _send(connection, ("up", engine.about))
    while True:
        try:
            requests = connection.recv()
        except EOFError:
            return
        _send(connection, ("answers", engine.answer(requests)))


def _send(connection: Connection, message: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent is gone; nobody is left to be told
        connection.send(message)
