"""Where the figures of a run go: the file, and other places where they are asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from clips_data.errors import UserError
from clips_train import metrics
from clips_train.metrics import MetricsFile, read_metrics


def test_metrics_are_cut_back_to_the_checkpoint_and_a_torn_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, last_step=0)
    for step in (1, 2, 3):
        file.append({"step": step, "loss": 0.5})
    file.close()
    with path.open("a") as torn:
        torn.write('{"step": 4, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    file = MetricsFile(path, last_step=2)
    file.append({"step": 3, "loss": 0.25})
    file.sync()
    file.close()
    assert read_metrics(path)[1:] == [{"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_metrics_refuse_what_json_cannot_hold(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    with pytest.raises(ValueError, match="JSON"):
        file.append({"step": 1, "loss": float("nan")})
    file.close()


def test_the_numbers_of_a_row_are_told_by_name_and_the_rest_is_left_out() -> None:
    row = {"step": 2, "batch_digest": "ab", "grad_norm": None, "counts": {"loaded": 8}}
    assert dict(metrics.figures(row)) == {"step": 2, "counts/loaded": 8}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_with_its_install_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"log_to {name} needs .* pip install {name}"):
        metrics.check_packages([name])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_weights_and_biases_takes_rows_offline_and_a_resumed_run_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    names = []
    for last_step in (0, 2, 0):
        (sink,) = metrics.open_sinks(["wandb"], tmp_path, {"name": "first"}, last_step=last_step)
        sink.append({"step": last_step + 1, "loss": 0.5, "counts": {"loaded": 8}})
        sink.close()
        names.append((tmp_path / "wandb_id.txt").read_text())
    assert names[0] == names[1] != names[2]
    assert any(names[0].encode() in str(path).encode() for path in (tmp_path / "wandb").rglob("*.wandb"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_weights_and_biases_that_cannot_begin_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def init(**settings: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"log_to wandb could not begin \(No API key.*WANDB_MODE=offline"):
        metrics.open_sinks(["wandb"], tmp_path, {}, last_step=0)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_takes_rows(tmp_path: Path) -> None:
    (sink,) = metrics.open_sinks(["tensorboard"], tmp_path, {}, last_step=0)
    sink.append({"step": 1, "loss": 0.5})
    sink.close()
    assert list((tmp_path / "tensorboard").iterdir())
