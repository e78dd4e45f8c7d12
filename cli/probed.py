"""What the truth of the demo world adds to ``clips probe``: how many facts the language model gets right.

Beside it stands chance: the same captions, each held against another image's scene.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from . import present
from .facts import dense_texts

CAPTIONS, FACTS = "captions.jsonl", "facts.json"
SCORES: Final = ("precision", "recall")


def of_run(probe: Callable[..., dict[str, Any]], config: Any, run: Path, **asked: Any) -> dict[str, Any]:
    """Probes one run and returns plain figures, those of its captions' facts among them, where the truth is known."""
    found = probe(config, run=run, derived={"dense": dense_texts}, **asked)
    return found | score_captions(run / "probe", quiet=asked["quiet"])


def score_captions(folder: Path, *, quiet: bool) -> dict[str, float]:
    """Scores the captions that ``clips probe`` wrote against the scenes' truth.

    Writes ``facts.json``, prints precision and recall of every kind of fact, and returns those of all facts, by chance
    and by kind. Empty when the samples do not come from the demo world.
    """
    from clips_data.demo import facts, truth
    from clips_data.ledger import write_json

    rows = [json.loads(line) for line in (folder / CAPTIONS).read_text(encoding="utf-8").splitlines()]
    shown = [(row, truth.scene_named(row["extra"]["scene"])) for row in rows if row["extra"].get("scene") is not None]
    if not shown:
        return {}
    scenes = [scene for _, scene in shown]
    found = truth.judge((row["caption"], scene) for row, scene in shown)
    chance = truth.judge(
        (row["caption"], scene) for (row, _), scene in zip(shown, scenes[1:] + scenes[:1], strict=True)
    )
    exact = sum(row["caption"] == row["reference"] for row, _ in shown)
    write_json(folder / FACTS, {"exact_captions": exact, "found": found, "chance": chance})
    kinds = {"all": found, **{kind: found["kinds"][kind] for kind in (*facts.HEADLINE, *facts.OTHER)}}
    by_chance = {"all": chance, **chance["kinds"]}
    lines = [_line(kind, kinds[kind], by_chance[kind]) for kind in kinds]
    present.say(f"probe: facts in {len(shown)} of {len(rows)} captions, {exact} of them exactly the text", quiet=quiet)
    present.say(present.table(lines, tuple(lines[0])), quiet=quiet)
    return {
        **_figures("fact", found),
        **_figures("chance_fact", chance),
        **{name: figure for kind in facts.HEADLINE for name, figure in _figures(kind, found["kinds"][kind]).items()},
    }


def _figures(start: str, total: Mapping[str, Any]) -> dict[str, float]:
    return {f"{start}_{score}": figure for score in SCORES if isinstance(figure := total[score], float)}


def _line(kind: str, total: Mapping[str, Any], by_chance: Mapping[str, Any]) -> dict[str, str]:
    shown = {score: present.figure(total[score]) for score in SCORES}
    chance = {f"{score} by chance": present.figure(by_chance[score]) for score in SCORES}
    return {"facts": kind, **shown, **chance, "claims": str(total["claims"]), "true facts": str(total["facts"])}
