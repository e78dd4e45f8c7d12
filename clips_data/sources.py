"""Where URL lists come from: the user's table, or the demo world's own. Cut into shards by img2dataset's Reader.

Whatever a list was before, it is parquet here: short plain parquet files of this machine are taken where they lie, all
else is streamed into parquet parts in a scratch folder. The columns beside URL and caption are carried through; one
whose name clips needs for itself (``sha256``, ``key``, ``width``, …) is carried as ``list_<name>``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from clips_data import adapters, files, schema, tables
from clips_data.adapters import Adapter
from clips_data.config import DownloadConfig
from clips_data.errors import UserError, did_you_mean
from clips_data.files import Budget, Part
from clips_data.parts import PartWriter, rows_of_a_part
from clips_data.redact import redact
from clips_data.tables import Dialect

if TYPE_CHECKING:
    import pyarrow as pa

RESERVED: Final = frozenset(("url", "caption", *schema.PAIR_COLUMNS))
CARRIED_PREFIX: Final = "list_"


@dataclass(frozen=True)
class ListShard:
    """One shard of the list: its rows wait in an Arrow file; ``digest`` identifies their content."""

    number: int
    arrow_file: Path
    num_rows: int
    digest: str


@dataclass(frozen=True)
class UrlList:
    """A list as parquet on disk (a file, or a folder of files), with the column names that img2dataset's Reader needs.

    ``hash_column``, ``id_column`` and ``captions`` (name of a caption column → column that carries it) are among the
    ``extra_columns``. ``notes`` say to people how the list was read.
    """

    path: Path
    format: str
    url_column: str
    caption_column: str | None
    extra_columns: tuple[str, ...]
    hash_column: str | None = None
    id_column: str | None = None
    captions: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Roles:
    """Which column of a list is what, by the list's own names."""

    url: str
    caption: str | None
    hash: str | None
    adapter: Adapter | None

    def stored(self, name: str) -> str:
        """What the column is called from here on."""
        if name == self.url:
            return "url"
        if name == self.caption:
            return "caption"
        return CARRIED_PREFIX + name if name in RESERVED else name


def locate(config: DownloadConfig, scratch: Path) -> UrlList:
    """Finds the list, checks its columns, and brings it into parquet, in ``scratch`` where it is not so already.

    Raises ``UserError``, with the file and the line where that is known, for a list that is damaged, empty, too large
    or without a column that is asked for.
    """
    if config.source == "demo":
        return _write_demo_list(config, scratch / "demo.parquet")
    chosen = adapters.named(config.adapter)
    if chosen is not None:
        adapters.check_is_list(chosen, redact(config.source))
    scratch.mkdir(parents=True, exist_ok=True)
    budget = Budget(config.max_list_bytes)
    parts = files.find(config.source, scratch, budget)
    dialect, chosen = _dialect(config, parts[0], chosen, scratch, budget)
    names = tables.column_names(parts[0], scratch, budget, dialect)
    if not names:
        raise UserError(f"{parts[0].label} is empty. A URL list has a column with URLs.")
    roles = _roles(config, parts[0], names, chosen)
    part_rows = rows_of_a_part(config.shard_rows)
    if path := _in_place(parts, roles, part_rows, budget):
        return _url_list(roles, names, path, roles.url, roles.caption)
    folder = scratch / "parts"
    stored = _write_parts(tables.stream(parts, scratch, budget, dialect), parts, roles, folder, part_rows)
    return _url_list(roles, stored, folder, "url", "caption" if roles.caption else None)


def _write_demo_list(config: DownloadConfig, path: Path) -> UrlList:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clips_data.demo import web

    rows = web.demo_rows(config.num_pairs, config.world)
    caption = "caption"
    if config.caption_column == "description":
        rows, caption = [row | {"description": web.description(row)} for row in rows], "description"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return UrlList(path, "parquet", "url", caption, ("scene", "captions"))


