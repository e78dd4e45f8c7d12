"""``clips report``: one static page about a work folder and a run. It holds its images and loads nothing."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from clips_data import draws, joined, ledger, report_captions, schema, shard_index, stats, tars
from clips_data import report_html as h
from clips_data.config import ReportConfig
from clips_data.errors import UserError, did_you_mean
from clips_data.executor import Job, Report

PAGE: Final = "report.html"
CAPTIONS_FILE, FACTS_FILE = "captions.jsonl", "facts.json"
THUMBNAIL_PX: Final = 360
SPLITS: Final = ("heldout", "train")
_CURVES: Final = (
    ("loss", "Total loss"), ("contrastive_loss", "Contrastive loss"), ("caption_loss", "Captioning loss"),
    ("distillation_loss", "Distillation loss"), ("eval_text_to_image_r1", "Held-out text → image R@1"),
    ("eval_image_to_text_r1", "Held-out image → text R@1"), ("learning_rate", "Learning rate"),
    ("logit_scale", "Logit scale"), ("grad_norm", "Norm of the gradient"),
)  # fmt: skip
_WAYS: Final = (("text_to_image", "Text → image"), ("image_to_text", "Image → text"))
_WRITERS: Final = (("mllm", "MLLM"), ("clips", "CLIPS captioner"))


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
    """The page's HTML, a function of the files under ``work`` alone."""
    folder = work / schema.RUNS / config.name
    metrics = _json_lines(folder / "metrics.jsonl")
    scores = _eval_files(folder / "eval")
    facts = scores.pop(FACTS_FILE, None)
    ours = {row["key"]: row["caption"] for row in _json_lines(folder / "eval" / CAPTIONS_FILE)}
    sections = [
        f"<h1>Run {h.text(config.name)}</h1>",
        '<p class="soft">What was downloaded, captioned and sharded, how the run trained, and samples to look at.</p>',
        _tiles(counts, metrics, scores),
        _stages(counts),
        report_captions.render(counts, work),
        _texts(counts),
        _curves(metrics),
        _retrieval(scores),
        _facts(facts),
        _gallery(config, work / schema.SHARDS, ours),
        "<footer>Made by clips. This page is one file: it loads nothing and runs no script.</footer>",
    ]
    return h.page(f"clips report: {config.name}", "\n".join(section for section in sections if section))


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


def _eval_files(folder: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(ledger.SIDECAR):
            continue
        try:
            found[path.name] = json.loads(path.read_bytes())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}). Run `clips eval` again.") from None
    return found


