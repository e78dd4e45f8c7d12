"""``clips eval`` as people see it: models beside each other in one table, and beside what others published."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

from . import present
from .facts import ATTRIBUTE, attribute_items, dense_texts, score_run

SHOWN: Final = {
    "text_to_image_r1": "t→i R@1", "text_to_image_r5": "R@5", "text_to_image_r10": "R@10",
    "image_to_text_r1": "i→t R@1", "image_to_text_r5": "R@5 ", "image_to_text_r10": "R@10 ",
    "top1": "top-1", "top5": "top-5", "mean_per_class_recall": "per class",
    "cider": "CIDEr", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "clip_score": "CLIPScore",
    "accuracy": "accuracy", "text_score": "text", "image_score": "image", "group_score": "group",
}  # fmt: skip
"""Figures of the tables, by their names in result files, and their heads."""
TABLE: Final = "table.md"

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model → benchmark → result file."""


def of_run(evaluate: Callable[..., dict[str, Any]], config: Any, run: Path, **asked: Any) -> dict[str, Any]:
    """Scores one run and returns plain figures, those of its captions' facts among them.

    Prints tables where benchmarks or published figures were asked for.
    """
    found = evaluate(config, run=run, derived={"dense": dense_texts}, given=attribute_items, **asked)
    if config.benchmark or config.compare:
        _show({f"run:{run.name}": _read(run / "eval")}, config, quiet=asked["quiet"])
    return found | _of_attributes(found) | score_run(run, quiet=asked["quiet"])


def of_models(config: Any, *, work: Path, out: Path, **asked: Any) -> dict[str, Any]:
    """Scores the config's models and returns plain figures, whose names begin with the model where there are several.

    Prints one table for each benchmark, and writes them to ``table.md`` under ``out``.
    """
    from clips_data.ledger import write_bytes
    from clips_train.encoders import find
    from clips_train.evals.run import evaluate_models, folder_name

    derived = {"dense": dense_texts}
    found = evaluate_models(config, work=work, out=out, derived=derived, given=attribute_items, **asked)
    models = find(config.model, config.pretrained, work / "runs")
    results = {named.name: _read(out / folder_name(named)) for named in models}
    text = _show(results, config, quiet=asked["quiet"])
    write_bytes(out / TABLE, text.encode())
    if len(found) == 1:
        return next(iter(found.values()))
    return {f"{model} {name}": value for model, figures in found.items() for name, value in figures.items()}


def _of_attributes(found: Mapping[str, Any]) -> dict[str, float]:
    """The mean over the attributes that the demo world was asked for, of top-1."""
    top1 = [value for name, value in found.items() if name.startswith(ATTRIBUTE) and name.endswith("_top1")]
    return {"attributes_top1": sum(top1) / len(top1)} if top1 else {}


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    """Benchmark → content of its result file, for all finished ones of a folder."""
    import json

    from clips_data.ledger import finished_units

    found = {}
    for unit in finished_units(folder):
        content = json.loads((folder / f"{unit}.json").read_text(encoding="utf-8"))
        found[content["benchmark"]] = content
    return found


def _show(results: Results, config: Any, *, quiet: bool) -> str:
    """Prints one table for each benchmark that was asked for, and returns them as Markdown."""
    asked = [*(["heldout"] if config.heldout else []), *(benchmark.name for benchmark in config.benchmark)]
    parts = []
    for benchmark in asked:
        lines = lines_of(benchmark, results, compare=config.compare)
        if lines:
            heads = tuple(dict.fromkeys(head for line in lines for head in line))
            about = about_of(benchmark, results, compare=config.compare)
            present.say(f"\n{benchmark}: {about}\n{present.table(lines, heads)}", quiet=quiet)
            cells = [heads, ["---"] * len(heads), *([line.get(head, "") for head in heads] for line in lines)]
            rows = ("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells)
            parts.append("\n".join([f"## {benchmark}", "", f"{about}.", "", *rows]))
    return "\n\n".join(parts) + "\n"


def lines_of(benchmark: str, results: Results, *, compare: bool) -> list[dict[str, str]]:
    """One line for each model: its figures in %, with the half width of their intervals; then the published ones."""
    lines = []
    shown: set[str] = set()
    for model, by_benchmark in results.items():
        if benchmark not in by_benchmark:
            continue
        result = by_benchmark[benchmark]
        scores: Mapping[str, Mapping[str, float]] = result["scores"]
        shown |= scores.keys()
        lines.append(
            {
                "model": model,
                **{head: _with_interval(scores[name]) for name, head in SHOWN.items() if name in scores},
                "resize": result["preprocessing"]["resize_mode"],
                "tokenizer": result["tokenizer"]["name"],
                "source": "measured",
            }
        )
    return lines + (_published(benchmark, shown) if compare and lines else [])


def about_of(benchmark: str, results: Results, *, compare: bool) -> str:
    """What the figures of a table are: of how many images, in which unit, and whether others' are of the same ones."""
    from clips_train.evals import published

    found = [by_benchmark[benchmark] for by_benchmark in results.values() if benchmark in by_benchmark]
    numbers = [result["data"].get("num_images", result.get("num_images")) for result in found]
    known = sorted({number for number in numbers if number is not None})  # pairings of images have no such number
    parts = [f"{' or '.join(map(str, known))} images"] if known else []
    protocol = found[0]["data"].get("num_images_of_protocol")
    if known and protocol not in (None, *known):
        parts[0] += f", of {protocol} in the protocol"
    level = found[0]["interval"]["level"]
    parts.append(f"figures in % ± the larger half of their {100 * level:g} % intervals")
    if compare and not published.rows(benchmark, {name for result in found for name in result["scores"]}):
        parts.append("no published figures are known")
    return "; ".join(parts)


def _with_interval(score: Mapping[str, float]) -> str:
    half = max(score["high"] - score["value"], score["value"] - score["low"])
    return f"{100 * score['value']:.1f} ± {100 * half:.1f}"


def _published(benchmark: str, figures: Collection[str]) -> list[dict[str, str]]:
    from clips_train.evals import published

    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in published.rows(benchmark, figures):
        line = lines.setdefault((row.model, row.source), {"model": row.model, "source": row.source})
        if row.figure in SHOWN:
            line[SHOWN[row.figure]] = f"{100 * row.value:.1f}"
    return list(lines.values())
