"""Captions of the demo's images held against the scenes that these show, wherever the captions lie."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from clips_data.demo import facts, scenes, web
from clips_data.demo.scenes import Scene

URL_START: Final = f"http://{web.DEMO_HOST}/scenes/"
"""How the URL of every image of the demo world begins."""
_URL: Final = re.compile(re.escape(URL_START) + r"(\d+)/(\d+)\.jpg(?:\?.*)?")


def scene_of(url: str | None) -> Scene | None:
    """The scene that a URL shows, told by the demo's host name; ``None`` for any other URL."""
    match = _URL.fullmatch(url or "")
    return scenes.make_scene(int(match[1]), int(match[2])) if match else None


def scene_named(name: str) -> Scene:
    """The scene of a list's ``scene`` column, ``"<world>/<index>"``."""
    world, index = name.split("/")
    return scenes.make_scene(int(world), int(index))


def judge(captions: Iterable[tuple[str, Scene]]) -> dict[str, Any]:
    """``facts.total`` of the captions, and ``hallucination``: the share of their claims that is not true.

    An empty caption claims nothing and finds nothing.
    """
    found = facts.total(facts.score(caption, scene) for caption, scene in captions)
    precision = found["precision"]
    return {**found, "hallucination": round(1 - precision, 4) if isinstance(precision, float) else None}
