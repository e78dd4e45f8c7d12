"""One guarded HTTP GET: the only code that talks to the network on behalf of a URL list.

URLs come from strangers. So only http and https are spoken, the host is resolved once, only public addresses are
dialled (the checked address itself, with the original Host header and TLS name, so that a second resolution cannot
differ), each redirect is checked again, and bytes and total seconds are capped. Opt-out headers are read before the
body is. Nothing here raises for what a server does: the answer is a ``Fetched`` with one of ``schema.DOWNLOAD_CODES``.
"""

from __future__ import annotations

import contextlib
import functools
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urljoin, urlsplit

from clips_data import __version__, addresses, hosts, proxies, robots, wire
from clips_data.addresses import Refused
from clips_data.answers import Busy, check_status, opt_out
from clips_data.redact import redact
from clips_data.robots import Origin

MAX_REDIRECTS, MAX_PLACES = 5, 3
MAX_TEXT, MAX_URL = 200, 2000
PORTS = {"http": 80, "https": 443}
REDIRECTS = frozenset({301, 302, 303, 307, 308})

_SAFE_TARGET = re.compile(r"[A-Za-z0-9_.~%/:=&?+!$,;'@()*\[\]-]*")

turns = hosts.Turns()
idle = hosts.IdleConnections()

Result = TypeVar("Result")
_Reader = Callable[[wire.Connection, wire.Head, float], Result]


@dataclass(frozen=True)
class FetchPolicy:
    """What a fetch may do.

    ``fixed_hosts`` maps a host name to ``(address, port)`` that is dialled unchecked. ``host_connections`` and
    ``host_rate`` (requests per second, 0 for no cap) are this process' share of what a host may get, and
    ``num_processes`` of these share a robots.txt's crawl delay. ``robots_folder`` keeps robots.txt files for all
    processes of a machine. With ``env_proxy`` a proxy of the environment resolves and dials, so that of the checks of
    addresses only those of literal ones are left.
    """

    timeout_s: float
    retries: int
    max_wait_s: float
    max_image_bytes: int
    allow_network: tuple[str, ...] = ()
    honour_opt_out: bool = True
    user_agent: str = "clips"
    fixed_hosts: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    dns_servers: tuple[str, ...] = ()
    robots: bool = False
    robots_folder: Path | None = None
    host_connections: int = 16
    host_rate: float = 0.0
    env_proxy: bool = False
    num_processes: int = 1

    def __post_init__(self) -> None:
        assert self.host_connections > 0, "a process without a connection would wait for ever"
        addresses.networks(self.allow_network)
        addresses.servers(self.dns_servers)


@dataclass(frozen=True)
class Fetched:
    """The outcome: ``code`` is ``ok`` and ``body`` holds the bytes, or ``detail`` says what went wrong.

    ``evidence`` is the header or robots.txt line that an opt-out rests on. No text here holds a secret of the URL.
    """

    code: str
    body: bytes = b""
    detail: str = ""
    final_url: str = ""
    attempts: int = 1
    evidence: str = ""


def fetch(url: str, policy: FetchPolicy) -> Fetched:
    """GETs ``url``, with retries where a retry can help. Blocks for all attempts' deadlines and waits for turns."""
    walk = _Walk(url, policy)
    try:
        body = walk.with_retries(functools.partial(_read_image, policy), heed_robots=policy.robots)
    except Refused as refused:
        return Fetched(
            refused.code,
            detail=_printable(refused.detail, MAX_TEXT),
            final_url=_printable(redact(walk.at), MAX_URL),
            attempts=walk.attempts,
            evidence=_printable(refused.evidence, MAX_TEXT),
        )
    return Fetched("ok", body, final_url=_printable(redact(walk.at), MAX_URL), attempts=walk.attempts)


def _printable(text: str, max_length: int) -> str:
    """Without control, bidi and surrogate characters: servers choose what stands here, and terminals show it."""
    if not text.isprintable():
        text = "".join(character for character in text if character.isprintable())
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


# --- the way to an answer ---------------------------------------------------------------------------------------------


