"""The report's samples: images with their captions, sub-captions marked, and what the captioner makes of them."""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from clips_data import draws, joined, shard_index, tars
from clips_data import report_html as h
from clips_data.config import ReportConfig
from clips_data.report_pictures import Budget, caption_or, card, thumbnail

SPLITS: Final = ("heldout", "train")


class Sample(NamedTuple):
    """A sample of the shards, with its image and its ``.json`` member."""

    split: str
    key: str
    sha256: str
    image: bytes
    about: dict[str, Any]


def render(samples: list[Sample], ours: dict[str, str], budget: Budget) -> str:
    """The gallery of these samples. ``ours`` are the captioner's captions by key."""
    if not samples:
        return ""
    shown = samples[: budget.samples]
    cards = [_card(sample, ours.get(sample.key), budget) for sample in shown]
    legend = (
        '<p class="legend"><span><mark class="a">odd</mark> and <mark class="b">even</mark> sub-captions, '
        "as the splitting rule cut them</span><span>Unmarked text belongs to none.</span></p>"
    )
    note = f'<p class="soft">{h.text(told)}</p>' if (told := budget.note(len(shown), len(samples))) else ""
    head = f'<h2 id="samples">Samples</h2>{note}{legend}'
    return f'{head}<div class="gallery">{"".join(cards)}</div>'


def choose(config: ReportConfig, shards: Path, captioned: Collection[str]) -> list[Sample]:
    """The samples with the lowest draws.

    First those that our captioner captioned, then others that were held out, then training samples.
    """
    if config.gallery == 0:
        return []
    chosen: list[tuple[bool, int, float, str]] = []
    unseen = set(captioned)

    def ranked(rank: int, split: str) -> Iterator[tuple[bool, int, float, str]]:
        for path in _tars(shards, split):
            for key in joined.read_table(path.with_suffix(".index.parquet"), ["key"])["key"]:
                unseen.discard(key)
                yield key not in captioned, rank, draws.uniform(config.seed, "gallery", 0, key), key

    for rank, split in enumerate(SPLITS):
        chosen = heapq.nsmallest(config.gallery, itertools.chain(chosen, ranked(rank, split)))
        if len(chosen) == config.gallery and not unseen:
            break  # training samples cannot come first any more
    found = find(shards, {key for *_, key in chosen})
    return [found[key] for *_, key in chosen]


def find(shards: Path, keys: Collection[str]) -> dict[str, Sample]:
    """Those of these samples that are in the shards, by key."""
    import polars as pl

    found: dict[str, Sample] = {}
    wanted = pl.Series(sorted(keys), dtype=pl.String).implode()
    for split in SPLITS:
        for path in _tars(shards, split):
            if len(found) == len(keys):
                return found
            rows = joined.read_table(path.with_suffix(".index.parquet")).filter(pl.col("key").is_in(wanted))
            if rows.is_empty():
                continue
            with tars.open_tar(path) as file:
                for row in rows.iter_rows(named=True):
                    image = tars.read_at(file, path, row["image_offset"], row["image_bytes"])
                    about = json.loads(tars.read_at(file, path, row["json_offset"], row["json_bytes"]))
                    found[row["key"]] = Sample(split, row["key"], row["sha256"], image, about)
    return found


def _tars(shards: Path, split: str) -> Iterator[Path]:
    index = shard_index.read(shards) or {"splits": {}}
    for shard in index["splits"].get(split, {"shards": []})["shards"]:
        yield shards / shard["file"]


def _card(sample: Sample, ours: str | None, budget: Budget) -> str:
    about = sample.about
    entries = [("Web caption", caption_or(about[joined.WEB], "none"))]
    for column, spans in about["sub_captions"].items():
        shown = h.marked_caption(about[column], spans) or '<span class="soft">none: rejected or empty</span>'
        entries.append((f"{column} caption", shown))
    if ours is not None:
        entries.append(("CLIPS captioner", caption_or(ours, "said nothing")))
    similar = [f"{name} {value:.3f}" for name, value in sorted(about["scores"].items())]
    entries.append(("Sample", h.bar_figures([sample.key, sample.split, *similar])))
    picture = thumbnail(sample.image, about[joined.WEB], budget)
    return card(picture, entries, key=sample.key, sha256=sample.sha256)
