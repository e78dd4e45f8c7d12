"""``clips score --labels``: what other models say of the images (NSFW, faces, watermarks), joined to the pairs.

The table is read once, however long it is. Its columns become the fields of the scores: numbers as float64 (float32
stays), booleans, texts. Columns of csv and tsv are text, and become numbers or booleans where all of their values are.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from clips_data import executor, files, joined, ledger, locks, schema, score_table, tables
from clips_data.config import ScoreConfig
from clips_data.errors import UsageError, UserError, did_you_mean
from clips_data.executor import Job, Report
from clips_data.files import Budget, Part
from clips_data.table_join import MAX_TABLE_BYTES, Join, comparable
from clips_data.tables import Dialect

if TYPE_CHECKING:
    import polars as pl
    import pyarrow as pa

    from clips_data.table_join import CaptionTable

IDENTITIES: Final = ("key", "sha256", "url")
"""Columns that say which image a row is about, and are no labels."""
_WITH_LABELS: Final = ("name", "labels", "label_key")
"""What a config of labels chooses; the rest says how captions are scored."""
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_GUESSED: Final = ("csv", "tsv")
_NUMBER: Final = r"^\s*[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\s*$"
_BOOLEAN: Final = r"^\s*(?i:true|false)\s*$"


def run(config: ScoreConfig, job: Job) -> Report:
    """Makes ``scores/<name>`` of the table ``config.labels``. Images without a row in it get nulls, and are counted.

    Raises ``UserError`` where the table has no column to join by, no row for any image, or labels that no score can
    be, and ``UsageError`` where the config also chooses how captions are scored.
    """
    assert config.labels is not None
    _check_choices(config)
    started = time.monotonic()
    units = tuple(sorted({path.stem for path in job.only})) if job.only is not None else None
    given = joined.open_inputs(job.work, (), units=units)
    out = job.out or job.work / schema.SCORES / config.name
    report = Report("score")
    with _scratch(out, job) as scratch:
        table = LabelTable(config.labels, config.label_key, scratch)
        about = {"label_key": config.label_key, "labels_digest": table.digest}
        inputs_of = {unit: given.unit_digests(unit) for unit in executor.slice_of(given.units, job.slice)}
        standing = ledger.stand(out, inputs_of, about, overwrite=job.overwrite, dry_run=job.dry_run)
        report.skipped = len(standing.finished)
        report.add(dict(standing.counts))
        if job.dry_run:
            report.facts["shards_to_do"] = len(standing.missing)
        elif standing.missing:
            _join(standing.missing, given, table, out, about, job, report)
    finished = set(ledger.finished_units(out))
    report.units = [out / f"{unit}.parquet" for unit in given.units if unit in finished]
    labelled, rows = report.counts.get("ok", 0), sum(report.counts.values())
    report.notes.append(f"{labelled} of {rows} images have a label.")
    report.seconds = time.monotonic() - started
    return report


@contextlib.contextmanager
def _scratch(out: Path, job: Job) -> Iterator[Path]:
    """A folder of this slice alone; a dry run leaves nothing where the scores will be."""
    if job.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        name = f"labels{job.slice or ''}".replace("/", "-of-")
        with contextlib.ExitStack() as after, locks.scratch(out, name) as path:
            after.callback(_remove_if_empty, out, f".{name}")
            yield path


def _remove_if_empty(out: Path, lock: str) -> None:
    """A table that was refused leaves no scores, so not their folder either."""
    if all(path.name.startswith(".") for path in out.iterdir()):
        (out / lock).unlink()
        with contextlib.suppress(OSError):  # another slice is at work there
            out.rmdir()


def _join(
    units: list[str],
    given: joined.Inputs,
    table: LabelTable,
    out: Path,
    about: dict[str, Any],
    job: Job,
    report: Report,
) -> None:
    join = LabelJoin(given.pairs, units, table.by, table.scratch)
    facts = join.read(cast("CaptionTable", table))  # of which it asks for nothing but the batches
    if facts["table_rows"] == facts["table_rows_unused"]:
        _refuse_strangers(join, [unit for unit in given.units if unit not in units], table)
    report.facts.update(facts)
    metadata = {"model": json.dumps("labels"), **{name: json.dumps(value) for name, value in about.items()}}
    left = job.limit
    for unit in units:
        images, texts, unknown = join.captions(unit)
        if left is not None and len(images) > left:
            break
        left = None if left is None else left - len(images)
        scores = images.select("key", "sha256").hstack(table.labels(texts, unknown))
        inputs = given.unit_digests(unit)
        report.add(score_table.commit(out, unit, scores, metadata=metadata, inputs=inputs, config=about))
        report.made += 1


def _refuse_strangers(join: LabelJoin, others: list[str], table: LabelTable) -> None:
    """Refuses a table without a row for an image of any shard, be it of another slice or finished before."""
    label, by = table.parts[0].label, table.by
    if table.example is None:
        raise UserError(f"{label} has no row with a {by}, so there is nothing to join. Give it one row an image.")
    if others:
        scratch = table.scratch / "others"
        scratch.mkdir()
        facts = LabelJoin(join.pairs, others, by, scratch).read(cast("CaptionTable", table))
        shutil.rmtree(scratch)
        if facts["table_rows"] > facts["table_rows_unused"]:
            return
    known = next((key for unit in (*join.units, *others) if (key := join.example(unit)) is not None), None)
    digits = len(schema.sample_key(0, 0))
    is_cut = by == "key" and table.example.isdecimal() and len(table.example) < digits
    advice = (
        f"Keys are texts of {digits} digits: write them with their zeros."
        if is_cut
        else "Name the column that both have, of key, sha256 and url, with --label-key."
    )
    raise UserError(
        f"No row of {label} is about an image of {join.pairs}: its first {by} is {table.example!r}, that of the pairs "
        f"{known!r}. {advice}"
    )


class LabelTable:
    """A table of labels, given to a join as one text a row. ``digest`` tells it from others without reading it whole.

    What the columns are is known once all ``batches`` were read.
    """

    def __init__(self, source: str, by: str, scratch: Path) -> None:
        if source == "-":
            raise UserError("Labels are read from a file, a folder or an address, not from stdin.")
        self.by, self.scratch = by, scratch
        self.budget = Budget(MAX_TABLE_BYTES, "Cut it into several tables and give each a --name.")
        self.parts = files.find(source, scratch, self.budget, what="table of labels")
        names = tables.column_names(self.parts[0], scratch, self.budget, Dialect())
        if by not in names:
            raise UserError(
                f"{self.parts[0].label} has no column {by!r} to join by. {did_you_mean(by, names)} "
                "Rename the column, or name another of key, sha256 and url with --label-key."
            )
        self.names = [name for name in names if name not in IDENTITIES]
        _check_names(self.names, self.parts[0])
        self.digest = files.fingerprint(self.parts)
        self.example: str | None = None
        """The first value to join by, once ``batches`` were read."""
        self._kinds: dict[str, set[str]] = {name: set() for name in self.names}

    def batches(self) -> Iterator[pl.DataFrame]:
        """``key`` and ``text`` (the labels, each as text, as JSON) of some thousand rows at a time, in order."""
        import polars as pl

        for part in self.parts:
            for batch in tables.stream([part], self.scratch, self.budget, Dialect()):
                absent = pl.Series([None] * batch.num_rows, dtype=pl.String)
                columns = [
                    self._as_text(batch, name, part) if name in batch.column_names else absent.alias(name)
                    for name in self.names
                ]
                if strangers := [name for name in batch.column_names if name not in (*self.names, *IDENTITIES)]:
                    raise UserError(
                        f"{part.label} has a column {strangers[0]!r} that {self.parts[0].label} lacks. "
                        "All files of a table of labels have the columns of the first."
                    )
                keys = batch[self.by].to_pylist() if self.by in batch.column_names else [None] * batch.num_rows
                known = comparable(keys, self.by)
                self.example = self.example or next(iter(known.drop_nulls()), None)
                yield pl.DataFrame({
                    "key": known,
                    "text": pl.DataFrame(columns).select(pl.struct(self.names).struct.json_encode()).to_series(),
                })  # fmt: skip

    def labels(self, texts: Sequence[str], unknown: Sequence[int]) -> pl.DataFrame:
        """The fields of some rows of ``batches``, null for the numbers in ``unknown``."""
        import polars as pl

        none = set(unknown)
        given = pl.Series([None if row in none else text for row, text in enumerate(texts)], dtype=pl.String)
        decoded = given.str.json_decode(pl.Struct(dict.fromkeys(self.names, pl.String))).struct.unnest()
        return decoded.select(self._typed(name) for name in self.names)

    def _as_text(self, batch: pa.Table, name: str, part: Part) -> pl.Series:
        """A column as texts; what kinds of values it has is noted."""
        import polars as pl

        series = pl.Series(name, pl.from_arrow(batch[name]))
        kind = series.dtype
        if kind == pl.Null or not (kind.is_numeric() or kind in (pl.String, pl.Boolean)):
            if kind != pl.Null:
                raise UserError(
                    f"{part.label}: column {name!r} holds values of the type {kind}. Labels are numbers, booleans or "
                    "texts; leave it out of the table."
                )
            return pl.Series(name, [None] * len(series), dtype=pl.String)
        if kind == pl.String:
            self._kinds[name] |= _kinds_of_texts(series) if part.format in _GUESSED else {"text"}
            return series.replace("", None) if part.format in _GUESSED else series
        if kind.is_float():
            series = series.fill_nan(None)
        if series.null_count() < len(series):
            self._kinds[name].add("boolean" if kind == pl.Boolean else "float32" if kind == pl.Float32 else "number")
        return series.cast(pl.String)

    def _typed(self, name: str) -> pl.Expr:
        import polars as pl

        column, kinds = pl.col(name), self._kinds[name]
        if kinds == {"boolean"}:
            return column.str.strip_chars().str.to_lowercase() == "true"
        if kinds and kinds <= {"number", "float32"}:
            return column.str.strip_chars().cast(pl.Float32 if kinds == {"float32"} else pl.Float64)
        return column


class LabelJoin(Join):
    """A join in which an image's sha256 is that of the stored bytes, which is what other models have seen."""

    def _keys(self, unit: str) -> tuple[pl.DataFrame, pl.Series]:
        images, keys = super()._keys(unit)
        return images, comparable(images["sha256"].to_list(), "sha256") if self.by == "sha256" else keys

    def example(self, unit: str) -> str | None:
        """What some image of a shard is joined by; ``None`` where none has it."""
        return next(iter(self._keys(unit)[1].drop_nulls()), None)


