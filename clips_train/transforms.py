"""Image bytes to pixels: scaled decoding, the training augmentation, the evaluation preprocessing.

A crop is drawn from the header's size, before decoding, and the picture is decoded no larger than the crop needs.

The augmentation follows METHOD §6: RandomResizedCrop over 40–100 % of the area, bilinear with antialias; colour jitter
of strength 0.4 with probability 0.8; grayscale with probability 0.2; no horizontal flip. Every draw is a function of
(seed, epoch, key). Pixels leave here as uint8 and are normalised on the device by ``normalise``.

Shape suffixes: B batch, C 3 channels (RGB), H and W pixels.
"""

from __future__ import annotations

import functools
import io
import math
import threading
from collections.abc import Callable, Hashable
from typing import Any, Final, Literal, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.nn import functional
from torchvision.io import decode_jpeg

from clips_data import draws
from clips_train import colours

Augment = Literal["none", "crop", "full"]
Box = tuple[int, int, int, int]
T = TypeVar("T")

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
INTERPOLATION: Final = "bilinear"
RESIZE_MODE: Final = "squash"

MAX_IMAGE_PIXELS = 100_000_000
SHRINK_FACTOR = 2
"""Decoded images keep a shorter side of this many times the model's: the smallest crop is then still not enlarged."""

CROP_MARGIN = 1.25
"""A picture is decoded at half its size only while the crop keeps this many times the model's side: with less, what
the scaled decoding leaves of frequencies that the model's size cannot hold would show (METHOD §6: antialias)."""
JPEG_SCALES = 8
"""JPEG decodes at 1/1 to 1/8."""
ENTRY_BYTES = 200
"""About what an entry of the cache takes beside its pixels."""

