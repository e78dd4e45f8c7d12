"""Others' webdataset tars, read as they are: what img2dataset and open_clip's users have already.

Their headers are walked once, nothing is extracted, and the places of the members are kept under the work folder.
Samples are grouped as webdataset does it: members that follow one another belong together when their names agree up to
the first dot of the last part. Their caption columns are ``txt`` and every text of the ``.json`` member, and captions
that come without sub-captions are cut when they are asked for.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from clips_data import ledger, split
from clips_data.errors import UserError
from clips_train import ahead
from clips_train.shards import INDEX_FILE, MAX_JSON_BYTES, ShardError, Split, TarFile, open_split

IMAGES: Final = ("jpg", "png", "jpeg", "webp")
"""As open_clip, which takes the first of these that a sample has."""
TXT: Final = "txt"
NOT_COLUMNS: Final = ("key", "sha256")
SPLIT_RULE: Final[split.Rule] = "period"
"""How captions are cut that come without sub-captions: as `clips shard` does where it is not told otherwise."""
INDEX_VERSION: Final = "1"
SCAN_PROCESSES: Final = 8
TARS_PER_PROCESS: Final = 4
"""With fewer tars to index than this for each, a process takes longer to start than it saves."""

MEMBER_NAME = re.compile(r"((?:.*/|)[^.]+)\.([^/]*)")
_NOT_OF_A_SAMPLE = re.compile(r"__[^/]*__(?:$|/)")
"""Both as webdataset has them."""
_PATTERN = re.compile(r"[*?\[{]")
_SCHEMA = pa.schema(
    [("key", pa.string()), ("image_ext", pa.string())]
    + [(f"{member}_{what}", pa.int64()) for member in ("image", "txt", "json") for what in ("offset", "bytes")]
)
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class ForeignSplit(Split):
    """Tars of others, by their absolute paths. ``folder`` is that of their indexes."""

    indexes: tuple[Path, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Members that are no part of a sample, by extension, and samples without an image under ``no_image``."""

    def rows(self, shard: int) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = pq.read_table(self.indexes[shard], memory_map=False).to_pydict()
        return rows

    def about(self, rows: Mapping[str, Sequence[Any]], row: int, tar: TarFile) -> dict[str, Any]:
        """Raises ``ShardError``. A column that this sample lacks is empty."""
        found: dict[str, Any] = {}
        if rows["json_bytes"][row] > MAX_JSON_BYTES or rows["txt_bytes"][row] > MAX_JSON_BYTES:
            raise ShardError("json_too_large")
        if rows["json_offset"][row]:
            found = _json(tar.read(rows["json_offset"][row], rows["json_bytes"][row]))
        if rows["txt_offset"][row]:
            try:
                found[TXT] = tar.read(rows["txt_offset"][row], rows["txt_bytes"][row]).decode()
            except UnicodeDecodeError as error:
                raise ShardError("txt_invalid") from error
        for column in self.columns:
            if not isinstance(found.get(column), str):
                found[column] = ""
        if not isinstance(found.get("scores"), dict):
            found["scores"] = {}
        return found | {"key": rows["key"][row], "sub_captions": _SubCaptions(found, self.columns)}


class _SubCaptions(Mapping[str, Sequence[split.Span]]):
    """The spans of a sample's columns: those that it brings, or else cut now, when somebody asks for them."""

    def __init__(self, about: Mapping[str, Any], columns: Sequence[str]) -> None:
        given = about.get("sub_captions")
        self._given = given if isinstance(given, dict) else {}
        self._texts = {column: about[column] for column in columns}
        self._cut: dict[str, Sequence[split.Span]] = {}

    def __getitem__(self, column: str) -> Sequence[split.Span]:
        if column not in self._cut:
            text, given = self._texts[column], self._given.get(column)
            self._cut[column] = given if given is not None and _are_spans(given, text) else _cut(text)
        return self._cut[column]

    def __contains__(self, column: object) -> bool:
        return column in self._texts

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


def _are_spans(given: Any, text: str) -> bool:
    def is_span(span: Any) -> bool:
        if not isinstance(span, list) or len(span) != 2 or not all(type(edge) is int for edge in span):
            return False
        return bool(0 <= span[0] < span[1] <= len(text))

    return isinstance(given, list) and all(map(is_span, given))


def _cut(text: str) -> list[split.Span]:
    with _one_at_a_time:  # one of the rules is spaCy's, which works on one thread
        return split.split(text, SPLIT_RULE)


def _json(data: bytes) -> dict[str, Any]:
    """Lenient where ``clips shard`` would not be: people write NaN. Raises ``ShardError``."""
    try:
        found = json.loads(data)
        json.dumps([text for text in found.values() if isinstance(text, str)], ensure_ascii=False).encode()
    except (ValueError, RecursionError, AttributeError) as error:
        raise ShardError("json_invalid") from error
    assert isinstance(found, dict)
    return found


