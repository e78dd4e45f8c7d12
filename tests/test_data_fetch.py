"""The guarded GET, against real servers on the loopback interface."""

from __future__ import annotations

import contextlib
import email.utils
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import webmaker
from webmaker import RESET, Answer, Dns, Web, reply, tls_context

from clips_data import addresses, answers, draws, fetch, schema, wire
from clips_data.errors import UsageError
from clips_data.fetch import Fetched, FetchPolicy

BODY = b"0123456789" * 1000
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n"


def answer(path: str, head: str) -> Answer:
    path, _, query = path.partition("?")
    answers: dict[str, Answer] = {
        "/ok": reply(200, BODY),
        "/203": reply(203, BODY),
        "/old": [b"HTTP/1.0 200 OK\r\n\r\n", BODY],
        "/short": [b"HTTP/1.1 200\r\nContent-Length: 3\r\n\r\nabc"],
        "/bare": [b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc"],
        "/chunked": CHUNKED + b"3;x=y\r\nabc\r\n002\r\nde\r\n0\r\nX: y\r\n\r\n",
        "/chunked-drip": [
            CHUNKED,
            b"3",
            b"\r",
            b"\nab",
            b"c\r\n0\r\n\r\n",
        ],
        "/interim": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + reply(200, BODY),
        "/folded": b"HTTP/1.1 200 OK\r\nX-Long: a\r\n b: c\r\ncontent-LENGTH :  2 \r\n\r\nab",
        "/missing": reply(404),
        "/denied": reply(999),
        "/broken": reply(500),
        "/nothing": reply(204),
        "/part": reply(206, BODY),
        "/not-modified": reply(304),
        "/redirect": reply(302, Location="/ok"),
        "/loop": reply(302, Location="/loop"),
        "/to-utf8": reply(302, Location="/bücher?q=ü"),
        "/to-nowhere": reply(302),
        "/to-nonsense": reply(302, Location="http://[half"),
        "/to-private": reply(302, Location="http://192.168.0.1/x"),
        "/to-file": reply(302, Location="file:///etc/hostname"),
        "/noai": reply(200, BODY, X_Robots_Tag="noimageai"),
        "/noai-other": reply(200, BODY, X_Robots_Tag="otherbot: noai"),
        "/tdm": reply(200, BODY, tdm_reservation="1"),
        "/early": [b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n", BODY],
        "/early-chunk": [CHUNKED + b"ff\r\nabc"],
        "/early-head": [b"HTTP/1.1 200 OK\r\nContent-Le"],
        "/reset": [RESET],
        "/reset-later": [b"HTTP/1.1 200 OK\r\nContent-Length: 20000\r\n\r\n", BODY, 0.05, RESET],
        "/silent": [],
        "/ssh": [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"],
        "/two-lengths": [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"],
        "/odd-length": [b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabcd"],
        "/vast-length": [b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nabcd"],
        "/odd-chunk": [CHUNKED + b"xyz\r\nabc\r\n0\r\n\r\n"],
        "/wrong-chunk": [CHUNKED + b"1\r\nabc\r\n0\r\n\r\n"],
        "/odd-coding": [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"],
        "/many-heads": [b"HTTP/1.1 100 Continue\r\n\r\n" * 100],
        "/long-head": [b"HTTP/1.1 200 OK\r\n" + b"X: yyyyyyyyy\r\n" * 10_000 + b"\r\n"],
        "/long-line": [b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000],
        "/says-large": [b"HTTP/1.1 200 OK\r\nContent-Length: 50001\r\n\r\n", 30.0],
        "/is-large": [b"HTTP/1.1 200 OK\r\n\r\n", *([BODY] * 10), 30.0],
        "/endless-chunks": [CHUNKED, b"1\r\nx\r\n" * 60_000, 30.0],
        "/drip-body": [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *([b"x", 0.05] * 100)],
        "/drip-head": [b"x", 0.05] * 100,
        "/hang": [30.0],
        "/evil": reply(429, Retry_After="0", X="\x1b[31m"),
    }
    if path == "/busy":
        return reply(200, BODY) if query in answered else answered.append(query) or reply(429, Retry_After="0")
    return answers.get(path, reply(200, path.encode()))


answered: list[str] = []


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Web(answer).serve() as server:
        yield server


def policy(**changes: Any) -> FetchPolicy:
    values: dict[str, Any] = {"timeout_s": 5.0, "retries": 1, "max_wait_s": 0.05, "max_image_bytes": 50_000}
    return FetchPolicy(**{**values, "allow_network": ("127.0.0.0/8",), **changes})


def get(web: Web, path: str, **changes: Any) -> Fetched:
    return fetch.fetch(f"http://127.0.0.1:{web.port}{path}", policy(**changes))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/ok", BODY), ("/203", BODY), ("/old", BODY), ("/bare", b"abc"), ("/short", b"abc"), ("/chunked", b"abcde"),
        ("/chunked-drip", b"abc"), ("/interim", BODY), ("/folded", b"ab"), ("", b"/"), ("?a=b", b"/"),
        ("/b\u00fc cher%20", b"/b%C3%BC%20cher%20"), ("/a\u0001b", b"/a%01b"), ("/a#fragment", b"/a"),
    ],
)  # fmt: skip
def test_a_body_arrives_whole(web: Web, path: str, body: bytes) -> None:
    fetched = get(web, path)
    assert (fetched.code, fetched.body, fetched.attempts, fetched.detail) == ("ok", body, 1, "")


def test_the_request_is_honest_and_holds_nothing_but_what_it_needs() -> None:
    seen: list[str] = []
    with Web(lambda path, head: seen.append(head) or reply(200)).serve() as other:
        fetch.fetch(f"http://user:secret@127.0.0.1:{other.port}/head?q=1", policy())
    request, *headers = seen[0].split("\r\n")
    assert request == "GET /head?q=1 HTTP/1.1"
    about = dict(header.split(": ") for header in headers)
    assert about.pop("User-Agent").startswith("clips/")
    assert about == {
        "Host": f"127.0.0.1:{other.port}", "Accept": "image/*, */*;q=0.5", "Accept-Encoding": "identity",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "code", "attempts"),
    [
        ("/missing", "http_4xx", 1), ("/denied", "http_4xx", 1), ("/evil", "http_4xx", 2), ("/broken", "http_5xx", 2),
        ("/nothing", "not_an_image", 1), ("/part", "not_an_image", 1), ("/not-modified", "http_3xx", 1),
        ("/loop", "http_3xx", 1), ("/to-nowhere", "http_3xx", 1), ("/to-nonsense", "http_3xx", 1),
        ("/to-private", "blocked_address", 1), ("/to-file", "blocked_address", 1),
        ("/noai", "opt_out", 1), ("/tdm", "opt_out", 1),
        ("/early", "connect", 2), ("/early-chunk", "connect", 2), ("/early-head", "connect", 2),
        ("/reset", "connect", 2), ("/reset-later", "connect", 2), ("/silent", "connect", 2),
        ("/ssh", "connect", 1), ("/two-lengths", "connect", 1), ("/odd-length", "connect", 1),
        ("/vast-length", "connect", 1), ("/odd-chunk", "connect", 1), ("/wrong-chunk", "connect", 1),
        ("/odd-coding", "connect", 1), ("/many-heads", "connect", 1),
        ("/long-head", "too_large", 1), ("/long-line", "too_large", 1), ("/says-large", "too_large", 1),
        ("/is-large", "too_large", 1), ("/endless-chunks", "too_large", 1),
    ],
)  # fmt: skip
def test_what_servers_do_gets_its_code_and_only_helpful_retries(web: Web, path: str, code: str, attempts: int) -> None:
    before = web.hits[path]
    fetched = get(web, path)
    assert (fetched.code, fetched.attempts, fetched.body) == (code, attempts, b"")
    assert fetched.detail
    assert fetched.detail.isprintable()
    if path != "/loop":
        assert web.hits[path] - before == attempts
    else:
        assert web.hits[path] - before == 6


@pytest.mark.parametrize("path", ["/drip-body", "/drip-head", "/hang"])
def test_a_drip_ends_at_the_total_deadline(web: Web, path: str) -> None:
    fetched = get(web, path, timeout_s=0.3)
    assert (fetched.code, fetched.attempts) == ("timeout", 2)


def test_redirects_share_one_deadline() -> None:
    with Web(lambda path, head: [0.2, reply(302, Location=path + "x")]).serve() as web:
        assert get(web, "/", timeout_s=0.5, retries=0).code == "timeout"
        assert 2 <= sum(web.hits.values()) <= 3


def test_the_byte_cap_ends_a_body(web: Web) -> None:
    assert get(web, "/ok", max_image_bytes=9_999).code == "too_large"
    assert get(web, "/ok", max_image_bytes=10_000).code == "ok"


def test_redirects_are_followed_and_recorded(web: Web) -> None:
    assert get(web, "/redirect").final_url == f"http://127.0.0.1:{web.port}/ok"
    assert get(web, "/to-utf8").body == "/bücher".encode().replace(b"\xc3\xbc", b"%C3%BC")
    assert get(web, "/to-private").final_url == "http://192.168.0.1/x"


def test_five_redirects_are_followed_and_six_are_not() -> None:
    def count_down(path: str, head: str) -> bytes:
        left = int(path[1:])
        return reply(302, Location=f"/{left - 1}") if left else reply(200, BODY)

    with Web(count_down).serve() as web:
        assert [get(web, path).code for path in ("/5", "/6")] == ["ok", "http_3xx"]


# --- waiting and politeness -------------------------------------------------------------------------------------------


def test_429_is_tried_again_after_what_the_server_asks(web: Web) -> None:
    fetched = get(web, "/busy?1")
    assert (fetched.code, fetched.attempts) == ("ok", 2)


def test_retry_after_is_a_number_or_a_date() -> None:
    assert answers.retry_after_s("120") == 120
    in_a_minute = answers.retry_after_s(email.utils.formatdate(time.time() + 60, usegmt=True))
    assert in_a_minute is not None
    assert 55 < in_a_minute <= 60
    assert answers.retry_after_s(email.utils.formatdate(0, usegmt=True)) == 0
    for nonsense in ("", "soon", "-5", "1.5", "²", "Wed, 99 Foo 2026 99:99:99 GMT", "9" * 400 + "x"):
        assert answers.retry_after_s(nonsense) is None
    assert answers.retry_after_s("9" * 400) == float("inf")


def test_a_busy_host_is_left_alone_by_all_threads_and_the_wait_is_not_part_of_the_deadline() -> None:
    """The host wants 0.6 s of peace, and each request has 0.4 s for itself."""
    times: list[tuple[float, str]] = []

    def answer_once_peaceful(path: str, head: str) -> bytes:
        times.append((time.monotonic(), path))
        return reply(503, Retry_After="7") if path == "/first" and len(times) == 1 else reply(200, BODY)

    changes = {"timeout_s": 0.4, "max_wait_s": 0.6}
    with Web(answer_once_peaceful).serve() as web:
        first = threading.Thread(target=lambda: get(web, "/first", **changes))
        first.start()
        while not times:
            time.sleep(0.005)
        time.sleep(0.1)
        with ThreadPoolExecutor(8) as pool:
            codes = list(pool.map(lambda number: get(web, f"/{number}", **changes).code, range(8)))
        first.join()
    assert codes == ["ok"] * 8
    assert len(times) == 10
    assert min(moment for moment, _ in times[1:]) >= times[0][0] + 0.59


def test_a_host_has_at_most_its_connections_at_a_time() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def slow(path: str, head: str) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return reply(200, BODY)

    with Web(slow).serve() as web, ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda number: get(web, f"/{number}", host_connections=3).code, range(32)))
        assert codes == ["ok"] * 32
        assert most == 3
        assert web.connections <= 4


def test_a_host_gets_no_more_requests_per_second_than_it_may() -> None:
    times: list[float] = []
    web = Web(lambda path, head: times.append(time.monotonic()) or reply(200))
    with web.serve(), ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: get(web, f"/{number}", host_rate=20.0), range(8)))
    assert times[-1] - times[0] >= 7 / 20 - 0.05


