"""What strangers' URLs and servers can do, each on real sockets, and 10,000 rows of it through ``clips download``.

The canary is a server on 127.0.0.1 that nobody may reach. Addresses like 127.0.0.2 are loopback, too, and stand for the
servers of the web: they alone are allowed.
"""

from __future__ import annotations

import gzip
import itertools
import json
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pairsmaker import image_bytes
from webmaker import RESET, Answer, Dns, Web, reply

from clips_data import addresses, fetch
from clips_data.config import DownloadConfig
from clips_data.executor import Job
from clips_data.fetch import FetchPolicy

WEB, SLOW_WEB = "127.0.0.2", "127.0.0.3"
ALLOWED = (f"{WEB}/32", f"{SLOW_WEB}/32")

LOOPBACK_HOSTS = [
    "127.0.0.1", "127.0.0.1.", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7F.1", "0x7f.0x0.0x0.0x1",
    "017700000001", "0177.0.0.1", "127.0.0.01", "0", "0.0.0.0", "localhost", "LOCALHOST", "localhost.",
    "[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]",
    "[::ffff:0:127.0.0.1]", "[64:ff9b::127.0.0.1]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]", "[2001:0:7f00:1::]",
    "[2001::80ff:fffe]", "[::1%25lo]", "[fe80::1%lo]",
    "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460", "127\u30020\u30020\u30021", "\uff11\uff12\uff17.0.0.1", "\u2113ocalhost",
    "127%2e0%2e0%2e1", "%31%32%37.0.0.1", "127.0.0.1%00.example.org", "127.0.0.1%2f",
    "user@127.0.0.1", "example.org@127.0.0.1", "example.org:80@127.0.0.1", "user:pass@localhost",
    "example.org\\@127.0.0.1", "127.0.0.1\\.example.org", "example.org%40127.0.0.1",
    "private.test", "PRIVATE.test.", "mixed.test", "mapped.test", "nat64.test", "zero.test", "alias.private.test",
]  # fmt: skip
"""Spellings of this machine, all of which lead to the canary in some program. ``*.test`` is in the zone below."""

OTHER_PRIVATE = ["10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "168.63.129.16",
                 "224.0.0.1", "255.255.255.255", "[fd00:ec2::254]", "[fe80::1]", "[ff02::1]"]  # fmt: skip
REFUSALS = {"blocked_address", "bad_url"}


def zone(name: str, kind: str) -> list[str] | str:
    addresses_of: dict[str, list[str]] = {
        "private.test": ["127.0.0.1", "::1"],
        "alias.private.test": ["127.0.0.1"],
        "mixed.test": ["10.0.0.1", "127.0.0.1", "::1"],
        "mapped.test": ["::ffff:127.0.0.1"],
        "nat64.test": ["64:ff9b::7f00:1"],
        "zero.test": ["0.0.0.0", "::"],
        "good.test": [WEB],
    }
    if name.startswith("servfail"):
        return "SERVFAIL"
    if name not in addresses_of:
        return "NXDOMAIN"
    return [address for address in addresses_of[name] if (":" in address) == (kind == "AAAA")]


@pytest.fixture
def canary() -> Iterator[Web]:
    with Web(lambda path, head: reply(200, image_bytes(1))).serve() as server:
        yield server
        assert server.connections == 0, server.hits


@pytest.fixture
def dns() -> Iterator[Dns]:
    addresses.forget()
    with Dns(zone).serve() as server:
        yield server
    addresses.forget()


def policy(**changes: Any) -> FetchPolicy:
    values: dict[str, Any] = {"timeout_s": 2.0, "retries": 1, "max_wait_s": 0.05, "max_image_bytes": 200_000}
    return FetchPolicy(**{**values, "allow_network": ALLOWED, **changes})


# --- one bypass at a time ---------------------------------------------------------------------------------------------


def loopback_urls(port: int) -> list[str]:
    urls = [f"{scheme}://{host}:{port}/a.jpg" for host in LOOPBACK_HOSTS for scheme in ("http", "https")]
    urls += [f"http://127.0.0.1:{port}#@example.org/", f"http://127.0.0.1:{port}?@example.org/"]
    urls += [f"HTTP://127.0.0.1:{port}/", f" http://127.0.0.1:{port}/", f"http://127.0.\t0.1:{port}/"]
    urls += [f"http:\\\\127.0.0.1:{port}/", f"http:127.0.0.1:{port}/", f"http:/127.0.0.1:{port}/"]
    urls += [f"http://127.0.0.1:{port}@example.org:{port}@localhost:{port}/"]
    return urls


