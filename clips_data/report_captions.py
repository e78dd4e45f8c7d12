"""What the report page says of caption columns: who made them, which rules fired, what they cost, what is true."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any, Final

from clips_data import draws, joined, ledger, measure, schema
from clips_data import report_html as h

MOST_FACTS: Final = 2000
"""Captions of a column whose facts are counted, drawn by key: reading the claims of one takes half a millisecond."""
_HOURS: Final = (("gpu_hours", "GPU"), ("cpu_hours", "CPU"), ("server_hours", "server"))


def render(counts: dict[str, Any], work: Path) -> str:
    """The section about caption columns; nothing where there are none."""
    columns: dict[str, dict[str, Any]] = counts.get("captions", {})
    if not columns:
        return ""
    parts = [_overview(columns), _rules(columns), _cost(columns), _facts(facts(work, list(columns)))]
    return '<h2 id="columns">Caption columns</h2>' + "".join(part for part in parts if part)


def _overview(columns: dict[str, dict[str, Any]]) -> str:
    """Who made each column, and the figures of its captions, each share with what it is of."""
    head = ["column", "<made by", "ok", "words, median", "tokens, median", "cap hit", "refused or leaked", "opener"]
    rows = []
    for column, about in columns.items():
        makers = "; ".join(dict.fromkeys(_maker(one) for one in about["made_by"])) or "unknown"
        shares = [about["bands"].get(name) for name in ("cap_hit_share", "refusal_or_leak_share", "opener_share")]
        rows.append(
            [
                h.text(column),
                h.text(makers),
                _of(about["succeeded"], about["attempted"]),
                h.number(about["caption_words"].get("median")),
                h.number(about["caption_tokens"].get("median")),
                *(_share(share["value"], share["of"]) if share else "–" for share in shares),
            ]
        )
    return h.table(head, rows)


def _maker(one: dict[str, Any]) -> str:
    if one["prompt"] is None:
        return f"{one['model']}, {one['engine']}"
    return f"{one['model']}, prompt {one['prompt']}, {one['engine']} {one['engine_version']}"


def _rules(columns: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            h.text(column),
            f"<code>{h.text(flag)}</code>",
            _of(number, about["attempted"]),
            h.percent(number, about["attempted"]),
        ]
        for column, about in columns.items()
        for flag, number in about["flags"].items()
    ]
    if not rows:
        return ""
    return h.table(["column", "<flag", "rows", "share"], rows, caption="Rules that marked captions or their inputs")


def _cost(columns: dict[str, dict[str, Any]]) -> str:
    head = ["column", "<engine and device", "captions/s", "tokens/s", "tokens", "hours", "reused rows", "engine deaths"]
    rows = []
    for column, about in columns.items():
        if not (cost := about["cost"]):
            continue
        engine = f"{', '.join(cost['engines'])} on {', '.join(cost['devices'])}"
        hours = [f"{h.number(cost[name])} {label}" for name, label in _HOURS if name in cost]
        rows.append(
            [
                h.text(column),
                h.text(engine),
                *(h.number(cost[name]) for name in ("captions_per_s", "tokens_per_s", "tokens")),
                ", ".join(hours),
                _of(cost["reused"], cost["rows"]),
                h.number(cost["engine_deaths"]),
            ]
        )
    return h.table(head, rows, caption="What captioning cost; start-up of engines left out") if rows else ""


def _of(part: int, whole: int) -> str:
    return f"{h.number(part)} <small>of {h.number(whole)}</small>"


def _share(value: float, whole: int) -> str:
    return f"{h.percent(value)} <small>of {h.number(whole)}</small>"


# --- facts, where the truth is known ----------------------------------------------------------------------------------


def facts(work: Path, columns: list[str]) -> dict[str, dict[str, Any]]:
    """What ``truth.judge`` finds in the web captions and in each column, over the same demo images.

    Empty where ``pairs/`` has none. A caption that a column lacks, or that was rejected, claims and finds nothing.
    """
    from clips_data.demo import truth

    web, urls = _demo_pairs(work / schema.PAIRS)
    if not urls:
        return {}
    scenes = {key: scene for key, url in urls.items() if (scene := truth.scene_of(url)) is not None}
    texts = {joined.WEB: web} | {column: _texts(work / schema.CAPTIONS / column, set(scenes)) for column in columns}
    return {
        column: truth.judge((captions.get(key, ""), scene) for key, scene in scenes.items())
        for column, captions in texts.items()
    }


def _demo_pairs(pairs: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Web caption and URL by key of the demo's images, those with the lowest draws."""
    import polars as pl

    from clips_data.demo import truth

    columns = dict.fromkeys(("key", "url", "caption", "status"), pl.String)
    table = measure.scan(pairs, ledger.finished_units(pairs), columns)
    ours = (pl.col("status") == schema.STATUS_SUCCESS) & pl.col("url").str.starts_with(truth.URL_START)
    (rows,) = measure.collect(pairs, table.filter(ours).select("key", "url", pl.col("caption").fill_null("")))
    drawn = heapq.nsmallest(MOST_FACTS, rows.iter_rows(), key=lambda row: draws.uniform(0, "facts", 0, row[0]))
    return {key: caption for key, _, caption in drawn}, {key: url for key, url, _ in drawn}


def _texts(folder: Path, keys: set[str]) -> dict[str, str]:
    import polars as pl

    columns = dict.fromkeys(("key", "caption", "status"), pl.String)
    table = measure.scan(folder, ledger.finished_units(folder), columns)
    wanted = pl.col("key").is_in(list(keys)) & (pl.col("status") == schema.STATUS_SUCCESS)
    (rows,) = measure.collect(folder, table.filter(wanted).select("key", pl.col("caption").fill_null("")))
    return dict(rows.iter_rows())


def _facts(found: dict[str, dict[str, Any]]) -> str:
    if not found:
        return ""
    rows = [
        [
            h.text(column),
            h.number(total["num_captions"]),
            *(
                _share(total[name], total[whole]) if total[name] is not None else "–"
                for name, whole in (("precision", "claims"), ("hallucination", "claims"), ("recall", "facts"))
            ),
            h.number(round(total["claims"] / total["num_captions"], 1)),
        ]
        for column, total in found.items()
    ]
    head = ["column", "images", "precision", "hallucination", "recall", "claims per image"]
    about = "Facts in captions of the demo's images: hallucination is the share of claims that is not true"
    return h.table(head, rows, caption=about)
