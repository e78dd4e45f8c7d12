"""The endpoint engine against a real local server that misbehaves on request."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pickle
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webmaker import tls_context

from clips_data import wire
from clips_data.errors import UserError
from clips_data.recaption import chat_server, endpoint
from clips_data.recaption.chat_format import read_answer
from clips_data.recaption.endpoint import BuildEndpoint, EndpointEngine
from clips_data.recaption.engine_process import EngineProcess
from clips_data.recaption.engines import Answer, Decoding, Request

KEY = "sk-very-secret-0123456789"
PROBE = "Hello"
RESET, HANG_UP = "reset", "hang up"

Told = tuple[int, dict[str, str], bytes | Iterator[bytes]] | str


def completion(text: Any = "said", reason: str = "stop", **message: Any) -> Told:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": reason}
    return ok({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}})


def ok(content: Any) -> Told:
    return 200, {}, json.dumps(content).encode()


def failure(status: int, message: str = "no", **headers: str) -> Told:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, named, json.dumps({"error": {"message": message, "code": status}}).encode()


@dataclass
class Server:
    """``chat`` answers rows, ``probe`` the questions that check the server, ``models`` is its list."""

    chat: Callable[[dict[str, Any]], Told] = lambda body: completion()
    probe: Callable[[], Told] = completion
    models: Told = field(default_factory=lambda: listed("captioner"))
    version: Told = field(default_factory=lambda: failure(404))
    prefix: str = "/v1"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_connections: int = 0
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    def tell(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Told:
        if method == "GET" and path == f"{self.prefix}/models":
            return self.models
        if method == "GET" and path == "/version":
            return self.version
        if method != "POST" or path != f"{self.prefix}/chat/completions":
            return failure(404, "Not Found")
        content = json.loads(body)
        if content["messages"][-1]["content"] == PROBE:
            return self.probe()
        self.headers.append(headers)
        self.bodies.append(content)
        return self.chat(content)


def listed(*names: str, owner: str = "somebody") -> Told:
    return ok({"object": "list", "data": [{"id": name, "object": "model", "owned_by": owner} for name in names]})


@contextlib.contextmanager
def serving(server: Server, tls: Any = None) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            server.num_connections += 1
            super().setup()

        def _tell(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            told = server.tell(self.command, self.path, dict(self.headers), body)
            if isinstance(told, str):
                self.close_connection = True
                if told == RESET:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                return
            status, headers, content = told
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            pieces = [content] if isinstance(content, bytes) else content
            if isinstance(content, bytes):
                self.send_header("Content-Length", str(len(content)))
            else:
                self.close_connection = True
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece)

        do_GET = do_POST = _tell

        def log_message(self, *_: Any) -> None: ...

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None: ...  # of clients that hang up, which is what some tests are about

    with Quiet(("127.0.0.1", 0), Handler) as listener:
        if tls is not None:
            listener.socket = tls.wrap_socket(listener.socket, server_side=True)
        server.port = listener.server_address[1]
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server
        finally:
            listener.shutdown()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as made:
        yield made


class Clock:
    """Real time plus all that was slept; sleeping takes no time."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return time.monotonic() + sum(self.slept)

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(endpoint, "time", clock)
    return clock


def build(server: Server, **settings: Any) -> BuildEndpoint:
    return BuildEndpoint(**{"url": server.url, "model": "captioner", "max_batch_rows": 4, **settings})


def ask(build: BuildEndpoint, *requests: Request) -> list[Answer]:
    return ask_engine(EndpointEngine(build), *requests)


def ask_engine(engine: EndpointEngine, *requests: Request) -> list[Answer]:
    answers: dict[int, Answer] = {}
    for number, request in enumerate(requests):
        engine.add(number, request)
    while len(answers) < len(requests):
        answers |= dict(engine.step())
    return [answers[number] for number in range(len(requests))]


def row(user: str = "Describe.", **settings: Any) -> Request:
    return Request(**{"image": None, "system": None, "user": user, "seed": 5, **settings})


def in_turn(*told: Told) -> Callable[[dict[str, Any]], Told]:
    """The last one again and again."""
    left = list(told)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def picture(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, format)
    return file.getvalue()


