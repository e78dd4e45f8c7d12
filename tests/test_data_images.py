from __future__ import annotations

import io
import struct
import zlib

import pytest
from PIL import Image

from clips_data import images


def encoded(format: str, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, "teal" if mode == "RGB" else 0).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(("format", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_the_three_stored_formats_keep_their_bytes(format: str, extension: str) -> None:
    data = encoded(format)
    checked = images.check(data, 10_000)
    assert (checked.data, checked.extension, checked.width_px, checked.height_px) == (data, extension, 40, 30)


@pytest.mark.parametrize("format", ["GIF", "AVIF"])
def test_other_formats_become_the_jpeg_of_their_first_frame(format: str) -> None:
    checked = images.check(encoded(format), 10_000)
    assert checked.extension == "jpg"
    assert Image.open(io.BytesIO(checked.data)).format == "JPEG"


def test_the_header_alone_refuses_a_bomb() -> None:
    """A PNG that claims 65,000 x 65,000 pixels and holds no image data at all."""
    header = struct.pack(">IIBBBBB", 65_000, 65_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    idat = b"IDAT"
    data += struct.pack(">I", 0) + idat + struct.pack(">I", zlib.crc32(idat))
    with pytest.raises(images.ImageRefused) as refused:
        images.check(data, 100_000_000)
    assert refused.value.code == "too_many_pixels"


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "not_an_image"),
        (b"<html>", "not_an_image"),
        (encoded("BMP"), "not_an_image"),
        (encoded("JPEG", (300, 300))[:-600], "decode_failed"),
        (encoded("PNG", (300, 300))[:-60], "decode_failed"),
    ],
)
def test_what_cannot_be_used_gets_its_code(data: bytes, code: str) -> None:
    with pytest.raises(images.ImageRefused) as refused:
        images.check(data, 10**6)
    assert refused.value.code == code
