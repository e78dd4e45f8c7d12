"""The picture that an engine is shown: the stored image upright, in sRGB, on white."""

from __future__ import annotations

from typing import Any, Final

from clips_data import pixels

MAX_PIXELS: Final = 178_956_970
"""What Pillow and vLLM refuse above."""


def decode_image(data: bytes) -> Any:
    """A PIL image in mode RGB, at its own size; ``None`` for bytes that are no whole image of a sane size."""
    import cv2
    from PIL import Image

    try:
        header = pixels.open_header(data, MAX_PIXELS)
        picture = pixels.to_srgb(pixels.decode(header, data, 1.0), header)
    except pixels.ImageRefused:
        return None
    return Image.fromarray(cv2.cvtColor(pixels.upright(picture, pixels.orientation(header)), cv2.COLOR_BGR2RGB))
