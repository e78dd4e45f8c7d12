"""The joined table: what pairs, caption columns and scores say about the same images, shard by shard.

Rows are joined by key and checked by image sha256, never by their place in a file. A row that is missing on one side,
or that speaks of another image, ends the stage with its key named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from clips_data import duplicates, ledger, measure, schema, tars
from clips_data.errors import UserError, did_you_mean
from clips_data.forgotten import refuse_unfinished
from clips_data.joining import check_unique, join

if TYPE_CHECKING:
    import polars as pl

WEB: Final = "web"
"""The caption column that comes from the download; all others are folders under ``captions/``."""
SCORE: Final = "score"
"""What expressions call the first of the scores, which have a name of their own too."""

_IDENTITY: Final = ("key", "sha256")
_TEXTS: Final = ("caption", "status", "code")
_PAIR_COLUMNS: Final = frozenset(("url", "caption", *schema.PAIR_COLUMNS))
_ADDED: Final = ("text.", "code.", "flags.", "score.", "place.")
"""Prefixes of what ``Inputs.table`` adds to the columns of the pairs table."""


@dataclass(frozen=True)
class Inputs:
    """Finished folders that belong together: pairs, some caption columns, perhaps scores, for the same ``units``."""

    pairs: Path
    units: tuple[str, ...]
    folders: Mapping[str, Path]
    """``captions/<column>`` and ``scores/<name>`` to the folder it is in, in the order in which they were asked for."""
    left_out: Mapping[str, pl.Series] = field(default_factory=dict)
    """Unit to the keys of its images that repeat an earlier one; ``table`` leaves these rows out."""

    def digests(self) -> dict[str, str]:
        """One digest a folder, of the contents of all its units: what the stages to the right compare on resume."""
        found = {}
        for name, folder in {schema.PAIRS: self.pairs, **self.folders}.items():
            found[name] = ledger.digest_json({unit: _sidecar(folder, unit).digest for unit in self.units})
        if self.left_out:
            keys = {unit: keys.to_list() for unit, keys in self.left_out.items()}
            found["left_out_duplicates"] = ledger.digest_json(keys)
        return found

    def unit_digests(self, unit: str) -> dict[str, str]:
        """The digest of ``unit`` in each folder."""
        folders = {schema.PAIRS: self.pairs, **self.folders}
        return {name: _sidecar(folder, unit).digest for name, folder in folders.items()}

    def pair_rows(self, unit: str) -> pl.DataFrame:
        """All rows of a pairs shard, also the failed ones."""
        return read_table(self.pairs / f"{unit}.parquet")

    def table(self, unit: str, *, images: bool = True) -> pl.DataFrame:
        """One row for each successful pair, in list order.

        The columns of the pairs table, then for each caption column ``text.<column>`` ("" where there is none) and
        ``code.<column>``, ``score.<field>`` for the first of the scores and ``score.<name>.<field>`` for further ones,
        and the image's place ``place.offset``, ``place.bytes``, ``place.ext`` in the pairs tar, unless ``images`` is
        false, which spares the reading of the tar. Raises ``UserError`` where the sides disagree.
        """
        import polars as pl

        where = self.pairs / f"{unit}.parquet"
        table = self._successful(unit)
        table = table.drop(name for name in table.columns if name.startswith(_ADDED))  # the list's own, as if ours
        web = _text(table, "caption") if "caption" in table.columns else pl.lit("")
        table = table.with_columns(web.alias(f"text.{WEB}"), pl.lit("ok").alias(f"code.{WEB}"))
        for column, folder in self._named(schema.CAPTIONS).items():
            file = folder / f"{unit}.parquet"
            table = join(table, _captions(file, column), where, file)
        for number, (name, folder) in enumerate(self._named(schema.SCORES).items()):
            file = folder / f"{unit}.parquet"
            prefix = f"{SCORE}.{name}." if number else f"{SCORE}."
            _check_same_fields(file, folder / f"{self.units[0]}.parquet")
            other = read_rows(file).select("key", "sha256", pl.exclude("key", "sha256").name.prefix(prefix))
            table = join(table, other, where, file)
        return self._without_duplicates(unit, self._placed(unit, table) if images else table)

    def view(self, unit: str, names: Collection[str] | None = None) -> pl.DataFrame:
        """What expressions see: the rows of ``table`` in the same order, with what belongs together in structs.

        ``key`` and ``sha256``; ``pairs`` with all columns of the pairs table; for each caption column a struct of that
        name with ``caption`` ("" where it is not usable), ``num_chars``, ``num_words`` and ``code``, and for those
        that were made also ``raw``, ``status``, ``finish_reason``, ``num_tokens``, ``flags`` and ``prompt_variant``;
        for each of the scores a struct of that name, the first also as ``score``, with ``<column>_near_duplicate_of``
        where that was told. ``names`` are the structs that are wanted, so that nothing else is read. Raises
        ``UserError`` where sides disagree or two would have one name.
        """
        import polars as pl

        wanted = set(self.view_names()) & set(self.view_names() if names is None else names)
        where = self.pairs / f"{unit}.parquet"
        pairs = self._successful(unit, None if wanted & {schema.PAIRS, WEB} else ["key", "sha256", "status"])
        view = pairs.select("key", "sha256")
        if schema.PAIRS in wanted:
            view = view.with_columns(pairs.select(pl.struct(pl.all()).alias(schema.PAIRS)).to_series())
        if WEB in wanted:
            text = _text(pairs, "caption") if "caption" in pairs.columns else pl.repeat("", len(pairs))
            code = pl.when(pl.col("caption") == "").then(pl.lit("empty")).otherwise(pl.lit("ok")).alias("code")
            web = pairs.select(text.alias("caption")).with_columns(*_lengths(), code)
            view = view.with_columns(web.to_struct(WEB))
        for column, folder in self._named(schema.CAPTIONS).items():
            if column in wanted:
                file = folder / f"{unit}.parquet"
                view = join(view, _caption_struct(file, column), where, file)
        for number, (name, folder) in enumerate(self._named(schema.SCORES).items()):
            called = {name, SCORE} & wanted if number == 0 else {name} & wanted
            if called:
                view = join(view, _score_structs(folder, unit, sorted(called)), where, folder / f"{unit}.parquet")
        return self._without_duplicates(unit, view)

    def view_names(self) -> list[str]:
        """The columns of ``view``. Raises ``UserError`` where two would have one name."""
        scores = list(self._named(schema.SCORES))
        columns = [WEB, *self._named(schema.CAPTIONS)]
        names = ["key", "sha256", schema.PAIRS, *columns, *([SCORE] if scores else []), *scores]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(
                f"In expressions, {twice[0]} would be both a caption column or scores of that name and something else. "
                f"Make them again under another name; taken are: {', '.join(dict.fromkeys(names))}."
            )
        return names

    def _named(self, kind: str) -> dict[str, Path]:
        """Name to folder of the caption columns or the scores."""
        prefix = f"{kind}/"
        return {name.removeprefix(prefix): path for name, path in self.folders.items() if name.startswith(prefix)}

    def _successful(self, unit: str, columns: list[str] | None = None) -> pl.DataFrame:
        import polars as pl

        rows = read_rows(self.pairs / f"{unit}.parquet", columns, also=("status",))
        table = rows.filter(pl.col("status") == schema.STATUS_SUCCESS)
        check_unique(table, self.pairs / f"{unit}.parquet")
        return table

    def _without_duplicates(self, unit: str, table: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

        return table.filter(~pl.col("key").is_in(self.left_out[unit].implode())) if unit in self.left_out else table

    def _placed(self, unit: str, table: pl.DataFrame) -> pl.DataFrame:
        import polars as pl

        source = pl.coalesce("source_key", "key") if "source_key" in table.columns else pl.col("key")
        placed = table.with_columns(source.alias("place.key"))
        images = self._images(unit, ignore="source_key" in table.columns and table["source_key"].null_count() == 0)
        found = placed.join(images, on="place.key", how="left", maintain_order="left")
        return _check_images(found, self.pairs / f"{unit}.parquet")

    def _images(self, unit: str, *, ignore: bool) -> pl.DataFrame:
        """Where the images lie in the tar. ``ignore`` passes over what else an adopted tar may hold."""
        import polars as pl

        path = self.pairs / f"{unit}.tar"
        known = (*schema.IMAGE_EXTENSIONS, *schema.ADOPTED_EXTENSIONS)
        members = [m for m in tars.read_members(path, extensions=None if ignore else tars.EXTENSIONS) if m.ext in known]
        return pl.DataFrame(
            [(member.key, member.ext, member.offset, member.size_bytes) for member in members],
            schema={"place.key": pl.String, "place.ext": pl.String, "place.offset": pl.Int64, "place.bytes": pl.Int64},
            orient="row",
        )


def open_inputs(
    work: Path,
    columns: tuple[str, ...],
    *,
    scores: tuple[str, ...] | str | None = (),
    units: tuple[str, ...] | None = None,
    pairs: Path | None = None,
    without_duplicates: bool = False,
) -> Inputs:
    """The folders under ``work`` that hold these columns and scores, once all of ``units`` are finished in them.

    ``units`` defaults to all finished shards of ``pairs`` (default ``work/pairs``). ``without_duplicates`` leaves out
    images that the download marked as repeating an earlier one. Raises ``UserError`` naming the folder and the
    command that makes it.
    """
    pairs = pairs or work / schema.PAIRS
    refuse_unfinished(pairs)
    names = units if units is not None else tuple(ledger.finished_units(pairs))
    if not names:
        raise UserError(f"{pairs} holds no finished shards. Run `clips download` first, or point --work at its folder.")
    folders = {}
    for column in columns:
        if column != WEB:
            folder = work / schema.CAPTIONS / column
            _check_folder(folder, names, f"clips recaption --column {column}", "--columns")
            folders[f"{schema.CAPTIONS}/{column}"] = folder
    for name in (scores,) if isinstance(scores, str) else scores or ():
        folder = work / schema.SCORES / name
        _check_folder(folder, names, f"clips score --name {name}", "--scores (none carries no scores)")
        folders[f"{schema.SCORES}/{name}"] = folder
    for unit in names:
        _sidecar(pairs, unit)
    return Inputs(pairs, names, folders, duplicates.left_out(pairs, names) if without_duplicates else {})


def read_table(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    """A parquet file, or some of its columns; a damaged one is a ``UserError``."""
    import polars as pl

    try:
        return pl.read_parquet(path, columns=columns, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Cannot read {path}: {first}. Restore it, or delete its .done.json and make it again."
        ) from None


def read_rows(path: Path, columns: list[str] | None = None, *, also: tuple[str, ...] = ()) -> pl.DataFrame:
    """``read_table`` of a table that says by key and sha256 what its rows are about, ``also`` having these columns."""
    import polars as pl

    table, advice = read_table(path, columns), "Restore it, or delete its .done.json and make it again."
    for name in (*_IDENTITY, *also):
        if name not in table.columns:
            raise UserError(f"{path} has no column {name!r}. {advice}")
    for name in (*_IDENTITY, *_TEXTS):
        if name in table.columns and table.schema[name] not in (pl.String, pl.Null):
            raise UserError(f"{path} has {table.schema[name]} instead of text in column {name!r}. {advice}")
    if table["key"].null_count():
        raise UserError(f"{path} row {table['key'].is_null().arg_max()} has no key. {advice}")
    return table


def _check_same_fields(path: Path, first: Path) -> None:
    """All shards of scores have the same fields, of the same types."""
    here, there = measure.columns_of(path), measure.columns_of(first)
    if here != there:
        name = next(name for name in {**there, **here} if here.get(name) != there.get(name))
        one, other = here.get(name, "nothing"), there.get(name, "nothing")
        raise UserError(
            f"{path} has {one} in column {name!r}, {first.name} has {other}. Make the scores again with --overwrite."
        )


def extra_columns(table: pl.DataFrame) -> list[str]:
    """The columns that the user's list had beside URL and caption."""
    return [name for name in table.columns if name not in _PAIR_COLUMNS and not name.startswith(_ADDED)]


