"""Processes that train together: what they exchange, how they share a model, and how they fail."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import ranks
import shardmaker
import torch
from bytemaker import small_vocabulary  # noqa: F401
from ranks import fork_server  # noqa: F401
from safetensors.torch import load_file

from clips_data.errors import UserError
from clips_train import checkpoint, distributed, sharded
from clips_train.config import TrainConfig
from clips_train.distributed import World
from clips_train.metrics import read_metrics
from clips_train.model import build_model
from clips_train.optim import build_optimizer
from clips_train.train import train


def exchange() -> dict[str, Any]:
    with distributed.started("cpu") as world:
        mine = torch.tensor([[1.0, 2.0]]) * (world.rank + 1)
        mine.requires_grad_()
        everyone = world.gather(mine)
        weights = torch.tensor([[1.0], [10.0]]) * (world.rank + 1)  # each uses all rows, in its own way
        (everyone * weights).sum().backward()
        assert mine.grad is not None
        return {
            "rows": everyone.tolist(),
            "gradient": mine.grad.tolist(),
            "there": world.gather(torch.tensor([world.rank == 0])).tolist(),
            "ids": world.gather(torch.tensor([[7 + world.rank]])).tolist(),
            "sum": world.sum(torch.tensor([1.5, world.rank])).tolist(),
            "max": world.max(torch.tensor([world.rank, -world.rank])).tolist(),
            "flags": world.flags(world.rank == 1, False),
            "counts": world.sum_counts(Counter(loaded=2, **{f"bad.{world.rank}": 1})),
            "first": world.on_first(lambda: world.rank),
        }


def test_what_processes_exchange_is_the_same_in_all_and_gradients_of_every_use_come_back() -> None:
    first, second = ranks.run(exchange, 2)
    assert first.pop("gradient") == [[3.0, 3.0]] and second.pop("gradient") == [[30.0, 30.0]]
    assert (
        first
        == second
        == {
            "rows": [[1.0, 2.0], [2.0, 4.0]],
            "there": [True, False],
            "ids": [[7], [8]],
            "sum": [3.0, 1.0],
            "max": [1, 0],
            "flags": [True, False],
            "counts": {"loaded": 4, "bad.0": 1, "bad.1": 1},
            "first": 0,
        }
    )


def test_one_process_alone_exchanges_with_itself() -> None:
    world = World.alone()
    x = torch.ones(2, 3, requires_grad=True)
    assert world.gather(x) is x and world.is_first
    assert world.flags(True, False) == [True, False] and not world.any(False)
    assert world.sum_counts({"loaded": 3}) == {"loaded": 3}
    with pytest.raises(UserError, match="mine"):
        world.on_first(lambda: fail("mine"))


def fail(message: str) -> None:
    raise UserError(message)


def fail_in(rank: int) -> None:
    with distributed.started("cpu") as world:
        if world.rank == rank:
            fail("the disk of this one is full")
        world.sum(torch.ones(1))


def test_the_failure_of_one_process_ends_the_others_with_its_reason() -> None:
    first, second = ranks.run(fail_in, 2, 1)
    assert second.args == ("UserError", "the disk of this one is full")
    assert first.args[0] == "UserError"
    assert "Process 1 of 2 failed, and this one stopped with it: the disk of this one is full" in first.args[1]


def fail_first() -> None:
    with distributed.started("cpu") as world:
        world.on_first(lambda: fail("no such folder"))


def test_a_failure_that_all_share_is_told_by_the_first_process_alone() -> None:
    first, second = ranks.run(fail_first, 2)
    assert first.args == ("UserError", "no such folder")
    assert second.args == ("SystemExit", "1")


def die_in(rank: int) -> None:
    with distributed.started("cpu") as world:
        if world.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        world.sum(torch.ones(1))


def test_the_death_of_one_process_ends_the_others_with_a_sentence() -> None:
    first, second = ranks.run(die_in, 2, 1)
    assert second.args[0] == "killed"
    assert first.args[0] == "UserError" and "ended without a word" in first.args[1]


def test_a_batch_that_cannot_be_shared_out_is_refused_with_the_numbers() -> None:
    world = World(0, 3, torch.device("cpu"))
    with pytest.raises(UserError, match="batch 64 cannot be shared out: 3 processes with accumulation 2 make 6 equal"):
        distributed.check_shares(TrainConfig(batch=64, accumulation=2), world)
    distributed.check_shares(TrainConfig(batch=66, accumulation=2), world)


def norms() -> tuple[float, float]:
    with distributed.started("cpu") as world:
        whole = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        for parameter in whole:
            parameter.grad = torch.full_like(parameter, 2.0)
        sound = sharded.gradient_norm(whole, world)
        whole[0].grad[1] = float("nan")  # type: ignore[index]
        return sound, sharded.gradient_norm(whole, world)


def test_the_norm_of_the_gradient_is_that_of_all_parameters_and_not_finite_where_one_is_not() -> None:
    for sound, spoiled in ranks.run(norms, 2):
        assert sound == pytest.approx((7 * 4) ** 0.5) and spoiled != spoiled


# --- the same step, however it is shared out --------------------------------------------------------------------------

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (1, {}),
    "two parts": (1, {"accumulation": 2}),
    "four parts, checkpointing": (1, {"accumulation": 4, "gradient_checkpointing": True}),
    "ddp 2": (2, {}),
    "ddp 2, two parts": (2, {"accumulation": 2}),
    "ddp 2, whole loss": (2, {"local_loss": False}),
    "ddp 4": (4, {}),
    "fsdp 2": (2, {"parallel": "fsdp", "ema": 0.5}),
    "fsdp 2, two parts, checkpointing": (2, {"parallel": "fsdp", "accumulation": 2, "gradient_checkpointing": True}),
}
SHORT = {"from": "synthetic", "reduce": "one_piece"}
FEW_WAYS = ("whole", "ddp 2", "fsdp 2, two parts, checkpointing")
OBJECTIVES: dict[str, dict[str, Any]] = {
    "clips": {
        "views": ["web", {**SHORT, "count": 2, "negatives": ["web"], "choose_negatives": "hardest"}],
        "caption_every": 3,  # a process may have no captioned sample at all
        "caption_negatives": 50,
    },
    "teacher-forced": {"decoder": "teacher_forced", "condition": None, "text_padding": "trimmed"},
    "gates": {"views": [{"from": "web", "gate": True}, {**SHORT, "gate": True}]},
    "captions only": {"views": []},
    "sigmoid": {"contrastive": "sigmoid", "decoder": "none", "caption_weight": 0},
}


def settings(objective: str, way: str) -> TrainConfig:
    chosen: dict[str, Any] = {
        "size": "tiny", "image_px": 32, "context_length": 12, "target_length": 12, "batch": 8, "samples": 16,
        "lr": 1e-4, "warmup_samples": 0, "log_steps": 1, "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**chosen | OBJECTIVES[objective] | WAYS[way][1])


def train_all(jobs: list[tuple[str, str]], folder: Path) -> None:
    for objective, way in jobs:
        train(settings(objective, way), shards=folder / "shards", out=folder / objective / way, quiet=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every objective, trained for two steps in every way."""
    folder = tmp_path_factory.mktemp("ways")
    shardmaker.write_shards(folder / "shards", num_train=16, size_px=32)
    for size in (1, 2, 4):
        jobs = [
            (objective, way)
            for objective in OBJECTIVES
            for way in (WAYS if objective == "clips" else FEW_WAYS)
            if WAYS[way][0] == size
        ]
        found = ranks.run(train_all, size, jobs, folder)
        assert found == [None] * size, found
    return folder


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_moments_and_weights_do_not_depend_on_how_a_step_is_shared_out(trained: Path, objective: str) -> None:
    whole = trained / objective / "whole"
    rows, moments, weights = read_metrics(whole / "metrics.jsonl"), moments_of(whole), weights_of(whole)
    squares = moments_of(whole, "exp_avg_sq")
    assert len(rows) == 2 and moments
    for way in WAYS:
        run = trained / objective / way
        if way == "whole" or not run.exists():
            continue
        for row, expected in zip(read_metrics(run / "metrics.jsonl"), rows, strict=True):
            for name in ("loss", "contrastive_loss", "caption_loss", "grad_norm", "logit_scale"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (way, name)
            for name in ("batch_digest", "counts", "epoch", "samples"):
                assert row[name] == expected[name], (way, name)
        found = moments_of(run)
        assert found.keys() == moments.keys(), way
        for name, expected in moments.items():
            torch.testing.assert_close(
                found[name], expected, rtol=1e-4, atol=1e-6, msg=lambda m, at=(way, name): f"{at}: {m}"
            )
        for name, weight in weights_of(run).items():
            real = is_real(moments[name], squares[name]) if name in moments else torch.ones_like(weight).bool()
            torch.testing.assert_close(
                weight[real], weights[name][real], rtol=0, atol=1e-5, msg=lambda m, at=(way, name): f"{at}: {m}"
            )


def is_real(moment: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Where neither of the two gradients is but rounding noise, whose sign Adam would take for a direction.

    Of gradients g1 and g2, moment is 0.09 g1 + 0.1 g2 and square 0.0475 g1² + 0.05 g2²: 5 moment² where g1 is nothing.
    """
    first_is_noise = (square / moment.square() - 5).abs() < 0.05
    return (moment.abs() > 1e-6) & ~first_is_noise


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.find(run) / checkpoint.WEIGHTS)


def moments_of(run: Path, which: str = "exp_avg") -> dict[str, torch.Tensor]:
    """The first moments by parameter, or the second, put together by one process from what several wrote."""
    config = TrainConfig(**checkpoint.read_about(checkpoint.find(run))["config"])
    model = build_model(config.model, sigmoid=config.contrastive == "sigmoid")
    optimizer = build_optimizer(model, weight_decay=0, beta1=0.9, beta2=0.95)
    names = {parameter: name for name, parameter in model.named_parameters()}
    checkpoint.load_optimizer(checkpoint.find(run), optimizer, names)
    return {names[parameter]: state[which] for parameter, state in optimizer.state.items()}


def test_the_moving_average_is_that_of_the_weights_also_in_shards(trained: Path) -> None:
    run = trained / "clips" / "fsdp 2"
    initial, averaged = build_model(settings("clips", "fsdp 2").model).state_dict(), {}
    averaged = load_file(checkpoint.find(run) / checkpoint.AVERAGED)
    assert averaged.keys() == initial.keys()
    name = "towers.visual.proj"
    assert not torch.equal(averaged[name], initial[name]) and not torch.equal(averaged[name], weights_of(run)[name])
    between = (averaged[name] - initial[name]) / (weights_of(run)[name] - initial[name])
    assert 0.2 < between.nanmedian() < 0.8


def test_what_the_objective_does_not_reach_keeps_its_initial_weights(trained: Path) -> None:
    initial = build_model(settings("captions only", "whole").model).state_dict()
    for way in ("whole", "ddp 2"):
        weights, moments = weights_of(trained / "captions only" / way), moments_of(trained / "captions only" / way)
        unreached = {"towers.logit_scale", "towers.visual.proj", "towers.text_projection", "towers.ln_final.weight"}
        assert not unreached & moments.keys() and "towers.token_embedding.weight" in moments
        assert all(torch.equal(weights[name], initial[name]) for name in unreached)
