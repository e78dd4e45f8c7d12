"""An engine's child process as the run sees it: started, asked, watched, and replaced when it dies.

An engine that dies or hangs costs its child, not the run: the rows that were in flight are narrowed down until the one
that kills the engine is alone, that row is marked, and the rest is done by a fresh engine.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, TypeVar

from clips_data.errors import UserError
from clips_data.recaption.engine_child import serve
from clips_data.recaption.engines import Answer, Build, Request

T = TypeVar("T")

MOST_DEATHS_IN_A_ROW: Final = 4
"""Deaths without any answer between them, beside those that narrow the rows in flight down to one, after which the
engine itself is at fault and not a row."""


class EngineDied(Exception):
    """The child is gone, or did not answer in time and was killed."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class EngineProcess:
    """A child process with one engine in it, restarted when it dies.

    ``gpu`` is the only GPU that the child sees, counted among those that this process sees; ``None`` hides none.
    """

    def __init__(
        self,
        build: Build,
        *,
        log: Path,
        deadline_s: float,
        startup_deadline_s: float = 900.0,
        gpu: int | None = None,
    ) -> None:
        self._build, self._log, self._gpu = build, log, gpu
        self._deadline_s, self._startup_deadline_s = deadline_s, startup_deadline_s
        self.about: dict[str, Any] = {}
        self.startup_s = self._launched = 0.0
        self.num_deaths = 0
        self._deaths_in_a_row = 0
        self._sending_since = math.inf
        self._numbers = itertools.count()
        self._process: Any = None
        self._connection: Connection | None = None
        self._marked: Any = None

    # --- life and death -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the child and waits until its engine is up. Raises ``UserError`` with the engine's own words."""
        self.launch()
        self.wait_until_up()

    def launch(self) -> None:
        """Starts the child, which takes its time to be up."""
        self._launched = time.monotonic()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._marked = context.RawValue("q", -1)
        arguments = (theirs, self._build, self._log, self._marked, self._gpu)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()
        theirs.close()

    def wait_until_up(self) -> None:
        """Raises ``UserError`` with the engine's own words when it does not come up."""
        try:
            kind, value = self._receive(self._startup_deadline_s)
        except EngineDied as death:
            raise UserError(f"The captioning engine did not start: {death}. Its log is {self._log}.") from None
        if kind != "up":
            raise UserError(f"The captioning engine did not start: {value}. Its log is {self._log}.")
        self.about, self.startup_s = value, time.monotonic() - self._launched

    def _restart(self, death: EngineDied) -> None:
        self.num_deaths += 1
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > MOST_DEATHS_IN_A_ROW + int(self.about["capacity"]).bit_length():
            raise UserError(
                f"The captioning engine died {self._deaths_in_a_row} times without one answer between; the last time "
                f"{death}. What was captioned is kept. Its log is {self._log}; mend the cause and run the same command "
                "again."
            )
        self.close()
        if death.out_of_memory and self._build.max_batch_rows > 1:
            fewer = self._build.max_batch_rows // 2
            print(f"recaption: the engine ran out of memory; on with {fewer} rows in flight", file=sys.stderr)
            self._build = replace(self._build, max_batch_rows=fewer)  # type: ignore[type-var]
        else:
            print(f"recaption: {death}; a fresh engine is started", file=sys.stderr)
        self.start()

    def close(self) -> None:
        """Ends the child, which has nothing to save; leaving by itself would take it seconds."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return int(self._process.pid)

    # --- questions and answers ----------------------------------------------------------------------------------------

    def stream(self, requests: Iterable[tuple[T, Request] | None]) -> Iterator[tuple[T, Answer]]:
        """Answers as they become ready, in any order, each with what came with its request.

        Requests are taken from the iterable as the engine has room, so it may be endless; ``None`` says that there are
        no more before some answers were taken. A row on which the engine
        dies twice gets the code ``engine_died``. Raises ``UserError`` when the engine cannot be started again.
        """
        waiting = iter(requests)
        flying: dict[int, tuple[T, Request]] = {}
        while True:
            try:
                room = self.about["capacity"] - len(flying)
                for item in itertools.islice(waiting, max(0, room)):
                    if item is None:  # no more before some answers are taken
                        break
                    number = next(self._numbers)
                    flying[number] = item
                    self._send(number, item[1])
                if not flying:
                    return
                yield from self._land(flying)
            except EngineDied as death:
                suspects, prime, flying = list(flying.values()), flying.get(self._marked.value), {}
                smaller = death.out_of_memory and self._build.max_batch_rows > 1
                self._restart(death)
                if smaller:
                    waiting = itertools.chain(suspects, waiting)
                    continue
                # The row that was being prepared is the likeliest culprit; once it is caught, the others are free.
                if prime is not None and len(suspects) > 1:
                    suspects.remove(prime)
                    [(tag, answer)] = self._narrow([prime])
                    yield tag, answer
                    if answer.code == "engine_died":
                        waiting = itertools.chain(suspects, waiting)
                        continue
                yield from self._narrow(suspects)

    def answer(self, requests: list[Request]) -> list[Answer]:
        """Answers in the order of the requests."""
        answers = dict(self.stream(enumerate(requests)))
        return [answers[i] for i in range(len(requests))]

    def _narrow(self, suspects: list[tuple[T, Request]]) -> Iterator[tuple[T, Answer]]:
        """Answers the suspects, halving a group whenever the engine dies on it, down to the row that kills it."""
        groups = [suspects]
        while groups:
            flying = {next(self._numbers): item for item in groups.pop()}
            try:
                for number, (_, request) in flying.items():
                    self._send(number, request)
                while flying:
                    yield from self._land(flying)
            except EngineDied as death:
                left = list(flying.values())
                self._restart(death)
                if len(left) == 1:
                    yield left[0][0], Answer("engine_died")
                elif left:
                    groups += [left[len(left) // 2 :], left[: len(left) // 2]]

    def _land(self, flying: dict[int, tuple[T, Request]]) -> Iterator[tuple[T, Answer]]:
        """The next answers to arrive, which are taken out of ``flying``."""
        kind, value = self._receive(self._deadline_s)
        if kind != "answers":
            self._process.join(5)
            raise EngineDied(f"it ended with {value}", out_of_memory=kind == "out_of_memory")
        self._deaths_in_a_row = 0
        for number, answer in value:
            tag, _ = flying.pop(number)
            yield tag, answer

    def _send(self, number: int, request: Request) -> None:
        assert self._connection is not None
        self._sending_since = time.monotonic()
        try:
            self._connection.send((number, request))
        except OSError:
            self._receive_last_words()
        finally:
            self._sending_since = math.inf

    def _watch(self, process: Any) -> None:
        """A child that hangs in C may leave its pipe full: a send to it would never end."""
        while process.is_alive():
            if time.monotonic() - self._sending_since > self._deadline_s:
                process.kill()
            time.sleep(0.2)

    def _receive_last_words(self) -> None:
        """The child is gone: raises why, in its own words where it left some."""
        while True:
            kind, value = self._receive(self._deadline_s)
            if kind != "answers":
                raise EngineDied(f"it ended with {value}", out_of_memory=kind == "out_of_memory")

    def _receive(self, deadline_s: float) -> tuple[str, Any]:
        assert self._connection is not None
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            if self._connection.poll(0.2):
                try:
                    kind, value = self._connection.recv()
                except (EOFError, OSError):
                    break
                if kind == "user_error":
                    self.close()
                    raise UserError(f"{value} The engine's log is {self._log}.")
                return kind, value
            if not self._process.is_alive() and not self._connection.poll(0):
                break
        else:
            self.close()
            raise EngineDied(f"it gave no answer within {deadline_s:g} s")
        self._process.join(5)
        raise EngineDied(f"its process ended with exit code {self._process.exitcode}")
