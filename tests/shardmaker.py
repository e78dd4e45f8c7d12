"""Writes a small valid ``shards/`` folder for the tests of the trainer: coloured shapes and captions that name them."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")
SHAPES = ("circle", "square", "bar")
PLACES = ("left", "right")


def sample(number: int, *, size_px: int = 40, image_format: str = "JPEG") -> tuple[bytes, dict[str, Any]]:
    """Image bytes and the ``.json`` member of sample ``number``; equal numbers modulo 48 look and read alike."""
    colour = COLOURS[number % 8]
    shape = SHAPES[number // 8 % 3]
    place = PLACES[number // 24 % 2]
    image = Image.new("RGB", (size_px + 8, size_px), (128, 128, 128))
    left = 4 if place == "left" else size_px // 2 + 4
    box = (left, size_px // 4, left + size_px // 3, size_px // 4 * 3)
    canvas = ImageDraw.Draw(image)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    else:
        canvas.rectangle(box if shape == "square" else (box[0], 0, box[0] + 6, size_px), fill=colour)
    file = io.BytesIO()
    image.save(file, image_format)
    sentences = [f"There is a {colour} {shape}.", f"It stands on the {place}.", "The ground is gray."]
    spans, start = [], 0
    for sentence in sentences:
        spans.append([start, start + len(sentence) - 1])
        start += len(sentence) + 1
    captions = [
        f"a {colour} {shape} {place}",
        f"{colour} {shape}",
        f"{shape} on the {place}",
        colour,
        f"{place} {shape}",
    ]
    about = {
        "web": f"{colour} {shape} photo {number}",
        "synthetic": " ".join(sentences),
        "sub_captions": {"synthetic": spans},
        "scores": {},
        "extra": {"scene": f"0/{number}", "captions": captions},
        "provenance": {},
    }
    return file.getvalue(), about


def write_shards(
    folder: Path,
    *,
    num_train: int = 32,
    num_heldout: int = 8,
    shard_rows: int = 12,
    size_px: int = 40,
    change: Callable[[str, int, bytes, dict[str, Any]], tuple[bytes, dict[str, Any]]] | None = None,
) -> Path:
    """Writes ``folder`` and returns it. ``change(split, number, image, about)`` may spoil samples on their way."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, numbers in (("train", range(num_train)), ("heldout", range(num_train, num_train + num_heldout))):
        shards = []
        for shard, first in enumerate(range(0, len(numbers), shard_rows)):
            rows = []
            for number in numbers[first : first + shard_rows]:
                image, about = sample(number, size_px=size_px)
                if change is not None:
                    image, about = change(split, number, image, about)
                rows.append((f"{number:09d}", image, about))
            shards.append(_write_tar(folder, f"{split}-{shard:05d}", rows))
        splits[split] = {"num_samples": len(numbers), "shards": shards}
    index = {
        "schema_version": 1,
        "splits": splits,
        "columns": ["web", "synthetic"],
        "mix": {"web_ratio": 0.8, "seed": 0},
        "digest": hashlib.sha256(json.dumps(splits).encode()).hexdigest(),
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def _write_tar(folder: Path, name: str, rows: list[tuple[str, bytes, dict[str, Any]]]) -> dict[str, Any]:
    table: list[dict[str, Any]] = []
    path = folder / f"{name}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, image, about in rows:
            sha256 = hashlib.sha256(image).hexdigest()
            text = json.dumps({"key": key, "sha256": sha256, **about}, sort_keys=True, ensure_ascii=False).encode()
            row: dict[str, Any] = {"key": key, "sha256": sha256, "image_ext": "jpg"}
            for kind, ext, data in (
                ("image", "jpg", image),
                ("txt", "txt", about["web"].encode()),
                ("json", "json", text),
            ):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                row[f"{kind}_offset"] = tar.offset + tarfile.BLOCKSIZE
                row[f"{kind}_bytes"] = len(data)
                tar.addfile(info, io.BytesIO(data))
            table.append(row)
    pq.write_table(pa.Table.from_pylist(table), folder / f"{name}.index.parquet")
    data = path.read_bytes()
    return {"file": path.name, "num_samples": len(rows), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
