"""From image bytes to pixels: the header first, then the first frame as 8-bit rows on white, whatever the format.

Ordinary JPEGs go through OpenCV, at a half, a quarter or an eighth of their size where that is enough. Pillow reads the
headers and all that OpenCV gets wrong: other formats, CMYK, transparency, 16 bits.
"""

from __future__ import annotations

import functools
import io
import math
import re
import struct
import warnings
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from PIL import Image as Pillow
    from PIL import ImageCms

ORIENTATION_TAG: Final = 0x0112
WHITE: Final = (255, 255, 255)
_AVIF_HEADER_BYTES: Final = 1 << 16


class ImageRefused(Exception):
    """The bytes are no usable image; ``code`` is one of ``schema.DOWNLOAD_CODES``."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code, self.detail = code, detail


def open_header(data: bytes, max_pixels: int) -> Pillow.Image:
    """The header alone. Pillow's other parsers are never tried, whatever the bytes look like."""
    # Importing a plugin registers its parser.
    from PIL import AvifImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

    format = _format_of(data)
    if format is None:
        raise ImageRefused("not_an_image", f"{len(data)} bytes that begin with {data[:8]!r}")
    _refuse_large(_claimed_size_px(data, format), max_pixels)
    pillows_cap, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours comes right after
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            image = Image.open(io.BytesIO(data), formats=[format])
    except MemoryError:
        raise
    except Exception as error:  # whatever a parser raises at a stranger's bytes says that they do not decode
        raise _undecodable(error) from None
    finally:
        Image.MAX_IMAGE_PIXELS = pillows_cap
    _refuse_large(image.size, max_pixels)
    return image


def _format_of(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":  # brands; HEIC has the same container
        brands = data[8 : int.from_bytes(data[:4])]
        return "AVIF" if {b"avif", b"avis"} & {brands[at : at + 4] for at in range(0, len(brands), 4)} else None
    return None


def _claimed_size_px(data: bytes, format: str) -> tuple[int, int]:
    """The size in headers that the libraries act on, or fail at, before Pillow tells it; (1, 1) for all others."""
    if format == "WEBP" and data[12:16] == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    claims = re.findall(rb"ispe\0{4}(.{8})", data[:_AVIF_HEADER_BYTES], re.DOTALL) if format == "AVIF" else []
    sizes = (struct.unpack(">II", claim) for claim in claims)
    return max(sizes, key=math.prod, default=(1, 1))


def _refuse_large(size_px: tuple[int, int], max_pixels: int) -> None:
    num_pixels = size_px[0] * size_px[1]
    if num_pixels > max_pixels or num_pixels == 0:
        code = "too_many_pixels" if num_pixels else "decode_failed"
        raise ImageRefused(code, f"{size_px[0]} x {size_px[1]} pixels")


def _undecodable(error: Exception) -> ImageRefused:
    return ImageRefused("decode_failed", f"{type(error).__name__}: {error}"[:200])


def orientation(image: Pillow.Image) -> int | None:
    """The EXIF value, 1 to 8. Ask after the pixels: a PNG may carry it behind them. Damaged metadata are none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(ORIENTATION_TAG)
    except MemoryError:
        raise
    except Exception:
        return None
    return value if value in range(1, 9) else None


def verify(image: Pillow.Image, data: bytes) -> None:
    """Reads all of the first frame's data and makes as few pixels of them as it can."""
    if not _is_plain_jpeg(image) or _decoded_by_opencv(data, 8) is None:
        _load(image, 8)


def decode(image: Pillow.Image, data: bytes, ratio: float) -> Any:
    """The first frame as uint8 (height, width, blue-green-red), on white; bring it to sRGB with ``to_srgb``.

    ``ratio`` is how much smaller it will be made: a JPEG is then decoded smaller at once, but at least twice as large
    as needed, so that the resampling that follows decides the quality.
    """
    import cv2
    import numpy as np

    shrink = next((factor for factor in (8, 4, 2) if ratio >= 2 * factor), 1)
    if _is_plain_jpeg(image):
        pixels = _decoded_by_opencv(data, shrink)
        if pixels is not None:
            return pixels
    _load(image, shrink)
    try:
        return cv2.cvtColor(np.asarray(_flat(image)), cv2.COLOR_RGB2BGR)
    except (ValueError, OSError) as error:
        raise _undecodable(error) from None


def _is_plain_jpeg(image: Pillow.Image) -> bool:
    """What OpenCV decodes as Pillow does. It knows nothing of inverted CMYK and of profiles of grey."""
    plain_mode = image.mode == "RGB" or (image.mode == "L" and "icc_profile" not in image.info)
    return image.format in ("JPEG", "MPO") and plain_mode


def _decoded_by_opencv(data: bytes, shrink: int) -> Any:
    """``None`` where it does not decode, as when the data end too early; Pillow knows why."""
    import cv2
    import numpy as np

    flags = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags[shrink] | cv2.IMREAD_IGNORE_ORIENTATION)


def _load(image: Pillow.Image, shrink: int) -> None:
    try:
        image.draft(None, (image.width // shrink, image.height // shrink))  # does something for JPEG only
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as in open_header
        raise _undecodable(error) from None


def _flat(image: Pillow.Image) -> Pillow.Image:
    """A loaded image as RGB."""
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip and not scale
        values = np.asarray(image)
        grey = np.rint(values / np.float32(257)).clip(0, 255).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        flat = Image.new("RGB", image.size, WHITE)
        flat.paste(layer, mask=layer.getchannel("A"))
        return flat
    if image.mode in ("L", "CMYK"):
        return _in_srgb(image, image.info.get("icc_profile")).convert("RGB")
    return image.convert("RGB")


def to_srgb(pixels: Any, image: Pillow.Image) -> Any:
    """Best called when the pixels are few. Grey and CMYK profiles were applied in ``decode``."""
    import cv2
    import numpy as np
    from PIL import Image

    if "icc_profile" not in image.info or image.mode in ("L", "CMYK"):
        return pixels
    own = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
    return cv2.cvtColor(np.asarray(_in_srgb(own, image.info["icc_profile"])), cv2.COLOR_RGB2BGR)


def _in_srgb(image: Pillow.Image, profile: bytes | None) -> Pillow.Image:
    """A profile that cannot be read or does not fit the image is passed over."""
    from PIL import ImageCms

    transform = _transform_to_srgb(profile, image.mode) if profile else None
    return ImageCms.applyTransform(image, transform) or image if transform else image


@functools.lru_cache(maxsize=8)  # most profiles are one of a few
def _transform_to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if ImageCms.getProfileDescription(source).lower().startswith("srgb"):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def upright(pixels: Any, orientation: int | None) -> Any:
    """As the EXIF value wants them seen."""
    import cv2

    if orientation in (5, 6, 7, 8):
        pixels = cv2.transpose(pixels)
    flips = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}
    return cv2.flip(pixels, flips[orientation]) if orientation in flips else pixels
