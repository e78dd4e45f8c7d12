"""Winoground: two images and two captions of the same words, to be matched.

``examples.jsonl`` has ``image_0``, ``image_1`` (names without ending), ``caption_0``, ``caption_1`` and tags; the
images lie in ``images/`` beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from clips_data import ledger
from clips_data.errors import UserError
from clips_train.evals import listed
from clips_train.evals.items import DataSet, Pairing
from clips_train.use_config import Benchmark

EXAMPLES: Final = "examples.jsonl"
IMAGES, CAPTIONS = ("image_0", "image_1"), ("caption_0", "caption_1")
TAGS: Final = ("collapsed_tag", "secondary_tag")
"""Which words change places, coarsely, and what makes the example a special one."""
ENDING: Final = ".png"


def open(benchmark: Benchmark) -> DataSet:
    """Raises ``UserError`` where the examples or an image are missing, or a row is not of this form."""
    root = Path(benchmark.data)
    file = _examples(benchmark, root)
    images = next((path for path in (root / "images", file.parent / "images") if path.is_dir()), root)
    rows = list(listed.json_of(file))
    if not rows:
        raise UserError(f"{file} holds no examples.")
    texts = [listed.strings(row, (*IMAGES, *CAPTIONS), f"Row {number} of {file}") for number, row in enumerate(rows)]
    names = [tuple(name if Path(name).suffix else name + ENDING for name in row[:2]) for row in texts]
    readers = listed.readers(images, (name for pair in names for name in pair), file)
    pairings = [
        Pairing(str(row.get("id", number)), tuple(readers[name] for name in pair), tuple(words[2:]), tags=_tags(row))
        for number, (row, pair, words) in enumerate(zip(rows, names, texts, strict=True))
    ][: benchmark.max_samples or None]
    table = [[pairing.key, list(pairing.texts)] for pairing in pairings]
    about = {"path": benchmark.data, "format": "winoground", "split": None, "digest": ledger.digest_json(table)}
    return DataSet([], about, pairings)


def _examples(benchmark: Benchmark, root: Path) -> Path:
    places = [root / EXAMPLES, root / "data" / EXAMPLES] if benchmark.annotations is None else []
    places += [Path(benchmark.annotations)] if benchmark.annotations is not None else []
    for path in places:
        if path.is_file():
            return path
    raise UserError(f"There is no {' and no '.join(map(str, places))}. Give Winoground's {EXAMPLES} as annotations.")


def _tags(row: Any) -> tuple[str, ...]:
    """Those of the example; the secondary ones are several in a text."""
    words = [str(row.get(name) or "").split(", ") for name in TAGS]
    return tuple(tag for some in words for tag in some if tag)