def read_images(pairs: Path, unit: str, table: pl.DataFrame) -> Iterator[bytes]:
    """The image bytes of the rows of ``table`` (made by ``Inputs.table``), one in memory at a time."""
    tar = pairs / f"{unit}.tar"
    with tars.open_tar(tar) as file:
        for key, sha256, offset, size in table.select("key", "sha256", "place.offset", "place.bytes").iter_rows():
            yield check_image(tars.read_at(file, tar, offset, size), tar, key, sha256, offset)


def check_image(data: bytes, tar: Path, key: str, sha256: str, offset: int | None = None) -> bytes:
    """``data``, once its hash is the one that the tables promise; ``offset`` is where in the tar they begin."""
    found = ledger.digest_bytes(data)
    if found != sha256:
        place = "" if offset is None else f" (at byte {offset})"
        raise UserError(
            f"Image {key} in {tar} has sha256 {found}{place}, but its table says {sha256}: the tar was changed after "
            "it was finished. Restore it, or download this shard again."
        )
    return data


def _check_folder(folder: Path, units: tuple[str, ...], command: str, option: str) -> None:
    if not folder.is_dir():
        known = sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) if folder.parent.is_dir() else []
        hint = did_you_mean(folder.name, known) if known else f"{folder.parent.name}/ is empty."
        raise UserError(f"There is no {folder}. {hint} Run `{command}` first, or change {option}.")
    missing = [unit for unit in units if ledger.read_sidecar(folder, unit) is None]
    if missing:
        some = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(units)} shards that pairs has ({some}). "
            f"Run `{command}` to finish it."
        )


