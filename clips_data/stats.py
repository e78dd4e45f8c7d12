"""What a work folder holds, stage by stage, as counts with their denominators. Reads tables and sidecars, no images."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import caption_cost, embeddings, ledger, measure, pair_stats, schema, shard_index
from clips_data.errors import UserError
from clips_data.mixing import Mix

if TYPE_CHECKING:
    import polars as pl

_SENTENCE_END: Final = r"""[.!?…]+["'”’)\]]*(\s|$)|[。！？]|[^\s.!?…。！？"'”’)\]]["'”’)\]]*$"""
"""An end mark before a space, or the end of a text that lacks one; abbreviations count as ends too."""
_REFUSED: Final = ("refused", "echo")
"""Codes of captions that decline to answer or leak the prompt."""
_NOT_ASKED: Final = "duplicate"
"""Code of rows whose image was captioned under another key; they count neither as attempts nor as failures."""


def gather(folder: Path, top: int = pair_stats.TOP_HOSTS) -> dict[str, Any]:
    """Counts of every stage that has finished units in a work folder, or of one stage's folder, ready for JSON.

    ``download``, ``captions`` by column, ``scores`` by name, ``shards``, ``embeddings`` by name. A stage without
    finished units is absent.
    ``top`` is the number of hosts shown. Raises ``UserError`` for a folder of another kind.
    """
    return _work(folder, top) or _stage(folder, top)


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


def _work(work: Path, top: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if units := ledger.finished_units(work / schema.PAIRS):
        found["download"] = pair_stats.gather(work / schema.PAIRS, units, top)
    for name, count in ((schema.CAPTIONS, _captions), (schema.SCORES, _scores)):
        if parts := {folder.name: count(folder) for folder in _folders(work / name)}:
            found[name] = parts
    if (work / schema.SHARDS / "index.json").exists():
        found["shards"] = _shards(work / schema.SHARDS)
    if parts := {folder.name: embeddings.gather(folder) for folder in _folders(work / schema.EMBEDDINGS)}:
        found[schema.EMBEDDINGS] = parts
    return found


def _stage(folder: Path, top: int) -> dict[str, Any]:
    """Counts of one stage's folder, told by what its tables hold, under the name that they have in a work folder."""
    units = ledger.finished_units(folder)
    if units and (folder / (units[0] + embeddings.SUFFIX)).exists():
        return {schema.EMBEDDINGS: {folder.name: embeddings.gather(folder)}}
    if (folder / "index.json").exists():
        return {"shards": _shards(folder)}
    if units:
        kind = _kind(folder, units[0])
        if kind == schema.PAIRS:
            return {"download": pair_stats.gather(folder, units, top)}
        return {kind: {folder.name: _captions(folder) if kind == schema.CAPTIONS else _scores(folder)}}
    found: dict[str, Any] = {}
    for column in _folders(folder):  # captions/, scores/ or embeddings/ as a whole
        for kind, parts in _stage(column, top).items():
            if kind in (schema.CAPTIONS, schema.SCORES, schema.EMBEDDINGS):
                found.setdefault(kind, {}).update(parts)
    return found


def _kind(folder: Path, unit: str) -> str:
    """Which stage made this finished unit."""
    table = folder / f"{unit}.parquet"
    columns = set(measure.columns_of(table)) if table.exists() else set()
    if "finish_reason" in columns:
        return schema.CAPTIONS
    if {"key", "status", "code"} <= columns:
        return schema.PAIRS
    if {"key", "sha256"} <= columns:
        return schema.SCORES
    raise UserError(
        f"{folder} holds no tables of pairs, captions or scores, and no shards. Point `clips stats` at a work folder, "
        "or at pairs/, captions/NAME, scores/NAME, shards/ or embeddings/NAME in it."
    )


