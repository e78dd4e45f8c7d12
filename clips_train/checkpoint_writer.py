"""Writes checkpoints in a thread of its own, so that training waits only while its state is copied."""

from __future__ import annotations

import errno
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from clips_data import ledger
from clips_train import checkpoint
from clips_train.checkpoint import State
from clips_train.distributed import TIMEOUT, World


class CheckpointWriter:
    """The writer of one run, in each of its processes. At most one checkpoint is on its way at any time.

    ``save`` and ``wait`` are calls that all processes make.
    """

    def __init__(self, run: Path, world: World, *, kept: int) -> None:
        self._run, self._world, self._kept = run, world, kept
        # Its own group: the thread's exchanges must not mingle with those of training.
        self._group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; ``wait`` then raises why."""
        return self._failure is not None

    def save(self, state: State) -> None:
        """Begins to write ``state``, which is the writer's from now on, once the checkpoint before it is done."""
        self.wait()
        self._thread = threading.Thread(target=self._run_thread, args=(state,), name="clips-checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is on its way. Raises ``UserError`` when the disk took no checkpoint."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Lets what is on its way come to its end, well or not; for a run that ends with an error of its own."""
        if self._thread is not None:
            self._thread.join()

    def _run_thread(self, state: State) -> None:
        try:
            write(self._run, state, self._world, kept=self._kept, group=self._group)
        except Exception as error:  # raised again by ``wait``, in the thread that trains
            self._failure = error


def write(run: Path, state: State, world: World, *, kept: int, group: Any = None) -> None:
    """Writes a checkpoint, by all processes together, and makes it the latest."""
    folder = checkpoint.folder_of(run, state.progress.step)
    part = ledger.part(folder)

    def begin() -> None:
        shutil.rmtree(part, ignore_errors=True)
        (part / checkpoint.STATE).mkdir(parents=True)
        _save_file(state.weights, part / checkpoint.WEIGHTS)
        if state.averaged:
            _save_file(state.averaged, part / checkpoint.AVERAGED)

    def finish() -> None:
        (part / checkpoint.ABOUT).write_bytes(checkpoint.about_of(state, part))
        checkpoint.publish(part, folder)
        checkpoint.make_latest(run, folder, kept=kept)

    with ledger.readable_disk_errors(folder):
        _by_first(begin, world, group)
        _save_state(state.optimizer, part / checkpoint.STATE, world, group)
        _by_first(finish, world, group)


def _by_first(work: Callable[[], None], world: World, group: Any) -> None:
    """The first process works, all others wait for it; what goes wrong is raised in all."""
    outcome: list[Any] = [None]
    if world.is_first:
        try:
            work()
        except Exception as error:  # raised below, here and in the processes that would wait for ever
            outcome[0] = error
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]


def _save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        raise _as_disk_error(error) from error


def _save_state(tensors: Mapping[str, Tensor], folder: Path, world: World, group: Any) -> None:
    """Each process writes its shards, and its part of what all of them have."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant to be one
    try:
        state_dict_saver.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=world.size == 1)
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            raise (cause if isinstance(cause, OSError) else error) from error


def _as_disk_error(error: SafetensorError) -> Exception:
    """safetensors writes in Rust, and tells what the system said in words only."""
    code = re.search(r"(?:code: |os error )(\d+)", str(error))
    return OSError(int(code[1]), errno.errorcode.get(int(code[1]), "error")) if code else error
