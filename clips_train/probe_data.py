"""What a probe reads of the shards: images as the frozen tower sees them, each with the caption to be written.

Shape suffixes: B samples, P patches, V width of the tower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clips_data.errors import UserError
from clips_train import shards, transforms
from clips_train.evals.heldout import Derived, texts_of
from clips_train.probe_model import FrozenTower


@dataclass(frozen=True)
class Sample:
    """A sample that has a caption. Its image lies in ``shard`` at ``row``."""

    shard: int
    row: int
    key: str
    caption: str
    extra: Mapping[str, Any]


def samples_with(split: shards.Split, column: str, derived: Derived, most: int, counts: Counter[str]) -> list[Sample]:
    """The first ``most`` samples (0: all) in the order of the shards, less those without a caption, which are counted.

    Raises ``UserError`` where no sample has one.
    """
    reader = shards.ShardReader(split)
    places = [(shard, row) for shard, rows in enumerate(split.num_samples_by_shard) for row in range(rows)]
    found = []
    for shard, row in places[: most or None]:
        try:
            about = reader.about(shard, row)
        except shards.ShardError as error:
            counts[f"bad.{error.reason}"] += 1
            continue
        texts = texts_of(about, column, "web", derived)
        if texts:
            found.append(Sample(shard, row, reader.key(shard, row), texts[0], about.get("extra") or {}))
        else:
            counts["bad.no_caption"] += 1
    if not found:
        raise UserError(
            f"None of {split.num_samples} samples of {split.folder}, split {split.name}, has a text of {column!r}: "
            f"{dict(counts)}. Name another column with --column."
        )
    return found


class Pictures:
    """Images by the number of their sample, as the tower's patch tokens, computed once while memory lasts."""

    def __init__(
        self, split: shards.Split, samples: Sequence[Sample], tower: FrozenTower, image_px: int, cache_bytes: int
    ) -> None:
        self._reader = shards.ShardReader(split)
        self._samples, self._tower, self._image_px = samples, tower, image_px
        self._kept: dict[int, Tensor] = {}
        self._room_bytes = cache_bytes
        self.bad: dict[int, str] = {}
        """Why an image could not be read, by its sample's number, of those that were asked for."""

    def tokens(self, numbers: Sequence[int]) -> tuple[list[int], Tensor]:
        """The numbers whose images can be read, and float32 [B, P, V] of these, on the tower's device."""
        missing = [number for number in numbers if number not in self._kept and number not in self.bad]
        pixels = {number: image for number in missing if (image := self._pixels(number)) is not None}
        fresh = {}
        if pixels:
            fresh = dict(zip(pixels, self._tower.tokens(torch.stack(list(pixels.values()))), strict=True))
        found = {number: fresh.get(number, self._kept.get(number)) for number in numbers}
        for number, tokens_PV in fresh.items():
            num_bytes = tokens_PV.numel() * tokens_PV.element_size()
            if num_bytes <= self._room_bytes:
                self._kept[number] = tokens_PV.clone()
                self._room_bytes -= num_bytes
        readable = {number: tokens for number, tokens in found.items() if tokens is not None}
        tokens = torch.stack(list(readable.values())) if readable else torch.zeros(0, device=self._tower.device)
        return list(readable), tokens

    def _pixels(self, number: int) -> Tensor | None:
        sample = self._samples[number]
        try:
            picture = transforms.decode(self._reader.image(sample.shard, sample.row), self._image_px)
        except (shards.ShardError, transforms.BadImage) as error:
            self.bad[number] = error.reason
            return None
        return transforms.squash(picture, self._image_px)
