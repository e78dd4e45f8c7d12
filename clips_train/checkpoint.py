"""Checkpoints that are either whole or absent, written while training goes on.

``checkpoints/step-00000100/`` holds ``model.safetensors`` (weights of towers and decoder), ``ema.safetensors`` (their
moving average, where the run keeps one), ``state/`` (what the optimiser remembers, in safetensors files of
``torch.distributed.checkpoint``: any number of processes reads what any other number wrote) and ``checkpoint.json``
(where the run stands, and its config). Nothing in it is a pickle. With several processes ``state/`` is written by all
of them, so the folder must be one that all of them see.

The folder is written as ``*.part``, flushed, renamed; then the file ``latest`` is replaced by one that names it.
Older versions of clips wrote ``state.pt`` instead of ``state/``: their weights are read, such a run does not go on.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from clips_data import ledger
from clips_data.errors import UserError
from clips_data.schema import SCHEMA_VERSION
from clips_train.config import TrainConfig
from clips_train.sharded import shared_like

CHECKPOINTS, LATEST = "checkpoints", "latest"
WEIGHTS, AVERAGED, STATE, ABOUT = "model.safetensors", "ema.safetensors", "state", "checkpoint.json"
OLDER_STATE = "state.pt"
DIFFERENCES_SHOWN = 3


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Together with the weights and the optimiser this is all that a resumed run needs.

    Not saved: generators (training draws nothing but from seed, epoch and key) and the time spent.
    """

    step: int
    """Optimiser steps taken, those included whose update was left out."""
    samples: int
    """Samples trained on."""
    data: Mapping[str, Any]
    """State of the sample stream: data digest, seed, epoch, sample, and what all processes counted so far."""
    skipped_steps: int = 0
    """Steps whose update was left out."""
    skipped_in_row: int = 0
    recent_loss: float | None = None
    """Running mean, for the guard against spikes."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Those of the last step whose update was made."""
    logged_loss: float = 0.0
    """Sum of the losses of ``logged_steps`` steps whose update was made, those since the last row of metrics."""
    logged_steps: int = 0
    digest: str = ""
    """Of all keys and texts so far, in order."""
    gate_means: list[float] | None = None


@dataclass(frozen=True)
class State:
    """What a checkpoint is made of, copied to the CPU: training may go on while it is written."""

    weights: Mapping[str, Tensor]
    """Whole tensors; in the first process only."""
    averaged: Mapping[str, Tensor]
    """Likewise; empty without a moving average."""
    optimizer: Mapping[str, Tensor]
    """By ``MOMENT.PARAMETER``, in the shards that training has them in."""
    progress: Progress
    config: Mapping[str, Any] = field(default_factory=dict)
    """The resolved config."""


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step-{step:08d}"


def about_of(state: State, folder: Path) -> bytes:
    """The text of ``checkpoint.json``; ``folder`` holds the other files. Which of ``state/`` there are is stated."""
    about = {
        "schema_version": SCHEMA_VERSION,
        "step": state.progress.step,
        "samples": state.progress.samples,
        "progress": asdict(state.progress),
        STATE: _sizes_of(folder / STATE),
        "config": state.config,
    }
    return (json.dumps(about, indent=1, sort_keys=True) + "\n").encode()


def _sizes_of(folder: Path) -> dict[str, int]:
    """Bytes of each file."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir())}


def publish(part: Path, folder: Path) -> None:
    """Makes the folder ``part`` appear as ``folder``, replacing an older one; all of it is on disk on return."""
    for path in part.rglob("*"):
        ledger.fsync_folder(path) if path.is_dir() else ledger.fsync_file(path)
    ledger.fsync_folder(part)
    old = ledger.part(folder.with_name(folder.name + ".old"))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    part.replace(folder)
    ledger.fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_latest(run: Path, folder: Path, *, kept: int) -> None:
    """From now on ``folder`` is the checkpoint to go on from; of the older ones ``kept - 1`` stay."""
    ledger.write_bytes(run / CHECKPOINTS / LATEST, (folder.name + "\n").encode())
    _remove_older(run / CHECKPOINTS, folder.name, kept)


def _remove_older(checkpoints: Path, newest: str, kept: int) -> None:
    """Drops all but the last ``kept``, and what an earlier, killed run left half written or ahead of ``newest``."""
    found = sorted(path.name for path in checkpoints.glob("step-*"))
    whole = [name for name in found if name <= newest and not name.endswith(ledger.PART)]
    for name in set(found) - set(whole[-kept:]):
        shutil.rmtree(checkpoints / name)


# --- reading ----------------------------------------------------------------------------------------------------------


def latest(run: Path) -> Path | None:
    """Folder of the newest whole checkpoint under ``run``, or ``None`` when there is none yet."""
    pointer = run / CHECKPOINTS / LATEST
    if not pointer.exists():
        return None
    folder = run / CHECKPOINTS / pointer.read_text().strip()
    if not (folder / ABOUT).is_file():
        raise UserError(
            f"{pointer} names {folder.name}, which is not there. Restore it, or delete {run} and train again."
        )
    return folder


def find(path: Path) -> Path:
    """The checkpoint that ``path`` means: a checkpoint folder itself, or the newest one of a run's folder."""
    if (path / ABOUT).is_file():
        return path
    folder = latest(path)
    if folder is None:
        raise UserError(f"{path} holds no checkpoint. Name a run folder under runs/, or train one with `clips train`.")
    return folder


