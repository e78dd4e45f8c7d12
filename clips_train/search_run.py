"""``clips search``: texts and pictures find images, or captions, of shards by what a model sees in them.

Shape suffixes: Q queries, K nearest, E width of the features.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean
from clips_data.schema import SEARCH, SHARDS
from clips_train import checkpoint, encoders, search_index, transforms
from clips_train.encoders import Encoder
from clips_train.search_store import Source, Store, up_to_date
from clips_train.shards import ShardError, ShardReader, Split, open_split
from clips_train.use_config import SearchConfig

FOLDER: Final = SEARCH
"""Under the work folder."""
SLUG_CHARS, DIGEST_CHARS = 60, 8


@dataclass(frozen=True)
class Query:
    """A text, a picture, or both: then what is near to the mean of the two."""

    text: str = ""
    image: bytes | None = None
    image_name: str = ""
    """Of its file, for messages and results."""


@dataclass(frozen=True)
class Hit:
    """One found sample."""

    rank: int
    """From 1."""
    score: float
    """Cosine similarity."""
    key: str
    file: str
    """The tar that it lies in."""
    about: Mapping[str, Any]
    """The sample's ``.json`` member; empty where that is damaged."""
    place: tuple[int, int]
    """Number of the tar, row in it."""

    def captions(self, columns: Sequence[str]) -> dict[str, str]:
        """By column, those that are there."""
        texts = {column: self.about.get(column) for column in columns}
        return {column: text for column, text in texts.items() if isinstance(text, str) and text.strip()}


def default_model(runs: Path, preferred: str) -> str:
    """``run:NAME`` of the run ``preferred``, else of the one whose checkpoint is newest. Raises ``UserError``."""
    found = {folder.parent.name: folder for folder in runs.glob(f"*/{checkpoint.CHECKPOINTS}") if folder.is_dir()}
    if not found:
        raise UserError(
            f"There is no run under {runs} to search with. Train one with `clips train`, or name another model with "
            "--model, such as demo for the packaged small CLIP."
        )
    name = preferred if preferred in found else max(found, key=lambda one: (found[one].stat().st_mtime_ns, one))
    return encoders.RUN + name


