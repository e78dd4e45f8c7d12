"""Karpathy's lists of COCO and Flickr30k: ``dataset_coco.json`` or ``dataset_flickr30k.json``, and a folder of images.

``annotations/`` and ``images/`` beside one another are found, COCO's ``val2014/`` and Flickr30k's folders too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from clips_data.errors import UserError
from clips_train.evals import list_rows, listed
from clips_train.evals.collect import Row, check_split, collect
from clips_train.evals.items import DataSet
from clips_train.use_config import Benchmark

PATTERN: Final = "dataset_*.json"
TEST: Final = "test"
WITH_TRAIN: Final = "restval"
"""Images of COCO's validation set that are trained on by everyone's count."""
NUM_TEST_IMAGES: Final = {"dataset_coco.json": 5000, "dataset_flickr30k.json": 1000}
PLACES: Final[tuple[Callable[[str, str], str], ...]] = (
    lambda folder, name: f"{folder}/{name}",
    lambda folder, name: f"images/{folder}/{name}",
    lambda folder, name: name,
    lambda folder, name: f"images/{name}",
    lambda folder, name: f"flickr30k-images/{name}",
    lambda folder, name: f"flickr30k_images/{name}",
)
"""Where images lie under the folder, by their ``filepath`` and ``filename`` in the list."""


def open(benchmark: Benchmark) -> DataSet:
    """The images of one split, in the order of the list, each with its captions as they were written.

    ``train`` has ``restval`` in it. Raises ``UserError`` for an absent list or split, missing images, and rows that are
    not Karpathy's.
    """
    path = list_of(benchmark)
    root = Path(benchmark.data)
    root = root if root.is_dir() else root.parent
    split = benchmark.split or TEST
    splits = (split, WITH_TRAIN) if split == "train" else (split,)
    seen: Counter[str] = Counter()
    chosen: list[tuple[str, str, list[str]]] = []
    for number, row in enumerate(list_rows.rows(path), start=1):
        where = f"{path}, image {number},"
        seen[_text(row, "split", where)] += 1
        if row["split"] in splits:
            folder = str(row.get("filepath") or ".")
            chosen.append((folder, _text(row, "filename", where), _captions(row, where)))
    check_split(split, seen, path)
    about: dict[str, Any] = {"annotations": path.name, "split": split, "splits": list(splits)}
    if split == TEST and path.name in NUM_TEST_IMAGES:
        about["num_images_of_protocol"] = NUM_TEST_IMAGES[path.name]
    folder, name, _ = chosen[0]
    place = next((place for place in PLACES if (root / place(folder, name)).is_file()), PLACES[0])
    rows = (Row(str(PurePosixPath(place(folder, name))), captions) for folder, name, captions in chosen)
    return collect(benchmark, rows, lambda keys: listed.readers(root, keys, path), form="karpathy", about=about)


def list_of(benchmark: Benchmark) -> Path:
    """Where the list is. Raises ``UserError`` where there is none, or where there are several."""
    return listed.only_list(benchmark, lists_in, f"{PATTERN} in it or in its folder annotations")


def lists_in(root: Path) -> Sequence[Path]:
    return [*sorted(root.glob(PATTERN)), *sorted((root / "annotations").glob(PATTERN))]


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a row of a list is one of Karpathy's."""
    return "filename" in row and isinstance(row.get("sentences"), list)


def _captions(row: Mapping[str, Any], where: str) -> list[str]:
    sentences = row.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(each, dict) for each in sentences):
        raise UserError(f"{where} has no list of sentences, so the file is none of Karpathy's.")
    return [_text(sentence, "raw", where) for sentence in sentences]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise UserError(f"{where} has no text {name!r}, so the file is none of Karpathy's.")
    return value
