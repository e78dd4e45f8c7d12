"""What an engine is: something that takes requests about images and gives answers, each with how it ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Decoding:
    """How the tokens of one answer are chosen. ``temperature`` 0 is greedy, ``top_k`` 0 keeps all tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 128
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """One row: the encoded image (``None`` for text-only prompts), the texts, the row's own seed, and how to decode.

    ``shape`` is the JSON schema that the answer must have; ``None`` lets it be plain text.
    """

    image: bytes | None
    system: str | None
    user: str
    seed: int
    decoding: Decoding = Decoding()
    shape: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """What became of a request. ``code`` is one of ``schema.CAPTION_CODES``; ``text`` is empty unless it is ``ok``.

    ``finish_reason`` is ``stop`` or ``length``.
    """

    code: str
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    num_prompt_tokens: int = 0


class Engine(Protocol):
    """Lives in the child.

    ``about`` holds ``engine_version``, ``device``, ``special_tokens`` (strings that must not stand in a text that comes
    from outside) and ``capacity`` (requests that it wants in flight), and may hold more.
    """

    about: dict[str, Any]

    def add(self, number: int, request: Request) -> None:
        """Takes a request on. What is wrong with one request is its answer's code, never an exception."""

    def step(self) -> list[tuple[int, Answer]]:
        """Works for a while and returns the answers that became ready, perhaps none. Called while requests are open."""


class BatchEngine:
    """Base of engines that answer one batch after the other, of at most ``max_batch_rows``."""

    def __init__(self, max_batch_rows: int) -> None:
        self._max_batch_rows = max_batch_rows
        self._waiting: list[tuple[int, Request]] = []

    def add(self, number: int, request: Request) -> None:
        self._waiting.append((number, request))

    def step(self) -> list[tuple[int, Answer]]:
        batch, self._waiting = self._waiting[: self._max_batch_rows], self._waiting[self._max_batch_rows :]
        answers = self.answer([request for _, request in batch])
        return [(number, answer) for (number, _), answer in zip(batch, answers, strict=True)]

    def answer(self, requests: list[Request]) -> list[Answer]:
        """Answers in the order of the requests."""
        raise NotImplementedError


class Build(Protocol):
    """Builds an engine in the child that it is pickled to. ``max_batch_rows`` is lowered when memory runs out."""

    @property
    def max_batch_rows(self) -> int: ...

    def __call__(self) -> Engine: ...
