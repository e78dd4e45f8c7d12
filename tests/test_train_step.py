"""One step: every kind of view, condition and captioner gives one gradient, however the batch is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shardmaker
import torch
from bytemaker import TOKENIZER, Bytes
from torch import Tensor

from clips_train import parts as parts_module
from clips_train import step, towers
from clips_train.batch import Batch, collate
from clips_train.config import TrainConfig
from clips_train.distributed import World
from clips_train.model import build_model
from clips_train.parts import Targets, TextLayout, split
from clips_train.shards import Split
from clips_train.step import Losses, Trainee
from clips_train.texts import TextMaker

NUM_SAMPLES = 8
COLUMNS = ("web", "synthetic", "wrong", "wronger")
SPLIT = Split(Path("shards"), "train", (), (), COLUMNS, "digest")
CPU = torch.device("cpu")

SEVERAL = {"from": "synthetic", "reduce": "one_piece", "count": 4}
NEGATIVES = {"from": "web", "negatives": ["wrong", "wronger"]}
MIX = {"web": 0.8, "synthetic": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "clips": {},
    "web_only": {"views": ["web"], "decoder": "none", "caption_weight": 0},
    "coca": {"views": [{"from": MIX}], "target": MIX, "condition": None},
    "multi_positive": {"views": ["web", SEVERAL]},
    "negatives": {"views": [NEGATIVES, "synthetic"]},
    "hardest": {"views": [NEGATIVES | {"choose_negatives": "hardest"}]},
    "gates": {"views": [{"from": "web", "gate": True}, {"from": "synthetic", "gate": True}]},
    "weights": {"views": ["web", {"from": "synthetic", "weight": 3}]},
    "sigmoid": {"contrastive": "sigmoid"},
    "caption_only": {"views": [], "condition": None, "decoder": "teacher_forced"},
    "teacher_forced": {"decoder": "teacher_forced"},
    "cross_attention": {"decoder": "teacher_forced", "fusion": "cross_attention"},
    "another_condition": {"condition": "wrong"},
    "dropped": {"condition_drop": 0.5},
    "kept": {"image_tokens_kept": 0.5},
    "stopped": {"stop_gradient": True},
    "trimmed": {"text_padding": "trimmed", "condition_drop": 0.3},
    "trimmed_teacher_forced": {"text_padding": "trimmed", "decoder": "teacher_forced", "fusion": "cross_attention"},
    "distillation": {"views": ["web", "synthetic"], "teacher": "t"},
    "some_captioned": {"caption_every": 3},
    "drawn_tokens": {"caption_negatives": 64},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(towers.VOCAB_SIZES, "bpe", Bytes.vocab_size)


def config(kind: str = "clips", **change: Any) -> TrainConfig:
    settings: dict[str, Any] = {"size": "tiny", "image_px": 32, "context_length": 48, "target_length": 128}
    settings |= {"batch": NUM_SAMPLES, "precision": "fp32", "seed": 3}
    return TrainConfig(**settings | KINDS[kind] | change)


def batch_of(config: TrainConfig, numbers: range = range(NUM_SAMPLES)) -> Batch:
    maker = TextMaker(SPLIT, config, TOKENIZER)
    samples = []
    for number in numbers:
        _, about = shardmaker.sample(number)
        about |= {"wrong": f"a cat number {number}", "wronger": "" if number % 3 else "a car"}
        generator = torch.Generator().manual_seed(number)
        tensors = dict(maker.texts(about, 0, f"{number:09d}").tensors)
        tensors["image"] = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)
        if config.image_tokens_kept < 1:
            tensors["kept"] = torch.randperm(4, generator=generator)[:2].sort().values
        if config.teacher:
            for name in ("image", "view.0", "view.1"):
                feature = torch.randn(6, generator=generator)
                tensors[f"teacher.{name}"] = feature / feature.norm()
            tensors["teacher.scale"] = torch.tensor(20.0)
        samples.append(tensors)
    state = {"digest": "", "seed": config.seed, "epoch": 0, "sample": numbers.stop, "counts": {}}
    return collate(samples, [f"{number:09d}" for number in numbers], numbers.start, state)


def trainee_of(config: TrainConfig) -> Trainee:
    built = build_model(config.model, seed=1, sigmoid=config.contrastive == "sigmoid")
    return Trainee(built, config, TOKENIZER)


def take(config: TrainConfig, batch: Batch | None = None) -> tuple[Losses, dict[str, Tensor], Trainee]:
    trainee = trainee_of(config)
    losses = step.backward(trainee, batch or batch_of(config), config, CPU, World.alone())
    gradients = {name: p.grad for name, p in trainee.model.named_parameters() if p.grad is not None}
    return losses, gradients, trainee


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_losses_and_the_gradient_of_the_whole_batch(kind: str) -> None:
    whole, whole_gradients, trainee = take(config(kind))
    assert whole.total > 0 and whole_gradients
    for accumulation in (2, 4):
        again, gradients, other = take(config(kind, accumulation=accumulation))
        assert vars(again) == pytest.approx(vars(whole), abs=1e-5)
        torch.testing.assert_close(gradients, whole_gradients, atol=1e-5, rtol=1e-4)
        if trainee.gate_means is not None:
            assert other.gate_means is not None
            torch.testing.assert_close(other.gate_means, trainee.gate_means)
            assert trainee.gate_means.abs().max() > 0


def test_the_total_is_the_weighted_sum() -> None:
    losses, _, _ = take(config("distillation", contrastive_weight=0.5, caption_weight=3, distillation_weight=2))
    assert losses.total == pytest.approx(0.5 * losses.contrastive + 3 * losses.caption + 2 * losses.distillation)
    assert min(losses.contrastive, losses.caption, losses.distillation) > 0


def test_views_count_by_their_weights() -> None:
    alone = [take(config(views=[{"from": column}]))[0].contrastive for column in ("web", "synthetic")]
    both = take(config("weights"))[0].contrastive
    assert both == pytest.approx((alone[0] + 3 * alone[1]) / 4, abs=1e-5)


def test_caption_only_training_leaves_the_text_tower_alone() -> None:
    _, gradients, _ = take(config("caption_only"))
    assert not any(name.startswith(("towers.transformer", "towers.token_embedding")) for name in gradients)
    assert any(name.startswith("towers.visual.transformer") for name in gradients)


def test_a_stopped_gradient_of_the_captioner_does_not_reach_the_towers() -> None:
    def visual(**change: Any) -> Tensor:
        gradients = take(config(contrastive_weight=0, **change))[1]
        return gradients["towers.visual.conv1.weight"]

    assert visual(stop_gradient=True).abs().max() == 0 < visual().abs().max()


def test_trimmed_texts_are_the_masked_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting changes nothing beyond the mask."""
    wanted = config("trimmed")
    short, short_gradients, _ = take(wanted)
    shapes = [part.text_RL.shape[1] for part in split(batch_of(wanted), wanted, layout(wanted), CPU)]
    assert max(shapes) < wanted.context_length

    def whole(ids_RL: Tensor, eos_id: int, *, keep_last: bool) -> tuple[Tensor, Tensor, Tensor]:
        slots = torch.arange(ids_RL.shape[1])
        used_R1 = (ids_RL == eos_id).int().argmax(1, keepdim=True) + 1
        return ids_RL, (slots < used_R1) | (slots == len(slots) - 1), slots

    monkeypatch.setattr(parts_module, "trim", whole)
    long, long_gradients, _ = take(wanted)
    assert vars(short) == pytest.approx(vars(long), abs=1e-5)
    torch.testing.assert_close(short_gradients, long_gradients, atol=1e-5, rtol=1e-4)


