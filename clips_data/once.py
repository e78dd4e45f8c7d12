"""A memory of answers that many threads share: whoever wants a missing one first asks, the others wait for that."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class Answer(NamedTuple, Generic[Value]):
    """``keep_s`` 0 shares the value with those who already wait for it, and with nobody later."""

    value: Value
    keep_s: float
    weight: int = 1


class OnceCache(Generic[Value]):
    """Keeps answers up to a total weight, the most recently used ones, each for its own number of seconds."""

    def __init__(self, max_weight: int) -> None:
        self._max_weight, self._weight = max_weight, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, tuple[float, Answer[Value]]] = OrderedDict()
        self._asked: dict[Hashable, Future[Value]] = {}

    def get(self, key: Hashable, ask: Callable[[], Answer[Value]], timeout_s: float | None = None) -> Value:
        """The answer for ``key``. ``TimeoutError`` when another thread's question takes longer than ``timeout_s``."""
        with self._lock:
            entry = self._kept.get(key)
            if entry is not None and time.monotonic() < entry[0]:
                self._kept.move_to_end(key)
                return entry[1].value
            question, mine = self._asked.get(key), False
            if question is None:
                question, mine = Future(), True
                self._asked[key] = question
        if mine:
            self._ask(key, ask, question)
        return question.result(timeout_s)

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._weight = 0

    def _ask(self, key: Hashable, ask: Callable[[], Answer[Value]], question: Future[Value]) -> None:
        try:
            answer = ask()
        except BaseException as error:
            with self._lock:
                del self._asked[key]
            question.set_exception(error)
        else:
            with self._lock:
                del self._asked[key]
                self._keep(key, answer)
            question.set_result(answer.value)

    def _keep(self, key: Hashable, answer: Answer[Value]) -> None:
        old = self._kept.pop(key, None)
        if old is not None:
            self._weight -= old[1].weight
        if answer.keep_s > 0:
            self._kept[key] = (time.monotonic() + answer.keep_s, answer)
            self._weight += answer.weight
        while self._weight > self._max_weight:
            _, (_, dropped) = self._kept.popitem(last=False)
            self._weight -= dropped.weight
