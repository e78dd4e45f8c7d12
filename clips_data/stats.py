"""What a work folder holds, stage by stage, as counts with their denominators. Reads tables and sidecars, no images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_data import joined, ledger, schema

if TYPE_CHECKING:
    import polars as pl


def gather(work: Path) -> dict[str, Any]:
    """Counts of every stage that has finished units under ``work``, ready for JSON.

    ``download``, ``captions`` by column, ``scores`` by name, ``shards``. A stage without finished units is absent.
    """
    found: dict[str, Any] = {}
    if units := ledger.finished_units(work / schema.PAIRS):
        found["download"] = _download(work / schema.PAIRS, units)
    for name, count in ((schema.CAPTIONS, _captions), (schema.SCORES, _scores)):
        parts = {folder.name: count(folder) for folder in _folders(work / name)}
        if parts:
            found[name] = parts
    if (work / schema.SHARDS / "index.json").exists():
        found["shards"] = _shards(work / schema.SHARDS)
    return found


def spread(values: list[float]) -> dict[str, float | int]:
    """Number, smallest, mean, median, 95th percentile (nearest rank) and largest of some values."""
    if not values:
        return {"num": 0}
    ordered = sorted(values)

    def rank(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    mean = round(sum(ordered) / len(ordered), 4)
    ends = {"min": ordered[0], "max": ordered[-1]}
    return {"num": len(ordered), **ends, "mean": mean, "median": rank(0.5), "p95": rank(0.95)}


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return [folder for folder in sorted(parent.iterdir()) if folder.is_dir() and ledger.finished_units(folder)]


def _download(folder: Path, units: list[str]) -> dict[str, Any]:
    codes: Counter[str] = Counter()
    words: list[float] = []
    num_bytes, hashes = 0, Counter[str]()
    for unit in units:
        table = joined.read_table(folder / f"{unit}.parquet")
        codes.update(table["code"].to_list())
        good = table.filter(table["status"] == schema.STATUS_SUCCESS)
        num_bytes += int(good["bytes"].sum() or 0)
        hashes.update(good["sha256"].to_list())
        if "caption" in table.columns:
            words += _words(good["caption"])
    return {
        **_outcomes(codes),
        "shards": len(units),
        "image_bytes": num_bytes,
        "different_images": len(hashes),
        "web_caption_words": spread(words),
    }


def _captions(folder: Path) -> dict[str, Any]:
    codes, flags, finish = Counter[str](), Counter[str](), Counter[str]()
    words: list[float] = []
    tokens: list[float] = []
    units = ledger.finished_units(folder)
    for unit in units:
        table = joined.read_table(folder / f"{unit}.parquet")
        codes.update(table["code"].to_list())
        flags.update(flag for some in table["flags"].to_list() for flag in some or ())
        finish.update(str(reason) for reason in table["finish_reason"].to_list())
        good = table.filter(table["status"] == schema.STATUS_SUCCESS)
        words += _words(good["caption"])
        tokens += good["num_tokens"].drop_nulls().to_list()
    return {
        **_outcomes(codes),
        "shards": len(units),
        "flags": _sorted(flags),
        "finish_reasons": _sorted(finish),
        "caption_words": spread(words),
        "caption_tokens": spread(tokens),
    }


def _scores(folder: Path) -> dict[str, Any]:
    import polars as pl

    units = ledger.finished_units(folder)
    table = pl.concat([joined.read_table(folder / f"{unit}.parquet") for unit in units])
    columns = [name for name in table.columns if name not in ("key", "sha256")]
    values = {name: [round(value, 6) for value in table[name].drop_nulls().to_list()] for name in columns}
    return {"rows": len(table), "shards": len(units), "similarity": {name: spread(values[name]) for name in columns}}


def _shards(folder: Path) -> dict[str, Any]:
    """Sizes and mix from ``index.json`` and the sidecars, sub-captions from the ``.json`` members."""
    from clips_data import tars

    index = json.loads((folder / "index.json").read_text())
    pieces: dict[str, list[float]] = {}
    txt, num_samples = Counter[str](), 0
    for split in index["splits"].values():
        for shard in split["shards"]:
            path = folder / shard["file"]
            with tars.open_tar(path) as file:
                for member in tars.read_members(path):
                    if member.ext != "json":
                        continue
                    about = json.loads(tars.read_at(file, path, member.offset, member.size_bytes))
                    num_samples += 1
                    txt[about["provenance"]["txt"]] += 1
                    for column, spans in about["sub_captions"].items():
                        pieces.setdefault(column, []).append(len(spans))
    mixed = Counter(index["mix"]["counts"])
    return {
        "attempted": num_samples + index["dropped"],
        "succeeded": num_samples,
        "failures": {"no_caption": index["dropped"]} if index["dropped"] else {},
        "splits": {name: split["num_samples"] for name, split in index["splits"].items()},
        "tars": {name: len(split["shards"]) for name, split in index["splits"].items()},
        "fallbacks": {name: number for name, number in _sorted(mixed).items() if "_for_missing_" in name},
        "txt": _sorted(txt),
        "web_ratio": {
            "wanted": index["mix"]["web_ratio"],
            "realised": round(txt[joined.WEB] / num_samples, 6) if num_samples else None,
        },
        "sub_captions": {column: spread(numbers) for column, numbers in sorted(pieces.items())},
    }


def _outcomes(codes: Counter[str]) -> dict[str, Any]:
    attempted = codes.total()
    failures = {code: number for code, number in _sorted(codes).items() if code != "ok"}
    return {"attempted": attempted, "succeeded": codes["ok"], "failures": failures}


def _sorted(counts: Counter[str]) -> dict[str, int]:
    """Most frequent first, then by name."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _words(captions: pl.Series) -> list[float]:
    """Number of words of each caption that has any."""
    return [number for caption in captions.to_list() if (number := len((caption or "").split()))]
