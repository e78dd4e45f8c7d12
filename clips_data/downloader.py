"""One shard's download in a worker process: img2dataset's Downloader, with our opener, resizer and writer put in.

The opener answers even a failure with an envelope, because img2dataset keeps nothing of a failure but a free text. To
img2dataset a row's URL is its number: what it prints or raises can hold no secret of a URL, and rows that are not to be
asked for (duplicates, forgotten hosts, what is no URL) reach no network code at all.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import struct
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from clips_data import fetch, images, ledger, schema, sources
from clips_data.decoder import Decoder
from clips_data.forgotten import Forgotten
from clips_data.pair_writer import PairWriter, StoredImage

_HASHES: Final = {32: "md5", 40: "sha1", 64: "sha256"}


@dataclass(frozen=True)
class ShardTask:
    """A shard to download: its list rows, of which the first ``num_rows`` are wanted, and what not to ask for.

    ``skipped`` maps row numbers to the fields of their failure, for example ``{"code": "duplicate", …}``.
    """

    shard: sources.ListShard
    num_rows: int
    skipped: Mapping[int, Mapping[str, str]]


@dataclass(frozen=True)
class Settings:
    """What all shards of a run have in common. ``digested`` is the part of the config that decides what is made."""

    pairs: Path
    columns: tuple[str, ...]
    hash_column: str | None
    policy: fetch.FetchPolicy
    images: images.ImageSettings
    threads: int
    digested: Mapping[str, Any]
    forgotten: Forgotten
    parent_pid: int


def download_shard(task: ShardTask, settings: Settings) -> dict[str, int]:
    """Downloads one shard and commits it, unless only a part of it was wanted. Returns its rows by code."""
    import urllib.request

    from clips_data import engine

    rows = _take_rows(task, settings)
    unwanted = {
        number: {"code": "forgotten"} for number, url in enumerate(rows.urls) if settings.forgotten.matches(url)
    }
    opener: Any = _Opener(settings.policy, rows.urls, {**task.skipped, **unwanted})
    urllib.request.install_opener(opener)
    writers: list[PairWriter] = []

    def make_writer(*arguments: Any) -> PairWriter:
        writers.append(PairWriter(*arguments, urls=rows.urls, finish=functools.partial(_commit, task, settings)))
        return writers[-1]

    downloader_class = engine.downloader()
    started = time.time()
    with sources.talk_to_log(settings.pairs):
        downloader = downloader_class(
            sample_writer_class=make_writer,
            resizer=_Resizer(_decoder(settings.images), rows.hashes, settings.forgotten),
            thread_count=settings.threads,
            save_caption=True,
            extract_exif=False,
            output_folder=str(settings.pairs),
            column_list=list(settings.columns),
            timeout=None,  # the opener has its own deadline
            number_sample_per_shard=10**schema.KEY_DIGITS_IN_SHARD,
            oom_shard_count=schema.SHARD_DIGITS,
            compute_hash=None,
            verify_hash_type=None,
            encode_format="jpg",
            retries=0,
            user_agent_token=None,
            disallowed_header_directives=None,
        )
        downloader.download_shard((task.shard.number, str(task.shard.arrow_file)))
    (writer,) = writers
    _write_stats(settings, task.shard.number, writer, started, downloader_class)
    return dict(writer.counts)


@functools.lru_cache(1)
def _decoder(settings: images.ImageSettings) -> Decoder:
    """A worker keeps its decoder from shard to shard; the child ends with it."""
    return Decoder(settings)


@dataclass(frozen=True)
class _Rows:
    """What is kept aside of a shard's rows while img2dataset knows them by number."""

    urls: list[str]
    hashes: list[str | None] | None


def _take_rows(task: ShardTask, settings: Settings) -> _Rows:
    """Replaces the URLs of the shard's Arrow file by row numbers, cuts it to the wanted rows, and keeps the URLs."""
    import pyarrow as pa

    with pa.ipc.open_file(task.shard.arrow_file) as reader:
        table = reader.read_all().slice(0, task.num_rows)
    urls = [url or "" for url in table["url"].to_pylist()]
    hashes = table[settings.hash_column].to_pylist() if settings.hash_column else None
    numbers = pa.array([f"row:{number}" for number in range(len(urls))], pa.string())
    table = table.set_column(table.column_names.index("url"), "url", numbers)
    with pa.ipc.new_file(str(task.shard.arrow_file), table.schema) as writer:
        writer.write_table(table)
    return _Rows(urls, hashes)


