"""``clips download``: a URL list becomes ``pairs/``, with one status row for every URL that was tried.

img2dataset does the work, through its own seams: its Reader cuts the list, its Downloader drives each shard in a worker
process. Into these we put our own opener (guarded fetch), resizer (checks, keeps bytes) and writer (commit protocol).
The opener answers even a failure with an envelope, because img2dataset keeps nothing of a failure but a free text.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_data import executor, fetch, images, ledger, schema, sources
from clips_data.config import DownloadConfig
from clips_data.errors import TooFewSucceeded
from clips_data.executor import Job, Report

if TYPE_CHECKING:
    import pyarrow as pa

PRELOAD = ("img2dataset.downloader", "img2dataset.reader", "PIL.Image", "clips_data.download")
# Choices that decide how the work is done but not what a finished shard holds.
NOT_IN_DIGEST = {"threads", "min_success", "source", "num_pairs", "shard_rows"}


def run(config: DownloadConfig, job: Job) -> Report:
    """Downloads the shards of the list that are not finished yet. Raises ``TooFewSucceeded`` below ``min_success``."""
    started = time.monotonic()
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or img2dataset's import asks the network for a version
    pairs = job.out or job.work / schema.PAIRS
    scratch = pairs / "_list"
    report = Report("download")
    with ledger.readable_disk_errors(pairs):
        scratch.mkdir(parents=True, exist_ok=True)
        url_list = sources.locate(config, scratch)
        (shards,) = executor.map_units(
            functools.partial(sources.cut, url_list, config.shard_rows), [scratch], num_processes=1, preload=PRELOAD
        )
        missing, totals = _missing_shards(shards, pairs, config, job, report)
        if job.dry_run:
            report.facts["shards_to_do"] = len(missing)
        else:
            for counts in _download(missing, url_list, pairs, config, job, sum(rows for _, rows in missing)):
                totals.update(counts)
                report.made += 1
        shutil.rmtree(scratch)
    finished = set(ledger.finished_units(pairs))
    report.units = [
        pairs / f"{schema.shard_name(s.number)}.tar" for s in shards if schema.shard_name(s.number) in finished
    ]
    report.add(dict(totals))
    report.seconds = time.monotonic() - started
    _check_success(config, totals)
    return report


def _missing_shards(
    shards: list[sources.ListShard], pairs: Path, config: DownloadConfig, job: Job, report: Report
) -> tuple[list[tuple[sources.ListShard, int]], Counter[str]]:
    """The shards still to do, each with the rows that the limit leaves it, and the counts of those that are done."""
    chosen = set(executor.slice_of([schema.shard_name(s.number) for s in shards], job.slice))
    missing, totals, left = [], Counter[str](), job.limit if job.limit is not None else sys.maxsize
    for shard in shards:
        unit = schema.shard_name(shard.number)
        if unit not in chosen or left <= 0:
            continue
        allowed, left = min(left, shard.num_rows), left - shard.num_rows
        if ledger.is_done(
            pairs,
            unit,
            inputs={"list": shard.digest},
            config=_digested(config),
            overwrite=job.overwrite and not job.dry_run,
        ):
            sidecar = ledger.read_sidecar(pairs, unit)
            assert sidecar is not None
            totals.update(sidecar.counts)
            report.skipped += 1
        else:
            missing.append((shard, allowed))
    return missing, totals


def _digested(config: DownloadConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=NOT_IN_DIGEST)


def _download(
    shards: list[tuple[sources.ListShard, int]],
    url_list: sources.UrlList,
    pairs: Path,
    config: DownloadConfig,
    job: Job,
    num_rows: int,
) -> Iterator[dict[str, int]]:
    from tqdm import tqdm

    if not shards:
        return
    with contextlib.ExitStack() as stack:
        fixed_hosts = {}
        if config.source == "demo":
            from clips_data.demo import web

            fixed_hosts[web.DEMO_HOST] = stack.enter_context(web.serve())
        policy = fetch.FetchPolicy(
            timeout_s=config.timeout_s,
            retries=config.retries,
            max_wait_s=config.max_wait_s,
            max_image_bytes=config.max_image_bytes,
            allow_network=config.allow_network,
            honour_opt_out=config.honour_opt_out,
            user_agent=config.user_agent,
            fixed_hosts=fixed_hosts,
        )
        work = functools.partial(
            download_shard,
            columns=sources.column_names(url_list),
            pairs=pairs,
            policy=policy,
            config=config,
            parent_pid=os.getpid(),
        )
        progress = stack.enter_context(
            tqdm(total=num_rows, unit="url", desc="download", disable=job.quiet or None, file=sys.stderr)
        )
        for counts in executor.map_units(work, shards, num_processes=max(1, job.processes), preload=PRELOAD):
            progress.update(sum(counts.values()))
            yield counts


def _check_success(config: DownloadConfig, totals: Counter[str]) -> None:
    attempted = sum(totals.values())
    if attempted and totals["ok"] < config.min_success * attempted:
        failures = ", ".join(f"{code} {number}" for code, number in totals.most_common() if code != "ok")
        raise TooFewSucceeded(
            f"{totals['ok']} of {attempted} URLs succeeded, less than --min-success {config.min_success:g}. "
            f"Failures: {failures}. The shards are finished; look at the code column of their parquet files."
        )


# --- in the worker ----------------------------------------------------------------------------------------------------


def download_shard(
    task: tuple[sources.ListShard, int],
    *,
    columns: list[str],
    pairs: Path,
    policy: fetch.FetchPolicy,
    config: DownloadConfig,
    parent_pid: int,
) -> dict[str, int]:
    """Downloads one shard with img2dataset and commits it. Returns its rows by code."""
    import urllib.request

    import img2dataset
    from img2dataset.downloader import Downloader

    shard, num_rows = task
    whole = num_rows == shard.num_rows
    if not whole:
        _cut(shard.arrow_file, num_rows)
    opener: Any = _Opener(policy)
    urllib.request.install_opener(opener)
    finish = functools.partial(_commit, inputs={"list": shard.digest}, config=_digested(config), whole=whole)
    writers: list[PairWriter] = []

    def make_writer(*arguments: Any) -> PairWriter:
        writers.append(PairWriter(*arguments, num_rows=num_rows, finish=finish))
        return writers[-1]

    downloader = Downloader(
        sample_writer_class=make_writer,
        resizer=_Resizer(config.max_pixels),
        thread_count=config.threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(pairs),
        column_list=columns,
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
    started = time.time()
    with sources.talk_to_log(pairs):
        downloader.download_shard((shard.number, str(shard.arrow_file)))
    (writer,) = writers
    stats = {  # img2dataset has just written its own; it files all our failures under "resize"
        "count": num_rows,
        "successes": writer.counts["ok"],
        "failed_to_download": sum(1 for row in writer.rows if row["status"] == "failed_to_download"),
        "failed_to_resize": sum(1 for row in writer.rows if row["status"] == "failed_to_resize"),
        "start_time": started,
        "end_time": time.time(),
        "duration": time.time() - started,
        "status_dict": dict(writer.counts),
        "downloaded_by": f"{Downloader.download_shard.__module__}.{Downloader.download_shard.__qualname__}",
        "img2dataset_version": _version(img2dataset),
        "worker_pid": os.getpid(),
        "parent_pid": parent_pid,
    }
    ledger.write_json(pairs / f"{schema.shard_name(shard.number)}_stats.json", stats)
    return dict(writer.counts)


def _cut(arrow_file: Path, num_rows: int) -> None:
    """Leaves the first rows of a cut shard's Arrow file."""
    import pyarrow as pa

    with pa.ipc.open_file(arrow_file) as reader:
        table = reader.read_all().slice(0, num_rows)
    with pa.ipc.new_file(str(arrow_file), table.schema) as writer:
        writer.write_table(table)


