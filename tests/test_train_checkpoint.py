"""Checkpoints: whole or absent, written beside the training, and what does not fit is named."""

from __future__ import annotations

import errno
import json
import resource
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bytemaker import small_vocabulary  # noqa: F401
from safetensors import safe_open
from torch import Tensor, nn

from clips_data.errors import UserError
from clips_train import checkpoint, checkpoint_writer
from clips_train.checkpoint import Progress, State
from clips_train.checkpoint_writer import CheckpointWriter
from clips_train.distributed import World

ALONE = World.alone()


def trained(steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def state(model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress, **averaged: Tensor) -> State:
    tensors = checkpoint.optimizer_tensors(optimizer, names_of(model))
    return State(model.state_dict(), averaged, tensors, progress, {"seed": 0})


def save(run: Path, step: int, *, kept: int = 2, **data: Any) -> Path:
    checkpoint_writer.write(run, state(*trained(step), Progress(step, step * 8, data)), ALONE, kept=kept)
    return checkpoint.folder_of(run, step)


def test_weights_optimiser_and_progress_come_back_as_they_were(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    progress = Progress(
        3, 24, {"epoch": 1, "counts": {"loaded": 24}}, skipped_steps=1, skipped_in_row=1, recent_loss=0.1 + 0.2,
        losses={"total": 1 / 3}, logged_loss=0.7, logged_steps=2, digest="ab", gate_means=[0.1, 0.2, 0.3],
    )  # fmt: skip
    checkpoint_writer.write(tmp_path, state(model, optimizer, progress), ALONE, kept=2)
    folder = checkpoint.find(tmp_path)
    other, fresh = trained(0)
    checkpoint.load_weights(folder, other)
    checkpoint.load_optimizer(folder, fresh, names_of(other))
    assert checkpoint.read_progress(folder) == progress
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys() and len(new) == 2
    for number in old:
        assert all(torch.equal(old[number][name], new[number][name]) for name in old[number])
    assert checkpoint.read_about(folder)["config"] == {"seed": 0}


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path: Path) -> None:
    files = [path for path in save(tmp_path, 1).rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "checkpoint.json"} and len(files) == 3
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            with safe_open(path, "pt") as tensors:
                assert tensors.keys()


def test_the_moving_average_is_what_a_checkpoint_is_used_by_and_the_weights_are_what_training_goes_on_with(
    tmp_path: Path,
) -> None:
    model, optimizer = trained()
    averaged = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    checkpoint_writer.write(tmp_path, state(model, optimizer, Progress(1, 8, {}), **averaged), ALONE, kept=2)
    used, going_on = nn.Linear(3, 2), nn.Linear(3, 2)
    checkpoint.load_weights(checkpoint.find(tmp_path), used)
    checkpoint.load_weights(checkpoint.find(tmp_path), going_on, averaged=False)
    assert torch.equal(used.weight, model.weight + 1) and torch.equal(going_on.weight, model.weight)


def test_as_many_as_asked_for_are_kept_and_latest_names_the_newest(tmp_path: Path) -> None:
    folders = [save(tmp_path, step, kept=3) for step in (1, 2, 3, 4)]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000002", "step-00000003", "step-00000004"]
    assert checkpoint.latest(tmp_path) == checkpoint.find(tmp_path) == folders[-1]
    assert checkpoint.find(folders[1]) == folders[1]


def test_a_kill_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def killed(*anything: object, **more: object) -> None:
        raise KeyboardInterrupt

    places = ((checkpoint_writer, "save_file"), (checkpoint_writer.state_dict_saver, "save"), (checkpoint, "publish"))
    for module, where in (*places, (checkpoint, "_remove_older")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, where, killed)
            save(tmp_path, 2)
        folder = checkpoint.find(tmp_path)
        assert checkpoint.read_about(folder)["step"] == (2 if where == "_remove_older" else 1)
    save(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest", "step-00000001", "step-00000002",
    ]  # fmt: skip


def test_what_a_killed_run_left_ahead_of_its_checkpoint_goes_with_the_next_one(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "checkpoints" / "latest").unlink()
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    assert not (tmp_path / "checkpoints" / "step-00000005").exists()


def test_writing_goes_on_beside_training_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = CheckpointWriter(tmp_path, ALONE, kept=2)
    may_publish = threading.Event()
    publish = checkpoint.publish

    def slowly(part: Path, folder: Path) -> None:
        assert may_publish.wait(60)
        publish(part, folder)

    monkeypatch.setattr(checkpoint, "publish", slowly)
    model, optimizer = trained()
    writer.save(state(model, optimizer, Progress(1, 8, {})))
    assert checkpoint.latest(tmp_path) is None and not writer.failed
    may_publish.set()
    writer.save(state(model, optimizer, Progress(2, 16, {})))
    assert checkpoint.find(tmp_path).name in ("step-00000001", "step-00000002")
    writer.wait()
    assert checkpoint.find(tmp_path).name == "step-00000002"


@pytest.mark.parametrize("fails", ["weights", "state", "about"])
def test_a_full_disk_is_told_in_a_sentence_and_the_checkpoint_before_stays(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, ALONE, kept=2)
    model, optimizer = trained()
    whole = state(model, optimizer, Progress(2, 16, {}))
    if fails == "about":

        def full(folder: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoint.ledger, "fsync_folder", full)
        writer.save(whole)
        with pytest.raises(UserError, match="the disk is full"):
            writer.wait()
    else:
        large = torch.zeros(50_000)
        whole = replace(
            whole, **({"weights": {"w": large}} if fails == "weights" else {"optimizer": {"step.w": large}})
        )
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # of a file, in bytes: a disk that is full
        try:
            writer.save(whole)
            with pytest.raises(UserError, match=r"Could not write under .*step-00000002: the file size limit"):
                writer.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoint.find(tmp_path).name == "step-00000001"
    writer.wait()  # told once


def test_weights_that_do_not_fit_are_refused_naming_both_sides(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"weight is \[2, 3\] in the checkpoint and \[2, 4\] in the model"):
        checkpoint.load_weights(folder, nn.Linear(4, 2))
    with pytest.raises(UserError, match=r"bias is \[2\] in the checkpoint and nothing in the model"):
        checkpoint.load_weights(folder, nn.Linear(3, 2, bias=False))
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_weights(folder, nn.Linear(3, 2))


@pytest.mark.parametrize("damage", ["torn", "gone"])
def test_a_damaged_optimiser_state_is_refused_with_its_place(tmp_path: Path, damage: str) -> None:
    folder = save(tmp_path, 1)
    (path,) = (folder / "state").iterdir()
    path.write_bytes(b"torn") if damage == "torn" else path.unlink()
    model, optimizer = trained(0)
    with pytest.raises(UserError, match=r"step-00000001/state cannot be read"):
        checkpoint.load_optimizer(folder, optimizer, names_of(model))


def test_a_folder_without_a_checkpoint_or_with_a_dangling_pointer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009\n")
    with pytest.raises(UserError, match=r"step-00000009, which is not there. Restore it, or delete .* and train again"):
        checkpoint.latest(tmp_path)


def test_of_an_older_checkpoint_the_model_is_read_and_training_does_not_go_on(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    about = json.loads((folder / "checkpoint.json").read_text())
    del about["progress"]
    about["config"] = {"size": "tiny", "decoder": True, "web_column": "alt", "reduce": "one_piece", "tokens": 80}
    (folder / "checkpoint.json").write_text(json.dumps(about))
    (folder / "state.pt").write_bytes(b"")
    assert checkpoint.read_about(folder)["config"] == {"size": "tiny", "decoder": True, "condition": "alt"}
    with pytest.raises(UserError, match=r"older version .* --init"):
        checkpoint.read_progress(folder)