# --- what is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
def test_an_image_is_sent_before_the_text_byte_for_byte_under_its_own_type(server: Server, format: str) -> None:
    data = picture(format)
    assert ask(build(server), row("What?", image=data, system="Be brief."))[0].code == "ok"
    system, user = server.bodies[0]["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    image, text = user["content"]
    kind, _, encoded = image["image_url"]["url"].partition(";base64,")
    assert (kind, base64.b64decode(encoded)) == (f"data:image/{format.lower()}", data)
    assert text == {"type": "text", "text": "What?"}


def test_bytes_that_are_no_image_are_not_sent(server: Server) -> None:
    assert ask(build(server), row(image=b"<html>"))[0] == Answer("unreadable_image")
    assert not server.bodies


def test_a_strict_server_is_sent_openais_own_settings_and_only_what_was_chosen_of_others(server: Server) -> None:
    chosen = Decoding(temperature=0.7, top_k=5, max_tokens=9, stop=("\n",), presence_penalty=0.5)
    ask(build(server, max_batch_rows=1), row(), row(decoding=chosen))
    common = {"model": "captioner", "messages": [{"role": "user", "content": "Describe."}], "seed": 5, "stream": False}
    assert server.bodies == [
        {**common, "max_tokens": 128, "temperature": 0.0, "top_p": 1.0},
        {
            **common,
            **{"max_tokens": 9, "temperature": 0.7, "top_p": 1.0, "top_k": 5, "presence_penalty": 0.5, "stop": ["\n"]},
        },
    ]


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_a_server_that_falls_back_on_the_models_own_defaults_is_sent_all_settings(server: Server, owner: str) -> None:
    server.models = listed("other", "captioner", owner=owner)
    ask(build(server), row())
    sent = server.bodies[0]
    assert (sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (-1, 0.0, 1.0)


def test_the_shape_is_a_json_schema_response_format(server: Server) -> None:
    shape = {"type": "object", "properties": {"short": {"type": "string"}}}
    ask(build(server), row(shape=shape))
    sent = server.bodies[0]["response_format"]
    assert (sent["type"], sent["json_schema"]["schema"]) == ("json_schema", shape)


def test_a_server_that_wants_max_completion_tokens_gets_them(server: Server) -> None:
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server.probe = lambda: failure(400, said)
    ask(build(server), row(decoding=Decoding(max_tokens=11)))
    assert server.bodies[0]["max_completion_tokens"] == 11
    assert "max_tokens" not in server.bodies[0]


def test_as_many_requests_are_on_their_way_as_wanted_over_as_many_kept_connections(server: Server) -> None:
    together = threading.Barrier(4)

    def chat(body: dict[str, Any]) -> Told:
        together.wait(30)  # broken, and an error to the client, unless four come at the same time
        return completion(body["messages"][0]["content"])

    server.chat = chat
    answers = ask(build(server), *(row(str(number)) for number in range(40)))
    assert [answer.text for answer in answers] == [str(number) for number in range(40)]
    assert server.num_connections <= 5  # one more for the check at the start


# --- what comes back --------------------------------------------------------------------------------------------------


def test_text_end_and_tokens_are_taken_from_the_completion(server: Server) -> None:
    server.chat = in_turn(completion("one"), completion("two", "length"), completion([{"type": "text", "text": "3"}]))
    answers = ask(build(server, max_batch_rows=1), row(), row(), row())
    assert answers == [
        Answer("ok", "one", "stop", 3, 7),
        Answer("ok", "two", "length", 3, 7),
        Answer("ok", "3", "stop", 3, 7),
    ]


@pytest.mark.parametrize("told", [completion(None, "content_filter"), completion(None, refusal="I cannot.")])
def test_a_filtered_answer_is_a_refusal(server: Server, told: Told) -> None:
    server.chat = in_turn(told)
    assert ask(build(server), row())[0].code == "refused"


@pytest.mark.parametrize(
    ("status", "message", "code"),
    [
        (400, "This model's maximum context length is 512 tokens. However, you requested 600", "prompt_too_long"),
        (400, "The decoder prompt (length 600) is longer than the maximum model length of 512.", "prompt_too_long"),
        (400, "Requested token count exceeds the model's maximum context length of 512 tokens", "prompt_too_long"),
        (400, "prompt is too long: 210000 tokens > 200000 maximum", "prompt_too_long"),
        (400, "Failed to load image: image file is truncated", "unreadable_image"),
        (400, "Image dimensions 20000x20000 exceed the maximum of 178956970 pixels.", "unreadable_image"),
        (400, "Your request was rejected as a result of our safety system.", "refused"),
        (422, "seed: Extra inputs are not permitted", "engine_error"),
        (404, "Not Found", "engine_error"),
        (403, "Country not supported", "engine_error"),
    ],
)  # fmt: skip
def test_a_refused_row_has_a_code_and_the_others_go_on(server: Server, status: int, message: str, code: str) -> None:
    server.chat = lambda body: completion() if "good" in str(body["messages"]) else failure(status, message)
    answers = ask(build(server), row("good"), row("bad"), row("good"))
    assert [answer.code for answer in answers] == ["ok", code, "ok"]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda inner: (
    st.lists(inner, max_size=2)
    | st.dictionaries(st.sampled_from(["choices", "message", "content", "usage", "text", "finish_reason"]), inner)
)))  # fmt: skip
def test_no_json_breaks_the_reader_of_answers(content: Any) -> None:
    answer = read_answer(content)
    assert answer is None or isinstance(answer.text, str)