@pytest.mark.parametrize("own_resolver", [True, False])
def test_no_spelling_of_this_machine_is_dialled(canary: Web, dns: Dns, own_resolver: bool) -> None:
    asked = policy(dns_servers=(dns.place,) if own_resolver else (), retries=0)
    for url in loopback_urls(canary.port):
        if own_resolver or ".test" not in url:
            fetched = fetch.fetch(url, asked)
            # With a resolver that does not know it, localhost is just a name that does not exist.
            expected = REFUSALS | {"dns"} if (own_resolver and "local" in url.lower()) or "\u2113" in url else REFUSALS
            assert fetched.code in expected, (url, fetched)
            assert fetched.body == b""


def test_no_private_or_special_network_is_dialled() -> None:
    for host in OTHER_PRIVATE:
        assert fetch.fetch(f"http://{host}/a.jpg", policy()).code == "blocked_address"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_leads_to_this_machine(canary: Web, dns: Dns, status: int) -> None:
    targets = [*loopback_urls(canary.port), f"//127.0.0.1:{canary.port}/", f"///127.0.0.1:{canary.port}/"]
    targets += [f"http://{host}/" for host in OTHER_PRIVATE]
    targets += [
        "file:///etc/hostname",
        "ftp://127.0.0.1/a",
        "gopher://127.0.0.1/",
        "data:image/png;base64,AA",
        "\\\\x\\y",
    ]

    def send_away(path: str, head: str) -> Answer:
        return reply(status, Location=targets[int(path[1:])]) if path[1:].isdigit() else reply(404)

    with Web(send_away).serve(WEB) as web:
        for number, target in enumerate(targets):
            fetched = fetch.fetch(f"http://good.test:{web.port}/{number}", policy(dns_servers=(dns.place,), retries=0))
            assert fetched.code in {"blocked_address", "http_3xx", "http_4xx", "dns"}, (target, fetched)
            if "127.0.0.1" in target and "@" not in target and "\\" not in target and target.startswith("http://"):
                assert fetched.code in {"blocked_address", "http_3xx"}, (target, fetched)


def test_a_name_that_changes_its_address_is_dialled_where_it_was_checked(canary: Web) -> None:
    """DNS rebinding: the second answer, and all after it, is this machine."""
    answers = itertools.chain([[WEB]], itertools.repeat(["127.0.0.1"]))
    rebinding = Dns(lambda name, kind: next(answers) if kind == "A" else [])
    addresses.forget()

    def answer(path: str, head: str) -> Answer:
        return {"/redirect": reply(302, Location="/image"), "/broken": reply(500)}.get(path, reply(200, b"image"))

    with rebinding.serve() as dns, Web(answer).serve(WEB) as web:
        asked = policy(dns_servers=(dns.place,))
        base = f"http://rebinding.test:{web.port}"
        assert [fetch.fetch(base + path, asked).code for path in ("/image", "/redirect", "/broken")] == [
            "ok", "ok", "http_5xx",
        ]  # fmt: skip
        assert dns.asked["rebinding.test", "A"] == 1
        assert sum(web.hits.values()) == 5
        addresses.forget()  # as another process would ask: what it is told then is checked again
        assert fetch.fetch(base + "/image", asked).code == "blocked_address"


def test_allowing_a_network_allows_its_addresses_and_nothing_else(canary: Web) -> None:
    with Web(lambda path, head: reply(200, b"image")).serve(WEB) as web:
        assert fetch.fetch(f"http://{WEB}:{web.port}/", policy()).code == "ok"
        assert fetch.fetch(f"http://{WEB}:{web.port}/", policy(allow_network=("10.0.0.0/8",))).code == "blocked_address"
        assert fetch.fetch(f"http://127.2:{web.port}/", policy()).code == "blocked_address"
        assert fetch.fetch(f"http://[::ffff:{WEB}]:{web.port}/", policy()).code == "blocked_address"
        assert fetch.fetch(f"http://127.0.0.1:{canary.port}/", policy()).code == "blocked_address"


