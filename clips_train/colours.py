"""Changes of colour on uint8 pixels, each within one level of torchvision's and several times faster (METHOD §6).

Everything is computed in numpy, on the thread that calls: torch would share so small an image out among its threads.

Shape suffixes: C 3 channels (RGB), H and W pixels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

BRIGHTNESS = CONTRAST = SATURATION = 0.32
HUE = 0.08
"""How far colours change."""
_ROUNDED_UP = np.float32(255.999 / 255)
"""torchvision turns 0…1 into levels by 255.999 and rounding down."""


def jitter(pixels_CHW: Pixels, draw: Callable[[str], float]) -> Pixels:
    """Brightness, contrast, saturation and hue, each by its own draw, in a drawn order."""
    changes: list[tuple[float, Callable[[Pixels], Pixels]]] = []
    for name, neutral, strength, change in (
        ("brightness", 1, BRIGHTNESS, brightness),
        ("contrast", 1, CONTRAST, contrast),
        ("saturation", 1, SATURATION, saturation),
        ("hue", 0, HUE, hue),
    ):
        amount = neutral - strength + 2 * strength * draw(name)
        changes.append((draw(f"order.{name}"), functools.partial(_swapped, change, amount)))
    for _, apply in sorted(changes, key=lambda change: change[0]):
        pixels_CHW = apply(pixels_CHW)
    return pixels_CHW


def _swapped(change: Callable[[Pixels, float], Pixels], amount: float, pixels_CHW: Pixels) -> Pixels:
    return change(pixels_CHW, amount)


def brightness(pixels_CHW: Pixels, factor: float) -> Pixels:
    return _levels(pixels_CHW * np.float32(factor))


def contrast(pixels_CHW: Pixels, factor: float) -> Pixels:
    """Away from the mean of the grey picture, or towards it."""
    mean = np.float32(grey(pixels_CHW).mean(dtype=np.float64))
    changed_CHW = pixels_CHW * np.float32(factor)
    changed_CHW += np.float32(1 - factor) * mean
    return _levels(changed_CHW)


def saturation(pixels_CHW: Pixels, factor: float) -> Pixels:
    """Away from the grey picture, or towards it."""
    changed_CHW = pixels_CHW * np.float32(factor)
    changed_CHW += grey(pixels_CHW) * np.float32(1 - factor)
    return _levels(changed_CHW)


def hue(pixels_CHW: Pixels, shift: float) -> Pixels:
    """Turns hues by ``shift`` of a circle, at most half of it; lightest and darkest channel keep their values.

    A hue h counts in sixths of the circle. Red is full within one sixth of h = 0 and gone within one of h = 3, and
    linear between; green and blue are the same from 2 and 4.
    """
    red, green, blue = pixels_CHW.astype(np.float32)
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    range_HW = high - low
    divisor = np.maximum(range_HW, 1)
    hue_HW = np.where(
        red == high, green - blue, np.where(green == high, blue - red + 2 * divisor, red - green + 4 * divisor)
    )
    hue_HW /= divisor
    hue_HW += np.float32(6 * shift)
    hue_HW -= 6 * (hue_HW >= 6)
    hue_HW += 6 * (hue_HW < 0)
    changed_CHW = np.empty_like(pixels_CHW)
    for channel, (centre, sign, offset) in enumerate(((3, 1, -1), (2, -1, 2), (4, -1, 2))):
        share_HW = np.abs(hue_HW - np.float32(centre))
        share_HW *= sign
        share_HW += offset
        np.clip(share_HW, 0, 1, out=share_HW)
        share_HW *= range_HW
        share_HW += low
        share_HW *= _ROUNDED_UP
        changed_CHW[channel] = share_HW
    return changed_CHW


def grey(pixels_CHW: Pixels) -> Pixels:
    """One plane of luma, uint8 [H, W]."""
    red, green, blue = pixels_CHW
    plane: NDArray[np.float32] = red * np.float32(0.2989)
    plane += green * np.float32(0.587)
    plane += blue * np.float32(0.114)
    return plane.astype(np.uint8)


def _levels(values: NDArray[Any]) -> Pixels:
    levels: Pixels = np.clip(values, 0, 255, out=values).astype(np.uint8)
    return levels