# --- which tars -------------------------------------------------------------------------------------------------------


def open_shards(given: Path | Sequence[Path], name: str, *, index: Path) -> Split:
    """The split ``name`` of what was given: a ``shards/`` folder or tars of it, or else tars of others.

    Those are given by path, folder, glob or braces (``{00000..00012}.tar``), and are one split, whatever its name;
    ``index`` is the folder for their indexes. Raises ``UserError`` as ``open_split`` does, for what is not there, and
    with file and offset for tars that are damaged.
    """
    names = [given] if isinstance(given, Path) else list(given)
    homes = {path if path.is_dir() else path.parent for path in names}
    if (
        isinstance(given, Path)
        and not given.is_file()
        and not any(given.glob("*.tar"))
        and not _PATTERN.search(str(given))
    ):
        return open_split(given, name)  # says what is missing
    if len(homes) == 1 and ((home := homes.pop()) / INDEX_FILE).is_file():
        return open_split(home, name)
    return _open_tars(tars_named(names), name, index)


def tars_named(names: Sequence[Path]) -> list[Path]:
    """Absolute paths of the tars that paths, folders, globs and braces name, in their order, each once."""
    from braceexpand import braceexpand

    found: list[Path] = []
    for word in [word for name in names for word in braceexpand(str(name))]:
        path = Path(word)
        if path.is_dir():
            tars = sorted(path.glob("*.tar"))
        elif path.is_file() or not glob.has_magic(word):
            tars = [path]
        else:
            tars = sorted(map(Path, glob.glob(word)))  # noqa: PTH207  (Path.glob takes no absolute pattern)
        if not tars or not all(tar.is_file() for tar in tars):
            raise UserError(f"{word} names no tar that is there. Name tars, a folder with tars, or a pattern of them.")
        found += tars
    return list(dict.fromkeys(tar.absolute() for tar in found))


