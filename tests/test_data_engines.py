"""Engines in a child process: answers stream back, and what an engine dies of is found. vLLM itself runs elsewhere."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips_data.errors import UserError
from clips_data.recaption import engine_child, engine_process
from clips_data.recaption.engine_process import EngineProcess
from clips_data.recaption.engines import Answer, BatchEngine, Request


@dataclass(frozen=True)
class BuildFragile:
    """An engine that really dies (SIGKILL) or hangs on the rows that it is told to."""

    deadly: tuple[str, ...] = ()
    hanging: tuple[str, ...] = ()
    stopping: tuple[str, ...] = ()
    broken: bool = False
    marks: bool = False
    raises: str = ""
    refuses: str = ""
    most_rows_in_memory: int = 1000
    max_batch_rows: int = 8

    def __call__(self) -> Any:
        if self.broken:
            raise RuntimeError("no such device")
        return FragileEngine(self)


class FragileEngine(BatchEngine):
    def __init__(self, settings: BuildFragile) -> None:
        super().__init__(settings.max_batch_rows)
        self.settings = settings
        self.about = {
            "engine_version": "1",
            "device": "cpu",
            "special_tokens": [],
            "capacity": settings.max_batch_rows,
        }

    def add(self, number: int, request: Request) -> None:
        if self.settings.marks:
            engine_child.mark(number)
            self._die_of(request)
        super().add(number, request)

    def answer(self, requests: list[Request]) -> list[Answer]:
        if len(requests) > self.settings.most_rows_in_memory:
            raise MemoryError(f"no room for {len(requests)} rows")
        if self.settings.refuses:
            raise UserError(self.settings.refuses)
        if self.settings.raises:
            raise ValueError(self.settings.raises)
        for request in requests:
            self._die_of(request)
            if request.user in self.settings.stopping:
                os.kill(os.getpid(), signal.SIGSTOP)
            if request.user in self.settings.hanging:
                time.sleep(600)
        return [Answer("ok", f"said {request.user}", "stop", 2) for request in requests]

    def _die_of(self, request: Request) -> None:
        if request.user in self.settings.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


def ask(build: BuildFragile, users: str, log: Path, deadline_s: float = 60.0) -> tuple[list[str], EngineProcess]:
    engine = EngineProcess(build, log=log / "engine.log", deadline_s=deadline_s)
    engine.start()
    try:
        answers = engine.answer([Request(None, None, user, 0) for user in users])
        return [answer.text or answer.code for answer in answers], engine
    finally:
        engine.close()


def said(users: str, dead: str = "") -> list[str]:
    return ["engine_died" if user in dead else f"said {user}" for user in users]


def test_each_answer_comes_with_what_came_with_its_request(tmp_path: Path) -> None:
    assert ask(BuildFragile(), "abcdefghijklmnopqrstuvwxyz", tmp_path)[0] == said("abcdefghijklmnopqrstuvwxyz")


def test_no_request_is_no_answer(tmp_path: Path) -> None:
    assert ask(BuildFragile(), "", tmp_path)[0] == []


def test_requests_are_taken_only_as_the_engine_has_room(tmp_path: Path) -> None:
    taken = 0

    def endless() -> Iterator[tuple[int, Request]]:
        nonlocal taken
        for taken in itertools.count(1):
            yield taken, Request(None, None, str(taken), 0)

    engine = EngineProcess(BuildFragile(), log=tmp_path / "log", deadline_s=60)
    engine.start()
    try:
        landed = list(itertools.islice(engine.stream(endless()), 100))
    finally:
        engine.close()
    assert [answer.text for _, answer in sorted(landed, key=lambda pair: pair[0])] == [
        f"said {i}" for i in range(1, 101)
    ]
    assert taken <= 100 + 2 * 8


def test_a_row_that_kills_the_engine_is_found_and_the_rest_is_answered(tmp_path: Path) -> None:
    answers, engine = ask(BuildFragile(deadly=("c",)), "abcdefghij", tmp_path)
    assert answers == said("abcdefghij", dead="c")
    assert engine.num_deaths >= 3


def test_a_row_that_was_marked_before_its_engine_died_is_tried_first(tmp_path: Path) -> None:
    answers, engine = ask(BuildFragile(deadly=("f",), marks=True, max_batch_rows=64), "abcdefghijklmnop" * 3, tmp_path)
    assert answers == said("abcdefghijklmnop" * 3, dead="f")
    assert engine.num_deaths == 2 * 3, "each of the three dies among others, then alone, and costs no further engine"


@settings(max_examples=3)
@given(deadly=st.sets(st.sampled_from("abcdefghijkl"), max_size=3), marks=st.booleans())
def test_all_rows_are_answered_once_whichever_are_deadly(
    tmp_path_factory: pytest.TempPathFactory, deadly: set[str], marks: bool
) -> None:
    build = BuildFragile(deadly=tuple(deadly), marks=marks, max_batch_rows=5)
    answers, _ = ask(build, "abcdefghijkl", tmp_path_factory.mktemp("engine"))
    assert answers == said("abcdefghijkl", dead="".join(deadly))


def test_an_engine_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    assert ask(BuildFragile(hanging=("b",)), "ab", tmp_path, deadline_s=1.0)[0] == said("ab", dead="b")


def test_an_engine_without_memory_goes_on_with_fewer_rows_and_marks_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers, engine = ask(BuildFragile(most_rows_in_memory=2, max_batch_rows=8), "abcdefghij", tmp_path)
    assert answers == said("abcdefghij")
    assert engine.num_deaths == 2, "8 rows, 4 rows, then 2 fit"
    assert "out of memory; on with 2 rows" in capsys.readouterr().err


def test_an_engine_that_always_dies_ends_the_run_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_process, "MOST_DEATHS_IN_A_ROW", -1)
    with pytest.raises(UserError, match=r"died 4 times .* ValueError: kaputt.*engine\.log"):
        ask(BuildFragile(raises="kaputt"), "abcdefghijklmnop", tmp_path)


def test_what_the_user_must_mend_ends_the_run_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^The key is wrong\. The engine's log is .*engine\.log\.$"):
        ask(BuildFragile(refuses="The key is wrong."), "abc", tmp_path)


def test_an_engine_that_cannot_start_says_why_and_where_its_log_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"RuntimeError: no such device.*engine\.log"):
        ask(BuildFragile(broken=True), "a", tmp_path)


def test_a_child_that_stops_reading_is_killed_at_its_deadline(tmp_path: Path) -> None:
    """Stopped as a whole, as code that holds the interpreter's lock would be: not even its reading thread runs."""
    build = BuildFragile(stopping=("b" * 3_000_000,), max_batch_rows=4)
    users = ["a", "b" * 3_000_000, *(c * 3_000_000 for c in "cdef")]
    answers, engine = ask(build, users, tmp_path, deadline_s=3.0)  # type: ignore[arg-type]
    assert [answer[:6] for answer in answers] == ["said a", "engine", "said c", "said d", "said e", "said f"]
    assert engine.num_deaths >= 2


def test_large_requests_and_answers_do_not_block_each_other(tmp_path: Path) -> None:
    """Both pipes are full at once: the parent sends megabytes while the child does."""
    answers, _ = ask(BuildFragile(max_batch_rows=4), [c * 500_000 for c in "abcdefghijkl"], tmp_path)  # type: ignore[arg-type]
    assert [answer[:6] for answer in answers] == [f"said {c}" for c in "abcdefghijkl"]
