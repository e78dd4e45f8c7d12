"""What the dataset card is made of: facts from the tables of pairs, captions and scores, and counts over the shards.

``gather`` keeps in the index what only the stages to the left know; ``Counted`` adds up the offset indexes of the tars,
one at a time. Of paths only the last part is told, so that equal folders have equal cards on any machine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Final

from clips_data import joined, ledger, measure, schema
from clips_data.config import ShardConfig

if TYPE_CHECKING:
    import polars as pl

TOP_HOSTS: Final = 10
MAKERS: Final = ("model", "model_revision", "engine", "engine_version", "prompt", "prompt_digest", "sampling", "seed")
SCORERS: Final = ("model", "pretrained", "model_digest", "preprocessing")
_HOST_IN_URL: Final = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#]*@)?(\[[^\]]*\]|[^/:?#]+)"


def gather(given: joined.Inputs, config: ShardConfig) -> dict[str, Any]:
    """What the card says about pairs, captions and scores, ready for JSON. Streams the tables of pairs.

    ``columns`` and ``scores`` hold for each name those who made its tables, with the number of ``shards`` they made.
    """
    captions, scores = _folders(given, schema.CAPTIONS), _folders(given, schema.SCORES)
    return {
        "sources": _sources(given),
        "columns": {folder.name: _makers(folder, given.units, MAKERS) for folder in captions},
        "scores": {folder.name: _makers(folder, given.units, SCORERS) for folder in scores},
        "score_fields": score_fields(given),
        "split": config.split,
        "licence": config.licence,
    }


def score_fields(given: joined.Inputs) -> list[str]:
    """The fields of ``scores`` in the samples' JSON: those of the first folder by their own names."""
    scores = _folders(given, schema.SCORES)
    return [field for place, folder in enumerate(scores) for field in _fields(folder, given.units, place)]


def _folders(given: joined.Inputs, kind: str) -> list[Path]:
    return [folder for name, folder in given.folders.items() if name.startswith(f"{kind}/")]


def _fields(folder: Path, units: Sequence[str], place: int) -> list[str]:
    """The numbers in tables of scores as the samples' JSON calls them: the first folder's by their own names."""
    import polars as pl

    kinds = measure.columns_of(folder / f"{units[0]}.parquet")
    numbers = [name for name, kind in kinds.items() if kind.is_numeric() or kind == pl.Boolean]
    return [f"{folder.name}.{name}" for name in numbers] if place else numbers


def _sources(given: joined.Inputs) -> dict[str, Any]:
    """The images' hosts, and which published set or foreign tars the pairs are from, as far as their sidecars say."""
    import polars as pl

    texts = dict.fromkeys(("status", "host", "url"), pl.String)
    rows = measure.scan(given.pairs, given.units, texts).filter(pl.col("status") == schema.STATUS_SUCCESS)
    known = pl.when(pl.col("host") != "").then("host")
    hosts = rows.group_by(host=pl.coalesce(known, pl.col("url").str.extract(_HOST_IN_URL).str.to_lowercase())).len()
    named = hosts.filter(pl.col("host").is_not_null())
    top = named.sort(["len", "host"], descending=[True, False]).head(TOP_HOSTS)
    totals = hosts.select(pl.col("len").sum().alias("images"), pl.col("host").drop_nulls().len().alias("hosts"))
    most, total = measure.collect(given.pairs, top, totals)
    lists: Counter[str] = Counter()
    for unit in given.units:
        sidecar = ledger.read_sidecar(given.pairs, unit, check_files=False)
        about = sidecar.config if sidecar is not None else {}
        name = about.get("adopted_from") or about.get("adapter")
        if isinstance(name, str) and name not in ("auto", "none"):
            lists[_last_part(name)] += 1
    return {
        **total.row(0, named=True),
        "top_hosts": [[host, number] for host, number in most.iter_rows()],
        "from": measure.by_number(lists),
    }


def _makers(folder: Path, units: Sequence[str], fields: Sequence[str]) -> list[dict[str, Any]]:
    import polars as pl

    found: Counter[str] = Counter()
    for unit in units:
        about = pl.read_parquet_metadata(folder / f"{unit}.parquet")
        found[json.dumps({name: _told(about[name]) for name in fields if name in about}, sort_keys=True)] += 1
    return [{**json.loads(text), "shards": number} for text, number in measure.by_number(found).items()]


def _told(text: str) -> Any:
    """A value of a table's metadata, which is JSON text; of a path only the last part."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    return _last_part(value) if isinstance(value, str) else value


def _last_part(name: str) -> str:
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(name).is_absolute() or name.startswith(("~", "./", "../")):
            return kind(name).name
    return name


# --- what the offset indexes know -------------------------------------------------------------------------------------


class Counted:
    """Kinds of images, and each column's words, codes and flags, over the tars of a folder; in memory is one index."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        """``files`` are names of tars. Indexes of shards made before there were such columns count for nothing."""
        self.image_exts: Counter[str] = Counter()
        self.words: dict[str, Counter[int]] = {}
        self.codes: dict[str, Counter[str]] = {}
        self.flags: dict[str, Counter[str]] = {}
        for file in files:
            self._add(joined.read_table(folder / f"{file.removesuffix('.tar')}.index.parquet"))

    def _add(self, rows: pl.DataFrame) -> None:
        import polars as pl

        self.image_exts.update(rows["image_ext"])
        kinds: dict[str, dict[str, Counter[Any]]] = {"words": self.words, "code": self.codes, "flags": self.flags}
        for name in rows.columns:
            kind, dot, column = name.partition(".")
            if dot and kind in kinds:
                counter = kinds[kind].setdefault(column, Counter())
                values = rows[name].explode() if isinstance(rows.schema[name], pl.List) else rows[name]
                counter.update(dict(values.drop_nulls().value_counts().iter_rows()))


def rank(values: Counter[int], share: float) -> int:
    """The smallest value that at least this share of all does not exceed."""
    left = share * values.total()
    for value in sorted(values):
        left -= values[value]
        if left <= 0:
            return value
    raise AssertionError("no values")
