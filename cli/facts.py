"""Demo world only: how many facts our captioner gets right, beside the MLLM whose captions it learned from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import present

CAPTIONS, FACTS = "captions.jsonl", "facts.json"


def score_run(run: Path, *, quiet: bool) -> dict[str, float]:
    """Scores the captions that ``eval`` wrote, and the MLLM's of the same images, against the scenes' truth.

    Writes ``eval/facts.json``, prints both side by side, and returns precision and recall of each. Empty when the
    samples do not come from the demo world. A missing caption counts as one that found nothing.
    """
    from clips_data.demo import facts, scenes
    from clips_data.ledger import write_json

    path = run / "eval" / CAPTIONS
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    scores: dict[str, list[Any]] = {"mllm": [], "clips": []}
    for row in rows:
        place = row["extra"].get("scene")
        if place is not None:
            world, index = (int(part) for part in place.split("/"))
            scene = scenes.make_scene(world, index)
            scores["mllm"].append(facts.score(row["synthetic"], scene))
            scores["clips"].append(facts.score(row["caption"], scene))
    if not scores["clips"]:
        return {}
    totals = {name: facts.total(each) for name, each in scores.items()}
    num_captions = len(scores["clips"])
    write_json(run / "eval" / FACTS, {"num_captions": num_captions, **totals})
    shown = [{"captioner": name, **_figures(total)} for name, total in totals.items()]
    present.say(f"eval: facts in {num_captions} of {len(rows)} captions", quiet=quiet)
    columns = dict.fromkeys(name for row in shown for name in row)
    present.say(present.table(shown, tuple(columns)), quiet=quiet)
    return {
        f"{name}_fact_{key}": figure
        for name, total in totals.items()
        for key in ("precision", "recall")
        if isinstance(figure := total[key], float)
    }


def _figures(total: Mapping[str, Any]) -> dict[str, str]:
    return {key: present.figure(value) for key, value in total.items() if isinstance(value, int | float)}
