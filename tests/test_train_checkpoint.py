"""Checkpoints and metrics: whole or absent, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clips_data.errors import UserError
from clips_train import checkpoint
from clips_train.checkpoint import Progress
from clips_train.metrics import MetricsFile, read_metrics


def trained(steps: int = 1) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return model, optimizer


def save(run: Path, step: int, **data: Any) -> Path:
    model, optimizer = trained(step)
    return checkpoint.save(run, model, optimizer, Progress(step, step * 8, data), {"seed": 0})


def test_weights_optimiser_and_progress_come_back_as_they_were(tmp_path: Path) -> None:
    model, optimizer = trained(3)
    progress = Progress(3, 24, {"epoch": 1, "counts": {"loaded": 24}})
    folder = checkpoint.save(tmp_path, model, optimizer, progress, {"seed": 0})
    other, fresh = trained(0)
    checkpoint.load_weights(folder, other)
    assert checkpoint.load_state(folder, fresh) == progress
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    old, new = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert old.keys() == new.keys() and len(new) == 2
    for number in old:
        assert all(torch.equal(old[number][name], new[number][name]) for name in old[number])
    assert checkpoint.read_about(folder)["config"] == {"seed": 0}


def test_the_last_two_are_kept_and_latest_names_the_newest(tmp_path: Path) -> None:
    folders = [save(tmp_path, step) for step in (1, 2, 3)]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000002", "step-00000003"]
    assert checkpoint.latest(tmp_path) == checkpoint.find(tmp_path) == folders[-1]
    assert checkpoint.find(folders[1]) == folders[1]


def test_a_kill_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def killed(*anything: object) -> None:
        raise KeyboardInterrupt

    for where in ("publish", "save_file", "_remove_older"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, where, killed)
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


def test_weights_that_do_not_fit_are_refused_naming_both_sides(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(UserError, match=r"weight is \[2, 3\] in the checkpoint and \[2, 4\] in the model"):
        checkpoint.load_weights(folder, nn.Linear(4, 2))
    with pytest.raises(UserError, match=r"bias is \[2\] in the checkpoint and nothing in the model"):
        checkpoint.load_weights(folder, nn.Linear(3, 2, bias=False))
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load_weights(folder, nn.Linear(3, 2))


def test_a_folder_without_a_checkpoint_or_with_a_dangling_pointer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000009\n")
    with pytest.raises(UserError, match="step-00000009"):
        checkpoint.latest(tmp_path)


def test_metrics_are_cut_back_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, last_step=0)
    for step in (1, 2, 3):
        metrics.append({"step": step, "loss": 0.5})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    metrics = MetricsFile(path, last_step=2)
    metrics.append({"step": 3, "loss": 0.25})
    metrics.sync()
    metrics.close()
    assert read_metrics(path)[1:] == [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_metrics_refuse_what_json_cannot_hold(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    with pytest.raises(ValueError, match="JSON"):
        metrics.append({"step": 1, "loss": float("nan")})
    metrics.close()
