"""Which images ``clips caption`` is to describe: files, folders, globs, lists and tables, read one after the other."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from clips_data.files import Part

IMAGE_SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""What is taken for an image in a folder. A file that is named is tried whatever its name."""
STDIN: Final = "-"
MAX_IMAGE_BYTES: Final = 1 << 28
MAX_TABLE_BYTES: Final = 1 << 36
IMAGE_COLUMN, WEB_COLUMN = "path", "web"
DECODERS: Final = 4
"""Threads that read and decode images while the model works."""

FEEDER: Final = "caption-inputs"

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Picture:
    """An image to be described: its path as it was given, where it lies, its web caption or ""."""

    path: str
    file: Path | None
    web: str = ""


@dataclass(frozen=True)
class Opened:
    """A picture that was read. ``failure`` is why there are no pixels, else ""; ``sha256`` is that of the file."""

    picture: Picture
    pixels: Tensor | None
    sha256: str
    failure: str = ""


class Inputs:
    """The images that words on the command line mean. ``notes`` fill while they are read.

    ``web`` is the web caption of all images; ``None`` takes those of ``web_column`` where there are tables. Raises
    ``UserError`` for a word that means no images, before any is read.
    """

    def __init__(
        self, words: Sequence[str], *, web: str | None, image_column: str | None, web_column: str | None
    ) -> None:
        self.notes: list[str] = []
        self._web, self._image_column, self._web_column = web, image_column, web_column
        self._words = [one for word in words for one in _expanded(word)]
        for word in self._words:
            if _is_table(word):
                self._columns(word)
            elif word != STDIN:
                _check(word)

    def __iter__(self) -> Iterator[Picture]:
        for word in self._words:
            path = Path(word)
            if word == STDIN:
                yield from map(self._plain, _lines(sys.stdin.fileno()))
            elif path.is_dir():
                yield from map(self._plain, self._in_folder(path))
            elif _is_table(word):
                yield from self._in_table(word)
            elif path.suffix.lower() == ".txt":
                with path.open("rb") as file:
                    yield from map(self._plain, _lines(file.fileno()))
            else:
                yield self._plain(word)

    def _plain(self, path: str) -> Picture:
        return Picture(path, Path(path), self._web or "")

    def _in_folder(self, folder: Path) -> Iterator[str]:
        num_found = num_others = 0
        for root, folders, names in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                    num_found += 1
                    yield str(Path(root) / name)
                else:
                    num_others += 1
        if num_others or not num_found:
            self.notes.append(
                f"{folder}: {num_found} images by their suffix, {num_others} other files were passed over."
            )

    # --- tables -------------------------------------------------------------------------------------------------------

    def _columns(self, word: str) -> tuple[str, str | None]:
        """The columns of paths and, where there is one, of web captions. Raises ``UserError`` where one is missing."""
        from clips_data import tables
        from clips_data.errors import UserError, did_you_mean
        from clips_data.tables import Dialect

        with _table(word) as (part, scratch, budget):
            names = tables.column_names(part, scratch, budget, Dialect())
        image = self._image_column or IMAGE_COLUMN
        wanted = [("--image-column", image), *([("--web-column", self._web_column)] if self._web_column else [])]
        for option, column in wanted:
            if column not in names:
                raise UserError(f"{word} has no column {column!r}. {did_you_mean(column, names)} Set it with {option}.")
        if self._web is not None:
            return image, None
        return image, self._web_column or (WEB_COLUMN if WEB_COLUMN in names else None)

    def _in_table(self, word: str) -> Iterator[Picture]:
        from clips_data import tables
        from clips_data.tables import Dialect

        image, web = self._columns(word)
        with _table(word) as (part, scratch, budget):
            for table in tables.stream([part], scratch, budget, Dialect()):
                paths = table[image].to_pylist()
                texts = table[web].to_pylist() if web is not None else [self._web] * len(paths)
                for path, text in zip(paths, texts, strict=True):
                    named = "" if path is None else str(path)
                    yield Picture(named, _beside(named, Path(word)), "" if text is None else str(text))