def _version(module: Any) -> str:
    from importlib.metadata import version

    return version(module.__name__)


class _Opener:
    """Stands where ``urllib.request.urlopen`` looks for its opener."""

    def __init__(self, policy: fetch.FetchPolicy) -> None:
        self.policy = policy

    def open(self, request: Any, data: object = None, timeout: object = None) -> io.BytesIO:
        return io.BytesIO(_pack(fetch.fetch(request.full_url, self.policy)))


def _pack(fetched: fetch.Fetched) -> bytes:
    evidence = asdict(fetched)
    body: bytes = evidence.pop("body")
    head = json.dumps(evidence).encode()
    return struct.pack(">I", len(head)) + head + body


def _unpack(envelope: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack_from(">I", envelope)
    return json.loads(envelope[4 : 4 + length]), envelope[4 + length :]


class _StoredImage(bytes):
    """Image bytes on their way through img2dataset, with what the writer must know about them."""

    evidence: dict[str, Any]


@dataclass
class _Resizer:
    """Unpacks the opener's envelope and checks the image. Failures leave as JSON in img2dataset's error message."""

    max_pixels: int

    def __call__(self, stream: io.BytesIO, blurring_bbox_list: object = None) -> tuple[Any, ...]:
        evidence, body = _unpack(stream.getvalue())
        if evidence["code"] != "ok":
            return None, None, None, None, None, json.dumps(evidence)
        evidence["raw_sha256"] = ledger.digest_bytes(body)
        try:
            checked = images.check(body, self.max_pixels)
        except images.ImageRefused as refused:
            evidence.update(code=refused.code, detail=refused.detail)
            return None, None, None, None, None, json.dumps(evidence)
        stored = _StoredImage(checked.data)
        evidence.update(sha256=ledger.digest_bytes(stored), image_ext=checked.extension, bytes=len(stored))
        stored.evidence = evidence
        return stored, checked.width_px, checked.height_px, checked.width_px, checked.height_px, None


class PairWriter:
    """img2dataset's sample writer: puts rows into list order and commits the shard in ``close``.

    img2dataset prints and forgets what ``write`` raises, so a failure is kept here and raised from ``close``.
    """

    def __init__(
        self, shard_id: int, folder: str, save_caption: bool, oom_shard_count: int, columns: Any, encode_format: str,
        *, num_rows: int, finish: Any,
    ) -> None:  # fmt: skip
        from clips_data.tars import TarWriter

        self.unit, self.folder = schema.shard_name(shard_id), Path(folder)
        self.list_columns = [name for name in columns.names if name not in _IMG2DATASET_COLUMNS]
        self.list_schema = columns
        self.num_rows, self.finish = num_rows, finish
        self.rows: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.failure: OSError | None = None
        self._waiting: dict[int, tuple[bytes | None, dict[str, Any]]] = {}
        self._file = ledger.part(self.folder / f"{self.unit}.tar").open("wb")
        self._tar = TarWriter(self._file)

    def write(self, image: bytes | None, key: str, caption: str | None, meta: dict[str, Any]) -> None:
        """Takes rows as downloads finish and writes those whose turn has come."""
        self._waiting[int(key[-schema.KEY_DIGITS_IN_SHARD :])] = (image, meta)
        while (turn := len(self.rows)) in self._waiting:
            ready, about = self._waiting.pop(turn)
            row = self._row(schema.sample_key(int(self.unit), turn), ready, about)
            self.rows.append(row)
            self.counts[row["code"]] += 1
            if ready is not None and self.failure is None:
                try:
                    self._add(ready, row)
                except OSError as error:
                    self.failure = error

    def _row(self, key: str, image: bytes | None, meta: dict[str, Any]) -> dict[str, Any]:
        listed = {name: meta[name] for name in self.list_columns}
        if isinstance(image, _StoredImage):
            evidence, status = image.evidence, schema.STATUS_SUCCESS
        else:
            evidence = _evidence_of(meta["error_message"])
            status = "failed_to_resize" if "raw_sha256" in evidence else "failed_to_download"
        return {
            **listed,
            "key": key,
            "status": status,
            "code": evidence["code"],
            "error_message": evidence["detail"] or None,
            **{name: meta[name] for name in ("width", "height", "original_width", "original_height")},
            **{name: evidence.get(name) for name in _EVIDENCE_COLUMNS},
        }

    def _add(self, image: bytes, row: dict[str, Any]) -> None:
        key = row["key"]
        self._tar.add(f"{key}.{row['image_ext']}", image)
        self._tar.add(f"{key}.txt", (row.get("caption") or "").encode())
        self._tar.add(f"{key}.json", json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())

    def close(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self.failure:
                raise self.failure
            assert len(self.rows) == self.num_rows, f"{len(self.rows)} rows of {self.num_rows} arrived"
            self._tar.close()
        finally:
            self._file.close()
        table = pa.Table.from_pylist(self.rows, schema=self._table_schema(pa))
        pq.write_table(table, ledger.part(self.folder / f"{self.unit}.parquet"))
        self.finish(self.folder, self.unit, dict(self.counts))

    def _table_schema(self, pa: Any) -> pa.Schema:
        fields = [self.list_schema.field(name) for name in self.list_columns]
        fields += [pa.field(name, pa.string()) for name in ("key", "status", "code", "error_message")]
        fields += [pa.field(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
        fields += [pa.field(name, getattr(pa, kind)()) for name, kind in _EVIDENCE_COLUMNS.items()]
        return pa.schema(fields, metadata={"clips_schema_version": str(schema.SCHEMA_VERSION)})


_IMG2DATASET_COLUMNS = {"key", "status", "error_message", "width", "height", "original_width", "original_height"}
_EVIDENCE_COLUMNS = {
    "sha256": "string", "raw_sha256": "string", "image_ext": "string", "bytes": "int64", "final_url": "string",
    "attempts": "int32",
}  # fmt: skip


def _evidence_of(message: str) -> dict[str, Any]:
    """What the resizer said of a failure. Anything else is img2dataset's own refusal, of what is not even a URL."""
    if message.startswith("{"):
        evidence: dict[str, Any] = json.loads(message)
        return evidence
    return {"code": "bad_url", "detail": message, "attempts": 0}


def _commit(
    folder: Path, unit: str, counts: dict[str, int], *, inputs: dict[str, str], config: dict[str, Any], whole: bool
) -> None:
    if whole:
        ledger.commit(folder, unit, [f"{unit}.tar", f"{unit}.parquet"], inputs=inputs, config=config, counts=counts)
