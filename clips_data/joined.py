"""The joined table: what pairs, caption columns and scores say about the same images, shard by shard.

Rows are joined by key and checked by image sha256, never by their place in a file. A row that is missing on one side,
or that speaks of another image, ends the stage with its key named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data import duplicates, ledger, schema, tars
from clips_data.errors import UserError, did_you_mean
from clips_data.forgotten import refuse_unfinished

if TYPE_CHECKING:
    import polars as pl

WEB: Final = "web"
"""The caption column that comes from the download; all others are folders under ``captions/``."""

_PAIR_COLUMNS: Final = frozenset(("url", "caption", *schema.PAIR_COLUMNS))
_ADDED: Final = ("text.", "code.", "score.", "place.")
"""Prefixes of what ``Inputs.table`` adds to the columns of the pairs table."""


@dataclass(frozen=True)
class Inputs:
    """Finished folders that belong together: pairs, some caption columns, perhaps scores, for the same ``units``."""

    pairs: Path
    units: tuple[str, ...]
    folders: Mapping[str, Path]
    """``captions/<column>`` and ``scores/<name>`` to the folder it is in."""
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

    def table(self, unit: str) -> pl.DataFrame:
        """One row for each successful pair, in list order.

        The columns of the pairs table, then for each caption column ``text.<column>`` ("" where there is none) and
        ``code.<column>``, for scores ``score.<column>``, and the image's place ``place.offset``, ``place.bytes``,
        ``place.ext`` in the pairs tar. Raises ``UserError`` where the sides disagree.
        """
        import polars as pl

        table = self.pair_rows(unit).filter(pl.col("status") == schema.STATUS_SUCCESS)
        where = self.pairs / f"{unit}.parquet"
        _check_unique(table, where)
        web = _text(table, "caption").alias(f"text.{WEB}") if "caption" in table.columns else pl.lit("")
        table = table.with_columns(web.alias(f"text.{WEB}"), pl.lit("ok").alias(f"code.{WEB}"))
        for name, folder in self.folders.items():
            file = folder / f"{unit}.parquet"
            other = _scores(file) if name.startswith(schema.SCORES) else _captions(file, folder.name)
            table = _join(table, other, where, file)
        source = pl.coalesce("source_key", "key") if "source_key" in table.columns else pl.col("key")
        placed = table.with_columns(source.alias("place.key"))
        images = self._images(unit, ignore="source_key" in table.columns and table["source_key"].null_count() == 0)
        found = placed.join(images, on="place.key", how="left", maintain_order="left").pipe(_check_images, where)
        return found.filter(~pl.col("key").is_in(self.left_out[unit].implode())) if unit in self.left_out else found

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
    scores: str | None = None,
    units: tuple[str, ...] | None = None,
    pairs: Path | None = None,
    without_duplicates: bool = False,
) -> Inputs:
    """The folders under ``work`` that hold these columns and scores, once all of ``units`` are finished in them.

    ``units`` defaults to all finished shards of ``pairs`` (default ``work/pairs``). ``without_duplicates`` leaves out
    images that the download marked as repeating an earlier one. Raises ``UserError`` naming the
    folder and the command that makes it.
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
    if scores is not None:
        folder = work / schema.SCORES / scores
        _check_folder(folder, names, f"clips score --name {scores}", "--scores (none carries no scores)")
        folders[f"{schema.SCORES}/{scores}"] = folder
    for unit in names:
        _sidecar(pairs, unit)
    return Inputs(pairs, names, folders, duplicates.left_out(pairs, names) if without_duplicates else {})


def read_table(path: Path) -> pl.DataFrame:
    """A parquet file; a damaged one is a ``UserError``."""
    import polars as pl

    try:
        return pl.read_parquet(path, glob=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Cannot read {path}: {first}. Restore it, or delete its .done.json and make it again."
        ) from None


def extra_columns(table: pl.DataFrame) -> list[str]:
    """The columns that the user's list had beside URL and caption."""
    return [name for name in table.columns if name not in _PAIR_COLUMNS and not name.startswith(_ADDED)]


def read_images(pairs: Path, unit: str, table: pl.DataFrame) -> Iterator[bytes]:
    """The image bytes of the rows of ``table`` (made by ``Inputs.table``), one in memory at a time."""
    tar = pairs / f"{unit}.tar"
    with tars.open_tar(tar) as file:
        for key, sha256, offset, size in table.select("key", "sha256", "place.offset", "place.bytes").iter_rows():
            yield check_image(tars.read_at(file, tar, offset, size), tar, key, sha256)


def check_image(data: bytes, tar: Path, key: str, sha256: str) -> bytes:
    """``data``, once its hash is the one that the tables promise."""
    found = ledger.digest_bytes(data)
    if found != sha256:
        raise UserError(
            f"Image {key} in {tar} has sha256 {found}, but its table says {sha256}: the tar was changed after it was "
            "finished. Restore it, or download this shard again."
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


def _captions(file: Path, column: str) -> pl.DataFrame:
    import polars as pl

    table = read_table(file)
    good = pl.col("status") == schema.STATUS_SUCCESS
    return table.select(
        "key",
        "sha256",
        pl.when(good).then(_text(table, "caption")).otherwise(pl.lit("")).alias(f"text.{column}"),
        pl.col("code").alias(f"code.{column}"),
    )


def _scores(file: Path) -> pl.DataFrame:
    import polars as pl

    table = read_table(file)
    return table.select("key", "sha256", pl.exclude("key", "sha256").name.prefix("score."))


def _join(table: pl.DataFrame, other: pl.DataFrame, where: Path, file: Path) -> pl.DataFrame:
    import polars as pl

    _check_unique(other, file)
    _check_keys(table, other, where, file)
    _check_keys(other, table, file, where)
    joined = table.join(other, on="key", how="left", suffix=".other", maintain_order="left")
    wrong = joined.filter(pl.col("sha256") != pl.col("sha256.other"))
    if len(wrong):
        row: dict[str, Any] = wrong.row(0, named=True)
        raise UserError(
            f"{len(wrong)} of {len(joined)} rows of {file} are about other images than {where}: key {row['key']} has "
            f"image sha256 {row['sha256.other']} there and {row['sha256']} in the pairs. "
            f"Make {file.name} again from these pairs."
        )
    return joined.drop("sha256.other")


def _check_keys(table: pl.DataFrame, other: pl.DataFrame, where: Path, file: Path) -> None:
    missing = table.join(other, on="key", how="anti", maintain_order="left")
    if len(missing):
        raise UserError(
            f"{file} lacks {len(missing)} of {len(table)} keys that {where} has, the first is {missing['key'][0]}. "
            "Make the one that is wrong again."
        )


def _check_unique(table: pl.DataFrame, where: Path) -> None:
    twice = table.filter(table["key"].is_duplicated())
    if len(twice):
        raise UserError(f"{where} has key {twice['key'][0]} more than once. Make this shard again.")


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
