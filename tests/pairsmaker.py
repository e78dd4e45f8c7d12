"""Writes a small valid work folder, ``pairs/`` and ``captions/<column>/``, for the tests of the stages to the right."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clips_data import ledger, schema, tars

Row = dict[str, Any]
FAILED_ROW = 3
"""This row of every shard is a URL that failed."""


def image_bytes(number: int, image_format: str = "JPEG", size_px: int = 24) -> bytes:
    """A picture whose colours depend on ``number``."""
    image = Image.new("RGB", (size_px + 8, size_px), (number * 37 % 256, number * 91 % 256, number * 151 % 256))
    image.paste((255 - number * 13 % 256, number * 7 % 256, 40), (4, 4, 12, 16))
    file = io.BytesIO()
    image.save(file, image_format)
    return file.getvalue()


def web_caption(number: int) -> str:
    return f"photo {number} for sale"


def synthetic_caption(number: int) -> str:
    return f"A box of colour {number} is here. It stands on the left. The ground is plain."


def write_pairs(
    work: Path, *, num_shards: int = 2, shard_rows: int = 6, change: Callable[[int, Row], None] | None = None
) -> Path:
    """Writes ``work/pairs``. ``change(number, row)`` may set ``image``, ``image_ext``, ``caption``, … of a row."""
    folder = work / schema.PAIRS
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(num_shards):
        _write_pairs_shard(folder, shard, shard_rows, change)
    return folder


def _write_pairs_shard(folder: Path, shard: int, shard_rows: int, change: Callable[[int, Row], None] | None) -> None:
    unit = schema.shard_name(shard)
    rows, codes = [], []
    with ledger.part(folder / f"{unit}.tar").open("wb") as file:
        writer = tars.TarWriter(file)
        for number in range(shard * shard_rows, (shard + 1) * shard_rows):
            row = pair_row(shard, number - shard * shard_rows, number)
            if change is not None:
                change(number, row)
            image = row.pop("image")
            codes.append(row["code"])
            if row["status"] == schema.STATUS_SUCCESS:
                row |= {"sha256": ledger.digest_bytes(image), "bytes": len(image)}
                writer.add(f"{row['key']}.{row['image_ext']}", image)
                writer.add(f"{row['key']}.txt", (row["caption"] or "").encode())
                writer.add(f"{row['key']}.json", json.dumps(row, sort_keys=True).encode())
            rows.append(row)
        writer.close()
    pq.write_table(pa.Table.from_pylist(rows), ledger.part(folder / f"{unit}.parquet"))
    counts = {code: codes.count(code) for code in sorted(set(codes))}
    files = [f"{unit}.tar", f"{unit}.parquet"]
    ledger.commit(folder, unit, files, inputs={"list": "0"}, config={"source": "test"}, counts=counts)


def pair_row(shard: int, place: int, number: int) -> Row:
    ok = place != FAILED_ROW
    return {
        "url": f"http://images.test/{number}.jpg?signature=secret",
        "caption": web_caption(number),
        "scene": f"0/{number}",
        "captions": json.dumps([f"box {number}", f"a box {number}"]),
        "key": schema.sample_key(shard, place),
        "status": schema.STATUS_SUCCESS if ok else "failed_to_download",
        "error_message": None if ok else "404",
        "code": "ok" if ok else "http_4xx",
        "width": 32 if ok else None,
        "height": 24 if ok else None,
        "original_width": 32 if ok else None,
        "original_height": 24 if ok else None,
        "sha256": None,
        "raw_sha256": None,
        "image_ext": "jpg" if ok else None,
        "bytes": None,
        "final_url": None,
        "attempts": 1,
        "image": image_bytes(number),
    }


def write_captions(
    work: Path, column: str = "synthetic", *, change: Callable[[int, Row], None] | None = None, seed: int = 0
) -> Path:
    """Writes ``work/captions/<column>`` for all pairs. ``change(number, row)`` may spoil rows."""
    folder = work / schema.CAPTIONS / column
    folder.mkdir(parents=True, exist_ok=True)
    number = -1
    for unit in ledger.finished_units(work / schema.PAIRS):
        rows = []
        for pair in pq.read_table(work / schema.PAIRS / f"{unit}.parquet").to_pylist():
            number += 1
            if pair["status"] == schema.STATUS_SUCCESS:
                rows.append(caption_row(pair, number))
                if change is not None:
                    change(number, rows[-1])
        about = schema.caption_metadata(
            model="demo", model_revision="0", engine="vllm", engine_version="0", prompt="describe", prompt_digest="0",
            sampling={}, seed=seed,
        )  # fmt: skip
        table = pa.Table.from_pylist(rows).replace_schema_metadata(about)
        pq.write_table(table, ledger.part(folder / f"{unit}.parquet"))
        codes = [row["code"] for row in rows]
        counts = {code: codes.count(code) for code in sorted(set(codes))}
        ledger.commit(folder, unit, [f"{unit}.parquet"], inputs={}, config={"seed": seed}, counts=counts)
    return folder


def caption_row(pair: Row, number: int) -> Row:
    text = synthetic_caption(number)
    return {
        "key": pair["key"], "sha256": pair["sha256"], "caption": text, "status": "success", "code": "ok",
        "finish_reason": "stop", "num_tokens": 20, "flags": [], "raw": text,
    }  # fmt: skip


def reject(row: Row, code: str = "refused") -> None:
    """Makes a caption row one without a usable caption."""
    row.update(caption="", status="failed", code=code)


def write_work(work: Path, **options: Any) -> Path:
    """Pairs and one synthetic column."""
    write_pairs(work, **options)
    write_captions(work)
    return work
