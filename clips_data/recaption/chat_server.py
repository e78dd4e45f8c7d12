"""An OpenAI-compatible server as one thread speaks to it: one kept connection, one deadline for each exchange.

The key stands in the header of each request and nowhere else: what a server says is shown without it. No proxies, no
redirects, no cookies; certificates are those of the system, or of ``SSL_CERT_FILE``.
"""

from __future__ import annotations

import json
import re
import socket
import time
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from clips_data import __version__, answers, redact
from clips_data.errors import UserError
from clips_data.wire import Connection, HungUp, Malformed, TooLarge, left_s

CONNECT_S: Final = 20.0
MAX_BODY_BYTES: Final = 16 << 20
MAX_SAID_CHARS: Final = 300
_NOT_IN_A_HEADER = re.compile(r"[^\x21-\x7e]")
_NOT_SHOWN = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")


class Unreachable(Exception):
    """No connection is to be had: the name is unknown, the port closed, the certificate bad. Says which."""


class Lost(Exception):
    """The exchange began and came to no end: hung up, out of time, too large, or not HTTP. Says which."""


@dataclass(frozen=True)
class Place:
    """Where a server is. ``path`` and ``query`` are those of its base URL, usually ``/v1`` and nothing."""

    scheme: str
    host: str
    port: int
    path: str
    query: str

    @classmethod
    def of(cls, url: str) -> Place:
        """Raises ``UserError`` for what is no http or https URL, and for one with a user or a password in it."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or parts.scheme not in ("http", "https") or re.search(r"[^\x21-\x7e]", url):
            raise UserError(
                f"The endpoint {redact.redact(url)!r} is not an http or https URL. Give one such as "
                "http://127.0.0.1:8000/v1."
            )
        if parts.username is not None or parts.password is not None:
            raise UserError(
                f"The endpoint {redact.redact(url)!r} holds a user name or password. Put the API key into an "
                "environment variable and name that instead."
            )
        port = port or (443 if parts.scheme == "https" else 80)
        return cls(parts.scheme, host, port, parts.path.rstrip("/"), parts.query)

    @property
    def root(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.scheme == "https" else 80)
        return f"{self.scheme}://{host}" + ("" if usual else f":{self.port}")

    @property
    def shown(self) -> str:
        """The base URL for messages, without what may be secret."""
        return redact.redact(self.root + self.target(""))

    def target(self, end: str) -> str:
        """What is asked for: the base URL's path with ``end`` behind it, and its query."""
        return f"{self.path}{end}" + (f"?{self.query}" if self.query else "")


@dataclass(frozen=True)
class Reply:
    status: int
    asked_s: float | None
    """When to come back, in seconds, where the server says so."""
    content: Any
    """The parsed JSON; ``None`` where the body is none."""
    said: str
    """The server's error message, else the beginning of its body; on one line, without the key. "" beside an answer."""


class Line:
    """One thread's connection to the server, opened when it is needed and kept while the server keeps it."""

    def __init__(self, place: Place, key: str | None) -> None:
        """Raises ``UserError`` where the key cannot stand in a header."""
        if key is not None and (not key or _NOT_IN_A_HEADER.search(key)):
            raise UserError("The endpoint's API key is empty or holds characters that no key has. Set it anew.")
        self._place, self._key = place, key
        self._connection: Connection | None = None

    def ask(self, method: str, target: str, body: bytes | None, deadline: float) -> Reply:
        """One exchange. Raises ``Unreachable`` or ``Lost``; an answer with any status is none of them."""
        request = self._head(method, target, body) + (body or b"")
        kept, self._connection = self._connection, None
        try:
            if kept is not None:
                try:
                    if kept.is_quiet():
                        return self._exchange(kept, request, deadline)
                except HungUp:  # it had grown too old, and nothing of this request was answered
                    pass
                kept.close()
            return self._exchange(self._connect(deadline), request, deadline)
        except TimeoutError:
            raise Lost("no whole answer in time") from None
        except (OSError, TooLarge, Malformed) as error:
            raise Lost(str(error) or type(error).__name__) from None

    def _head(self, method: str, target: str, body: bytes | None) -> bytes:
        lines = [
            f"{method} {target or '/'} HTTP/1.1",
            f"Host: {self._place.root.partition('://')[2]}",
            f"User-Agent: clips/{__version__}",
            "Accept: application/json",
            "Accept-Encoding: identity",
        ]
        if self._key is not None:
            lines.append(f"Authorization: Bearer {self._key}")
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    def _connect(self, deadline: float) -> Connection:
        deadline = min(deadline, time.monotonic() + CONNECT_S)
        try:
            found = socket.getaddrinfo(self._place.host, self._place.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise Unreachable(f"the name {self._place.host} cannot be resolved ({error})") from None
        reasons = []
        for *_, address in found:
            try:
                left_s(deadline)
                connection = Connection((str(address[0]), self._place.port), deadline)
            except OSError as error:
                reasons.append(error.strerror or str(error) or "no connection in time")
                continue
            try:
                if self._place.scheme == "https":
                    connection.start_tls(self._place.host, deadline)
                return connection
            except OSError as error:
                connection.close()
                reasons.append(f"TLS: {getattr(error, 'verify_message', '') or error.strerror or error}")
        raise Unreachable("; ".join(dict.fromkeys(reasons)))

    def _exchange(self, connection: Connection, request: bytes, deadline: float) -> Reply:
        try:
            head = connection.ask(request, deadline)
            body = connection.read_body(MAX_BODY_BYTES, deadline)
        except BaseException:
            connection.close()
            raise
        if connection.may_be_kept():
            self._connection = connection
        else:
            connection.close()
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        asked_s = answers.retry_after_s(head.get("retry-after"))
        is_answer = 200 <= head.status < 300 and content is not None
        return Reply(head.status, asked_s, content, "" if is_answer else self._said(content, body))

    def _said(self, content: Any, body: bytes) -> str:
        text = _message(content) or body.decode("utf-8", "replace")
        if self._key is not None:
            text = text.replace(self._key, redact.REDACTED)
        return _NOT_SHOWN.sub(" ", text).strip()[:MAX_SAID_CHARS]


def _message(content: Any) -> str:
    """The message of an error, wherever servers put it."""
    for name in ("error", "message", "detail"):
        if isinstance(content, dict) and content.get(name):
            content = content[name]
    if isinstance(content, dict | list):
        return json.dumps(content)
    return content if isinstance(content, str) else ""
