"""A table of captions joined to as many pairs, beside a plain streaming join of polars: seconds and peak memory.

uv run python tests/bench/join.py [--rows 20000000] [--work FOLDER] [--out join.json]

The pairs are tables without images, each row with a key, a random uid and a sha256; the captions have the same uids in
another order. Ours is what ``imported.import_table`` joins by: buckets on disk, then a text for each image, shard by
shard (cleaning and committing a shard, which follow, hold that one shard). The other one is
``scan_parquet(pairs).join(scan_parquet(captions)).sink_parquet(…)``. Each runs in a process of its own; its peak is
that process's largest resident set (``VmHWM``), which counts mapped files too. The data are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from clips_data import ledger, schema
from clips_data.table_join import CaptionTable, Join

SHARD_ROWS = 10_000
TABLE_ROWS = 1_000_000
"""Rows of one file of captions, and of one draw of uids."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--work", type=Path, default=None, help="folder for the data; a temporary one by default")
    parser.add_argument("--out", type=Path, default=Path("join.json"))
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        apart(write_inputs, work, options.rows)
        result = {
            "rows": options.rows,
            "clips": apart(join_by_clips, work),
            "polars": apart(join_by_polars, work),
        }
    finally:
        shutil.rmtree(work)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def apart(call: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """``call`` in a fresh process; its answer with seconds and peak memory. A death is an answer too."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(sender, call, arguments))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        result = {"died_with": process.exitcode}
    process.join()
    print(call.__name__, result, flush=True)
    return result


def _measured(sender: Any, call: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    started, before = time.perf_counter(), peak_gb()
    answer = call(*arguments)
    seconds = round(time.perf_counter() - started, 1)
    sender.send({**answer, "seconds": seconds, "peak_gb": peak_gb(), "peak_before_gb": before})


def peak_gb() -> float:
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9, 2)


# --- the data ---------------------------------------------------------------------------------------------------------


def write_inputs(work: Path, num_rows: int) -> dict[str, Any]:
    pairs, captions = work / schema.PAIRS, work / "captions_table"
    pairs.mkdir()
    captions.mkdir()
    chunks = -(-num_rows // TABLE_ROWS)
    for chunk in range(chunks):
        rows = min(TABLE_ROWS, num_rows - chunk * TABLE_ROWS)
        uids = hexadecimal(chunk, rows, 16)
        hashes = hexadecimal(chunks + chunk, rows, 32)
        for first in range(0, rows, SHARD_ROWS):
            number = (chunk * TABLE_ROWS + first) // SHARD_ROWS
            write_shard(pairs, number, uids.slice(first, SHARD_ROWS), hashes.slice(first, SHARD_ROWS))
        text = pl.concat_str(pl.lit("A photo of a thing called "), "uid", pl.lit(" that stands on a table."))
        table = pl.DataFrame({"uid": uids.shuffle(chunk)}).with_columns(text.alias("text"))
        table.write_parquet(captions / f"{chunks - chunk:05d}.parquet")
    return {}


def hexadecimal(seed: int, num: int, num_bytes: int) -> pl.Series:
    data = np.random.default_rng(seed).bytes(num * num_bytes)
    fixed = pa.FixedSizeBinaryArray.from_buffers(pa.binary(num_bytes), num, [None, pa.py_buffer(data)])
    return pl.Series("uid", fixed.cast(pa.large_binary())).bin.encode("hex")


def write_shard(pairs: Path, number: int, uids: pl.Series, hashes: pl.Series) -> None:
    unit = schema.shard_name(number)
    rows = pl.DataFrame(
        {
            "key": [schema.sample_key(number, row) for row in range(len(uids))],
            "uid": uids,
            "sha256": hashes,
            "status": pl.repeat(schema.STATUS_SUCCESS, len(uids), eager=True),
        }
    )
    rows.write_parquet(ledger.part(pairs / f"{unit}.parquet"))
    ledger.commit(pairs, unit, [f"{unit}.parquet"], inputs={}, config={}, counts={"ok": len(uids)})


# --- the two joins ----------------------------------------------------------------------------------------------------


def join_by_clips(work: Path) -> dict[str, Any]:
    pairs, scratch = work / schema.PAIRS, work / "scratch"
    scratch.mkdir()
    join = Join(pairs, ledger.finished_units(pairs), "uid", scratch)
    join.read(CaptionTable(str(work / "captions_table"), "text", "uid", None, scratch))
    matched = 0
    for unit in join.units:
        images, texts, unknown = join.captions(unit)
        right = pl.DataFrame([images["uid"], pl.Series("text", texts)]).select(
            pl.col("text").str.contains(pl.col("uid"), literal=True).sum()
        )
        assert right.item() == len(images) - len(unknown)
        matched += right.item()
    return {"matched": matched, "scratch_gb": round(sum(f.stat().st_size for f in scratch.iterdir()) / 1e9, 2)}


def join_by_polars(work: Path) -> dict[str, Any]:
    pairs = pl.scan_parquet(work / schema.PAIRS / "*.parquet")
    captions = pl.scan_parquet(work / "captions_table" / "*.parquet")
    out = work / "polars.parquet"
    pairs.join(captions, on="uid").sink_parquet(out)
    return {"matched": pl.scan_parquet(out).select(pl.len()).collect().item()}


if __name__ == "__main__":
    main()
