"""Demo world only: how many facts our captioner gets right, beside the MLLM whose captions it learned from."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from . import present

CAPTIONS, FACTS = "captions.jsonl", "facts.json"
SYNTHETIC: Final = "synthetic"


def score_run(run: Path, shards: Path, *, quiet: bool) -> dict[str, float]:
    """Scores the captions that ``eval`` wrote, and the MLLM's for the same images, against the scenes' truth.

    Writes ``eval/facts.json``, prints both side by side, and returns precision and recall of each. Empty
    when the shards do not come from the demo world. A missing caption counts as one that found nothing.
    """
    from clips_data.demo import facts, scenes
    from clips_data.ledger import write_json

    path = run / "eval" / CAPTIONS
    if not path.is_file():
        return {}
    ours = {row["key"]: row["caption"] for row in map(json.loads, path.read_text().splitlines())}
    scores: dict[str, list[Any]] = {"mllm": [], "clips": []}
    for about in heldout_samples(shards):
        place = about["extra"].get("scene")
        if place is None or about["key"] not in ours:
            continue
        world, index = (int(part) for part in place.split("/"))
        scene = scenes.make_scene(world, index)
        scores["mllm"].append(facts.score(about[SYNTHETIC], scene))
        scores["clips"].append(facts.score(ours[about["key"]], scene))
    if not scores["clips"]:
        return {}
    totals = {name: facts.total(each) for name, each in scores.items()}
    num_captions = len(scores["clips"])
    write_json(run / "eval" / FACTS, {"num_captions": num_captions, **totals})
    rows = [{"captioner": name, **_figures(total)} for name, total in totals.items()]
    present.say(f"eval: facts in {num_captions} of {len(ours)} captions", quiet=quiet)
    present.say(present.table(rows, ("captioner", *_figures(totals["clips"]))), quiet=quiet)
    return {
        f"{name}_fact_{key}": figure
        for name, total in totals.items()
        for key in ("precision", "recall")
        if isinstance(figure := total[key], float)
    }


def _figures(total: Mapping[str, Any]) -> dict[str, str]:
    return {key: present.figure(value) for key, value in total.items() if isinstance(value, int | float)}


def heldout_samples(shards: Path) -> Iterator[dict[str, Any]]:
    """The ``.json`` members of the held-out shards that ``index.json`` names."""
    index = json.loads((shards / "index.json").read_text())
    for shard in index["splits"].get("heldout", {"shards": []})["shards"]:
        with tarfile.open(shards / shard["file"]) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield json.load(content)