def test_masked_padding_is_another_model_than_attended_padding() -> None:
    assert take(config("trimmed"))[0].contrastive != pytest.approx(take(config())[0].contrastive, abs=1e-4)


@pytest.mark.parametrize("kind", ["clips", "teacher_forced", "cross_attention"])
def test_cutting_targets_to_the_longest_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(kind)
    cut, gradients, _ = take(wanted)
    monkeypatch.setattr(parts_module, "rounded_up", lambda length: 10_000)
    whole, whole_gradients, _ = take(wanted)
    assert cut.caption == pytest.approx(whole.caption, abs=1e-6)
    for name in ("decoder.head.weight", "towers.visual.conv1.weight"):
        torch.testing.assert_close(gradients[name], whole_gradients[name], atol=1e-6, rtol=1e-4)


def layout(config: TrainConfig) -> TextLayout:
    return TextLayout.of(TOKENIZER, config, pools_last_slot=True)


def test_targets_are_cut_to_the_longest_of_the_batch() -> None:
    wanted = config()
    (part,) = split(batch_of(wanted), wanted, layout(wanted), CPU)
    assert part.captioned is not None
    assert part.captioned.labels_SQ.shape[1] == 72 < wanted.target_length


def test_a_teacher_forced_captioner_is_shown_what_comes_before() -> None:
    wanted = config("teacher_forced")
    (part,) = split(batch_of(wanted), wanted, layout(wanted), CPU)
    assert part.captioned is not None
    inputs, labels = part.captioned.inputs_SQ, part.captioned.labels_SQ
    assert (inputs[:, 0] == TOKENIZER.bos_id).all() and torch.equal(inputs[:, 1:], labels[:, :-1])