def test_connections_are_used_again_and_one_that_went_stale_is_no_attempt() -> None:
    with Web(lambda path, head: reply(404 if path == "/3" else 200, BODY)).serve() as web:
        fetched = [get(web, f"/{number}") for number in range(10)]
        assert (web.connections, sum(web.hits.values())) == (1, 10)
        assert {each.attempts for each in fetched} == {1}
    turns = iter([True, False, True, False])

    def hang_up_on_the_second(path: str, head: str) -> Answer:
        return reply(200, BODY) if next(turns) else []

    with Web(hang_up_on_the_second).serve() as web:
        assert get(web, "/a").code == "ok"
        again = get(web, "/b", retries=0)
        assert (again.code, again.attempts) == ("ok", 1)
        assert (web.connections, web.hits["/b"]) == (2, 2)


def test_an_answer_pushed_ahead_of_its_question_is_never_taken_for_it() -> None:
    def push(path: str, head: str) -> Answer:
        return reply(200, b"right") + (reply(200, b"wrong") if path == "/first" else b"")

    with Web(push).serve() as web:
        assert [get(web, path).body for path in ("/first", "/second")] == [b"right", b"right"]
        assert web.connections == 2


def test_an_answer_with_two_framings_ends_its_connection() -> None:
    both = b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    with Web(lambda path, head: both).serve() as web:
        assert [get(web, "/").body for _ in range(2)] == [b"abc", b"abc"]
        assert web.connections == 2


