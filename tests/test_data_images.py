from __future__ import annotations

import functools
import importlib.util
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw, ImageFilter

from clips_data import images
from clips_data.images import ImageRefused, ImageSettings

PLENTY = 10**7
KEEP = ImageSettings(PLENTY)


def resizing(mode: str = "keep_ratio", image_px: int = 64, **more: Any) -> ImageSettings:
    return ImageSettings(PLENTY, resize=mode, image_px=image_px, **more)


def picture(width_px: int = 200, height_px: int = 120) -> Image.Image:
    """Red on the left, blue on the right, a green bar along the top: no two sides are alike."""
    made = Image.new("RGB", (width_px, height_px), (220, 30, 30))
    draw = ImageDraw.Draw(made)
    draw.rectangle((width_px // 2, 0, width_px, height_px), fill=(30, 30, 220))
    draw.rectangle((0, 0, width_px, height_px // 4), fill=(30, 200, 30))
    return made


def scene(seed: int, width_px: int = 640, height_px: int = 480) -> Image.Image:
    """Soft random blobs, as different from seed to seed as photographs are."""
    grid = np.random.default_rng(seed).integers(0, 255, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(grid).resize((width_px, height_px), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(checked: images.CheckedImage) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(checked.data)) as image:
        assert image.mode == "RGB"
        assert image.size == (checked.width_px, checked.height_px)
        return np.asarray(image).astype(int)


def assert_colour(
    pixels: np.ndarray[Any, Any], x: float, y: float, rgb: tuple[int, int, int], within: int = 12
) -> None:
    """The colour at a place given as shares of the width and the height."""
    found = pixels[int(y * pixels.shape[0]), int(x * pixels.shape[1])]
    assert np.abs(found - rgb).max() <= within, (found, rgb)


def png(width_px: int, height_px: int, depth: int, colour_type: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG put together by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width_px, height_px, depth, colour_type, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), *more, png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def refusal(data: bytes, settings: ImageSettings = KEEP) -> ImageRefused:
    with pytest.raises(ImageRefused) as refused:
        images.check(data, settings)
    return refused.value


# What is kept, and what is made again


@pytest.mark.parametrize("format, extension", [("JPEG", "jpg"), ("MPO", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("phash", [False, True])
def test_without_resizing_the_bytes_stay_as_they_are(format: str, extension: str, phash: bool) -> None:
    data = encoded(picture(), format)
    checked = images.check(data, ImageSettings(PLENTY, phash=phash))
    assert (checked.data, checked.extension) == (data, extension)
    assert (checked.width_px, checked.height_px) == (200, 120)
    assert (checked.original_width_px, checked.original_height_px) == (200, 120)


@pytest.mark.parametrize("format", ["GIF", "AVIF"])
@pytest.mark.parametrize("encode, written", [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_gif_and_avif_are_always_encoded_again(format: str, encode: str, written: str) -> None:
    checked = images.check(encoded(picture(), format), ImageSettings(PLENTY, encode=encode))
    assert checked.extension == encode
    assert Image.open(io.BytesIO(checked.data)).format == written
    assert_colour(decoded(checked), 0.2, 0.8, (220, 30, 30))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    options = {} if format == "GIF" else {"lossless": True} if format == "WEBP" else {}
    data = encoded(
        picture(), format, save_all=True, append_images=[Image.new("RGB", (200, 120), "black")] * 3, **options
    )
    with Image.open(io.BytesIO(data)) as written:
        assert getattr(written, "n_frames", 1) > 1
    pixels = decoded(images.check(data, resizing(image_px=60)))
    assert pixels.shape == (60, 100, 3)
    assert_colour(pixels, 0.2, 0.8, (220, 30, 30))
    assert_colour(pixels, 0.8, 0.8, (30, 30, 220))


def test_the_first_picture_of_a_phones_mpo_is_taken() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (200, 120), "black")])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert images.check(data, KEEP).data == data
    assert_colour(decoded(images.check(data, resizing())), 0.2, 0.8, (220, 30, 30))


def test_the_format_is_told_by_content_alone() -> None:
    data = encoded(picture(), "PNG")
    assert images.check(data, KEEP).extension == "png"
    assert refusal(b"GIF89a" + data[6:]).code == "decode_failed"


@pytest.mark.parametrize("mode", ["no", "keep_ratio", "center_crop"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "AVIF"])
def test_the_same_input_gives_the_same_bytes(mode: str, format: str) -> None:
    settings = resizing(mode, phash=True)
    data = encoded(scene(1), format)
    assert images.check(data, settings) == images.check(data, settings)


def test_a_higher_quality_takes_more_bytes() -> None:
    data = encoded(scene(3), "JPEG", quality=95)
    sizes = [len(images.check(data, resizing(encode=encode, encode_quality=quality)).data)
             for encode in ("jpg", "webp") for quality in (30, 95)]  # fmt: skip
    assert sizes[0] * 1.5 < sizes[1] and sizes[2] * 1.5 < sizes[3]


# Colours, depths, transparency


@pytest.mark.parametrize("mode", ["keep_ratio", "border"])
@pytest.mark.parametrize("side_px", [40, 200])
@pytest.mark.parametrize("save", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 1}])
def test_jpegs_of_all_kinds_keep_their_colours(mode: str, side_px: int, save: dict[str, Any]) -> None:
    pixels = decoded(images.check(encoded(picture(1600, 960), "JPEG", quality=95, **save), resizing(mode, side_px)))
    places = [(0.2, 0.65, (220, 30, 30)), (0.8, 0.65, (30, 30, 220))]
    for x, y, colour in places:
        assert_colour(pixels, x, y, colour)


def test_cmyk_jpegs_are_not_inverted() -> None:
    data = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # so its values are stored inverted
    pixels = decoded(images.check(data, resizing()))
    assert_colour(pixels, 0.2, 0.8, (220, 30, 30))
    assert_colour(pixels, 0.8, 0.8, (30, 30, 220))


def test_ycck_jpegs_keep_their_colours() -> None:
    """CMYK as Adobe stores it: inverted, and its first three channels as luminance and colour differences."""
    red, green, blue = 255 - 220, 255 - 30, 255 - 40  # the ink that leaves the colour (220, 30, 40)
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    channels = luminance, 128 + 0.564 * (blue - luminance), 128 + 0.713 * (red - luminance), 255
    stored = tuple(255 - round(channel) for channel in channels)  # Pillow inverts once more
    data = bytearray(encoded(Image.new("CMYK", (64, 64), stored), "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2  # says YCCK and no longer CMYK
    assert_colour(decoded(images.check(bytes(data), resizing())), 0.5, 0.5, (220, 30, 40), within=6)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_grey_pictures_become_grey_rgb(format: str) -> None:
    pixels = decoded(images.check(encoded(Image.new("L", (100, 80), 90), format), resizing()))
    assert_colour(pixels, 0.5, 0.5, (90, 90, 90), within=2)


def test_one_bit_pictures_are_black_and_white() -> None:
    made = Image.new("1", (100, 80), 1)
    made.paste(0, (0, 0, 50, 80))
    pixels = decoded(images.check(encoded(made, "PNG"), resizing()))
    assert_colour(pixels, 0.2, 0.5, (0, 0, 0))
    assert_colour(pixels, 0.8, 0.5, (255, 255, 255))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    """A ramp over all 16-bit values comes out as a ramp over all 8-bit values."""
    ramp = np.linspace(0, 65535, 512).astype(np.uint16)
    wanted = ramp / 257
    grey = encoded(Image.fromarray(np.tile(ramp, (8, 1))), "PNG")
    row = b"\0" + np.stack([ramp, ramp[::-1], np.full_like(ramp, 0x8000)], -1).astype(">u2").tobytes()
    settings = ImageSettings(PLENTY, "keep_ratio_largest", 512, encode="png")
    assert Image.open(io.BytesIO(grey)).mode.startswith("I")
    assert np.abs(decoded(images.check(grey, settings))[4, :, 0] - wanted).max() <= 1
    colours = decoded(images.check(png(512, 8, 16, 2, row * 8), settings))[4]
    assert np.abs(colours[:, 0] - wanted).max() <= 1
    assert np.abs(colours[:, 1] - wanted[::-1]).max() <= 1
    assert np.abs(colours[:, 2] - 128).max() <= 1


def test_a_transparent_value_of_sixteen_bit_grey_is_white() -> None:
    row = b"\0" + struct.pack(">2H", 1000, 2000)
    data = png(2, 1, 16, 0, row, png_chunk(b"tRNS", struct.pack(">H", 1000)))
    pixels = decoded(images.check(data, ImageSettings(PLENTY, "keep_ratio", 1, encode="png")))
    assert pixels[0].tolist() == [[255] * 3, [8] * 3]


@pytest.mark.parametrize("encode", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mode, format", [("RGBA", "PNG"), ("RGBA", "WEBP"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF")])
def test_what_is_transparent_becomes_white(mode: str, format: str, encode: str) -> None:
    """A black disc's hidden colours must not shine through: they are black too."""
    layer = Image.new("RGBA", (120, 120), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (60, 0, 120, 120))
    if mode == "P":
        made = Image.new("P", (120, 120), 0)
        made.putpalette([0, 0, 0, 0, 0, 0])
        made.paste(1, (60, 0, 120, 120))
        data = encoded(made, format, transparency=0)
    else:
        data = encoded(layer.convert(mode), format, **({"lossless": True} if format == "WEBP" else {}))
    pixels = decoded(images.check(data, resizing("center_crop", 40, encode=encode)))
    assert_colour(pixels, 0.2, 0.5, (255, 255, 255))
    assert_colour(pixels, 0.8, 0.5, (0, 0, 0))


def test_half_transparent_is_half_white() -> None:
    data = encoded(Image.new("RGBA", (60, 60), (200, 0, 0, 128)), "PNG")
    assert_colour(decoded(images.check(data, resizing(image_px=30))), 0.5, 0.5, (227, 127, 127), within=3)


def wide_gamut_profile() -> bytes:
    """A profile of linear light: its mid grey is much brighter in sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()


def linear_profile() -> bytes:
    """sRGB's own profile with another curve in it: values there are light itself, so 55 is mid grey."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = profile.replace("sRGB".encode("utf-16-be"), "line".encode("utf-16-be"))
    (count,) = struct.unpack_from(">I", profile, 128)
    for entry in range(count):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * entry)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">4sIHHI", profile, offset, b"para", 0, 0, 0, 0x10000)  # gamma 1.0
    return bytes(profile)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_colours_are_brought_to_srgb(format: str) -> None:
    data = encoded(Image.new("RGB", (600, 400), (55, 55, 55)), format, icc_profile=linear_profile())
    checked = images.check(data, resizing())
    assert_colour(decoded(checked), 0.5, 0.5, (128, 128, 128), within=3)
    assert "icc_profile" not in Image.open(io.BytesIO(checked.data)).info


@pytest.mark.parametrize("profile", [b"junk", b"\0" * 200, wide_gamut_profile()])
def test_a_profile_that_does_not_fit_is_passed_over(profile: bytes) -> None:
    data = encoded(Image.new("RGB", (60, 40), (55, 55, 55)), "JPEG", icc_profile=profile)
    assert_colour(decoded(images.check(data, resizing())), 0.5, 0.5, (55, 55, 55), within=3)


# Orientation and metadata


def with_orientation(value: int, format: str = "JPEG") -> bytes:
    """``picture()`` stored as a camera held otherwise would, so that its readers must turn it."""
    undo = {
        1: (), 2: (Image.Transpose.FLIP_LEFT_RIGHT,), 3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,), 5: (Image.Transpose.TRANSPOSE,), 6: (Image.Transpose.ROTATE_90,),
        7: (Image.Transpose.TRANSVERSE,), 8: (Image.Transpose.ROTATE_270,),
    }  # fmt: skip
    stored = picture()
    for turn in undo[value]:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = value
    exif[0x010E] = "where I live"
    return encoded(stored, format, exif=exif, quality=95)


@pytest.mark.parametrize("mode", ["keep_ratio", "border", "keep_ratio_largest", "center_crop"])
@pytest.mark.parametrize("value", range(1, 9))
def test_what_is_encoded_again_stands_upright(value: int, mode: str) -> None:
    checked = images.check(with_orientation(value), resizing(mode, 100))
    pixels = decoded(checked)
    assert checked.orientation is None
    assert pixels.shape[1] >= pixels.shape[0]
    assert_colour(pixels, 0.3, 0.7, (220, 30, 30), within=30)
    assert_colour(pixels, 0.7, 0.7, (30, 30, 220), within=30)
    assert_colour(pixels, 0.4, 0.1 if mode != "border" else 0.25, (30, 200, 30), within=30)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("value", [1, 3, 6])
def test_what_is_kept_says_how_it_must_be_turned(value: int, format: str) -> None:
    data = with_orientation(value, format)
    checked = images.check(data, KEEP)
    assert checked.data == data and checked.orientation == value
    sizes = (checked.width_px, checked.height_px, checked.original_width_px, checked.original_height_px)
    assert sizes == ((120, 200) * 2 if value == 6 else (200, 120) * 2)


def test_a_picture_that_says_nothing_or_nonsense_of_it_has_no_orientation() -> None:
    assert images.check(encoded(picture(), "JPEG"), KEEP).orientation is None
    assert images.check(with_orientation(1).replace(b"MM\0*", b"XX\0*"), KEEP).orientation is None
    exif = Image.Exif()
    exif[0x0112] = 77
    assert images.check(encoded(picture(), "JPEG", exif=exif), KEEP).orientation is None


def test_an_avif_is_turned_also_where_nothing_is_resized() -> None:
    checked = images.check(with_orientation(6, "AVIF"), KEEP)
    assert (checked.width_px, checked.height_px) == (200, 120)
    assert_colour(decoded(checked), 0.2, 0.8, (220, 30, 30), within=30)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("encode", ["jpg", "png", "webp"])
def test_metadata_do_not_survive_encoding(format: str, encode: str) -> None:
    data = with_orientation(1, format)
    assert b"where I live" in data
    checked = images.check(data, resizing(encode=encode))
    assert b"where I live" not in checked.data
    assert not Image.open(io.BytesIO(checked.data)).getexif()


# Sizes


@pytest.mark.parametrize(
    "mode, size, only_if_bigger, wanted",
    [
        ("keep_ratio", (640, 480), False, (341, 256)),
        ("keep_ratio", (100, 50), False, (512, 256)),
        ("keep_ratio", (100, 50), True, (100, 50)),
        ("keep_ratio_largest", (640, 480), False, (256, 192)),
        ("keep_ratio_largest", (100, 50), False, (256, 128)),
        ("keep_ratio_largest", (100, 50), True, (100, 50)),
        ("keep_ratio_largest", (900, 1), False, (256, 1)),
        ("center_crop", (640, 480), False, (256, 256)),
        ("center_crop", (100, 50), False, (256, 256)),
        ("center_crop", (400, 256), True, (400, 256)),
        ("center_crop", (400, 257), True, (256, 256)),
        ("center_crop", (1, 5000), False, (256, 256)),
        ("border", (640, 480), False, (256, 256)),
        ("border", (100, 50), False, (256, 256)),
        ("border", (256, 50), True, (256, 50)),
        ("border", (257, 50), True, (256, 256)),
    ],
)
def test_the_modes_give_img2datasets_sizes(
    mode: str, size: tuple[int, int], only_if_bigger: bool, wanted: tuple[int, int]
) -> None:
    checked = images.check(encoded(picture(*size), "PNG"), resizing(mode, 256, only_if_bigger=only_if_bigger))
    assert (checked.width_px, checked.height_px) == wanted
    assert (checked.original_width_px, checked.original_height_px) == size
    decoded(checked)


@functools.cache
def img2datasets_resizer() -> Any:
    """Its file alone: the package would bring in all the rest of it."""
    package = importlib.util.find_spec("img2dataset")
    assert package is not None and package.origin is not None
    path = Path(package.origin).with_name("resizer.py")
    spec = importlib.util.spec_from_file_location("img2datasets_resizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
        spec.loader.exec_module(module)
    return module.Resizer


@pytest.mark.parametrize("mode", ["keep_ratio", "keep_ratio_largest", "center_crop", "border"])
@pytest.mark.parametrize("only_if_bigger", [False, True])
@pytest.mark.parametrize("size", [(640, 480), (481, 640), (1201, 900), (100, 60), (256, 90), (90, 256), (300, 200)])
def test_the_result_is_close_to_img2datasets_own(mode: str, only_if_bigger: bool, size: tuple[int, int]) -> None:
    data = encoded(scene(2, *size), "JPEG", quality=95)
    theirs, width_px, height_px, *_ = img2datasets_resizer()(256, mode, only_if_bigger)(io.BytesIO(data))
    checked = images.check(data, resizing(mode, 256, only_if_bigger=only_if_bigger))
    assert (checked.width_px, checked.height_px) == (width_px, height_px)
    expected = np.asarray(Image.open(io.BytesIO(theirs)).convert("RGB")).astype(int)
    assert np.abs(decoded(checked) - expected).mean() < 3


def test_scaled_decoding_looks_like_full_decoding() -> None:
    data = encoded(scene(5, 2400, 1800).filter(ImageFilter.GaussianBlur(1)), "JPEG", quality=95)
    full = encoded(Image.open(io.BytesIO(data)), "PNG")
    for image_px in (75, 112, 149, 300, 450, 600, 1000):  # on both sides of 1/8, 1/4 and 1/2
        settings = resizing(image_px=image_px, encode="png")
        difference = decoded(images.check(data, settings)) - decoded(images.check(full, settings))
        assert np.abs(difference).mean() < 1.5, image_px


def test_no_result_is_larger_than_its_caps() -> None:
    narrow = encoded(Image.new("RGB", (1, 5000)), "PNG")
    assert refusal(narrow, resizing("keep_ratio", 256)).code == "too_many_pixels"
    assert refusal(encoded(Image.new("RGB", (1, 20_000)), "GIF")).code == "too_many_pixels"
    settings = ImageSettings(max_pixels=10_000, resize="center_crop", image_px=256)
    assert refusal(encoded(picture(10, 10), "PNG"), settings).code == "too_many_pixels"


MODES = st.sampled_from(["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"])


@hypothesis_settings(max_examples=150)
@given(
    st.one_of(st.integers(1, 700), st.integers(1, 12)),
    st.one_of(st.integers(1, 700), st.integers(1, 12)),
    MODES,
    st.integers(1, 400),
    st.booleans(),
    st.sampled_from(["jpg", "png", "webp"]),
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP"]),
)
def test_sides_are_as_promised_and_within_the_caps(
    width_px: int, height_px: int, mode: str, image_px: int, only_if_bigger: bool, encode: str, format: str
) -> None:
    max_pixels = 500_000
    settings = ImageSettings(max_pixels, mode, image_px, only_if_bigger, encode)
    data = encoded(picture(width_px, height_px), format)
    shorter, longer = sorted((width_px, height_px))
    try:
        checked = images.check(data, settings)
    except ImageRefused as refused:
        assert refused.code == "too_many_pixels"
        asked_px = image_px * (longer * image_px / shorter if mode == "keep_ratio" else image_px)
        assert mode == "keep_ratio" and (asked_px > 0.9 * max_pixels or longer * image_px / shorter > 16_000)
        return
    sides = sorted((checked.width_px, checked.height_px))
    assert sides[1] <= images.MAX_SIDE_PX and sides[0] * sides[1] <= max_pixels
    decided_by = shorter if mode in ("keep_ratio", "center_crop") else longer
    if mode == "no" or (only_if_bigger and decided_by <= image_px):
        assert sides == [shorter, longer]
    elif mode == "keep_ratio":
        assert sides[0] == image_px and abs(sides[1] - longer * image_px / shorter) <= 1
    elif mode == "keep_ratio_largest":
        assert sides[1] == image_px and abs(sides[0] - shorter * image_px / longer) <= 1
    else:
        assert sides == [image_px, image_px]
    decoded(checked) if checked.data is not data else None


# What is refused


def avif_claiming(side_px: int) -> bytes:
    data = encoded(picture(64, 48), "AVIF")
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", side_px, side_px) + data[at + 8 :]


def gif_claiming(screen_px: int, frame_px: int) -> bytes:
    data = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<HH", screen_px, screen_px)
    at = data.index(b"\x2c")
    data[at + 5 : at + 9] = struct.pack("<HH", frame_px, frame_px)
    return bytes(data)


def jpeg_claiming(side_px: int) -> bytes:
    data = bytearray(encoded(picture(64, 48), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side_px, side_px)
    return bytes(data)


def webp_claiming(side_px: int) -> bytes:
    canvas = (side_px - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas * 2 + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        png(65_000, 65_000, 8, 2, b""),
        png(16_384, 16_384, 1, 0, bytes(2049 * 16_384)),
        jpeg_claiming(60_000),
        gif_claiming(60_000, 4),
        gif_claiming(4, 60_000),
        webp_claiming(16_000),
        webp_claiming(1 << 24),
        avif_claiming(12_000),
        avif_claiming(60_000),
    ],
    ids=["png", "png_1_bit", "jpeg", "gif_screen", "gif_frame", "webp", "webp_2_48", "avif", "avif_beyond_libavif"],
)
@pytest.mark.parametrize("settings", [KEEP, resizing()], ids=["no", "keep_ratio"])
def test_the_header_alone_refuses_a_bomb(data: bytes, settings: ImageSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*arguments: object) -> None:
        raise AssertionError("decoded")

    for name in ("verify", "decode"):
        monkeypatch.setattr(images, name, decode)
    assert refusal(data, settings).code == "too_many_pixels"


def test_a_larger_cap_is_not_undercut_by_pillows_own() -> None:
    """Pillow refuses above 179 megapixels by itself, and other users of Pillow in this process keep that."""
    before = Image.MAX_IMAGE_PIXELS
    data = png(20_000, 10_000, 1, 0, bytes(2501 * 10_000))
    assert images.check(data, ImageSettings(200_000_000)).width_px == 20_000
    assert refusal(data, ImageSettings(199_999_999)).code == "too_many_pixels"
    assert before == Image.MAX_IMAGE_PIXELS


def jpegs() -> dict[str, bytes]:
    return {
        "baseline": encoded(scene(7), "JPEG", quality=90),
        "progressive": encoded(scene(7), "JPEG", quality=90, progressive=True),
        "cmyk": encoded(scene(7).convert("CMYK"), "JPEG", quality=90),
        "grey": encoded(scene(7).convert("L"), "JPEG", quality=90),
    }


@pytest.mark.parametrize("kind", ["baseline", "progressive", "cmyk", "grey"])
@pytest.mark.parametrize("settings", [KEEP, ImageSettings(PLENTY, phash=True), resizing(), resizing("border", 30)])
def test_a_truncated_jpeg_is_refused_wherever_it_ends(kind: str, settings: ImageSettings) -> None:
    data = jpegs()[kind]
    assert images.check(data, settings).width_px
    for end in (4, 100, 700, len(data) // 2, len(data) - 200, len(data) - 3):
        assert refusal(data[:end], settings).code == "decode_failed", end


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "AVIF"])
@pytest.mark.parametrize("settings", [KEEP, ImageSettings(PLENTY, phash=True), resizing()])
def test_other_truncated_formats_are_refused(format: str, settings: ImageSettings) -> None:
    data = encoded(scene(7), format)
    for end in (60, len(data) // 2, len(data) - 60):
        assert refusal(data[:end], settings).code == "decode_failed", end


def test_damaged_png_data_are_refused() -> None:
    data = bytearray(encoded(scene(7), "PNG"))
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    assert refusal(bytes(data)).code == "decode_failed"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"<html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0",
        b"\0\0\0\x18ftypheic\0\0\0\0heicmif1",
        b"RIFF\0\0\0\0WAVEfmt ",
        encoded(picture(), "BMP"),
        encoded(picture(), "TIFF"),
    ],
)
def test_what_is_none_of_the_five_formats_is_no_image(data: bytes) -> None:
    assert refusal(data).code == "not_an_image"


@pytest.mark.parametrize(
    "data", [png(0, 1, 8, 0, b""), jpeg_claiming(0), gif_claiming(0, 0)], ids=["png", "jpeg", "gif"]
)
def test_an_image_without_pixels_does_not_decode(data: bytes) -> None:
    assert refusal(data).code == "decode_failed"


@pytest.mark.parametrize("head", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x10\0\0\0WEBPVP8 "])
def test_only_the_first_bytes_of_an_image_do_not_decode(head: bytes) -> None:
    assert refusal(head).code == "decode_failed"
    assert refusal(head + b"<html>" * 50).code == "decode_failed"


@hypothesis_settings(max_examples=120)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "AVIF"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    st.sampled_from([KEEP, resizing(phash=True)]),
)
def test_flipped_bytes_are_read_or_refused(
    format: str, flips: list[tuple[float, int]], settings: ImageSettings
) -> None:
    data = bytearray(encoded(picture(), format))
    for place, value in flips:
        data[int(place * len(data))] = value
    try:
        checked = images.check(bytes(data), settings)
    except ImageRefused as refused:
        assert refused.code in ("not_an_image", "too_many_pixels", "decode_failed")
    else:
        assert checked.width_px > 0 and checked.height_px > 0


# Perceptual hash


def distance(one: str | None, other: str | None) -> int:
    assert one is not None and other is not None and len(one) == len(other) == 16
    return (int(one, 16) ^ int(other, 16)).bit_count()


def hashed(data: bytes, **more: Any) -> str | None:
    return images.check(data, ImageSettings(PLENTY, phash=True, **more)).phash


def test_copies_of_a_picture_are_near_and_other_pictures_far() -> None:
    original = hashed(encoded(scene(11, 1600, 1200), "JPEG", quality=95))
    copies = [
        hashed(encoded(scene(11, 1600, 1200), "JPEG", quality=40)),
        hashed(encoded(scene(11, 1600, 1200).resize((300, 225)), "WEBP", quality=60)),
        hashed(encoded(scene(11, 1600, 1200).resize((800, 600)), "PNG")),
        hashed(encoded(scene(11, 1600, 1200), "JPEG", quality=95), resize="center_crop", image_px=128),
    ]
    assert max(distance(original, copy) for copy in copies) <= 4
    assert min(distance(original, hashed(encoded(scene(seed), "JPEG"))) for seed in range(12, 24)) >= 16


def test_a_turned_picture_has_the_hash_of_the_upright_one() -> None:
    assert distance(hashed(with_orientation(6)), hashed(with_orientation(1))) <= 4


def test_pictures_without_a_feature_have_the_hash_of_zeros() -> None:
    for colour in ("white", "black", "teal"):
        assert hashed(encoded(Image.new("RGB", (333, 222), colour), "PNG")) == "0" * 16
    speck = Image.new("RGB", (320, 320), (128, 128, 128))
    speck.paste((158, 158, 158), (101, 201, 104, 204))
    assert hashed(encoded(speck, "PNG")) == "0" * 16


def test_no_hash_is_made_unasked() -> None:
    assert images.check(encoded(picture(), "JPEG"), KEEP).phash is None
    assert images.check(encoded(picture(), "JPEG"), resizing()).phash is None
