"""img2dataset's sample writer, ours: rows in list order, a tar and a table per shard, committed by the ledger."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from clips_data import ledger, schema
from clips_data.redact import host_of, redact, without_secrets

if TYPE_CHECKING:
    import pyarrow as pa

_EVIDENCE: Final = (
    "sha256", "raw_sha256", "image_ext", "bytes", "orientation", "phash", "final_url", "attempts", "evidence",
    "duplicate_of",
)  # fmt: skip
_FROM_IMG2DATASET: Final = ("width", "height", "original_width", "original_height")


_MAX_WAITING_BYTES: Final = 64 << 20


class StoredImage(bytes):
    """Image bytes on their way through img2dataset, with what the writer must know about them."""

    evidence: dict[str, Any]


class _Waiting:
    """Samples whose turn has not come. One slow row can hold up a whole shard, so images wait on disk beyond a cap."""

    def __init__(self, spill: Path) -> None:
        self._samples: dict[int, tuple[StoredImage | None, Mapping[str, Any], tuple[int, int] | None]] = {}
        self._spill_path, self._num_bytes = spill, 0
        self._file: BinaryIO | None = None

    def __contains__(self, turn: int) -> bool:
        return turn in self._samples

    def put(self, turn: int, image: StoredImage | None, meta: Mapping[str, Any]) -> None:
        place = None
        if image is not None and self._num_bytes + len(image) > _MAX_WAITING_BYTES:
            if self._file is None:
                self._file = self._spill_path.open("w+b")
            place = self._file.seek(0, os.SEEK_END), self._file.write(image)
            evidence, image = image.evidence, StoredImage()
            image.evidence = evidence
        self._num_bytes += len(image or b"")
        self._samples[turn] = image, meta, place

    def take(self, turn: int) -> tuple[StoredImage | None, Mapping[str, Any]]:
        image, meta, place = self._samples.pop(turn)
        self._num_bytes -= len(image or b"")
        if image is not None and place is not None and self._file is not None:
            self._file.seek(place[0])
            evidence, image = image.evidence, StoredImage(self._file.read(place[1]))
            image.evidence = evidence
        return image, meta

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._spill_path.unlink()


class PairWriter:
    """Takes samples as they finish, writes each when its turn has come, and commits the shard in ``close``.

    ``urls`` are the rows' own URLs (img2dataset knows them by number only, so that none is in what it prints);
    ``finish(folder, unit, counts)`` commits. img2dataset prints and forgets what ``write`` raises, so a failure is kept
    here and raised from ``close``.
    """

    def __init__(
        self, shard_id: int, folder: str, save_caption: bool, oom_shard_count: int, columns: Any, encode_format: str,
        *, urls: list[str], finish: Callable[[Path, str, dict[str, int]], None],
    ) -> None:  # fmt: skip
        from clips_data.tars import TarWriter

        self.unit, self.folder, self.urls, self.finish = schema.shard_name(shard_id), Path(folder), urls, finish
        self.list_schema: pa.Schema = columns
        self.list_columns = [name for name in columns.names if name not in schema.PAIR_COLUMNS]
        self.counts: Counter[str] = Counter()
        self.statuses: Counter[str] = Counter()
        self.rows: list[dict[str, Any]] = []
        self.failure: OSError | None = None
        self._waiting = _Waiting(ledger.part(self.folder / f"{self.unit}.waiting"))
        self._file = ledger.part(self.folder / f"{self.unit}.tar").open("wb")
        self._tar = TarWriter(self._file)

    def write(self, image: StoredImage | None, key: str, caption: str | None, meta: Mapping[str, Any]) -> None:
        self._waiting.put(int(key[-schema.KEY_DIGITS_IN_SHARD :]), image, meta)
        while (turn := len(self.rows)) in self._waiting:
            ready, about = self._waiting.take(turn)
            row = self._row(turn, ready, about)
            self.rows.append(row)
            self.counts[row["code"]] += 1
            self.statuses[row["status"]] += 1
            if ready is not None and self.failure is None:
                try:
                    self._add(ready, row)
                except OSError as error:
                    self.failure = error

    def _row(self, turn: int, image: StoredImage | None, meta: Mapping[str, Any]) -> dict[str, Any]:
        url = self.urls[turn]
        if image is not None:
            evidence, status = image.evidence, schema.STATUS_SUCCESS
        else:
            evidence = evidence_of(meta["error_message"])
            status = "failed_to_resize" if "raw_sha256" in evidence else "failed_to_download"
        key = schema.sample_key(int(self.unit), turn)
        row = dict.fromkeys((*self.list_columns, *schema.PAIR_COLUMNS))
        if evidence["code"] == "forgotten":  # nothing of what was forgotten comes back
            kept = {"key": key, "status": "failed_to_download", "code": "forgotten"}
            return row | kept | {"retry_of": meta.get("retry_of")}
        row |= {name: without_secrets(meta[name]) for name in self.list_columns}
        row |= {name: meta[name] for name in _FROM_IMG2DATASET}
        row |= {name: evidence.get(name) or None for name in _EVIDENCE}
        return row | {
            "url": redact(url),
            "host": host_of(url),
            "key": key,
            "status": status,
            "code": evidence["code"],
            "error_message": evidence["detail"] or None,
            "retry_of": meta.get("retry_of"),
        }

    def _add(self, image: bytes, row: dict[str, Any]) -> None:
        key = row["key"]
        self._tar.add(f"{key}.{row['image_ext']}", image)
        self._tar.add(f"{key}.txt", (row.get("caption") or "").encode())
        known = {name: value for name, value in row.items() if value is not None and value == value}  # JSON has no NaN
        self._tar.add(f"{key}.json", json.dumps(known, sort_keys=True, ensure_ascii=False, default=str).encode())

    def close(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            if self.failure:
                raise self.failure
            assert len(self.rows) == len(self.urls), f"{len(self.rows)} rows of {len(self.urls)} arrived"
            self._tar.close()
        finally:
            self._file.close()
            self._waiting.close()
        table = pa.Table.from_pylist(self.rows, schema=pairs_schema(self.list_schema, self.list_columns))
        pq.write_table(table, ledger.part(self.folder / f"{self.unit}.parquet"))
        self.finish(self.folder, self.unit, dict(self.counts))


def pairs_schema(list_schema: pa.Schema, list_columns: list[str]) -> pa.Schema:
    """The columns of a pairs table: those of the list first, then ``schema.PAIR_COLUMNS``."""
    import pyarrow as pa

    fields = [list_schema.field(name) for name in list_columns]
    fields += [pa.field(name, getattr(pa, kind)()) for name, kind in schema.PAIR_COLUMNS.items()]
    return pa.schema(fields, metadata={"clips_schema_version": str(schema.SCHEMA_VERSION)})


def evidence_of(message: str) -> dict[str, Any]:
    """What our resizer said of a failure. Anything else went wrong inside img2dataset."""
    if message.startswith("{"):
        evidence: dict[str, Any] = json.loads(message)
        return evidence
    return {"code": "internal", "detail": message, "attempts": 0}
