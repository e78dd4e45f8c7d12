"""The training step and loop: gradients, accumulation, resumption after any kind of stop, refusals."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shardmaker
import torch

from clips_data.errors import Interrupted, ResumeRefused, UserError
from clips_train import checkpoint, step
from clips_train import train as train_module
from clips_train.config import TrainConfig
from clips_train.data import Batch, SampleStream
from clips_train.losses import caption_loss, clips_contrastive_loss
from clips_train.metrics import read_metrics
from clips_train.model import ClipsModel, build_model
from clips_train.shards import open_split
from clips_train.tokenizer import build_tokenizer
from clips_train.train import train

CPU = torch.device("cpu")
TIMES = ("step_s", "samples_per_s")


def config(**change: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "size": "tiny", "image_px": 16, "context_length": 12, "target_length": 24, "batch": 8, "samples": 48,
        "lr": 1e-3, "warmup_samples": 8, "checkpoint_samples": 16, "log_steps": 1, "caption_negatives": 50,
    }  # fmt: skip
    return TrainConfig(**settings | change)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return shardmaker.write_shards(tmp_path_factory.mktemp("train") / "shards")


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    train(config(), shards=shards, out=out, quiet=True)
    return out


def first_batch(shards: Path, settings: TrainConfig) -> Batch:
    stream = SampleStream(open_split(shards, "train"), settings, build_tokenizer("bpe")).batches()
    batch = next(stream)
    stream.close()
    return batch


def gradients(settings: TrainConfig, batch: Batch) -> tuple[step.Losses, dict[str, torch.Tensor]]:
    model = build_model(settings.model)
    losses = step.backward(model, batch, settings, CPU)
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rows_without_times(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run / "metrics.jsonl")]


def final_weights(run: Path) -> bytes:
    return (checkpoint.find(run) / checkpoint.WEIGHTS).read_bytes()


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize(("negatives", "every"), [(0, 1), (50, 1), (50, 3)])
def test_accumulated_micro_batches_give_the_gradient_of_one_large_batch(
    shards: Path, accumulation: int, negatives: int, every: int
) -> None:
    whole = config(precision="fp32", caption_negatives=negatives, caption_every=every)
    parts = config(precision="fp32", caption_negatives=negatives, caption_every=every, accumulation=accumulation)
    batch = first_batch(shards, whole)
    losses, expected = gradients(whole, batch)
    same_losses, found = gradients(parts, batch)
    assert same_losses.total == pytest.approx(losses.total, rel=1e-5)
    assert same_losses.contrastive == pytest.approx(losses.contrastive, rel=1e-5)
    assert found.keys() == expected.keys() and "towers.logit_scale" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-3, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_step_is_the_weighted_sum_of_the_two_losses(shards: Path) -> None:
    settings = config(precision="fp32", caption_negatives=0)
    batch = first_batch(shards, settings)
    losses, _ = gradients(settings, batch)
    model = build_model(settings.model)
    part = step.split(batch, settings, CPU)[0]
    image_NE, patch_tokens = model.encode_image(part.image_NCHW)
    web_NE, web_states = model.encode_text(batch.web_NL)
    short_NE, _ = model.encode_text(batch.short_NL)
    contrastive = clips_contrastive_loss(image_NE, web_NE, short_NE, model.logit_scale.exp())
    assert model.decoder is not None
    states = model.caption_states(patch_tokens, web_states)
    caption = caption_loss(states, model.decoder.head.weight, batch.labels_NQ, batch.mask_NQ)
    assert losses.contrastive == pytest.approx(contrastive.item(), rel=1e-5)
    assert losses.caption == pytest.approx(caption.item(), rel=1e-5)
    assert losses.total == pytest.approx(contrastive.item() + 2 * caption.item(), rel=1e-5)


def test_drawn_negatives_estimate_the_loss_over_the_whole_vocabulary(shards: Path) -> None:
    """All of them give it exactly; a few hundred come near it."""
    batch = first_batch(shards, config())

    def loss(negatives: int) -> float:
        return gradients(config(precision="fp32", caption_negatives=negatives), batch)[0].caption

    assert loss(1_000_000) == pytest.approx(loss(0), rel=1e-4)
    assert loss(500) == pytest.approx(loss(0), rel=0.02)


def test_a_model_without_captioner_trains_on_the_contrastive_loss_alone(shards: Path, tmp_path: Path) -> None:
    summary = train(config(decoder=False, caption_weight=0, samples=16), shards=shards, out=tmp_path, quiet=True)
    assert summary["caption_loss"] == 0 and summary["loss"] == summary["contrastive_loss"]
    with pytest.raises(ValueError, match="captioner"):
        config(decoder=False)


def test_training_lowers_the_loss_and_counts_what_it_saw(undisturbed: Path) -> None:
    rows = read_metrics(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["samples"] == 48 and rows[-1]["epoch"] == 1
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert rows[0]["contrastive_loss"] == pytest.approx(math.log(8), abs=0.7)
    assert rows[-1]["counts"] == {"loaded": 48}
    assert rows[0]["learning_rate"] == 1e-3 > rows[-1]["learning_rate"] > 0


def test_a_finished_run_is_skipped_and_another_config_is_refused_with_the_difference(
    shards: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = final_weights(undisturbed)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "build_model", None)
        assert train(config(), shards=shards, out=undisturbed, quiet=True)["skipped"]
        assert train(config(num_workers=3, log_steps=9), shards=shards, out=undisturbed, quiet=True)["skipped"]
        with pytest.raises(ResumeRefused, match=r"config lr: 0\.001 before, 0\.002 now"):
            train(config(lr=2e-3), shards=shards, out=undisturbed, quiet=True)
    assert final_weights(undisturbed) == before


def test_a_stopped_run_of_another_config_is_refused_and_overwrite_starts_afresh(shards: Path, tmp_path: Path) -> None:
    stop_after(2, shards, tmp_path)
    with pytest.raises(ResumeRefused, match="seed"):
        train(config(seed=1), shards=shards, out=tmp_path, quiet=True)
    summary = train(config(seed=1, samples=16), shards=shards, out=tmp_path, overwrite=True, quiet=True)
    assert summary["step"] == 2
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def stop_after(steps: int, shards: Path, out: Path) -> None:
    """Sends this process SIGTERM in the middle of a step, as a preemption would."""
    taken = 0
    original = step.backward

    def backward(*arguments: Any) -> step.Losses:
        nonlocal taken
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "backward", backward)
        with pytest.raises(Interrupted, match=f"after step {steps} of 6"):
            train(config(), shards=shards, out=out, quiet=True)


def test_sigterm_is_a_clean_stop_from_which_the_run_continues_exactly(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop_after(3, shards, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.find(tmp_path).name == "step-00000003"
    train(config(), shards=shards, out=tmp_path, quiet=True)
    assert rows_without_times(tmp_path) == rows_without_times(undisturbed)
    assert final_weights(tmp_path) == final_weights(undisturbed)


KILLED = """
import sys, torch
from pathlib import Path
from clips_train.config import TrainConfig
from clips_train.train import train
torch.set_num_threads(1)
train(TrainConfig.model_validate_json(sys.argv[1]), shards=Path(sys.argv[2]), out=Path(sys.argv[3]), quiet=True)
"""


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(6000):
        if ready():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the moment never came")


def test_after_sigkill_the_run_continues_with_the_same_metrics_and_weights(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", KILLED, config().model_dump_json(), str(shards), str(tmp_path)]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1])
    wait_until(lambda: len(read_metrics(tmp_path / "metrics.jsonl")) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "train.done.json").exists()
    stood = checkpoint.latest(tmp_path)
    assert stood is not None and 2 <= checkpoint.read_about(stood)["step"] < 6
    train(config(), shards=shards, out=tmp_path, quiet=True)
    assert rows_without_times(tmp_path) == rows_without_times(undisturbed)
    assert final_weights(tmp_path) == final_weights(undisturbed)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update_and_names_the_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = 0
    original = ClipsModel.encode_image

    def encode_image(self: ClipsModel, image: torch.Tensor) -> Any:
        nonlocal taken
        taken += 1
        features, tokens = original(self, image)
        return (features * float("nan") if taken == 3 else features), tokens

    monkeypatch.setattr(ClipsModel, "encode_image", encode_image)
    with pytest.raises(UserError, match=r"step 3: the loss is nan .*not updated"):
        train(config(), shards=shards, out=tmp_path, quiet=True)
    newest = checkpoint.find(tmp_path)
    assert checkpoint.read_about(newest)["step"] == 2
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    model = build_model(config().model)
    checkpoint.load_weights(newest, model)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_the_logit_scale_is_clamped_only_when_asked(shards: Path) -> None:
    for clamp, expected in ((True, 100.0), (False, 150.0)):
        run = train_module._Run(
            config(clamp_logit_scale=clamp), open_split(shards, "train"), shards.parent / str(clamp)
        )
        with run:
            run.model.logit_scale.data.fill_(math.log(150))
            run.take_step(first_batch(shards, config()))
        assert run.model.logit_scale.exp().item() == pytest.approx(expected, rel=0.01)


def test_the_resolved_config_is_saved_with_the_run(undisturbed: Path) -> None:
    saved = json.loads((undisturbed / "config.json").read_text())
    assert TrainConfig(**saved) == config()
    assert saved["beta2"] == TrainConfig.model_fields["beta2"].default
