"""The report's evaluations: tables of figures with intervals, and the queries that were missed by most."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clips_data import ledger, report_charts
from clips_data import report_html as h
from clips_data.errors import UserError
from clips_data.report_gallery import Sample
from clips_data.report_pictures import Budget, caption_or, card, thumbnail

FOLDER: Final = "evals"
"""Under the work folder: results of models that are no run's, a folder each."""
MISSES_SHOWN: Final = 8
FIRST_SHOWN: Final = 3
_SHARDS: Final = "shards"
_OWN_UNITS: Final = (
    "cider", "bleu", "rouge", "clip_score", "distinct", "mean_tokens", "meteor", "spice",
)  # fmt: skip
_WAYS: Final = (("text_to_image", "Text → image"), ("image_to_text", "Image → text"))
_HEADLINES: Final = {
    name: place
    for place, name in enumerate(("text_to_image_r1", "top1", "cider", "accuracy", "group_score", "image_to_text_r1"))
}
_DIGITS: Final = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Result:
    """One model's figures on one benchmark."""

    model: str
    about: Mapping[str, Any]
    of_run: bool
    """Whether it is the run that the page is about."""

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        found: Mapping[str, Mapping[str, float]] = self.about["scores"]
        return found


def read(run: Path, work: Path) -> tuple[dict[str, Any], list[Result]]:
    """What ``clips eval`` wrote for this run, by file name, and all results with intervals, other models' included."""
    files = _json_files(run / "eval")
    results = [Result(run.name, about, True) for about in files.values() if _is_result(about)]
    for folder in sorted((work / FOLDER).glob("*")):
        others = _json_files(folder) if folder.is_dir() else {}
        results += [Result(_model_of(about, folder), about, False) for about in others.values() if _is_result(about)]
    return {name: about for name, about in files.items() if not _is_result(about)}, results


def render(results: list[Result]) -> str:
    """One table for each benchmark, all models that were measured on it beside each other."""
    if not results:
        return ""
    by_benchmark: dict[str, list[Result]] = {}
    for result in results:
        by_benchmark.setdefault(str(result.about.get("benchmark")), []).append(result)
    shown = [_table(name, some) for name, some in sorted(by_benchmark.items())]
    interval = results[0].about.get("interval", {})
    level = f"{100 * interval['level']:g} % " if "level" in interval else ""
    how = f" ({h.text(interval['method'])})" if "method" in interval else ""
    intro = (
        f'<p class="soft">The line is the {level}interval{how}, the dot the figure, the dashes what random answers '
        "score.</p>"
    )
    return f'<h2 id="evaluations">Evaluations</h2>{intro}{"".join(shown)}'


def _table(benchmark: str, results: list[Result]) -> str:
    several = len(results) > 1 or not results[0].of_run  # a figure of another model is never taken for the run's
    shares = any(_is_share(name) for result in results for name in result.scores)
    model, picture = ["<model"] if several else [], ["<0 to 1"] if shares else []
    head = ["figure", *model, "value", "low", "high", *picture, "chance"]
    rows = []
    for name in sorted({name for result in results for name in result.scores}, key=_place):
        share = _is_share(name)
        for result in results:
            if (one := result.scores.get(name)) is None:
                continue
            value, low, high, chance = (one.get(key) for key in ("value", "low", "high", "chance"))
            assert value is not None and low is not None and high is not None
            figures = [h.percent(number) if share else h.number(number) for number in (value, low, high)]
            pictures = [report_charts.interval(value, low, high, chance) if share else ""] if shares else []
            shown = "–" if chance is None else h.percent(chance) if share else h.number(chance)
            rows.append([_label(name), *([h.text(result.model)] if several else []), *figures, *pictures, shown])
    by_told: dict[str, list[str]] = {}
    for result in results:
        by_told.setdefault(_told(result.about), []).append(result.model)
    told = [f"{', '.join(models)}: {about}" if len(by_told) > 1 else about for about, models in by_told.items()]
    return h.table(head, rows, caption=f"{benchmark}: {'; '.join(told)}")


def _told(about: Mapping[str, Any]) -> str:
    """How the figures were made, without which they mean nothing."""
    data, preprocessing, tokenizer = (about.get(name) or {} for name in ("data", "preprocessing", "tokenizer"))
    counted = {name: number for name, number in sorted((about.get("counts") or {}).items()) if number}
    counts = [f"{number} {name.replace('_', ' ').replace('.', ' ')}" for name, number in counted.items()]
    facts = [
        str(about["task"]) if about.get("task") not in (None, about.get("benchmark")) else "",
        ", ".join(counts),
        " ".join(str(data[name]) for name in ("format", "split") if data.get(name)),
        f"images {preprocessing['resize_mode']}" if preprocessing.get("resize_mode") else "",
        f"tokenizer {tokenizer['name']}" if tokenizer.get("name") else "",
    ]
    return " · ".join(fact for fact in facts if fact)


def _is_share(name: str) -> bool:
    return not name.startswith(_OWN_UNITS)


def _label(name: str) -> str:
    for way, label in _WAYS:
        queries, found, k = name.partition(f"{way}_r")
        if found:
            return f"{h.text(queries.replace('_', ' '))} {label} R@{h.text(k)}".strip()
    return h.text(name.replace("_", " "))


def _place(name: str) -> list[Any]:
    """R@5 before R@10."""
    return [int(piece) if number % 2 else piece for number, piece in enumerate(_DIGITS.split(name))]


