"""Where tensors live."""

from __future__ import annotations

import torch

from clips_data.errors import UserError


def pick_device(name: str) -> torch.device:
    """``auto`` takes the GPU where there is one. Raises ``UserError`` for a device that torch does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device {name!r} cannot be used here ({error}). Use --device cpu, or auto.") from error