class _Walk:
    """The way from a URL over its redirects to an answer. ``at`` is the URL that it has come to."""

    def __init__(self, url: str, policy: FetchPolicy) -> None:
        self.url, self.policy = url.strip(), policy
        self.at, self.attempts = self.url, 0

    def with_retries(self, read: _Reader[Result], *, heed_robots: bool) -> Result:
        """What ``read`` makes of the first answer that is no redirect. Raises the last attempt's ``Refused``."""
        while True:
            self.attempts += 1
            try:
                return self._attempt(read, heed_robots)
            except Refused as refused:
                if not refused.retry or self.attempts > self.policy.retries:
                    raise
                if not isinstance(refused, Busy):  # a busy host is paused, and the next turn there waits for that
                    time.sleep(min(hosts.back_off_s(self.attempts - 1, self.url), self.policy.max_wait_s))

    def _attempt(self, read: _Reader[Result], heed_robots: bool) -> Result:
        policy, left_s = self.policy, self.policy.timeout_s
        self.at = self.url
        for _ in range(MAX_REDIRECTS + 1):
            origin, target = _parse(self.at)
            spacing_s = 1 / policy.host_rate if policy.host_rate else 0.0
            if heed_robots:
                spacing_s = max(spacing_s, _crawl_delay_s(origin, target, policy))
            with turns.turn(origin.host, policy.host_connections, spacing_s) as turn:
                deadline = time.monotonic() + left_s  # the wait for the turn is not the server's fault
                try:
                    with _failures_as_codes(policy), _answer(origin, target, policy, deadline) as (connection, head):
                        if head.status not in REDIRECTS:
                            return read(connection, head, deadline)
                except Busy as busy:
                    turn.pause(busy.asked_s, policy.max_wait_s)
                    raise
                left_s = deadline - time.monotonic()
            self.at = _redirected(self.at, head)
        raise Refused("http_3xx", f"more than {MAX_REDIRECTS} redirects")


def _parse(url: str) -> tuple[Origin, str]:
    """The origin of ``url``, and the path and query for its request line. No message here quotes the URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise Refused("bad_url", "not a URL") from None
    if not parts.scheme:
        raise Refused("bad_url", "the URL has no scheme")
    if parts.scheme not in PORTS:
        raise Refused("blocked_address", f"scheme {parts.scheme} is not http or https")
    if not host:
        raise Refused("bad_url", "the URL has no host")
    if port == 0 or "\\" in parts.netloc or ("[" in parts.netloc and ":" not in host):
        raise Refused("bad_url", "the URL has no usable host and port")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not _SAFE_TARGET.fullmatch(target):
        target = quote(target, safe="%/:=&?~+!$,;'@()*[]", errors="replace")
    return Origin(parts.scheme, addresses.canonical_host(host), port or PORTS[parts.scheme]), target


def _redirected(url: str, head: wire.Head) -> str:
    location = head.get("location")
    if not location:
        raise Refused("http_3xx", f"HTTP {head.status} without Location")
    try:
        following = urljoin(url, location)
        _parse(following)
    except (ValueError, Refused) as error:
        if isinstance(error, Refused) and error.code != "bad_url":
            raise
        raise Refused("http_3xx", f"HTTP {head.status} to what is no URL") from None
    return following


def _crawl_delay_s(origin: Origin, target: str, policy: FetchPolicy) -> float:
    """Seconds between this process' requests to ``origin`` by its robots.txt. Raises ``Refused`` by its rules."""

    def ask(url: str) -> robots.Heard:
        try:
            return robots.Heard(_Walk(url, policy).with_retries(_read_robots, heed_robots=False))
        except Refused as refused:
            if refused.code == "http_3xx":  # RFC 9309: a robots.txt behind too many redirects is one that is not there
                return robots.Heard()
            return robots.Heard(code=refused.code, detail=_printable(refused.detail, MAX_TEXT))

    asked_s = robots.crawl_delay_s(origin, target, policy.user_agent, policy.robots_folder, ask)
    return min(asked_s, policy.max_wait_s) * policy.num_processes


@contextlib.contextmanager
def _failures_as_codes(policy: FetchPolicy) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise Refused("timeout", f"no complete answer within {policy.timeout_s:g} s", retry=True) from None
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or error.reason or str(error)
        raise Refused("tls", f"TLS: {reason}") from None
    except wire.TooLarge as error:
        raise Refused("too_large", str(error)) from None
    except wire.Malformed as error:
        raise Refused("connect", str(error)) from None
    except OSError as error:
        raise Refused("connect", error.strerror or str(error) or type(error).__name__, retry=True) from None


