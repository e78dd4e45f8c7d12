"""Who made a caption column, and what that cost: from the metadata of its tables and the figures beside them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from clips_data import measure
from clips_data.errors import UserError

STATS: Final = "_stats.json"
_SHOWN: Final = ("model", "model_revision", "engine", "engine_version", "prompt", "prompt_digest")
_DIGEST_DIGITS: Final = 12
_SUMS: Final = ("rows", "reused", "tokens", "prompt_tokens", "engine_deaths")


def made_by(folder: Path, units: Sequence[str]) -> list[dict[str, Any]]:
    """Model, engine and prompt of a column, with the number of ``shards`` that they made; revisions and digests cut."""
    import polars as pl

    makers = Counter[tuple[str | None, ...]]()
    for unit in units:
        about = pl.read_parquet_metadata(folder / f"{unit}.parquet")
        told = (json.loads(about[name]) if name in about else None for name in _SHOWN)
        makers[tuple(None if value is None else str(value) for value in told)] += 1
    found = []
    for values, shards in makers.items():
        known = dict(zip(_SHOWN, values, strict=True))
        for name in ("model_revision", "prompt_digest"):
            known[name] = None if (value := known[name]) is None else value[:_DIGEST_DIGITS]
        found.append({**known, "shards": shards})
    return found if any(values[0] for values in makers) else []


def cost(folder: Path, units: Sequence[str]) -> dict[str, Any]:
    """What the engines did for a column, summed over the shards that have figures; empty where none has, as of imports.

    ``seconds`` are those of engines at work, and rates are means over them, start-up left out. Hours are ``gpu_hours``
    where GPUs did the work, else ``cpu_hours`` or, of an endpoint elsewhere, ``server_hours``: time that one engine
    took. A recipe that makes several columns in one go has its whole cost at each of them.
    """
    figures = [_read(path) for unit in units if (path := folder / f"{unit}{STATS}").exists()]
    if not figures:
        return {}
    seconds = sum(one["seconds"] for one in figures)
    found: dict[str, Any] = {"shards_with_figures": len(figures), "shards": len(units)}
    found |= {name: sum(one[name] for one in figures) for name in _SUMS}
    found["seconds"] = round(seconds, 3)
    for rate in ("captions_per_s", "tokens_per_s"):
        made = sum(one[rate] * one["seconds"] for one in figures if one[rate] is not None)
        found[rate] = round(made / seconds, 4) if seconds else None
    hours = Counter[str]()
    for one in figures:
        by_gpu = one["num_gpus"] > 0
        kind = "gpu_hours" if by_gpu else "cpu_hours" if one["device"] == "cpu" else "server_hours"
        hours[kind] += one["gpu_hours"] if by_gpu else one["seconds"] / 3600
    found |= {kind: round(number, 6) for kind, number in sorted(hours.items())}
    found["engines"] = measure.by_number(Counter(f"{one['engine']} {one['engine_version']}" for one in figures))
    found["devices"] = measure.by_number(Counter(str(one["device"]) for one in figures))
    return found


def _read(path: Path) -> dict[str, Any]:
    """The figures of one shard."""
    try:
        found = json.loads(path.read_bytes())
        needed = (*_SUMS, "seconds", "captions_per_s", "tokens_per_s", "gpu_hours", "num_gpus", "device", "engine")
        missing = [name for name in (*needed, "engine_version") if name not in found]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Delete it; the captions beside it are whole.") from None
    if missing:
        raise UserError(
            f"{path} has no figure {missing[0]!r}, so `clips recaption` did not write it. Delete or move it; the "
            "captions beside it do not need it."
        )
    return dict(found)