CROP_AREA = (0.4, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10
JITTER_PROBABILITY = 0.8
GRAYSCALE_PROBABILITY = 0.2


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
    file = _opened(data)
    width, height = file.size
    scale = shorter_px / min(width, height)
    image = _whole(file, (math.ceil(width * scale), math.ceil(height * scale)))
    if scale < 1:
        target = (max(shorter_px, round(width * scale)), max(shorter_px, round(height * scale)))
        image = image.resize(target, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return image.copy() if isinstance(image, ImageFile) else image  # which would keep the file's bytes


def decode_whole(data: bytes) -> Image.Image:
    """RGB picture at its own size, as other tools decode it. Raises ``BadImage`` as ``decode`` does."""
    file = _opened(data)
    image = _whole(file, file.size)
    return image.copy() if isinstance(image, ImageFile) else image


def _opened(data: bytes) -> ImageFile:
    """The picture as its header tells it, not decoded. Raises ``BadImage``."""
    try:
        file = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise BadImage("not_an_image") from error
    if file.width * file.height > MAX_IMAGE_PIXELS:
        raise BadImage("too_many_pixels")
    return file


def _whole(file: ImageFile, at_least: tuple[int, int]) -> Image.Image:
    """RGB, of a JPEG at the smallest scale that is not below a size. Raises ``BadImage``."""
    try:
        file.draft("RGB", at_least)
        file.load()
        return file if file.mode == "RGB" else file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage("decode_failed") from error


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
    values_BCHW = pixels_BCHW.to(torch.float32, copy=True)
    return values_BCHW.div_(255).sub_(mean_C11).div_(std_C11).to(dtype)  # in place, because batches are large


def training_view(
    read: Callable[[], bytes],
    image_px: int,
    mode: Augment,
    *,
    seed: int,
    epoch: int,
    key: str,
    kept: Kept | None = None,
) -> Tensor:
    """Training view of the image file that ``read`` gives: uint8 of shape [3, image_px, image_px].

    ``none`` is the evaluation preprocessing, ``crop`` crops only, ``full`` also changes colours. What is decoded on
    the way goes through ``kept``. Raises ``BadImage``, and whatever ``read`` raises.
    """
    kept = kept or Kept(None, None)
    file = _File(read)
    if mode == "none":
        return squash(kept.get(("whole", image_px), lambda: decode(file.data, image_px)), image_px)
    draw = functools.partial(_draw, seed, epoch, key)
    width, height = kept.get("size", lambda: file.opened.size)
    box = crop_box(width, height, draw)
    scale = crop_scale(box, image_px)
    pixels_CHW = kept.get(scale, lambda: file.pixels(scale))
    return _changed(_resized(pixels_CHW, scaled_box(box, scale, pixels_CHW), image_px), mode, draw)


def augment(image: Image.Image, image_px: int, mode: Augment, *, seed: int, epoch: int, key: str) -> Tensor:
    """``training_view`` of a picture that is decoded already."""
    if mode == "none":
        return squash(image, image_px)
    draw = functools.partial(_draw, seed, epoch, key)
    box = crop_box(image.width, image.height, draw)
    return _changed(_resized(to_pixels(image), box, image_px), mode, draw)


def _draw(seed: int, epoch: int, key: str, purpose: str) -> float:
    return draws.uniform(seed, f"augment.{purpose}", epoch, key)


def crop_box(width: int, height: int, draw: Callable[[str], float]) -> Box:
    """RandomResizedCrop's box (left, upper, right, lower) in whole pixels.

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


def crop_scale(box: Box, image_px: int) -> int:
    """n where decoding at 1/n leaves the crop ``CROP_MARGIN`` times the model's size; a power of two."""
    left, upper, right, lower = box
    times = min(right - left, lower - upper) / (CROP_MARGIN * image_px)
    return 1 << max(0, math.floor(math.log2(times)))


def scaled_box(box: Box, scale: int, pixels_CHW: Tensor) -> Box:
    """The box in a picture that was decoded at 1/``scale``, in whole pixels and inside of it."""
    _, height, width = pixels_CHW.shape
    left, upper, right, lower = (round(edge / scale) for edge in box)
    return left, upper, min(right, width), min(lower, height)


class _File:
    """An image file that is read and opened when it is asked for."""

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read

    @functools.cached_property
    def data(self) -> bytes:
        return self._read()

    @functools.cached_property
    def opened(self) -> ImageFile:
        return _opened(self.data)

    def pixels(self, scale: int) -> Tensor:
        """RGB at 1/``scale``, sides rounded up: uint8 [3, H, W] on HWC memory. To be called once."""
        file = self.opened
        if scale == 1 and file.format == "JPEG" and file.mode == "RGB":
            try:
                pixels_CHW: Tensor = decode_jpeg(torch.frombuffer(bytearray(self.data), dtype=torch.uint8))
                return pixels_CHW
            except RuntimeError:
                pass  # Pillow decides whether the file can be used, as it does at the other scales
        width, height = file.size
        by_jpeg = min(scale, JPEG_SCALES)
        image = _whole(file, (width // by_jpeg, height // by_jpeg))
        if image.size == (width, height):
            by_jpeg = 1
        if by_jpeg < scale:
            image = image.reduce(scale // by_jpeg)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _resized(pixels_CHW: Tensor, box: Box, image_px: int) -> Tensor:
    """Bilinear with antialias; as in RandomResizedCrop nothing outside the box is seen."""
    left, upper, right, lower = box
    crop_1CHW = pixels_CHW[None, :, upper:lower, left:right]
    size = (image_px, image_px)
    resized_1CHW: Tensor = functional.interpolate(crop_1CHW, size, mode="bilinear", antialias=True)
    return resized_1CHW[0].contiguous()


def _changed(pixels_CHW: Tensor, mode: Augment, draw: Callable[[str], float]) -> Tensor:
    if mode == "full":
        pixels = pixels_CHW.numpy()
        if draw("jitter") < JITTER_PROBABILITY:
            pixels = colours.jitter(pixels, draw)
        if draw("grayscale") < GRAYSCALE_PROBABILITY:
            pixels = np.repeat(colours.grey(pixels)[None], 3, axis=0)
        pixels_CHW = torch.from_numpy(pixels)
    return pixels_CHW


class PictureCache:
    """What was decoded of pictures, up to a number of bytes; what came first stays. Without effect on what is loaded.

    A picture is kept by its place and scale, so that what is found is what would have been decoded. Safe to share
    between threads; sent to another process it is empty.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._used_bytes = 0
        self._things: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> int:
        return self._limit_bytes

    def __setstate__(self, limit_bytes: int) -> None:
        self.__init__(limit_bytes)  # type: ignore[misc]

    def of(self, place: Hashable) -> Kept:
        return Kept(self, place)

    def get(self, at: Hashable) -> Any:
        return self._things.get(at)

    def put(self, at: Hashable, thing: Any) -> None:
        num_bytes = ENTRY_BYTES
        if isinstance(thing, Tensor):
            num_bytes += thing.numel()
        elif isinstance(thing, Image.Image):
            num_bytes += thing.width * thing.height * 4  # Pillow pads pixels to four bytes
        with self._lock:
            if at not in self._things and self._used_bytes + num_bytes <= self._limit_bytes:
                self._used_bytes += num_bytes
                self._things[at] = thing


class Kept:
    """What a cache has of one picture; nothing where there is no cache."""

    def __init__(self, cache: PictureCache | None, place: Hashable) -> None:
        self._cache, self._place = cache, place

    def get(self, what: Hashable, make: Callable[[], T]) -> T:
        if self._cache is None:
            return make()
        found: T | None = self._cache.get((self._place, what))
        if found is None:
            found = make()
            self._cache.put((self._place, what), found)
        return found


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * share
