"""The guarded GET, against a real server on the loopback interface."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clips_data import fetch
from clips_data.fetch import FetchPolicy

BODY = b"0123456789" * 1000
hits: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        hits[self.path] += 1
        if path == "/ok":
            self.answer(200, BODY)
        elif path == "/agent":
            self.answer(200, self.headers["User-Agent"].encode() + b"|" + self.headers["Host"].encode())
        elif path == "/missing":
            self.answer(404)
        elif path == "/busy":
            if hits[self.path] == 1:
                self.answer(429, Retry_After="0")
            else:
                self.answer(200, BODY)
        elif path == "/broken":
            self.answer(500)
        elif path == "/redirect":
            self.answer(302, Location="/ok")
        elif path == "/loop":
            self.answer(302, Location="/loop")
        elif path == "/to-private":
            self.answer(302, Location="http://192.168.0.1/x")
        elif path == "/to-file":
            self.answer(302, Location="file:///etc/hostname")
        elif path == "/noai":
            self.answer(200, BODY, X_Robots_Tag="noimageai")
        elif path == "/noai-other":
            self.answer(200, BODY, X_Robots_Tag="otherbot: noai")
        elif path == "/tdm":
            self.answer(200, BODY, tdm_reservation="1")
        elif path == "/early":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(BODY)
            self.close_connection = True
        elif path in ("/drip-body", "/drip-head"):
            self.drip(path)

    def drip(self, path: str) -> None:
        try:
            if path == "/drip-body":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:
            return


@pytest.fixture(scope="module")
def base() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def policy(**changes: object) -> FetchPolicy:
    values: dict[str, object] = {"timeout_s": 5.0, "retries": 1, "max_wait_s": 0.1, "max_image_bytes": 50_000}
    return FetchPolicy(**{**values, "allow_network": ("127.0.0.0/8",), **changes})  # type: ignore[arg-type]


def test_a_body_arrives_whole_with_an_honest_user_agent(base: str) -> None:
    fetched = fetch.fetch(f"{base}/ok", policy())
    assert (fetched.code, fetched.body, fetched.attempts) == ("ok", BODY, 1)
    agent, host = fetch.fetch(f"{base}/agent", policy()).body.split(b"|")
    assert agent.startswith(b"clips/")
    assert host.decode() == base.removeprefix("http://")


@pytest.mark.parametrize(
    ("path", "code", "attempts"),
    [
        ("/missing", "http_4xx", 1),
        ("/broken", "http_5xx", 2),
        ("/loop", "http_3xx", 1),
        ("/to-private", "blocked_address", 1),
        ("/to-file", "blocked_address", 1),
        ("/noai", "opt_out", 1),
        ("/tdm", "opt_out", 1),
        ("/early", "connect", 2),
    ],
)
def test_what_servers_do_gets_its_code_and_only_helpful_retries(base: str, path: str, code: str, attempts: int) -> None:
    before = hits[path]
    fetched = fetch.fetch(base + path, policy())
    assert (fetched.code, fetched.attempts, fetched.body) == (code, attempts, b"")
    if path != "/loop":
        assert hits[path] - before == attempts


def test_429_is_tried_again_after_what_the_server_asks(base: str) -> None:
    fetched = fetch.fetch(f"{base}/busy?1", policy())
    assert (fetched.code, fetched.attempts) == ("ok", 2)


def test_redirects_are_followed_and_recorded(base: str) -> None:
    fetched = fetch.fetch(f"{base}/redirect", policy())
    assert (fetched.code, fetched.final_url) == ("ok", f"{base}/ok")


def test_opt_out_for_another_robot_and_opt_out_switched_off_do_not_count(base: str) -> None:
    assert fetch.fetch(f"{base}/noai-other", policy()).code == "ok"
    assert fetch.fetch(f"{base}/noai", policy(honour_opt_out=False)).code == "ok"


def test_the_byte_cap_ends_a_body(base: str) -> None:
    assert fetch.fetch(f"{base}/ok", policy(max_image_bytes=9_999)).code == "too_large"
    assert fetch.fetch(f"{base}/ok", policy(max_image_bytes=10_000)).code == "ok"


@pytest.mark.parametrize("path", ["/drip-body", "/drip-head"])
def test_a_drip_ends_at_the_total_deadline(base: str, path: str) -> None:
    assert fetch.fetch(base + path, policy(timeout_s=0.4, retries=0)).code == "timeout"


def test_loopback_is_refused_unless_allowed_and_never_dialled(base: str) -> None:
    before = sum(hits.values())
    port = base.rpartition(":")[2]
    for host in ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "[::ffff:127.0.0.1]"):
        assert fetch.fetch(f"http://{host}:{port}/ok", policy(allow_network=())).code == "blocked_address", host
    assert sum(hits.values()) == before


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.org/a", "data:image/png;base64,AAAA"])
def test_other_schemes_are_refused(url: str) -> None:
    assert fetch.fetch(url, policy()).code == "blocked_address"


def test_a_url_that_is_none_and_a_host_that_is_none() -> None:
    assert fetch.fetch("http://[half", policy()).code == "bad_url"
    assert fetch.fetch("http:///path", policy()).code == "bad_url"
    assert fetch.fetch("http://no.such.host.invalid/", policy(retries=0)).code == "dns"


def test_a_refused_connection_gets_its_code() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert fetch.fetch(f"http://127.0.0.1:{port}/", policy(retries=0)).code == "connect"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.1.1", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::",
    ],
)  # fmt: skip
def test_non_public_addresses_are_not_allowed(address: str) -> None:
    assert not fetch.is_allowed(address)


def test_public_addresses_are_allowed() -> None:
    assert fetch.is_allowed("93.184.216.34")
    assert fetch.is_allowed("2606:2800:220:1:248:1893:25c8:1946")
