"""What becomes of a downloaded image: checked by its content, kept as it is or resized and encoded again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from clips_data.pixels import WHITE, decode, open_header, orientation, to_srgb, upright, verify
from clips_data.pixels import ImageRefused as ImageRefused

if TYPE_CHECKING:
    from clips_data.config import DownloadConfig

KEPT_FORMATS: Final = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Stored byte for byte where nothing is resized. MPO is a phone's JPEG with further pictures behind the first."""
MAX_SIDE_PX: Final = 16_383
"""Longest side that is encoded; WebP holds no more."""
_PHASH_PX, _PHASH_BITS_A_SIDE = 32, 8


@dataclass(frozen=True)
class ImageSettings:
    """What is done to an image. ``resize``, ``image_px`` and the rest mean what they mean in ``DownloadConfig``."""

    max_pixels: int
    resize: str = "no"
    image_px: int = 256
    only_if_bigger: bool = False
    encode: str = "jpg"
    encode_quality: int = 95
    phash: bool = False

    @classmethod
    def of(cls, config: DownloadConfig) -> ImageSettings:
        return cls(
            max_pixels=config.max_pixels,
            resize=config.resize,
            image_px=config.image_px,
            only_if_bigger=config.only_if_bigger,
            encode=config.encode,
            encode_quality=config.encode_quality,
            phash=config.dedup == "phash",
        )


@dataclass(frozen=True)
class CheckedImage:
    """Bytes that decode, and the extension they are stored under.

    Sizes in pixels: as stored, and as the header of the downloaded bytes says. ``orientation`` is the EXIF value that a
    reader of the stored bytes must still apply (1 to 8), ``None`` where they say nothing of it; ``phash`` is 16 hex
    digits that near-duplicates share.
    """

    data: bytes
    extension: str
    width_px: int
    height_px: int
    original_width_px: int
    original_height_px: int
    orientation: int | None = None
    phash: str | None = None


def check(data: bytes, settings: ImageSettings) -> CheckedImage:
    """Checks the size from the header before any decoding, decodes the image wholly, and resizes it where asked.

    What is encoded again is the first frame, upright, in sRGB, on white, without metadata. Same input, same bytes.
    Raises ``ImageRefused`` with ``not_an_image``, ``too_many_pixels`` or ``decode_failed``.
    """
    image = open_header(data, settings.max_pixels)
    size_px = image.size
    if settings.resize == "no" and image.format in KEPT_FORMATS:
        if settings.phash:
            phash = _phash(decode(image, data, min(size_px) / _PHASH_PX), orientation(image))
        else:
            verify(image, data)
            phash = None
        return CheckedImage(data, KEPT_FORMATS[image.format], *size_px, *size_px, orientation(image), phash)
    target_px = _target_px(size_px, settings)
    if max(target_px) > MAX_SIDE_PX or target_px[0] * target_px[1] > settings.max_pixels:
        raise ImageRefused("too_many_pixels", f"{target_px[0]} x {target_px[1]} pixels after resizing")
    pixels = decode(image, data, min(size_px) / min(target_px))
    phash = _phash(pixels, orientation(image)) if settings.phash else None
    if target_px != size_px:
        pixels = _scaled(pixels, size_px, target_px, crop=settings.resize == "center_crop")
    pixels = upright(to_srgb(pixels, image), orientation(image))
    if settings.resize == "border" and not (settings.only_if_bigger and target_px == size_px):
        pixels = _padded(pixels, settings.image_px)
    height_px, width_px = pixels.shape[:2]
    return CheckedImage(
        _encoded(pixels, settings), settings.encode, width_px, height_px, *size_px, orientation=None, phash=phash
    )


def _target_px(size_px: tuple[int, int], settings: ImageSettings) -> tuple[int, int]:
    """The size to scale to: the whole image, or its centred square where that is cut out. The rules of img2dataset."""
    width_px, height_px = size_px
    if settings.resize == "no":
        return size_px
    side_px = (min if settings.resize in ("keep_ratio", "center_crop") else max)(size_px)
    if settings.only_if_bigger and side_px <= settings.image_px:
        return size_px  # neither cropped nor padded
    if settings.resize == "center_crop":
        return settings.image_px, settings.image_px
    scale = settings.image_px / side_px
    return max(1, round(width_px * scale)), max(1, round(height_px * scale))


def _scaled(pixels: Any, size_px: tuple[int, int], target_px: tuple[int, int], *, crop: bool) -> Any:
    """``size_px`` is the image's whole size, of which ``pixels`` may be a smaller decode."""
    import cv2

    if crop:
        height_px, width_px = pixels.shape[:2]
        side_px = min(height_px, width_px)
        top, left = (height_px - side_px) // 2, (width_px - side_px) // 2
        pixels = pixels[top : top + side_px, left : left + side_px]
    smaller = min(target_px) < min(size_px) if crop else max(target_px) < max(size_px)
    return cv2.resize(pixels, target_px, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LANCZOS4)


def _padded(pixels: Any, side_px: int) -> Any:
    import cv2

    down_px, right_px = side_px - pixels.shape[0], side_px - pixels.shape[1]
    top, left = down_px // 2, right_px // 2
    return cv2.copyMakeBorder(pixels, top, down_px - top, left, right_px - left, cv2.BORDER_CONSTANT, value=WHITE)


def _encoded(pixels: Any, settings: ImageSettings) -> bytes:
    import cv2

    options = {
        "jpg": [cv2.IMWRITE_JPEG_QUALITY, settings.encode_quality],
        "png": [],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, settings.encode_quality],
    }
    encoded: bytes = cv2.imencode(f".{settings.encode}", pixels, options[settings.encode])[1].tobytes()
    return encoded


def _phash(pixels: Any, orientation: int | None) -> str:
    """The low frequencies of the upright grey picture, those along its sides left out: which are above their median.

    Frequencies are rounded, so that a plain picture has a hash of zeros and not one of its noise.
    """
    import cv2
    import numpy as np

    grey = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (_PHASH_PX, _PHASH_PX), interpolation=cv2.INTER_AREA)
    frequencies = np.rint(cv2.dct(upright(small, orientation).astype(np.float32)))
    low = frequencies[1 : _PHASH_BITS_A_SIDE + 1, 1 : _PHASH_BITS_A_SIDE + 1].ravel()
    return np.packbits(low > np.median(low)).tobytes().hex()
