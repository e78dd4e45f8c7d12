"""Checkpoints that are either whole or absent.

``checkpoints/step-00000100/`` holds ``model.safetensors`` (weights of towers and decoder), ``state.pt`` (optimiser and
position in the data, loadable with ``weights_only``) and ``checkpoint.json`` (step and configs). The folder is written
as ``*.part``, flushed, renamed; then the file ``latest`` is replaced by one that names it. The last two are kept.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clips_data import ledger
from clips_data.errors import UserError
from clips_data.schema import SCHEMA_VERSION

CHECKPOINTS, LATEST = "checkpoints", "latest"
WEIGHTS, STATE, ABOUT = "model.safetensors", "state.pt", "checkpoint.json"
NUM_KEPT = 2
DIFFERENCES_SHOWN = 3


@dataclass(frozen=True)
class Progress:
    """Where a run stands. Together with the weights and the optimiser this is all that a resumed run needs.

    Not saved: generators (training draws nothing but from seed, epoch and key) and the time spent.
    """

    step: int
    """Optimiser steps taken."""
    samples: int
    """Samples trained on."""
    data: Mapping[str, Any]
    """State of the sample stream: data digest, seed, epoch, position, and what it has counted so far."""


def save(
    run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, config: Mapping[str, Any]
) -> Path:
    """Writes the checkpoint of this step under ``run`` and returns its folder. ``config`` is the resolved config."""
    folder = run / CHECKPOINTS / f"step-{progress.step:08d}"
    part = ledger.part(folder)
    with ledger.readable_disk_errors(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, part / WEIGHTS)
        torch.save({"optimizer": optimizer.state_dict(), **progress.__dict__}, part / STATE)
        about = {"schema_version": SCHEMA_VERSION, "step": progress.step, "samples": progress.samples, "config": config}
        (part / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
        publish(part, folder)
    ledger.write_bytes(run / CHECKPOINTS / LATEST, (folder.name + "\n").encode())
    _remove_older(run / CHECKPOINTS, folder.name)
    return folder


def publish(part: Path, folder: Path) -> None:
    """Makes the folder ``part`` appear as ``folder``, replacing an older one; all of it is on disk on return."""
    for file in part.iterdir():
        ledger.fsync_file(file)
    ledger.fsync_folder(part)
    old = ledger.part(folder.with_name(folder.name + ".old"))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)
    part.replace(folder)
    ledger.fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove_older(checkpoints: Path, newest: str) -> None:
    """Drops all but the last ``NUM_KEPT``, and what an earlier, killed run left half written or ahead of ``newest``."""
    found = sorted(path.name for path in checkpoints.glob("step-*"))
    whole = [name for name in found if name <= newest and not name.endswith(ledger.PART)]
    for name in set(found) - set(whole[-NUM_KEPT:]):
        shutil.rmtree(checkpoints / name)


def latest(run: Path) -> Path | None:
    """Folder of the newest whole checkpoint under ``run``, or ``None`` when there is none yet."""
    pointer = run / CHECKPOINTS / LATEST
    if not pointer.exists():
        return None
    folder = run / CHECKPOINTS / pointer.read_text().strip()
    if not (folder / ABOUT).is_file():
        raise UserError(
            f"{pointer} names {folder.name}, which is not there. Restore it, or start again with --overwrite."
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
    """The checkpoint's step, samples and resolved config."""
    about = json.loads((folder / ABOUT).read_text())
    if about.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{folder / ABOUT} has schema version {about.get('schema_version')}, this version of clips reads "
            f"{SCHEMA_VERSION}. Use the clips version that wrote it, or train again."
        )
    return dict(about)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Loads a checkpoint's weights into ``model``, all of them and exactly.

    Raises ``UserError`` naming what the file holds and what the config wants where they differ.
    """
    path = folder / WEIGHTS
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}). Restore it, or use another checkpoint.") from error
    differences = weight_differences(weights, model.state_dict())
    if differences:
        more = f" (and {len(differences) - DIFFERENCES_SHOWN} more)" if len(differences) > DIFFERENCES_SHOWN else ""
        raise UserError(
            f"{path} does not fit the model that the config describes: "
            + "; ".join(differences[:DIFFERENCES_SHOWN])
            + f"{more}. Use the config that the checkpoint was trained with, or another checkpoint."
        )
    model.load_state_dict(weights)


def weight_differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """One line for each name or shape in which a checkpoint and a model differ."""
    lines = []
    for name in sorted(set(found) | set(wanted)):
        there = list(found[name].shape) if name in found else "nothing"
        here = list(wanted[name].shape) if name in wanted else "nothing"
        if there != here:
            lines.append(f"{name} is {there} in the checkpoint and {here} in the model")
    return lines


def load_state(folder: Path, optimizer: torch.optim.Optimizer) -> Progress:
    """Restores the optimiser and returns where the run stood."""
    state = torch.load(folder / STATE, weights_only=True, map_location="cpu")
    optimizer.load_state_dict(state.pop("optimizer"))
    return Progress(**state)
