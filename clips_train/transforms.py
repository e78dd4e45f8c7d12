"""Image bytes to pixels: scaled decoding, the training augmentation, the evaluation preprocessing.

The augmentation follows METHOD §6: RandomResizedCrop over 40–100 % of the area, bilinear with antialias; colour jitter
of strength 0.4 with probability 0.8; grayscale with probability 0.2; no horizontal flip. Every draw is a function of
(seed, epoch, key). Pixels leave here as uint8 and are normalised on the device by ``normalise``.

Shape suffixes: B batch, C 3 channels (RGB), H and W pixels.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import functional as tvf

from clips_data import draws

Augment = Literal["none", "crop", "full"]
Box = tuple[float, float, float, float]

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
INTERPOLATION = "bilinear"
RESIZE_MODE = "squash"

MAX_IMAGE_PIXELS = 100_000_000
SHRINK_FACTOR = 2
"""Decoded images keep a shorter side of this many times the model's: the smallest crop is then still not enlarged."""

CROP_AREA = (0.4, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10
JITTER_PROBABILITY = 0.8
GRAYSCALE_PROBABILITY = 0.2
JITTER_BRIGHTNESS = JITTER_CONTRAST = JITTER_SATURATION = 0.32
JITTER_HUE = 0.08


class BadImage(Exception):
    """No picture we can use; ``reason`` is one of ``not_an_image | too_many_pixels | decode_failed``."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode(data: bytes, image_px: int) -> Image.Image:
    """RGB picture whose shorter side is at most ``SHRINK_FACTOR`` × ``image_px``.

    JPEGs are decoded at a reduced scale. Raises ``BadImage`` on bytes that are no whole picture of a sane size.
    """
    shorter_px = SHRINK_FACTOR * image_px
    try:
        file = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise BadImage("not_an_image") from error
    width, height = file.size
    if width * height > MAX_IMAGE_PIXELS:
        raise BadImage("too_many_pixels")
    scale = shorter_px / min(width, height)
    try:
        file.draft("RGB", (math.ceil(width * scale), math.ceil(height * scale)))
        image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage("decode_failed") from error
    if scale < 1:
        target = (max(shorter_px, round(width * scale)), max(shorter_px, round(height * scale)))
        image = image.resize(target, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image


def to_pixels(image: Image.Image) -> Tensor:
    """uint8 tensor of shape [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def squash(image: Image.Image, image_px: int) -> Tensor:
    """Evaluation preprocessing: both sides resized to ``image_px``, nothing cropped; uint8 [3, image_px, image_px]."""
    return to_pixels(image.resize((image_px, image_px), Image.Resampling.BILINEAR))


def normalise(pixels_BCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 in 0…255 → float with ImageNet mean 0 and standard deviation 1, on the device of the input."""
    mean_C11 = torch.tensor(IMAGE_MEAN, device=pixels_BCHW.device).view(3, 1, 1)
    std_C11 = torch.tensor(IMAGE_STD, device=pixels_BCHW.device).view(3, 1, 1)
    return ((pixels_BCHW.float() / 255 - mean_C11) / std_C11).to(dtype)


def augment(image: Image.Image, image_px: int, mode: Augment, *, seed: int, epoch: int, key: str) -> Tensor:
    """Training view of a picture: uint8 of shape [3, image_px, image_px].

    ``none`` is the evaluation preprocessing, ``crop`` crops only, ``full`` also changes colours.
    """
    if mode == "none":
        return squash(image, image_px)

    def draw(purpose: str) -> float:
        return draws.uniform(seed, f"augment.{purpose}", epoch, key)

    box = crop_box(image.width, image.height, draw)
    pixels_CHW = to_pixels(image.resize((image_px, image_px), Image.Resampling.BILINEAR, box=box))
    if mode == "full":
        if draw("jitter") < JITTER_PROBABILITY:
            pixels_CHW = colour_jitter(pixels_CHW, draw)
        if draw("grayscale") < GRAYSCALE_PROBABILITY:
            pixels_CHW = tvf.rgb_to_grayscale(pixels_CHW, num_output_channels=3)
    return pixels_CHW


def crop_box(width: int, height: int, draw: Callable[[str], float]) -> Box:
    """RandomResizedCrop's box (left, upper, right, lower) in pixels.

    Area and aspect are drawn up to ``CROP_TRIES`` times until the box fits; then the largest centred box of an allowed
    aspect is taken.
    """
    low, high = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    for attempt in range(CROP_TRIES):
        area = width * height * _between(*CROP_AREA, draw(f"area.{attempt}"))
        aspect = math.exp(_between(low, high, draw(f"aspect.{attempt}")))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(draw("left") * (width - crop_width + 1))
            upper = int(draw("upper") * (height - crop_height + 1))
            return left, upper, left + crop_width, upper + crop_height
    aspect = min(max(width / height, CROP_ASPECT[0]), CROP_ASPECT[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, upper = (width - crop_width) // 2, (height - crop_height) // 2
    return left, upper, left + crop_width, upper + crop_height


def colour_jitter(pixels_CHW: Tensor, draw: Callable[[str], float]) -> Tensor:
    """Brightness, contrast, saturation and hue, each by its own draw, in a drawn order."""
    changes: list[tuple[float, Callable[[Tensor], Tensor]]] = []
    for name, strength, change in (
        ("brightness", JITTER_BRIGHTNESS, tvf.adjust_brightness),
        ("contrast", JITTER_CONTRAST, tvf.adjust_contrast),
        ("saturation", JITTER_SATURATION, tvf.adjust_saturation),
    ):
        factor = _between(1 - strength, 1 + strength, draw(name))
        changes.append((draw(f"order.{name}"), functools.partial(_swapped, change, factor)))
    hue = _between(-JITTER_HUE, JITTER_HUE, draw("hue"))
    changes.append((draw("order.hue"), functools.partial(_swapped, tvf.adjust_hue, hue)))
    for _, apply in sorted(changes, key=lambda change: change[0]):
        pixels_CHW = apply(pixels_CHW)
    return pixels_CHW


def _swapped(change: Callable[[Tensor, float], Tensor], factor: float, pixels_CHW: Tensor) -> Tensor:
    return change(pixels_CHW, factor)


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
