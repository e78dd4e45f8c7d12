"""One guarded HTTP GET: the only code that talks to the network on behalf of a URL list.

URLs come from strangers. So only http and https are spoken, the host is resolved once, only public addresses are
dialled (the checked address itself, with the original Host header and TLS name, so that a second resolution cannot
differ), each redirect is checked again, and bytes and total seconds are capped. Opt-out headers are read before the
body is. Nothing here raises for what a server does: the answer is a ``Fetched`` with one of ``schema.DOWNLOAD_CODES``.
"""

from __future__ import annotations

import email.utils
import functools
import http.client
import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from clips_data import __version__, draws

MAX_REDIRECTS = 5
READ_BYTES = 1 << 16
OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
RETRIED_CODES = frozenset({"dns", "connect", "timeout", "http_5xx"})
NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class FetchPolicy:
    """What a fetch may do. ``fixed_hosts`` maps a host name to ``(address, port)`` that is dialled unchecked."""

    timeout_s: float
    retries: int
    max_wait_s: float
    max_image_bytes: int
    allow_network: tuple[str, ...] = ()
    honour_opt_out: bool = True
    user_agent: str = "clips"
    fixed_hosts: Mapping[str, tuple[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Fetched:
    """The outcome: ``code`` is ``ok`` and ``body`` holds the bytes, or ``detail`` says what went wrong."""

    code: str
    body: bytes = b""
    detail: str = ""
    final_url: str = ""
    attempts: int = 1


class _Refused(Exception):
    """Ends one attempt with a code. ``wait_s`` is what the server asked for before another one."""

    def __init__(self, code: str, detail: str, *, retry: bool = False, wait_s: float | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.retry, self.wait_s = code, detail, retry or code in RETRIED_CODES, wait_s


def fetch(url: str, policy: FetchPolicy) -> Fetched:
    """GETs ``url``, with retries where a retry can help. Blocks for at most all attempts' deadlines and waits."""
    for attempt in range(policy.retries + 1):
        try:
            body, final_url = _attempt(url, policy)
            return Fetched("ok", body, final_url=final_url, attempts=attempt + 1)
        except _Refused as refused:
            if not refused.retry or attempt == policy.retries:
                return Fetched(refused.code, detail=refused.detail, final_url=url, attempts=attempt + 1)
            jitter = 0.5 + draws.uniform(0, "backoff", attempt, url)
            asked = refused.wait_s if refused.wait_s is not None else 0.5 * 2**attempt * jitter
            time.sleep(min(asked, policy.max_wait_s))
    raise AssertionError("the last attempt returns")


def _attempt(url: str, policy: FetchPolicy) -> tuple[bytes, str]:
    deadline = time.monotonic() + policy.timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        wire = None
        try:
            connection, wire, target = _connect(url, policy, deadline)
            connection.request("GET", target, headers=_headers(policy))
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                location = response.getheader("Location")
                if not location:
                    raise _Refused("http_3xx", f"HTTP {response.status} without Location")
                url = urljoin(url, location)
                continue
            _check_status(response)
            if policy.honour_opt_out:
                _check_opt_out(response, policy.user_agent)
            return _read_capped(response, policy.max_image_bytes), url
        except TimeoutError:
            raise _Refused("timeout", f"no complete answer within {policy.timeout_s:g} s") from None
        except ssl.SSLError as error:
            raise _Refused("tls", f"TLS: {error.reason or error}") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Refused("connect", f"{type(error).__name__}: {error}") from None
        finally:
            if wire:
                wire.hang_up()
    raise _Refused("http_3xx", f"more than {MAX_REDIRECTS} redirects")


def _headers(policy: FetchPolicy) -> dict[str, str]:
    return {"User-Agent": f"{policy.user_agent}/{__version__}", "Accept": "image/*", "Accept-Encoding": "identity"}


def _connect(url: str, policy: FetchPolicy, deadline: float) -> tuple[http.client.HTTPConnection, _DeadlineSocket, str]:
    """An open connection to the checked address of ``url``, its socket, and the request target."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise _Refused("bad_url", f"not a URL: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise _Refused("blocked_address", f"scheme {parts.scheme or '(none)'} is not http or https")
    if not host:
        raise _Refused("bad_url", "the URL has no host")
    port = port or (443 if parts.scheme == "https" else 80)
    if host in policy.fixed_hosts:
        address, dial_port = policy.fixed_hosts[host]
    else:
        address, dial_port = _public_address(host, port, policy.allow_network), port
    connection = http.client.HTTPConnection(host, port)
    raw = socket.create_connection((address, dial_port), timeout=_remaining(deadline))
    if parts.scheme == "https":
        raw = _tls_context().wrap_socket(raw, server_hostname=host)
    connection.sock = wire = _DeadlineSocket(raw, deadline)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return connection, wire, _quoted(target)


def _quoted(target: str) -> str:
    """Percent-encodes what may not stand in a request line and leaves existing escapes alone."""
    from urllib.parse import quote

    return quote(target, safe="%/:=&?~#+!$,;'@()*[]")


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()


def _public_address(host: str, port: int, allow_network: tuple[str, ...]) -> str:
    """The first address of ``host`` that may be dialled."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise _Refused("dns", f"{host}: {error}") from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if is_allowed(address, allow_network):
            return address
    raise _Refused("blocked_address", f"{host} resolves to {addresses[0]}, which is not a public address")


def is_allowed(address: str, allow_network: tuple[str, ...] = ()) -> bool:
    """Whether ``address`` is public, or lies in one of the CIDR blocks that the user named."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if any(ip in ipaddress.ip_network(block) for block in allow_network):
        return True
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if embedded is not None:
            return is_allowed(str(embedded), allow_network)
        if ip in NAT64:
            return False
    return ip.is_global and not ip.is_multicast


def _check_status(response: http.client.HTTPResponse) -> None:
    status = response.status
    if status == 200:
        return
    if status in (429, 503):
        wait_s = _retry_after_s(response.getheader("Retry-After"))
        raise _Refused(f"http_{status // 100}xx", f"HTTP {status}", retry=True, wait_s=wait_s)
    family = status // 100 if 3 <= status // 100 <= 5 else 5
    raise _Refused(f"http_{family}xx", f"HTTP {status}")


def _retry_after_s(value: str | None) -> float | None:
    """Retry-After in seconds, from its number or its HTTP date; ``None`` where there is none."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _check_opt_out(response: http.client.HTTPResponse, user_agent: str) -> None:
    for value in response.headers.get_all("X-Robots-Tag", []):
        agent, _, directives = value.rpartition(":")
        if agent and agent.strip().lower() != user_agent.lower():
            continue
        named = {directive.strip().lower() for directive in directives.split(",")}
        if named & OPT_OUT_DIRECTIVES:
            raise _Refused("opt_out", f"X-Robots-Tag: {value}")
    if (response.getheader("tdm-reservation") or "").strip() == "1":
        raise _Refused("opt_out", "tdm-reservation: 1")


def _read_capped(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    body = bytearray()
    while chunk := response.read1(READ_BYTES):
        body += chunk
        if len(body) > max_bytes:
            raise _Refused("too_large", f"the body is larger than {max_bytes} bytes")
    if response.length:  # what Content-Length promised and did not come
        raise _Refused("connect", f"the body ended {response.length} bytes early")
    return bytes(body)


def _remaining(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _DeadlineSocket:
    """A socket whose every operation ends at one deadline: a server that drips bytes cannot hold a thread."""

    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw, self._deadline = raw, deadline

    def sendall(self, data: Any) -> None:
        self._raw.settimeout(_remaining(self._deadline))
        self._raw.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_DeadlineReader(self._raw, self._deadline))

    def close(self) -> None:
        """Does nothing: http.client closes early, while the response is still being read. See ``hang_up``."""

    def hang_up(self) -> None:
        self._raw.close()


class _DeadlineReader(io.RawIOBase):
    def __init__(self, raw: socket.socket, deadline: float) -> None:
        self._raw, self._deadline = raw, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._raw.settimeout(_remaining(self._deadline))
        return self._raw.recv_into(buffer)
