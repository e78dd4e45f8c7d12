"""Looks at downloaded bytes: which image format they are by content, how large, whether they decode."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # stored byte for byte
TRANSCODED_FORMATS = ("GIF", "AVIF")  # stored as the JPEG of their first frame
JPEG_QUALITY = 95


class ImageRefused(Exception):
    """The bytes are no usable image; ``code`` is one of ``schema.DOWNLOAD_CODES``."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


@dataclass(frozen=True)
class CheckedImage:
    """Bytes that decode, with their size in pixels and the extension they are stored under."""

    data: bytes
    extension: str
    width_px: int
    height_px: int


def check(data: bytes, max_pixels: int) -> CheckedImage:
    """Checks the size from the header before decoding, then decodes the whole image once.

    Raises ``ImageRefused`` with ``not_an_image``, ``too_many_pixels`` or ``decode_failed``.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own cap comes right after
        try:
            image = Image.open(io.BytesIO(data), formats=[*KEPT_FORMATS, *TRANSCODED_FORMATS])
        except Image.DecompressionBombError as error:
            raise ImageRefused("too_many_pixels", str(error)) from None
        except (OSError, SyntaxError, ValueError):
            raise ImageRefused("not_an_image", f"{len(data)} bytes that begin with {data[:8]!r}") from None
        width_px, height_px = image.size
        if width_px * height_px > max_pixels:
            raise ImageRefused("too_many_pixels", f"{width_px} x {height_px} pixels")
        try:
            image.load()
        except (OSError, SyntaxError, ValueError, IndexError, EOFError) as error:
            raise ImageRefused("decode_failed", str(error)) from None
    assert image.format is not None
    if image.format in KEPT_FORMATS:
        return CheckedImage(data, KEPT_FORMATS[image.format], width_px, height_px)
    stored = io.BytesIO()
    image.convert("RGB").save(stored, "JPEG", quality=JPEG_QUALITY)
    return CheckedImage(stored.getvalue(), "jpg", width_px, height_px)
