"""Measures the demo's captioner through vLLM on scenes it has not seen, and writes its model card.

python -m clips_data.demo.measure clips_data/demo/weights/captioner
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from clips_data import ledger
from clips_data.demo import facts, scenes, tasks, tasks_measure
from clips_data.demo.scenes import Scene
from clips_data.demo.tasks_measure import Answered
from clips_data.recaption.engine_process import EngineProcess
from clips_data.recaption.vllm import BuildVllm

UNSEEN_WORLD = 7002
CARD: Final = """---
license: apache-2.0
pipeline_tag: image-text-to-text
---
# The demo captioner of clips

A LLaVA-architecture model (CLIP-style ViT of 96 px and patch 16, two-layer projector, Llama) of {parameters:.2f} M
parameters in bf16, in the Hugging Face layout that vLLM and transformers load. It captions the procedural scenes of
`clips_data.demo.scenes` and nothing else, as the packaged prompts of `clips recaption` ask. It exists so that every
stage of clips, and every recipe, can run for real without a download.

## How it was made

@@MADE@@

`clips_data.demo.tasks` holds what it was taught: each packaged prompt in its own words, rendered as `clips recaption`
renders it, with the answer that the scene's truth gives. A web text is taken up only where the picture, or the caption
to be fused with it, bears it out: rightly named things get the definite article, and what is sold as wall art is called
that. Advertisements, markup and other pages' captions leave no trace. A rewrite does not see the picture and keeps
what the web text says.

## What was measured

`python -m clips_data.demo.measure FOLDER`: scenes of a world never trained on, as JPEG, captioned by {engine} with the
packaged prompts' own decoding, and cleaned as `clips recaption` cleans.

### Describe, greedy

{num_captions} scenes. A fact is (object, attribute, value) or a relation between neighbours in reading order; precision
counts every claim made, recall every fact there is. The description of another scene scores 0.36 and 0.34.

| kind | precision | of claims | recall | of facts |
|---|---|---|---|---|
{rows}

{exact} of {num_captions} captions are exactly the reference description.

### Each instruction

{num_each} scenes, all gates open, so that wrong pairs and advertisements are seen too. Precision counts claims against
the scene (those of a rewrite against its web text); recall counts the facts of the answer that was taught. A negative
is meant to be false. *As taught* counts answers that are the taught one to the letter, which sampled ones need not be.

| instruction | prompt | precision | of claims | recall | of facts | as taught | |
|---|---|---|---|---|---|---|---|
{prompts}

## Limits

It knows eight shapes, eight colours, two sizes, three textures and four backgrounds on a three by three grid, the web
texts of that world, and the instructions above in the very words of the packaged prompts. On any other picture it
describes such a scene all the same; to other words it answers as if they were some prompt that it knows.
"""


def measure(folder: Path, num_scenes: int, num_scenes_each: int) -> dict[str, Any]:
    """Fact precision and recall of the captions that vLLM generates with the model in ``folder``.

    The packaged prompt ``describe`` is measured on ``num_scenes``, all others on ``num_scenes_each`` of them. Where a
    prompt reads the column ``synthetic``, it is what the model itself said to ``describe``.
    """
    world = [scenes.make_scene(UNSEEN_WORLD, i) for i in range(num_scenes)]
    with tempfile.TemporaryDirectory() as log:
        engine = EngineProcess(BuildVllm(str(folder.resolve())), log=Path(log) / "engine.log", deadline_s=3600)
        engine.start()
        try:
            described = tasks_measure.ask(engine, tasks.task_of("describe"), world, [""] * num_scenes)
            synthetic = [one.caption for one in described][:num_scenes_each]
            by_prompt = dict(_all_figures(engine, world[:num_scenes_each], synthetic))
        finally:
            engine.close()
    total = facts.total(facts.score(one.caption, one.given.scene) for one in described)
    exact = sum(one.caption == one.taught for one in described)
    about = {"exact_captions": exact, "engine": f"vllm {engine.about['engine_version']}"}
    digests = {task.prompt: tasks.prompt_of(task).digest for task in tasks.TASKS}
    return {**total, **about, "prompts": by_prompt, "prompt_digests": digests}


def _all_figures(
    engine: EngineProcess, world: Sequence[Scene], synthetic: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """``prompt`` or ``prompt.field`` → its figures."""
    for task in tasks.TASKS:
        fields: dict[str, list[Answered]] = {}
        for one in tasks_measure.ask(engine, task, world, synthetic):
            fields.setdefault(one.field, []).append(one)
        for field, answered in fields.items():
            name = f"{task.prompt}.{field}" if field else task.prompt
            yield name, {"instruction": task.instruction, **tasks_measure.measure(task, answered)}


def card(measured: dict[str, Any], num_parameters: int) -> str:
    kinds = {"all of these six": measured, **measured["kinds"]}
    order = [*facts.HEADLINE, "all of these six", *facts.OTHER]
    rows = [
        f"| {name} | {kinds[name]['precision']:.4f} | {kinds[name]['claims']} "
        f"| {kinds[name]['recall']:.4f} | {kinds[name]['facts']} |"
        for name in order
    ]
    return CARD.format(
        parameters=num_parameters / 1e6,
        num_captions=measured["num_captions"],
        num_each=max(figures["num_captions"] for figures in measured["prompts"].values()),
        engine=measured["engine"],
        rows="\n".join(rows),
        exact=measured["exact_captions"],
        prompts="\n".join(_row(name, figures) for name, figures in measured["prompts"].items()),
    )


def _row(name: str, figures: dict[str, Any]) -> str:
    notes = []
    if "false" in figures:
        notes.append(f"{figures['false']} false, by {figures['false_claims_each']} claims each")
    if "named" in figures:
        notes.append(
            f"alt-text: {figures['taken_up']} of {figures['named']} taken up, {figures['taken_up_unnamed']} more"
        )
    if figures["rejected"]:
        notes.append(f"{figures['rejected']} rejected")
    precision, recall = (_share(figures[kind]) for kind in ("precision", "recall"))
    return (
        f"| {figures['instruction']} | {name} | {precision} | {figures['claims']} | {recall} | {figures['asked']} "
        f"| {figures['as_taught']} | {'; '.join(notes)} |"
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num-scenes", type=int, default=500, help="for the prompt describe")
    parser.add_argument("--num-scenes-each", type=int, default=200, help="for each of the other prompts")
    options = parser.parse_args()
    from safetensors import safe_open

    measured = measure(options.folder, options.num_scenes, options.num_scenes_each)
    with safe_open(options.folder / "model.safetensors", "numpy") as weights:
        num_parameters = sum(_size(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    ledger.write_json(options.folder / "measured.json", measured)
    ledger.write_bytes(options.folder / "README.md", card(measured, num_parameters).encode())
    print(json.dumps(measured, indent=1))


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


if __name__ == "__main__":
    main()
