"""Whether the checkpoints of a training run are whole, as far as their own headers and checksums tell."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from clips_data import ledger, schema

FOLDER: Final = "checkpoints"
_WEIGHTS, _STATE, _ABOUT = "model.safetensors", "state", "checkpoint.json"
_OLDER_STATE = "state.pt"


def compare(run: Path) -> Iterator[tuple[Path, str]]:
    """The files of checkpoints that are missing, cut or damaged, each with what is wrong. Nothing is unpickled."""
    for begun in [*sorted(run.glob("stages/*")), run]:
        yield from _compare(begun)


def _compare(run: Path) -> Iterator[tuple[Path, str]]:
    pointer = run / FOLDER / "latest"
    if pointer.is_file() and not (named := pointer.parent / pointer.read_text(errors="replace").strip()).is_dir():
        yield pointer, f"names {named.name}, which is not there"
    for folder in sorted((run / FOLDER).glob("step-*")):
        if folder.name.endswith(ledger.PART):
            continue
        for path, problem_of in _files(folder):
            if reason := problem_of(path) if path.is_file() else "is missing":
                yield path, reason


def _files(folder: Path) -> Iterator[tuple[Path, Callable[[Path], str | None]]]:
    """What a checkpoint must have, and what else of its tensors it has, each with what finds its damage."""
    yield folder / _WEIGHTS, _of_weights
    yield folder / _ABOUT, _of_about
    yield from ((path, _of_weights) for path in sorted(folder.glob("ema.safetensors")))
    older, state = folder / _OLDER_STATE, folder / _STATE
    shards = sorted(state.glob("*.safetensors"))
    if shards:
        yield from ((path, _of_weights) for path in shards)
    else:
        yield (older, _of_state) if older.exists() or not state.is_dir() else (state / "*.safetensors", _of_weights)


def _of_weights(path: Path) -> str | None:
    """The header of safetensors says where each tensor ends; the last one ends where the file does."""
    size_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > size_bytes - 8:
                return f"has a header of {header_bytes} bytes in a file of {size_bytes}"
            header = json.loads(file.read(header_bytes))
        end = max((int(about["data_offsets"][1]) for n, about in header.items() if n != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"has a damaged header ({type(error).__name__})"
    wanted = 8 + header_bytes + end
    return None if size_bytes == wanted else f"has {size_bytes} bytes, and its tensors end at byte {wanted}"


def _of_state(path: Path) -> str | None:
    """torch writes zip archives, whose members have checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"is damaged: {error}"
    return None if damaged is None else f"has a damaged member {damaged}"


def _of_about(path: Path) -> str | None:
    try:
        about = json.loads(path.read_text())
        version, step = about["schema_version"], int(about["step"])
    except (ValueError, KeyError, TypeError):
        return "is not what clips wrote"
    if version != schema.SCHEMA_VERSION:
        return f"has schema version {version}, this version of clips reads {schema.SCHEMA_VERSION}"
    wanted = f"step-{step:08d}"
    return None if path.parent.name == wanted else f"is of step {step} and lies in {path.parent.name}"
