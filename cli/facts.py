"""What the truth of the demo world adds to ``clips eval``: dense queries, classes for zero-shot classification, and how
many facts our captioner gets right, beside the MLLM whose captions it learned from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import present

if TYPE_CHECKING:
    from clips_train.evals.items import DataSet
    from clips_train.use_config import Benchmark

CAPTIONS, FACTS = "captions.jsonl", "facts.json"
ATTRIBUTE = "demo-"
"""How the names of benchmarks begin that ask for an attribute of the demo's scenes."""


def dense_texts(about: Mapping[str, Any]) -> list[str] | None:
    """The true description of the scene that a sample shows, from its ``.json`` member; ``None`` for other worlds."""
    from clips_data.demo import scenes, truth

    scene = (about.get("extra") or {}).get("scene")
    return None if scene is None else [scenes.describe(truth.scene_named(scene))]


def attribute_items(benchmark: Benchmark) -> DataSet | None:
    """The held-out scenes of shards with the class that each truly has: ``demo-colour`` asks for the colour of most of
    its objects, and so on through ``clips_data.demo.attributes``; ``None`` for benchmarks of other names.

    Raises ``UserError`` for an attribute that the demo does not ask for, and for shards of another world.
    """
    from clips_data.demo import attributes, truth
    from clips_data.errors import UserError, did_you_mean
    from clips_train.evals import format_labelled

    if not benchmark.name.startswith(ATTRIBUTE):
        return None
    name = benchmark.name.removeprefix(ATTRIBUTE)
    if name not in attributes.QUESTIONS:
        known = [f"{ATTRIBUTE}{known}" for known in attributes.QUESTIONS]
        raise UserError(f"The demo world has no benchmark {benchmark.name!r}. {did_you_mean(benchmark.name, known)}")
    question = attributes.QUESTIONS[name]

    def answer(about: Mapping[str, Any]) -> str | None:
        scene = (about.get("extra") or {}).get("scene")
        return None if scene is None else question.answer(truth.scene_named(scene))

    about = {"question": question.asks, "classes": "values of the demo world"}
    return format_labelled.open(benchmark, answer, question.classes, question.templates, about)


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