# --- opting out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "is_opt_out"),
    [
        (["noai"], True), (["noimageai"], True), (["noindex"], True), (["noimageindex"], True), (["none"], True),
        (["NoAI"], True), (["nofollow, noai"], True), (["nofollow", "noai"], True), (["all"], False), ([""], False),
        (["clips: noai"], True), (["CLIPS:noai"], True), (["*: noai"], True), (["otherbot: noai"], False),
        (["otherbot: noindex, clips: noai"], True), (["clips: nofollow, otherbot: noai"], False),
        (["otherbot: noai, noindex"], False), (["noai, otherbot: all"], True), (["otherbot: noai", "noai"], True),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], False),
        (["unavailable_after: Fri, 25 Jun 2010 15:00:00, noai"], True),
        (["otherbot: unavailable_after: Fri, 25 Jun 2010 15:00:00 PST, noai"], False),
        (["max-image-preview: none"], False), (["max-snippet: 20, noai"], True), (["noai noimageai"], True),
        (["noaichat"], False), (["googlebot-news: noindex"], False),
    ],
)  # fmt: skip
def test_x_robots_tag_speaks_to_all_or_to_those_it_names(values: list[str], is_opt_out: bool) -> None:
    assert bool(answers.opt_out({"x-robots-tag": values}, "clips")) == is_opt_out


