"""The files of a teacher's stored features: one safetensors file a shard, written row by row in place.

A folder ``embeddings/NAME/`` has for each tar of ``shards/`` ``UNIT.safetensors`` with

    image           [rows, augmentations, width]   unit features of each teacher, one after the other
    text.COLUMN     [rows, width]                  likewise, of whole captions
    there.image     [rows] bool                    false: no such image, its features are NaN
    there.COLUMN    [rows] bool
    keys            [rows, bytes] uint8            the samples' keys in UTF-8, zeros after them

in the rows' order of the tar, and ``index.json``, once a split is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from clips_data import ledger
from clips_data.errors import UserError
from clips_data.schema import SCHEMA_VERSION

INDEX_FILE: Final = "index.json"
SUFFIX: Final = ".safetensors"
IMAGE, KEYS, TEXT, THERE = "image", "keys", "text.", "there."
TYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES: Final = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.bool: "BOOL", torch.uint8: "U8",
}  # fmt: skip

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Name → type and shape of each tensor."""


def layout(
    keys: Sequence[str], columns: Sequence[str], *, num_augmentations: int, width: int, dtype: torch.dtype
) -> Layout:
    rows = len(keys)
    return {
        IMAGE: (dtype, (rows, num_augmentations, width)),
        **{TEXT + column: (dtype, (rows, width)) for column in columns},
        KEYS: (torch.uint8, (rows, max((len(key.encode()) for key in keys), default=0))),
        **{THERE + name: (torch.bool, (rows,)) for name in (IMAGE, *columns)},
    }


class FeatureWriter:
    """Writes the tensors of one file in any order of rows, without holding them: memory is that of what is written."""

    def __init__(self, path: Path, tensors: Layout, about: Mapping[str, str]) -> None:
        """``about`` becomes the file's metadata. Rows that are never written are zeros."""
        header: dict[str, Any] = {"__metadata__": {"clips_schema_version": str(SCHEMA_VERSION), **about}}
        self._starts: dict[str, int] = {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            self._starts[name] = end
            end += math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [self._starts[name], end]}
        text = json.dumps(header, sort_keys=True).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned
        self._tensors, self._data_start = tensors, 8 + len(text)
        path.unlink(missing_ok=True)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._data_start + end)

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Puts ``rows`` [n, …] from ``first_row`` on, in the type of the file."""
        dtype, shape = self._tensors[name]
        assert tuple(rows.shape[1:]) == shape[1:] and first_row + len(rows) <= shape[0], (name, rows.shape, shape)
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        data = rows.to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy()
        self._file.seek(self._data_start + self._starts[name] + first_row * row_bytes)
        self._file.write(data.data)

    def write_keys(self, keys: Sequence[str]) -> None:
        width = self._tensors[KEYS][1][1]
        data = b"".join(key.encode().ljust(width, b"\0") for key in keys)
        if data:
            self.write(KEYS, 0, torch.frombuffer(bytearray(data), dtype=torch.uint8).view(len(keys), width))

    def close(self) -> None:
        self._file.close()


def read_index(folder: Path) -> dict[str, Any]:
    """``index.json`` of stored features. Raises ``UserError`` where there is none, or one that clips did not write."""
    path = folder / INDEX_FILE
    if not path.is_file():
        num_finished = len(ledger.finished_units(folder))
        begun = f"{num_finished} of its shards finished, others missing" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} holds no complete features of a teacher ({begun}). Run `clips embed` first.")
    try:
        index = dict(json.loads(path.read_text(encoding="utf-8")))
        version = index["schema_version"]
        if version == SCHEMA_VERSION:
            for key in ("shards", "splits", "teachers", "columns", "num_augmentations", "augment", "seed"):
                index[key]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is not an index that `clips embed` wrote ({type(error).__name__}: {error}). Delete it and run "
            "`clips embed` again."
        ) from None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this version of clips reads {SCHEMA_VERSION}. Use the clips version "
            "that wrote it, or make the features again."
        )
    return index
