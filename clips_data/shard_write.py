"""One tar of training samples, from its rows of the plan: images copied, captions mixed and split, offsets kept.

Memory holds the texts of one tar, one image and what waits to be written. A shuffled plan reads all over the pairs, so
their tars stay open for as long as one tar is written, and the kernel is told in advance which images come next.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final
from urllib.parse import urlsplit, urlunsplit

from clips_data import joined, ledger, split, tars
from clips_data.config import ShardConfig
from clips_data.mixing import Mix
from clips_data.mixing_rules import SCORE_DIGITS

if TYPE_CHECKING:
    import polars as pl

INDEX: Final = ".index.parquet"
RESERVED: Final = frozenset(("key", "sha256", "sub_captions", "scores", "extra", "provenance"))
"""Keys of a sample's JSON that no caption column may take."""
_MEMBERS: Final = ("image", "txt", "json")
_SCORE: Final = "score."
_OPEN_FILES: Final = 256
_IMAGES_AHEAD: Final = 64
_ONLY_TOLD: Final = frozenset(("licence", "explain"))
_PLAIN_URL: Final = re.compile(r"(https?://[A-Za-z0-9.:-]+(?:/[!\"$->@-~]*)?)(?:[?#][!-~]*)?")
_encode: Final = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False).encode


@dataclass(frozen=True)
class Writing:
    """What the writing of every tar needs to know. Goes to worker processes."""

    config: ShardConfig
    pairs: Path
    out: Path
    inputs: Mapping[str, str]


def config_of(config: ShardConfig) -> dict[str, Any]:
    """The part of the config that decides what is in the tars; lists by their names, wherever they lie.

    Without a list of samples to leave out it is what it was before there could be one, so that older tars stay as they
    are.
    """
    decisive = config.model_dump(mode="json", exclude={*_ONLY_TOLD, "exclude"})
    if config.exclude is not None:
        decisive["exclude"] = Path(config.exclude).name
    return decisive | {"balance": Path(config.balance).name if config.balance is not None else None}


def write_tar(rows: pl.DataFrame, unit: str, writing: Writing) -> dict[str, int]:
    """Writes and commits ``unit``, one sample for each of ``rows`` in order. Returns its samples by outcome of the mix.

    ``rows`` have ``key, sha256, unit, url, image_ext, place.offset, place.bytes, extra`` (JSON text), ``text.<column>``
    and ``code.<column>`` for each column, perhaps ``flags.<column>`` and ``score.<field>``. Raises ``UserError`` when
    an image is not the one that the tables promise, or when the disk is full.
    """
    out = writing.out
    outcomes: list[str] = []
    places: dict[str, list[int]] = {f"{name}_{what}": [] for name in _MEMBERS for what in ("offset", "bytes")}
    with ledger.readable_disk_errors(out), ledger.part(out / f"{unit}.tar").open("wb") as file:
        tar = tars.TarWriter(file)
        for sample in _samples(rows, writing):
            outcomes.append(sample.outcome)
            for name, ext, data in zip(_MEMBERS, (sample.image_ext, "txt", "json"), sample.members, strict=True):
                places[f"{name}_offset"].append(tar.add(f"{sample.key}.{ext}", data))
                places[f"{name}_bytes"].append(len(data))
        tar.close()
    _write_index(out / f"{unit}{INDEX}", rows, outcomes, places)
    counts, config = Counter(outcomes), config_of(writing.config)
    ledger.commit(out, unit, [f"{unit}.tar", f"{unit}{INDEX}"], inputs=writing.inputs, config=config, counts=counts)
    return dict(counts)


@dataclass(slots=True)
class _Sample:
    key: str
    image_ext: str
    members: tuple[bytes, bytes, bytes]
    outcome: str


def _samples(rows: pl.DataFrame, writing: Writing) -> Iterator[_Sample]:
    texts = _Texts(rows, writing.config)
    places = list(zip(rows["unit"], rows["place.offset"], rows["place.bytes"], strict=True))
    promised = zip(rows["key"], rows["sha256"], rows["image_ext"], strict=True)
    with _Images(writing.pairs) as images:
        for place in places[:_IMAGES_AHEAD]:
            images.announce(*place)
        for row, (key, sha256, image_ext) in enumerate(promised):
            if row + _IMAGES_AHEAD < len(places):
                images.announce(*places[row + _IMAGES_AHEAD])
            image = images.read(*places[row], key, sha256)
            text, about, outcome = texts.members(row)
            yield _Sample(key, image_ext, (image, text, about), outcome)


# --- images -----------------------------------------------------------------------------------------------------------


