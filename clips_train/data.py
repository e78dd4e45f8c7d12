"""The stream of training batches: shards in, tensors out, in an order that a resumed run continues exactly.

Everything about a sample is a function of (seed, epoch, key). A step's batch is the next stretch of ``SampleOrder``,
and each process loads its own slots of it. So the batches depend neither on the number of processes, workers or
threads nor on when the run was last interrupted, and any of these may change between two starts. A sample that cannot
be used is counted by its reason, and another one takes its slot.

Shape suffixes: P patches.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clips_data import draws
from clips_data.errors import ResumeRefused, UserError
from clips_train import ahead, transforms
from clips_train.batch import TEACHER, Batch, ViewTexts, collate
from clips_train.config import TrainConfig
from clips_train.shards import SampleOrder, ShardError, ShardReader, Split
from clips_train.texts import TextMaker
from clips_train.tokenizer import Tokenizer
from clips_train.views import NoCaption

if TYPE_CHECKING:
    from clips_train.teacher import Teacher

CHUNK = 32
"""Most samples that a worker loads at a time."""
PRELOADED = (__name__, "open_clip.tokenizer")
"""What a worker would take seconds to import."""


class Task(NamedTuple):
    """Slots of one batch, to be loaded together: those at ``start`` to ``stop`` of an epoch's order."""

    epoch: int
    start: int
    stop: int


class Chunk(NamedTuple):
    """The samples of a task, stacked: one tensor by name, so that little has to be sent by a worker."""

    tensors: dict[str, Tensor]
    keys: list[str]
    counts: Counter[str]

    def samples(self) -> list[dict[str, Tensor]]:
        return [{name: whole[row] for name, whole in self.tensors.items()} for row in range(len(self.keys))]


class Loader:
    """Turns tasks into samples. Lives in the training process or, as a copy, in each worker process.

    A sample that cannot be used is replaced by the one in its slot of the next batch, or of the one after that, and
    after the last by the first: whoever loads a slot finds the same sample, and never one that its batch has already.
    """

    def __init__(self, split: Split, config: TrainConfig, tokenizer: Tokenizer, teacher: Teacher | None) -> None:
        self._split, self._config, self._teacher = split, config, teacher
        self._texts = TextMaker(split, config, tokenizer)
        self._reader = ShardReader(split)
        counts = _counts_of(split, config)
        self._order = SampleOrder(counts, seed=config.seed, window_shards=config.window_shards)
        self._caption_of = _shuffled(counts, config.seed) if config.shuffle_captions else None
        # Stored features are those of augmented pictures.
        self._augment: transforms.Augment = "none" if config.overfit and teacher is None else config.augment
        self._cache = transforms.PictureCache(config.cache_bytes if config.num_workers == 0 else 0)
        self._num_patches = _num_patches(config) if config.image_tokens_kept < 1 and config.decoder != "none" else 0

    @property
    def num_samples(self) -> int:
        return self._order.num_samples

    def __call__(self, task: Task) -> Chunk:
        """Raises ``UserError`` when a slot has no usable sample in the whole epoch."""
        counts: Counter[str] = Counter()
        slots = [self._slot(task.epoch, position, counts) for position in range(task.start, task.stop)]
        keys, samples = zip(*slots, strict=True)
        return Chunk({name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}, [*keys], counts)

    def _slot(self, epoch: int, position: int, counts: Counter[str]) -> tuple[str, dict[str, Tensor]]:
        """Key and tensors; ``counts["loaded"]`` is the denominator of all other counts."""
        batch, bad = self._config.batch, Counter[str]()
        for candidate in chain(range(position, self.num_samples, batch), range(position % batch, position, batch)):
            shard, row = self._order.locate(epoch, candidate)
            key = self._reader.key(shard, row)
            counts["loaded"] += 1
            try:
                tensors = self._load(epoch, shard, row, key, counts)
            except (ShardError, transforms.BadImage, NoCaption) as error:
                bad[f"bad.{error.reason}"] += 1
                continue
            counts.update(bad)
            counts["replaced"] += candidate != position
            return key, tensors
        raise too_few(self._split, self._config, bad)

    def _load(self, epoch: int, shard: int, row: int, key: str, counts: Counter[str]) -> dict[str, Tensor]:
        config = self._config
        drawn_epoch = 0 if config.overfit else epoch
        seed, augmentation = config.seed, drawn_epoch
        if self._teacher is not None:
            seed, augmentation = self._teacher.seed, self._teacher.augmentation(config.seed, drawn_epoch, key)
        tensors = {
            "image": transforms.training_view(
                lambda: self._reader.image(shard, row),
                config.image_px,
                self._augment,
                seed=seed,
                epoch=augmentation,
                key=key,
                kept=self._cache.of((shard, row)),
            )
        }
        of_caption = self._caption_of[shard, row] if self._caption_of else (shard, row)
        texts = self._texts.texts(self._reader.about(*of_caption), drawn_epoch, self._reader.key(*of_caption))
        tensors |= texts.tensors
        if self._teacher is not None:
            features = self._teacher.features(*of_caption, augmentation, texts.chosen)
            if self._caption_of:
                features |= self._teacher.features(shard, row, augmentation)
            tensors |= {f"{TEACHER}{name}": feature for name, feature in features.items()}
        if self._num_patches:
            tensors["kept"] = kept_patches(self._num_patches, config.image_tokens_kept, config.seed, drawn_epoch, key)
        counts.update(texts.counts)
        return tensors


