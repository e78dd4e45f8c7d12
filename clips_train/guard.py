"""Decides whether a step's update is made, and when a run is past help."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from clips_data.errors import UserError
from clips_train.checkpoint import Progress
from clips_train.config import TrainConfig

RECENT = 0.98
"""Decay per step of the running mean that spikes are measured by."""


def fault(loss: float, gradient_norm: float, progress: Progress, config: TrainConfig) -> str | None:
    """What is wrong with a step, in words; ``None`` when nothing is."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(gradient_norm):
        return f"the norm of the gradient is {gradient_norm}"
    recent = progress.recent_loss
    if config.spike_factor and recent is not None and loss > config.spike_factor * recent:
        return f"the loss is {loss:.4g}, more than {config.spike_factor:g} times the recent mean of {recent:.4g}"
    return None


def after(progress: Progress, losses: Mapping[str, float], fault: str | None) -> Progress:
    """The progress of a run after a step with these losses, made or left out."""
    if fault is not None:
        return replace(progress, skipped_steps=progress.skipped_steps + 1, skipped_in_row=progress.skipped_in_row + 1)
    loss = losses["total"]
    recent = loss if progress.recent_loss is None else RECENT * progress.recent_loss + (1 - RECENT) * loss
    return replace(
        progress,
        recent_loss=recent,
        skipped_in_row=0,
        losses=losses,
        logged_loss=progress.logged_loss + loss,
        logged_steps=progress.logged_steps + 1,
    )


def stop_if_hopeless(
    progress: Progress, losses: Mapping[str, float], fault: str | None, number: int, config: TrainConfig
) -> None:
    """Raises ``UserError`` when more steps in a row than allowed were left out, or all steps of a run.

    ``progress`` is that after the step. Called before the update, so that the last checkpoint and the weights stay
    sound.
    """
    is_untrained_to_the_end = not progress.losses and number * config.batch >= config.samples
    if fault is None or (progress.skipped_in_row <= config.max_skipped_steps and not is_untrained_to_the_end):
        return
    before = f", as in the {progress.skipped_in_row - 1} steps before it" if progress.skipped_in_row > 1 else ""
    parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items() if name != "total")
    raise UserError(
        f"Training stopped at step {number}: {fault}{before} ({parts}). The weights were not updated. Lower lr, "
        "lengthen warmup_samples, set grad_clip, or use precision fp32, and start again with --overwrite."
    )
