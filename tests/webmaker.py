"""Real servers on the loopback interface that do exactly what a test tells them: HTTP over raw sockets, and DNS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

# For tls.test, *.tls.test and 127.0.0.1, signed by itself.
CERTIFICATE = """-----BEGIN CERTIFICATE-----
MIIBqjCCAVCgAwIBAgIUQzSb8vyCkHwblXp6GBb+eiFBKOYwCgYIKoZIzj0EAwIw
FjEUMBIGA1UEAwwLY2xpcHMgdGVzdHMwIBcNMjYxMTIxMTA1MzE1WhgPMjEyNjEw
MjgxMDUzMTVaMBYxFDASBgNVBAMMC2NsaXBzIHRlc3RzMFkwEwYHKoZIzj0CAQYI
KoZIzj0DAQcDQgAExL9yxzORF76eBIsvhGDURqIej28bImSnJnp1NM0DXvAY5222
2IxBESTAbJlizVGkzNJiaDUihurDp0n9NHmOOqN6MHgwHQYDVR0OBBYEFOk+hMR9
4pBQ6XxYDSpq7XTIPec+MB8GA1UdIwQYMBaAFOk+hMR94pBQ6XxYDSpq7XTIPec+
MCUGA1UdEQQeMByCCHRscy50ZXN0ggoqLnRscy50ZXN0hwR/AAABMA8GA1UdEwEB
/wQFMAMBAf8wCgYIKoZIzj0EAwIDSAAwRQIhAJBL+X3+p46eWoDx6dUjG06+0vHI
fwoJ0Rzcn18Rf4BnAiAsUUJV3AKGU8ak/VTXFh8GwumJ01uxbVOfQAy6S6b8Hg==
-----END CERTIFICATE-----
"""
KEY = """-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQggioty1eM8WgbEFki
+WCE4XsJuRrt5V8+mI+680t1cGehRANCAATEv3LHM5EXvp4Eiy+EYNRGoh6Pbxsi
ZKcmenU0zQNe8BjnbbbYjEERJMBsmWLNUaTM0mJoNSKG6sOnSf00eY46
-----END PRIVATE KEY-----
"""

RESET = object()
"""In an answer: end the connection with a reset instead of a close."""
Piece = bytes | float | object
Answer = bytes | Iterable[Piece]


def reply(status: int, body: bytes = b"", **headers: str) -> bytes:
    """A whole answer with its length; ``X_Robots_Tag="noai"`` becomes a header."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


class Web:
    """Answers each request with what ``answer(path, head)`` gives.

    Whole answers as bytes keep the connection open, unless they say ``Connection: close``. Pieces are sent one after
    the other, a float is a wait in seconds, and then the connection is closed.
    """

    def __init__(self, answer: Callable[[str, str], Answer]) -> None:
        self.answer = answer
        self.hits: Counter[str] = Counter()
        self.connections = 0
        self.tls: ssl.SSLContext | None = None
        self._listener: socket.socket
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def serve(self, address: str = "127.0.0.1") -> Iterator[Web]:
        self._listener = socket.create_server((address, 0), backlog=512)
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self._open = True
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._open = False
            thread.join()
            self._listener.close()

    def _accept(self) -> None:
        while self._open:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.settimeout(30)
            wire = self.tls.wrap_socket(connection, server_side=True) if self.tls else connection
            with wire:
                ahead = b""
                while self._open:
                    while b"\r\n\r\n" not in ahead:
                        if not (data := wire.recv(65536)):
                            return
                        ahead += data
                    head, _, ahead = ahead.partition(b"\r\n\r\n")
                    text = head.decode("latin-1")
                    path = text.split(" ")[1]
                    with self._lock:
                        self.hits[path] += 1
                    if not self._send(wire, self.answer(path, text)):
                        return

    def _send(self, wire: socket.socket, answer: Answer) -> bool:
        if isinstance(answer, bytes):
            wire.sendall(answer)
            return b"\r\nConnection: close\r\n" not in answer
        for piece in answer:
            if isinstance(piece, float):
                time.sleep(piece)
            elif piece is RESET:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                assert isinstance(piece, bytes)
                wire.sendall(piece)
        return False


def tls_context(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's context, and the certificate file that a client must trust for it."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_text(CERTIFICATE)
    key.write_text(KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


@contextlib.contextmanager
def tunnel(to_port: int) -> Iterator[tuple[int, list[str]]]:
    """A proxy that connects everybody to one local port: its own port, and the request lines that it has seen."""
    requests: list[str] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def talk(near: socket.socket) -> None:
        requests.append(near.recv(65536).decode().split("\r\n")[0])
        far = socket.create_connection(("127.0.0.1", to_port))
        near.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        threading.Thread(target=pump, args=(near, far), daemon=True).start()
        pump(far, near)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=talk, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    with listener:
        yield listener.getsockname()[1], requests


class Dns:
    """A DNS server over UDP. ``zone(name, kind)`` gives addresses, or "NXDOMAIN", "SERVFAIL" or "silence"."""

    def __init__(self, zone: Callable[[str, str], list[str] | str]) -> None:
        self.zone = zone
        self.asked: Counter[tuple[str, str]] = Counter()

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    @contextlib.contextmanager
    def serve(self) -> Iterator[Dns]:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self._open = True
        thread = threading.Thread(target=self._listen, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._open = False
            thread.join()
            self._socket.close()

    def _listen(self) -> None:
        while self._open:
            with contextlib.suppress(TimeoutError):
                data, asker = self._socket.recvfrom(4096)
                if answer := self._answer(data):
                    self._socket.sendto(answer, asker)

    def _answer(self, data: bytes) -> bytes | None:
        import dns.message
        import dns.rcode
        import dns.rdatatype
        import dns.rrset

        query: Any = dns.message.from_wire(data)
        question = query.question[0]
        name, kind = question.name.to_text(omit_final_dot=True).lower(), dns.rdatatype.to_text(question.rdtype)
        self.asked[name, kind] += 1
        found = self.zone(name, kind)
        if found == "silence":
            return None
        response = dns.message.make_response(query)
        if isinstance(found, str):
            response.set_rcode(dns.rcode.from_text(found))
        elif found:
            response.answer.append(dns.rrset.from_text(question.name, 300, "IN", kind, *found))
        wire: bytes = response.to_wire()
        return wire
