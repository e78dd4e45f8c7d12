"""The files of a table: where they lie, how they are opened, and what is said when one is damaged.

One file, a folder, a glob, a remote address or stdin; plain, gzip or zstd. What is decompressed is counted against a
budget, so a compression bomb ends with a sentence instead of a full disk.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final
from urllib.parse import unquote, urlsplit

from clips_data.errors import ClipsError, UserError
from clips_data.redact import redact

FORMATS: Final = {
    "parquet": "parquet", "csv": "csv", "tsv": "tsv", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl",
    "txt": "txt", "tar": "tar",
}  # fmt: skip
COMPRESSIONS: Final = {"gz": "gz", "gzip": "gz", "zst": "zst", "zstd": "zst"}
MAX_LINE_BYTES: Final = 1 << 24
_ZSTD_INPUT_BYTES: Final = 1024
"""A block of zstd takes at least four bytes and holds at most 128 KiB, so a step decompresses to 32 MiB at most."""
_MAGIC: Final = re.compile(r"[*?\[]")
_PACKAGES: Final = {
    "s3": "the s3 extra (pip install 'clips[s3]')", "s3a": "the s3 extra (pip install 'clips[s3]')",
    "gs": "gcsfs (pip install gcsfs)", "gcs": "gcsfs (pip install gcsfs)",
    "az": "adlfs (pip install adlfs)", "abfs": "adlfs (pip install adlfs)",
    "http": "aiohttp (pip install aiohttp)", "https": "aiohttp (pip install aiohttp)",
    "hf": "huggingface_hub (pip install huggingface_hub)",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One file of a table. ``label`` names it in messages; ``partition`` are the key=value folders it lies in."""

    filesystem: Any
    path: str
    label: str
    format: str
    compression: str = ""
    partition: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def local(self) -> Path | None:
        """Where the file lies on this machine; ``None`` for a remote one."""
        return Path(self.path) if is_local(self.filesystem) else None


@dataclass
class Budget:
    """Bytes that may still be decompressed. ``advice`` says what to do where that is too little."""

    max_bytes: int
    advice: str = "Raise it with --max-list-bytes if the list is meant to be that large."
    spent: int = 0

    def spend(self, num_bytes: int, label: str) -> None:
        self.spent += num_bytes
        if self.spent > self.max_bytes:
            raise UserError(
                f"{label} holds more than {self.max_bytes} bytes after decompression, which is the limit that guards "
                f"against compression bombs. {self.advice}"
            )


def find(source: str, scratch: Path, budget: Budget, *, what: str = "URL list") -> list[Part]:
    """The files of a table, in order: one file, a folder (also of key=value folders), a glob, an fsspec URL, ``-``.

    Names that begin with a dot or an underscore and files of unknown suffixes are passed over in folders. What stdin
    holds is told by its content; it is first copied into ``scratch``.
    """
    if source == "-":
        return [_from_stdin(scratch, budget)]
    filesystem, root = _open_filesystem(source)
    remote = not is_local(filesystem)
    label = redact(source) if remote else root
    files, base = _list_files(filesystem, root, label, what)
    if files == [root]:
        return [_part(filesystem, root, label, base, what)]
    parts = [
        _part(filesystem, file, redact(filesystem.unstrip_protocol(file)) if remote else file, base, what)
        for file in files
        if not _is_hidden(file, base) and _suffixes(file)[0] in FORMATS
    ]
    if not parts:
        raise UserError(f"{label} holds no file of a known kind. A {what} is {_known()}.")
    formats = sorted({part.format for part in parts})
    if len(formats) > 1:
        raise UserError(
            f"{label} holds files of several kinds: {', '.join(formats)}. Name those that belong together, for example "
            f"'{label.rstrip('/')}/*.{formats[0]}'."
        )
    return parts


