"""Long work inside a unit: an append-only file of JSON lines, flushed to disk per batch, with one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clips_data import ledger
from clips_data.errors import ResumeRefused, UserError


def remove_idle_journal(path: Path) -> None:
    """Removes the journal of finished work, unless a process that is about to do so has it open."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


class Journal:
    """Append-only JSON lines, flushed to disk per batch, so that a kill loses at most the batch in flight.

    The first line states what the rows were made from; a journal of other inputs or config is refused with
    ``ResumeRefused`` (or dropped with ``overwrite``: its rows are then in ``dropped``). A torn last line is cut off on
    opening. Raises ``UserError`` when another process has the journal open for longer than ``lock_wait_s``.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], *, overwrite: bool = False, lock_wait_s: float = 0.0
    ) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.dropped: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        self._lock(lock_wait_s)
        lines, intact_bytes = self._read()
        if lines and lines[0] != dict(header):
            if not overwrite:
                self._file.close()
                raise ResumeRefused(
                    f"{path} holds unfinished work of other inputs or another config:\n  "
                    + "\n  ".join(ledger.differences("", lines[0], header))
                    + "\nUse --overwrite to drop it, or --out with a new folder."
                )
            self.dropped, lines, intact_bytes = lines[1:], [], 0
        self.rows = lines[1:]
        self._file.truncate(intact_bytes)
        if not lines:
            self._write([dict(header)])

    def _lock(self, wait_s: float) -> None:
        end = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_in_place():
                    return
                self._file.close()
                self._file = self.path.open("ab")
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.2)
                    continue
                self._file.close()
                raise UserError(
                    f"Another process is at work on {self.path}. Wait for it, or give this one other shards (--slice) "
                    "or another --out."
                ) from None

    def _is_in_place(self) -> bool:
        """Whether the path still leads to the open file: who held the lock may have removed it, its work done."""
        try:
            return os.fstat(self._file.fileno()).st_ino == self.path.stat().st_ino
        except FileNotFoundError:
            return False

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        if not self.path.exists():
            return [], 0
        lines, intact_bytes = [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line))
            intact_bytes += len(line)
        return lines, intact_bytes

    def append(self, rows: list[dict[str, Any]]) -> None:
        self._write(rows)
        self.rows.extend(rows)

    def _write(self, rows: list[dict[str, Any]]) -> None:
        with ledger.readable_disk_errors(self.path):
            self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self, *, remove: bool = False) -> None:
        """Closes the file; ``remove`` deletes it once its rows are committed elsewhere."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()