class _Opener:
    """Stands where ``urllib.request.urlopen`` looks for its opener."""

    def __init__(self, policy: fetch.FetchPolicy, urls: list[str], skipped: Mapping[int, Mapping[str, str]]) -> None:
        self.policy, self.urls, self.skipped = policy, urls, skipped

    def open(self, request: Any, data: object = None, timeout: object = None) -> io.BytesIO:
        number = int(request.full_url.removeprefix("row:"))
        if number in self.skipped:
            return _packed({"detail": "", "attempts": 0, "row": number, **self.skipped[number]}, b"")
        try:
            fetched = fetch.fetch(self.urls[number], self.policy)
        except Exception as error:
            return _packed({**_mistake(error), "row": number}, b"")
        about = asdict(fetched)
        body = about.pop("body")
        return _packed({**about, "row": number}, body)


def _packed(about: Mapping[str, Any], body: bytes) -> io.BytesIO:
    head = json.dumps(about).encode()
    return io.BytesIO(b"".join((struct.pack(">I", len(head)), head, body)))


def _unpacked(envelope: bytes) -> tuple[dict[str, Any], memoryview]:
    (length,) = struct.unpack_from(">I", envelope)
    return json.loads(envelope[4 : 4 + length]), memoryview(envelope)[4 + length :]


@dataclass
class _Resizer:
    """Unpacks the opener's envelope, checks hash and image. Failures leave as JSON in img2dataset's error message."""

    decoder: Decoder
    hashes: list[str | None] | None
    forgotten: Forgotten

    def __call__(self, stream: io.BytesIO, blurring_bbox_list: object = None) -> tuple[Any, ...]:
        try:
            return self._checked(stream)
        except Exception as error:
            return _failure(_mistake(error))

    def _checked(self, stream: io.BytesIO) -> tuple[Any, ...]:
        about, body = _unpacked(stream.getvalue())
        number = about.pop("row")
        if about["code"] != "ok":
            return _failure(about)
        about["raw_sha256"] = hashlib.sha256(body).hexdigest()
        if self.forgotten.matches(None, about["raw_sha256"]):
            return _failure(about | {"code": "forgotten"})
        if self.hashes is not None and not _has_hash(body, self.hashes[number]):
            return _failure(about | {"code": "hash_mismatch", "detail": f"the list says {self.hashes[number]}"})
        try:
            image = self.decoder.check(bytes(body))
        except images.ImageRefused as refused:
            return _failure(about | {"code": refused.code, "detail": refused.detail})
        stored = StoredImage(image.data)
        sha256 = ledger.digest_bytes(stored)
        if self.forgotten.matches(None, sha256):
            return _failure(about | {"code": "forgotten"})
        stored.evidence = about | {
            "sha256": sha256,
            "image_ext": image.extension,
            "bytes": len(stored),
            "orientation": image.orientation,
            "phash": image.phash,
        }
        sizes = image.width_px, image.height_px, image.original_width_px, image.original_height_px
        return stored, *sizes, None


def _failure(about: Mapping[str, Any]) -> tuple[Any, ...]:
    return None, None, None, None, None, json.dumps(about)


def _mistake(error: Exception) -> dict[str, Any]:
    """A row for a mistake of ours, which img2dataset would drop. The error's text is left out: it may hold the URL."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    detail = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
    return {"code": "internal", "detail": detail, "attempts": 1}


def _has_hash(body: memoryview, wanted: str | None) -> bool:
    """Rows without a hash are not held to one."""
    if not wanted:
        return True
    name = _HASHES.get(len(wanted))
    return name is not None and hashlib.new(name, body, usedforsecurity=False).hexdigest() == wanted.lower()


def _commit(task: ShardTask, settings: Settings, folder: Path, unit: str, counts: dict[str, int]) -> None:
    if task.num_rows == task.shard.num_rows:
        files = [f"{unit}.tar", f"{unit}.parquet"]
        inputs = {"list": task.shard.digest}
        ledger.commit(folder, unit, files, inputs=inputs, config=settings.digested, counts=counts)


def _write_stats(settings: Settings, number: int, writer: PairWriter, started: float, downloader_class: Any) -> None:
    """img2dataset has just written its own; it files all our failures under "resize"."""
    from importlib.metadata import version

    ended = time.time()
    stats = {
        "count": len(writer.rows),
        "successes": writer.statuses[schema.STATUS_SUCCESS],
        "failed_to_download": writer.statuses["failed_to_download"],
        "failed_to_resize": writer.statuses["failed_to_resize"],
        "start_time": started,
        "end_time": ended,
        "duration": ended - started,
        "status_dict": dict(writer.counts),
        "downloaded_by": f"{downloader_class.__module__}.{downloader_class.__qualname__}.download_shard",
        "img2dataset_version": version("img2dataset"),
        "worker_pid": os.getpid(),
        "parent_pid": settings.parent_pid,
    }
    ledger.write_json(settings.pairs / f"{schema.shard_name(number)}_stats.json", stats)