def _check_choices(config: ScoreConfig) -> None:
    """A manifest that was saved with its defaults chooses nothing by them."""
    fields = ScoreConfig.model_fields
    chosen = [name for name in fields if name in config.model_fields_set and name not in _WITH_LABELS]
    if strangers := [name for name in chosen if getattr(config, name) != fields[name].default]:
        options = ", ".join("--" + name.replace("_", "-") for name in strangers)
        raise UsageError(
            f"{options} and --labels do not go together: labels are taken as they are, and no caption is scored. Give "
            "each a run and a --name of its own."
        )


def _kinds_of_texts(series: pl.Series) -> set[str]:
    texts = series.drop_nulls()
    texts = texts.filter(texts.str.strip_chars() != "")
    numbers, booleans = texts.str.contains(_NUMBER), texts.str.contains(_BOOLEAN)
    found = {"number"} if numbers.any() else set()
    found |= {"boolean"} if booleans.any() else set()
    return found | ({"text"} if not (numbers | booleans).all() else set())


def _check_names(names: Sequence[str], part: Part) -> None:
    if not names:
        raise UserError(f"{part.label} has no labels: its columns only say which image a row is about.")
    wrong = next((name for name in names if not _NAME.fullmatch(name)), None)
    if wrong is not None:
        raise UserError(
            f"{part.label}: the column {wrong!r} cannot be the name of a score. Rename it with letters, digits and _, "
            "so that --where can name it."
        )