# --- one request ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _answer(
    origin: Origin, target: str, policy: FetchPolicy, deadline: float
) -> Iterator[tuple[wire.Connection, wire.Head]]:
    """The answer to one request, up to its body, on a kept connection or a new one."""
    is_fixed = origin.host in policy.fixed_hosts
    proxy = proxies.of_environment(origin.scheme, origin.host) if policy.env_proxy and not is_fixed else None
    places = _places(origin, policy, proxy, deadline)
    request = _request(origin, target, policy.user_agent, proxy)
    connection, head = idle.take((origin, places)), None
    if connection is not None:
        head = _ask_kept(connection, request, deadline)
    if connection is None or head is None:
        connection = _dial(origin, places, proxy, deadline)
    try:
        yield connection, head or connection.ask(request, deadline)
    finally:
        idle.give_back((origin, places), connection)


def _ask_kept(connection: wire.Connection, request: bytes, deadline: float) -> wire.Head | None:
    """The answer on a connection that was idle; ``None`` where the server had hung up, which is nobody's failure."""
    try:
        return connection.ask(request, deadline)
    except BaseException as error:
        connection.close()
        if isinstance(error, wire.HungUp):
            return None
        raise


def _places(
    origin: Origin, policy: FetchPolicy, proxy: proxies.Proxy | None, deadline: float
) -> tuple[tuple[str, int], ...]:
    """Where to dial for ``origin``, in order: checked addresses, unless the user has fixed one or named a proxy."""
    if origin.host in policy.fixed_hosts:
        return (policy.fixed_hosts[origin.host],)
    if proxy is not None and not addresses.is_literal(origin.host):
        return proxy.places
    allowed = addresses.allowed_addresses(origin.host, policy.allow_network, policy.dns_servers, deadline)
    return proxy.places if proxy is not None else tuple((address, origin.port) for address in allowed)


def _dial(
    origin: Origin, places: tuple[tuple[str, int], ...], proxy: proxies.Proxy | None, deadline: float
) -> wire.Connection:
    """A connection to the first of ``places`` that answers; each but the last may take half of the time left."""
    for number, place in enumerate(places[:MAX_PLACES], start=1):
        is_last = number == len(places[:MAX_PLACES])
        until = deadline if is_last else deadline - wire.left_s(deadline) / 2
        try:
            connection = wire.Connection(place, until)
            break
        except OSError:
            if is_last:
                raise
    try:
        if origin.scheme == "https":
            if proxy is not None:
                _tunnel(connection, origin, proxy, deadline)
            connection.start_tls(origin.host, deadline)
    except BaseException:
        connection.close()
        raise
    return connection


def _tunnel(connection: wire.Connection, origin: Origin, proxy: proxies.Proxy, deadline: float) -> None:
    place = f"{origin.in_brackets}:{origin.port}"
    request = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{proxy.authorization}\r\n"
    status = connection.ask(request.encode(), deadline).status
    if status != 200:
        raise Refused("connect", f"the proxy answers HTTP {status}")


def _request(origin: Origin, target: str, user_agent: str, proxy: proxies.Proxy | None) -> bytes:
    host = origin.in_brackets if origin.port == PORTS[origin.scheme] else f"{origin.in_brackets}:{origin.port}"
    authorization = ""
    if proxy is not None and origin.scheme == "http":
        target, authorization = f"http://{host}{target}", proxy.authorization
    return (
        f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: {user_agent}/{__version__}\r\n"
        f"Accept: image/*, */*;q=0.5\r\nAccept-Encoding: identity\r\n{authorization}\r\n"
    ).encode()


# --- what is made of an answer ----------------------------------------------------------------------------------------


def _read_image(policy: FetchPolicy, connection: wire.Connection, head: wire.Head, deadline: float) -> bytes:
    check_status(head)
    if head.status not in (200, 203):
        raise Refused("not_an_image", f"HTTP {head.status} brings no whole image")
    if policy.honour_opt_out and (evidence := opt_out(head.headers, policy.user_agent)):
        raise Refused("opt_out", evidence, evidence=evidence)
    return connection.read_body(policy.max_image_bytes, deadline)


def _read_robots(connection: wire.Connection, head: wire.Head, deadline: float) -> str:
    """The text of a robots.txt, as far as it is read; "" where there is none."""
    if 400 <= head.status < 500 and head.status != 429:
        return ""
    check_status(head)
    body = connection.read_body(robots.MAX_ROBOTS_BYTES, deadline, cut=True)
    if len(body) == robots.MAX_ROBOTS_BYTES:
        body = body[: body.rfind(b"\n") + 1]
    return body.decode("utf-8-sig", errors="replace")
