"""Lists of images with texts, as people write them: JSON, JSON lines, CSV or TSV.

A row has an image and its text, or its texts; rows of the same image are one image. Among the lists that are read as
they are published: BLIP's ``coco_karpathy_test.json``, DOCCI's ``docci_descriptions.jsonlines``, ShareGPT4V's
conversations, of which the answer is the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from clips_data.errors import UserError, did_you_mean
from clips_train.evals import list_rows, listed
from clips_train.evals.collect import Row, check_split, collect
from clips_train.evals.items import DataSet
from clips_train.use_config import Benchmark

IMAGE_KEYS: Final = ("image", "image_file", "image_path", "filepath", "file_name", "filename", "path", "file")
TEXT_KEYS: Final = ("captions", "caption", "texts", "text", "description", "title")
CONVERSATIONS: Final = "conversations"
ANSWERS: Final = ("gpt", "assistant")
TEST: Final = "test"


def open(benchmark: Benchmark) -> DataSet:
    """The images in the order in which the list first names them.

    Where rows have a ``split``, those of the benchmark's are taken, of ``test`` where it says none. Raises
    ``UserError`` for an absent list, rows without image or text, and missing images.
    """
    path = list_of(benchmark)
    root = Path(benchmark.data)
    root = root if root.is_dir() else path.parent
    splits: Counter[str] = Counter()
    rows = list(_images(benchmark, path, splits))
    about: dict[str, Any] = {"annotations": path.name, "split": benchmark.split}
    if splits:
        about["split"] = benchmark.split or TEST
        check_split(about["split"], splits, path)
    return collect(benchmark, rows, lambda keys: listed.readers(root, keys, path), form="json", about=about)


def list_of(benchmark: Benchmark) -> Path:
    """Where the list is. Raises ``UserError`` where there is none, or where there are several."""
    return listed.only_list(benchmark, lists_in, f"of images and texts ({', '.join(list_rows.SUFFIXES)})")


def lists_in(root: Path) -> Sequence[Path]:
    return sorted(path for path in root.glob("*") if path.suffix in list_rows.SUFFIXES and path.is_file())


def _images(benchmark: Benchmark, path: Path, splits: Counter[str]) -> Iterator[Row]:
    """One row an image. A list with one row an image is read no further than it has to be."""
    texts_of: dict[str, list[str]] = {}
    for number, row in enumerate(list_rows.rows(path), start=1):
        where = f"{path}, row {number},"
        if "split" in row:
            splits[str(row["split"])] += 1
            if str(row["split"]) != (benchmark.split or TEST):
                continue
        image = _first(row, IMAGE_KEYS, where, "image")
        if not isinstance(image, str):
            raise UserError(f"{where} has no path of an image but {str(image)[:80]!r}.")
        texts_of.setdefault(image, []).extend(_texts(row, benchmark.texts, where))
        if CONVERSATIONS in row and len(texts_of) == benchmark.max_samples:
            break
    yield from (Row(image, texts) for image, texts in texts_of.items())


def _texts(row: Mapping[str, Any], key: str | None, where: str) -> list[str]:
    if key is None and isinstance(row.get(CONVERSATIONS), list):
        return [_answer(row[CONVERSATIONS], where)]
    found = _first(row, (key,) if key else TEXT_KEYS, where, "text")
    texts = found if isinstance(found, list) else [found]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where} has texts that are none: {str(found)[:80]!r}.")
    return texts


def _answer(turns: Sequence[Any], where: str) -> str:
    """What the captioner said, on one line: as Long-CLIP's evaluation has it."""
    for turn in turns:
        if isinstance(turn, dict) and turn.get("from") in ANSWERS and isinstance(turn.get("value"), str):
            return str(turn["value"].replace("\n", " "))
    raise UserError(f"{where} has conversations without an answer from {' or '.join(ANSWERS)}.")


def _first(row: Mapping[str, Any], keys: Sequence[str], where: str, what: str) -> Any:
    for key in keys:
        if key in row:
            return row[key]
    raise UserError(
        f"{where} has no {what} under {' or '.join(map(repr, keys))}. "
        f"{did_you_mean(keys[0], list(row))} Name the key of the texts with texts."
    )