# --- a server in trouble ----------------------------------------------------------------------------------------------

GARBAGE: list[Told] = [(200, {}, b"<html>busy</html>"), ok({"choices": []}), ok([1]), completion("x", "abort")]


@pytest.mark.parametrize("trouble", [RESET, HANG_UP, failure(500), failure(503), failure(408), *GARBAGE], ids=str)
def test_what_may_pass_is_tried_again_after_a_pause(server: Server, clock: Clock, trouble: Told) -> None:
    server.chat = in_turn(trouble, trouble, completion())
    assert ask(build(server), row()) == [Answer("ok", "said", "stop", 3, 7)]
    assert len(server.bodies) == 3
    pauses = [pause for pause in clock.slept if pause]
    assert len(pauses) == 2 and all(0.2 < pause < 2 for pause in pauses)


def test_retry_after_is_waited_for(server: Server, clock: Clock) -> None:
    server.chat = in_turn(failure(429, Retry_After="33"), completion())
    assert ask(build(server), row())[0].code == "ok"
    assert max(clock.slept) >= 33


def test_a_busy_server_is_asked_again_until_the_rows_deadline(server: Server, clock: Clock) -> None:
    server.chat = in_turn(*[failure(429)] * (endpoint.MOST_ATTEMPTS + 3), completion())
    assert ask(build(server), row())[0].code == "ok"


@pytest.mark.parametrize("trouble", [RESET, failure(500), ok({})], ids=str)
def test_a_row_that_breaks_the_server_every_time_is_given_up_alone(server: Server, clock: Clock, trouble: Told) -> None:
    server.chat = lambda body: trouble if "bad" in str(body["messages"]) else completion()
    answers = ask(build(server), row("good"), row("bad"), row("good"))
    assert [answer.code for answer in answers] == ["ok", "engine_error", "ok"]


def test_a_body_without_end_is_given_up_at_the_cap(
    server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_server, "MAX_BODY_BYTES", 1 << 20)
    server.chat = lambda body: (200, {}, iter([b" " * 4096] * 1_000))
    assert ask(build(server), row())[0].code == "engine_error"


def test_a_body_that_drips_ends_at_the_deadline(server: Server) -> None:
    over = threading.Event()

    def drip() -> Iterator[bytes]:
        while not over.wait(0.05):
            yield b" "

    server.chat = lambda body: (200, {}, drip())
    assert ask(build(server, timeout_s=0.8), row())[0].code == "engine_error"
    over.set()


def test_a_kept_connection_that_has_grown_too_old_costs_no_attempt(server: Server, clock: Clock) -> None:
    engine = EndpointEngine(build(server, max_batch_rows=1))
    assert ask_engine(engine, row())[0].code == "ok"
    server.chat = in_turn(HANG_UP, completion())
    assert ask_engine(engine, row())[0].code == "ok"
    assert not any(clock.slept)


@pytest.mark.parametrize("trouble", [failure(500, "engine is dead"), failure(429, "no quota left", Retry_After="9999")])
def test_a_server_that_serves_nobody_any_more_stops_the_run(server: Server, clock: Clock, trouble: Told) -> None:
    engine = EndpointEngine(build(server))
    server.chat = in_turn(trouble)
    server.probe = lambda: trouble
    with pytest.raises(UserError, match=r"does not serve: HTTP (500: engine is dead|429: no quota left)"):
        ask_engine(engine, *[row()] * 8)


def test_a_key_that_is_revoked_during_a_run_stops_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPTION_KEY", KEY)
    engine = EndpointEngine(build(server, key_env="CAPTION_KEY"))
    server.chat = in_turn(failure(401))
    server.probe = lambda: failure(401)
    with pytest.raises(UserError, match="CAPTION_KEY"):
        ask_engine(engine, row())


def test_a_model_without_images_stops_the_run(server: Server) -> None:
    server.chat = in_turn(failure(400, "captioner is not a multimodal model"))
    with pytest.raises(UserError, match="takes no images"):
        ask(build(server), row(image=picture("PNG")))


def test_a_server_that_dies_for_good_ends_in_an_error_that_names_it(tmp_path: Path) -> None:
    with serving(Server()) as server:
        engine = EngineProcess(build(server, timeout_s=1.0), log=tmp_path / "engine.log", deadline_s=60)
        try:
            engine.start()
            assert engine.answer([row()])[0].code == "ok"
            server.chat = server.probe = lambda *_: RESET
            server.models = RESET
            with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:{server.port}/v1 does not serve"):
                engine.answer([row(), row()])
        finally:
            engine.close()