def _dialect(
    config: DownloadConfig, part: Part, chosen: Adapter | None, scratch: Path, budget: Budget
) -> tuple[Dialect, Adapter | None]:
    """How a csv or tsv is written, and the adapter, where that is told by a file without a header."""
    if part.format not in ("csv", "tsv"):
        return Dialect(), chosen
    first = tables.first_fields(part, budget)
    if config.adapter == adapters.AUTO and part.format == "tsv":
        found = adapters.recognise_headerless(first)
        return (Dialect(found.headerless, quotes=False), found) if found else (Dialect(), None)
    if chosen is not None and chosen.headerless:
        has_header = set(first) == set(chosen.headerless)
        return Dialect(None if has_header else chosen.headerless, quotes=False), chosen
    return Dialect(), chosen


def _roles(config: DownloadConfig, part: Part, names: Sequence[str], chosen: Adapter | None) -> _Roles:
    adapter = chosen or (adapters.recognise(names) if config.adapter == adapters.AUTO else None)
    if adapter is not None:
        adapters.check_is_list(adapter, part.label)
    if part.format == "tar":
        raise UserError(f"{part.label} is no URL list but a tar of samples. `clips adopt` takes those as they are.")

    def first(known: tuple[str, ...], default: str) -> str:
        return next((name for name in known if name in names), known[0] if known else default)

    url = config.url_column
    if url == "auto":
        url = first(adapter.url, "url") if adapter else "url"
    caption = config.caption_column
    if caption == "auto" and part.format == "txt":
        caption = None
    elif caption == "auto":
        caption = "caption" if adapter is None else first(adapter.caption, "caption") if adapter.caption else None
    wanted = (("--url-column", url), ("--caption-column", caption), ("--verify-hash", config.verify_hash))
    for option, column in wanted:
        if column is not None and column not in names:
            raise UserError(
                f"{part.label} has no column {column!r}. {did_you_mean(column, names)} Set it with {option}"
                f"{' (none for a list without captions)' if column == caption else ''}.{_looks_headerless(names)}"
            )
    if url == caption:
        raise UserError(f"--url-column and --caption-column both name {url!r}. They are two columns.")
    return _Roles(url, caption, config.verify_hash, adapter)


def _looks_headerless(names: Sequence[str]) -> str:
    if not any("://" in name for name in names):
        return ""
    return " The first line looks like data: add a line with column names, or name the set with --adapter."


def _url_list(roles: _Roles, names: Sequence[str], path: Path, url: str, caption: str | None) -> UrlList:
    """``names`` are those of the files at ``path``."""
    adapter, extra = roles.adapter, tuple(name for name in names if name not in (url, caption))

    def carried(name: str | None) -> str | None:
        stored = None if name is None else roles.stored(name)
        return stored if stored in names else None

    captions = {}
    for column, source in (adapter.captions if adapter else {}).items():
        if (stored := carried(source)) is not None:
            captions[column] = stored
    notes = [f"The list is read as one of the set {adapter.name}."] if adapter else []
    if renamed := [name for name in extra if name.removeprefix(CARRIED_PREFIX) in RESERVED]:
        notes.append(f"Columns with names that clips needs itself are carried as {', '.join(renamed)}.")
    return UrlList(
        path,
        "parquet",
        url,
        caption,
        extra,
        hash_column=carried(roles.hash),
        id_column=carried(adapter.id) if adapter else None,
        captions=captions,
        adapter=adapter.name if adapter else None,
        notes=tuple(notes),
    )


