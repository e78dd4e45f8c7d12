"""SugarCrepe: an image of COCO, a caption that is true of it and one that is nearly the same and false.

Its seven files are ``{id: {filename, caption, negative_caption}}``; the images are those of COCO's val2017.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from clips_data import ledger
from clips_data.errors import UserError
from clips_train.evals import listed
from clips_train.evals.items import DataSet, Pairing
from clips_train.use_config import Benchmark

FILES: Final = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
FIELDS: Final = ("filename", "caption", "negative_caption")


def open(benchmark: Benchmark) -> DataSet:
    """Each file's name is the tag of its pairings. ``annotations`` may be one file, or the folder of all seven.

    Raises ``UserError`` where one of the seven or an image is missing, or a row is not of this form.
    """
    root = Path(benchmark.data)
    files = _files(benchmark, root)
    images = next((path for path in (root / "val2017", root / "images") if path.is_dir()), root)
    pairings: list[Pairing] = []
    for file in files:
        pairings += _pairings(file, images)
    pairings = pairings[: benchmark.max_samples or None]
    table = [[pairing.key, list(pairing.texts)] for pairing in pairings]
    about = {
        "path": benchmark.data,
        "format": "sugarcrepe",
        "split": None,
        "files": [file.stem for file in files],
        "digest": ledger.digest_json(table),
    }
    return DataSet([], about, pairings)


def _files(benchmark: Benchmark, root: Path) -> list[Path]:
    given = None if benchmark.annotations is None else Path(benchmark.annotations)
    if given is not None and given.is_file():
        return [given]
    folders = [given] if given is not None else [root, root / "data"]
    complete = {folder: [name for name in FILES if not (folder / f"{name}.json").is_file()] for folder in folders}
    folder, missing = min(complete.items(), key=lambda entry: len(entry[1]))
    if missing:
        raise UserError(
            f"{folder} lacks {', '.join(f'{name}.json' for name in missing)} of SugarCrepe's {len(FILES)} files. "
            "Put them there, or name one file or the folder of all as annotations."
        )
    return [folder / f"{name}.json" for name in FILES]


def _pairings(file: Path, images: Path) -> list[Pairing]:
    rows: Any = listed.json_of(file)
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"{file} should hold {{id: {{{', '.join(FIELDS)}}}}}.")
    texts = {number: listed.strings(row, FIELDS, f"Row {number!r} of {file}") for number, row in rows.items()}
    readers = listed.readers(images, (filename for filename, _, _ in texts.values()), file)
    return [
        Pairing(f"{file.stem}/{number}", (readers[filename],), (right, wrong), tags=(file.stem,))
        for number, (filename, right, wrong) in texts.items()
    ]
