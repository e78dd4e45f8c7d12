"""What a training run knows of its teacher: stored features of its pictures and captions, read where they lie.

Shape suffixes: F width of all teachers together.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clips_data import draws, ledger
from clips_data.errors import ResumeRefused, UserError
from clips_train import features
from clips_train.config import TrainConfig, View
from clips_train.features import IMAGE, TEXT, THERE
from clips_train.shards import ShardError, Split
from clips_train.sources import TextSources, label_of

OPEN_FILES: Final = 256


class NoFeatures(ShardError):
    """The teacher has no features of a picture or caption; ``reason`` is ``no_teacher_image | no_teacher_text``."""


class Teacher:
    """Stored features of one split. Safe to share between threads and to send to worker processes."""

    num_augmentations: int
    seed: int
    """Seeds the augmentations: the picture of number ``a`` is ``transforms.training_view(..., seed=seed, epoch=a)``."""
    scale: float
    """What similarities of the features are multiplied with before a softmax: the mean of the teachers' logit scales.

    Of several teachers, ``scale`` times the inner product is then the mean of their logits, and features are unit ones.
    """

    def __init__(self, folder: Path, files: Sequence[str], index: dict[str, Any]) -> None:
        self._state = folder, tuple(files), index
        self._folder, self._files = folder, tuple(files)
        self.num_augmentations, self.seed = int(index["num_augmentations"]), int(index["seed"])
        scales = [float(teacher["logit_scale"]) for teacher in index["teachers"]]
        self.scale = sum(scales) / len(scales)
        factors = [math.sqrt(scale / sum(scales)) for scale in scales]
        widths = [int(teacher["width"]) for teacher in index["teachers"]]
        self._factor_F = torch.tensor(factors).repeat_interleave(torch.tensor(widths))
        self._file = functools.lru_cache(OPEN_FILES)(self._open_file)

    def __getstate__(self) -> Any:
        return self._state

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state)  # type: ignore[misc]

    @classmethod
    def open(cls, split: Split, config: TrainConfig, embeddings: Path) -> Teacher | None:
        """The teacher of a run, from its folder under ``embeddings``, as ``clips embed`` made it; ``None`` without one.

        Raises ``ResumeRefused`` for features of other shards, ``UserError`` for those that are not complete, are of
        otherwise augmented images, or lack what a view needs.
        """
        if config.teacher is None:
            return None
        folder = embeddings / config.teacher
        index = features.read_index(folder)
        if index["shards"] != split.digest:
            raise ResumeRefused(
                f"The features in {folder} were made from shards with digest {index['shards'][:12]}…, those in "
                f"{split.folder} have {split.digest[:12]}…. Run `clips embed --name {config.teacher}` again: it adds "
                "what is missing, and with --overwrite makes again what changed."
            )
        if split.name not in index["splits"]:
            raise UserError(f"{folder} has no features of split {split.name}. Run `clips embed --split {split.name}`.")
        _check_augmentation(config, index, folder)
        _check_views(split, config, index, folder)
        wanted = [name.removesuffix(".tar") for name in split.files]
        for unit in wanted:
            if ledger.read_sidecar(folder, unit) is None:
                raise UserError(f"{folder} lacks {unit}{features.SUFFIX}. Run `clips embed` again.")
        return cls(folder, [unit + features.SUFFIX for unit in wanted], index)

    def augmentation(self, seed: int, epoch: int, key: str) -> int:
        """Which augmentation a sample has in an epoch: one after the other, from a start drawn by the run's seed."""
        return (draws.integer(self.num_augmentations, seed, "teacher.augmentation", 0, key) + epoch) % (
            self.num_augmentations
        )

    def features(self, shard: int, row: int, augmentation: int, chosen: Sequence[str | None] = ()) -> dict[str, Tensor]:
        """Of one sample, float32: ``image`` [F], ``view.NUMBER`` [F] for each of ``chosen``, and ``scale`` [].

        ``chosen`` has for each view the column whose whole text it took. Raises ``NoFeatures``.
        """
        stored = self._file(shard)
        if not stored[THERE + IMAGE][row]:
            raise NoFeatures("no_teacher_image")
        found = {IMAGE: self._scaled(stored[IMAGE][row, augmentation])}
        for number, column in enumerate(chosen):
            if column is None or not stored[THERE + column][row]:
                raise NoFeatures("no_teacher_text")
            found[f"view.{number}"] = self._scaled(stored[TEXT + column][row])
        found["scale"] = torch.tensor(self.scale)
        return found

    def _scaled(self, stored_F: Tensor) -> Tensor:
        return stored_F.float() * self._factor_F

    def _open_file(self, shard: int) -> dict[str, Tensor]:
        """Its tensors where they lie: only what is looked at is read."""
        path = self._folder / self._files[shard]
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}). Restore it, or run `clips embed` again.") from error


def _check_augmentation(config: TrainConfig, index: dict[str, Any], folder: Path) -> None:
    if index["augment"] != config.augment:
        raise UserError(
            f"The features in {folder} are of pictures with augment {index['augment']}, but the run's is "
            f"{config.augment}. Train so, or embed with --augment {config.augment} under another --name."
        )


def _check_views(split: Split, config: TrainConfig, index: dict[str, Any], folder: Path) -> None:
    if not config.views:
        raise UserError(f"teacher {config.teacher} has nothing to teach: it compares images with texts, of views.")
    sources = TextSources.open(split, config)
    for number, view in enumerate(config.views):
        if view.reduce not in ("none", "truncate"):
            raise UserError(
                f"{_called(number, view)} shows pieces of captions, and teacher {config.teacher} has features of whole "
                "captions only. Set its reduce to none or truncate, or train without a teacher."
            )
        missing = [column for column in sources.columns(view.source, view.walk) if column not in index["columns"]]
        if missing:
            names = ",".join([*index["columns"], *missing])
            raise UserError(
                f"{_called(number, view)} takes texts of column {missing[0]!r}, of which {folder} has no features. Run "
                f"`clips embed --columns {names}` under another --name, or change the view."
            )


def _called(number: int, view: View) -> str:
    return f"views.{number} (from {label_of(view.source)}, reduce {view.reduce})"
