"""From image bytes to pixels."""

from __future__ import annotations

import io
import math
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tvf

from clips_train import colours, transforms
from clips_train.transforms import BadImage


def picture(width: int = 64, height: int = 48) -> Image.Image:
    """A smooth gradient: red grows to the right, green downwards."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=-1).astype(np.uint8))


def encoded(image: Image.Image, image_format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, quality=95)
    return file.getvalue()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_decoding_shrinks_large_pictures_and_keeps_aspect_and_colours(image_format: str) -> None:
    image = transforms.decode(encoded(picture(640, 480), image_format), 24)
    assert image.mode == "RGB" and image.size == (64, 48)
    reference = np.asarray(picture(64, 48), dtype=float)
    assert np.abs(np.asarray(image, dtype=float) - reference).mean() < 3


def test_small_pictures_are_not_enlarged_by_decoding() -> None:
    assert transforms.decode(encoded(picture(30, 20)), 64).size == (30, 20)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    image_format = "JPEG" if mode == "CMYK" else "PNG"
    assert transforms.decode(encoded(picture().convert(mode), image_format), 16).mode == "RGB"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<html>not found</html>", "not_an_image"),
        (encoded(picture())[:-60], "decode_failed"),
        (encoded(picture(), "PNG")[:100], "decode_failed"),
    ],
)
def test_unusable_bytes_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage) as caught:
        transforms.decode(data, 16)
    assert caught.value.reason == reason


def test_too_many_pixels_are_refused_by_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(BadImage) as caught:
        transforms.decode(encoded(picture()), 16)
    assert caught.value.reason == "too_many_pixels"


def test_squash_agrees_with_open_clip_s_own_preprocessing() -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    settings = PreprocessCfg(
        size=32,
        mean=transforms.IMAGE_MEAN,
        std=transforms.IMAGE_STD,
        interpolation=transforms.INTERPOLATION,
        resize_mode=transforms.RESIZE_MODE,
    )
    theirs_CHW = image_transform_v2(settings, is_train=False)(picture())
    ours_CHW = transforms.normalise(transforms.squash(picture(), 32).unsqueeze(0))[0]
    torch.testing.assert_close(ours_CHW, theirs_CHW, rtol=0, atol=1e-5)


def test_the_view_is_a_function_of_seed_epoch_and_key() -> None:
    def view(seed: int, epoch: int, key: str) -> torch.Tensor:
        return transforms.augment(picture(), 24, "full", seed=seed, epoch=epoch, key=key)

    first = view(0, 0, "a")
    random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(first, view(0, 0, "a"))
    for other in (view(1, 0, "a"), view(0, 1, "a"), view(0, 0, "b")):
        assert not torch.equal(first, other)


def test_none_is_the_evaluation_preprocessing_and_crop_leaves_colours_alone() -> None:
    none = transforms.augment(picture(), 24, "none", seed=0, epoch=0, key="a")
    assert torch.equal(none, transforms.squash(picture(), 24))
    for number in range(20):
        crop_CHW = transforms.augment(picture(), 24, "crop", seed=0, epoch=0, key=str(number))
        assert crop_CHW.dtype == torch.uint8 and crop_CHW.shape == (3, 24, 24)
        assert (crop_CHW[2] == 90).all()
        assert crop_CHW[0, :, -1].float().mean() > crop_CHW[0, :, 0].float().mean(), "mirrored"


@pytest.mark.parametrize("size", [(64, 48), (200, 20), (20, 200), (7, 5)])
def test_crops_lie_inside_and_cover_the_stated_share_and_aspect(size: tuple[int, int]) -> None:
    generator = random.Random(0)
    width, height = size
    boxes = [transforms.crop_box(width, height, lambda purpose: generator.random()) for _ in range(200)]
    assert len(set(boxes)) > 1 or size in ((200, 20), (20, 200))
    for left, upper, right, lower in boxes:
        assert 0 <= left < right <= width and 0 <= upper < lower <= height
        crop_width, crop_height = right - left, lower - upper
        assert (crop_width - 1) / (crop_height + 1) < 4 / 3 and (crop_width + 1) / (crop_height - 1 or 1) > 3 / 4
        if size == (64, 48):
            assert 0.37 < crop_width * crop_height / (width * height) <= 1


def test_full_augmentation_changes_colours_at_the_stated_rates() -> None:
    grey, jittered, number = 0, 0, 400
    for key in range(number):
        view_CHW = transforms.augment(picture(12, 12), 8, "full", seed=0, epoch=0, key=str(key))
        is_grey = torch.equal(view_CHW[0], view_CHW[1]) and torch.equal(view_CHW[1], view_CHW[2])
        grey += is_grey
        jittered += not is_grey and not bool((view_CHW[2] == 90).all())
    assert 0.14 < grey / number < 0.26
    assert 0.72 < jittered / (number - grey) < 0.88


# --- from files -------------------------------------------------------------------------------------------------------


def textured(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise with the falling spectrum of photographs, and hard edges."""
    noise = np.random.default_rng(seed).standard_normal((height, width, 3))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1 / max(width, height)
    smooth = np.fft.ifft2(np.fft.fft2(noise, axes=(0, 1)) / frequency[..., None], axes=(0, 1)).real
    pixels = 128 + 45 * smooth / smooth.std()
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 20)
    pixels[:, width // 2 :: 16] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def view_of(data: bytes, image_px: int, mode: Any = "crop", *, key: str = "a", **more: Any) -> torch.Tensor:
    return transforms.training_view(lambda: data, image_px, mode, seed=0, epoch=0, key=key, **more)


def box_of(width: int, height: int, key: str) -> transforms.Box:
    return transforms.crop_box(width, height, lambda purpose: transforms._draw(0, 0, key, purpose))


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return 10 * math.log10(255**2 / max(1e-9, float(((one.float() - other.float()) ** 2).mean())))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(512, 384), (1501, 1003), (3001, 700)])
def test_scaled_decoding_enlarges_no_crop_and_stays_near_the_full_one(size: tuple[int, int], image_format: str) -> None:
    data = encoded(textured(*size), image_format)
    whole = transforms.to_pixels(Image.open(io.BytesIO(data)).convert("RGB"))
    scales = set()
    for number in range(6):
        box = box_of(*size, str(number))
        scale = transforms.crop_scale(box, 64)
        scales.add(scale)
        scaled = transforms._File(lambda: data).pixels(scale)
        assert scaled.shape[1:] == (-(-size[1] // scale), -(-size[0] // scale))
        left, upper, right, lower = transforms.scaled_box(box, scale, scaled)
        assert right - left >= 64 and lower - upper >= 64 and right <= scaled.shape[2] and lower <= scaled.shape[1]
        full_CHW = transforms._resized(whole, box, 64)
        assert psnr(view_of(data, 64, key=str(number)), full_CHW) > (28 if scale > 1 else 45)
    assert max(scales) == {512: 2, 1501: 8, 3001: 8}[size[0]]


def test_full_decoding_gives_pillow_s_pixels_for_every_kind_of_file() -> None:
    for mode, image_format in (("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG")):
        data = encoded(textured(80, 60).convert(mode), image_format)
        expected = transforms.to_pixels(Image.open(io.BytesIO(data)).convert("RGB"))
        assert torch.equal(transforms._File(lambda data=data: data).pixels(1), expected), (mode, image_format)
    file = io.BytesIO()
    textured(80, 60).save(file, "JPEG", progressive=True, quality=80, subsampling=0)
    expected = transforms.to_pixels(Image.open(file))
    assert torch.equal(transforms._File(file.getvalue).pixels(1), expected)


JPEG = encoded(textured(300, 300))


@given(st.integers(0, len(JPEG) - 1))
def test_a_cut_file_is_bad_at_every_scale_or_at_none(length: int) -> None:
    reasons = []
    for scale in (1, 2):
        try:
            transforms._File(lambda: JPEG[:length]).pixels(scale)
            reasons.append("")
        except BadImage as error:
            reasons.append(error.reason)
    assert reasons[0] == reasons[1]
    if length < len(JPEG) - 100:
        assert reasons[0]


def test_bad_files_have_the_same_reasons_in_training() -> None:
    for data, reason in ((b"", "not_an_image"), (JPEG[:-600], "decode_failed")):
        for mode in ("none", "crop", "full"):
            with pytest.raises(BadImage) as caught:
                view_of(data, 16, mode)
            assert caught.value.reason == reason


@pytest.mark.parametrize("mode", ["none", "crop", "full"])
def test_what_is_kept_of_a_picture_changes_no_pixel_and_is_not_read_again(mode: Any) -> None:
    cache = transforms.PictureCache(10_000_000)
    data, reads = encoded(textured(400, 300)), []

    def read() -> bytes:
        reads.append(1)
        return data

    def views(**more: Any) -> list[torch.Tensor]:
        return [
            transforms.training_view(read, px, mode, seed=0, epoch=epoch, key="a", **more)
            for px in (64, 128)
            for epoch in range(5)
        ]

    expected = views()
    assert all(map(torch.equal, views(kept=cache.of("place")), expected))
    reads.clear()
    assert all(map(torch.equal, views(kept=cache.of("place")), expected)) and not reads


def test_the_cache_keeps_to_its_bytes_and_travels_empty() -> None:
    cache = transforms.PictureCache(3000)
    cache.put("a", torch.zeros(3, 20, 20))
    cache.put("b", torch.zeros(3, 40, 40))
    cache.put("c", Image.new("RGB", (10, 10)))
    assert cache.get("a") is not None and cache.get("b") is None and cache.get("c") is not None
    assert pickle.loads(pickle.dumps(cache)).get("a") is None


@pytest.mark.parametrize("seed", range(3))
def test_colours_change_as_in_torchvision_within_one_level(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (3, 40, 50), dtype=np.uint8)
    flat = np.stack([np.full((40, 50), level, np.uint8) for level in (seed * 100, 255, 0)])
    for pixels in (noise, flat, np.repeat(noise[:1], 3, axis=0), np.array(textured(50, 40, seed)).transpose(2, 0, 1)):
        theirs = torch.from_numpy(pixels.copy())
        for step in np.linspace(-1, 1, 9):
            for ours, other in (
                (colours.brightness(pixels, 1 + 0.4 * step), tvf.adjust_brightness(theirs, 1 + 0.4 * step)),
                (colours.contrast(pixels, 1 + 0.4 * step), tvf.adjust_contrast(theirs, 1 + 0.4 * step)),
                (colours.saturation(pixels, 1 + 0.4 * step), tvf.adjust_saturation(theirs, 1 + 0.4 * step)),
                (colours.hue(pixels, 0.5 * step), tvf.adjust_hue(theirs, 0.5 * step)),
                (colours.grey(pixels)[None], tvf.rgb_to_grayscale(theirs)),
            ):
                assert ours.dtype == np.uint8
                assert np.abs(ours.astype(int) - other.numpy().astype(int)).max() <= 1