@pytest.mark.parametrize(("value", "is_opt_out"), [("1", True), (" 1 ", True), ("0", False), ("", False)])
def test_tdm_reservation(value: str, is_opt_out: bool) -> None:
    assert bool(answers.opt_out({"tdm-reservation": [value]}, "clips")) == is_opt_out


def test_an_opt_out_is_recorded_asked_once_and_can_be_switched_off(web: Web) -> None:
    assert get(web, "/noai").evidence == "X-Robots-Tag: noimageai"
    assert get(web, "/tdm").evidence == "tdm-reservation: 1"
    assert get(web, "/noai-other").code == "ok"
    assert get(web, "/noai", user_agent="otherbot").code == "opt_out"
    assert get(web, "/noai-other", user_agent="otherbot").code == "opt_out"
    assert get(web, "/noai", honour_opt_out=False).code == "ok"


# --- URLs and hosts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://example.org/a", "data:image/png;base64,AA", "gopher://x"]
)
def test_other_schemes_are_refused(url: str) -> None:
    assert fetch.fetch(url, policy()).code == "blocked_address"


@pytest.mark.parametrize(
    "url",
    [
        "", "not a url", "//example.org/a", "http://[half", "http:///path", "http://", "http://a:b/", "http://a:99999/",
        "http://a:0/", "http://a:-1/", "http://exa mple.org/", "http://127.0.0.1\\@example.org/", "http://a%2eb/",
        "http://\ud800.org/", "http://[v1.x]/", "http://a..b/", "http://user:pa/ss@127.0.0.1/",
    ],
)  # fmt: skip
def test_what_is_no_url_is_a_row_that_does_not_quote_it(url: str) -> None:
    fetched = fetch.fetch(url, policy())
    assert (fetched.code, fetched.attempts) == ("bad_url", 1)
    assert "ss@" not in fetched.detail


