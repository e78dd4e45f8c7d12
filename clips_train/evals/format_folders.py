"""Data sets of long texts whose layout is a pair of folders: Urban-1k's, and that of Densely Captioned Images (DCI).

Urban-1k has ``image/1.jpg`` and ``caption/1.txt``. DCI has ``photos/``, one JSON file an image in ``annotations/``, and
``splits.json``, which names these files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from clips_data.errors import UserError
from clips_train.evals import listed
from clips_train.evals.collect import Row, check_split, collect
from clips_train.evals.items import DataSet
from clips_train.use_config import Benchmark

IMAGE_FOLDERS: Final = ("image", "images")
TEXT_FOLDERS: Final = ("caption", "captions")
IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp")
DCI: Final = "densely_captioned_images"
PHOTOS, ANNOTATIONS, SPLITS = "photos", "annotations", "splits.json"
ALL: Final = "all"
SHORT, EXTRA = "short_caption", "extra_caption"


def pair_in(root: Path) -> tuple[Path, Path] | None:
    """The folders of images and of texts, where ``root`` has both."""
    images = [root / name for name in IMAGE_FOLDERS if (root / name).is_dir()]
    texts = [root / name for name in TEXT_FOLDERS if (root / name).is_dir()]
    return (images[0], texts[0]) if images and texts else None


def dci_in(root: Path) -> Path | None:
    """The folder of DCI, where ``root`` is it or has it."""
    return next((folder for folder in (root, root / DCI) if (folder / ANNOTATIONS).is_dir()), None)


def open(benchmark: Benchmark) -> DataSet:
    """Raises ``UserError`` for a folder of neither layout, and for images or texts that lack the other."""
    root = Path(benchmark.data)
    if (pair := pair_in(root)) is not None:
        return _pair(benchmark, *pair)
    if (folder := dci_in(root)) is not None:
        return _dci(benchmark, folder)
    raise UserError(
        f"{root} has neither image/ and caption/ folders nor {PHOTOS}/ and {ANNOTATIONS}/. Name the folder that has."
    )


def _pair(benchmark: Benchmark, images: Path, texts: Path) -> DataSet:
    """Each line of a text file is a caption; with one caption an image that is the first, as Long-CLIP reads it."""
    image_of = {
        path.stem: path.name for path in sorted(images.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES
    }  # fmt: skip
    text_of = {path.stem: path for path in sorted(texts.glob("*.txt"))}
    if without := sorted(image_of.keys() ^ text_of.keys()):
        raise UserError(
            f"{len(without)} images or texts lack the other, {without[0]} first: {images} has {len(image_of)} images, "
            f"{texts} has {len(text_of)} .txt files of the same names. Complete them."
        )
    rows = (Row(image_of[stem], listed.text_of(path).split("\n")) for stem, path in text_of.items())
    about = {"split": benchmark.split, "texts": "the lines of a file, in the order of the names"}
    return collect(benchmark, rows, lambda keys: listed.readers(images, keys, texts), form="json", about=about)


def _dci(benchmark: Benchmark, folder: Path) -> DataSet:
    """All splits where the benchmark names none, short and long caption joined, as LoTLIP's evaluation has it."""
    split = benchmark.split or ALL
    files = _dci_files(folder, split)
    keys = (benchmark.texts,) if benchmark.texts else (SHORT, EXTRA)
    left_out: Counter[str] = Counter()
    rows = _dci_rows(folder / ANNOTATIONS, files, keys)
    about = {"split": split, "texts": " and ".join(keys) + (", joined by a line break" if len(keys) > 1 else "")}
    return collect(
        benchmark,
        rows,
        lambda names: listed.readers(folder / PHOTOS, names, folder / ANNOTATIONS),
        form="json",
        about=about,
        left_out=left_out,
    )


def _dci_files(folder: Path, split: str) -> list[str]:
    path = folder / SPLITS
    if not path.is_file():
        if split != ALL:
            raise UserError(f"{path} is not there, so the split {split!r} is not known. Restore it, or name no split.")
        return sorted(path.name for path in (folder / ANNOTATIONS).glob("*.json"))
    splits = listed.json_of(path)
    if not isinstance(splits, dict) or not all(isinstance(files, list) for files in splits.values()):
        raise UserError(f"{path} should map each split to a list of files. Restore it.")
    if split == ALL:
        return [str(file) for files in splits.values() for file in files]
    check_split(split, splits, path)
    return [str(file) for file in splits[split]]


def _dci_rows(folder: Path, files: Sequence[str], keys: Sequence[str]) -> Iterator[Row]:
    for file in files:
        if Path(file).name != file:
            raise UserError(f"{folder.parent / SPLITS} names {file[:200]!r}, which is no file of {folder}. Restore it.")
        found: Any = listed.json_of(folder / file)
        where = f"{folder / file}"
        (image,) = listed.strings(found, ("image",), where)
        if missing := [key for key in keys if not isinstance(found.get(key), str)]:
            raise UserError(f"{where} has no text {missing[0]!r}. {json.dumps(sorted(found))[:200]} are its names.")
        yield Row(image, ["\n".join(found[key].strip() for key in keys if found[key].strip())])
