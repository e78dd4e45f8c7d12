"""From image bytes to pixels."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from clips_train import transforms
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
