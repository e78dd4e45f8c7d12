"""What the formats of images with texts have in common: which texts count, and which images that leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clips_data import ledger
from clips_data.errors import UserError, did_you_mean
from clips_train.evals import listed
from clips_train.evals.items import DataSet, Item
from clips_train.use_config import Benchmark

Reads = Mapping[str, Callable[[], bytes]]
"""Key of an image → what reads its bytes."""


class Row(NamedTuple):
    """One image as a format finds it."""

    key: str
    texts: Sequence[str] = ()
    label: int | None = None
    about: Mapping[str, Any] = {}


def collect(
    benchmark: Benchmark,
    rows: Iterable[Row],
    reads: Callable[[Sequence[str]], Reads],
    *,
    form: str,
    about: Mapping[str, Any],
    left_out: Counter[str] | None = None,
    classes: Sequence[str] = (),
    templates: Sequence[str] = (),
) -> DataSet:
    """The data set of ``rows``, of which no more are taken than ``max_samples``; ``reads`` gets the keys of these.

    Blank texts do not count, then the first ``captions_per_image`` do, and an image that has neither a text nor a label
    is left out; ``about["left_out"]`` counts all of these, beside what ``left_out`` has after the last row. Raises
    ``UserError`` for an image that is there twice, and where no image is left.
    """
    kept: dict[str, Row] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        texts = tuple(text for text in row.texts if text.strip())
        counts["texts.blank"] += len(row.texts) - len(texts)
        if not texts and row.label is None:
            counts["images.without_texts"] += 1
            continue
        if row.key in kept:
            raise UserError(f"{benchmark.data} has the image {row.key!r} twice. Leave one of them out.")
        kept[row.key] = row._replace(texts=texts[: benchmark.captions_per_image])
        listed.check_unicode(kept[row.key].texts, f"{benchmark.data}: {row.key[: listed.SHOWN_CHARS]!r}")
        if len(kept) == benchmark.max_samples:
            break
    counts = +(counts + (left_out or Counter()))
    if not kept:
        found = ", ".join(f"{name} {number}" for name, number in counts.items()) or "nothing at all"
        raise UserError(
            f"{benchmark.data} holds no image that the benchmark {benchmark.name} can be scored on; found: {found}. "
            "Check its format, split and texts."
        )
    read_of = reads(list(kept))
    table = [[row.key, list(row.texts), row.label] for row in kept.values()]
    return DataSet(
        items=[Item(row.key, read_of[row.key], row.texts, row.label, row.about) for row in kept.values()],
        about={
            "path": benchmark.data,
            "format": form,
            **about,
            "num_images": len(kept),
            "num_texts": sum(len(row.texts) for row in kept.values()),
            "left_out": dict(sorted(counts.items())),
            "digest": ledger.digest_json({"items": table, "classes": list(classes), "templates": list(templates)}),
        },
        classes=classes,
        templates=templates,
    )


def check_split(split: str, known: Iterable[str], where: Path) -> None:
    """Raises ``UserError`` for a split that is not there, with the nearest that is."""
    if split not in (splits := sorted(set(known))):
        raise UserError(f"{where} has no images of split {split!r}. {did_you_mean(split, splits)}")
