"""Killed again and again, and gone on with by other numbers of processes and workers, a run sees what it would have."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import shardmaker
import torch
from bytemaker import small_vocabulary  # noqa: F401
from ranks import fork_server  # noqa: F401
from safetensors.torch import load_file

from clips_train import checkpoint
from clips_train.config import TrainConfig
from clips_train.metrics import read_metrics
from clips_train.train import train

NUM_STEPS = 24
PLACES = ("update", "log", "save", "weights", "state", "publish", "latest")
SEEN = ("step", "samples", "epoch", "batch_digest", "counts", "learning_rate")


def config(**change: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "size": "tiny", "image_px": 16, "context_length": 8, "target_length": 8, "batch": 8, "samples": NUM_STEPS * 8,
        "lr": 1e-4, "warmup_samples": 8, "checkpoint_samples": 16, "log_steps": 1, "precision": "fp32",
        "device": "cpu", "decoder": "none", "caption_weight": 0, "ema": 0.9,
        "views": [{"from": {"web": 0.8, "synthetic": 0.2}}, {"from": "synthetic", "reduce": "one_piece"}],
    }  # fmt: skip
    return TrainConfig(**settings | change)


def train_until(settings: TrainConfig, folder: Path, place: str, step: int, rank: int) -> None:
    """Trains; one process kills itself when the run reaches a place of a step."""
    from clips_train import checkpoint, checkpoint_writer
    from clips_train.run import Run

    reached = 0

    def die_at(owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def dying(*arguments: Any, **named: Any) -> Any:
            if reached >= step and os.environ.get("RANK", "0") == str(rank):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        setattr(owner, name, dying)

    take_step = Run.take_step

    def counted(self: Run, *arguments: Any) -> bool:
        nonlocal reached
        reached = self.progress.step + 1
        return take_step(self, *arguments)

    places: dict[str, tuple[Any, str]] = {
        "update": (Run, "_update"),
        "log": (Run, "log_when_due"),
        "save": (Run, "save"),
        "weights": (checkpoint_writer, "save_file"),
        "state": (checkpoint_writer.state_dict_saver, "save"),
        "publish": (checkpoint, "publish"),
        "latest": (checkpoint, "make_latest"),
    }
    if place in places:
        die_at(*places[place])
    Run.take_step = counted  # type: ignore[method-assign]
    train(settings, shards=folder / "shards", out=folder / "run", quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, some of whose samples cannot be used, and a run that nothing disturbed."""
    torch.set_num_threads(1)

    def change(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return (b"no image" if number in (5, 11) else image), about

    folder = tmp_path_factory.mktemp("resume")
    shardmaker.write_shards(folder / "shards", num_train=44, size_px=24, change=change)
    train(config(), shards=folder / "shards", out=folder / "undisturbed", quiet=True)
    return folder


@pytest.mark.parametrize("num_kills", [4, pytest.param(10, marks=pytest.mark.long)])
def test_a_run_killed_again_and_again_goes_on_with_the_samples_and_texts_it_would_have_seen(
    folder: Path, tmp_path: Path, num_kills: int
) -> None:
    """Each time with another number of processes and workers, killed in another place."""
    draw = random.Random(7)
    kills = 0
    undisturbed_run = folder / "undisturbed"
    (tmp_path / "shards").symlink_to(folder / "shards")
    folder = tmp_path
    for attempt in range(num_kills):
        stood = checkpoint.latest(folder / "run")
        step = (checkpoint.read_about(stood)["step"] if stood else 0) + draw.choice((1, 2, 3))
        size = 1 + attempt % 2
        place = PLACES[attempt % len(PLACES)]
        rank = draw.randrange(size) if place in ("update", "log", "save", "state") else 0
        settings = config(num_workers=attempt // 3 % 2, accumulation=1 + attempt // 2 % 2)
        found = ranks.run(train_until, size, settings, folder, place, step, rank)
        kills += found[rank] is not None
        assert not (folder / "run" / "train.done.json").exists()
    assert kills == num_kills
    assert ranks.run(train_until, 2, config(parallel="fsdp"), folder, "", 0, 0) == [None, None]
    rows, expected = (read_metrics(run / "metrics.jsonl") for run in (folder / "run", undisturbed_run))
    assert [row["step"] for row in rows] == [*range(1, NUM_STEPS + 1)]
    for row, undisturbed in zip(rows, expected, strict=True):
        assert {name: row[name] for name in SEEN} == {name: undisturbed[name] for name in SEEN}
        assert row["loss"] == pytest.approx(undisturbed["loss"], rel=1e-3)
    assert expected[-1]["counts"]["bad.not_an_image"] > 0


@pytest.mark.parametrize("place", ["update", "publish"])
def test_after_sigkill_a_run_of_equal_topology_ends_with_the_very_same_weights(folder: Path, place: str) -> None:
    again = folder / place
    again.mkdir()
    (again / "shards").symlink_to(folder / "shards")
    (found,) = ranks.run(train_until, 1, config(), again, place, 5, 0)
    assert found.args[0] == "killed"
    stood = checkpoint.latest(again / "run")
    assert stood is not None and 2 <= checkpoint.read_about(stood)["step"] < 6
    train(config(), shards=folder / "shards", out=again / "run", quiet=True)
    for name in (checkpoint.WEIGHTS, checkpoint.AVERAGED):
        weights, expected = (load_file(checkpoint.find(run) / name) for run in (again / "run", folder / "undisturbed"))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[each], expected[each]) for each in expected)
    times = ("step_s", "samples_per_s", "tokens_per_s", "data_wait_share", "model_tflops_per_s")
    rows, undisturbed = (
        [{name: value for name, value in row.items() if name not in times} for row in read_metrics(path)]
        for path in (again / "run" / "metrics.jsonl", folder / "undisturbed" / "metrics.jsonl")
    )
    assert rows == undisturbed


def test_two_runs_at_once_in_one_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    from clips_data.errors import UserError
    from clips_train.run import Run

    original = Run.take_step

    def take_step(self: Run, *arguments: Any) -> bool:
        with pytest.raises(UserError, match="Another process is at work"):
            train(config(samples=8), shards=folder / "shards", out=tmp_path, quiet=True)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "take_step", take_step)
        train(config(samples=8), shards=folder / "shards", out=tmp_path, quiet=True)