def kept_patches(num_patches: int, share: float, seed: int, epoch: int, key: str) -> Tensor:
    """Which patches the captioner sees, at least one: int64 [P], in order."""
    number = max(1, round(share * num_patches))
    words = np.random.PCG64(draws.integer(1 << 63, seed, "image_tokens_kept", epoch, key)).random_raw(num_patches)
    return torch.from_numpy(np.sort(np.argsort(words, kind="stable")[:number]))


def _num_patches(config: TrainConfig) -> int:
    """Patches of an image: of our own sizes, or of the open_clip model that ``config.size`` names."""
    from clips_train.towers import SIZES

    if config.size in SIZES:
        patch_px = SIZES[config.size].patch_px
    else:
        import open_clip

        patch_px = open_clip.get_model_config(config.size)["vision_cfg"]["patch_size"]
    return int(config.image_px // patch_px) ** 2


def _counts_of(split: Split, config: TrainConfig) -> list[int]:
    """Samples to train on, by shard: all of them, or the first ``config.overfit``."""
    counts = split.num_samples_by_shard
    if not config.overfit:
        return list(counts)
    return [
        max(0, min(count, config.overfit - before))
        for count, before in zip(counts, accumulate(counts, initial=0), strict=False)
    ]


def _shuffled(counts: Sequence[int], seed: int) -> dict[tuple[int, int], tuple[int, int]]:
    """The control arm: which sample's captions each image gets. No image keeps its own (given two samples or more)."""
    places = [(shard, row) for shard, count in enumerate(counts) for row in range(count)]
    order = draws.permutation(len(places), seed, "shuffle_captions", 0)
    return {places[order[i]]: places[order[i - 1]] for i in range(len(order))}


def too_few(split: Split, config: TrainConfig, bad: Mapping[str, int]) -> UserError:
    """``bad`` are the samples of one slot, all of them unusable, or nothing where there are too few to begin with."""
    num_samples = sum(_counts_of(split, config))
    unusable = f", of which all {sum(bad.values())} that could fill one of its places are unusable {dict(bad)}"
    of_them = f" (overfit takes {num_samples} of them)" if config.overfit else ""
    return UserError(
        f"{split.folder} has {split.num_samples} {split.name} samples{of_them}{unusable if bad else ''}: too few for "
        f"one batch of {config.batch}. Choose a smaller batch or add data."
    )


class SampleStream:
    """Yields one process's share of batches without end, epoch after epoch.

    A batch never spans two epochs, so that no image meets itself as a negative: the last, incomplete one is left out,
    and the shuffle makes that other samples each time. ``state`` comes from ``Batch.state`` of any process, with the
    counts of all of them: they go on in the first, and the others count from nothing.

    Raises ``ResumeRefused`` when the state belongs to other data or another seed, ``UserError`` when the processes
    cannot share a batch evenly or an epoch does not fill one.
    """

    def __init__(
        self,
        split: Split,
        config: TrainConfig,
        tokenizer: Tokenizer,
        state: Mapping[str, Any] | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        teacher: Teacher | None = None,
    ) -> None:
        fresh: dict[str, Any] = {"digest": split.digest, "seed": config.seed, "epoch": 0, "sample": 0, "counts": {}}
        self._start: dict[str, Any] = dict(state) if state is not None else fresh
        for name in ("digest", "seed"):
            if self._start[name] != fresh[name]:
                raise ResumeRefused(
                    f"The checkpoint was trained on data with {name} {self._start[name]}, {split.folder} has "
                    f"{fresh[name]}. Use --overwrite to start again, or another run name to keep both."
                )
        if config.batch % world_size:
            raise UserError(
                f"A batch of {config.batch} cannot be shared out evenly among {world_size} processes. Choose a batch "
                f"that is a multiple of {world_size}."
            )
        self._config, self._rank = config, rank
        self._num_slots = config.batch // world_size
        self._first_slot = rank * self._num_slots
        self._loader = Loader(split, config, tokenizer, teacher)
        if self._loader.num_samples < config.batch:
            raise too_few(split, config, {})

    def batches(self) -> Generator[Batch]:
        """Batches are made ahead, on other threads and processes, which end when the generator is closed."""
        name = self._config.device
        on_gpu = torch.cuda.is_available() if name == "auto" else torch.device(name).type == "cuda"
        gpu = torch.cuda.current_device() if on_gpu else None
        yield from ahead.made_ahead(lambda: self._batches(gpu), _num_bytes)

    def _batches(self, gpu: int | None) -> Generator[Batch]:
        if gpu is not None:
            torch.cuda.set_device(gpu)  # else pinning on this thread would take memory of the first GPU
        counts = Counter(self._start["counts"] if self._rank == 0 else {})
        chunks = ahead.loaded(self._loader, self._tasks(), self._config.num_workers, preload=PRELOADED)
        try:
            for epoch, sample in self._steps():
                keys: list[str] = []
                samples: list[dict[str, Tensor]] = []
                while len(keys) < self._num_slots:
                    chunk = next(chunks)
                    keys += chunk.keys
                    samples += chunk.samples()
                    counts.update(chunk.counts)
                after = {"epoch": epoch, "sample": sample + self._config.batch, "counts": dict(counts)}
                batch = collate(samples, keys, self._first_slot, self._start | after)
                yield batch if gpu is None else _pinned(batch)
        finally:
            chunks.close()

    def _steps(self) -> Iterator[tuple[int, int]]:
        """(epoch, position at which its batch begins) of each step."""
        epoch, sample = self._start["epoch"], self._start["sample"]
        while True:
            while sample + self._config.batch <= self._loader.num_samples:
                yield epoch, sample
                sample += self._config.batch
            epoch, sample = epoch + 1, 0

    def _tasks(self) -> Iterator[Task]:
        for epoch, sample in self._steps():
            first = sample + self._first_slot
            for start in range(first, first + self._num_slots, CHUNK):
                yield Task(epoch, start, min(start + CHUNK, first + self._num_slots))


def _pinned(batch: Batch) -> Batch:
    """In memory that a GPU can copy from while it computes."""

    def pin(value: Any) -> Any:
        match value:
            case Tensor():
                return value.pin_memory()
            case ViewTexts():
                return ViewTexts(*(pin(getattr(value, field.name)) for field in dataclasses.fields(value)))
            case tuple():
                return tuple(map(pin, value))
            case Mapping():
                return {name: pin(each) for name, each in value.items()}
        return value

    names = [field.name for field in dataclasses.fields(batch) if field.name not in ("keys", "first_slot", "state")]
    return dataclasses.replace(batch, **{name: pin(getattr(batch, name)) for name in names})


def _num_bytes(batch: Batch) -> int:
    """About what it takes in memory: images are by far the most of it."""
    return batch.image_NCHW.nbytes + sum(view.ids_NKL.nbytes for view in batch.views) + batch.labels_NQ.nbytes
