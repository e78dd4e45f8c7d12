"""Serves the demo world over real HTTP on the loopback interface, with the faults of the web.

``/scenes/<world>/<index>.jpg`` is a scene as JPEG; ``?fault=NAME`` makes the server misbehave on purpose. The demo's
URL list names one fixed host, which the fetcher maps to this server, so that nothing on disk depends on a port.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from clips_data import draws
from clips_data.demo import scenes

DEMO_HOST = "demo.clips.invalid"
JPEG_QUALITY = 90
FAULTS = ("404", "429", "500", "redirect", "slow", "truncated", "html", "noai")
FAULTY_SHARE, DUPLICATE_SHARE = 0.05, 0.02
SLOW_PIECES, SLOW_WAIT_S = 5, 0.05
_PATH = re.compile(r"/scenes/(\d+)/(\d+)\.jpg")


def demo_rows(num_pairs: int, world: int) -> list[dict[str, str]]:
    """The demo's URL list: url, web caption, and as extra columns the scene's name and five human-like captions.

    One row in twenty meets a fault of the web, two in a hundred repeat an earlier row's picture and caption.
    """
    rows = []
    for number in range(num_pairs):
        key, index = f"{number}", number
        if number and draws.uniform(world, "demo_duplicate", 0, key) < DUPLICATE_SHARE:
            index = draws.integer(number, world, "demo_duplicate_of", 0, key)
        scene = scenes.make_scene(world, index)
        fault = ""
        if draws.uniform(world, "demo_faulty", 0, key) < FAULTY_SHARE:
            fault = "?fault=" + FAULTS[draws.integer(len(FAULTS), world, "demo_fault", 0, key)]
        rows.append(
            {
                "url": f"http://{DEMO_HOST}/scenes/{world}/{index}.jpg{fault}",
                "caption": scenes.web_caption(scene),
                "scene": f"{world}/{index}",
                "captions": json.dumps(scenes.five_captions(scene)),
            }
        )
    return rows


def description(row: dict[str, str]) -> str:
    """The true description of the scene of a row of the demo's list."""
    world, index = row["scene"].split("/")
    return scenes.describe(scenes.make_scene(int(world), int(index)))


@contextlib.contextmanager
def serve() -> Iterator[tuple[str, int]]:
    """Runs the server in a thread and yields its address and port; both are gone afterwards."""
    server = _Server(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield "127.0.0.1", server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@functools.lru_cache(512)
def jpeg(world: int, index: int) -> bytes:
    """The scene's picture as the server sends it; the same bytes each time."""
    buffer = io.BytesIO()
    scenes.draw_scene(scenes.make_scene(world, index)).save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.busy: Counter[str] = Counter()  # how often a URL with fault=429 was refused


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the client reports what it met."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        match = _PATH.fullmatch(parts.path)
        if match is None:
            self._answer(404, b"no such page", "text/plain")
            return
        fault = parse_qs(parts.query).get("fault", [""])[0]
        with contextlib.suppress(ConnectionError):  # the client hung up, which is its right
            self._answer_with(fault, jpeg(int(match.group(1)), int(match.group(2))), parts.path)

    def _answer_with(self, fault: str, image: bytes, path: str) -> None:
        if fault in ("404", "500"):
            self._answer(int(fault), b"no", "text/plain")
        elif fault == "429" and not self.server.busy[self.path]:
            self.server.busy[self.path] += 1
            self._answer(429, b"later", "text/plain", **{"Retry-After": "0"})
        elif fault == "redirect":
            self._answer(302, b"", "text/plain", Location=path)
        elif fault == "truncated":
            self._answer(200, image[: len(image) // 2], "image/jpeg")
        elif fault == "html":
            self._answer(200, b"<html><body>Sign in to see this picture</body></html>", "image/jpeg")
        elif fault == "noai":
            self._answer(200, image, "image/jpeg", **{"X-Robots-Tag": "noai"})
        elif fault == "slow":
            self._answer_slowly(image)
        else:
            self._answer(200, image, "image/jpeg")

    def _answer(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _answer_slowly(self, image: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(image)))
        self.end_headers()
        step = -(-len(image) // SLOW_PIECES)
        for start in range(0, len(image), step):
            self.wfile.write(image[start : start + step])
            self.wfile.flush()
            time.sleep(SLOW_WAIT_S)
