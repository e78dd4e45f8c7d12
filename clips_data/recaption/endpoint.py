"""The endpoint engine: any server that speaks OpenAI's chat completions (vLLM, SGLang, hosted models).

Images go as data URLs with the stored bytes as they are. Decoding settings beyond OpenAI's own (``top_k``, ``min_p``,
``repetition_penalty``) are sent where they are not the default, since strict servers refuse unknown keys; to vLLM and
SGLang, which take a model's own ``generation_config.json`` for what is left out, all are sent. Structured outputs are a
``json_schema`` response format; vLLM keeps white space out of them only where it was started with
``--structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'``.

What a server does to one row is that row's code. What it does to all stops the run: before the first row, and whenever
a row is given up while no other is answered, the server must list the model and answer a question of one token.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, Final

from clips_data.errors import UserError, nearest
from clips_data.hosts import back_off_s
from clips_data.recaption.chat_format import (
    Dialect,
    knows_no_model,
    read_answer,
    refusal_code,
    takes_no_images,
    write_request,
)
from clips_data.recaption.chat_server import Line, Lost, Place, Reply, Unreachable
from clips_data.recaption.engines import Answer, Decoding, Engine, Request

ROW_SHARE, CHECK_SHARE = 0.75, 0.2
"""Of the run's deadline: for one row with all its attempts, and for the check that may follow. Together less than 1."""
MOST_ATTEMPTS: Final = 5
"""At a row that makes the server fail. One that it has no time for is tried until its own deadline."""
UNREACHABLE_S: Final = 10.0
"""How long a check waits for a server that cannot be reached."""
WAIT_S: Final = 0.05
BUSY: Final = (429, 502, 503)
TRY_AGAIN: Final = (408, 409, 425, 429)
CHAT: Final = "/chat/completions"
TAKE_ALL: Final = ("vllm", "sglang")
MODELS_SHOWN: Final = 10


@dataclass(frozen=True)
class BuildEndpoint:
    """Builds the engine in the child process that it is sent to.

    ``url`` is the base URL, with ``/v1`` where the server has it. ``key_env`` names the environment variable that holds
    the API key. ``max_batch_rows`` requests are in flight. ``timeout_s`` is the deadline by which ``EngineProcess``
    wants to hear something; rows are given up before it.
    """

    url: str
    model: str
    key_env: str | None = None
    max_batch_rows: int = 64
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        Place.of(self.url)

    def __call__(self) -> Engine:
        return EndpointEngine(self)


@dataclass(frozen=True)
class _Trouble:
    """Why an attempt came to nothing, though another may not."""

    reason: str
    is_busy: bool = False
    asked_s: float | None = None


