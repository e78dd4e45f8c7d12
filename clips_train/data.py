"""The stream of training batches: shards in, tensors out, in an order that a resumed run continues exactly.

Everything about a sample is a function of (seed, epoch, key), and samples leave in the order of ``SampleOrder``. So a
batch depends neither on the number of workers nor on when the run was last interrupted. A sample that cannot be used
is counted by its reason, and the next one takes its place.

Shape suffixes: N samples, C channels, H and W pixels, L text slots, Q target slots.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clips_data import draws
from clips_data.errors import ResumeRefused, UserError
from clips_train import transforms, views
from clips_train.config import TrainConfig
from clips_train.mixed import Mixed
from clips_train.shards import SampleOrder, ShardError, ShardReader, Split
from clips_train.tokenizer import Tokenizer

CHUNK = 32
"""Samples per task of a worker."""
LOADER_THREADS = 2
CHUNKS_AHEAD = 8
"""Tasks in flight, over all workers: the bound on prefetched samples is this times ``CHUNK``."""


@dataclass(frozen=True)
class Batch:
    """One step's samples. Images are uint8, ids and labels int64, the mask bool (true where a label counts)."""

    image_NCHW: Tensor
    web_NL: Tensor
    short_NL: Tensor
    labels_NQ: Tensor
    mask_NQ: Tensor
    keys: list[str]
    state: dict[str, Any]
    """State of the stream after this batch; ``SampleStream(..., state=...)`` continues with the next one."""


@dataclass(frozen=True)
class _Good:
    position: int
    key: str
    tensors: tuple[Tensor, ...]
    counts: tuple[str, ...]
    """What to count about it."""


@dataclass(frozen=True)
class _Bad:
    position: int
    key: str
    reason: str


_Task = tuple[int, int, int]
"""(epoch, first position, position after the last)"""


