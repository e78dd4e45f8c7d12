"""Serves a few JPEGs from memory over HTTP on the loopback interface, cheaply, so that the client is what is measured.

python tests/bench/image_server.py small|large    prints its port, and ends with its standard input
"""

from __future__ import annotations

import asyncio
import io
import sys

import numpy as np
from PIL import Image

SIZES_PX = {"small": [(640, 480), (500, 600), (720, 420)], "large": [(2048, 1536), (1600, 1280), (2400, 1600)]}
NUM_IMAGES = 24


def main() -> None:
    pages = {f"/{number}.jpg": answer(jpeg(number, sys.argv[1])) for number in range(NUM_IMAGES)}
    asyncio.run(serve(pages))


def jpeg(number: int, mix: str) -> bytes:
    """A picture with the busyness of a photo: smooth shapes under noise of several scales."""
    rng = np.random.default_rng(number)
    width, height = SIZES_PX[mix][number % 3]
    picture = np.zeros((height, width, 3), np.float32)
    for step, strength in ((256, 70), (64, 40), (16, 20), (4, 10)):
        coarse = Image.fromarray(rng.integers(0, 256, (height // step + 2, width // step + 2, 3), np.uint8))
        picture += (
            (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128) * strength / 70
        )
    buffer = io.BytesIO()
    Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=87)
    return buffer.getvalue()


def answer(body: bytes) -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: %s\r\n\r\n" + body


class Server(asyncio.Protocol):
    def __init__(self, pages: dict[str, bytes]) -> None:
        self.pages, self.received = pages, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        while b"\r\n\r\n" in self.received:
            head, _, self.received = self.received.partition(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode().partition("?")[0]
            close = b"connection: close" in head.lower()
            self.transport.write(self.pages[path].replace(b"%s", b"close" if close else b"keep-alive", 1))
            if close:
                self.transport.close()


async def serve(pages: dict[str, bytes]) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Server(pages), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    main()
