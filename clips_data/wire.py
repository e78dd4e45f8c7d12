"""HTTP/1.1 on one socket, as little of it as a GET needs, with one deadline over all that a server may draw out.

``http.client`` spends most of a small request in its header parser, and its reads know only a timeout per operation,
which a server that drips bytes never meets; ``h11`` refuses sloppy header lines that every browser passes over, and
their images would be lost. Here every operation ends at the caller's deadline (``time.monotonic``).
"""

from __future__ import annotations

import contextlib
import functools
import re
import select
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

HEAD_READ_BYTES, READ_BYTES = 1 << 16, 1 << 18
MAX_HEAD_BYTES = 1 << 16
MAX_INTERIM_ANSWERS = 8
MAX_LINE_BYTES, MAX_TRAILERS = 1 << 12, 64
DRAINED_BYTES, DRAIN_S = 1 << 14, 0.2

_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) +([0-9]{3})(?:\s|$)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")


class TooLarge(Exception):
    """A body or a head is larger than the caller takes. Says so in one sentence."""


class Malformed(Exception):
    """What came is not HTTP. Asking again will not help."""


class HungUp(ConnectionError):
    """The connection ended before the first byte of an answer: a kept one may just have grown too old."""


@dataclass(slots=True)
class Head:
    """Status and headers of an answer; names are lower case. ``num_bytes`` is what the body is announced to have."""

    status: int
    headers: dict[str, list[str]]
    keeps_alive: bool
    is_chunked: bool
    num_bytes: int | None

    def get(self, name: str) -> str:
        """The first value of header ``name``, "" where there is none."""
        values = self.headers.get(name)
        return values[0] if values else ""


