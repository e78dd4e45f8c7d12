"""Where a finished file that is not the promised one is damaged: the first byte, member or row that tells.

A hash says only that something changed. But headers and padding of our tars follow from names and data alone, images
have a sha256 in the table beside them, captions and fields are there twice, so the place can nearly always be named.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from clips_data import agreement, ledger, tars
from clips_data.errors import UserError

_MAGIC: Final = b"PAR1"


def place(file: Path) -> str | None:
    """The first damaged place of a tar or parquet file in words; ``None`` for other files and missing ones."""
    if not file.is_file():
        return None
    if file.suffix == ".tar":
        return in_tar(file)
    return in_parquet(file) if file.suffix == ".parquet" else None


# --- tars -------------------------------------------------------------------------------------------------------------


def in_tar(tar: Path) -> str:
    """The first member of a tar that is damaged, or that is not what the table or index beside it says.

    Tars of others, to which ``pairs/`` has links, have headers of their own; of these only the members are compared.
    """
    rows, ours, end = _rows_beside(tar), not tar.is_symlink(), 0
    keys: dict[str, None] = {}
    try:
        with tars.open_tar(tar) as file:
            for member in tars.read_members(tar, extensions=None):
                block = member.offset - tars.BLOCK_BYTES
                if ours and (at := _unlike_ours(file, member, end)) is not None:
                    return f"at byte {at} the tar header or the padding before {member.name!r} (byte {block}) changed"
                if member.key in keys and member.key != next(reversed(keys)):
                    return f"at byte {block} key {member.key!r} comes back after other keys"
                keys[member.key] = None
                data = tars.read_at(file, tar, member.offset, member.size_bytes)
                if reason := _unlike_its_row(member, data, rows):
                    return f"member {member.name!r}, whose data begin at byte {member.offset}, {reason}"
                end = member.offset + member.size_bytes
    except UserError as error:
        return _without_path(error)
    if absent := [key for key, row in rows.items() if row.get("sha256") is not None and key not in keys]:
        return f"at byte {end} its members end without those of key {absent[0]!r}"
    wanted = end + 2 * tars.BLOCK_BYTES
    wanted += -wanted % tarfile.RECORDSIZE
    if ours and tar.stat().st_size != wanted:
        return f"at byte {min(tar.stat().st_size, wanted)} its end was changed: {wanted} bytes hold its members"
    rest = "the text of a member" if ours else "a header or a text"
    return f"its images are as {_beside(tar).name} says, so the change is in {rest}"


def _unlike_ours(file: BinaryIO, member: tars.Member, end: int) -> int | None:
    """The first byte between ``end`` and the member's data that our writer would have written otherwise."""
    file.seek(end)
    found = file.read(member.offset - end)
    wanted = bytes(-end % tars.BLOCK_BYTES) + tars.header(member.name, member.size_bytes)
    return next((end + i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)


def _beside(tar: Path) -> Path:
    """The offset index of a tar of training shards, the table of a tar of pairs."""
    index = tar.with_name(tar.name.removesuffix(".tar") + agreement.INDEX)
    return index if index.exists() else tar.with_suffix(".parquet")


def _rows_beside(tar: Path) -> dict[str, dict[str, Any]]:
    """The rows of the table beside the tar by the key that the tar has; none where that cannot be read either."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(_beside(tar)) as file:
            rows = file.read().to_pylist()
    except (OSError, ValueError, pa.ArrowException):
        return {}
    return {str(row.get("source_key") or row.get("key")): row for row in rows}


def _unlike_its_row(member: tars.Member, data: bytes, rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """How a member contradicts its row; ``None`` also where the row says nothing of it."""
    row, ext = rows.get(member.key), member.ext
    if row is None:
        return f"has key {member.key!r}, which no row has" if rows else None
    kind = "image" if ext in agreement.IMAGES else ext
    wanted = row.get(f"{kind}_offset", member.offset), row.get(f"{kind}_bytes", member.size_bytes)
    if wanted != (member.offset, member.size_bytes):
        return f"has {member.size_bytes} bytes there instead of {wanted[1]} at byte {wanted[0]}"
    if kind == "image" and row.get("sha256") is not None:
        same = ledger.digest_bytes(data) == row["sha256"]
        return None if same else "is an image with another sha256 than its row has"
    if row.get("source_key") is not None:  # its texts are somebody else's
        return None
    if ext == "json":
        return _unlike_its_fields(data, row)
    if ext == "txt" and "status" in row:
        return None if data == (row.get("caption") or "").encode() else "is not the caption that its row has"
    return None


def _unlike_its_fields(data: bytes, row: Mapping[str, Any]) -> str | None:
    about = agreement.parse(data)
    if isinstance(about, str):
        return about
    for name, value in {"key": None, **about}.items():
        if name in row and value != row[name] and value != str(row[name]):
            return f"has another {name!r} than its row"
    return None


def _without_path(error: UserError) -> str:
    """``at byte N …``: the file is named by whoever asked."""
    reason = str(error).partition(" is not a usable shard: ")[2].partition(". Restore")[0]
    return reason or str(error)


# --- tables -----------------------------------------------------------------------------------------------------------


def in_parquet(path: Path) -> str:
    """The first row group and column of a table that cannot be read, or that all of them can."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    damage = (OSError, ValueError, MemoryError, pa.ArrowException)
    with path.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            return "at byte 0 it does not begin as parquet does"
    try:
        with pq.ParquetFile(path) as file:
            groups, first_row = file.metadata.num_row_groups, 0
            for group in range(groups):
                num_rows = file.metadata.row_group(group).num_rows
                for column in file.schema_arrow.names:
                    try:
                        file.read_row_group(group, columns=[column]).validate(full=True)
                    except damage as error:
                        rows = f"rows {first_row} to {first_row + num_rows - 1}"
                        return f"row group {group} of {groups} ({rows}) has a damaged column {column!r}: {_line(error)}"
                first_row += num_rows
    except damage as error:
        return f"its footer cannot be read: {_line(error)}"
    return f"all of its {groups} row groups ({first_row} rows) can be read, so a value in them changed"


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