def _sidecar(folder: Path, unit: str) -> ledger.Sidecar:
    sidecar = ledger.read_sidecar(folder, unit)
    if sidecar is None:
        raise UserError(f"Shard {unit} of {folder} is not finished. Run the command that makes it again.")
    return sidecar


def _text(table: pl.DataFrame, column: str) -> pl.Expr:
    """The column without blanks around it, "" for null."""
    import polars as pl

    return pl.col(column).cast(pl.String).fill_null("").str.strip_chars()


def _lengths() -> tuple[pl.Expr, pl.Expr]:
    import polars as pl

    text = pl.col("caption")
    return text.str.len_chars().alias("num_chars"), text.str.count_matches(r"\S+").alias("num_words")


def _usable(table: pl.DataFrame) -> pl.Expr:
    """The caption of rows that have a usable one, else ""."""
    import polars as pl

    return pl.when(pl.col("status") == schema.STATUS_SUCCESS).then(_text(table, "caption")).otherwise(pl.lit(""))


def _captions(file: Path, column: str) -> pl.DataFrame:
    import polars as pl

    table = read_rows(file, ["key", "sha256", "caption", "status", "code", "flags"])
    return table.select(
        "key",
        "sha256",
        _usable(table).alias(f"text.{column}"),
        pl.col("code").alias(f"code.{column}"),
        pl.col("flags").cast(pl.List(pl.String)).alias(f"flags.{column}"),
    )


