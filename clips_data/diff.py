"""``clips diff``: what two data sets, or two caption columns, have in common, and where they differ.

Rows are the same where key and image are, or, of the others, where the image is. Tables that key by shard are compared
shard by shard; training shards are shuffled, so their rows are first dealt to files by a hash of the key. Either way
memory holds a part of the rows.
"""

from __future__ import annotations

import difflib
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import schema
from clips_data.diff_sides import TEXT, Side, open_side
from clips_data.errors import UserError

if TYPE_CHECKING:
    import polars as pl

_ROWS_A_BUCKET: Final = 50_000
_MAX_BUCKETS: Final = 256
_WAITING_BYTES: Final = 128 << 20
_MOST_WORDS: Final = 2000
"""Texts with more words are not aligned word by word, which takes time with the square of their length."""
_COUNTS: Final = ("failures", "flags", "finish_reasons", "not_asked", "fallbacks", "txt")
_B: Final = ".b"


def diff(a: Path, b: Path, *, limit: int = 10, scratch: Path | None = None) -> dict[str, Any]:
    """Everything about two folders, ready for JSON.

    ``rows`` counts ``same``, ``same_image_other_key``, ``same_key_other_image`` (these count also as what becomes of
    either image), ``only_a`` and ``only_b``, and names the first ``limit`` keys of the last two. ``texts`` has for each
    column that both sides have how many texts are ``equal``, ``different``, only on one side, and the first ``limit``
    that are not equal. ``figures`` and ``settings`` are pairs of values by dotted names, null where a side lacks one.
    ``differ`` tells whether any row, text or column differs. Rows that wait are kept in a folder under ``scratch``.
    Raises ``UserError`` for folders that cannot be compared.
    """
    sides = open_side(a), open_side(b)
    if (sides[0].kind == schema.CAPTIONS) != (sides[1].kind == schema.CAPTIONS):
        column, data_set = (a, b) if sides[0].kind == schema.CAPTIONS else (b, a)
        raise UserError(
            f"{column} is a caption column and {data_set} a data set. Compare two of a kind, such as "
            f"{column} with another column, or two work folders."
        )
    common = [column for column in sides[0].columns if column in sides[1].columns]
    compared = Compared(common, limit)
    with tempfile.TemporaryDirectory(prefix="clips-diff-", dir=scratch) as folder:
        compared.run(*sides, Path(folder))
    only = [sorted(set(one.columns) - set(common)) for one in sides]
    return {
        "a": _about(sides[0]),
        "b": _about(sides[1]),
        "rows": compared.rows(),
        "texts": {column: compared.texts(column) for column in common},
        "columns_only_a": only[0],
        "columns_only_b": only[1],
        "figures": _counted(_paired(sides[0].figures(), sides[1].figures())),
        "settings": _paired(sides[0].settings(), sides[1].settings()),
        "differ": compared.differ() or bool(only[0] or only[1]),
    }


def _about(side: Side) -> dict[str, Any]:
    return {"where": str(side.where), "kind": side.kind, "unfinished_columns": list(side.left_out)}


def _paired(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: [a.get(name), b.get(name)] for name in {**a, **b}}