def test_a_dropped_condition_is_the_empty_text() -> None:
    wanted = config("another_condition", condition_drop=1.0)
    dropped = batch_of(wanted)
    assert dropped.dropped_N.all() and dropped.condition_NL is not None
    empty = config("another_condition")
    told = batch_of(empty)
    assert told.condition_NL is not None
    told.condition_NL[:] = TOKENIZER.text_ids([""], wanted.context_length)
    assert take(wanted, dropped)[0].caption == pytest.approx(take(empty, told)[0].caption, abs=1e-6)
    assert take(wanted, dropped)[0].caption != pytest.approx(take(empty)[0].caption, abs=1e-4)


def test_captioned_samples_are_every_nth_of_the_whole_batch_wherever_it_is_computed() -> None:
    wanted = config("some_captioned")
    (whole,) = split(batch_of(wanted), wanted, layout(wanted), CPU)
    second = batch_of(wanted, range(4, 8))
    (half,) = split(second, wanted, layout(wanted), CPU)
    assert whole.captioned is not None and half.captioned is not None
    assert whole.captioned.rows_S.tolist() == [0, 3, 6] and half.captioned.rows_S.tolist() == [2]


def test_a_part_without_captioned_samples_counts_nothing_but_still_runs_the_captioner() -> None:
    wanted = config(caption_every=8, accumulation=4)
    parts = split(batch_of(wanted), wanted, layout(wanted), CPU)
    assert [part.captioned is not None and bool(part.captioned.mask_SQ.any()) for part in parts] == [True] + [False] * 3


def test_kept_patches_are_all_that_the_captioner_sees() -> None:
    wanted = config("kept", stop_gradient=False, contrastive_weight=0)
    batch = batch_of(wanted)
    assert batch.kept_NP is not None
    before = take(wanted, batch)[0].caption
    shown = torch.zeros(NUM_SAMPLES, 4, dtype=torch.bool).scatter_(1, batch.kept_NP, True)
    trainee = trainee_of(wanted)
    (part,) = split(batch, wanted, trainee.layout, CPU)
    real = trainee.model.encode_image

    def spoilt(image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features, tokens = real(image_BCHW)
        return features, torch.where(shown[..., None], tokens, torch.full_like(tokens, 9.0))

    trainee.model.encode_image = spoilt  # type: ignore[method-assign]
    targets = Targets.of(batch, trainee.num_tokens, wanted, World.alone())
    assert trainee(part, targets)[1].item() == pytest.approx(before, abs=1e-6)


def test_drawn_tokens_estimate_the_loss_over_the_whole_vocabulary() -> None:
    whole = take(config())[0].caption
    assert take(config(caption_negatives=2048))[0].caption == pytest.approx(whole, rel=0.02)


def test_bf16_is_close_to_fp32() -> None:
    exact, rounded = take(config())[0], take(config(precision="bf16"))[0]
    assert vars(rounded) == pytest.approx(vars(exact), rel=0.02)
