"""Stored features of teachers, as far as the data side has to do with them: which samples they are of, and how many.

The files are safetensors that ``clips embed`` wrote (``clips_train.features`` says what is in them): a header in JSON,
then the bytes of each tensor. Here they are read and copied without any library.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from clips_data import agreement, ledger, schema
from clips_data.errors import UserError

SUFFIX: Final = ".safetensors"
INDEX_FILE: Final = "index.json"
_KEYS, _THERE, _IMAGE = "keys", "there.", "image"
_ALIGNMENT: Final = 8
_COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class Stored:
    """The header of one file. ``tensors`` has each tensor's ``dtype``, ``shape`` and ``data_offsets``."""

    path: Path
    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def num_rows(self) -> int:
        return int(self.tensors[_KEYS]["shape"][0])

    @property
    def names(self) -> list[str]:
        """Of the tensors, in their order in the file."""
        return sorted(self.tensors, key=lambda name: (self.tensors[name]["data_offsets"], name))

    def bytes_of(self, name: str) -> bytes:
        start, end = self.tensors[name]["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(self.data_start + start)
            return file.read(end - start)

    def keys(self) -> list[str]:
        """Of the samples, in the order of the rows."""
        rows, width = self.tensors[_KEYS]["shape"]
        data = self.bytes_of(_KEYS)
        return [data[row * width : (row + 1) * width].rstrip(b"\0").decode() for row in range(rows)]


def folders(work: Path) -> list[Path]:
    """Of all teachers, finished or not."""
    return [folder for folder in sorted((work / schema.EMBEDDINGS).glob("*")) if folder.is_dir()]


def read(path: Path) -> Stored:
    """Raises ``UserError`` for a file that is damaged."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size - 8:
                raise ValueError("its header does not end in it")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        stored = Stored(path, header, metadata, 8 + length)
        end = max(int(about["data_offsets"][1]) for about in header.values())
        if stored.data_start + end != path.stat().st_size or stored.num_rows < 0:
            raise ValueError("its tensors end elsewhere than it does")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}). Restore it.") from None
    return stored


# --- clips forget -----------------------------------------------------------------------------------------------------


def write_without(path: Path, gone: Collection[str], part: Path) -> None:
    """Writes the rows of other keys to ``part``, as ``clips embed`` would have without the samples of ``gone``."""
    stored = read(path)
    kept = [row for row, key in enumerate(stored.keys()) if key not in gone]
    header: dict[str, Any] = {"__metadata__": dict(stored.metadata)}
    row_bytes, end = {}, 0
    for name in stored.names:
        about = stored.tensors[name]
        start, stop = about["data_offsets"]
        row_bytes[name] = (stop - start) // max(1, stored.num_rows)
        size = row_bytes[name] * len(kept)
        header[name] = {**about, "shape": [len(kept), *about["shape"][1:]], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("rb") as old, part.open("wb") as new:
        new.write(len(text).to_bytes(8, "little") + text)
        for name in stored.names:
            start = stored.data_start + stored.tensors[name]["data_offsets"][0]
            for first, stop in _runs(kept):
                _copy(old, new, start + first * row_bytes[name], (stop - first) * row_bytes[name])


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring rows together: (first, after the last)."""
    first = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield rows[first], rows[place - 1] + 1
            first = place


def _copy(old: BinaryIO, new: BinaryIO, start: int, num_bytes: int) -> None:
    old.seek(start)
    while num_bytes:
        data = old.read(min(_COPY_BYTES, num_bytes))
        new.write(data)
        num_bytes -= len(data)


def counts(path: Path, before: Mapping[str, int]) -> dict[str, int]:
    """Rows by outcome. Why images are missing is known only ``before``, and told again while they are as many."""
    stored = read(path)
    there = {name: stored.bytes_of(name) for name in stored.tensors if name.startswith(_THERE)}
    found: Counter[str] = Counter()
    for row in range(stored.num_rows):
        if not there[_THERE + _IMAGE][row]:
            found["no_image"] += 1
        else:
            found["ok" if all(flags[row] for flags in there.values()) else "caption_missing"] += 1
    reasons = {name: number for name, number in before.items() if name not in ("ok", "caption_missing")}
    if sum(reasons.values()) == found["no_image"]:
        del found["no_image"]
        found.update(reasons)
    return dict(found)


def refresh_index(folder: Path, lineage: Mapping[str, str]) -> None:
    """Brings the index in line with files that lost rows. ``lineage``: digest of shards before → now."""
    path = folder / INDEX_FILE
    if (index := read_index(folder)) is None:
        return
    index["shards"] = lineage.get(index["shards"], index["shards"])
    for split in index["splits"].values():
        split["num_samples"] = sum(read(folder / name).num_rows for name in split["files"] if (folder / name).exists())
    ledger.write_json(path, index)


def read_index(folder: Path) -> dict[str, Any] | None:
    """``None`` where there is none. Raises ``UserError`` for a damaged one."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        index["shards"], index["splits"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). Delete it and run `clips embed` again.") from None
    return index


# --- clips verify, clips stats ----------------------------------------------------------------------------------------


def disagreements(folder: Path, unit: str, shards: Path) -> Iterator[agreement.Problem]:
    """A file against its sidecar and, while it is of the tar that is there, against the keys of that."""
    path = folder / (unit + SUFFIX)
    stored, sidecar = read(path), ledger.read_sidecar(folder, unit, check_files=False)
    assert sidecar is not None
    if (number := sum(sidecar.counts.values())) != stored.num_rows:
        yield path, f"has {stored.num_rows} rows and its sidecar counts {number}"
    beside = ledger.read_sidecar(shards, unit, check_files=False) if shards.is_dir() else None
    if beside is None or beside.digest != sidecar.inputs.get(schema.SHARDS):
        return
    wanted = [row["key"] for row in agreement.rows_of(shards / f"{unit}{agreement.INDEX}", ("key",))]
    if (keys := stored.keys()) != wanted:
        row = next(row for row in range(max(len(keys), len(wanted))) if keys[row : row + 1] != wanted[row : row + 1])
        yield path, f"row {row} is not of the sample that {unit}{agreement.INDEX} has there"


def gather(folder: Path) -> dict[str, Any]:
    """For ``clips stats``: rows with their denominators, what was stored of each, and whether a run can use it."""
    units = ledger.finished_units(folder)
    rows: Counter[str] = Counter()
    num_bytes = 0
    for unit in units:
        sidecar = ledger.read_sidecar(folder, unit, check_files=False)
        assert sidecar is not None
        rows.update(sidecar.counts)
        num_bytes += sum(about["bytes"] for about in sidecar.files.values())
    stored = read(folder / (units[0] + SUFFIX))
    shape, dtype = stored.tensors[_IMAGE]["shape"], stored.tensors[_IMAGE]["dtype"]
    index = read_index(folder)
    splits = index["splits"] if index is not None else {}
    attempted, ok = sum(rows.values()), rows.pop("ok", 0)
    return {
        "attempted": attempted,
        "succeeded": ok,
        "failures": dict(rows),
        "shards": len(units),
        "complete_splits": ", ".join(sorted(splits)) or "none",
        "teachers": ", ".join(str(teacher["model"]) for teacher in json.loads(stored.metadata["teachers"])),
        "augmentations": shape[1],
        "width": shape[2],
        "type": dtype,
        "texts": ", ".join(name.removeprefix("text.") for name in stored.names if name.startswith("text.")),
        "bytes": num_bytes,
        "bytes_per_sample": math.ceil(num_bytes / attempted) if attempted else 0,
    }