def tiles(results: list[Result]) -> list[str]:
    """The first figure of each of this run's benchmarks."""
    found = []
    for result in results:
        if not (result.scores and result.of_run):
            continue
        name, one = min(result.scores.items(), key=lambda item: _HEADLINES.get(item[0], len(_HEADLINES)))
        share = _is_share(name)
        shown, low, high = (h.percent(one[key]) if share else h.number(one[key]) for key in ("value", "low", "high"))
        found.append(h.tile(shown, f"{_label(name)}, {result.about.get('benchmark')} ({low} to {high})"))
    return found


# --- files ------------------------------------------------------------------------------------------------------------


def _json_files(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(ledger.SIDECAR):
            continue
        try:
            found[path.name] = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}). Run `clips eval` again.") from None
    return found


def _is_result(about: Any) -> bool:
    scores = about.get("scores") if isinstance(about, dict) else None
    return isinstance(scores, dict) and all(
        isinstance(one, dict) and {"value", "low", "high"} <= set(one) for one in scores.values()
    )


def _model_of(about: Mapping[str, Any], folder: Path) -> str:
    return str((about.get("model") or {}).get("model") or folder.name)


# --- the old form -----------------------------------------------------------------------------------------------------


def recalls(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, scores) of everything in an eval file that holds recalls without intervals."""
    if not isinstance(value, dict):
        return
    if isinstance(by_queries := value.get("retrieval_by_queries"), dict):  # "retrieval" is the first of them
        yield from ((f"queries: {queries}", found) for queries, found in by_queries.items())
        return
    if "text_to_image_r1" in value:
        yield name, value
    for key, inner in value.items():
        yield from recalls(inner, key)


def render_recalls(scores: Mapping[str, Any]) -> str:
    shown = []
    for name, found in recalls(dict(scores)):
        rows = []
        for way, label in _WAYS:
            cells = [h.text(label)]
            for k in (1, 5, 10):
                recall, chance = found.get(f"{way}_r{k}"), found.get(f"chance_{way}_r{k}")
                beside = f" <small>chance {h.percent(chance)}</small>" if chance is not None else ""
                cells.append(h.percent(recall) + beside if recall is not None else "–")
            rows.append(cells)
        sizes = [
            f"{key.removeprefix('num_')}: {value}" for key, value in sorted(found.items()) if key.startswith("num_")
        ]
        about = ", ".join([name.removesuffix(".json"), *sizes])
        shown.append(h.table(["", "R@1", "R@5", "R@10"], rows, caption=about))
    return '<h2 id="retrieval">Retrieval on held-out samples</h2>' + "".join(shown) if shown else ""


# --- misses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Miss:
    """A text whose own image came late: which image that is, its rank from 1, and what came first."""

    benchmark: str
    text: str
    key: str
    rank: float
    first: tuple[str, ...]
    in_shards: bool
    """Whether keys are those of samples; other data sets may have keys that look the same."""


def misses(results: list[Result]) -> list[Miss]:
    """The run's hardest queries, the worst rank first."""
    found = []
    for result in results:
        listed = (result.about.get("details") or {}).get("hardest") or []
        for one in listed if result.of_run else []:
            first = tuple(map(str, one["first"][:FIRST_SHOWN]))
            in_shards = (result.about.get("data") or {}).get("format", _SHARDS) == _SHARDS
            benchmark = str(result.about.get("benchmark"))
            found.append(Miss(benchmark, str(one["text"]), str(one["key"]), float(one["rank"]), first, in_shards))
    return sorted(found, key=lambda miss: (-miss.rank, miss.key, miss.text))[:MISSES_SHOWN]


def keys_of(found: Sequence[Miss]) -> set[str]:
    """Of all images that are shown with these misses and that shards can have."""
    return {key for miss in found if miss.in_shards for key in (miss.key, *miss.first)}


def render_misses(found: Sequence[Miss], samples: Mapping[str, Sample], budget: Budget) -> str:
    """Each query with the image it is of, and the images that came first."""
    if not found:
        return ""
    small = Budget(min(budget.px, 160), budget.quality)
    cards = []
    for miss in found:
        pictures = samples if miss.in_shards else {}
        right = pictures.get(miss.key)
        first = "".join(_first(key, pictures, small) for key in miss.first)
        where = f"above, at rank {miss.rank:g}"
        entries = [
            ("Query", caption_or(miss.text, "none")),
            ("Its image", f'{where} <span class="soft">({h.text(miss.key)}, {h.text(miss.benchmark)})</span>'),
            ("Came first", f'<div class="first">{first}</div>'),
        ]
        picture = thumbnail(right.image, miss.text, budget) if right else _absent(miss.key)
        cards.append(card(picture, entries, key=right.key if right else "", sha256=right.sha256 if right else ""))
    intro = "Texts whose own image came latest. A miss is the model's, or a caption's that fits other images as well."
    head = f'<h2 id="misses">Hardest misses</h2><p class="soft">{intro}</p>'
    return f'{head}<div class="gallery">{"".join(cards)}</div>'


def _first(key: str, samples: Mapping[str, Sample], budget: Budget) -> str:
    return thumbnail(samples[key].image, key, budget) if key in samples else f"<code>{h.text(key)}</code> "


def _absent(key: str) -> str:
    return f'<p class="absent soft">{h.text(key)} is not in these shards, so there is no picture of it.</p>'