class Search:
    """A model and the features that it made of a split. Opening it makes those that are missing."""

    def __init__(self, config: SearchConfig, *, model: str, shards: Path, work: Path, quiet: bool = False) -> None:
        """``work`` is where ``runs/`` are looked for and ``search/`` is kept.

        Raises ``UserError`` for what is not there: shards, split, column, model, faiss, or any row that can be found.
        """
        self.config = config
        self.split = _split(config, shards)
        self.way = search_index.way(config.index, self.split.num_samples)
        [named] = encoders.find([model], [config.pretrained] if config.pretrained else [], work / "runs")
        self.encoder = encoders.load(named, config.device, config.precision, bert_vocab=config.bert_vocab)
        self._preprocessing = self.encoder.preprocessing.resized(config.resize)
        about = _about(config, self.encoder)
        self.store = self._store(work, model, about, quiet=quiet)
        self._reader = ShardReader(self.split)

    def _store(self, work: Path, model: str, about: Mapping[str, Any], *, quiet: bool) -> Store:
        config = self.config
        shards = self.split.folder.resolve()
        elsewhere = None if shards == (work / SHARDS).resolve() else str(shards)
        what = model if config.text is None else f"{model}-{config.text}"
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", what).strip("-.")[-SLUG_CHARS:]
        folder = work / FOLDER / f"{slug}-{ledger.digest_json([about, elsewhere])[:DIGEST_CHARS]}"
        others = [] if folder.exists() else sorted((work / FOLDER).glob(slug + "-" + "[0-9a-f]" * DIGEST_CHARS))
        source = Source(self.split, self.encoder, self._preprocessing, config.text, config.batch, config.num_workers)
        store = up_to_date(source, folder, about, quiet=quiet)
        if others:
            store.notes.append(
                f"features of {model} as it was, or with other settings, are kept in {', '.join(map(str, others))}; "
                "delete what no longer serves."
            )
        return store

    @property
    def counts(self) -> Counter[str]:
        return self.store.counts

    @property
    def about(self) -> dict[str, Any]:
        """What was searched, and with what, for reports."""
        return {
            "model": self.encoder.about["model"],
            "digest": self.encoder.named.digest,
            "shards": str(self.split.folder),
            "split": self.split.name,
            "searched": "images" if self.config.text is None else f"captions of {self.config.text}",
            "num_searched": self.store.num_features,
            "index": self.way,
        }

    def answers(self, queries: Sequence[Query], num: int) -> list[list[Hit]]:
        """The ``num`` best samples for each query. Raises ``UserError`` for a picture that cannot be read."""
        queries_QE = self._features(queries).numpy()
        look = search_index.exact if self.way == "exact" else search_index.approximate
        nearest = look(self.store, queries_QE, num)
        return [
            [self._hit(rank, float(score), int(position)) for rank, (score, position) in enumerate(found, start=1)]
            for found in (_found(scores, positions) for scores, positions in zip(*nearest, strict=True))
        ]

    def image(self, hit: Hit) -> bytes:
        """Its file; empty where the tar is damaged there."""
        try:
            return self._reader.image(*hit.place)
        except ShardError:  # which the counts of the embedding tell of
            return b""

    def _features(self, queries: Sequence[Query]) -> Tensor:
        """Float32 [Q, E], of length one."""
        sum_QE = torch.zeros(len(queries), self.encoder.width)
        with_text = [row for row, query in enumerate(queries) if query.text]
        for rows in _batches(with_text, self.config.batch):
            sum_QE[rows] += self.encoder.text_features([queries[row].text for row in rows]).cpu()
        with_image = [row for row, query in enumerate(queries) if query.image is not None]
        for rows in _batches(with_image, self.config.batch):
            pixels_NCHW = torch.stack([self._pixels(queries[row]) for row in rows])
            sum_QE[rows] += self.encoder.image_features(pixels_NCHW).cpu()
        return functional.normalize(sum_QE, dim=1)

    def _pixels(self, query: Query) -> Tensor:
        """Uint8 [C, H, W], made as those of the stored images were."""
        assert query.image is not None
        try:
            return self._preprocessing.squarer()(transforms.decode(query.image, self._preprocessing.size))
        except transforms.BadImage as error:
            raise UserError(f"--image {query.image_name} is no picture ({error.reason}). Name another.") from None

    def _hit(self, rank: int, score: float, position: int) -> Hit:
        shard, row = place = self.store.place(position)
        try:
            about = self._reader.about(shard, row)
        except ShardError:
            about = {}
        return Hit(rank, score, self._reader.key(shard, row), self.split.files[shard], about, place)


def _batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(rows), size):
        yield list(rows[first : first + size])


def _found(scores_K: np.ndarray, positions_K: np.ndarray) -> list[tuple[Any, Any]]:
    return [(score, position) for score, position in zip(scores_K, positions_K, strict=True) if position >= 0]


def _split(config: SearchConfig, shards: Path) -> Split:
    split = open_split(shards, config.split)
    if not split.num_samples:
        raise UserError(f"Split {config.split!r} of {shards} has no samples. Name another one with --split.")
    if config.text is not None and config.text not in split.columns:
        raise UserError(
            f"The shards in {shards} have no column {config.text!r}. {did_you_mean(config.text, split.columns)}"
        )
    return split


def _about(config: SearchConfig, encoder: Encoder) -> dict[str, Any]:
    """What makes other features."""
    about = {"model": encoder.named.digest, "arithmetic": config.precision, "column": config.text}
    if config.text is not None:
        return {**about, "tokenizer": encoder.tokenizer, "context_length": encoder.context_length}
    preprocessing = encoder.preprocessing.resized(config.resize).about
    return {**about, "preprocessing": {name: _as_in_json(value) for name, value in preprocessing.items()}}


def _as_in_json(value: Any) -> Any:
    """Sidecars are read back with lists for tuples."""
    return list(value) if isinstance(value, tuple) else value