def _open_tars(tars: Sequence[Path], name: str, index: Path) -> ForeignSplit:
    index.mkdir(parents=True, exist_ok=True)
    with _locked(index):  # several processes of a run want the same
        paths = _indexed(tars, index)
    abouts = [_about_index(path) or {} for path in paths]
    columns, ignored = Counter[str](), Counter[str]()
    for about in abouts:
        columns.update(json.loads(about["columns"]))
        ignored.update(json.loads(about["ignored"]))
    if not any(int(about["num_samples"]) for about in abouts):
        found = ", ".join(f"{what} {number}" for what, number in ignored.most_common(10)) or "nothing at all"
        raise UserError(
            f"The tars ({len(tars)}, from {tars[0]} on) hold no sample: none has an image ({', '.join(IMAGES)}). "
            f"In them was: {found}."
        )
    return ForeignSplit(
        folder=index,
        name=name,
        files=tuple(map(str, tars)),
        num_samples_by_shard=tuple(int(about["num_samples"]) for about in abouts),
        columns=tuple(sorted(columns, key=lambda column: (column != TXT, column))),
        digest=ledger.digest_json([[tar.name, about["digest"]] for tar, about in zip(tars, abouts, strict=True)]),
        indexes=tuple(paths),
        ignored=dict(ignored),
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- their indexes ----------------------------------------------------------------------------------------------------


def _indexed(tars: Sequence[Path], folder: Path) -> list[Path]:
    """The index of each tar, made where there is none of the tar as it is now."""
    paths = [folder / f"{tar.stem}-{hashlib.sha256(str(tar).encode()).hexdigest()[:12]}.parquet" for tar in tars]
    missing = [
        (tar, path)
        for tar, path in zip(tars, paths, strict=True)
        if not _state(tar).items() <= (_about_index(path) or {}).items()
    ]
    num_processes = min(SCAN_PROCESSES, len(os.sched_getaffinity(0)), len(missing) // TARS_PER_PROCESS)
    for _ in ahead.loaded(_write_index, missing, num_processes if num_processes > 1 else 0):
        pass
    return paths


def _state(tar: Path) -> dict[str, str]:
    """What an index is bound to."""
    about = tar.stat()
    return {
        "version": INDEX_VERSION,
        "tar": str(tar),
        "bytes": str(about.st_size),
        "modified_ns": str(about.st_mtime_ns),
    }


def _about_index(path: Path) -> dict[str, str] | None:
    """What an index says of itself; ``None`` where there is none that can be read."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):
        return None
    return {name.decode(): value.decode() for name, value in metadata.items() if not name.startswith(b"ARROW")}


def _write_index(job: tuple[Path, Path]) -> None:
    tar, path = job
    state = _state(tar)
    scan = _Scan(tar)
    table = pa.Table.from_pylist(scan.rows, schema=_SCHEMA)
    about = {
        "num_samples": str(len(scan.rows)),
        "columns": json.dumps(scan.columns),
        "ignored": json.dumps(scan.ignored),
        "digest": ledger.digest_json([list(row.values()) for row in scan.rows]),
    }
    written = path.with_name(path.name + ledger.PART)
    pq.write_table(table.replace_schema_metadata(state | about), written)
    written.replace(path)


class _Scan:
    """What the headers of a tar say, and the names of the texts in its ``.json`` members.

    Raises ``UserError`` with the offset for a tar that ends early or is damaged, a member that is there twice, and a
    key that comes back after others.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        self.columns, self.ignored = Counter[str](), Counter[str]()
        self._keys: set[str] = set()
        self._row: dict[str, Any] = {}
        self._exts: set[str] = set()
        with path.open("rb") as file:
            for member in members(file, path):
                self._add(file, member)
            self._finish()

    def _add(self, file: BinaryIO, member: tarfile.TarInfo) -> None:
        name = MEMBER_NAME.fullmatch(member.name)
        if not member.isreg() or _NOT_OF_A_SAMPLE.match(member.name) or name is None:
            self.ignored["no_plain_file" if not member.isreg() else "no_extension"] += 1
            return
        key, ext = name[1], name[2].lower()
        if key != self._row.get("key"):
            self._finish()
            if key in self._keys:
                _refuse(self._path, member.offset, f"key {key!r} comes back after other keys")
            self._keys.add(key)
            self._row = dict.fromkeys(_SCHEMA.names, 0) | {"key": key, "image_ext": None}
        if ext in self._exts:
            _refuse(self._path, member.offset, f"member {member.name!r} is there twice")
        self._exts.add(ext)
        if ext in IMAGES:
            before = self._row["image_ext"]
            if before is None or IMAGES.index(ext) < IMAGES.index(before):
                self._row["image_ext"] = ext
                self._put("image", member)
        elif ext == TXT:
            self._put("txt", member)
        elif ext == "json":
            self._put("json", member)
            self._look_at(os.pread(file.fileno(), min(member.size, MAX_JSON_BYTES), member.offset_data))
        else:
            self.ignored[ext] += 1

    def _put(self, kind: str, member: tarfile.TarInfo) -> None:
        self._row |= {f"{kind}_offset": member.offset_data, f"{kind}_bytes": member.size}

    def _look_at(self, data: bytes) -> None:
        """Counts the texts of a ``.json`` member. One that is damaged is told when its sample is loaded."""
        try:
            found = _json(data)
        except ShardError:
            return
        self.columns.update(name for name, value in found.items() if isinstance(value, str) and name not in NOT_COLUMNS)

    def _finish(self) -> None:
        if self._row.get("image_ext") is not None:
            self.rows.append(self._row)
            self.columns[TXT] += bool(self._row["txt_offset"])
        elif self._row:
            self.ignored["no_image"] += 1
        self._row, self._exts = {}, set()
        self.columns += Counter()  # drops what counts nothing


def members(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar with their places, long names of all kinds resolved."""
    file_bytes = os.fstat(file.fileno()).st_size
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115  (has no descriptor of its own)
    except tarfile.TarError as error:
        _refuse(path, 0, f"no tar header is here ({error}); compressed tars have to be unpacked first")
    while True:
        begin = archive.offset
        try:
            member = archive.next()
        except tarfile.TarError as error:
            _refuse(path, begin, f"the tar is damaged or ends early ({error})")
        if member is None:
            return _check_end(file, path, archive.offset)
        archive.members = []  # type: ignore[attr-defined]  # else it keeps all of them
        if member.sparse is not None:
            _refuse(path, member.offset, f"{member.name!r} is a sparse file")
        if member.isreg() and (missing := member.offset_data + member.size - file_bytes) > 0:
            _refuse(path, member.offset, f"{member.name!r} begins and the file ends {missing} bytes before it does")
        yield member


def _check_end(file: BinaryIO, path: Path, offset: int) -> None:
    """``tarfile`` takes damage for the end. A block of zeros is the end, and nothing follows it."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        _refuse(path, offset, "the file ends without the end mark of a tar")
    if any(block):
        _refuse(path, offset, "no tar header is here")
    while block := file.read(1 << 20):
        if any(block):
            _refuse(path, offset, "the archive ends here, but more data follow")


def _refuse(path: Path, offset: int, reason: str) -> NoReturn:
    raise UserError(f"{path} is not a usable shard: at byte {offset} {reason}. Restore the file or leave it out.")
