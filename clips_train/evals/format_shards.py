"""A split of our own shards, or of tars that img2dataset and open_clip's users have, as a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from clips_train import foreign, shards
from clips_train.evals.collect import Reads, Row, collect
from clips_train.evals.heldout import HEADLINE, texts_of
from clips_train.evals.items import DataSet
from clips_train.shards import ShardError, ShardReader
from clips_train.use_config import Benchmark

WEB: Final = "web"
INDEX: Final = "eval_index"


def open(benchmark: Benchmark, work: Path | None = None) -> DataSet:
    """The samples of a split, in their order, with the captions that came with the list, else with the web caption.

    ``benchmark.texts`` names another column. Indexes of others' tars are kept under ``work``. Raises ``UserError`` for
    a folder without finished shards, an absent split or column, and a split in which nobody has a text.
    """
    name = benchmark.split or shards.HELDOUT
    split = foreign.open_shards(Path(benchmark.data), name, index=(work or Path()) / INDEX)
    web = foreign.TXT if isinstance(split, foreign.ForeignSplit) else WEB
    reader = ShardReader(split)
    left_out: Counter[str] = Counter()
    place_of: dict[str, tuple[int, int]] = {}

    def rows() -> Iterator[Row]:
        for shard, row, about in _samples(reader, left_out):
            key = reader.key(shard, row)
            place_of[key] = (shard, row)
            yield Row(key, texts_of(about, benchmark.texts or HEADLINE, web, {}), about={WEB: about.get(web) or ""})

    def reads(keys: Sequence[str]) -> Reads:
        return {key: partial(_image, reader, *place_of[key]) for key in keys}

    facts = {"split": split.name, "texts": benchmark.texts or HEADLINE, "shards_digest": split.digest}
    return collect(benchmark, rows(), reads, form="shards", about=facts, left_out=left_out)


def _samples(reader: ShardReader, left_out: Counter[str]) -> Iterator[tuple[int, int, Mapping[str, object]]]:
    """Those whose texts can be read; the others are counted."""
    for shard, num_rows in enumerate(reader.split.num_samples_by_shard):
        for row in range(num_rows):
            try:
                about = reader.about(shard, row)
            except ShardError as error:
                left_out[f"images.bad.{error.reason}"] += 1
                continue
            yield shard, row, about


def _image(reader: ShardReader, shard: int, row: int) -> bytes:
    try:
        return reader.image(shard, row)
    except ShardError as error:
        raise OSError(error.reason) from error
