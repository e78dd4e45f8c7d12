"""What the truth of the demo world adds to ``clips eval``: dense queries, and how many facts our captioner gets right.

It is shown beside the MLLM whose captions it learned from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import present

CAPTIONS, FACTS = "captions.jsonl", "facts.json"


def dense_texts(about: Mapping[str, Any]) -> list[str] | None:
    """The true description of the scene that a sample shows, from its ``.json`` member; ``None`` for other worlds."""
    from clips_data.demo import scenes, truth

    scene = (about.get("extra") or {}).get("scene")
    return None if scene is None else [scenes.describe(truth.scene_named(scene))]


def score_run(run: Path, *, quiet: bool) -> dict[str, float]:
    """Scores the captions that ``eval`` wrote, and the MLLM's of the same images, against the scenes' truth.

    Writes ``eval/facts.json``, prints both side by side, and returns precision and recall of each. Empty when the
    samples do not come from the demo world. A missing caption counts as one that found nothing.
    """
    from clips_data.demo import truth
    from clips_data.ledger import write_json

    path = run / "eval" / CAPTIONS
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    shown = [(row, truth.scene_named(row["extra"]["scene"])) for row in rows if row["extra"].get("scene") is not None]
    if not shown:
        return {}
    columns = {"mllm": "synthetic", "clips": "caption"}
    totals = {name: truth.judge((row[column], scene) for row, scene in shown) for name, column in columns.items()}
    num_captions = len(shown)
    write_json(run / "eval" / FACTS, {"num_captions": num_captions, **totals})
    lines = [{"captioner": name, **_figures(total)} for name, total in totals.items()]
    present.say(f"eval: facts in {num_captions} of {len(rows)} captions", quiet=quiet)
    heads = dict.fromkeys(name for line in lines for name in line)
    present.say(present.table(lines, tuple(heads)), quiet=quiet)
    return {
        f"{name}_fact_{key}": figure
        for name, total in totals.items()
        for key in ("precision", "recall")
        if isinstance(figure := total[key], float)
    }


def _figures(total: Mapping[str, Any]) -> dict[str, str]:
    return {key: present.figure(value) for key, value in total.items() if isinstance(value, int | float)}
