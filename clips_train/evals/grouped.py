"""The mean over groups of the share that is right in each: of classes for recall, of files for SugarCrepe."""

from __future__ import annotations

import torch
from torch import Tensor

from clips_train.evals.outcome import Figure


def mean_of_shares(
    right_N: Tensor, group_N: Tensor, unit_N: Tensor | None = None, *, chance: float | None = None
) -> Figure:
    """Of N answers, ``right_N`` in 0…1, each in the group ``group_N`` and drawn anew with its unit ``unit_N``.

    Groups are int64 from 0, units too; without units every answer is one. Groups without answers do not count, neither
    in the value nor where a resample drew none of their units. The sums of a thousand groups are kept sparse.
    """
    unit_N = torch.arange(len(right_N)) if unit_N is None else unit_N
    num_units, num_groups = int(unit_N.max()) + 1, int(group_N.max()) + 1
    places_2M = torch.stack([unit_N.repeat(2), torch.cat([group_N, group_N + num_groups])])
    values_M = torch.cat([right_N.double(), torch.ones(len(right_N), dtype=torch.float64)])
    sums_UD = torch.sparse_coo_tensor(places_2M, values_M, (num_units, 2 * num_groups), check_invariants=True)
    return Figure(sums_UD.coalesce(), _mean_of_shares, chance)


def _mean_of_shares(sums_RD: Tensor) -> Tensor:
    """float64 [R]: the first half of the sums over the second, averaged where the second is not 0."""
    right_RG, all_RG = sums_RD.to_dense().chunk(2, dim=1)
    return (right_RG / all_RG).nanmean(dim=1)
