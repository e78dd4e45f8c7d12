"""``clips eval``: one checkpoint, one held-out split, one JSON file of scores with a schema version."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
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
from clips_train.config import EvalConfig
from clips_train.evals.retrieval import retrieval_scores
from clips_train.generate import Trained

FOLDER, UNIT = "eval", "eval"
SCORES, CAPTIONS = "eval.json", "captions.jsonl"
NOT_IN_DIGEST = frozenset({"batch", "device"})


@dataclass(frozen=True)
class Sample:
    """A held-out sample that could be read."""

    key: str
    picture: Image.Image
    about: dict[str, Any]


@dataclass
class Encoded:
    """Features of all samples so far, on the CPU, and the captions written for them."""

    image_NE: list[Tensor] = field(default_factory=list)
    text_ME: list[Tensor] = field(default_factory=list)
    image_of_text_M: list[int] = field(default_factory=list)
    num_images: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    config: EvalConfig, *, run: Path, shards: Path, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Retrieval both ways on the split's images with the captions that came with them, and the captioner's texts.

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
    encoded = _encode_split(trained, split, config, counts, quiet=quiet)
    result = _result(newest, config, encoded, counts)
    with ledger.readable_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        ledger.part(out / SCORES).write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in encoded.rows)
        ledger.part(out / CAPTIONS).write_text("".join(lines), encoding="utf-8")
        ledger.commit(out, UNIT, [SCORES, CAPTIONS], inputs=inputs, config=settings, counts=counts)
    return figures(result)


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The result without its nesting."""
    return {
        "num_images": result["num_images"],
        "num_texts": result["num_texts"],
        "unreadable": result["unreadable"],
        **result["retrieval"],
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
    trained: Trained, split: shards.Split, config: EvalConfig, counts: Counter[str], *, quiet: bool
) -> Encoded:
    encoded = Encoded()
    total = min(split.num_samples, config.max_samples or split.num_samples)
    with tqdm(total=total, unit="image", desc="eval", disable=quiet or None, mininterval=1) as bar:
        batch: list[Sample] = []
        for sample in _samples(split, total, trained.config.image_px, config, counts):
            batch.append(sample)
            bar.update()
            if len(batch) == config.batch:
                _encode_batch(trained, batch, config, encoded)
                batch = []
        if batch:
            _encode_batch(trained, batch, config, encoded)
    if encoded.num_images == 0:
        raise UserError(f"No sample of {split.folder}, split {split.name}, could be read: {dict(counts)}.")
    return encoded


def _samples(
    split: shards.Split, total: int, image_px: int, config: EvalConfig, counts: Counter[str]
) -> Iterator[Sample]:
    """The readable ones of the first ``total`` samples. Both outcomes are counted."""
    reader = shards.ShardReader(split)
    places = [(shard, row) for shard, rows in enumerate(split.num_samples_by_shard) for row in range(rows)]
    for shard, row in places[:total]:
        try:
            about = reader.about(shard, row)
            picture = transforms.decode(reader.image(shard, row), image_px)
        except (shards.ShardError, transforms.BadImage) as error:
            counts[f"bad.{error.reason}"] += 1
            continue
        if not any(text.strip() for text in texts_of(about, config.web_column)):
            counts["bad.no_caption"] += 1
            continue
        counts["scored"] += 1
        yield Sample(reader.key(shard, row), picture, about)


def texts_of(about: dict[str, Any], web_column: str) -> list[str]:
    """The captions that an image is searched by: those that came with the list, else its web caption."""
    captions = about["extra"].get("captions")
    if isinstance(captions, list) and captions:
        return [str(caption) for caption in captions]
    if web_column not in about:
        columns = [name for name, value in about.items() if isinstance(value, str) and name not in ("key", "sha256")]
        raise UserError(f"The shards have no caption column {web_column!r}. {did_you_mean(web_column, columns)}")
    return [about[web_column]]


@torch.inference_mode()
def _encode_batch(trained: Trained, samples: list[Sample], config: EvalConfig, encoded: Encoded) -> None:
    pixels_BCHW = torch.stack([transforms.squash(sample.picture, trained.config.image_px) for sample in samples])
    image_BE, _ = trained.model.encode_image(transforms.normalise(pixels_BCHW.to(trained.device)))
    encoded.image_NE.append(image_BE.cpu())
    texts: list[str] = []
    for number, sample in enumerate(samples, start=encoded.num_images):
        own = texts_of(sample.about, config.web_column)
        texts.extend(own)
        encoded.image_of_text_M.extend([number] * len(own))
    encoded.num_images += len(samples)
    ids_ML = trained.tokenizer.text_ids(texts, trained.config.context_length).to(trained.device)
    encoded.text_ME.append(trained.model.encode_text(ids_ML)[0].cpu())
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
    image_of_text_M = torch.tensor(encoded.image_of_text_M)
    return {
        "schema_version": SCHEMA_VERSION,
        "checkpoint": newest.name,
        "step": about["step"],
        "samples": about["samples"],
        "split": config.split,
        "num_images": encoded.num_images,
        "num_texts": len(image_of_text_M),
        "unreadable": sum(number for name, number in counts.items() if name.startswith("bad.")),
        "counts": dict(counts),
        "ties": "half of the ties count as better",
        "retrieval": retrieval_scores(torch.cat(encoded.image_NE), torch.cat(encoded.text_ME), image_of_text_M),
    }
