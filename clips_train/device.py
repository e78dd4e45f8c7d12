"""Where tensors live."""

from __future__ import annotations

import torch

from clips_data.errors import UserError


def pick_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """``auto`` takes the GPU where there is one; ``local_rank`` picks among several, for a process of several.

    Raises ``UserError`` for a device that torch does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"Process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. "
                "Start one process per GPU (torchrun --nproc-per-node), or use --device cpu."
            )
        name = f"cuda:{local_rank}"
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device {name!r} cannot be used here ({error}). Use --device cpu, or auto.") from error