def _in_place(parts: Sequence[Part], roles: _Roles, part_rows: int, budget: Budget) -> Path | None:
    """Where the list lies, if img2dataset's Reader can take it from there as it is; ``None`` if not."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if any(part.local is None or part.format != "parquet" or part.compression or part.partition for part in parts):
        return None
    paths = [Path(part.path) for part in parts]
    folder = paths[0].parent
    if len(paths) > 1 and set(paths) != set(folder.glob("*.parquet")):
        return None
    schemas, rows = [], 0
    for part in parts:
        with files.readable(part):
            about = pq.read_metadata(part.path)
            schemas.append(pq.read_schema(part.path).remove_metadata())
        budget.spend(sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups)), part.label)
        rows += about.num_rows
        if about.num_rows > part_rows:
            budget.spent = 0
            return None
    budget.spent = 0
    texts = [schemas[0].field(name).type for name in (roles.url, roles.caption) if name is not None]
    plain = all(kind in (pa.string(), pa.large_string()) for kind in texts)
    if not plain or any(roles.stored(name) not in (name, "url", "caption") for name in schemas[0].names):
        return None
    if rows == 0:
        raise UserError(f"{parts[0].label if len(parts) == 1 else folder} holds no rows. A URL list has one row a URL.")
    if any(other != schemas[0] for other in schemas):
        return None
    return paths[0] if len(paths) == 1 else folder


def _write_parts(
    stream: Iterator[pa.Table], parts: Sequence[Part], roles: _Roles, folder: Path, part_rows: int
) -> list[str]:
    """Streams a list into parquet files of ``part_rows`` rows with one schema. Returns the names of its columns."""
    import pyarrow as pa

    folder.mkdir()
    writer = PartWriter(folder, part_rows, parts[0].label)
    for table in stream:
        names = [roles.stored(name) for name in table.column_names]
        writer.add(table.rename_columns(names))
    writer.close()
    if not writer.num_files:
        raise UserError(f"{parts[0].label} holds no rows. A URL list has one row a URL.")
    return list(pa.schema(writer.schema).names)


class _AllBut:
    """Shard numbers that img2dataset's Reader is to take for done."""

    def __init__(self, wanted: Container[int]) -> None:
        self.wanted = wanted

    def __contains__(self, number: int) -> bool:
        return number not in self.wanted


def cut(
    url_list: UrlList,
    shard_rows: int,
    scratch: Path,
    *,
    first_shard: int = 0,
    wanted: Container[int] | None = None,
) -> list[ListShard]:
    """Cuts the list into shards of ``shard_rows`` with img2dataset's Reader. Runs in a worker that has it imported.

    The shards are numbered from ``first_shard``; of those not in ``wanted``, nothing is read, written or returned. A
    caption that is null becomes "".
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clips_data import engine

    paths = sorted(url_list.path.glob("*.parquet")) if url_list.path.is_dir() else [url_list.path]
    everything = range(first_shard, first_shard + (1 << 40))
    chosen = everything if wanted is None else wanted
    shards = []
    with talk_to_log(scratch.parent):
        for path in paths:
            numbers = range(first_shard, first_shard - -pq.read_metadata(path).num_rows // shard_rows)
            first_shard = numbers.stop
            if not any(number in chosen for number in numbers):
                continue
            reader = engine.reader()(
                str(path), url_list.format, url_list.url_column, url_list.caption_column, None, None,
                list(url_list.extra_columns) or None, shard_rows, _AllBut(chosen), str(scratch), numbers.start,
            )  # fmt: skip
            try:
                shards += [_list_shard(number, Path(file)) for number, file in reader]
            except pa.ArrowException as error:
                raise UserError(f"{path} cannot be read: {error}. Check that the file is complete.") from None
    return shards


def _list_shard(number: int, file: Path) -> ListShard:
    import pyarrow as pa
    import pyarrow.compute as pc

    with pa.memory_map(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
        place = table.schema.get_field_index("caption")
        if place >= 0 and table["caption"].null_count:
            table = table.set_column(place, "caption", pc.fill_null(table["caption"], ""))
            filled = file.with_suffix(".filled")
            with pa.ipc.new_file(str(filled), table.schema) as writer:
                writer.write_table(table)
            filled.replace(file)
        return ListShard(number, file, table.num_rows, tables.content_digest(table))


@contextlib.contextmanager
def talk_to_log(folder: Path) -> Iterator[None]:
    """img2dataset prints to stdout, which is for data here; what it says is kept in a log."""
    (folder / "log").mkdir(exist_ok=True)
    with (folder / "log" / "img2dataset.log").open("a") as log, contextlib.redirect_stdout(log):
        yield


def column_names(url_list: UrlList) -> list[str]:
    """The columns of a cut shard, in the order that img2dataset's Reader gives them."""
    caption = ["caption"] if url_list.caption_column is not None else []
    return [*url_list.extra_columns, *caption, "url"]
