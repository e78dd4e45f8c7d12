"""One shard of a caption column as it lies on disk; whoever makes captions, a model or an import, commits here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clips_data import ledger


def commit(
    out: Path,
    unit: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    metadata: Mapping[str, str],
    inputs: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Writes and commits ``out/<unit>.parquet``. ``metadata`` is that of ``schema.caption_metadata``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = dict.fromkeys(("key", "sha256", "caption", "status", "code", "finish_reason"), pa.string())
    kinds = {
        **text, "num_tokens": pa.int32(), "flags": pa.list_(pa.string()), "raw": pa.string(), "seed": pa.int64(),
        "engine": pa.string(), "prompt_variant": pa.string(), "request": pa.string(),
    }  # fmt: skip
    table = pa.Table.from_pylist(list(rows), schema=pa.schema(kinds, metadata=dict(metadata)))
    with ledger.readable_disk_errors(out):
        pq.write_table(table, ledger.part(out / f"{unit}.parquet"))
        counts = Counter(row["code"] for row in rows)
        ledger.commit(out, unit, [f"{unit}.parquet"], inputs=inputs, config=config, counts=counts)
