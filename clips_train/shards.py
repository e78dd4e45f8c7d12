"""Reads a ``shards/`` folder: what ``index.json`` names, by offset, without extracting anything.

Each tar has an offset index beside it, so a sample is two ``pread`` calls and the order of reading is ours to choose.
"""

from __future__ import annotations

import functools
import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from clips_data import draws, ledger
from clips_data.errors import UserError, did_you_mean
from clips_data.schema import SCHEMA_VERSION, SHARDS

INDEX_FILE = "index.json"
TRAIN, HELDOUT = "train", "heldout"
OPEN_FILES = 256
INDEXES_IN_MEMORY = 64
BLOCK_BYTES = 512
MAX_JSON_BYTES = 1 << 26
"""No sample's texts come near this: what claims to be longer is not parsed."""
_TEXTS = ("key", "sha256", "image_ext")
_MEMBERS = ("image", "txt", "json")


@dataclass(frozen=True)
class Row:
    """One sample as it lies on disk."""

    key: str
    image: bytes
    about: Mapping[str, Any]
    """The sample's ``.json`` member: columns, sub-caption spans, scores, extra columns, provenance."""


class ShardError(Exception):
    """A sample's bytes are not what the index promises.

    ``reason`` is ``short_read | json_invalid | json_too_large | json_of_another_sample``, and of others' tars also
    ``txt_invalid``.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Split:
    """The finished shards of one split, in the order of ``index.json``."""

    folder: Path
    name: str
    files: tuple[str, ...]
    num_samples_by_shard: tuple[int, ...]
    columns: tuple[str, ...]
    digest: str

    @property
    def num_samples(self) -> int:
        return sum(self.num_samples_by_shard)

    @property
    def inputs_by_unit(self) -> dict[str, dict[str, str]]:
        """Unit → what is made of it is made of: a tar counts by its own digest, so that shards may be added."""
        found = {}
        for unit in (name.removesuffix(".tar") for name in self.files):
            sidecar = ledger.read_sidecar(self.folder, unit, check_files=False)
            found[unit] = {SHARDS: self.digest if sidecar is None else sidecar.digest}
        return found

    def rows(self, shard: int) -> dict[str, list[Any]]:
        """A tar's offset index, as lists by column. Raises ``UserError`` for one that is damaged."""
        tar = self.folder / self.files[shard]
        path = tar.with_name(tar.name.removesuffix(".tar") + ".index.parquet")
        if not path.exists():
            raise UserError(f"{path} is missing, without it {tar.name} cannot be read. Run `clips shard` again.")
        table = _read_table(path)
        promised, found = self.num_samples_by_shard[shard], table.num_rows
        if found != promised:
            raise UserError(f"{path} lists {found} samples, {INDEX_FILE} promises {promised}. Run `clips shard` again.")
        _check_places(table, path, tar)
        rows: dict[str, list[Any]] = table.to_pydict()
        return rows

    def about(self, rows: Mapping[str, Sequence[Any]], row: int, tar: TarFile) -> dict[str, Any]:
        """A sample's ``.json`` member. Raises ``ShardError``."""
        if rows["json_bytes"][row] > MAX_JSON_BYTES:
            raise ShardError("json_too_large")
        about = _parse(tar.read(rows["json_offset"][row], rows["json_bytes"][row]))
        if about.get("key", rows["key"][row]) != rows["key"][row]:
            raise ShardError("json_of_another_sample")
        return about


