"""A captioner without a model, for tests of all that happens around one. What it says is a function of its request.

    python captionmaker.py recaption --work W …

is the `clips` command with this engine in the place of vLLM. ``CAPTIONMAKER`` (JSON) has the engine's settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clips_data.recaption import engine_child
from clips_data.recaption.engines import Answer, BatchEngine, Request

SETTINGS = "CAPTIONMAKER"
COLOURS = ("red", "green", "blue", "gray", "pink", "black", "white", "brown")
THINGS = ("boat", "tree", "house", "cat", "bridge", "lamp", "table", "road")


def word(request: Request) -> str:
    """Identifies what the request is about; greedy answers do not depend on the seed."""
    greedy = request.decoding.temperature == 0
    parts = [request.image or b"", (request.system or "").encode(), request.user.encode()]
    return hashlib.sha256(b"\0".join([*parts, b"" if greedy else str(request.seed).encode()])).hexdigest()


def caption(request: Request) -> str:
    name = word(request)
    some = [int(pair, 16) for pair in (name[0:2], name[2:4], name[4:6], name[6:8])]
    return (
        f"A {COLOURS[some[0] % 8]} {THINGS[some[1] % 8]} stands beside a {COLOURS[some[2] % 8]} "
        f"{THINGS[some[3] % 8]} under sign {name[:6]}."
    )


@dataclass(frozen=True)
class BuildEcho:
    """``asked`` is a file that gets a line for every request; ``deadly`` kills the process on some images' sha256."""

    max_batch_rows: int = 8
    delay_s: float = 0.0
    asked: str = ""
    deadly: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ("<image>", "</s>")
    broken: bool = False

    def __call__(self) -> EchoEngine:
        if self.broken:
            raise RuntimeError("no such device")
        return EchoEngine(self)


class EchoEngine(BatchEngine):
    def __init__(self, settings: BuildEcho) -> None:
        super().__init__(settings.max_batch_rows)
        self.settings = settings
        self.about = {
            "engine_version": "1",
            "device": "cpu",
            "num_gpus": 0,
            "special_tokens": list(settings.special_tokens),
            "capacity": 2 * settings.max_batch_rows,
        }

    def add(self, number: int, request: Request) -> None:
        engine_child.mark(number)
        super().add(number, request)

    def answer(self, requests: list[Request]) -> list[Answer]:
        time.sleep(self.settings.delay_s)
        if self.settings.asked:
            with Path(self.settings.asked).open("a") as file:
                file.writelines(f"{word(request)}\n" for request in requests)
        for request in requests:
            if hashlib.sha256(request.image or b"").hexdigest() in self.settings.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        text = caption(request)
        if request.shape is not None:
            shape = request.shape["properties"]
            text = json.dumps({name: [text] if about["type"] == "array" else text for name, about in shape.items()})
        return Answer("ok", text, "stop", len(text.split()), 5)


def install(build: BuildEcho) -> Any:
    """Puts the engine in the place of any other; returns what undoes it."""
    from clips_data.recaption import choose

    real = choose.build
    choose.build = lambda config, prompt: ("echo", build)  # type: ignore[assignment]
    return lambda: setattr(choose, "build", real)


if __name__ == "__main__":
    from captionmaker import BuildEcho as Importable  # not of __main__: other processes unpickle it

    from cli.main import main

    given = json.loads(os.environ.get(SETTINGS, "{}"))
    install(Importable(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}))  # type: ignore[arg-type]
    sys.exit(main(sys.argv[1:]))
