"""The figures of a comparison: what is measured of each recipe's captions, every share with its denominator."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from clips_data import measure, score, stats
from clips_data.recaption import caption_measures as texts
from clips_data.recaption.rows import Row

if TYPE_CHECKING:
    from clips_data.demo.scenes import Scene

IMAGES_PER_PASS: Final = 64
_SHOWN_APART: Final = ("opener", "hit_token_cap")


# --- measures ---------------------------------------------------------------------------------------------------------


def of_captions(captions: Sequence[str]) -> dict[str, Any]:
    """Text measures of captions, of which none is empty."""
    num = len(captions)
    different, runs = texts.distinct(captions)
    return {
        "captions_ok": num,
        "words": stats.spread([texts.words(caption) for caption in captions]),
        "clauses_mean": _share(sum(texts.clauses(caption) for caption in captions), num),
        "distinct_3": _share(different, runs),
        "distinct_3_of": runs,
        "repeats": sum(texts.repeats(caption) for caption in captions),
    }


def of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that caption rows tell by themselves. Rejected captions count in ``captions`` and ``codes`` alone."""
    good = [row for row in rows if row["code"] == "ok"]
    flags = Counter(flag for row in rows for flag in row["flags"])
    return {
        "captions": len(rows),
        **of_captions([row["caption"] for row in good]),
        "codes": measure.by_number(Counter(row["code"] for row in rows)),
        "tokens": stats.spread([row["num_tokens"] for row in good if row["num_tokens"]]),
        "answers": sum(bool(row["finish_reason"]) for row in rows),
        "cap_hits": sum(row["finish_reason"] == "length" for row in rows),
        "openers": sum("opener" in row["flags"] for row in good),
        "flags": {flag: num for flag, num in measure.by_number(flags).items() if flag not in _SHOWN_APART},
    }


def of_run(figures: Mapping[str, Any], usd_per_gpu_hour: float | None) -> dict[str, Any]:
    """Rates and what a million images would cost at them. Money only where a GPU of ours did the work."""
    seconds, num_gpus = figures["seconds"], figures["num_gpus"]
    device = "GPU" if num_gpus else "CPU" if figures["device"] == "cpu" else "server"
    hours = seconds / figures["rows"] * 1e6 / 3600 * max(1, num_gpus) if seconds and figures["rows"] else None
    return {
        "rows": figures["rows"],
        "seconds": seconds,
        "images_per_s": figures["rows"] / seconds if seconds else None,
        "tokens_per_s": figures["tokens"] / seconds if seconds else None,
        "hours_are_of": device,
        "hours_per_million_images": hours,
        "usd_per_million_images": hours * usd_per_gpu_hour if hours and usd_per_gpu_hour and num_gpus else None,
        **{name: figures[name] for name in ("engine", "engine_version", "device", "startup_s", "engine_deaths")},
    }


def of_scenes(captions: Mapping[str, str], scenes: Mapping[str, Scene]) -> dict[str, Any] | None:
    """Facts in the captions of demo images, against what the scenes hold. Both mappings are by key.

    A rejected caption (``""``) claims nothing and finds nothing. ``None`` without demo images.
    """
    from clips_data.demo import truth

    if not scenes:
        return None
    total = truth.judge((captions[key], scene) for key, scene in scenes.items())
    claims, usable = total["claims"], sum(bool(captions[key]) for key in scenes)
    return {
        "precision": total["precision"],
        "hallucination": total["hallucination"],
        "claims": claims,
        "recall": total["recall"],
        "facts": total["facts"],
        "images": len(scenes),
        "captions": usable,
        "claims_mean": _share(claims, usable),
    }