def open_split(folder: Path, name: str) -> Split:
    """The split ``name`` of a ``shards/`` folder.

    Raises ``UserError`` when the folder is unfinished, of another schema version, lacks the split, or when a tar has
    not the size that ``index.json`` states.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {INDEX_FILE}, so it holds no finished shards. Run `clips shard` first.")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}). Make the shards again with `clips shard`.") from error
    version = index.get("schema_version") if isinstance(index, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this version of clips reads {SCHEMA_VERSION}. "
            "Use the clips version that wrote it, or make the shards again."
        )
    if isinstance(index.get("splits"), dict) and name not in index["splits"]:
        raise UserError(f"{path} has no split {name!r}. {did_you_mean(name, index['splits'])}")
    try:
        shards = [
            _Shard(**{field: about[field] for field in _Shard._fields}) for about in index["splits"][name]["shards"]
        ]
        columns, digest = tuple(map(str, index["columns"])), str(index["digest"])
        _check_shards(shards)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not an index that `clips shard` wrote ({type(error).__name__}: {error}). Make the shards again."
        ) from None
    for shard in shards:
        _check_size(folder / shard.file, shard.bytes, path)
    return Split(
        folder=folder,
        name=name,
        files=tuple(shard.file for shard in shards),
        num_samples_by_shard=tuple(shard.num_samples for shard in shards),
        columns=columns,
        digest=digest,
    )


class _Shard(NamedTuple):
    """What ``index.json`` says of a tar."""

    file: str
    num_samples: int
    bytes: int


def _check_shards(shards: Sequence[_Shard]) -> None:
    """Raises ``ValueError`` for a tar outside the folder, one that is named twice, and sizes that are none."""
    for shard in shards:
        if not isinstance(shard.file, str) or Path(shard.file).name != shard.file or not shard.file.endswith(".tar"):
            raise ValueError(f"{shard.file!r} is no tar of this folder")
        for field in ("num_samples", "bytes"):
            number = getattr(shard, field)
            if type(number) is not int or number < 0:
                raise ValueError(f"{shard.file} has {field} {number!r}")
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError("a tar is named twice")


def _check_size(tar: Path, size_bytes: int, index: Path) -> None:
    found = tar.stat().st_size if tar.exists() else None
    if found != size_bytes:
        there = "nothing is there" if found is None else f"the file has {found}"
        raise UserError(
            f"{index} promises {tar.name} with {size_bytes} bytes, but {there}. Restore it or run `clips shard` again."
        )


class ShardReader:
    """Random access to the samples of a split. Safe to share between threads and to send to worker processes."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._open_caches()

    def _open_caches(self) -> None:
        self._file = functools.lru_cache(OPEN_FILES)(self._open_file)
        self._index = functools.lru_cache(INDEXES_IN_MEMORY)(self.split.rows)

    def __getstate__(self) -> Split:
        return self.split

    def __setstate__(self, split: Split) -> None:
        self.__init__(split)  # type: ignore[misc]

    def _open_file(self, shard: int) -> TarFile:
        return TarFile(self.split.folder / self.split.files[shard])

    def key(self, shard: int, row: int) -> str:
        return str(self._index(shard)["key"][row])

    def about(self, shard: int, row: int) -> dict[str, Any]:
        """The sample's columns and what else its ``.json`` member holds. Raises ``ShardError``."""
        return self.split.about(self._index(shard), row, self._file(shard))

    def image(self, shard: int, row: int) -> bytes:
        """The image file's bytes. Raises ``ShardError``."""
        index = self._index(shard)
        return self._file(shard).read(index["image_offset"][row], index["image_bytes"][row])

    def row(self, shard: int, row: int) -> Row:
        """One whole sample. Raises ``ShardError``."""
        return Row(self.key(shard, row), self.image(shard, row), self.about(shard, row))