def test_spaces_around_a_url_are_no_part_of_it(web: Web) -> None:
    assert fetch.fetch(f" \thttp://127.0.0.1:{web.port}/ok\r\n ", policy()).code == "ok"


def test_no_text_of_the_outcome_holds_secrets_or_control_characters() -> None:
    location = "/end?X-Amz-Signature=verysecret&a=1\x1b[31m\u202e" + "&b=" * 2000
    with Web(lambda path, head: reply(302, Location=location) if path == "/" else reply(404)).serve() as web:
        for fetched in (get(web, "/?token=verysecret"), get(web, "/")):
            about = repr((fetched.detail, fetched.final_url, fetched.evidence))
            assert "verysecret" not in about
            assert fetched.final_url.isprintable()
            assert len(fetched.final_url) <= fetch.MAX_URL
    tag = "noai " + "\x1b[2J" + "x" * 5000
    with Web(lambda path, head: reply(200, X_Robots_Tag=tag)).serve() as web:
        evidence = get(web, "/").evidence
        assert evidence.startswith("X-Robots-Tag: noai [2Jxxx")
        assert (len(evidence), evidence.isprintable()) == (200, True)


def test_a_refused_connection_gets_its_code() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    fetched = fetch.fetch(f"http://127.0.0.1:{port}/", policy(retries=0))
    assert (fetched.code, fetched.detail) == ("connect", "Connection refused")


def test_a_connection_that_nobody_accepts_ends_at_the_deadline() -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.socket())
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(8):  # what the kernel takes on behalf of a server that sleeps
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/"
        assert fetch.fetch(url, policy(timeout_s=0.3, retries=0)).code == "timeout"


def test_the_next_address_of_a_host_is_tried_when_the_first_does_not_answer(web: Web) -> None:
    zone = {"A": ["127.0.0.9", "127.0.0.1"], "AAAA": []}
    with Dns(lambda name, kind: zone[kind]).serve() as dns:
        fetched = fetch.fetch(f"http://two.test:{web.port}/ok", policy(dns_servers=(dns.place,), retries=0))
    assert (fetched.code, fetched.attempts) == ("ok", 1)


def test_only_failures_of_dns_that_may_pass_are_tried_again() -> None:
    zone = {"missing.test": "NXDOMAIN", "broken.test": "SERVFAIL"}
    with Dns(lambda name, kind: zone[name]).serve() as dns:
        outcomes = [fetch.fetch(f"http://{name}/", policy(dns_servers=(dns.place,))) for name in zone]
    assert [(each.code, each.attempts) for each in outcomes] == [("dns", 1), ("dns", 2)]


def test_a_policy_travels_to_workers_and_says_at_once_what_is_wrong_with_it() -> None:
    whole = policy(dns_servers=("127.0.0.1:5353",), robots_folder=Path("x"), fixed_hosts={"a": ("127.0.0.1", 1)})
    assert pickle.loads(pickle.dumps(whole)) == whole
    with pytest.raises(UsageError):
        policy(allow_network=("nonsense",))
    with pytest.raises(UsageError):
        policy(dns_servers=("nonsense",))