def similarities(
    scorer: score.Scorer, rows: Sequence[Row], columns: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    """Mean cosine of the images with each column's captions (by key), and of how many: not of empty ones, nor of
    images that cannot be decoded."""
    from clips_data.recaption.images import decode_image

    found: list[list[float]] = [[] for _ in columns]
    for first in range(0, len(rows), IMAGES_PER_PASS):
        readable = [row for row in rows[first : first + IMAGES_PER_PASS] if decode_image(row.image) is not None]
        if not readable:
            continue
        image_NE = scorer.image_features([row.image for row in readable], [row.key for row in readable])
        for column, values in zip(columns, found, strict=True):
            cosines = scorer.similarities(image_NE, [column[row.key] for row in readable])
            values += [cosine for cosine in cosines if cosine is not None]
    return [{"mean": statistics.fmean(values) if values else None, "of": len(values)} for values in found]


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the table: one measure, a (figure, denominator) pair of texts per column, ``("", "")`` for none."""

    label: str
    about: str
    cells: list[tuple[str, str]]


def lines(table: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """The table, measures down and columns across. ``table`` has one mapping per column, as ``compare`` makes it."""
    yield Line("captions", "usable ones of all that were asked for", [_of(c, "captions_ok", "captions") for c in table])
    for code in _names(table, "codes"):
        if code != "ok":
            yield Line(
                f"  {code}", "rejected for this reason", [_part(c.get("codes"), code, c.get("captions")) for c in table]
            )
    yield Line("words", "median / 95th percentile", [_spread(c.get("words")) for c in table])
    yield Line("tokens", "median / 95th percentile, of the whole answer", [_spread(c.get("tokens")) for c in table])
    yield Line("cap hit", "answers cut by max_tokens", [_share_of(c, "cap_hits", "answers") for c in table])
    yield Line(
        "clauses",
        "mean per caption: stretches of two or more words between punctuation and joining words; no count of claims",
        [_mean(c.get("clauses_mean"), c.get("captions_ok"), "captions") for c in table],
    )
    yield Line(
        "openers", 'captions that begin like "The image shows"', [_share_of(c, "openers", "captions_ok") for c in table]
    )
    yield Line(
        "distinct-3",
        "different ones among all runs of three words, over all captions together; falls with length",
        [_percent(c.get("distinct_3"), c.get("distinct_3_of"), "runs") for c in table],
    )
    yield Line(
        "repetition",
        f"captions in which a run of {texts.REPEAT_WORDS} words occurs twice",
        [_share_of(c, "repeats", "captions_ok") for c in table],
    )
    for flag in _names(table, "flags"):
        yield Line(f"  {flag}", "flagged so", [_part(c.get("flags"), flag, c.get("captions")) for c in table])
    yield from _scored(table)
    yield from _cost(table)


def _scored(table: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    similar = [c.get("similarity") or {} for c in table]
    if any(similar):
        cells = [_cosine(s.get("mean"), s.get("of")) for s in similar]
        yield Line("similarity", "mean cosine of image and caption", cells)
    facts = [c.get("demo_facts") or {} for c in table]
    if any(facts):
        about = "demo images: true ones of all claims"
        yield Line("precision", about, [_percent(f.get("precision"), f.get("claims"), "claims") for f in facts])
        about = "demo images: 1 - precision"
        yield Line("hallucination", about, [_percent(f.get("hallucination"), f.get("claims"), "claims") for f in facts])
        about = "demo images: facts of the scene that are told; a rejected caption tells none"
        yield Line("recall", about, [_percent(f.get("recall"), f.get("facts"), "facts") for f in facts])
        cells = [_mean(f.get("claims_mean"), f.get("captions"), "captions") for f in facts]
        yield Line("claims", "demo images: mean per caption", cells)


def _cost(table: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    runs = [c.get("run") or {} for c in table]
    if not any(runs):
        return
    yield Line(
        "images/s",
        "rate of this run, start-up not counted",
        [_rate(r.get("images_per_s"), r.get("rows")) for r in runs],
    )
    yield Line("tokens/s", "generated", [_rate(r.get("tokens_per_s")) for r in runs])
    for device in sorted({r["hours_are_of"] for r in runs if r}):
        cells = [
            _rate(r.get("hours_per_million_images")) if r.get("hours_are_of") == device else ("", "") for r in runs
        ]
        about = {"GPU": "of one GPU", "CPU": "of this machine", "server": "of the server behind the endpoint"}[device]
        yield Line(f"{device}-hours", f"{about}, for a million images at this rate", cells)
    if any(r.get("usd_per_million_images") for r in runs):
        cells = [_rate(r.get("usd_per_million_images")) for r in runs]
        yield Line("USD", "for a million images at --price", cells)


def _names(table: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    counts = Counter[str]()
    for column in table:
        counts.update(column.get(key) or {})
    return list(measure.by_number(counts))


def _of(column: Mapping[str, Any], part: str, whole: str) -> tuple[str, str]:
    return (str(column[part]), f"of {column[whole]}") if column.get(whole) is not None else ("", "")


def _share_of(column: Mapping[str, Any], part: str, whole: str) -> tuple[str, str]:
    number = column.get(whole)
    return _percent(_share(column[part], number), number, "") if number and part in column else ("", "")


def _part(counts: Mapping[str, int] | None, name: str, whole: int | None) -> tuple[str, str]:
    return ("", "") if counts is None or whole is None else (str(counts.get(name, 0)), f"of {whole}")


def _spread(spread: Mapping[str, Any] | None) -> tuple[str, str]:
    return (
        (f"{spread['median']:g} / {spread['p95']:g}", f"of {spread['num']}") if spread and spread["num"] else ("", "")
    )


def _mean(value: float | None, of: int | None, unit: str) -> tuple[str, str]:
    return ("", "") if value is None else (f"{value:.1f}", f"of {of} {unit}")


def _percent(value: float | None, of: int | None, unit: str) -> tuple[str, str]:
    return ("", "") if value is None else (f"{100 * value:.1f} %", f"of {of} {unit}".rstrip())


def _cosine(value: float | None, of: int | None) -> tuple[str, str]:
    return ("", "") if value is None else (f"{value:.4f}", f"of {of}")


def _rate(value: float | None, of: int | None = None) -> tuple[str, str]:
    """Three digits, and never an exponent."""
    if value is None:
        return "", ""
    digits = max(0, 2 - math.floor(math.log10(value))) if value else 0
    return f"{value:,.{digits}f}", f"of {of}" if of is not None else ""