def fingerprint(parts: Sequence[Part]) -> str:
    """Tells a table from another one by its files' names, sizes and both ends of each, without reading it whole."""
    from clips_data import ledger

    end_bytes = 1 << 20
    about = []
    for part in parts:
        with readable(part), part.filesystem.open(part.path, "rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            first = file.read(end_bytes)
            file.seek(max(0, size - end_bytes))
            about.append([PurePosixPath(part.path).name, size, ledger.digest_bytes(first + file.read(end_bytes))])
    return ledger.digest_json(about)


def _known() -> str:
    return "parquet, csv, tsv, jsonl, json or txt, each also with .gz or .zst"


def is_local(filesystem: Any) -> bool:
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(filesystem, LocalFileSystem)


def _open_filesystem(source: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    if "://" not in source:
        return LocalFileSystem(), str(Path(source).absolute())
    protocol = source.partition("://")[0].rpartition("::")[2]
    try:
        filesystem, root = fsspec.core.url_to_fs(source)
    except ImportError:
        package = _PACKAGES.get(protocol, f"the fsspec package for {protocol}://")
        raise UserError(f"{redact(source)} is a {protocol}:// address, which needs {package}.") from None
    except ValueError:
        known = ", ".join(f"{name}://" for name in sorted(_PACKAGES))
        raise UserError(f"{redact(source)} is no address that fsspec can open. It opens {known}, …") from None
    return filesystem, root


def _list_files(filesystem: Any, root: str, label: str, what: str) -> tuple[list[str], str]:
    """Files under ``root``, and the folder below which key=value names count."""
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    if "https" in protocols or "http" in protocols:
        return [root], root  # asking a web server for a folder means to parse whatever page it answers
    with readable(Part(filesystem, root, label, what)):
        if filesystem.isdir(root):
            return sorted(filesystem.find(root)), root
        if filesystem.exists(root):
            return [root], str(PurePosixPath(root).parent)
        if magic := _MAGIC.search(root):
            fixed = root[: magic.start()].rpartition("/")[0]
            found = [f for path in sorted(filesystem.glob(root)) for f in sorted(filesystem.find(path))]
            if found:
                return found, fixed
    raise UserError(
        f"The {what} {label} does not exist. Give a file, folder, glob or address of {_known()}, or 'demo'."
    )


def _is_hidden(file: str, base: str) -> bool:
    return any(piece.startswith((".", "_")) for piece in PurePosixPath(file.removeprefix(base)).parts)


def _suffixes(file: str) -> tuple[str, str]:
    """``("csv", "gz")`` of ``list.csv.gz``."""
    name = PurePosixPath(urlsplit(file).path if "://" in file else file).name.lower()
    stem, _, last = name.rpartition(".")
    if last in COMPRESSIONS:
        return stem.rpartition(".")[2], COMPRESSIONS[last]
    return last, ""


def _part(filesystem: Any, file: str, label: str, base: str, what: str) -> Part:
    suffix, compression = _suffixes(file)
    if suffix not in FORMATS:
        raise UserError(f"{label} ends in {suffix!r}. {what}s are {_known()}.")
    partition: dict[str, str | None] = {}
    for piece in PurePosixPath(file.removeprefix(base)).parts[:-1]:
        key, equals, value = piece.partition("=")
        if equals:
            partition[key] = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
    return Part(filesystem, file, label, FORMATS[suffix], compression, partition)


def _from_stdin(scratch: Path, budget: Budget) -> Part:
    from fsspec.implementations.local import LocalFileSystem

    scratch.mkdir(parents=True, exist_ok=True)
    copy = scratch / "stdin"
    with copy.open("wb") as file:
        for chunk in iter(lambda: sys.stdin.buffer.read(1 << 20), b""):
            budget.spend(len(chunk), "stdin")
            file.write(chunk)
    budget.spent = 0
    with copy.open("rb") as file:
        start = file.read(4)
    compression = "gz" if start[:2] == b"\x1f\x8b" else "zst" if start == b"\x28\xb5\x2f\xfd" else ""
    raw = Part(LocalFileSystem(), str(copy), "stdin", "txt", compression)
    with readable(raw), decompressed(raw, budget) as opened:
        kind = _sniff(opened.peek(1 << 16)[: 1 << 16])
    budget.spent = 0
    return Part(raw.filesystem, raw.path, raw.label, kind, compression)


def _sniff(start: bytes) -> str:
    """The format of a table by its first bytes."""
    if start.startswith(b"PAR1"):
        return "parquet"
    line = start.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")[0]
    if line.startswith((b"{", b"[")):
        return "jsonl"
    if b"\t" in line:
        return "tsv"
    return "txt" if re.match(rb"[a-zA-Z][a-zA-Z0-9+.-]*://", line) else "csv"


@contextlib.contextmanager
def readable(part: Part) -> Iterator[None]:
    """Turns damage and absence into one sentence."""
    import pyarrow as pa
    import zstandard

    damage = (EOFError, zlib.error, zstandard.ZstdError, tarfile.TarError, pa.ArrowException, UnicodeDecodeError)
    try:
        yield
    except ClipsError:
        raise
    except damage as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    except OSError as error:
        reason = error.strerror or type(error).__name__ if part.local is None else str(error).rstrip(".")
    except Exception as error:
        if part.local is not None:
            raise
        reason = type(error).__name__  # every remote file system has errors of its own, whose text may quote the URL
    else:
        return
    raise UserError(f"{part.label} cannot be read as {part.format}: {reason}. Check that the file is complete.")


@contextlib.contextmanager
def decompressed(part: Part, budget: Budget) -> Iterator[io.BufferedReader]:
    """The plain bytes of a file, each counted."""
    with part.filesystem.open(part.path, "rb") as raw:
        file: Any = raw
        if part.compression == "gz":
            file = gzip.GzipFile(fileobj=raw)
        elif part.compression == "zst":
            file = io.BufferedReader(_ZstdFile(raw), 1 << 16)
        yield io.BufferedReader(_Counted(file, budget, part.label), 1 << 18)


class _Counted(io.RawIOBase):
    """Spends the budget as bytes are read."""

    def __init__(self, file: BinaryIO, budget: Budget, label: str) -> None:
        self._file, self._budget, self._label = file, budget, label

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._budget.spend(len(data), self._label)
        buffer[: len(data)] = data
        return len(data)


class _ZstdFile(io.RawIOBase):
    """Decompresses frame after frame; unlike zstandard's own reader, it notices where the last one breaks off."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file, self._new = file, zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._input:
                self._input = self._file.read(_ZSTD_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed data break off")
                return 0
            self._frame = self._frame or self._new()
            self._ready = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken


@contextlib.contextmanager
def seekable(part: Part, scratch: Path, budget: Budget) -> Iterator[Any]:
    """The file itself, or its decompressed copy: parquet is read from its end."""
    if not part.compression:
        with part.filesystem.open(part.path, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile(dir=scratch) as copy, decompressed(part, budget) as packed:
        shutil.copyfileobj(packed, copy)
        copy.seek(0)
        yield copy


def lines(part: Part, file: io.BufferedReader) -> Iterator[str]:
    """Lines with their ends, without a byte order mark."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{part.label} line {number} is longer than {MAX_LINE_BYTES} bytes. Is it a {part.format}?")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{part.label} line {number} is not UTF-8 (byte {error.start + 1} of the line). "
                "Convert the file to UTF-8, for example with iconv."
            ) from None