@functools.cache
def tls_context() -> ssl.SSLContext:
    """One for all connections: loading the certificates takes longer than a handshake."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def left_s(deadline: float) -> float:
    """Seconds until ``deadline``. Raises ``TimeoutError`` when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class Connection:
    """One socket to one server, and what has been read of it ahead."""

    def __init__(self, place: tuple[str, int], deadline: float) -> None:
        """Connects to an address (never a name) and port."""
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._ahead, self._at = b"", 0  # what has been read, and how far it has been used
        self._head: Head | None = None  # of an answer whose body nobody has begun to read
        self._is_reusable = False
        try:
            self._socket.settimeout(left_s(deadline))
            self._socket.connect(place)
        except BaseException:
            self.close()
            raise

    def start_tls(self, host: str, deadline: float) -> None:
        """Python's handshake keeps one timeout over all its steps, so that dripped records do not draw it out."""
        self._socket.settimeout(left_s(deadline))
        self._socket = tls_context().wrap_socket(self._socket, server_hostname=host)

    def close(self) -> None:
        self._socket.close()

    def is_quiet(self) -> bool:
        """Whether an idle connection is still open: one that has something to read was closed, or is out of step."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def may_be_kept(self) -> bool:
        """Whether another request can follow. Reads what little there may be of a body that nobody wanted."""
        if self._head is not None:
            if not self._head.keeps_alive:
                return False
            try:
                self.read_body(DRAINED_BYTES, time.monotonic() + DRAIN_S)
            except (OSError, TooLarge, Malformed):
                return False
        return self._is_reusable and self._at == len(self._ahead)

    def ask(self, request: bytes, deadline: float) -> Head:
        """Sends ``request`` and reads the head of the answer. Raises ``HungUp`` when not one byte of it came."""
        self._is_reusable = False
        try:
            self._socket.settimeout(left_s(deadline))
            self._socket.sendall(request)
            self._ahead, self._at = self._receive(HEAD_READ_BYTES, deadline), 0
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError, EOFError):
            raise HungUp("the server hung up without an answer") from None
        for _ in range(MAX_INTERIM_ANSWERS):
            head = parse_head(self._read_head(deadline))
            if head.status >= 200:
                self._head = head
                return head
        raise Malformed("the server does not come to its answer")

    def read_body(self, max_bytes: int, deadline: float, *, cut: bool = False) -> bytes:
        """The body of the last answer. What is larger than ``max_bytes`` raises ``TooLarge``, or is ``cut`` there."""
        head, self._head = self._head, None
        assert head is not None
        if head.num_bytes is not None and head.num_bytes > max_bytes and not cut:
            raise TooLarge(f"the server announces {head.num_bytes} bytes, more than {max_bytes}")
        body = bytearray()
        for piece in self._pieces(head, deadline):
            body += piece
            if len(body) > max_bytes:
                if cut:
                    return bytes(body[:max_bytes])
                raise TooLarge(f"the body is larger than {max_bytes} bytes")
        self._is_reusable = head.keeps_alive
        return bytes(body)

    def _pieces(self, head: Head, deadline: float) -> Iterator[bytes]:
        if head.status in (204, 304):
            return iter(())
        if head.is_chunked:
            return self._chunks(deadline)
        if head.num_bytes is not None:
            return self._counted(head.num_bytes, deadline)
        return self._all(deadline)

    def _all(self, deadline: float) -> Iterator[bytes]:
        """Until the server closes."""
        yield self._take(len(self._ahead) - self._at)
        with contextlib.suppress(EOFError):
            while True:
                yield self._receive(READ_BYTES, deadline)

    def _counted(self, num_bytes: int, deadline: float) -> Iterator[bytes]:
        left = num_bytes
        while left:
            if self._at == len(self._ahead):
                try:
                    self._ahead, self._at = self._receive(min(left, READ_BYTES), deadline), 0
                except EOFError:
                    raise ConnectionError(f"the body ended {left} bytes early") from None
            piece = self._take(min(left, len(self._ahead) - self._at))
            left -= len(piece)
            yield piece

    def _chunks(self, deadline: float) -> Iterator[bytes]:
        while True:
            size = _CHUNK_SIZE.match(self._line(deadline))
            if size is None:
                raise Malformed("a chunk of the body has no size")
            if not (num_bytes := int(size[0], 16)):
                break
            yield from self._counted(num_bytes, deadline)
            if self._line(deadline):
                raise Malformed("a chunk of the body is longer than it says")
        for _ in range(MAX_TRAILERS):
            if not self._line(deadline):
                return
        raise Malformed("the body has too many trailers")

    def _line(self, deadline: float) -> bytes:
        while (end := self._ahead.find(b"\n", self._at)) < 0:
            if len(self._ahead) - self._at > MAX_LINE_BYTES:
                raise Malformed("a line of the body's framing is too long")
            self._read_on(deadline, "the body ended early")
        return self._take(end + 1 - self._at).rstrip(b"\r\n")

    def _read_head(self, deadline: float) -> bytes:
        searched = self._at
        while (end := _END_OF_HEAD.search(self._ahead, searched)) is None:
            if len(self._ahead) > MAX_HEAD_BYTES:
                break
            searched = max(0, len(self._ahead) - self._at - 3)
            self._read_on(deadline, "the headers ended early")
        if end is None or end.end() - self._at > MAX_HEAD_BYTES:
            raise TooLarge(f"the headers are larger than {MAX_HEAD_BYTES} bytes")
        return self._take(end.end() - self._at)

    def _take(self, num_bytes: int) -> bytes:
        taken = self._ahead[self._at : self._at + num_bytes]
        self._at += len(taken)
        return taken

    def _read_on(self, deadline: float, failure: str) -> None:
        try:
            self._ahead, self._at = self._ahead[self._at :] + self._receive(HEAD_READ_BYTES, deadline), 0
        except EOFError:
            raise ConnectionError(failure) from None

    def _receive(self, max_bytes: int, deadline: float) -> bytes:
        """At least one byte. Raises ``EOFError`` where the server has closed."""
        self._socket.settimeout(left_s(deadline))
        data = self._socket.recv(max_bytes)
        if not data:
            raise EOFError
        return data


def parse_head(data: bytes) -> Head:
    """The head of an answer. Raises ``Malformed`` for what is none, or leaves the length of the body in doubt."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    lines = text.split("\n")
    status_line = _STATUS_LINE.match(lines[0])
    if status_line is None:
        raise Malformed("the answer is not HTTP/1")
    headers: dict[str, list[str]] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), []).append(value.strip())
    lengths = {value.strip() for values in headers.get("content-length", ()) for value in values.split(",")}
    if len(lengths) > 1 or not all(_LENGTH.fullmatch(value) for value in lengths):
        raise Malformed("the answer has no clear length")
    codings = ",".join(headers.get("transfer-encoding", ())).lower()
    if codings not in ("", "identity", "chunked"):
        raise Malformed("the answer has a transfer coding that was not asked for")
    options = ",".join(headers.get("connection", ())).lower()
    return Head(
        status=int(status_line[2]),
        headers=headers,
        # An answer with both framings is how one server's answer is passed off as another's: read it, then hang up.
        keeps_alive=("close" not in options if status_line[1] == "1" else "keep-alive" in options)
        and not (codings and lengths),
        is_chunked=codings == "chunked",
        num_bytes=int(lengths.pop()) if lengths and codings != "chunked" else None,
    )
