"""The report's funnel: from the URLs that were tried to the samples that were trained on, every loss with its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clips_data import duplicates, ledger, measure, report_charts, schema, shard_index
from clips_data import report_html as h
from clips_data.report_charts import Bar
from clips_data.shard_plan import HELDOUT, TRAIN


@dataclass
class Step:
    """What is left after one step, of how many, and what became of the others."""

    label: str
    number: int
    of: int
    losses: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    side: bool = False
    """A table beside the samples' way: a sample without this caption or score goes on all the same."""


def render(counts: Mapping[str, Any], work: Path, run: Path, metrics: list[dict[str, Any]]) -> str:
    """Bars and a table of all steps that there are; nothing where there is none."""
    found = steps(counts, work, run, metrics)
    if not found:
        return ""
    whole = found[0].number
    rows = [
        Bar(step.label, step.number, step.of, f"{h.number(step.number)} · {h.percent(step.number, whole)}", step.side)
        for step in found
    ]
    about = "; ".join(f"{step.label} {step.number}" for step in found)
    legend = (
        '<p class="legend">Percentages are of the first bar. Red was lost at that step. Pale bars are tables beside '
        "the way: a sample that lacks one goes on.</p>"
    )
    return f'<h2 id="funnel">From URLs to trained samples</h2>{legend}{report_charts.bars(rows, about)}{_table(found)}'


def _table(found: list[Step]) -> str:
    rows = []
    for step in found:
        rows.append([f"<b>{h.text(step.label)}</b>", h.number(step.number), *_share(step.number, step.of)])
        rows += [
            [f'<span class="loss">{h.text(name)}</span>', f"− {h.number(number)}", *_share(number, step.of)]
            for name, number in step.losses.items()
        ]
    notes = "".join(f"<li>{h.text(step.label)}: {h.text(note)}</li>" for step in found for note in step.notes)
    told = f'<ul class="notes">{notes}</ul>' if notes else ""
    return h.table(["step, and what was lost at it", "number", "of", "share"], rows) + told


def _share(part: int, whole: int) -> list[str]:
    return [h.number(whole), h.percent(part, whole)]


def steps(counts: Mapping[str, Any], work: Path, run: Path, metrics: list[dict[str, Any]]) -> list[Step]:
    """All steps that the files tell of, in order."""
    found = []
    if download := counts.get("download"):
        asked = download["attempted"]
        tried = Step("URLs tried", asked, asked)
        if not_asked := download["rows"] - asked:
            tried.notes.append(f"{not_asked} further rows of the list were not asked for: repeated or forgotten")
        found += [tried, Step("Pairs of image and text", download["succeeded"], asked, dict(download["failures"]))]
    found += [
        Step(f"With a {name} caption", about["succeeded"], about["attempted"], dict(about["failures"]), side=True)
        for name, about in counts.get("captions", {}).items()
    ]
    of = counts.get("download", {}).get("succeeded")
    found += [
        Step(f"Scored by {name}", about["rows"], max(of or 0, about["rows"]), side=True)
        for name, about in counts.get("scores", {}).items()
    ]
    if shards := counts.get("shards"):
        found += _sharded(shards, work, of)
        found += _trained(shards, work, run, metrics)
    return found


def _sharded(shards: Mapping[str, Any], work: Path, num_pairs: int | None) -> list[Step]:
    folder = work / schema.SHARDS
    made = shard_index.finished(folder)
    num_rows = sum(generation.num_rows for generation in made)
    if not made or not num_rows:  # adopted, or made before this was counted
        return [_in_shards(shards, shards["attempted"])]
    given = Step("Given to the filters", num_rows, max(num_pairs or 0, num_rows))
    if missing := given.of - num_rows:
        units = [unit for generation in shard_index.generations(folder) for unit in generation]
        pairs = work / schema.PAIRS
        there = [unit for unit in units if ledger.read_sidecar(pairs, unit, check_files=False) is not None]
        left_out = duplicates.left_out(pairs, there) if len(there) == len(units) else {}
        repeats = min(missing, sum(len(keys) for keys in left_out.values()))
        others = "in shards of pairs that these were not made from"
        losses = {"image repeats an earlier one": repeats, others: missing - repeats}
        given.losses = {name: number for name, number in losses.items() if number}
    removed = {f"removed by {name}": number for name, number in shards["removed"].items() if number}
    kept = Step("Kept by the filters", num_rows - sum(removed.values()), num_rows, removed)
    if not shards["removed"]:
        kept.notes.append("no filter was set")
    return [*([given] if missing else []), kept, _in_shards(shards, kept.number)]


def _in_shards(shards: Mapping[str, Any], of: int) -> Step:
    dropped = sum(shards["failures"].values())
    losses = {"no usable caption in any column": dropped} if dropped else {}
    if rest := of - shards["succeeded"] - dropped:
        losses["gone from the shards since"] = rest
    return Step("In shards", shards["succeeded"], of, losses)


def _trained(shards: Mapping[str, Any], work: Path, run: Path, metrics: list[dict[str, Any]]) -> list[Step]:
    """What the run drew. Its counts are of draws, of which a sample has several."""
    num_train, total = shards["splits"].get(TRAIN, 0), shards["succeeded"]
    heldout = shards["splits"].get(HELDOUT, 0)
    split = Step("To train on", num_train, total, {"held out for evaluation": heldout} if heldout else {})
    if not metrics or not num_train:
        return [split]
    draws = int(metrics[-1].get("samples", 0))
    seen = min(draws, num_train)
    trained = Step("Seen in training", seen, num_train, {"not drawn yet": num_train - seen} if seen < num_train else {})
    each = f", {draws / num_train:.3g} for each on average" if draws > num_train else ""
    trained.notes.append(
        f"{draws} draws from {num_train} samples{each}; an epoch leaves out its last, incomplete batch"
    )
    told = metrics[-1].get("counts", {})
    bad = {name.removeprefix("bad."): number for name, number in told.items() if name.startswith("bad.")}
    for name, number in measure.by_number(bad).items():
        trained.notes.append(f"{number} of {told['loaded']} draws gave way to another sample: {name}")
    if (digest := _digest_of(run)) not in (None, _digest_now(work)):
        trained.notes.append(f"the run was trained on shards of another digest ({str(digest)[:12]}) than those here")
    return [split, trained]


def _digest_of(run: Path) -> str | None:
    """Of the shards that the run has been trained on."""
    sidecar = ledger.read_sidecar(run, "train", check_files=False)
    if sidecar is not None:
        return sidecar.inputs.get("shards")
    begun = run / "begun.jsonl"
    lines = begun.read_text().splitlines() if begun.exists() else []
    return str(json.loads(lines[0])["shards"]) if lines else None


def _digest_now(work: Path) -> str | None:
    return (shard_index.read(work / schema.SHARDS) or {}).get("digest")