def _counted(figures: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Counts by code or flag list what occurs; what does not occur on a side that was counted is 0 there."""
    for name, pair in figures.items():
        parents = [name[: name.index(f"{counts}.")] for counts in _COUNTS if f".{counts}." in f".{name}"]
        if parents and None not in figures.get(f"{parents[0]}attempted", [None]):
            figures[name] = [value or 0 for value in pair]
    return figures


def word_diff(a: str, b: str) -> list[list[str]]:
    """``[["=", "a red"], ["-", "boat"], ["+", "ship"]]``: runs of words in both, in ``a`` only and in ``b`` only."""
    old, new = a.split(), b.split()
    if len(old) + len(new) > _MOST_WORDS:
        return [["-", a], ["+", b]]
    runs: list[list[str]] = []
    for kind, a0, a1, b0, b1 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            runs.append(["=", " ".join(old[a0:a1])])
            continue
        runs += [[sign, " ".join(words)] for sign, words in (("-", old[a0:a1]), ("+", new[b0:b1])) if words]
    return runs


# --- rows and texts ---------------------------------------------------------------------------------------------------


class Compared:
    """What was counted, bucket by bucket."""

    def __init__(self, columns: list[str], limit: int) -> None:
        self.columns, self.limit = columns, limit
        self._rows: Counter[str] = Counter()
        self._texts: dict[str, Counter[str]] = {column: Counter() for column in columns}
        self._examples: dict[str, list[dict[str, Any]]] = {column: [] for column in columns}
        self._first: dict[str, list[str]] = {"only_a": [], "only_b": []}

    def run(self, a: Side, b: Side, scratch: Path) -> None:
        num = min(_MAX_BUCKETS, 1 + max(a.num_rows, b.num_rows) // _ROWS_A_BUCKET)
        rest = Buckets(scratch / "rest_a", "sha256", num), Buckets(scratch / "rest_b", "sha256", num)
        for of_a, of_b in _by_key(a, b, scratch, num):
            self._same_key(self._wanted(of_a, a), self._wanted(of_b, b), rest)
        for number in range(num):
            self._same_image(rest[0].take(number), rest[1].take(number))

    def _wanted(self, frame: pl.DataFrame, side: Side) -> pl.DataFrame:
        twice = frame.filter(frame["key"].is_duplicated())
        if len(twice):
            raise UserError(f"{side.where} has key {twice['key'][0]} more than once. `clips verify` may say why.")
        return frame.select("key", "sha256", *(TEXT + column for column in self.columns))

    def _same_key(self, a: pl.DataFrame, b: pl.DataFrame, rest: tuple[Buckets, Buckets]) -> None:
        import polars as pl

        both = a.join(b, on="key", how="inner", suffix=_B)
        same = both.filter(pl.col("sha256") == pl.col("sha256" + _B))
        self._rows["same_key_other_image"] += len(both) - len(same)
        self._rows["same"] += len(same)
        self._compare_texts(same.with_columns(pl.col("key").alias("key" + _B)))
        for side, buckets in ((a, rest[0]), (b, rest[1])):
            buckets.add(side.join(same.select("key"), on="key", how="anti"))

    def _same_image(self, a: pl.DataFrame | None, b: pl.DataFrame | None) -> None:
        """Rows without a partner of their key. Of several with one image, the first goes with the first, and so on."""
        import polars as pl

        if a is None or b is None:
            for side, name in ((a, "only_a"), (b, "only_b")):
                if side is not None:
                    self._left(name, side)
            return
        rank = pl.int_range(pl.len()).over("sha256").alias("rank")
        a, b = a.sort("key").with_columns(rank), b.sort("key").with_columns(rank)
        same = a.join(b, on=["sha256", "rank"], how="inner", suffix=_B)
        self._rows["same_image_other_key"] += len(same)
        self._compare_texts(same)
        for side, name in ((a, "only_a"), (b, "only_b")):
            self._left(name, side.join(same.select("sha256", "rank"), on=["sha256", "rank"], how="anti"))

    def _left(self, name: str, rows: pl.DataFrame) -> None:
        self._rows[name] += len(rows)
        self._first[name] = sorted([*self._first[name], *rows["key"].bottom_k(self.limit)])[: self.limit]

    def _compare_texts(self, both: pl.DataFrame) -> None:
        import polars as pl

        for column in self.columns:
            a, b = pl.col(TEXT + column), pl.col(TEXT + column + _B)
            counted = both.select(
                neither=((a == "") & (b == "")).sum(),
                equal=((a == b) & (a != "")).sum(),
                only_a=((a != "") & (b == "")).sum(),
                only_b=((a == "") & (b != "")).sum(),
                different=((a != b) & (a != "") & (b != "")).sum(),
            )
            self._texts[column].update(counted.row(0, named=True))
            unequal = both.filter(a != b).select("key", pl.col("key" + _B).alias("key_b"), a.alias("a"), b.alias("b"))
            found = self._examples[column] + unequal.bottom_k(self.limit, by="key").to_dicts() if self.limit else []
            self._examples[column] = sorted(found, key=lambda one: str(one["key"]))[: self.limit]

    # --- what came of it ---

    def rows(self) -> dict[str, Any]:
        names = ("same", "same_image_other_key", "same_key_other_image", "only_a", "only_b")
        first = {f"first_{name}": keys for name, keys in self._first.items()}
        return {**{name: self._rows[name] for name in names}, **first}

    def texts(self, column: str) -> dict[str, Any]:
        found = self._texts[column]
        num = sum(found.values())
        unequal = num - found["equal"] - found["neither"]
        return {
            "compared": num,
            **{name: found[name] for name in ("equal", "different", "only_a", "only_b", "neither")},
            "unequal_share": round(unequal / num, 6) if num else None,
            "first": [{**one, "words": word_diff(one["a"], one["b"])} for one in self._examples[column]],
        }

    def differ(self) -> bool:
        texts = any(found[name] for found in self._texts.values() for name in ("different", "only_a", "only_b"))
        return texts or any(number for name, number in self._rows.items() if name != "same")


def _by_key(a: Side, b: Side, scratch: Path, num_buckets: int) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
    """Both sides in parts that have all rows of a key in common."""
    if a.by_unit and b.by_unit:
        for unit in sorted({*a.units, *b.units}):
            yield a.frame(unit), b.frame(unit)
        return
    dealt = []
    for name, side in (("a", a), ("b", b)):
        buckets = Buckets(scratch / name, "key", num_buckets)
        for frame in side.frames():
            buckets.add(frame)
        dealt.append(buckets)
    for number in range(num_buckets):
        frames = [buckets.take(number) for buckets in dealt]
        if frames[0] is not None or frames[1] is not None:
            yield (
                a.frame("") if frames[0] is None else frames[0],
                b.frame("") if frames[1] is None else frames[1],
            )


class Buckets:
    """Rows dealt to ``num`` buckets by a hash of one column, on disk from the moment that they are many."""

    def __init__(self, folder: Path, column: str, num: int) -> None:
        self._folder, self._column, self._num = folder, column, num
        self._waiting: list[pl.DataFrame] = []
        self._waiting_bytes = self._flushed = 0

    def add(self, rows: pl.DataFrame) -> None:
        if rows.is_empty():
            return
        self._waiting.append(rows)
        self._waiting_bytes += int(rows.estimated_size())
        if self._waiting_bytes >= _WAITING_BYTES:
            self._flush()

    def take(self, number: int) -> pl.DataFrame | None:
        """All rows of a bucket; ``None`` where it has none."""
        import polars as pl

        files = sorted(self._folder.glob(f"{number:03d}-*.parquet")) if self._flushed else []
        frames = [pl.read_parquet(file, glob=False) for file in files]
        frames += [rows.filter(self._bucket() == number) for rows in self._waiting]
        found = pl.concat(frames) if frames else None
        return found if found is not None and len(found) else None

    def _bucket(self) -> pl.Expr:
        import polars as pl

        return pl.col(self._column).hash() % self._num

    def _flush(self) -> None:
        import polars as pl

        self._folder.mkdir(parents=True, exist_ok=True)
        rows = pl.concat(self._waiting).with_columns(self._bucket().alias("bucket"))
        for (number,), part in rows.partition_by("bucket", as_dict=True, include_key=False).items():
            part.write_parquet(self._folder / f"{number:03d}-{self._flushed:06d}.parquet")
        self._waiting, self._waiting_bytes = [], 0
        self._flushed += 1
