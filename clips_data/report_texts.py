"""The report's figures of texts: histograms of lengths and scores, the spreads, and which text was taken how often."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_data import joined, ledger, measure, report_charts, schema
from clips_data import report_html as h
from clips_data.mixing import NO_CAPTION
from clips_data.report_charts import Histogram

if TYPE_CHECKING:
    import polars as pl


def render(counts: Mapping[str, Any], work: Path, metrics: list[dict[str, Any]]) -> str:
    figures = _figures(counts, work)
    shown = f'<div class="curves spaced">{"".join(figures)}</div>' if figures else ""
    shown += _spreads(counts)
    title = '<h2 id="texts">Lengths and scores</h2>' if shown else ""
    shards = counts.get("shards", {})
    return title + shown + (_mix(shards, metrics) if shards else "")


# --- histograms -------------------------------------------------------------------------------------------------------


def _figures(counts: Mapping[str, Any], work: Path) -> list[str]:
    import polars as pl

    found = []
    words = pl.col("caption").cast(pl.String).str.count_matches(r"\S+")
    good = pl.col("status") == schema.STATUS_SUCCESS
    spread = counts.get("download", {}).get("web_caption_words", {})
    columns = dict.fromkeys(("caption", "status"), pl.String)
    places = [("web", work / schema.PAIRS, spread)] if spread else []
    places += [
        (name, work / schema.CAPTIONS / name, about["caption_words"])
        for name, about in counts.get("captions", {}).items()
    ]
    for name, folder, spread in places:
        if spread.get("num"):
            table = measure.scan(folder, ledger.finished_units(folder), columns).filter(good)
            has_text = table.filter(pl.col("caption").str.strip_chars() != "")
            one = _counted(folder, has_text, words, spread, whole=True)
            found.append(report_charts.histogram(f"{name} captions", one, x_label="words"))
    for name, about in counts.get("scores", {}).items():
        folder = work / schema.SCORES / name
        spreads = {column: spread for column, spread in about["similarity"].items() if spread.get("num")}
        # Columns of one scorer are compared by looking, so they share an axis.
        ends = _joint(list(spreads.values())) if set(spreads) <= {joined.WEB, *counts.get("captions", {})} else None
        for column, spread in spreads.items():
            table = measure.scan(folder, ledger.finished_units(folder), {column: pl.Float64()})
            value = pl.col(column).fill_nan(None)
            one = _counted(folder, table, value, spread, whole=False, ends=ends)
            found.append(report_charts.histogram(f"{name} of {column}", one, x_label="score"))
    return found


def _joint(spreads: list[dict[str, Any]]) -> tuple[float, float] | None:
    return (min(one["min"] for one in spreads), max(one["max"] for one in spreads)) if spreads else None


def _counted(
    where: Path,
    table: pl.LazyFrame,
    value: pl.Expr,
    spread: Mapping[str, Any],
    *,
    whole: bool,
    ends: tuple[float, float] | None = None,
) -> Histogram:
    """Values by bin, streamed; ``spread`` says where they lie."""
    import polars as pl

    low, high = ends or (spread["min"], spread["max"])
    first, width, number = report_charts.bins_for(low, high, spread["p95"], whole=whole)
    place = ((value.cast(pl.Float64) - first) / width + 1e-9).floor().cast(pl.Int64).clip(0, number)
    placed = table.select(place.alias("bin")).filter(pl.col("bin").is_not_null())
    (found,) = measure.collect(where, placed.group_by("bin").len())
    by_bin = dict(found.iter_rows())
    heights = tuple(by_bin.get(place, 0) for place in range(number))
    ends_here = (spread["min"], spread["max"])
    return Histogram(first, width, heights, by_bin.get(number, 0), whole, spread["median"], ends_here)


# --- tables -----------------------------------------------------------------------------------------------------------


def _spreads(counts: Mapping[str, Any]) -> str:
    spreads: list[tuple[str, dict[str, Any]]] = []
    if "download" in counts:
        spreads.append(("web caption, words", counts["download"]["web_caption_words"]))
    for column, about in counts.get("captions", {}).items():
        spreads.append((f"{column} caption, words", about["caption_words"]))
    sub_captions = counts.get("shards", {}).get("sub_captions", {})
    spreads += [(f"{column} caption, sub-captions", about) for column, about in sub_captions.items()]
    for name, about in counts.get("scores", {}).items():
        spreads += [(f"{name} similarity, {column}", values) for column, values in about["similarity"].items()]
    rows = [
        [h.text(name), *(h.number(values.get(key)) for key in ("num", "min", "median", "mean", "p95", "max"))]
        for name, values in spreads
    ]
    return h.table(["", "rows", "min", "median", "mean", "95 %", "max"], rows) if rows else ""


def _mix(shards: Mapping[str, Any], metrics: list[dict[str, Any]]) -> str:
    """Which column the texts are, in the shards as they lie and, where the run mixed them itself, in training."""
    total = shards["succeeded"]
    rows = [
        [f"<code>.txt</code> is {h.text(column)}", _of(number, total), h.percent(number, total)]
        for column, number in shards["txt"].items()
    ]
    for name, number in shards["fallbacks"].items():
        taken, _, missing = name.partition("_for_missing_")
        label = f"{taken} stood in for a missing {missing}"
        rows.append([h.text(label), _of(number, total), h.percent(number, total)])
    told = metrics[-1].get("counts", {}) if metrics else {}
    loaded = told.get("loaded", 0)
    for name, number in measure.by_number(
        {name: number for name, number in told.items() if _is_of_texts(name)}
    ).items():
        of = sum(other for key, other in told.items() if key.partition(".")[0] == name.partition(".")[0])
        of = of if name.startswith("mix") else loaded
        rows.append([h.text(_told(name)), _of(number, of), h.percent(number, of)])
    about = f"The texts of {total} samples in shards, mixed by {shards['mix']['rules']}"
    return '<h2 id="mix">Mix</h2>' + h.table(["text", "samples or draws", "share"], rows, caption=about)


def _is_of_texts(name: str) -> bool:
    return name.partition(".")[0].startswith("mix") or name.startswith(("fallback.", "empty."))


def _told(name: str) -> str:
    kind, _, rest = name.partition(".")
    if kind == "fallback":
        return f"in training: another text stood in, as {rest.removesuffix('_empty')} was empty"
    if kind == "empty":
        return f"in training: {rest} was empty"
    what = "had no caption" if rest == NO_CAPTION else rest.replace("_for_missing_", " for a missing ")
    return f"in training, {kind.replace('_', ' ')}: {what}"


def _of(number: int, whole: int) -> str:
    return f"{h.number(number)} <small>of {h.number(whole)}</small>"
