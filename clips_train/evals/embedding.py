"""Features of pictures and texts: the one loop by which evaluations ask a model.

Pictures are read, decoded whole and made square by threads, a few batches ahead of the model, so that memory does not
grow with the data set. A picture that cannot be used is left out and its reason kept; nothing stands in for it.

Shape suffixes: N pictures, M texts, E embedding.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clips_data.errors import UserError
from clips_train import ahead, transforms
from clips_train.encoders import Encoder
from clips_train.use_config import EvalConfig

TEXTS_PER_IMAGE: Final = 5
"""How many times more texts than images a forward pass takes."""
MISSING, UNREADABLE = "missing", "unreadable"
"""Reasons beside those of ``transforms.BadImage``: no such file, and any other ``OSError``."""

Read = Callable[[], bytes]


@dataclass(frozen=True)
class Pictures:
    """Features of the pictures that could be used."""

    image_NE: Tensor
    """Unit float32, on the CPU."""
    numbers: Sequence[int]
    """Which of the pictures asked for these are, ascending."""
    reasons: Mapping[int, str]
    """Why each of the others could not be used."""

    @property
    def counts(self) -> Counter[str]:
        """Of the others, by reason: ``images.bad.decode_failed`` and so on."""
        return Counter(f"images.bad.{reason}" for reason in self.reasons.values())


class _Batch(NamedTuple):
    numbers: list[int]
    pixels_NCHW: Tensor | None
    reasons: dict[int, str]


def embed_images(
    encoder: Encoder,
    reads: Sequence[Read],
    config: EvalConfig,
    *,
    prepare: Callable[[Image.Image], Image.Image] | None = None,
    quiet: bool = False,
) -> Pictures:
    """``prepare`` changes each decoded picture before the model's own preprocessing: a border cut off, say.

    Raises ``UserError`` where not one of the pictures can be used, and for features that are no numbers.
    """
    transform = encoder.preprocessing.resized(config.resize).transform()

    def load(numbers: range) -> _Batch:
        pixels, found, reasons = [], [], {}
        for number in numbers:
            try:
                picture = transforms.decode_whole(reads[number]())
            except (OSError, transforms.BadImage) as error:
                reasons[number] = reason(error)
                continue
            pixels.append(transform(picture if prepare is None else prepare(picture)))
            found.append(number)
        return _Batch(found, torch.stack(pixels) if pixels else None, reasons)

    image_NE = torch.empty(len(reads), encoder.width, device=encoder.device)
    numbers: list[int] = []
    reasons: dict[int, str] = {}
    batches = ahead.loaded(load, _ranges(len(reads), config.batch), 0)
    with (
        contextlib.closing(batches),
        tqdm(total=len(reads), unit="image", desc="images", disable=quiet or None, mininterval=1) as bar,
    ):
        for batch in batches:
            reasons |= batch.reasons
            if batch.pixels_NCHW is not None:
                start = len(numbers)
                numbers += batch.numbers
                image_NE[start : len(numbers)] = encoder.image_features(batch.pixels_NCHW)
            bar.update(len(batch.numbers) + len(batch.reasons))
    if not numbers:
        found = ", ".join(f"{reason} {number}" for reason, number in Counter(reasons.values()).most_common())
        raise UserError(
            f"None of {len(reads)} images can be used: {found or 'there are none'}. "
            "Check the files of the data set, and that its folder is the right one."
        )
    return Pictures(_finite(image_NE[: len(numbers)], encoder), numbers, reasons)


def embed_texts(encoder: Encoder, texts: Sequence[str], config: EvalConfig, *, quiet: bool = False) -> Tensor:
    """Unit features float32 [M, E] on the CPU.

    Each different text is embedded once, so that equal texts have equal features: two of a batch could differ in their
    last bits, and what ties would be a matter of the batch. Raises ``UserError`` for features that are no numbers.
    """
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    different = list(places)
    text_ME = torch.empty(len(different), encoder.width, device=encoder.device)
    with tqdm(total=len(different), unit="text", desc="texts", disable=quiet or None, mininterval=1) as bar:
        for numbers in _ranges(len(different), TEXTS_PER_IMAGE * config.batch):
            text_ME[numbers.start : numbers.stop] = encoder.text_features(different[numbers.start : numbers.stop])
            bar.update(len(numbers))
    text_ME = _finite(text_ME, encoder)
    return text_ME if len(different) == len(texts) else text_ME[[places[text] for text in texts]]


def _finite(features: Tensor, encoder: Encoder) -> Tensor:
    """On the CPU. Nothing is above what is not a number, so that such features would be found first."""
    features = features.cpu()
    if wrong := int((~features.isfinite()).any(1).sum()):
        raise UserError(
            f"{encoder.named.name} gave features that are no numbers, for {wrong} of {len(features)} inputs. Evaluate "
            "it with precision fp32; where that does not help, its training has diverged."
        )
    return features


def _ranges(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def reason(error: OSError | transforms.BadImage) -> str:
    if isinstance(error, transforms.BadImage):
        return error.reason
    return MISSING if isinstance(error, FileNotFoundError) else UNREADABLE