def _expanded(word: str) -> list[str]:
    """The paths that a glob means, which a shell may have left as it is."""
    if word == STDIN or Path(word).exists() or not glob.has_magic(word):
        return [word]
    found = sorted(glob.glob(word, recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    if not found:
        from clips_data.errors import UserError

        raise UserError(f"{word} means no file. Name image files, folders, a table, or - for paths on stdin.")
    return found


def _is_table(word: str) -> bool:
    from clips_data.files import COMPRESSIONS, FORMATS

    suffixes = [suffix.lower() for suffix in Path(word).suffixes]
    if suffixes and suffixes[-1][1:] in COMPRESSIONS:
        suffixes.pop()
    return bool(suffixes) and FORMATS.get(suffixes[-1][1:]) in ("parquet", "csv", "tsv", "jsonl")


def _check(word: str) -> None:
    from clips_data.errors import UserError

    path = Path(word)
    if path.suffix.lower() == ".tar":
        raise UserError(
            f"{word} is a tar. `clips adopt` takes tars as pairs/, and `clips recaption --engine clips` captions those."
        )
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{word} is not a file. Name image files, folders, a table, or - for paths on stdin.")


@contextlib.contextmanager
def _table(word: str) -> Iterator[tuple[Part, Path, Any]]:
    """The one file of a table, scratch space and a budget, as its readers want them."""
    from clips_data import files

    budget = files.Budget(MAX_TABLE_BYTES, "Cut the table into several ones.")
    with tempfile.TemporaryDirectory(prefix="clips-caption-") as scratch:
        [part] = files.find(word, Path(scratch), budget, what="table of images")
        yield part, Path(scratch), budget


def _beside(named: str, table: Path) -> Path | None:
    """Where a table's path lies: as seen from here, else from the table."""
    if not named:
        return None
    path = Path(named)
    return path if path.is_absolute() or path.exists() else table.parent / path


def _lines(descriptor: int) -> Iterator[str]:
    """The paths of an open file, one a line, as they come.

    Read without Python's buffer, whose lock would be held by a thread that waits for stdin when the command ends.
    """
    rest = b""
    while block := os.read(descriptor, 1 << 16):
        *lines, rest = (rest + block).split(b"\n")
        yield from (os.fsdecode(path) for line in lines if (path := line.rstrip(b"\r")))
    if path := rest.rstrip(b"\r"):
        yield os.fsdecode(path)


# --- reading ----------------------------------------------------------------------------------------------------------


def read(picture: Picture, side_px: int) -> Opened:
    """The picture's pixels, uint8 [3, side_px, side_px], or why there are none."""
    from clips_train import transforms

    if picture.file is None or not picture.file.is_file():
        return Opened(picture, None, "", "no_such_file")
    try:
        if picture.file.stat().st_size > MAX_IMAGE_BYTES:
            return Opened(picture, None, "", "too_large")
        data = picture.file.read_bytes()
        pixels = transforms.squash(transforms.decode(data, side_px), side_px)
    except OSError as error:
        return Opened(picture, None, "", error.strerror or type(error).__name__)
    except transforms.BadImage as error:
        return Opened(picture, None, "", error.reason)
    return Opened(picture, pixels, hashlib.sha256(data).hexdigest())


def ahead(items: Iterable[Given], make: Callable[[Given], Made], *, num_ahead: int) -> Generator[Made]:
    """What ``make`` makes of the items, in their order and in threads; at most ``num_ahead`` wait to be taken.

    An item is handed on as soon as it is ready, although further ones may be long in coming.
    """
    waiting: Queue[Future[Made] | BaseException | None] = Queue()
    room = threading.Semaphore(num_ahead)
    is_over = threading.Event()

    def feed() -> None:
        try:
            for item in items:
                room.acquire()
                if is_over.is_set():
                    return
                waiting.put(pool.submit(make, item))
            waiting.put(None)
        except BaseException as error:  # raised again where the items are taken, and not lost with this thread
            waiting.put(error)

    with ThreadPoolExecutor(DECODERS) as pool:
        threading.Thread(
            target=feed, name=FEEDER, daemon=True
        ).start()  # a daemon: it may be waiting for stdin for ever
        try:
            while (found := waiting.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                made = found.result()
                room.release()
                yield made
        finally:
            is_over.set()
            room.release()
            pool.shutdown(wait=False, cancel_futures=True)
