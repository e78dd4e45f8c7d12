"""``clips report``: one static page that tells the story of a run. It holds its images and loads nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Final

from clips_data import (
    ledger,
    report_about,
    report_captions,
    report_charts,
    report_evals,
    report_filters,
    report_funnel,
    report_gallery,
    report_marks,
    report_pictures,
    report_texts,
    schema,
    stats,
)
from clips_data import report_html as h
from clips_data.config import ReportConfig
from clips_data.errors import UserError, did_you_mean
from clips_data.executor import Job, Report
from clips_data.report_pictures import Budget

PAGE: Final = "report.html"
CAPTIONS_FILE, FACTS_FILE = "captions.jsonl", "facts.json"
_CURVES: Final = (
    ("loss", "Total loss"), ("contrastive_loss", "Contrastive loss"), ("caption_loss", "Captioning loss"),
    ("distillation_loss", "Distillation loss"), ("eval_text_to_image_r1", "Held-out text → image R@1"),
    ("eval_image_to_text_r1", "Held-out image → text R@1"), ("learning_rate", "Learning rate"),
    ("logit_scale", "Logit scale"), ("grad_norm", "Norm of the gradient"),
)  # fmt: skip
_WRITERS: Final = (("mllm", "MLLM"), ("clips", "CLIPS captioner"))
_STYLE: Final = report_charts.STYLE + report_marks.STYLE
_MADE_BY: Final = "Made by clips. This page is one file: it loads nothing and"


def run(config: ReportConfig, job: Job) -> Report:
    """Writes the page of a run. Raises ``UserError`` where there is nothing to report on."""
    started = time.monotonic()
    folder = job.work / schema.RUNS / config.name
    path = _page_path(job, folder)
    counts = stats.gather(job.work)
    _check_there_is_something(config, job.work, folder, counts)
    report = Report("report", units=[path])
    if job.dry_run:
        report.units, report.facts["would_write"] = [], str(path)
        return report
    page = render(config, job.work, counts).encode()
    if path.exists() and path.read_bytes() == page:
        report.skipped = 1
    else:
        ledger.write_bytes(path, page)
        report.made = 1
    report.facts["page_bytes"] = len(page)
    report.seconds = time.monotonic() - started
    return report


def _page_path(job: Job, folder: Path) -> Path:
    if job.out is None:
        return folder / PAGE
    return job.out if job.out.suffix == ".html" else job.out / PAGE


def _check_there_is_something(config: ReportConfig, work: Path, folder: Path, counts: dict[str, Any]) -> None:
    if not folder.is_dir() and "name" in config.model_fields_set:
        runs = [path.name for path in (work / schema.RUNS).glob("*") if path.is_dir()]
        hint = did_you_mean(config.name, sorted(runs)) if runs else "Run `clips train` first."
        raise UserError(f"There is no run {config.name!r} under {work / schema.RUNS}. {hint}")
    if not counts and not folder.is_dir():
        raise UserError(f"{work} holds no finished work to report on. Point --work at the folder of a run.")


def render(config: ReportConfig, work: Path, counts: dict[str, Any]) -> str:
    """The page's HTML, a function of the files under ``work`` alone.

    It is smaller than ``report_pictures.MAX_PAGE_BYTES``: pictures get smaller, then fewer, and the page says so.
    """
    folder, shards = work / schema.RUNS / config.name, work / schema.SHARDS
    metrics = _json_lines(folder / "metrics.jsonl")
    scores, results = report_evals.read(folder, work)
    facts = scores.pop(FACTS_FILE, None)
    ours = {row["key"]: row["caption"] for row in _json_lines(folder / "eval" / CAPTIONS_FILE)}
    missed = report_evals.misses(results)
    sharded = (shards / "index.json").exists()
    samples = report_gallery.choose(config, shards, set(ours)) if sharded else []
    pictured = report_gallery.find(shards, report_evals.keys_of(missed)) if sharded and missed else {}
    examples = report_filters.examples(work) if sharded else {}
    tiles, funnel = _tiles(counts, metrics, scores, results), report_funnel.render(counts, work, folder, metrics)
    between = [
        report_captions.render(counts, work),
        report_texts.render(counts, work, metrics),
        _curves(metrics),
        report_evals.render(results),
        report_evals.render_recalls(scores),
        _facts(facts),
    ]
    environment = report_about.environment(counts, work, folder, results)
    commands = report_about.commands(work, folder, results)
    budget: Budget | None = Budget()
    while True:
        assert budget is not None
        filters = report_filters.render(counts, examples, budget)
        cards = report_evals.render_misses(missed, pictured, budget) + report_gallery.render(samples, ours, budget)
        marked = report_marks.around(cards, config.name)
        sections = [section for section in (funnel, filters, *between, marked, environment, commands) if section]
        page = _page(config.name, tiles, "\n".join(sections), script=report_marks.SCRIPT if marked else "")
        times = len(page.encode()) / report_pictures.MAX_PAGE_BYTES
        if times < 1 or (budget := budget.smaller(min(len(samples), budget.samples), times)) is None:
            return page


def _page(name: str, tiles: str, sections: str, *, script: str) -> str:
    head = f'<header><p class="soft">clips report</p><h1>{h.text(name)}</h1></header>'
    runs = "its one script keeps your marks and sends them nowhere" if script else "runs no script"
    footer = f"<footer>{_MADE_BY} {runs}.</footer>"
    body = "\n".join((head, tiles, h.contents(sections), sections, footer))
    return h.page(f"clips report: {name}", body, _STYLE, script=script)


# --- what the run left behind -----------------------------------------------------------------------------------------


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; none when it is absent. A last line torn by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    try:
        return [json.loads(line) for line in lines if line.endswith(b"\n")]
    except ValueError as error:
        raise UserError(f"{path} holds a line that is not JSON ({error}). Restore it or make it again.") from None


# --- sections ---------------------------------------------------------------------------------------------------------


def _tiles(
    counts: dict[str, Any], metrics: list[dict[str, Any]], scores: dict[str, Any], results: list[report_evals.Result]
) -> str:
    tiles = []
    if download := counts.get("download"):
        label = f"of {download['attempted']} URLs became pairs"
        tiles.append(h.tile(h.number(download["succeeded"]), label))
    for column, about in counts.get("captions", {}).items():
        label = f"of {about['attempted']} images have a {column} caption"
        tiles.append(h.tile(h.number(about["succeeded"]), label))
    if shards := counts.get("shards"):
        sizes = ", ".join(f"{number} {name}" for name, number in shards["splits"].items())
        tiles.append(h.tile(h.number(shards["succeeded"]), f"samples in shards ({sizes})"))
    if metrics:
        tiles.append(h.tile(h.number(metrics[-1].get("samples")), f"samples seen in {metrics[-1].get('step')} steps"))
    recalls = list(report_evals.recalls(scores))
    for name, found in recalls if not any(result.of_run for result in results) else []:
        of = f", {name}" if len(recalls) > 1 else ""
        label = f"text → image R@1{of}, chance {h.percent(found.get('chance_text_to_image_r1', 0))}"
        tiles.append(h.tile(h.percent(found["text_to_image_r1"]), label))
    tiles += report_evals.tiles(results)
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _curves(metrics: list[dict[str, Any]]) -> str:
    if not metrics:
        return '<h2 id="training">Training</h2><p class="soft">This run has no metrics yet.</p>'
    figures = []
    for key, title in _CURVES:
        points = [(row["samples"], row[key]) for row in metrics if isinstance(row.get(key), int | float)]
        if any(value for _, value in points):
            figures.append(h.curve(title, points, x_label="samples seen"))
    legend = '<p class="legend">Faint: every logged step. Full: running mean over a fortieth of the steps.</p>'
    return f'<h2 id="training">Training</h2>{legend}<div class="curves">{"".join(figures)}</div>'


def _facts(facts: dict[str, Any] | None) -> str:
    if not facts:
        return ""
    writers = [(facts[key], label) for key, label in _WRITERS if facts.get(key)]
    head = ["", *(f"{label}, {measure}" for _, label in writers for measure in ("precision", "recall"))]
    kinds = sorted({kind for total, _ in writers for kind in total.get("kinds", {})})
    rows = [["<b>all headline facts</b>", *(cell for total, _ in writers for cell in _fact_cells(total))]]
    for kind in kinds:
        cells = [cell for total, _ in writers for cell in _fact_cells(total.get("kinds", {}).get(kind, {}))]
        rows.append([h.text(kind.replace("_", " ")), *cells])
    intro = "Precision counts every claim that a caption makes, recall every fact that its scene holds."
    title = f'<h2 id="facts">Facts in captions</h2><p class="soft">{intro}</p>'
    return title + h.table(head, rows, caption=f"captions: {facts.get('num_captions', '–')}")


def _fact_cells(total: dict[str, Any]) -> list[str]:
    cells = []
    for measure, whole in (("precision", "claims"), ("recall", "facts")):
        value = total.get(measure)
        of = f" <small>of {h.number(total.get(whole))}</small>"
        cells.append(h.percent(value) + of if isinstance(value, int | float) else "–")
    return cells
