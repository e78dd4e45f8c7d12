"""The held-out split of the shards: retrieval by every query set, and the captioner's texts.

The one data set that needs no download: shards keep some images out of training, with all captions that came with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clips_data.errors import UserError, did_you_mean
from clips_train import generate, shards, transforms
from clips_train.encoders import Encoder
from clips_train.evals import retrieval
from clips_train.evals.outcome import Figure
from clips_train.use_config import EvalConfig

NOT_COLUMNS = ("key", "sha256")

HEADLINE = "captions"
"""The query set of the captions that came with the list."""

Derived = Mapping[str, Callable[[Mapping[str, Any]], list[str] | None]]
"""Query set → its texts of a sample, from the ``.json`` member, or ``None``; for texts that shards do not carry."""


@dataclass(frozen=True)
class Sample:
    """A held-out sample that could be read, and its texts of each query set."""

    key: str
    pixels_CHW: Tensor
    """uint8, square, of the model's size."""
    about: dict[str, Any]
    queries: Mapping[str, list[str]]


@dataclass
class Queries:
    """Features of one query set so far, and which image each is of, among the images that have any."""

    text_ME: list[Tensor] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    image_of_text_M: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    """Numbers of these images among all."""

    def add(self, image: int, texts: Sequence[str]) -> None:
        if texts:
            self.image_of_text_M.extend([len(self.images)] * len(texts))
            self.images.append(image)
            self.texts.extend(texts)


@dataclass
class Encoded:
    """Features of all samples so far, on the CPU, and the captions written for them."""

    queries: dict[str, Queries]
    image_NE: list[Tensor] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        return len(self.keys)

    def hardest(self, name: str) -> list[dict[str, Any]]:
        """The texts of a query set whose image is found last, as ``retrieval.hardest`` tells them."""
        queries = self.queries[name]
        image_NE, text_ME = torch.cat(self.image_NE)[queries.images], torch.cat(queries.text_ME)
        image_of_text_M = torch.tensor(queries.image_of_text_M)
        ranks_M = retrieval.text_to_image_ranks(image_NE, text_ME, image_of_text_M)
        keys = [self.keys[number] for number in queries.images]
        return retrieval.hardest(image_NE, text_ME, image_of_text_M, ranks_M, keys, queries.texts)

    def figures(self) -> dict[str, dict[str, Figure]]:
        """Of each query set, among the images that have texts of it."""
        image_NE = torch.cat(self.image_NE)
        return {
            name: retrieval.figures(
                image_NE[queries.images], torch.cat(queries.text_ME), torch.tensor(queries.image_of_text_M)
            )
            for name, queries in self.queries.items()
        }


def open_split(folder: Path, name: str) -> shards.Split:
    split = shards.open_split(folder, name)
    if split.num_samples == 0:
        raise UserError(
            f"{folder} holds no samples in split {name!r}. Shard again with --heldout-ratio above 0, "
            "or name another split with --split."
        )
    return split


def encode_split(
    encoder: Encoder,
    split: shards.Split,
    config: EvalConfig,
    derived: Derived,
    counts: Counter[str],
    *,
    quiet: bool,
) -> Encoded:
    encoded = Encoded({name: Queries() for name in config.queries})
    total = min(split.num_samples, config.max_samples or split.num_samples)
    squared = encoder.preprocessing.resized(config.resize).squarer()
    with tqdm(total=total, unit="image", desc="eval", disable=quiet or None, mininterval=1) as bar:
        batch: list[Sample] = []
        for sample in _samples(split, total, squared, config, derived, counts):
            batch.append(sample)
            bar.update()
            if len(batch) == config.batch:
                _encode_batch(encoder, batch, config, encoded)
                batch = []
        if batch:
            _encode_batch(encoder, batch, config, encoded)
    if encoded.num_images == 0:
        raise UserError(f"No sample of {split.folder}, split {split.name}, could be read: {dict(counts)}.")
    for name, queries in encoded.queries.items():
        if not queries.images:
            raise UserError(f"None of {encoded.num_images} samples has a text of the queries {name!r}.")
    return encoded


def _samples(
    split: shards.Split,
    total: int,
    squared: Callable[[Image.Image], Tensor],
    config: EvalConfig,
    derived: Derived,
    counts: Counter[str],
) -> Iterator[Sample]:
    """The readable ones of the first ``total`` samples that have any text to be searched by. All are counted."""
    reader = shards.ShardReader(split)
    places = [(shard, row) for shard, rows in enumerate(split.num_samples_by_shard) for row in range(rows)]
    for shard, row in places[:total]:
        try:
            about = reader.about(shard, row)
            picture = transforms.decode_whole(reader.image(shard, row))
        except (shards.ShardError, transforms.BadImage) as error:
            counts[f"bad.{error.reason}"] += 1
            continue
        queries = {name: texts_of(about, name, config.web_column, derived) for name in config.queries}
        if not any(queries.values()):
            counts["bad.no_caption"] += 1
            continue
        counts["scored"] += 1
        counts.update(f"no_text.{name}" for name, texts in queries.items() if not texts)
        yield Sample(reader.key(shard, row), squared(picture), about, queries)


def texts_of(about: Mapping[str, Any], queries: str, web_column: str, derived: Derived) -> list[str]:
    """The texts of a query set that an image is searched by, blank ones left out.

    ``captions`` are those that came with the list, else the web caption. Others are further columns of the list,
    caption columns, or derived, whichever there is first. Raises ``UserError`` for a set that is none of these.
    """
    extra = about.get("extra") or {}
    found: Any = extra.get(queries)
    if queries == HEADLINE and not (isinstance(found, list) and found):
        queries, found = web_column, None
    if found is None and isinstance(about.get(queries), str) and queries not in NOT_COLUMNS:
        found = about[queries]
    if found is None and queries in derived:
        found = derived[queries](about)
    if found is None:
        columns = [name for name, value in about.items() if isinstance(value, str) and name not in NOT_COLUMNS]
        known = dict.fromkeys((HEADLINE, *columns, *extra, *derived))
        raise UserError(f"The shards have no caption column {queries!r}. {did_you_mean(queries, known)}")
    texts = [str(text) for text in (found if isinstance(found, list) else [found])]
    return [text for text in texts if text.strip()]


def _encode_batch(encoder: Encoder, samples: list[Sample], config: EvalConfig, encoded: Encoded) -> None:
    pixels_BCHW = torch.stack([sample.pixels_CHW for sample in samples])
    encoded.image_NE.append(encoder.image_features(pixels_BCHW).cpu())
    for name, queries in encoded.queries.items():
        texts = [text for sample in samples for text in sample.queries[name]]
        for number, sample in enumerate(samples, start=encoded.num_images):
            queries.add(number, sample.queries[name])
        if texts:
            queries.text_ME.append(encoder.text_features(texts).cpu())
    encoded.keys.extend(sample.key for sample in samples)
    trained = encoder.trained
    if config.captions and trained is not None and trained.model.decoder is not None:
        web = [sample.about.get(config.web_column, "") for sample in samples]
        captions = generate.caption_images(trained, pixels_BCHW, web)
        encoded.rows.extend(
            {
                "key": sample.key,
                "web": sample.about.get(config.web_column, ""),
                "synthetic": sample.about.get(config.synthetic_column, ""),
                "caption": caption,
                "extra": sample.about["extra"],
            }
            for sample, caption in zip(samples, captions, strict=True)
        )
