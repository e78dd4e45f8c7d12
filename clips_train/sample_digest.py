"""A digest of what a run has been trained on, in order: equal for equal samples and texts, whoever loaded them."""

from __future__ import annotations

import hashlib

import torch

from clips_train.batch import Batch
from clips_train.distributed import World


def order_digest(before: str, batch: Batch, world: World) -> str:
    """The digest after a step, from that before it and the keys and texts of all processes' batches; 16 hex digits.

    Each sample is hashed with its place in the whole batch, so that the sum does not tell how places were shared out.
    """
    digests = [_of_sample(batch, row) for row in range(len(batch.keys))]
    total = int(world.sum(torch.tensor(digests, dtype=torch.int64).sum()))  # wraps around, the same way everywhere
    return hashlib.blake2b(f"{before} {total}".encode(), digest_size=8).hexdigest()


def _of_sample(batch: Batch, row: int) -> int:
    found = hashlib.blake2b(f"{batch.first_slot + row} {batch.keys[row]} ".encode(), digest_size=8)
    texts = [ids[row] for view in batch.views for ids in (view.ids_NKL, view.negatives_NML)]
    conditions = [] if batch.condition_NL is None else [batch.condition_NL[row]]
    for ids in (*texts, *conditions, batch.labels_NQ[row]):
        found.update(ids.contiguous().numpy().tobytes())
    return int.from_bytes(found.digest(), "little", signed=True)
