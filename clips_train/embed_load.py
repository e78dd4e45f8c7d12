"""Rows of shards as ``clips embed`` shows them to teachers: all stored augmentations of a picture, and captions.

Shape suffixes: A augmentations, N images, C channels, H and W pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clips_train import transforms
from clips_train.shards import ShardError, ShardReader, Split
from clips_train.use_config import EmbedConfig

LOADER_THREADS = 2
CHUNKS_AHEAD = 4
"""Chunks in flight, over all workers; with ``batch`` and the image size this bounds the memory."""
DECODED_BYTES = 1 << 30
"""Of one image at all scales, kept while its augmentations are made."""


class Task(NamedTuple):
    shard: int
    first_row: int
    stop_row: int


class Chunk(NamedTuple):
    """Loaded rows. Those without a picture have zeros for one."""

    task: Task
    keys: list[str]
    pixels_NCHW: dict[int, Tensor]
    """By side in pixels: uint8, the augmentations of a row one after the other."""
    captions: dict[str, list[str]]
    reasons: list[str | None]
    """Why a row has no picture."""


class Loader(Dataset[Any]):
    """Turns a task into a chunk. Lives in the embedding process or, as a copy, in each worker process."""

    def __init__(self, split: Split, config: EmbedConfig, sides_px: Sequence[int]) -> None:
        self._config = config
        self._sides_px = sorted(set(sides_px))
        self._reader = ShardReader(split)

    def __getitem__(self, task: Task) -> Chunk:
        rows = range(task.first_row, task.stop_row)
        keys = [self._reader.key(task.shard, row) for row in rows]
        captions: dict[str, list[str]] = {column: [] for column in self._config.columns}
        pixels: dict[int, list[Tensor]] = {side_px: [] for side_px in self._sides_px}
        reasons: list[str | None] = []
        for row, key in zip(rows, keys, strict=True):
            try:
                about = self._reader.about(task.shard, row)
                of_row = self._augmented(self._reader.image(task.shard, row), key)
            except (ShardError, transforms.BadImage) as error:
                reasons.append(error.reason)
                about, of_row = {}, {side_px: self._nothing(side_px) for side_px in self._sides_px}
            else:
                reasons.append(None)
            for side_px, pixels_ACHW in of_row.items():
                pixels[side_px].append(pixels_ACHW)
            for column, found in captions.items():
                text = about.get(column)
                found.append(text if isinstance(text, str) and text.strip() else "")
        whole = {side_px: torch.cat(of_rows) for side_px, of_rows in pixels.items()}
        return Chunk(task, keys, whole, captions, reasons)

    def _augmented(self, data: bytes, key: str) -> dict[int, Tensor]:
        """Raises ``BadImage``."""
        decoded = transforms.PictureCache(DECODED_BYTES).of(key)
        return {side_px: augmentations(data, side_px, self._config, key, decoded) for side_px in self._sides_px}

    def _nothing(self, side_px: int) -> Tensor:
        return torch.zeros(self._config.num_augmentations, 3, side_px, side_px, dtype=torch.uint8)


def augmentations(data: bytes, side_px: int, config: EmbedConfig, key: str, kept: transforms.Kept) -> Tensor:
    """What a training run will draw of an image file: uint8 [A, 3, side_px, side_px]. Raises ``BadImage``."""
    views = [
        transforms.training_view(
            lambda: data, side_px, config.augment, seed=config.seed, epoch=number, key=key, kept=kept
        )
        for number in range(config.num_augmentations)
    ]
    return torch.stack(views)


class _Tasks(torch.utils.data.Sampler[Task]):
    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)


def loaded(loader: Loader, tasks: Sequence[Task], num_workers: int) -> Iterator[Chunk]:
    """Chunks in the order of their tasks, loaded a bounded way ahead."""
    if num_workers > 0:
        yield from DataLoader(
            loader,
            batch_size=None,
            sampler=_Tasks(tasks),
            num_workers=num_workers,
            prefetch_factor=max(1, CHUNKS_AHEAD // num_workers),
            multiprocessing_context="forkserver",
        )
        return
    flying: deque[Future[Chunk]] = deque()
    pool = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="clips-embed")
    try:
        for task in tasks:
            flying.append(pool.submit(loader.__getitem__, task))
            if len(flying) > CHUNKS_AHEAD:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