class _Loader(Dataset[Any]):
    """Turns a task into loaded samples. Lives in the training process or, as a copy, in each worker process."""

    def __init__(self, split: Split, config: TrainConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._reader = ShardReader(split)
        self._order = SampleOrder(split.num_samples_by_shard, seed=config.seed, window_shards=config.window_shards)
        self._caption_of = _shuffled(split, config.seed) if config.shuffle_captions else None
        self._mixed = Mixed.open(split, config)
        self._pictures = _PictureCache(config.cache_bytes if config.num_workers == 0 else 0)

    def __getitem__(self, task: _Task) -> list[_Good | _Bad]:
        epoch, start, stop = task
        return [self._load(epoch, position) for position in range(start, stop)]

    def _load(self, epoch: int, position: int) -> _Good | _Bad:
        shard, row = self._order.locate(epoch, position)
        key = self._reader.key(shard, row)
        try:
            return self._load_good(epoch, position, shard, row, key)
        except (ShardError, transforms.BadImage, views.NoCaption) as error:
            return _Bad(position, key, error.reason)

    def _load_good(self, epoch: int, position: int, shard: int, row: int, key: str) -> _Good:
        config = self._config
        picture = self._picture(shard, row)
        caption = self._caption_of[shard, row] if self._caption_of else (shard, row)
        about = self._reader.about(*caption)
        mixed, counts = self._mixed.text(about, epoch, self._reader.key(*caption)) if self._mixed else (None, ())
        texts = views.text_views(
            about,
            web_column=config.web_column,
            synthetic_column=config.synthetic_column,
            reduce=config.reduce,
            web_budget=self._tokenizer.budget(config.context_length),
            short_budget=self._tokenizer.budget(min(config.tokens, config.context_length)),
            count=config.num_sentences,
            tokenizer=self._tokenizer,
            draw=views.Draw(config.seed, epoch, key),
            mixed=mixed,
        )
        counts += tuple(f"fallback.{name}" for name in texts.fallbacks)
        image_CHW = transforms.augment(picture, config.image_px, config.augment, seed=config.seed, epoch=epoch, key=key)
        ids_2L = self._tokenizer.from_pieces([texts.web, texts.short], config.context_length)
        labels_1Q, mask_1Q = self._tokenizer.targets([texts.target], config.target_length)
        return _Good(position, key, (image_CHW, ids_2L[0], ids_2L[1], labels_1Q[0], mask_1Q[0]), counts)

    def _picture(self, shard: int, row: int) -> Image.Image:
        picture = self._pictures.get((shard, row))
        if picture is None:
            picture = transforms.decode(self._reader.image(shard, row), self._config.image_px)
            self._pictures.put((shard, row), picture)
        return picture


class _PictureCache:
    """Decoded pictures, up to a number of bytes; what came first stays. Without effect on what is loaded."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._pictures: dict[tuple[int, int], Image.Image] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> int:
        return self._limit_bytes

    def __setstate__(self, limit_bytes: int) -> None:
        self.__init__(limit_bytes)  # type: ignore[misc]

    def get(self, at: tuple[int, int]) -> Image.Image | None:
        return self._pictures.get(at)

    def put(self, at: tuple[int, int], picture: Image.Image) -> None:
        num_bytes = picture.width * picture.height * 3
        with self._lock:
            if self._used_bytes + num_bytes <= self._limit_bytes:
                self._used_bytes += num_bytes
                self._pictures[at] = picture


def _shuffled(split: Split, seed: int) -> dict[tuple[int, int], tuple[int, int]]:
    """The control arm: which sample's captions each image gets. No image keeps its own (given two samples or more)."""
    places = [(shard, row) for shard, count in enumerate(split.num_samples_by_shard) for row in range(count)]
    order = draws.permutation(len(places), seed, "shuffle_captions", 0)
    return {places[order[i]]: places[order[i - 1]] for i in range(len(order))}


class SampleStream:
    """Yields batches without end, epoch after epoch.

    A batch never spans two epochs, so that no image meets itself as a negative: the last, incomplete one is left out,
    and the shuffle makes that other samples each time. ``state`` comes from ``Batch.state``.

    Raises ``ResumeRefused`` when the state belongs to other data or another seed, ``UserError`` when a whole epoch does
    not fill one batch.
    """

    def __init__(
        self,
        split: Split,
        config: TrainConfig,
        tokenizer: Tokenizer,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        fresh: dict[str, Any] = {"digest": split.digest, "seed": config.seed, "epoch": 0, "position": 0, "counts": {}}
        self._start: dict[str, Any] = dict(state) if state is not None else fresh
        for name in ("digest", "seed"):
            if self._start[name] != fresh[name]:
                raise ResumeRefused(
                    f"The checkpoint was trained on data with {name} {self._start[name]}, {split.folder} has "
                    f"{fresh[name]}. Use --overwrite to start again, or another run name to keep both."
                )
        self._split = split
        self._config = config
        self._loader = _Loader(split, config, tokenizer)

    def batches(self) -> Generator[Batch]:
        counts: Counter[str] = Counter(self._start["counts"])
        epoch, filled = self._start["epoch"], self._start["position"] > 0
        waiting: list[_Good] = []
        for task_epoch, items in self._loaded():
            if task_epoch != epoch:
                if not filled:
                    raise self._too_few(counts)
                epoch, waiting, filled = task_epoch, [], False
            for item in items:
                _count(counts, item)
                if isinstance(item, _Bad):
                    continue
                waiting.append(item)
                if len(waiting) == self._config.batch:
                    state = self._start | {"epoch": epoch, "position": item.position + 1, "counts": dict(counts)}
                    yield _collate(waiting, state)
                    waiting, filled = [], True

    def _too_few(self, counts: Counter[str]) -> UserError:
        bad = {name: number for name, number in counts.items() if name.startswith("bad.")}
        return UserError(
            f"{self._split.folder} has {self._split.num_samples} {self._split.name} samples, of which "
            f"{sum(bad.values())} are unusable {bad or ''}: too few for one batch of {self._config.batch}. "
            "Choose a smaller batch or add data."
        )

    def _tasks(self) -> Iterator[_Task]:
        epoch, position = self._start["epoch"], self._start["position"]
        while True:
            for start in range(position, self._split.num_samples, CHUNK):
                yield epoch, start, min(start + CHUNK, self._split.num_samples)
            if self._split.num_samples == 0:
                raise self._too_few(Counter())
            epoch, position = epoch + 1, 0

    def _loaded(self) -> Iterator[tuple[int, Sequence[_Good | _Bad]]]:
        """Tasks with their loaded samples, in order, loaded a bounded way ahead."""
        if self._config.num_workers > 0:
            return self._loaded_by_processes()
        return self._loaded_by_threads()

    def _loaded_by_threads(self) -> Iterator[tuple[int, Sequence[_Good | _Bad]]]:
        flying: deque[tuple[int, Future[list[_Good | _Bad]]]] = deque()
        pool = ThreadPoolExecutor(LOADER_THREADS, thread_name_prefix="clips-loader")
        try:
            for task in self._tasks():
                flying.append((task[0], pool.submit(self._loader.__getitem__, task)))
                if len(flying) >= CHUNKS_AHEAD:
                    epoch, future = flying.popleft()
                    yield epoch, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _loaded_by_processes(self) -> Iterator[tuple[int, Sequence[_Good | _Bad]]]:
        workers = self._config.num_workers
        loader = DataLoader(
            self._loader,
            batch_size=None,
            sampler=_TaskSampler(self),
            num_workers=workers,
            prefetch_factor=max(1, CHUNKS_AHEAD // workers),
            # Not fork: the training process has threads, whose locks a forked child would inherit.
            multiprocessing_context="forkserver",
        )
        for (epoch, _, _), items in zip(self._tasks(), loader, strict=False):
            yield epoch, items


class _TaskSampler(torch.utils.data.Sampler[_Task]):
    def __init__(self, stream: SampleStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[_Task]:
        return self._stream._tasks()


def _count(counts: Counter[str], item: _Good | _Bad) -> None:
    """``loaded`` is the denominator of all other counts."""
    counts["loaded"] += 1
    if isinstance(item, _Bad):
        counts[f"bad.{item.reason}"] += 1
    else:
        counts.update(item.counts)


def _collate(samples: Sequence[_Good], state: dict[str, Any]) -> Batch:
    image, web, short, labels, mask = (
        torch.stack(column) for column in zip(*(sample.tensors for sample in samples), strict=True)
    )
    return Batch(image, web, short, labels, mask, [sample.key for sample in samples], state)
