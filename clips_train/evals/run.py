"""``clips eval``: one checkpoint, one held-out split, one JSON file of scores with a schema version."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean
from clips_data.schema import SCHEMA_VERSION
from clips_train import checkpoint, shards, transforms
from clips_train import generate as generation
from clips_train.evals.retrieval import retrieval_scores
from clips_train.generate import Trained
from clips_train.use_config import EvalConfig

FOLDER, UNIT = "eval", "eval"
SCORES, CAPTIONS = "eval.json", "captions.jsonl"
NOT_IN_DIGEST = frozenset({"batch", "device"})
NOT_COLUMNS = ("key", "sha256")


HEADLINE = "captions"
"""The query set of the captions that came with the list."""

Derived = Mapping[str, Callable[[Mapping[str, Any]], list[str] | None]]
"""Query set → its texts of a sample, from the ``.json`` member, or ``None``; for texts that shards do not carry."""


@dataclass(frozen=True)
class Sample:
    """A held-out sample that could be read, and its texts of each query set."""

    key: str
    picture: Image.Image
    about: dict[str, Any]
    queries: Mapping[str, list[str]]


@dataclass
class Queries:
    """Features of one query set so far, and which image each is of, among the images that have any."""

    text_ME: list[Tensor] = field(default_factory=list)
    image_of_text_M: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    """Numbers of these images among all."""

    def add(self, image: int, num_texts: int) -> None:
        if num_texts:
            self.image_of_text_M.extend([len(self.images)] * num_texts)
            self.images.append(image)


@dataclass
class Encoded:
    """Features of all samples so far, on the CPU, and the captions written for them."""

    queries: dict[str, Queries]
    image_NE: list[Tensor] = field(default_factory=list)
    num_images: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)

    def scores(self) -> dict[str, dict[str, Any]]:
        """Of each query set, among the images that have texts of it."""
        image_NE = torch.cat(self.image_NE)
        return {name: _scores(image_NE, queries) for name, queries in self.queries.items()}


def evaluate(
    config: EvalConfig,
    *,
    run: Path,
    shards: Path,
    overwrite: bool = False,
    quiet: bool = False,
    derived: Derived | None = None,
) -> dict[str, Any]:
    """Retrieval both ways on the split's images by every query set, and the captioner's texts.

    Writes ``eval/eval.json`` and ``eval/captions.jsonl`` under ``run`` and returns the scores as plain figures. Skips
    what was scored before from the same checkpoint, data and config; ``ResumeRefused`` when it was from others.
    """
    newest = checkpoint.find(run)
    split = _open_split(shards, config.split)
    out = run / FOLDER
    inputs = {"shards": split.digest, "checkpoint": ledger.digest_file(newest / checkpoint.WEIGHTS)}
    settings = config.model_dump(mode="json", exclude=set(NOT_IN_DIGEST))
    if ledger.is_done(out, UNIT, inputs=inputs, config=settings, overwrite=overwrite):
        return figures(json.loads((out / SCORES).read_text()))
    trained = generation.load_trained(newest, config.device)
    counts: Counter[str] = Counter()
    encoded = _encode_split(trained, split, config, derived or {}, counts, quiet=quiet)
    result = _result(newest, config, encoded, counts)
    with ledger.readable_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        ledger.part(out / SCORES).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in encoded.rows)
        ledger.part(out / CAPTIONS).write_text("".join(lines), encoding="utf-8")
        ledger.commit(out, UNIT, [SCORES, CAPTIONS], inputs=inputs, config=settings, counts=counts)
    return figures(result)


def retrieval_by_queries(
    trained: Trained, split: shards.Split, config: EvalConfig, *, derived: Derived | None = None, quiet: bool = True
) -> dict[str, dict[str, Any]]:
    """The scores of each query set, with its ``num_images`` and ``num_texts``; for models that are in training too."""
    without = config.model_copy(update={"captions": False})
    return _encode_split(trained, split, without, derived or {}, Counter(), quiet=quiet).scores()


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The result without its nesting. Scores of the second and further query sets begin with the set's name."""
    further = [(name, result["retrieval_by_queries"][name]) for name in result["queries"][1:]]
    return {
        "num_images": result["num_images"],
        "num_texts": result["num_texts"],
        "unreadable": result["unreadable"],
        **result["retrieval"],
        **{f"{name}_{key}": value for name, scores in further for key, value in scores.items()},
    }