class _Images:
    """Images of many pairs tars by their places, the tars used last open."""

    def __init__(self, pairs: Path) -> None:
        self._pairs = pairs
        self._open: OrderedDict[str, tuple[Path, BinaryIO]] = OrderedDict()

    def __enter__(self) -> _Images:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1][1].close()

    def announce(self, unit: str, offset: int, num_bytes: int) -> None:
        """Tells the kernel that ``read`` will follow, so that a disk answers many requests at a time."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._tar(unit)[1].fileno(), offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def read(self, unit: str, offset: int, num_bytes: int, key: str, sha256: str) -> bytes:
        """The image of ``key``, once its hash is the one that the tables promise."""
        path, file = self._tar(unit)
        return joined.check_image(tars.read_at(file, path, offset, num_bytes), path, key, sha256, offset)

    def _tar(self, unit: str) -> tuple[Path, BinaryIO]:
        if unit in self._open:
            self._open.move_to_end(unit)
        else:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)[1][1].close()
            path = self._pairs / f"{unit}.tar"
            self._open[unit] = path, tars.open_tar(path)
        return self._open[unit]


# --- texts ------------------------------------------------------------------------------------------------------------


class _Texts:
    """The ``.txt`` and ``.json`` of each row; captions of all rows are split in one go."""

    def __init__(self, rows: pl.DataFrame, config: ShardConfig) -> None:
        self._seed = config.seed
        self._mix = Mix.of(config.web_ratio, config.columns, config.mix, config.replace_below)
        self._columns, self._made = config.columns, [name for name in config.columns if name != joined.WEB]
        self._texts = {name: rows[f"text.{name}"].to_list() for name in config.columns}
        self._pieces = {name: split.split_many(self._texts[name], config.split) for name in self._made}
        self._codes = {name: rows[f"code.{name}"].to_list() for name in self._made}
        self._scores = {
            name.removeprefix(_SCORE): rows[name].to_list() for name in rows.columns if name.startswith(_SCORE)
        }
        self._about = list(zip(rows["key"], rows["sha256"], rows["unit"], rows["url"], rows["extra"], strict=True))

    def members(self, row: int) -> tuple[bytes, bytes, str]:
        """Text and JSON of a row, and the outcome of the mix to count."""
        key, sha256, unit, url, extra = self._about[row]
        texts = {name: column[row] for name, column in self._texts.items()}
        scores = {name: _rounded(value) for name, column in self._scores.items() if _is_known(value := column[row])}
        choice = self._mix.choose(seed=self._seed, epoch=0, key=key, texts=texts, scores=scores)
        assert choice.column is not None, f"sample {key} was planned and has no caption"
        about = {
            **texts,
            "key": key,
            "sha256": sha256,
            "sub_captions": {name: pieces[row] for name, pieces in self._pieces.items()},
            "scores": scores,
            "extra": json.loads(extra),
            "provenance": {
                "pairs": unit,
                "url": without_secrets(url),
                "txt": choice.column,
                "codes": {name: codes[row] for name, codes in self._codes.items()},
            },
        }
        return texts[choice.column].encode(), _encode(about).encode(), choice.outcome


def _is_known(score: Any) -> bool:
    """JSON has neither null scores nor infinities here."""
    return score is not None and (not isinstance(score, float) or math.isfinite(score))


def _rounded(score: Any) -> Any:
    return round(score, SCORE_DIGITS) if isinstance(score, float) else score


def without_secrets(url: str | None) -> str | None:
    """The URL without query, fragment and user: those may be signatures and passwords."""
    if url is None:
        return None
    if plain := _PLAIN_URL.fullmatch(url):  # what follows says the same of these, and takes ten times as long
        return plain[1]
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# --- the offset index -------------------------------------------------------------------------------------------------


def _write_index(path: Path, rows: pl.DataFrame, outcomes: list[str], places: dict[str, list[int]]) -> None:
    """Where each member's data lie, and what statistics of the whole folder count: nobody has to read the texts again.

    ``words.<column>`` is 0 where there is no caption. ``code`` and ``flags`` are those of the caption tables.
    """
    import polars as pl
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.int64()
    kinds = dict.fromkeys(("key", "sha256", "image_ext"), text) | dict.fromkeys(places, number) | {"outcome": text}
    table = rows.with_columns(pl.Series("outcome", outcomes, pl.String), *starmap(pl.Series, places.items()))
    for name in rows.columns:
        kind, _, column = name.partition(".")
        if kind == "text":
            table = table.with_columns(pl.col(name).str.count_matches(r"\S+").alias(f"words.{column}"))
            kinds[f"words.{column}"] = pa.int32()
        elif kind == "code" and column != joined.WEB:
            kinds[name] = text
        elif kind == "flags":
            kinds[name] = pa.list_(text)
    # By way of polars, because the first array that Arrow makes of a Python list costs the import of pandas.
    found = table.select(*kinds).to_arrow().cast(pa.schema(kinds.items()))
    with ledger.readable_disk_errors(path):
        pq.write_table(found, ledger.part(path))
