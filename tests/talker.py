"""An engine without a model that says what its model's name asks for. A module of its own: its child imports little."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from clips_data.recaption.engines import Answer, BatchEngine, Request

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)"> & \u202e\x00\x1b[31m \'"><b>bold'
TEXTS = {
    "hostile": f"A thing {{}} {HOSTILE}.",
    "silent": "",
    "capped": "A thing {}, and another thing which",
}
TOKENS = 12


@dataclass(frozen=True)
class BuildTalker:
    """In ``folder``, ``asked.txt`` gets a line for each question that was answered.

    ``broken`` does not start; ``dies`` answers four or a few more and is dead from then on, until a file ``mended``
    lies there.
    """

    model: str
    folder: Path
    max_batch_rows: int = 4

    def __call__(self) -> Talker:
        if self.model == "broken" or (self.model == "dies" and self.is_over):
            raise RuntimeError("no such device")
        return Talker(self)

    @property
    def asked(self) -> Path:
        return self.folder / "asked.txt"

    @property
    def is_over(self) -> bool:
        return len(self.asked.read_text().splitlines()) >= 4 and not (self.folder / "mended").exists()


class Talker(BatchEngine):
    def __init__(self, build: BuildTalker) -> None:
        super().__init__(build.max_batch_rows)
        self.build = build
        self.about = {
            "engine_version": "1.0", "device": "cpu", "num_gpus": 0, "special_tokens": [], "capacity": 4,
        }  # fmt: skip

    def answer(self, requests: list[Request]) -> list[Answer]:
        if self.build.model == "dies" and self.build.is_over:
            raise RuntimeError("cut")
        with self.build.asked.open("a") as file:
            file.writelines(f"{self.build.model}\n" for _ in requests)
        return [self._say(request) for request in requests]

    def _say(self, request: Request) -> Answer:
        assert request.image is not None
        number = hashlib.sha256(request.image).hexdigest()[:6]
        if request.shape is not None:
            return Answer(
                "ok", json.dumps({"long": f"A long one about {number}.", "tags": [number, "thing"]}), "stop", 9
            )
        text = TEXTS.get(self.build.model, "A thing {} on a mat, a dog with a hat.").format(number)
        if self.build.model == "varied":  # as long as the image has it
            text = " ".join(text.split()[: 3 + int(number, 16) % 8])
        return Answer("ok", text, "length" if self.build.model == "capped" else "stop", TOKENS if text else 0)