def _recalls(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, scores) of everything in an eval file that holds recalls."""
    if not isinstance(value, dict):
        return
    if isinstance(by_queries := value.get("retrieval_by_queries"), dict):  # "retrieval" is the first of them
        yield from ((f"queries: {queries}", found) for queries, found in by_queries.items())
        return
    if "text_to_image_r1" in value:
        yield name, value
    for key, inner in value.items():
        yield from _recalls(inner, key)


# --- sections ---------------------------------------------------------------------------------------------------------


def _tiles(counts: dict[str, Any], metrics: list[dict[str, Any]], scores: dict[str, Any]) -> str:
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
    recalls = list(_recalls(scores))
    for name, found in recalls:
        of = f", {name}" if len(recalls) > 1 else ""
        label = f"text → image R@1{of}, chance {h.percent(found.get('chance_text_to_image_r1', 0))}"
        tiles.append(h.tile(h.percent(found["text_to_image_r1"]), label))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _stages(counts: dict[str, Any]) -> str:
    stages = [(f"captions / {name}", about) for name, about in counts.get("captions", {}).items()]
    stages = [("download", counts.get("download")), *stages, ("shards", counts.get("shards"))]
    rows, failures = [], []
    for name, about in stages:
        if not about:
            continue
        attempted, succeeded = about["attempted"], about["succeeded"]
        failed = attempted - succeeded
        rows.append(
            [h.text(name), *map(h.number, (attempted, succeeded, failed)), h.percent(succeeded, attempted)],
        )
        for code, number in about["failures"].items():
            failures.append(
                [h.text(name), f"<code>{h.text(code)}</code>", h.number(number), h.percent(number, attempted)]
            )
    if not rows:
        return ""
    head = ["stage", "attempted", "succeeded", "failed", "share"]
    shown = "<h2>Stages</h2>" + h.table(head, rows)
    if failures:
        shown += "<h2>Failures</h2>" + h.table(["stage", "<reason", "rows", "of attempted"], failures)
    return shown


def _texts(counts: dict[str, Any]) -> str:
    spreads: list[tuple[str, dict[str, Any]]] = []
    if "download" in counts:
        spreads.append(("web caption, words", counts["download"]["web_caption_words"]))
    for column, about in counts.get("captions", {}).items():
        spreads.append((f"{column} caption, words", about["caption_words"]))
    shards = counts.get("shards", {})
    spreads += [(f"{column} caption, sub-captions", about) for column, about in shards.get("sub_captions", {}).items()]
    for name, about in counts.get("scores", {}).items():
        spreads += [(f"{name} similarity, {column}", values) for column, values in about["similarity"].items()]
    rows = [
        [h.text(name), *(h.number(values.get(key)) for key in ("num", "min", "median", "mean", "p95", "max"))]
        for name, values in spreads
    ]
    shown = "<h2>Texts</h2>" + h.table(["", "rows", "min", "median", "mean", "95 %", "max"], rows) if rows else ""
    return shown + _mix(shards) if shards else shown


def _mix(shards: dict[str, Any]) -> str:
    total = shards["succeeded"]
    rows = [
        [h.text(f"removed by {name}"), h.number(number), "before the mix"] for name, number in shards["removed"].items()
    ]
    rows += [
        [f"<code>.txt</code> is {h.text(column)}", h.percent(share), f"by {h.text(shards['mix']['rules'])}"]
        for column, share in shards["mix"]["realised"].items()
    ]
    for name, number in shards["fallbacks"].items():
        taken, _, missing = name.partition("_for_missing_")
        rows.append([h.text(f"{taken} stood in for a missing {missing}"), h.number(number), f"of {h.number(total)}"])
    for name, number in shards["splits"].items():
        tars_text = f"in {h.number(shards['tars'][name])} tars"
        rows.append([h.text(f"{name} samples"), h.number(number), tars_text])
    return h.table(["mix and splits", "value", "<"], rows)


def _curves(metrics: list[dict[str, Any]]) -> str:
    if not metrics:
        return '<h2>Training</h2><p class="soft">This run has no metrics yet.</p>'
    figures = []
    for key, title in _CURVES:
        points = [(row["samples"], row[key]) for row in metrics if isinstance(row.get(key), int | float)]
        if any(value for _, value in points):
            figures.append(h.curve(title, points, x_label="samples seen"))
    legend = '<p class="legend">Faint: every logged step. Full: running mean over a fortieth of the steps.</p>'
    return f'<h2>Training</h2>{legend}<div class="curves">{"".join(figures)}</div>'


def _retrieval(scores: dict[str, Any]) -> str:
    shown = []
    for name, found in _recalls(scores):
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
    return "<h2>Retrieval on held-out samples</h2>" + "".join(shown) if shown else ""


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
    title = f"<h2>Facts in captions</h2><p class='soft'>{intro}</p>"
    return title + h.table(head, rows, caption=f"captions: {facts.get('num_captions', '–')}")


def _fact_cells(total: dict[str, Any]) -> list[str]:
    cells = []
    for measure, whole in (("precision", "claims"), ("recall", "facts")):
        value = total.get(measure)
        of = f" <small>of {h.number(total.get(whole))}</small>"
        cells.append(h.percent(value) + of if isinstance(value, int | float) else "–")
    return cells


# --- the gallery ------------------------------------------------------------------------------------------------------


def _gallery(config: ReportConfig, shards: Path, ours: dict[str, str]) -> str:
    if not (shards / "index.json").exists() or config.gallery == 0:
        return ""
    chosen = _choose(config, shards, set(ours))
    cards = [_card(path, row, split, ours.get(row["key"])) for split, path, row in chosen]
    legend = (
        '<p class="legend"><span><mark class="a">odd</mark> and <mark class="b">even</mark> sub-captions, '
        "as the splitting rule cut them</span><span>Unmarked text belongs to none.</span></p>"
    )
    return f'<h2>Samples</h2>{legend}<div class="gallery">{"".join(cards)}</div>'


def _choose(config: ReportConfig, shards: Path, captioned: set[str]) -> list[tuple[str, Path, dict[str, Any]]]:
    """(split, tar, index row) of the samples with the lowest draws.

    First those that our captioner captioned, then others that were held out, then training samples.
    """
    index = shard_index.read(shards) or {"splits": {}}
    found = []
    for rank, split in enumerate(SPLITS):
        for shard in index["splits"].get(split, {"shards": []})["shards"]:
            path = shards / shard["file"]
            for row in joined.read_table(path.with_suffix(".index.parquet")).iter_rows(named=True):
                draw = draws.uniform(config.seed, "gallery", 0, row["key"])
                found.append(((row["key"] not in captioned, rank, draw, row["key"]), (split, path, row)))
        if len(found) >= config.gallery and captioned <= {place[3] for place, _ in found}:
            break  # training samples cannot come first any more
    return [choice for _, choice in sorted(found, key=lambda item: item[0])[: config.gallery]]


def _card(path: Path, row: dict[str, Any], split: str, ours: str | None) -> str:
    with tars.open_tar(path) as file:
        image = tars.read_at(file, path, row["image_offset"], row["image_bytes"])
        about = json.loads(tars.read_at(file, path, row["json_offset"], row["json_bytes"]))
    entries = [("Web caption", h.caption(about[joined.WEB]) or '<span class="soft">none</span>')]
    for column, spans in about["sub_captions"].items():
        shown = h.marked_caption(about[column], spans) or '<span class="soft">none: rejected or empty</span>'
        entries.append((f"{column} caption", shown))
    if ours is not None:
        entries.append(("CLIPS captioner", h.caption(ours) or '<span class="soft">said nothing</span>'))
    similar = [f"{name} {value:.3f}" for name, value in sorted(about["scores"].items())]
    entries.append(("Sample", h.bar_figures([about["key"], split, *similar])))
    listed = "".join(
        f'<dt>{h.text(name[:1].upper() + name[1:])}</dt><dd dir="auto">{shown}</dd>' for name, shown in entries
    )
    return f"<article>{thumbnail(image, about[joined.WEB])}<dl>{listed}</dl></article>"


def thumbnail(image: bytes, alt: str) -> str:
    """The image as a small JPEG inside the page."""
    import base64

    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as opened:
            opened.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
            small = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        return f"<p>This image cannot be decoded: {h.text(error)}</p>"
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    data = base64.b64encode(file.getvalue()).decode()
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="data:image/jpeg;base64,{data}" {size} alt="{h.text(alt[:200])}">'
