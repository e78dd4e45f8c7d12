"""The training loop: what it writes, how it stops and goes on, what it refuses, stages."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import shardmaker
import torch
from bytemaker import small_vocabulary  # noqa: F401
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clips_data.errors import Interrupted, ResumeRefused, UserError
from clips_train import checkpoint, flops, guard, preparing, step
from clips_train import train as train_module
from clips_train.batch import Batch
from clips_train.checkpoint import Progress
from clips_train.config import TrainConfig
from clips_train.data import SampleStream
from clips_train.distributed import World
from clips_train.flops import StepShape
from clips_train.metrics import read_metrics
from clips_train.model import ClipsModel, build_model
from clips_train.parts import Targets, split
from clips_train.run import Run
from clips_train.shards import open_split
from clips_train.stages import stages_of
from clips_train.tokenizer import build_tokenizer
from clips_train.train import train

CPU = torch.device("cpu")
ALONE = World.alone()
TIMES = ("step_s", "samples_per_s", "tokens_per_s", "data_wait_share", "model_tflops_per_s")
ROOT = Path(__file__).parents[1]


def config(**change: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "size": "tiny", "image_px": 16, "context_length": 12, "target_length": 24, "batch": 8, "samples": 48,
        "lr": 1e-3, "warmup_samples": 8, "checkpoint_samples": 16, "log_steps": 1, "caption_negatives": 50,
        "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**settings | change)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return shardmaker.write_shards(tmp_path_factory.mktemp("train") / "shards")


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    train(config(ema=0.5), shards=shards, out=out, quiet=True)
    return out


def first_batch(shards: Path, settings: TrainConfig) -> Batch:
    stream = SampleStream(open_split(shards, "train"), settings, build_tokenizer("bpe")).batches()
    batch = next(stream)
    stream.close()
    return batch


def trainee(settings: TrainConfig) -> step.Trainee:
    return step.Trainee(build_model(settings.model), settings, build_tokenizer("bpe"))


def rows_without_times(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run / "metrics.jsonl")]


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint. Not its bytes: safetensors writes the entries of its headers in any order."""
    folder = checkpoint.find(run)
    files = [folder / checkpoint.WEIGHTS, folder / checkpoint.AVERAGED, *(folder / checkpoint.STATE).iterdir()]
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_lowers_the_loss_and_counts_what_it_saw(undisturbed: Path) -> None:
    rows = read_metrics(undisturbed / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["samples"] == 48 and rows[-1]["epoch"] == 1
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert rows[0]["contrastive_loss"] == pytest.approx(math.log(8), abs=0.7)
    assert rows[-1]["counts"] == {"loaded": 48}
    assert rows[0]["learning_rate"] == 1e-3 > rows[-1]["learning_rate"] > 0
    for row in rows:
        assert row["grad_norm"] > 0 and row["skipped_steps"] == 0 and row["loss_mean"] == row["loss"]
        assert row["tokens_per_s"] > row["samples_per_s"] > 0 and row["model_tflops_per_s"] >= 0
        assert 0 <= row["data_wait_share"] <= 1 and "mfu" not in row and "distillation_loss" not in row
    assert len({row["batch_digest"] for row in rows}) == 6


def test_rows_are_written_at_log_steps_and_tell_the_mean_since_the_last(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    every = read_metrics(undisturbed / "metrics.jsonl")
    train(config(ema=0.5, log_steps=4, peak_tflops=100), shards=shards, out=tmp_path, quiet=True)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [4, 6]
    assert rows[0]["loss"] == every[3]["loss"]
    assert rows[0]["loss_mean"] == pytest.approx(sum(row["loss"] for row in every[:4]) / 4)
    assert rows[1]["loss_mean"] == pytest.approx(sum(row["loss"] for row in every[4:]) / 2)
    assert rows[1]["batch_digest"] == every[5]["batch_digest"]
    assert rows[1]["mfu"] >= 0


def test_a_finished_run_is_skipped_and_another_config_is_refused_with_the_difference(
    shards: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = final_state(undisturbed)
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "Run", None)
        assert train(config(ema=0.5), shards=shards, out=undisturbed, quiet=True)["skipped"]
        other = config(ema=0.5, num_workers=3, log_steps=9, accumulation=2, compile=True)
        assert train(other, shards=shards, out=undisturbed, quiet=True)["skipped"]
        with pytest.raises(ResumeRefused, match=r"config lr: 0\.001 before, 0\.002 now"):
            train(config(ema=0.5, lr=2e-3), shards=shards, out=undisturbed, quiet=True)
    assert same(final_state(undisturbed), before)


def stop_after(steps: int, settings: TrainConfig, shards: Path, out: Path) -> None:
    """Sends this process SIGTERM in the middle of a step, as a preemption would."""
    original = Run.take_step

    def take_step(self: Run, batch: Batch, stop: bool) -> bool:
        if self.progress.step + 1 == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, stop or self.progress.step + 1 == steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "take_step", take_step)
        with pytest.raises(Interrupted, match=f"after step {steps} of 6"):
            train(settings, shards=shards, out=out, quiet=True)


def test_sigterm_is_a_clean_stop_from_which_the_run_continues_exactly(
    shards: Path, undisturbed: Path, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop_after(3, config(ema=0.5), shards, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoint.find(tmp_path).name == "step-00000003"
    train(config(ema=0.5), shards=shards, out=tmp_path, quiet=True)
    assert rows_without_times(tmp_path) == rows_without_times(undisturbed)
    assert same(final_state(tmp_path), final_state(undisturbed))


def test_sigterm_during_the_set_up_stops_after_the_first_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*given: Any, **named: Any) -> Run:
        os.kill(os.getpid(), signal.SIGTERM)
        return Run(*given, **named)

    monkeypatch.setattr(train_module, "Run", build)
    with pytest.raises(Interrupted, match="after step 1 of 6"):
        train(config(), shards=shards, out=tmp_path, quiet=True)
    assert checkpoint.find(tmp_path).name == "step-00000001"


def test_a_stopped_run_of_another_config_is_refused_and_overwrite_starts_afresh(shards: Path, tmp_path: Path) -> None:
    stop_after(2, config(), shards, tmp_path)
    with pytest.raises(ResumeRefused, match="seed"):
        train(config(seed=1), shards=shards, out=tmp_path, quiet=True)
    summary = train(config(seed=1, samples=16), shards=shards, out=tmp_path, overwrite=True, quiet=True)
    assert summary["step"] == 2
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_the_shards_do_not_have_is_refused_before_the_folder_is_begun(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="synthetik"):
        train(config(target="synthetik"), shards=shards, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_that_ended_before_its_first_step_leaves_its_name_to_a_mended_one(shards: Path, tmp_path: Path) -> None:
    for mistake in ({"init": "nowhere"}, {"size": "Z/9"}, {"teacher": "nobody"}):
        with pytest.raises(UserError):
            train(config(**mistake), shards=shards, out=tmp_path / "run", quiet=True)
    assert train(config(samples=8), shards=shards, out=tmp_path / "run", quiet=True)["step"] == 1


# --- steps that go wrong ----------------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int], spoilt: float = float("nan")) -> None:
    """Makes the loss of these steps ``spoilt`` times what it is, and their gradient with it."""
    original, taken = step.backward, -1  # the first call only looks at what is trained

    def backward(trainee: Any, *more: Any) -> step.Losses:
        nonlocal taken
        taken += 1
        losses = original(trainee, *more)
        if taken not in steps:
            return losses
        for parameter in trainee.parameters():
            if parameter.grad is not None:
                parameter.grad *= spoilt
        return step.Losses(losses.total * spoilt, losses.contrastive * spoilt, losses.caption, losses.distillation)

    monkeypatch.setattr(step, "backward", backward)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_update_and_names_the_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {3})
    with pytest.raises(UserError, match=r"step 3: the loss is nan .*contrastive nan.*not updated"):
        train(config(max_skipped_steps=0), shards=shards, out=tmp_path, quiet=True)
    newest = checkpoint.find(tmp_path)
    assert checkpoint.read_about(newest)["step"] == 2
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert all(tensor.isfinite().all() for tensor in load_file(newest / checkpoint.WEIGHTS).values())


def test_a_few_steps_may_be_left_out_and_are_counted(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {2, 3, 5})
    summary = train(config(max_skipped_steps=2), shards=shards, out=tmp_path, quiet=True)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 2, 2, 3, 3] and summary["skipped_steps"] == 3
    assert rows[1]["loss"] == rows[2]["loss"] == rows[0]["loss"] and rows[1]["grad_norm"] is None
    monkeypatch.undo()
    spoil(monkeypatch, {2, 3})
    with pytest.raises(UserError, match="step 3: the loss is nan, as in the 1 steps before it"):
        train(config(max_skipped_steps=1), shards=shards, out=tmp_path / "more", quiet=True)


def test_a_run_of_which_no_step_could_be_made_is_not_finished(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {1, 2})
    with pytest.raises(UserError, match="step 2: the loss is nan, as in the 1 steps before it"):
        train(config(samples=16), shards=shards, out=tmp_path, quiet=True)


def test_a_step_that_is_left_out_leaves_the_means_of_the_gates_as_they_were(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, taken = ClipsModel.encode_image, []

    def encode_image(self: ClipsModel, image_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        taken.append(None)
        features_BE, tokens_BPW = real(self, image_BCHW)
        return (features_BE * math.nan if len(taken) == 3 else features_BE), tokens_BPW

    monkeypatch.setattr(ClipsModel, "encode_image", encode_image)
    gated = config(views=({"from": "web", "gate": True}, {"from": "synthetic", "gate": True}))
    assert train(gated, shards=shards, out=tmp_path, quiet=True)["skipped_steps"] == 1


def test_a_spike_is_left_out_where_it_is_asked_for(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, {4}, 50.0)
    assert train(config(spike_factor=10), shards=shards, out=tmp_path / "a", quiet=True)["skipped_steps"] == 1
    spoil(monkeypatch, {4}, 50.0)
    assert train(config(), shards=shards, out=tmp_path / "b", quiet=True)["skipped_steps"] == 0


def test_a_fault_is_named_and_the_recent_mean_follows_the_losses() -> None:
    settings, progress = config(spike_factor=3), Progress(1, 8, {}, recent_loss=2.0)
    assert guard.fault(5.9, 1.0, progress, settings) is None
    assert "3 times the recent mean of 2" in str(guard.fault(6.1, 1.0, progress, settings))
    assert "norm of the gradient is inf" in str(guard.fault(1.0, math.inf, progress, settings))
    assert guard.after(progress, {"total": 3.0}, None).recent_loss == pytest.approx(2.02)
    assert guard.after(progress, {"total": 9.0}, "a spike").recent_loss == 2.0


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory")])
def test_memory_that_runs_out_is_told_with_what_to_change(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def take_step(self: Run, batch: Batch, stop: bool) -> bool:
        raise error

    monkeypatch.setattr(Run, "take_step", take_step)
    with pytest.raises(UserError, match=r"step 1, with 4 samples at a time \(batch 8 in 2 parts .*gradient_checkpoin"):
        train(config(accumulation=2), shards=shards, out=tmp_path, quiet=True)


def test_memory_that_runs_out_before_the_first_step_is_told_too(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def to(self: ClipsModel, device: torch.device) -> ClipsModel:
        raise torch.OutOfMemoryError("x")

    monkeypatch.setattr(ClipsModel, "to", to)
    with pytest.raises(UserError, match="Out of memory on cpu before the first step, with 8 samples"):
        train(config(), shards=shards, out=tmp_path, quiet=True)


@pytest.mark.parametrize("error", [torch.distributed.DistBackendError("NCCL"), NotImplementedError("x")])
def test_what_is_no_want_of_memory_is_not_called_so(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def take_step(self: Run, batch: Batch, stop: bool) -> bool:
        raise error

    monkeypatch.setattr(Run, "take_step", take_step)
    with pytest.raises(type(error)):
        train(config(), shards=shards, out=tmp_path, quiet=True)


def test_a_disk_that_is_full_ends_the_run_at_the_next_step(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(part: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "publish", full)
    with pytest.raises(UserError, match="the disk is full"):
        train(config(), shards=shards, out=tmp_path, quiet=True)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) < 6


# --- what a run can be told -------------------------------------------------------------------------------------------


def test_the_logit_scale_is_clamped_only_when_asked(shards: Path, tmp_path: Path) -> None:
    for clamp, expected in ((True, 100.0), (False, 150.0)):
        settings, split = config(clamp_logit_scale=clamp), open_split(shards, "train")
        with Run(settings, split, build_tokenizer("bpe"), tmp_path / str(clamp), ALONE, source=None, quiet=True) as run:
            run.model.logit_scale.data.fill_(math.log(150))
            run.take_step(first_batch(shards, settings), False)
            assert run.model.logit_scale.exp().item() == pytest.approx(expected, rel=0.01)


def test_the_gradient_is_clipped_when_asked(shards: Path, tmp_path: Path) -> None:
    settings = config(grad_clip=0.5, precision="fp32")
    with Run(
        settings, open_split(shards, "train"), build_tokenizer("bpe"), tmp_path, ALONE, source=None, quiet=True
    ) as run:
        seen = []
        run._optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.append(
                sum(float(p.grad.square().sum()) for group in optimizer.param_groups for p in group["params"]) ** 0.5
            )
        )
        run.take_step(first_batch(shards, settings), False)
        assert run._norm > 0.5 and seen == [pytest.approx(0.5, rel=1e-3)]


def test_what_nothing_trains_is_frozen_and_everything_else_is_not(shards: Path) -> None:
    def frozen(**change: Any) -> set[str]:
        settings = config(**change)
        return set(preparing.freeze_unused(trainee(settings), first_batch(shards, settings), settings, CPU))

    assert frozen() == set()
    heads = {"model.towers.logit_scale", "model.towers.visual.proj", "model.towers.text_projection"}
    assert heads < (captions := frozen(views=[])) and "model.towers.token_embedding.weight" not in captions
    assert "model.towers.token_embedding.weight" in frozen(views=[], condition=None)
    assert "model.towers.token_embedding.weight" in frozen(views=[], stop_gradient=True)


def test_scores_on_held_out_samples_come_with_the_row_of_their_step(shards: Path, tmp_path: Path) -> None:
    train(config(eval_samples=20, log_steps=4, ema=0.5), shards=shards, out=tmp_path, quiet=True)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], "eval_image_to_text_r1" in row) for row in rows] == [
        (3, True),
        (4, False),
        (5, True),
        (6, False),
    ]
    assert rows[0]["eval_num_images"] == 8 and 0 <= rows[0]["eval_text_to_image_r1"] <= 1


def test_scores_without_held_out_samples_are_refused(tmp_path: Path) -> None:
    folder = shardmaker.write_shards(tmp_path / "shards", num_heldout=0)
    with pytest.raises(UserError, match="no held-out samples"):
        train(config(eval_samples=8), shards=folder, out=tmp_path / "run", quiet=True)


def test_overfitting_a_batch_tells_how_well_it_is_known(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(overfit=8, samples=240, log_steps=30, checkpoint_samples=1000, warmup_samples=0, image_px=32)
    summary = train(settings, shards=shards, out=tmp_path)
    assert summary["batch_image_to_text_r1"] > 0.8 and summary["loss"] < 8
    assert "Overfit: loss" in capsys.readouterr().err


def test_compiled_blocks_train_alike(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's front end; what it would write in C++ takes minutes to build."""
    whole_compile, compiled_blocks = torch.nn.Module.compile, []

    def compile_block(block: torch.nn.Module) -> None:
        compiled_blocks.append(block)
        whole_compile(block, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
    whole = config(precision="fp32", samples=8)
    expected = train(whole, shards=shards, out=tmp_path / "a", quiet=True)
    found = train(config(precision="fp32", samples=8, compile=True), shards=shards, out=tmp_path / "b", quiet=True)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    weights, compiled = (load_file(checkpoint.find(tmp_path / run) / checkpoint.WEIGHTS) for run in "ab")
    assert weights.keys() == compiled.keys() and len(compiled_blocks) == 4


def test_the_resolved_config_is_saved_with_the_run(undisturbed: Path) -> None:
    saved = json.loads((undisturbed / "config.json").read_text())
    assert TrainConfig(**saved) == config(ema=0.5)
    assert saved["beta2"] == TrainConfig.model_fields["beta2"].default


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"caption_negatives": 0, "caption_every": 2, "text_padding": "trimmed"},
        {"decoder": "teacher_forced", "fusion": "cross_attention", "image_tokens_kept": 0.5, "image_px": 64},
        {"decoder": "none", "caption_weight": 0},
        {"views": ["web", {"from": "synthetic", "reduce": "one_piece", "count": 2, "negatives": ["web"]}]},
    ],
)
def test_the_arithmetic_of_a_step_is_counted_as_torch_counts_it(shards: Path, change: dict[str, Any]) -> None:
    settings = config(precision="fp32", **change)
    batch, learner = first_batch(shards, settings), trainee(settings)
    targets = Targets.of(batch, learner.num_tokens, settings, ALONE)
    (part,) = split(batch, settings, learner.layout, CPU)
    # Of the ways to compute attention on a CPU torch counts the plain one only.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.backward(learner, batch, settings, CPU, ALONE)
    shape = StepShape.of(learner)
    assert shape.flops(part, targets, 1.0) == pytest.approx(counter.get_total_flops(), rel=0.01)
    num_patches = (settings.image_px // 16) ** 2
    texts = part.text_RL.numel() + (part.captioned.labels_SQ.numel() if part.captioned else 0)
    assert shape.tokens(part) == 8 * num_patches + texts


def test_the_peak_of_a_device_is_found_by_the_longest_part_of_its_name() -> None:
    assert flops.peak_of("NVIDIA H100 80GB HBM3") == 989 and flops.peak_of("NVIDIA H100 PCIe") == 756
    assert flops.peak_of("NVIDIA L40S") == 362 and flops.peak_of("NVIDIA L4") == 121
    assert flops.peak_of("NVIDIA A100-SXM4-80GB") == 312 and flops.peak_of("Radeon") == 0 == flops.peak_tflops(CPU)


# --- stages -----------------------------------------------------------------------------------------------------------


def test_each_stage_starts_from_the_weights_of_the_one_before_and_finished_ones_are_skipped(
    shards: Path, tmp_path: Path
) -> None:
    settings = config(stages=["image_px: 16, samples: 16", "{image_px: 32, samples: 8, batch: 4, lr: 1e-9}"])
    summary = train(settings, shards=shards, out=tmp_path, quiet=True)
    assert summary["step"] == 2 and not summary["skipped"]
    first, last = (checkpoint.find(folder) for folder in (tmp_path / "stages" / "0", tmp_path))
    assert checkpoint.read_about(first)["config"]["image_px"] == 16
    assert checkpoint.read_about(last)["config"]["image_px"] == 32
    before, after = load_file(first / checkpoint.WEIGHTS), load_file(last / checkpoint.WEIGHTS)
    torch.testing.assert_close(after["towers.visual.proj"], before["towers.visual.proj"], rtol=0, atol=1e-6)
    assert TrainConfig(**json.loads((tmp_path / "config.json").read_text())) == settings
    assert train(settings, shards=shards, out=tmp_path, quiet=True)["skipped"]
    with pytest.raises(ResumeRefused, match="lr"):
        changed = config(stages=["image_px: 16, samples: 16, lr: 2e-3", settings.stages[1]])
        train(changed, shards=shards, out=tmp_path, quiet=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("imag_px: 32", "Stage 0 sets 'imag_px'.*Did you mean 'image_px'"),
        ("stages: [a]", "'stages', which belongs to the whole run"),
        ("image_px: many", r"Stage 0 \(image_px: many\) makes no sense: image_px"),
        ("image_px: 33", "not a multiple of the 16 px patch"),
        ("image_px 32", "Stage 0 sets 'image_px 32'"),
        ("image_px: [", "Stage 0 is not YAML"),
        ("[1, 2]", "Stage 0 "),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused_in_a_sentence(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stages_of(config(stages=[line]))


def test_a_captioner_that_nothing_would_train_is_refused() -> None:
    with pytest.raises(ValueError, match="caption_weight 0 trains no captioner; set decoder to none"):
        config(caption_weight=0)


def test_views_that_nothing_would_train_are_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contrastive_weight 0 trains no view"):
        train(config(contrastive_weight=0), shards=shards, out=tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_manifest_may_write_a_stage_as_a_mapping() -> None:
    written = config(stages=[{"samples": 16, "views": ["web"]}, "lr: 2e-3"])
    first, second = stages_of(written)
    assert first == config(samples=16, views=["web"]) and second == config(lr=2e-3)
    assert TrainConfig(**written.model_dump(mode="json")) == written


def test_stages_are_the_run_with_what_differs() -> None:
    assert stages_of(config()) == [config()]
    first, second = stages_of(config(stages=["samples: 16, lr_base: 4e-7", "lr: null"]))
    assert first == config(samples=16, lr_base=4e-7, lr=None) and second == config(lr=None)
    assert first.peak_lr == pytest.approx(4e-7 * 8 / 256)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_trains_under_torchrun_and_one_process_talks(shards: Path, tmp_path: Path) -> None:
    options = "--size tiny --image-px 32 --context-length 12 --target-length 12 --batch 8 --samples 16 --device cpu"
    work = [*options.split(), "--work", str(tmp_path), "--name", "two", "--checkpoint-samples", "8"]
    (tmp_path / "shards").symlink_to(shards)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, "train", *work], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["counts"] for row in read_metrics(tmp_path / "runs" / "two" / "metrics.jsonl")] == [{"loaded": 16}]
    state = checkpoint.find(tmp_path / "runs" / "two") / checkpoint.STATE
    assert len(list(state.iterdir())) == 2


def test_a_run_made_from_other_weights_is_refused_and_not_taken_for_this_one(shards: Path, tmp_path: Path) -> None:
    base, again = tmp_path / "base", tmp_path / "again"
    train(config(samples=8), shards=shards, out=base, quiet=True)
    settings = config(samples=8, init=str(base))
    train(settings, shards=shards, out=again, quiet=True)
    assert train(settings, shards=shards, out=again, quiet=True)["skipped"]
    train(config(samples=16), shards=shards, out=base, overwrite=True, quiet=True)
    with pytest.raises(ResumeRefused, match="weights"):
        train(settings, shards=shards, out=again, quiet=True)


def test_an_overwrite_that_cannot_begin_leaves_the_old_run_as_it_was(shards: Path, tmp_path: Path) -> None:
    old = config(samples=16)
    train(old, shards=shards, out=tmp_path, quiet=True)
    kept = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "begun.jsonl", "config.json")}
    newest = checkpoint.latest(tmp_path)
    with pytest.raises(UserError, match="init 'nowhere' does not exist"):
        train(config(samples=8, init="nowhere"), shards=shards, out=tmp_path, overwrite=True, quiet=True)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    assert checkpoint.latest(tmp_path) == newest is not None
    assert not list(tmp_path.glob("*.part"))
    train(config(samples=8), shards=shards, out=tmp_path, overwrite=True, quiet=True)
    assert checkpoint.read_about(checkpoint.find(tmp_path))["samples"] == 8 and not list(tmp_path.glob("*.part"))