def _read_table(path: Path) -> pa.Table:
    """An offset index. Raises ``UserError`` for one that is damaged or lacks a column."""
    wanted = dict.fromkeys(_TEXTS, "string")
    wanted |= {f"{member}_{what}": "int64" for member in _MEMBERS for what in ("offset", "bytes")}
    try:
        with pq.ParquetFile(path) as file:
            table = file.read([name for name in file.schema_arrow.names if name in wanted])
            table.validate(full=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({reason}). Restore it or run `clips shard` again.") from None
    for name, kind in wanted.items():
        found = str(table.schema.field(name).type) if name in table.column_names else "absent"
        if found.removeprefix("large_") != kind:
            raise UserError(f"{path} has column {name!r} as {found} instead of {kind}. Run `clips shard` again.")
        if table[name].null_count:
            row = table[name].is_null().index(True).as_py()
            raise UserError(f"{path} row {row} has no {name}. Restore it or run `clips shard` again.")
    return table.select(list(wanted))


def _check_places(table: pa.Table, path: Path, tar: Path) -> None:
    """Refuses rows that point outside the tar, or at what cannot be the begin of a member's data."""
    tar_bytes = tar.stat().st_size
    for member in _MEMBERS:
        offset, size = (table[f"{member}_{what}"].to_numpy() for what in ("offset", "bytes"))
        wrong = (offset < BLOCK_BYTES) | (offset % BLOCK_BYTES != 0) | (size < 0) | (size > tar_bytes - offset)
        if wrong.any():
            row = int(wrong.argmax())
            raise UserError(
                f"{path} row {row} (key {table['key'][row]}) has its {member} at byte {offset[row]} with {size[row]} "
                f"bytes, where {tar.name} ({tar_bytes} bytes) has none. Restore it or run `clips shard` again."
            )


def _parse(data: bytes) -> dict[str, Any]:
    """A ``.json`` member as `clips shard` writes it: one object, no name twice, no NaN, no half characters."""
    try:
        about = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
        if rb"\u" in data:
            json.dumps(about, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ShardError("json_invalid") from error
    if not isinstance(about, dict):
        raise ShardError("json_invalid")
    return about


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


class TarFile:
    """A read-only descriptor that closes itself when it leaves the cache."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, num_bytes: int) -> bytes:
        data = os.pread(self._descriptor, num_bytes, offset)
        if len(data) != num_bytes:
            raise ShardError("short_read")
        return data

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class SampleOrder:
    """The order in which an epoch visits a split: a function of (seed, epoch) alone.

    Shards are permuted; ``window_shards`` neighbours of that permutation form a window whose samples are permuted as a
    whole. A position is therefore found without walking there, and few tars are open at a time.
    """

    def __init__(self, num_samples_by_shard: Sequence[int], *, seed: int, window_shards: int) -> None:
        self._num_samples_by_shard = list(num_samples_by_shard)
        self._seed = seed
        self._window_shards = window_shards
        self.num_samples = sum(self._num_samples_by_shard)
        self._windows = functools.lru_cache(2)(self._epoch_windows)
        self._window = functools.lru_cache(2)(self._window_samples)

    def __getstate__(self) -> tuple[list[int], int, int]:
        return self._num_samples_by_shard, self._seed, self._window_shards

    def __setstate__(self, state: tuple[list[int], int, int]) -> None:
        self.__init__(state[0], seed=state[1], window_shards=state[2])  # type: ignore[misc]

    def locate(self, epoch: int, position: int) -> tuple[int, int]:
        """(shard, row in that shard) of the sample at ``position`` of ``epoch``; 0 ≤ position < ``num_samples``."""
        _, starts = self._windows(epoch)
        window = bisect_right(starts, position) - 1
        shards, shard_starts, order = self._window(epoch, window)
        flat = order[position - starts[window]]
        at = bisect_right(shard_starts, flat) - 1
        return shards[at], flat - shard_starts[at]

    def _epoch_windows(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """The shards of each window that holds samples, and the position at which each window starts."""
        shards = draws.permutation(len(self._num_samples_by_shard), self._seed, "order.shards", epoch)
        shards = [shard for shard in shards if self._num_samples_by_shard[shard]]
        windows = [shards[i : i + self._window_shards] for i in range(0, len(shards), self._window_shards)]
        return windows, _starts([sum(self._num_samples_by_shard[shard] for shard in window) for window in windows])

    def _window_samples(self, epoch: int, window: int) -> tuple[list[int], list[int], list[int]]:
        shards = self._windows(epoch)[0][window]
        counts = [self._num_samples_by_shard[shard] for shard in shards]
        return shards, _starts(counts), draws.permutation(sum(counts), self._seed, "order.window", epoch, str(window))


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *accumulate(counts)][:-1]