# --- the start --------------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_served_is_told_with_the_nearest(server: Server) -> None:
    server.models = listed("captioner-large", "embedder")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+/v1 does not serve a model 'captoner'.*Did you mean 'capt"):
        EndpointEngine(build(server, model="captoner"))


def test_a_list_with_a_prefix_or_without_entries_is_no_obstacle(server: Server) -> None:
    for told in (listed("models/captioner"), listed(), failure(403), failure(501), ok("?")):
        server.models = told
        assert ask(build(server), row())[0].code == "ok"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (failure(401, "Incorrect API key"), "HTTP 401 to model 'captioner': Incorrect API key.*--endpoint-key-env"),
        (failure(404, "The model does not exist"), "The model does not exist.*Check --endpoint and --model"),
        (failure(400, "model captioner is unknown"), "Check --endpoint and --model"),
        ((302, {"Location": "https://elsewhere/"}, b""), "HTTP 302"),
        (failure(400, "cannot answer without image"), None),
    ],
)
def test_a_wrong_key_model_or_address_is_told_before_the_first_row(
    server: Server, told: Told, message: str | None
) -> None:
    server.models, server.probe = failure(404), lambda: told
    if message is None:
        assert ask(build(server), row())[0].code == "ok"
        return
    with pytest.raises(UserError, match=message):
        EndpointEngine(build(server))


def test_an_address_without_its_path_is_told_the_usual_one(server: Server) -> None:
    bare = server.url.removesuffix("/v1")
    with pytest.raises(UserError, match=f"under {bare}/v1"):
        EndpointEngine(build(server, url=bare))


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UserError, match=rf"http://127\.0\.0\.1:{port}/v1 does not serve: Connection refused"):
        EndpointEngine(BuildEndpoint(f"http://127.0.0.1:{port}/v1", "captioner"))


def test_a_server_that_is_still_starting_is_waited_for(server: Server, clock: Clock) -> None:
    told = in_turn(failure(503, "loading"), failure(503, "loading"), completion())
    server.probe = lambda: told({})
    assert ask(build(server), row())[0].code == "ok"


def test_the_engines_version_is_the_servers_where_it_tells(server: Server) -> None:
    assert EndpointEngine(build(server)).about["engine_version"] == "unknown"
    server.models, server.version = listed("captioner", owner="vllm"), ok({"version": "0.32.0"})
    assert EndpointEngine(build(server)).about["engine_version"] == "vllm 0.32.0"


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "host:8000/v1", "http://", "http://a b/", "http://h:x/", "file:///v1"]
)
def test_what_is_no_address_is_refused_at_once(url: str) -> None:
    with pytest.raises(UserError, match="not an http or https URL"):
        BuildEndpoint(url, "captioner")


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_goes_into_the_header_and_nowhere_else(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPTION_KEY", KEY)
    made = build(server, key_env="CAPTION_KEY")
    server.chat = in_turn(failure(400, f"bad request by {KEY}"))
    engine = EndpointEngine(made)
    assert ask_engine(engine, row())[0].code == "engine_error"
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    server.probe = lambda: failure(401, f"Incorrect API key {KEY}")
    with pytest.raises(UserError, match="Incorrect API key REDACTED") as told:
        EndpointEngine(made)
    shown = [
        repr(made),
        repr(engine),
        str(engine.about),
        str(told.value),
        json.dumps(server.bodies),
        *capfd.readouterr(),
    ]
    assert not any(KEY in text for text in shown)
    assert KEY.encode() not in pickle.dumps(made)


@pytest.mark.parametrize("value", ["", "  ", "se\ncret", "se cret"])
def test_a_key_that_is_none_is_told_without_being_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("CAPTION_KEY", value)
    with pytest.raises(UserError, match="API key" if value.strip() else "CAPTION_KEY") as told:
        EndpointEngine(build(server, key_env="CAPTION_KEY"))
    assert "cret" not in str(told.value).replace("secret", "")


def test_no_key_is_sent_where_none_is_named(server: Server) -> None:
    ask(build(server), row())
    assert "Authorization" not in server.headers[0]


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(UserError, match="environment variable") as told:
        BuildEndpoint("https://me:hunter2@host/v1", "captioner")
    assert "hunter2" not in str(told.value)


# --- TLS --------------------------------------------------------------------------------------------------------------


def test_https_is_spoken_and_a_certificate_that_nobody_vouches_for_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    context, certificate = tls_context(tmp_path)
    with serving(Server(), context) as server:
        made = build(server, url=server.url.replace("http:", "https:"))
        try:
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            wire.tls_context.cache_clear()
            assert ask(made, row())[0].code == "ok"
            monkeypatch.delenv("SSL_CERT_FILE")
            wire.tls_context.cache_clear()
            with pytest.raises(UserError, match="TLS: self-signed certificate"):
                EndpointEngine(made)
        finally:
            wire.tls_context.cache_clear()