def _folders(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return [folder for folder in sorted(parent.iterdir()) if folder.is_dir() and ledger.finished_units(folder)]


def _captions(folder: Path) -> dict[str, Any]:
    import polars as pl

    units = ledger.finished_units(folder)
    columns = dict.fromkeys(("caption", "status", "code", "finish_reason"), pl.String)
    rows = measure.scan(folder, units, columns | {"num_tokens": pl.Int64(), "flags": pl.List(pl.String)})
    codes = measure.counts(folder, rows, pl.col("code"))
    not_asked = codes.pop(_NOT_ASKED, 0)
    rows = rows.filter(pl.col("code").ne_missing(_NOT_ASKED))
    finish = measure.counts(folder, rows, pl.col("finish_reason"))
    good = rows.filter(pl.col("status") == schema.STATUS_SUCCESS)
    captioned = good.select(pl.col("caption").str.strip_chars()).filter(pl.col("caption") != "")
    flagged = rows.select("flags").explode("flags").filter(pl.col("flags").is_not_null())
    flags = measure.counts(folder, flagged, pl.col("flags"))
    texts = measure.spreads(folder, captioned, {"words": _count(r"\S+"), "sentences": _count(_SENTENCE_END)})
    tokens = measure.spreads(folder, good, {"tokens": pl.col("num_tokens")})["tokens"]
    attempted = sum(codes.values())
    bands = {
        **measure.banded_mean("caption_words_mean", texts["words"]),
        **measure.banded_mean("caption_sentences_mean", texts["sentences"]),
        **measure.banded_share("cap_hit_share", finish.get("length", 0), attempted),
        **measure.banded_share("refusal_or_leak_share", sum(codes.get(code, 0) for code in _REFUSED), attempted),
        **measure.banded_share("opener_share", flags.get("opener", 0), int(texts["words"]["num"])),
    }
    return {
        "attempted": attempted,
        "succeeded": codes.get("ok", 0),
        "failures": {code: number for code, number in codes.items() if code != "ok"},
        **({"not_asked": {_NOT_ASKED: not_asked}} if not_asked else {}),
        "shards": len(units),
        "made_by": caption_cost.made_by(folder, units),
        "cost": caption_cost.cost(folder, units),
        "bands": bands,
        "flags": flags,
        "finish_reasons": finish,
        "caption_words": texts["words"],
        "caption_sentences": texts["sentences"],
        "caption_tokens": tokens,
    }


def _count(pattern: str) -> pl.Expr:
    import polars as pl

    return pl.col("caption").str.count_matches(pattern)


def _scores(folder: Path) -> dict[str, Any]:
    import polars as pl

    units = ledger.finished_units(folder)
    kinds = measure.columns_of(folder / f"{units[0]}.parquet")
    numbers = [name for name, kind in kinds.items() if kind.is_numeric() or kind == pl.Boolean]
    flags = [name for name, kind in kinds.items() if kind == pl.List(pl.String)]
    columns = dict.fromkeys(numbers, pl.Float64()) | dict.fromkeys(flags, pl.List(pl.String))
    table = measure.scan(folder, units, {"key": pl.String(), **columns})
    return {
        "rows": measure.num_rows(folder, table),
        "shards": len(units),
        "similarity": measure.spreads(folder, table, {name: pl.col(name) for name in numbers}),
        "flagged": {name: _flagged(folder, table.select(name).drop_nulls()) for name in flags},
    }


def _flagged(folder: Path, lists: pl.LazyFrame) -> dict[str, Any]:
    """How many of the captions that were looked at have each flag."""
    import polars as pl

    (column,) = lists.collect_schema().names()
    each = lists.explode(column).filter(pl.col(column).is_not_null())
    return {"attempted": measure.num_rows(folder, lists), "flags": measure.counts(folder, each, pl.col(column))}


def _removed(index: dict[str, Any]) -> dict[str, int]:
    """What each filter removed, in their order."""
    found: dict[str, int] = {}
    for generation in index.get("generations", []):
        for name, number in generation["removed"]:
            found[name] = found.get(name, 0) + number
    return found


def _shards(folder: Path) -> dict[str, Any]:
    """Sizes and mix from ``index.json`` and the sidecars, sub-captions from the ``.json`` members."""
    from clips_data import tars

    index = shard_index.read(folder) or {}
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
        "attempted": num_samples + index["dropped"],  # filters removed others before that
        "succeeded": num_samples,
        "failures": {"no_caption": index["dropped"]} if index["dropped"] else {},
        "splits": {name: split["num_samples"] for name, split in index["splits"].items()},
        "tars": {name: len(split["shards"]) for name, split in index["splits"].items()},
        "fallbacks": {name: number for name, number in measure.by_number(mixed).items() if "_for_missing_" in name},
        "txt": measure.by_number(txt),
        "mix": {
            "rules": " | ".join(Mix.from_json(index["mix"], index["columns"]).to_json()["rules"]),
            "realised": {column: round(number / num_samples, 6) for column, number in measure.by_number(txt).items()},
        },
        "removed": _removed(index),
        "sub_captions": {column: spread(numbers) for column, numbers in sorted(pieces.items())},
    }