def _open_split(folder: Path, name: str) -> shards.Split:
    split = shards.open_split(folder, name)
    if split.num_samples == 0:
        raise UserError(
            f"{folder} holds no samples in split {name!r}. Shard again with --heldout-ratio above 0, "
            "or name another split with --split."
        )
    return split


def _encode_split(
    trained: Trained,
    split: shards.Split,
    config: EvalConfig,
    derived: Derived,
    counts: Counter[str],
    *,
    quiet: bool,
) -> Encoded:
    encoded = Encoded({name: Queries() for name in config.queries})
    total = min(split.num_samples, config.max_samples or split.num_samples)
    with tqdm(total=total, unit="image", desc="eval", disable=quiet or None, mininterval=1) as bar:
        batch: list[Sample] = []
        for sample in _samples(split, total, trained.config.image_px, config, derived, counts):
            batch.append(sample)
            bar.update()
            if len(batch) == config.batch:
                _encode_batch(trained, batch, config, encoded)
                batch = []
        if batch:
            _encode_batch(trained, batch, config, encoded)
    if encoded.num_images == 0:
        raise UserError(f"No sample of {split.folder}, split {split.name}, could be read: {dict(counts)}.")
    for name, queries in encoded.queries.items():
        if not queries.images:
            raise UserError(f"None of {encoded.num_images} samples has a text of the queries {name!r}.")
    return encoded


def _samples(
    split: shards.Split, total: int, image_px: int, config: EvalConfig, derived: Derived, counts: Counter[str]
) -> Iterator[Sample]:
    """The readable ones of the first ``total`` samples that have any text to be searched by. All are counted."""
    reader = shards.ShardReader(split)
    places = [(shard, row) for shard, rows in enumerate(split.num_samples_by_shard) for row in range(rows)]
    for shard, row in places[:total]:
        try:
            about = reader.about(shard, row)
            picture = transforms.decode(reader.image(shard, row), image_px)
        except (shards.ShardError, transforms.BadImage) as error:
            counts[f"bad.{error.reason}"] += 1
            continue
        queries = {name: texts_of(about, name, config.web_column, derived) for name in config.queries}
        if not any(queries.values()):
            counts["bad.no_caption"] += 1
            continue
        counts["scored"] += 1
        counts.update(f"no_text.{name}" for name, texts in queries.items() if not texts)
        yield Sample(reader.key(shard, row), picture, about, queries)


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


@torch.inference_mode()
def _encode_batch(trained: Trained, samples: list[Sample], config: EvalConfig, encoded: Encoded) -> None:
    pixels_BCHW = torch.stack([transforms.squash(sample.picture, trained.config.image_px) for sample in samples])
    image_BE, _ = trained.model.encode_image(transforms.normalise(pixels_BCHW.to(trained.device)))
    encoded.image_NE.append(image_BE.cpu())
    for name, queries in encoded.queries.items():
        texts = [text for sample in samples for text in sample.queries[name]]
        for number, sample in enumerate(samples, start=encoded.num_images):
            queries.add(number, len(sample.queries[name]))
        if texts:
            queries.text_ME.append(trained.encode_texts(texts)[0].cpu())
    encoded.num_images += len(samples)
    if config.captions and trained.model.decoder is not None:
        web = [sample.about.get(config.web_column, "") for sample in samples]
        captions = generation.caption_images(trained, pixels_BCHW, web)
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


def _result(newest: Path, config: EvalConfig, encoded: Encoded, counts: Counter[str]) -> dict[str, Any]:
    about = checkpoint.read_about(newest)
    by_queries = encoded.scores()
    first = by_queries[config.queries[0]]
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": newest.name,
        "step": about["step"],
        "samples": about["samples"],
        "split": config.split,
        "num_images": encoded.num_images,
        "num_texts": first["num_texts"],
        "unreadable": sum(number for name, number in counts.items() if name.startswith("bad.")),
        "counts": dict(counts),
        "ties": "half of the ties count as better",
        "queries": list(config.queries),
        "retrieval": {name: score for name, score in first.items() if not name.startswith("num_")},
        "retrieval_by_queries": by_queries,
    }


def _scores(image_NE: Tensor, queries: Queries) -> dict[str, Any]:
    image_of_text_M = torch.tensor(queries.image_of_text_M)
    scores = retrieval_scores(image_NE[queries.images], torch.cat(queries.text_ME), image_of_text_M)
    return {"num_images": len(queries.images), "num_texts": len(image_of_text_M), **scores}
