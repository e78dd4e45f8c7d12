"""``metrics.jsonl``: one JSON object a line, appended as training goes, cut back to the checkpoint on resume.

The same rows go to TensorBoard and Weights & Biases where a run asks for it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from clips_data import ledger
from clips_data.errors import UserError

INSTALL_LINES = {"tensorboard": "pip install tensorboard", "wandb": "pip install wandb"}


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


# --- other places -----------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Takes rows of metrics as they come."""

    def append(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def check_packages(names: Sequence[str]) -> None:
    """Raises ``UserError`` for a package of ``log_to`` that is missing; asked before a model is built."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"log_to {name} needs the package {name}, which is not installed. {INSTALL_LINES[name]}")


def open_sinks(names: Sequence[str], folder: Path, config: Mapping[str, Any], *, last_step: int) -> list[Sink]:
    """What ``log_to`` names, for a run in ``folder``."""
    kinds: dict[str, Callable[..., Sink]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [kinds[name](folder, config, last_step) for name in names]


def figures(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a row by name, nested ones as ``counts/loaded``."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from figures(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


class TensorBoard:
    """Event files in ``tensorboard/``; what a resumed run does again replaces what was there."""

    def __init__(self, folder: Path, config: Mapping[str, Any], last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1 if last_step else None)

    def append(self, row: Mapping[str, Any]) -> None:
        for name, value in figures(row):
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of project ``clips``, unless WANDB_PROJECT names another. A resumed run goes on where its metrics ended."""

    ID = "wandb_id.txt"

    def __init__(self, folder: Path, config: Mapping[str, Any], last_step: int) -> None:
        import wandb

        path = folder / self.ID
        if not (last_step and path.is_file()):
            ledger.write_bytes(path, secrets.token_hex(8).encode())
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "clips"),
                name=config.get("name"),
                id=path.read_text(),
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )
        except wandb.Error as error:
            raise UserError(
                f"log_to wandb could not begin ({' '.join(str(error).split())}). Mend that, set WANDB_MODE=offline to "
                "send the metrics later, or leave wandb out of log_to: metrics.jsonl is written in any case."
            ) from error

    def append(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(figures(row)), step=row["step"])

    def close(self) -> None:
        self._run.finish()
