"""What an evaluation found: figures that know what they were computed from, so that each can have an interval.

A figure is a function of sums over *units*. A unit is what would be drawn anew if the evaluation were repeated with
other data: an image with all of its captions, never a single caption of five.

Shape suffixes: U units, D sums that a figure is made of, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

RESAMPLES = 1000
LEVEL = 0.95
DRAWS_PER_BLOCK = 1 << 22
"""How many units are drawn at once: a block of indices takes 32 MB."""


def ratio(sums_RD: Tensor) -> Tensor:
    """float64 [R]: the first sum over the second."""
    return sums_RD[:, 0] / sums_RD[:, 1]


@dataclass(frozen=True)
class Figure:
    """One figure. ``statistic`` maps float64 sums [R, D] to float64 figures [R]."""

    units_UD: Tensor
    statistic: Callable[[Tensor], Tensor] = ratio
    chance: float | None = None
    """What random answers would score, where that is known."""

    @classmethod
    def mean(cls, values_U: Tensor, weights_U: Tensor | None = None, *, chance: float | None = None) -> Figure:
        """The mean of values, or of sums of values over ``weights_U`` many each."""
        values_U = values_U.double()
        weights_U = torch.ones_like(values_U) if weights_U is None else weights_U.double()
        return cls(torch.stack([values_U, weights_U], dim=1), chance=chance)

    @property
    def value(self) -> float:
        return float(self.statistic(self.units_UD.double().sum(0, keepdim=True))[0])

    def interval(self, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> tuple[float, float]:
        """Percentile bootstrap over units: where ``level`` of the figures of resampled units lie."""
        units_UD = self.units_UD.double()
        count = len(units_UD)
        generator = torch.Generator().manual_seed(seed)
        per_block = max(1, DRAWS_PER_BLOCK // count)
        found = []
        for start in range(0, resamples, per_block):
            rows = min(per_block, resamples - start)
            drawn_RU = torch.randint(count, (rows, count), generator=generator)
            # How often each unit was drawn, and then one product, instead of a gather of R × U × D.
            times_RU = torch.zeros(rows, count, dtype=torch.float64).scatter_add_(
                1, drawn_RU, torch.ones(1, dtype=torch.float64).expand(rows, count)
            )
            found.append(self.statistic(times_RU @ units_UD))
        figures_R = torch.cat(found)
        margin = (1 - level) / 2
        low, high = torch.quantile(figures_R[figures_R.isfinite()], torch.tensor([margin, 1 - margin]).double())
        return float(low), float(high)

    def shown(self, *, seed: int) -> dict[str, float]:
        """As in a result file."""
        low, high = self.interval(seed=seed)
        about = {"value": self.value, "low": low, "high": high}
        return about if self.chance is None else about | {"chance": self.chance}


@dataclass
class Outcome:
    """What one task found on one data set with one model."""

    figures: dict[str, Figure]
    """Name → figure; shares are in 0…1."""
    counts: Counter[str] = field(default_factory=Counter)
    """Images and texts by what became of them, so that every figure has a denominator."""
    about: dict[str, Any] = field(default_factory=dict)
    """How it was computed, in words and plain values: ties, tokenizer, templates."""
    details: dict[str, Any] = field(default_factory=dict)
    """What a reader may want beside the figures: per class, the hardest misses. Plain values."""