# --- TLS and proxies --------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    web = Web(answer)
    web.tls, certificate = tls_context(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    wire.tls_context.cache_clear()
    with web.serve():
        yield web
    wire.tls_context.cache_clear()


def test_tls_is_spoken_to_the_checked_address_with_the_hosts_own_name(secure: Web) -> None:
    names: list[str] = []
    assert secure.tls is not None
    secure.tls.sni_callback = lambda wire, name, context: names.append(name)
    with Dns(lambda name, kind: ["127.0.0.1"] if kind == "A" else []).serve() as dns:
        for name, code in (("a.tls.test", "ok"), ("b.tls.test", "ok"), ("wrong.test", "tls")):
            fetched = fetch.fetch(f"https://{name}:{secure.port}/ok", policy(dns_servers=(dns.place,)))
            assert (fetched.code, fetched.attempts) == (code, 1)
    assert names == ["a.tls.test", "b.tls.test", "wrong.test"]
    assert "ostname mismatch" in fetched.detail
    connections = secure.connections
    for _ in range(5):
        assert fetch.fetch(f"https://127.0.0.1:{secure.port}/ok", policy()).code == "ok"
    assert secure.connections == connections + 1


def test_a_certificate_that_nobody_vouches_for_is_refused_and_nothing_is_sent(
    secure: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    wire.tls_context.cache_clear()
    fetched = fetch.fetch(f"https://127.0.0.1:{secure.port}/ok", policy())
    assert (fetched.code, fetched.attempts, fetched.detail) == ("tls", 1, "TLS: self-signed certificate")
    assert not secure.hits


def test_a_server_that_speaks_no_tls_is_a_tls_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as raw:
        threading.Thread(target=lambda: raw.accept()[0].sendall(b"220 smtp ready\r\n" * 10), daemon=True).start()
        fetched = fetch.fetch(f"https://127.0.0.1:{raw.getsockname()[1]}/", policy())
        assert (fetched.code, fetched.attempts) == ("tls", 1)


def test_a_handshake_that_drips_ends_at_the_deadline() -> None:
    """Each byte comes well within a timeout per read."""
    record = b"\x16\x03\x03\x40\x00" + b"\x02" * 200

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            for byte in record:
                try:
                    connection.sendall(bytes([byte]))
                except OSError:
                    return
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        assert fetch.fetch(url, policy(timeout_s=0.5, retries=0)).code == "timeout"


def test_proxies_of_the_environment_are_used_only_when_asked_for(
    web: Web, secure: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads: list[str] = []

    def serve_as_proxy(path: str, head: str) -> Answer:
        heads.append(head)
        return reply(200, b"from the proxy")

    with Web(serve_as_proxy).serve() as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:pass@127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "direct.test")
        assert get(web, "/ok").body == BODY
        fixed = {"direct.test": ("127.0.0.1", web.port)}
        assert fetch.fetch("http://direct.test/ok", policy(env_proxy=True, fixed_hosts=fixed)).body == BODY
        assert not heads
        assert fetch.fetch("http://far.test/a?b", policy(env_proxy=True)).body == b"from the proxy"
        assert heads[0].startswith("GET http://far.test/a?b HTTP/1.1\r\nHost: far.test\r\n")
        assert "Proxy-Authorization: Basic bWU6cGFzcw==" in heads[0]
        assert fetch.fetch("http://10.0.0.1/", policy(env_proxy=True)).code == "blocked_address"
        assert len(heads) == 1
        monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
        assert fetch.fetch("http://far.test/", policy(env_proxy=True)).code == "connect"


def test_https_goes_through_a_proxys_tunnel_to_the_host_whose_certificate_is_checked(
    secure: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    with webmaker.tunnel(secure.port) as (proxy_port, requests):
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy_port}")
        found = [fetch.fetch("https://a.tls.test/ok", policy(env_proxy=True)).code for _ in range(2)]
        assert found == ["ok", "ok"]
        assert requests == ["CONNECT a.tls.test:443 HTTP/1.1"]
        assert fetch.fetch("https://wrong.test/ok", policy(env_proxy=True)).code == "tls"
    with Web(lambda path, head: reply(403)).serve() as strict:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{strict.port}")
        fetched = fetch.fetch("https://a.tls.test:1/ok", policy(env_proxy=True))
        assert (fetched.code, fetched.detail) == ("connect", "the proxy answers HTTP 403")


def test_all_threads_of_a_process_share_what_they_learn(web: Web) -> None:
    """Many threads, many hosts, answers of all kinds: each gets its own."""
    zone = {"A": ["127.0.0.1"], "AAAA": []}
    addresses.forget()
    with Dns(lambda name, kind: zone[kind]).serve() as dns, ThreadPoolExecutor(32) as pool:
        everything = policy(dns_servers=(dns.place,), host_connections=4)

        def ask(number: int) -> bool:
            fetched = fetch.fetch(f"http://host{number % 7}.test:{web.port}/echo{number}", everything)
            return fetched.body == f"/echo{number}".encode()

        assert all(pool.map(ask, range(1500)))
        assert sum(dns.asked.values()) == 14


# --- whatever comes ---------------------------------------------------------------------------------------------------

LINES = [
    b"Content-Length: 5", b"Content-Length: -1", b"Transfer-Encoding: chunked", b"Transfer-Encoding: x", b"Location: /",
    b"Location: http://[", b"Location: \xff\xfe:", b"Connection: keep-alive", b": : :", b" folded", b"", b"\x00\xff",
    b"X-Robots-Tag: \xff:\xfe,:,", b"X-Robots-Tag: noai", b"Retry-After: 9e9", b"5", b"0", b"hello", b"f" * 20,
]  # fmt: skip
STATUSES = [b"HTTP/1.1 200 OK", b"HTTP/1.0 200", b"HTTP/1.1 302", b"HTTP/1.1 404 x", b"HTTP/1.1 503"]


def test_no_answer_makes_it_raise() -> None:
    """Answers put together from lines of HTTP, in 500 drawn orders."""

    def drawn(path: str, head: str) -> Answer:
        lines = [LINES[draws.integer(len(LINES), 0, "line", number, path)] for number in range(12)]
        return [b"\r\n".join([STATUSES[draws.integer(len(STATUSES), 0, "status", 0, path)], *lines])]

    with Web(drawn).serve() as web, ThreadPoolExecutor(8) as pool:
        asked = {"retries": 0, "timeout_s": 1, "max_wait_s": 0.001}
        fetched = list(pool.map(lambda number: get(web, f"/{number}", **asked), range(500)))
    codes = {each.code for each in fetched}
    assert {"ok", "connect", "opt_out", "http_3xx", "http_4xx", "http_5xx"} <= codes <= set(schema.DOWNLOAD_CODES)


URL_PIECES = [
    "http", "https", ":", "/", "//", "@", "[", "]", "%", "%00", "127.0.0.1", "::1", ".", "\\", "?", "#", "\x00",
    "\ud800", "\u2100", "é", " ", "a", "0x", "-1", "65536", "x" * 300, "\r\n", "xn--", "xn--a", "\u3002",
]  # fmt: skip


def test_no_url_makes_it_raise() -> None:
    with Dns(lambda name, kind: "NXDOMAIN").serve() as dns:
        asked = policy(allow_network=(), dns_servers=(dns.place,), retries=0, timeout_s=1)
        for number in range(3000):
            order = [draws.integer(len(URL_PIECES), 0, "url", n, str(number)) for n in range(6)]
            url = ("http://" if number % 3 else "") + "".join(URL_PIECES[each] for each in order)
            fetched = fetch.fetch(url, asked)
            assert fetched.code in {"bad_url", "blocked_address", "dns"}, (url, fetched)
            assert fetched.final_url.isprintable()
