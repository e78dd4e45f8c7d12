"""Webdataset tars: reading members with their offsets, and writing the same bytes from the same members.

The reader walks the headers, extracts nothing to disk, and refuses everything that a shard has no business holding:
links, folders, names that leave the folder, duplicate members, unknown extensions, damage. Offsets are those of a
member's data in the file, so that any reader can fetch one member with one seek.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

from clips_data.errors import UserError
from clips_data.schema import IMAGE_EXTENSIONS

BLOCK_BYTES = tarfile.BLOCKSIZE
EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")
MAX_NAME_CHARS = 100
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
}
# Extended headers that only describe the file; any other could rename, resize or link the member that follows.
_HARMLESS_PAX = frozenset({"mtime", "atime", "ctime", "uid", "gid", "uname", "gname"})
_MAX_PAX_BYTES = 1 << 16

_MEMBER_NAME = re.compile(r"[!-\-0-\[\]-~]+\.[!-\-0-\[\]-~]+")  # not the dot, not the slashes
MAX_MEMBER_BYTES = 8**11 - 1
"""Eleven octal digits."""
_WRITE_BYTES = 1 << 20
_ZEROS = bytes(BLOCK_BYTES)
# The parts of a header that are the same for every member, and the sum of their bytes, with blanks for the checksum.
_MODE_AND_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_TYPE_AND_REST = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK_BYTES - 156, b"\0")
_CONSTANT_SUM = sum(_MODE_AND_OWNER) + sum(_TIME) + sum(_TYPE_AND_REST) + 8 * ord(" ")


@dataclass(frozen=True)
class Member:
    """One file of a tar. ``offset`` is where its data begin."""

    name: str
    key: str
    ext: str
    offset: int
    size_bytes: int


@dataclass
class Sample:
    """The members of a tar that share a key, by extension."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)

    @property
    def image_ext(self) -> str | None:
        """The extension of the sample's image, ``None`` when it has none."""
        return next((ext for ext in IMAGE_EXTENSIONS if ext in self.members), None)


class TarWriter:
    """Writes a USTAR archive whose bytes depend on names and data only: no clock, no user, one mode.

    Bytes reach ``file`` in large pieces, the last of them in ``close``.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = 0
        self._waiting: list[bytes] = []
        self._written = 0

    def add(self, name: str, data: bytes) -> int:
        """Appends a member and returns the offset of its data. Raises as ``header`` does."""
        size_bytes = len(data)
        offset = self._position + BLOCK_BYTES
        self._position = offset + size_bytes + -size_bytes % BLOCK_BYTES
        self._waiting += (header(name, size_bytes), data, _ZEROS[: -size_bytes % BLOCK_BYTES])
        if self._position - self._written >= _WRITE_BYTES:
            self._write()
        return offset

    def close(self) -> None:
        """Writes the end of the archive. The file stays open: it is its opener's to flush and close."""
        end = self._position + 2 * BLOCK_BYTES
        self._waiting.append(bytes(end + -end % tarfile.RECORDSIZE - self._position))
        self._write()

    def _write(self) -> None:
        self._file.write(b"".join(self._waiting))
        self._waiting.clear()
        self._written = self._position


def header(name: str, size_bytes: int) -> bytes:
    """The block before a member's data, byte for byte what ``tarfile`` makes for mode 0644 and no owner or time.

    Raises ``UserError`` for a member that USTAR or webdataset cannot hold: a name that is not ``KEY.EXTENSION`` in at
    most 100 visible ASCII characters, or 8 GiB and more.
    """
    if len(name) > MAX_NAME_CHARS or not _MEMBER_NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot be the name of a member: it has to be KEY.EXTENSION, at most {MAX_NAME_CHARS} visible "
            "ASCII characters, with one dot and no slashes. Change the key."
        )
    if size_bytes > MAX_MEMBER_BYTES:
        raise UserError(f"{name} has {size_bytes} bytes and a tar's member at most {MAX_MEMBER_BYTES}. Leave it out.")
    raw_name, size = name.encode("ascii"), b"%011o\0" % size_bytes
    checksum = b"%06o\0 " % (_CONSTANT_SUM + sum(raw_name) + sum(size))
    return b"".join((raw_name.ljust(MAX_NAME_CHARS, b"\0"), _MODE_AND_OWNER, size, _TIME, checksum, _TYPE_AND_REST))


def read_members(path: Path, *, extensions: Iterable[str] | None = EXTENSIONS) -> Iterator[Member]:
    """The members of a tar in order, from its headers alone.

    Raises ``UserError`` with file and byte offset for a truncated or damaged tar and for members other than plain
    files called ``<key>.<ext>`` with one of ``extensions`` (``None`` for any), each name once.
    """
    with open_tar(path) as file:
        yield from _members(file, path, None if extensions is None else frozenset(extensions))


