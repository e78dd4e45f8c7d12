from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from clips_train.config import ModelConfig
from clips_train.model import ClipsModel, build_model
from clips_train.optim import MovingAverage, build_optimizer, clip_gradient, kernels, learning_rate


@pytest.fixture(scope="module")
def model() -> ClipsModel:
    return build_model(ModelConfig(size="tiny", image_px=32, target_length=8, pos_embed="learned"))


def test_only_kernels_decay(model: ClipsModel) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in kernels(model)}
    rest = set(names.values()) - decayed
    assert {
        "towers.visual.conv1.weight",
        "towers.visual.proj",
        "towers.text_projection",
        "towers.visual.transformer.resblocks.0.attn.in_proj_weight",
        "towers.visual.transformer.resblocks.0.attn.out_proj.weight",
        "towers.transformer.resblocks.0.mlp.c_fc.weight",
        "towers.transformer.resblocks.0.mlp.c_proj.weight",
        "decoder.transformer.resblocks.0.attn.in_proj_weight",
        "decoder.image_projection.weight",
        "decoder.text_projection.weight",
        "decoder.head.weight",
    } <= decayed
    assert {
        "towers.logit_scale",
        "towers.token_embedding.weight",
        "towers.positional_embedding",
        "towers.visual.positional_embedding",
        "towers.visual.class_embedding",
        "decoder.queries",
    } <= rest
    assert all(name.endswith("bias") or ".ln_" in name for name in rest if "resblocks" in name)
    assert not any(name.endswith("bias") or ".ln_" in name for name in decayed)


def test_decay_is_decoupled_and_scaled_by_the_learning_rate(model: ClipsModel) -> None:
    optimizer = build_optimizer(model, weight_decay=0.2, beta1=0.9, beta2=0.95)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    shrunk = dict(model.named_parameters())
    torch.testing.assert_close(shrunk["decoder.head.weight"].detach(), before["decoder.head.weight"] * 0.9)
    torch.testing.assert_close(shrunk["decoder.queries"].detach(), before["decoder.queries"])


def test_every_trained_parameter_is_in_one_group_with_the_recipes_constants() -> None:
    fixed = build_model(ModelConfig(size="tiny", image_px=32, target_length=8, pos_embed="sincos"))
    fixed.towers.visual.conv1.weight.requires_grad_(False)
    optimizer = build_optimizer(fixed, weight_decay=0.2, beta1=0.9, beta2=0.95)
    optimised = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(optimised) == sorted(id(p) for p in fixed.parameters() if p.requires_grad)
    assert id(fixed.towers.visual.positional_embedding) not in optimised
    for group, decay in zip(optimizer.param_groups, (0.2, 0.0), strict=True):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, decay)


def test_learning_rate_rises_linearly_then_falls_along_a_cosine_to_zero() -> None:
    rates = [learning_rate(step, num_steps=110, warmup_steps=10, peak=3.0) for step in range(111)]
    assert rates[:10] == pytest.approx([0.3 * (step + 1) for step in range(10)])
    assert rates[10] == 3.0
    assert rates[35] == pytest.approx(1.5 * (1 + math.cos(math.pi / 4)))
    assert rates[60] == pytest.approx(1.5)
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_learning_rate_without_warm_up_starts_at_the_peak_and_never_rises_again() -> None:
    assert learning_rate(0, num_steps=4, warmup_steps=0, peak=2.0) == 2.0
    assert learning_rate(9, num_steps=4, warmup_steps=0, peak=2.0) == pytest.approx(0.0, abs=1e-12)


def test_the_gradient_is_clipped_to_the_norm_and_a_shorter_one_is_left_alone() -> None:
    weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    for weight, gradient in zip(weights, ([3.0, 0.0], [4.0]), strict=True):
        weight.grad = torch.tensor(gradient)
    clip_gradient(weights, 5.0, 10.0)
    assert weights[0].grad is not None and weights[0].grad.tolist() == [3.0, 0.0]
    clip_gradient(weights, 5.0, 1.0)
    assert [gradient for weight in weights for gradient in weight.grad.tolist()] == pytest.approx([0.6, 0.0, 0.8])


def test_the_moving_average_follows_the_trained_weights_only() -> None:
    model = torch.nn.Linear(1, 1)
    model.bias.requires_grad_(False)
    torch.nn.init.constant_(model.weight, 0.0)
    average = MovingAverage(model, 0.75)
    torch.nn.init.constant_(model.weight, 1.0)
    average.update()
    average.update()
    assert average.weights.keys() == {"weight"}
    assert average.weights["weight"].item() == pytest.approx(1 - 0.75**2)