def _caption_struct(file: Path, column: str) -> pl.DataFrame:
    import polars as pl

    table = read_rows(file)
    text = dict.fromkeys(("raw", "code", "status", "finish_reason", "prompt_variant"), pl.String())
    kinds: dict[str, pl.DataType] = {**text, "num_tokens": pl.Int32(), "flags": pl.List(pl.String)}
    made = [
        pl.col(name).cast(kind) if name in table.columns else pl.lit(None, kind).alias(name)
        for name, kind in kinds.items()
    ]
    fields = table.select(_usable(table).alias("caption"), *made).with_columns(*_lengths())
    return table.select("key", "sha256").with_columns(fields.to_struct(column))


def _score_structs(folder: Path, unit: str, names: list[str]) -> pl.DataFrame:
    """The scores, and which captions nearly repeat others where that was told, once under each name."""
    from clips_data import near_duplicates  # which reads joined tables itself

    table = read_rows(folder / f"{unit}.parquet")
    near = near_duplicates.read(folder, unit)
    if near is not None:
        table = table.join(near, on="key", how="left", maintain_order="left")
    fields = table.drop("key", "sha256")
    return table.select("key", "sha256").with_columns(fields.to_struct(name) for name in names)


def _check_images(table: pl.DataFrame, where: Path) -> pl.DataFrame:
    import polars as pl

    ours = pl.col("source_key").is_null() if "source_key" in table.columns else pl.lit(True)
    wrong = table.filter(pl.col("place.ext").is_null() | (ours & (pl.col("place.ext") != pl.col("image_ext"))))
    if len(wrong):
        raise UserError(
            f"The tar beside {where} has no {wrong['image_ext'][0]} image for key {wrong['key'][0]} ({len(wrong)} of "
            f"{len(table)} rows). Restore it, or download this shard again."
        )
    return table
