"""``metrics.jsonl``: one JSON object a line, appended as training goes, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clips_data import ledger


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last line torn by a kill is left out. Empty when there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


class MetricsFile:
    """Appends rows; each has at least ``step``. Rows later than ``last_step`` are dropped on opening."""

    def __init__(self, path: Path, *, last_step: int) -> None:
        rows = [row for row in read_metrics(path) if row["step"] <= last_step]
        ledger.write_bytes(path, "".join(_line(row) for row in rows).encode())
        self._path = path
        self._file = path.open("ab")

    def append(self, row: Mapping[str, Any]) -> None:
        with ledger.readable_disk_errors(self._path):
            self._file.write(_line(row).encode())
            self._file.flush()

    def sync(self) -> None:
        """Puts all rows on disk. Called before a checkpoint, which promises the rows up to its step."""
        with ledger.readable_disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
