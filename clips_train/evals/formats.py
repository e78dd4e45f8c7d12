"""The door to data sets: finds out which format files have, and opens them by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from clips_data.errors import UserError
from clips_train.evals import (
    format_folder,
    format_folders,
    format_json,
    format_karpathy,
    format_shards,
    format_sugarcrepe,
    format_webdataset,
    format_winoground,
    list_rows,
)
from clips_train.evals.items import DataSet
from clips_train.shards import INDEX_FILE
from clips_train.use_config import Benchmark


def open_data(benchmark: Benchmark, work: Path | None = None) -> DataSet:
    """The data set of a benchmark, by its ``format`` or by what its files look like.

    ``work`` is where indexes of others' tars may be kept. Raises ``UserError`` for data that are not there, are in no
    format that clips reads, or are damaged.
    """
    _check_there(benchmark)
    form = benchmark.format or find_format(benchmark)
    openers: Mapping[str, Callable[[Benchmark], DataSet]] = {
        "karpathy": format_karpathy.open,
        "webdataset": format_webdataset.open,
        "shards": partial(format_shards.open, work=work),
        "json": _open_texts,
        "folder": format_folder.open,
        "sugarcrepe": format_sugarcrepe.open,
        "winoground": format_winoground.open,
    }
    return openers[form](benchmark)


def find_format(benchmark: Benchmark) -> str:
    """Raises ``UserError`` where no format fits."""
    root = Path(benchmark.data)
    if (root / INDEX_FILE).is_file() and any(root.glob("*.index.parquet")):
        return "shards"
    if root.suffix == ".tar" or format_webdataset.is_one(root):
        return "webdataset"
    if benchmark.task == "compositionality":
        return "winoground" if (root / format_winoground.EXAMPLES).is_file() else "sugarcrepe"
    if benchmark.task == "zero_shot":
        return "folder"
    found = _of_texts(root, benchmark.annotations)
    if found is None:
        raise UserError(
            f"{root} is no data set that clips knows by its files: neither shards, nor tars, nor a list of images and "
            f"texts ({', '.join(list_rows.SUFFIXES)}), nor image/ and caption/ folders. Name its format, or its list "
            "with annotations."
        )
    return found


def _check_there(benchmark: Benchmark) -> None:
    for what, path in (("the data", benchmark.data), ("the annotations", benchmark.annotations)):
        if path is not None and not Path(path).exists():
            raise UserError(f"{path}, {what} of the benchmark {benchmark.name}, is not there. Check the path.")


def _of_texts(root: Path, annotations: str | None) -> str | None:
    if annotations is not None or root.is_file():
        return _of_list(Path(annotations or root))
    if format_karpathy.lists_in(root):
        return "karpathy"
    if _in_folders(root):
        return "json"
    lists = format_json.lists_in(root)
    return _of_list(lists[0]) if lists else None


def _of_list(path: Path) -> str | None:
    """By its first row."""
    if path.suffix not in list_rows.SUFFIXES:
        return None
    return "karpathy" if format_karpathy.is_row(next(list_rows.rows(path), {})) else "json"


def _in_folders(root: Path) -> bool:
    return format_folders.pair_in(root) is not None or format_folders.dci_in(root) is not None


def _open_texts(benchmark: Benchmark) -> DataSet:
    in_folders = benchmark.annotations is None and _in_folders(Path(benchmark.data))
    return format_folders.open(benchmark) if in_folders else format_json.open(benchmark)
