"""Our shards as images with a class, where somebody knows the class of a sample from its ``.json`` member."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from clips_train import shards
from clips_train.evals.collect import Reads, Row, collect
from clips_train.evals.items import DataSet
from clips_train.shards import ShardError, ShardReader
from clips_train.use_config import Benchmark

UNLABELLED: Final = "images.without_answer"


def open(
    benchmark: Benchmark,
    answer: Callable[[Mapping[str, Any]], str | None],
    classes: Sequence[str],
    templates: Sequence[str],
    about: Mapping[str, Any],
) -> DataSet:
    """The samples of a split (held-out ones where none is named) to which ``answer`` gives one of ``classes``.

    Others are counted. Raises ``UserError`` for a folder without finished shards and where there is no answer at all.
    """
    split = shards.open_split(Path(benchmark.data), benchmark.split or shards.HELDOUT)
    reader = ShardReader(split)
    label_of = {name: label for label, name in enumerate(classes)}
    left_out: Counter[str] = Counter()
    place_of: dict[str, tuple[int, int]] = {}

    def rows() -> Iterator[Row]:
        for shard, num_rows in enumerate(split.num_samples_by_shard):
            for row in range(num_rows):
                try:
                    found = answer(reader.about(shard, row))
                except ShardError as error:
                    left_out[f"images.bad.{error.reason}"] += 1
                    continue
                if found is None:
                    left_out[UNLABELLED] += 1
                    continue
                key = reader.key(shard, row)
                place_of[key] = (shard, row)
                yield Row(key, label=label_of[found])

    def reads(keys: Sequence[str]) -> Reads:
        return {key: partial(_image, reader, *place_of[key]) for key in keys}

    facts = {"split": split.name, "shards_digest": split.digest, **about}
    return collect(
        benchmark,
        rows(),
        reads,
        form="shards",
        about=facts,
        left_out=left_out,
        classes=classes,
        templates=templates,
    )


def _image(reader: ShardReader, shard: int, row: int) -> bytes:
    try:
        return reader.image(shard, row)
    except ShardError as error:
        raise OSError(error.reason) from error
