"""Features of all images of a split, or of a column of its captions: made once, shard by shard, and mapped after that.

A folder ``search/NAME/`` has for each tar ``UNIT.safetensors`` with

    features    [rows, width] fp16    unit features, zeros where a row has none
    there       [rows] bool

in the rows' order of the tar. The tar's digest is the file's input, so tars may be added, and those that changed are
embedded again. All of it can be deleted: it costs the time to embed again.

Shape suffixes: N rows, C channels, H and W pixels, E width of the features.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clips_data import ledger
from clips_data.errors import ResumeRefused, UserError
from clips_train import ahead, transforms
from clips_train.encoders import Encoder, Preprocessing
from clips_train.features import SUFFIX, FeatureWriter
from clips_train.shards import ShardError, ShardReader, Split

FEATURES, THERE_TENSOR = "features", "there"
NO_CAPTION, OK = "caption_missing", "ok"
LOCK: Final = ".lock"


@dataclass(frozen=True)
class Source:
    """What is embedded of a split, and how."""

    split: Split
    encoder: Encoder
    preprocessing: Preprocessing
    """Of images: the model's, or another one."""
    column: str | None
    """Caption column; ``None`` for the images."""
    batch: int
    num_workers: int


@dataclass(frozen=True)
class Store:
    """Features of a split. A position counts its rows through all tars, those without features too."""

    folder: Path
    split: Split
    features_NE: Sequence[Tensor]
    """One fp16 tensor a tar, mapped from its file."""
    there_N: Sequence[Tensor]
    digests: Mapping[str, str]
    """Unit → that of its file."""
    counts: Counter[str]
    """Rows by outcome: ``ok``, ``caption_missing``, or why an image could not be read."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of how it came about."""

    @property
    def num_features(self) -> int:
        return self.counts[OK]

    @property
    def width(self) -> int:
        return self.features_NE[0].shape[1]

    @functools.cached_property
    def starts(self) -> list[int]:
        """Position of the first row of each tar."""
        return [0, *accumulate(self.split.num_samples_by_shard)][:-1]

    def place(self, position: int) -> tuple[int, int]:
        """Number of the tar, and the row in it."""
        shard = bisect_right(self.starts, position) - 1
        while not self.split.num_samples_by_shard[shard]:  # an empty tar starts where the one before it does
            shard -= 1
        return shard, position - self.starts[shard]

    def blocks(self, num_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions, int64 [N], and features, fp16 [N, E], of at most ``num_rows`` rows at a time that have some."""
        for start, features_NE, there_N in zip(self.starts, self.features_NE, self.there_N, strict=True):
            for first in range(0, len(features_NE), num_rows):
                there = there_N[first : first + num_rows]
                rows = torch.nonzero(there).flatten()
                if len(rows):
                    block_NE = features_NE[first : first + num_rows]
                    yield start + first + rows, block_NE if len(rows) == len(block_NE) else block_NE[rows]


def up_to_date(source: Source, folder: Path, about: Mapping[str, Any], *, quiet: bool = False) -> Store:
    """The features of ``source``; those that ``folder`` does not have yet are made and stored there.

    ``about`` is what makes other features, for the sidecars. Raises ``UserError`` where no row has any.
    """
    inputs_of = source.split.inputs_by_unit
    notes: list[str] = []
    with ledger.readable_disk_errors(folder):
        if _missing(folder, inputs_of, about):
            folder.mkdir(parents=True, exist_ok=True)
            with alone(folder):
                notes += _refresh(source, folder, inputs_of, about, quiet=quiet)
    return _opened(source, folder, list(inputs_of), notes)


def _missing(folder: Path, inputs_of: Mapping[str, Mapping[str, str]], about: Mapping[str, Any]) -> dict[str, bool]:
    """Units to be made, in order, and whether they are there already, made of something else."""
    missing = {}
    for unit, inputs in inputs_of.items():
        try:
            if not ledger.is_done(folder, unit, inputs=inputs, config=about, overwrite=False):
                missing[unit] = False
        except ResumeRefused:
            missing[unit] = True
    return missing


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two searches that begin together would write the same files: the second waits, and finds them finished."""
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _refresh(
    source: Source,
    folder: Path,
    inputs_of: Mapping[str, Mapping[str, str]],
    about: Mapping[str, Any],
    *,
    quiet: bool,
) -> list[str]:
    """Makes what is still missing, now that nobody else does. What there is to say of it."""
    missing = _missing(folder, inputs_of, about)
    num_changed = sum(missing.values())
    _make(source, folder, {unit: inputs_of[unit] for unit in missing}, about, quiet=quiet)
    notes = []
    if num_changed:
        notes.append(
            f"{num_changed} of {len(inputs_of)} shards have changed since they were embedded; that was done again."
        )
    elif 0 < len(missing) < len(inputs_of):
        notes.append(f"{len(missing)} of {len(inputs_of)} shards were not embedded yet; that was done now.")
    return notes


# --- embedding --------------------------------------------------------------------------------------------------------


class _Task(NamedTuple):
    shard: int
    first_row: int
    stop_row: int


class _Chunk(NamedTuple):
    """Loaded rows: a picture or a caption for each one that has no reason for having none."""

    task: _Task
    things: list[Any]
    reasons: list[str | None]


class _Loader:
    """Turns a task into a chunk, in threads of this process or in workers."""

    def __init__(self, split: Split, preprocessing: Preprocessing, column: str | None) -> None:
        self._given = split, preprocessing, column
        self._reader = ShardReader(split)
        self._image_px, self._square, self._column = preprocessing.size, preprocessing.squarer(), column

    def __reduce__(self) -> Any:
        return _Loader, self._given

    def __call__(self, task: _Task) -> _Chunk:
        chunk = _Chunk(task, [], [])
        for row in range(task.first_row, task.stop_row):
            reason = None
            try:
                chunk.things.append(self._thing(task.shard, row))
            except (ShardError, transforms.BadImage, _NoCaption) as error:
                reason = error.reason
            chunk.reasons.append(reason)
        return chunk

    def _thing(self, shard: int, row: int) -> Tensor | str:
        """A picture as uint8 [C, H, W], or a caption."""
        if self._column is None:
            return self._square(transforms.decode(self._reader.image(shard, row), self._image_px))
        text = self._reader.about(shard, row).get(self._column)
        if not isinstance(text, str) or not text.strip():
            raise _NoCaption
        return text


class _NoCaption(Exception):
    reason = NO_CAPTION


def _make(
    source: Source,
    folder: Path,
    inputs_of: Mapping[str, Mapping[str, str]],
    about: Mapping[str, Any],
    *,
    quiet: bool,
) -> None:
    """Writes the file of each unit and commits it."""
    split = source.split
    number_of = {name.removesuffix(".tar"): number for number, name in enumerate(split.files)}
    rows_of = {unit: split.num_samples_by_shard[number_of[unit]] for unit in inputs_of}
    tasks = [task for unit in inputs_of for task in _tasks(number_of[unit], rows_of[unit], source.batch)]
    what = "image" if source.column is None else "caption"
    loader = _Loader(split, source.preprocessing, source.column)
    with (
        contextlib.closing(ahead.loaded(loader, tasks, source.num_workers)) as chunks,
        tqdm(total=sum(rows_of.values()), unit=what, desc="embed", disable=quiet or None, mininterval=1) as bar,
    ):
        for unit, inputs in inputs_of.items():
            name, counts = unit + SUFFIX, Counter[str]()
            layout = {
                FEATURES: (torch.float16, (rows_of[unit], source.encoder.width)),
                THERE_TENSOR: (torch.bool, (rows_of[unit],)),
            }
            with contextlib.closing(FeatureWriter(ledger.part(folder / name), layout, {})) as writer:
                num_left = rows_of[unit]
                while num_left:
                    chunk = next(chunks)
                    _write(writer, chunk, source)
                    counts.update(reason or OK for reason in chunk.reasons)
                    num_left -= len(chunk.reasons)
                    bar.update(len(chunk.reasons))
            ledger.commit(folder, unit, [name], inputs=inputs, config=about, counts=counts)


def _tasks(shard: int, num_rows: int, step: int) -> Iterator[_Task]:
    for first in range(0, num_rows, step):
        yield _Task(shard, first, min(first + step, num_rows))


def _write(writer: FeatureWriter, chunk: _Chunk, source: Source) -> None:
    there_N = torch.tensor([reason is None for reason in chunk.reasons])
    features_NE = torch.zeros(len(there_N), source.encoder.width)
    if chunk.things:
        encode = source.encoder.image_features if source.column is None else source.encoder.text_features
        found = encode(torch.stack(chunk.things) if source.column is None else chunk.things)  # type: ignore[arg-type]
        features_NE[there_N] = found.cpu()
    writer.write(FEATURES, chunk.task.first_row, features_NE)
    writer.write(THERE_TENSOR, chunk.task.first_row, there_N)


# --- opening ----------------------------------------------------------------------------------------------------------


def _opened(source: Source, folder: Path, units: Sequence[str], notes: list[str]) -> Store:
    from safetensors import SafetensorError, safe_open

    features_NE, there_N, digests = [], [], {}
    counts: Counter[str] = Counter()
    for unit, num_rows in zip(units, source.split.num_samples_by_shard, strict=True):
        sidecar = ledger.read_sidecar(folder, unit)
        assert sidecar is not None
        path = folder / (unit + SUFFIX)
        try:
            with safe_open(path, "pt") as file:
                features_NE.append(file.get_tensor(FEATURES))
                there_N.append(file.get_tensor(THERE_TENSOR))
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}). Delete {folder}; the next search makes it again.") from None
        assert features_NE[-1].shape == (num_rows, source.encoder.width) and len(there_N[-1]) == num_rows, path
        digests[unit] = sidecar.digest
        counts.update(sidecar.counts)
    if not counts[OK]:
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.most_common())
        what = "image" if source.column is None else f"caption of {source.column}"
        raise UserError(
            f"No {what} in split {source.split.name!r} of {source.split.folder} can be searched: {reasons}."
        )
    return Store(folder, source.split, features_NE, there_N, digests, counts, notes)
