"""The report's filters: how many samples each removed, and some of them to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clips_data import joined, ledger, pick_sources, schema, shard_index
from clips_data import report_html as h
from clips_data.dataset_card import RARE
from clips_data.report_pictures import Budget, caption_or, card, thumbnail

SHOWN: Final = 3


@dataclass(frozen=True)
class Example:
    """A pair that a filter removed."""

    key: str
    sha256: str
    image: bytes
    captions: dict[str, str]
    scores: dict[str, float]


def examples(work: Path) -> dict[str, list[Example]]:
    """Some of the pairs that each filter removed, as ``pairs/`` has them now; those forgotten since are left out."""
    named: dict[str, list[str]] = {}
    for generation in shard_index.finished(work / schema.SHARDS):
        for name, keys in generation.examples:
            named[name] = [*named.get(name, []), *keys][:SHOWN]
    wanted = {key for keys in named.values() for key in keys}
    finished = set(ledger.finished_units(work / schema.PAIRS))
    units = sorted({key[: schema.SHARD_DIGITS] for key in wanted} & finished)
    if not units:
        return {}
    source = pick_sources.open_source(work)
    found: dict[str, Example] = {}
    for unit in units:
        table = source.table(unit)
        rows = table.filter(table["key"].is_in(sorted(wanted)))
        images = source.images(unit, rows["key"].to_list())
        for row in rows.iter_rows(named=True):
            captions = {column: row[column]["caption"] for column in source.columns}
            numbers = {name: value for name, value in (row.get(joined.SCORE) or {}).items() if isinstance(value, float)}
            found[row["key"]] = Example(row["key"], row["sha256"], images[row["key"]].data, captions, numbers)
    return {name: [found[key] for key in keys if key in found] for name, keys in named.items()}


def render(counts: Mapping[str, Any], found: Mapping[str, list[Example]], budget: Budget) -> str:
    """What each filter removed of what the ones before it had left. Nothing where there was no filter."""
    shards = counts.get("shards", {})
    if not shards.get("removed"):
        return ""
    left = shards["attempted"] + sum(shards["removed"].values())
    rows, shown = [], []
    for name, number in shards["removed"].items():
        if not number and name.endswith(RARE):
            continue
        rows.append([f"<code>{h.text(name)}</code>", h.number(number), h.number(left), h.percent(number, left)])
        left -= number
        if some := found.get(name):
            cards = "".join(_card(example, budget) for example in some)
            head = f"<code>{h.text(name)}</code> <span class='soft'>{len(some)} of {h.number(number)}</span>"
            shown.append(f'<h3 class="removed">{head}</h3><div class="gallery small">{cards}</div>')
    about = "Each counts among what the ones before it had left"
    table = h.table(["filter", "removed", "of", "share"], rows, caption=about)
    return '<h2 id="filters">Filters</h2>' + table + "".join(shown)


def _card(example: Example, budget: Budget) -> str:
    entries = [(f"{name} caption", caption_or(text, "none")) for name, text in example.captions.items()]
    similar = [f"{name} {value:.3f}" for name, value in sorted(example.scores.items())]
    entries.append(("Sample", h.bar_figures([example.key, *similar])))
    return card(thumbnail(example.image, next(iter(example.captions.values()), ""), budget), entries)
