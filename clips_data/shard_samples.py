"""Finished training shards as samples: the index of the folder, and one tar's samples by its offset index.

For readers that copy or compare what is in shards; the trainer has a reader of its own, which needs no tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clips_data import joined, schema, tars
from clips_data.errors import UserError

INDEX_FILE: Final = "index.json"
_OFFSETS: Final = ".index.parquet"
_MADE_BY: Final = "Make the shards again with `clips shard`"


@dataclass(frozen=True)
class Tar:
    """One tar of the folder: ``unit`` is its name without the extension, ``sha256`` that of the whole file."""

    split: str
    unit: str
    num_samples: int
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.unit}.tar"


@dataclass(frozen=True)
class Shards:
    """A finished folder of training shards. ``index`` is all of its ``index.json``."""

    folder: Path
    columns: tuple[str, ...]
    tars: tuple[Tar, ...]
    index: Mapping[str, Any]

    @property
    def num_samples(self) -> int:
        return sum(tar.num_samples for tar in self.tars)


@dataclass(frozen=True)
class TrainingSample:
    """A sample as its tar holds it: ``text`` is the ``.txt`` member, ``about`` the ``.json`` member.

    ``texts`` has each column's caption, "" where there is none. ``image`` is empty where images were not asked for.
    """

    key: str
    sha256: str
    image_ext: str
    image: bytes
    text: str
    texts: Mapping[str, str]
    about: Mapping[str, Any]

    @property
    def scores(self) -> dict[str, float]:
        return dict(self.about.get("scores", {}))

    @property
    def provenance(self) -> Mapping[str, Any]:
        found = self.about.get("provenance", {})
        assert isinstance(found, Mapping)
        return found

    @property
    def codes(self) -> dict[str, str]:
        """What became of each caption but the web caption."""
        return dict(self.provenance.get("codes", {}))


def is_shards(folder: Path) -> bool:
    return (folder / INDEX_FILE).is_file()


def open_shards(folder: Path) -> Shards:
    """The shards in ``folder``, or in ``folder/shards``. Raises ``UserError`` where they are not finished."""
    if not is_shards(folder) and is_shards(folder / schema.SHARDS):
        folder = folder / schema.SHARDS
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"There is no {path}: {folder} holds no finished training shards. Run `clips shard`, or name its folder."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}). {_MADE_BY}.") from None
    version = index.get("schema_version") if isinstance(index, dict) else None
    if version != schema.SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this version of clips reads {schema.SCHEMA_VERSION}. "
            "Use the clips version that wrote it, or make the folder again."
        )
    found = [
        Tar(split, Path(shard["file"]).stem, shard["num_samples"], shard["sha256"])
        for split, about in index["splits"].items()
        for shard in about["shards"]
    ]
    return Shards(folder, tuple(index["columns"]), tuple(found), index)


def read(shards: Shards, tar: Tar, *, images: bool = True) -> Iterator[TrainingSample]:
    """The samples of a tar in order, one image in memory at a time, its hash checked.

    Raises ``UserError`` with file and offset where tar, offset index and ``index.json`` do not agree.
    """
    path = shards.folder / tar.file
    offsets = joined.read_table(shards.folder / f"{tar.unit}{_OFFSETS}")
    if len(offsets) != tar.num_samples:
        raise UserError(
            f"{shards.folder / INDEX_FILE} promises {tar.num_samples} samples in {path}, and its offset index has "
            f"{len(offsets)}. {_MADE_BY}."
        )
    with tars.open_tar(path) as file:
        for row in offsets.iter_rows(named=True):
            key, at = row["key"], row["json_offset"]
            about = _parsed(tars.read_at(file, path, at, row["json_bytes"]), path, at, key, shards.columns)
            text = tars.read_at(file, path, row["txt_offset"], row["txt_bytes"])
            image = b""
            if images:
                data = tars.read_at(file, path, row["image_offset"], row["image_bytes"])
                image = joined.check_image(data, path, key, row["sha256"])
            texts = {column: about[column] for column in shards.columns}
            yield TrainingSample(key, row["sha256"], row["image_ext"], image, _text(text, path, row), texts, about)


def _parsed(data: bytes, path: Path, at: int, key: str, columns: tuple[str, ...]) -> dict[str, Any]:
    """The ``.json`` member, once it is about ``key`` and holds every column as one string."""
    try:
        about = json.loads(data)
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict) or about.get("key") != key:
        raise UserError(
            f"{path} is not the tar that its offset index is about: at byte {at} there is no json member of key {key}. "
            f"Restore both files. {_MADE_BY} where that is not possible."
        )
    for column in columns:
        if not isinstance(about.get(column), str):
            raise UserError(f"{path}: at byte {at} the json member of {key} has no text {column!r}. {_MADE_BY}.")
    return about


def _text(data: bytes, path: Path, row: Mapping[str, Any]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: at byte {row['txt_offset']} the txt member of {row['key']} is not UTF-8. {_MADE_BY}."
        ) from None