def read_about(folder: Path) -> dict[str, Any]:
    """The checkpoint's step, samples, progress and resolved config.

    Of a config by an older version of clips only what describes the model is kept.
    """
    about = json.loads((folder / ABOUT).read_text())
    if about.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder / ABOUT} has schema version {about.get('schema_version')}, this version of clips reads "
            f"{SCHEMA_VERSION}. Use the clips version that wrote it, or train again."
        )
    if "progress" not in about:
        about["config"] = _of_older(about["config"])
    return dict(about)


def _of_older(config: Mapping[str, Any]) -> dict[str, Any]:
    """Its only captioner was the paper's, and its condition the column of web captions."""
    known = {name: value for name, value in config.items() if name in TrainConfig.model_fields}
    return known | {"condition": config.get("web_column", "web")}


def weights_path(folder: Path, *, averaged: bool = True) -> Path:
    """The weights to use a checkpoint by: the moving average where the run kept one, or else the weights themselves.

    Evaluation, export, captioning and runs that start from a checkpoint take these. ``averaged=False`` is for going on.
    """
    path = folder / AVERAGED
    return path if averaged and path.is_file() else folder / WEIGHTS


def load_weights(folder: Path, model: nn.Module, *, averaged: bool = True) -> None:
    """Loads a checkpoint's weights (``weights_path``) into ``model``, all of them and exactly.

    Raises ``UserError`` naming what the file holds and what the config wants where they differ.
    """
    path = weights_path(folder, averaged=averaged)
    model.load_state_dict(read_weights(path, model.state_dict()))


def read_weights(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raises ``UserError`` as ``load_weights`` does."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error
    differences = weight_differences(weights, wanted)
    if differences:
        more = f" (and {len(differences) - DIFFERENCES_SHOWN} more)" if len(differences) > DIFFERENCES_SHOWN else ""
        raise UserError(
            f"{path} does not fit the model that the config describes: "
            + "; ".join(differences[:DIFFERENCES_SHOWN])
            + f"{more}. Use the config that the checkpoint was trained with, or another checkpoint."
        )
    return weights


def _unreadable(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path} cannot be read ({error}). Restore it, or use another checkpoint.")


def weight_differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """One line for each name or shape in which a checkpoint and a model differ."""
    lines = []
    for name in sorted(set(found) | set(wanted)):
        there = list(found[name].shape) if name in found else "nothing"
        here = list(wanted[name].shape) if name in wanted else "nothing"
        if there != here:
            lines.append(f"{name} is {there} in the checkpoint and {here} in the model")
    return lines


def read_progress(folder: Path) -> Progress:
    """Where the run stood. Raises ``UserError`` for a checkpoint of an older version of clips."""
    about = read_about(folder)
    if "progress" not in about:
        raise UserError(
            f"{folder} is a checkpoint of an older version of clips: training does not go on from it. Its weights can "
            f"be used: name it as --init of a new run, or start again with --overwrite."
        )
    return Progress(**about["progress"])


MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """What AdamW remembers, by ``MOMENT.PARAMETER``; parameters that were never updated have nothing."""
    found = {
        f"{moment}.{names[parameter]}": state[moment]
        for parameter, state in optimizer.state.items()
        for moment in MOMENTS
    }
    return dict(sorted(found.items()))


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> None:
    """Restores what the optimiser remembers, each process its own shards, whatever processes wrote them."""
    path = folder / STATE
    wanted: dict[str, Tensor] = {}
    try:
        _check_sizes(path, read_about(folder)[STATE])
        saved = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        for parameter, name in names.items():
            if parameter.requires_grad and f"step.{name}" in saved:
                wanted[f"step.{name}"] = torch.zeros((), device=parameter.device)
                wanted[f"exp_avg.{name}"] = torch.zeros_like(parameter)
                wanted[f"exp_avg_sq.{name}"] = torch.zeros_like(parameter)
        if wanted:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # each process reads by itself
            load(wanted, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise _unreadable(path, error) from error
    for parameter, name in names.items():
        if f"step.{name}" in wanted:
            optimizer.state[parameter] = {moment: wanted[f"{moment}.{name}"] for moment in MOMENTS}


def _check_sizes(folder: Path, promised: Mapping[str, int]) -> None:
    """What a missing file held would otherwise be taken for parameters that were never updated."""
    found = _sizes_of(folder)
    for name, num_bytes in promised.items():
        if found.get(name) != num_bytes:
            raise OSError(f"{name} has {found.get(name, 'no')} bytes where {num_bytes} were written")


def load_averaged(folder: Path, into: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Restores a moving average. ``wanted`` has the names and whole shapes of all weights, ``into`` may hold shards."""
    weights = read_weights(folder / AVERAGED, wanted)
    with torch.no_grad():
        for name, mine in into.items():
            mine.copy_(shared_like(weights[name], mine))