def test_environment_proxies_are_no_way_round(canary: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{canary.port}")
    assert fetch.fetch(f"http://{WEB}:9/", policy(retries=0)).code == "connect"


@pytest.mark.parametrize(
    "url",
    [
        "http://{place}/a HTTP/1.1\r\nHost: evil\r\n\r\nGET /b",
        "http://{place}/a%0d%0aX-Evil:%20y",
        "http://{place}/a?b=\r\nX-Evil: y",
        "http://{place}/\x00\x7f\u2028\r\n",
        "http://{place}\r\nX-Evil: y/a",
    ],
)
def test_a_url_puts_nothing_but_its_target_into_the_request(url: str) -> None:
    heads: list[str] = []
    with Web(lambda path, head: heads.append(head) or reply(200)).serve(WEB) as web:
        fetch.fetch(url.format(place=f"{WEB}:{web.port}"), policy())
        for head in heads:
            names = [line.split(":")[0] for line in head.split("\r\n")[1:]]
            assert names == ["Host", "User-Agent", "Accept", "Accept-Encoding"]
            assert head.split("\r\n")[0].count(" ") == 2
        assert len(heads) <= 1


# --- 10,000 rows of it ------------------------------------------------------------------------------------------------

NUM_ROWS = 10_000
IMAGE = image_bytes(7, size_px=120)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(bytes(30_000_000))
"""30 MB of zeros in 29 kB."""


def endless() -> Iterator[bytes]:
    yield CHUNKED
    while True:
        yield b"4000\r\n" + b"x" * 0x4000 + b"\r\n"


# What a path's first word makes the server do, and the code that its row must get.
BEHAVIOURS: dict[str, tuple[Callable[[], Answer], str]] = {
    "image": (lambda: reply(200, IMAGE), "ok"),
    "closing": (lambda: reply(200, IMAGE, Connection="close"), "ok"),
    "chunked": (lambda: CHUNKED + b"%x\r\n" % len(IMAGE) + IMAGE + b"\r\n0\r\n\r\n", "ok"),
    "unannounced": (lambda: [b"HTTP/1.0 200 OK\r\n\r\n" + IMAGE], "ok"),
    "redirect": (lambda: reply(302, Location="/image"), "ok"),
    "missing": (lambda: reply(404, b"<html>no</html>"), "http_4xx"),
    "gone": (lambda: reply(410), "http_4xx"),
    "denied": (lambda: reply(999), "http_4xx"),
    "alwaysbusy": (lambda: reply(429, Retry_After="0"), "http_4xx"),
    "broken": (lambda: reply(500), "http_5xx"),
    "overloaded": (lambda: reply(503, Retry_After="0"), "http_5xx"),
    "loop": (lambda: reply(302, Location="/loop"), "http_3xx"),
    "nowhere": (lambda: reply(301), "http_3xx"),
    "tofile": (lambda: reply(302, Location="file:///etc/hostname"), "blocked_address"),
    "toprivate": (lambda: reply(307, Location="http://169.254.169.254/latest/meta-data/"), "blocked_address"),
    "todecimal": (lambda: reply(302, Location="http://2130706433/"), "blocked_address"),
    "noai": (lambda: reply(200, IMAGE, X_Robots_Tag="otherbot: all, clips: noai"), "opt_out"),
    "tdm": (lambda: reply(200, IMAGE, tdm_reservation="1"), "opt_out"),
    "html": (lambda: reply(200, b"<html>log in</html>"), "not_an_image"),
    "empty": (lambda: reply(200), "not_an_image"),
    "nocontent": (lambda: reply(204), "not_an_image"),
    "bomb": (lambda: reply(200, BOMB, Content_Encoding="gzip"), "not_an_image"),
    "announced": (lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"], "too_large"),
    "endless": (endless, "too_large"),
    "headers": (lambda: [b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 20_000], "too_large"),
    "cutimage": (lambda: reply(200, IMAGE[:-200]), "decode_failed"),
    "early": (lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + IMAGE], "connect"),
    "hangup": (lambda: [], "connect"),
    "reset": (lambda: [RESET], "connect"),
    "nonsense": (lambda: [b"\x00\x01\x02 this is no HTTP\r\n\r\n"], "connect"),
    "lengths": (lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"], "connect"),
}
SLOW_BEHAVIOURS: dict[str, Answer] = {
    "dripbody": [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", *([b"x", 0.1] * 100)],
    "driphead": [b"H", 0.1] * 100,
    "silent": [10.0],
}
NUM_SLOW_ROWS = 24


def answer_fast(path: str, head: str) -> Answer:
    return BEHAVIOURS[path.split("/")[1]][0]()


def answer_slowly(path: str, head: str) -> Answer:
    return SLOW_BEHAVIOURS[path.split("/")[1]]


def faulty_rows(web: Web, slow_web: Web, canary: Web, closed_port: int) -> list[tuple[str, str]]:
    """URLs of all faults, in turn, each with the code that it must get."""
    place, canary_port = f"{WEB}:{web.port}", canary.port
    kinds: list[tuple[str, str]] = [(f"http://{place}/{name}", code) for name, (_, code) in BEHAVIOURS.items()]
    kinds += [(f"http://good.test:{web.port}/image", "ok"), (f"http://user:pw@{place}/image", "ok")]
    kinds += [(f"http://{host}:{canary_port}", "blocked_address") for host in LOOPBACK_HOSTS[:13]]
    special = ("[::1]", "[::ffff:127.0.0.1]", "private.test")
    kinds += [(f"http://{host}:{canary_port}", "blocked_address") for host in special]
    kinds += [(f"{scheme}://{place}", "blocked_address") for scheme in ("file", "ftp", "gopher")]
    kinds += [("data:image/png;base64,AAAA", "blocked_address"), ("http://169.254.169.254", "blocked_address")]
    kinds += [(url, "bad_url") for url in ("http://[half", "no url at all", "http://a b", "http://a:x")]
    kinds += [("http://missing.test", "dns"), ("http://servfail.test", "dns")]
    kinds += [(f"http://{WEB}:{closed_port}", "connect"), (f"https://{WEB}:{closed_port}", "connect")]
    numbered = zip(range(NUM_ROWS - NUM_SLOW_ROWS), itertools.cycle(kinds), strict=False)
    rows = [(f"{url}/{number}", code) for number, (url, code) in numbered]
    slow = itertools.cycle(SLOW_BEHAVIOURS)
    for number in range(NUM_SLOW_ROWS):
        rows.insert(number * 400, (f"http://{SLOW_WEB}:{slow_web.port}/{next(slow)}/{number}", "timeout"))
    return rows


def test_ten_thousand_urls_of_mixed_faults_become_ten_thousand_rows_with_the_right_codes(
    canary: Web, dns: Dns, tmp_path: Path
) -> None:
    from clips_data import download

    with socket.socket() as closed:
        closed.bind((WEB, 0))
        closed_port = closed.getsockname()[1]
    web, slow_web = Web(answer_fast), Web(answer_slowly)
    with web.serve(WEB), slow_web.serve(SLOW_WEB):
        rows = faulty_rows(web, slow_web, canary, closed_port)
        source = tmp_path / "list.jsonl"
        lines = [json.dumps({"url": url, "caption": code, "lot": lot}) for lot, (url, code) in enumerate(rows)]
        source.write_text("\n".join(lines))
        config = DownloadConfig(
            source=str(source), allow_network=ALLOWED, dns_servers=(dns.place,), timeout_s=1.5, retries=1,
            max_wait_s=0.02, max_image_bytes=200_000, threads=24, host_connections=64, min_success=0, shard_rows=2500,
        )  # fmt: skip
        report = download.run(config, Job(work=tmp_path, quiet=True, processes=2))
        hits = web.hits
    table = pl.concat([pl.read_parquet(path) for path in sorted((tmp_path / "pairs").glob("[0-9]*.parquet"))])
    wrong = table.filter(pl.col("code") != pl.col("caption")).select("url", "caption", "code", "error_message")
    assert wrong.rows() == []
    assert table["lot"].to_list() == list(range(NUM_ROWS))
    assert len(table) == NUM_ROWS == sum(report.counts.values())
    assert Counter(table["code"].to_list()) == Counter(code for _, code in rows)
    asked = Counter[str]()
    for path, number in hits.items():
        asked[path.split("/")[1]] = max(asked[path.split("/")[1]], number)
    once, twice = ("missing", "noai", "tdm", "announced", "endless", "html"), ("broken", "overloaded", "alwaysbusy")
    assert {name: asked[name] for name in once + twice} == dict.fromkeys(once, 1) | dict.fromkeys(twice, 2)