class EndpointEngine:
    """``max_batch_rows`` threads, each with one connection and one request on its way."""

    def __init__(self, settings: BuildEndpoint) -> None:
        self._settings, self._place, self._key = settings, Place.of(settings.url), _read_key(settings.key_env)
        self._dialect = Dialect()
        self._check_lock = threading.Lock()
        self._answered_at = self._not_before = float("-inf")
        line = Line(self._place, self._key)
        server = self._check(line, settings.timeout_s * ROW_SHARE)
        self.about: dict[str, Any] = {
            "engine_version": f"{server} {self._version(line)}".strip() or "unknown",
            "device": "endpoint",
            "num_gpus": 0,
            "special_tokens": (),  # no server tells; those of the common families are removed in any case
            "capacity": 2 * settings.max_batch_rows,
        }
        self._requests: queue.SimpleQueue[tuple[int, Request]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, Answer] | Exception] = queue.SimpleQueue()
        for _ in range(settings.max_batch_rows):
            threading.Thread(target=self._work, daemon=True).start()

    # --- the engine's own thread --------------------------------------------------------------------------------------

    def add(self, number: int, request: Request) -> None:
        self._requests.put((number, request))

    def step(self) -> list[tuple[int, Answer]]:
        """Raises ``UserError`` when the server serves nobody any more."""
        ready: list[tuple[int, Answer]] = []
        try:
            while True:
                answer = self._answers.get(timeout=0 if ready else WAIT_S)
                if isinstance(answer, Exception):
                    raise answer
                ready.append(answer)
        except queue.Empty:
            return ready

    # --- the asking threads -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        line = Line(self._place, self._key)
        while True:
            number, request = self._requests.get()
            try:
                self._answers.put((number, self._answer(line, request)))
            except Exception as error:  # raised again where the engine's process hears it
                self._answers.put(error)

    def _answer(self, line: Line, request: Request) -> Answer:
        body = write_request(request, self._settings.model, self._dialect)
        if body is None:
            return Answer("unreadable_image")
        deadline = time.monotonic() + self._settings.timeout_s * ROW_SHARE
        for attempt in itertools.count():
            time.sleep(max(0.0, min(self._not_before, deadline) - time.monotonic()))
            began = time.monotonic()
            outcome = self._attempt(line, body, deadline)
            if isinstance(outcome, Answer):
                return outcome
            pause_s = max(outcome.asked_s or 0.0, back_off_s(attempt, str(id(line))))
            is_last = not outcome.is_busy and attempt + 1 >= MOST_ATTEMPTS
            if is_last or time.monotonic() + pause_s >= deadline:
                return self._give_up(line, outcome.reason, began)
            time.sleep(pause_s)
        raise AssertionError("attempts end with a return")

    def _attempt(self, line: Line, body: bytes, deadline: float) -> Answer | _Trouble:
        began = time.monotonic()
        try:
            reply = line.ask("POST", self._place.target(CHAT), body, deadline)
        except Unreachable as error:
            return _Trouble(str(error), is_busy=True)
        except Lost as error:
            return _Trouble(str(error))
        if 200 <= reply.status < 300:
            answer = read_answer(reply.content)
            if answer is None:
                return _Trouble(f"the answer is no chat completion: {reply.said}")
            self._answered_at = time.monotonic()
            return answer
        reason = f"HTTP {reply.status}: {reply.said}"
        if reply.status in BUSY and reply.asked_s is not None:  # said to one thread, meant for all
            self._not_before = max(self._not_before, time.monotonic() + reply.asked_s)
        if reply.status >= 500 or reply.status in TRY_AGAIN:
            return _Trouble(reason, reply.status in BUSY, reply.asked_s)
        if reply.status < 400 or reply.status in (401, 403, 404):  # perhaps not the row's fault
            return self._give_up(line, reason, began)
        return self._refused(reply)

    def _refused(self, reply: Reply) -> Answer:
        if takes_no_images(reply.said):
            raise UserError(
                f"Model {self._settings.model!r} of the endpoint {self._place.shown} takes no images: {reply.said} "
                "Name a model that does, or a prompt without image."
            )
        print(f"row refused by the endpoint: HTTP {reply.status}: {reply.said}", flush=True)
        return Answer(refusal_code(reply.said))

    def _give_up(self, line: Line, reason: str, since: float) -> Answer:
        """The row's answer where the server serves others. Raises ``UserError`` where it serves nobody."""
        with self._check_lock:
            if self._answered_at <= since:
                self._check(line, self._settings.timeout_s * CHECK_SHARE)
        print(f"row given up: {reason}", flush=True)
        return Answer("engine_error")

    # --- is the server there, and is it the right one? ----------------------------------------------------------------

    def _check(self, line: Line, patience_s: float) -> str:
        """Returns the server's kind where it is one we know. Raises ``UserError`` where it does not serve us."""
        deadline = time.monotonic() + patience_s
        server = self._find_model(self._insist(line, "GET", "/models", None, deadline))
        self._dialect = replace(self._dialect, takes_all=server in TAKE_ALL)
        reply = self._probe(line, deadline)
        if reply.status == 400 and "max_completion_tokens" in reply.said:
            self._dialect = replace(self._dialect, tokens_key="max_completion_tokens")
            reply = self._probe(line, deadline)
        self._check_access(reply)
        if reply.status >= 300:  # perhaps because this question has no image; the rows will tell
            print(f"a question of one token was answered with HTTP {reply.status}: {reply.said}", flush=True)
        self._answered_at = time.monotonic()
        return server

    def _probe(self, line: Line, deadline: float) -> Reply:
        question = Request(None, None, "Hello", 0, Decoding(max_tokens=1))
        return self._insist(line, "POST", CHAT, write_request(question, self._settings.model, self._dialect), deadline)

    def _insist(self, line: Line, method: str, end: str, body: bytes | None, deadline: float) -> Reply:
        """The first reply that is no failure of the whole server. Raises ``UserError`` when none comes in time."""
        reachable_by = min(deadline, time.monotonic() + UNREACHABLE_S)
        for attempt in itertools.count():
            try:
                reply = line.ask(method, self._place.target(end), body, deadline)
                if not (reply.status in BUSY or (reply.status >= 500 and method == "POST")):
                    return reply
                failure, asked_s, until = f"HTTP {reply.status}: {reply.said}", reply.asked_s, deadline
            except (Unreachable, Lost) as error:
                failure, asked_s, until = str(error), None, reachable_by
            pause_s = max(asked_s or 0.0, back_off_s(attempt, str(id(line))))
            if time.monotonic() + pause_s >= until:
                asked = f" It asks to come back in {asked_s:.0f} s." if asked_s else ""
                raise UserError(
                    f"The endpoint {self._place.shown} does not serve: {failure}.{asked} Start it, or look at its log; "
                    "then run the same command again."
                )
            time.sleep(pause_s)
        raise AssertionError("attempts end with a return")

    def _find_model(self, reply: Reply) -> str:
        """Looks our model up in the list that a server may or may not give; returns who is said to own it."""
        entries = reply.content.get("data") if reply.status == 200 and isinstance(reply.content, dict) else None
        entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        owners = {str(entry.get("id")): entry.get("owned_by") for entry in entries}
        model = self._settings.model
        # Some list models/NAME and are asked for NAME.
        if owners and not any(name == model or name.endswith(f"/{model}") for name in owners):
            near, known = nearest(model, owners), sorted(owners)
            more = f" and {len(known) - MODELS_SHOWN} more" if len(known) > MODELS_SHOWN else ""
            hint = f"Did you mean {near!r}?" if near else f"It serves: {', '.join(known[:MODELS_SHOWN])}{more}."
            raise UserError(
                f"The endpoint {self._place.shown} does not serve a model {model!r}. {hint} Name it with --model."
            )
        return str(owners.get(model)) if owners.get(model) in TAKE_ALL else ""

    def _check_access(self, reply: Reply) -> None:
        where, status = self._place.shown.rstrip("/"), reply.status
        told = (
            f"The endpoint {where}{CHAT} answers HTTP {status} to model {self._settings.model!r}: "
            f"{reply.said or 'it does not say why'}."
        )
        if status in (401, 403):
            key_env = self._settings.key_env
            raise UserError(
                f"{told} "
                + (f"Look at the API key in the environment variable {key_env}, and at what it may use." if key_env else
                   "If it wants an API key, put it into an environment variable and name that as --endpoint-key-env.")
            )  # fmt: skip
        if status == 404 or 300 <= status < 400 or (status == 400 and knows_no_model(reply.said)):
            hint = "" if self._place.path else f" Most servers have it under {where}/v1."
            raise UserError(f"{told} Check --endpoint and --model.{hint}")

    def _version(self, line: Line) -> str:
        """What ``GET /version`` says, "" where a server has none."""
        try:
            reply = line.ask("GET", "/version", None, time.monotonic() + UNREACHABLE_S)
        except (Unreachable, Lost):
            return ""
        version = reply.content.get("version") if reply.status == 200 and isinstance(reply.content, dict) else None
        return version[:80] if isinstance(version, str) else ""


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"The environment variable {name} should hold the endpoint's API key and is not set. Set it.")
    return key