def read_samples(path: Path, *, extensions: Iterable[str] = EXTENSIONS) -> Iterator[Sample]:
    """The samples of a tar in order, one in memory at a time. Raises as ``read_members`` does.

    The members of a key must follow one another; a key that comes back later is refused.
    """
    finished: set[str] = set()
    sample: Sample | None = None
    with open_tar(path) as file:
        for member in _members(file, path, frozenset(extensions)):
            if sample is None or sample.key != member.key:
                if sample is not None:
                    finished.add(sample.key)
                    yield sample
                if member.key in finished:
                    _refuse(path, member.offset - BLOCK_BYTES, f"key {member.key!r} comes back after other keys")
                sample = Sample(member.key)
            sample.members[member.ext] = read_at(file, path, member.offset, member.size_bytes)
            sample.offsets[member.ext] = member.offset
    if sample is not None:
        yield sample


def read_at(file: BinaryIO, path: Path, offset: int, size_bytes: int) -> bytes:
    """``size_bytes`` bytes from ``offset``; ``path`` is for the ``UserError`` of a file that ends before."""
    data = os.pread(file.fileno(), size_bytes, offset)
    if len(data) != size_bytes:
        _refuse(path, offset, f"{size_bytes} bytes are expected and the file ends after {len(data)}")
    return data


def open_tar(path: Path) -> BinaryIO:
    """Opens a tar for reading; a missing or unreadable one is a ``UserError``."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}. Restore the file or make its shard again.") from None


def _members(file: BinaryIO, path: Path, extensions: frozenset[str] | None) -> Iterator[Member]:
    file_bytes = os.fstat(file.fileno()).st_size
    names: set[str] = set()
    position = 0
    while True:
        header = read_at(file, path, position, BLOCK_BYTES)
        if not any(header):
            return _check_end(file, path, position)
        kind, raw_name, size_bytes = _parse_header(header, path, position)
        offset = position + BLOCK_BYTES
        end = offset + size_bytes
        if end > file_bytes:
            _refuse(
                path,
                position,
                f"a member of {size_bytes} bytes begins here and the file ends {end - file_bytes} before",
            )
        if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            _check_pax(file, path, position, size_bytes)
        elif kind not in _REGULAR:
            _refuse(path, position, f"{raw_name!r} is {_KINDS.get(kind, f'of tar type {kind!r}')}, not a plain file")
        else:
            key, ext = _split_name(raw_name, path, position, extensions)
            name = f"{key}.{ext}"
            if name in names:
                _refuse(path, position, f"member {name!r} is there twice")
            names.add(name)
            yield Member(name, key, ext, offset, size_bytes)
        position = end + -end % BLOCK_BYTES


def _parse_header(header: bytes, path: Path, position: int) -> tuple[bytes, bytes, int]:
    """Type, name and size in bytes of a member, once the header's checksum is right."""
    try:
        stored_sum = int(header[148:156].strip(b"\0 "), 8)
        size_bytes = int(header[124:136].strip(b"\0 ") or b"0", 8)
    except ValueError:
        _refuse(path, position, "no tar header is here")
    if stored_sum != sum(header[:148]) + sum(header[156:]) + 8 * ord(" "):
        _refuse(path, position, "the tar header's checksum is wrong")
    if size_bytes < 0:
        _refuse(path, position, "the tar header has a negative size")
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""
    return header[156:157], prefix + b"/" + name if prefix else name, size_bytes


def _split_name(raw: bytes, path: Path, position: int, extensions: frozenset[str] | None) -> tuple[str, str]:
    if b"\0" in raw:
        _refuse(path, position, f"member name {raw!r} holds a NUL character")
    try:
        name = raw.decode()
    except UnicodeDecodeError:
        _refuse(path, position, f"member name {raw!r} is not UTF-8")
    if "/" in name or "\\" in name or name.startswith(".."):
        _refuse(path, position, f"member name {name!r} points into another folder")
    key, dot, ext = name.partition(".")
    if not key or not dot:
        _refuse(path, position, f"member name {name!r} is not of the form KEY.EXTENSION")
    if "." in ext:
        _refuse(path, position, f"member name {name!r} has a key with a dot, which webdataset would cut there")
    if extensions is not None and ext not in extensions:
        _refuse(path, position, f"member {name!r} has an unknown extension (known: {', '.join(sorted(extensions))})")
    return key, ext


def _check_pax(file: BinaryIO, path: Path, position: int, size_bytes: int) -> None:
    """Lets through what webdataset's own writer adds (fractions of a second in mtime) and nothing else."""
    if size_bytes > _MAX_PAX_BYTES:
        _refuse(path, position, f"an extended header of {size_bytes} bytes is here")
    rest = read_at(file, path, position + BLOCK_BYTES, size_bytes)
    while rest:
        length, _, _ = rest.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(rest):
            _refuse(path, position, "a damaged extended header is here")
        word = rest[len(length) + 1 : int(length)].partition(b"=")[0].decode(errors="replace")
        if word not in _HARMLESS_PAX:
            _refuse(path, position, f"an extended header sets {word!r}")
        rest = rest[int(length) :]


def _check_end(file: BinaryIO, path: Path, position: int) -> None:
    """Two zero blocks end a tar; what follows them is zero too, or another tar was appended and would be lost."""
    read_at(file, path, position, 2 * BLOCK_BYTES)
    file.seek(position)
    while block := file.read(1 << 20):
        if any(block):
            _refuse(path, position, "the archive ends here, but more data follow")


def _refuse(path: Path, offset: int, reason: str) -> NoReturn:
    raise UserError(f"{path} is not a usable shard: at byte {offset} {reason}. Restore the file or make it again.")
