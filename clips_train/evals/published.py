"""Figures that others published on the benchmarks that clips knows, with the table or figure each was read from.

They are beside our own in ``clips eval --compare``. What a model was trained on, as far as the source tells, is its
row's ``data``. Values are typed as printed, in percent; ``rows`` gives shares.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

RETRIEVAL_FIGURE: Final = "CLIPS, arXiv 2411.16828, retrieval.png"
SOTA_FIGURE: Final = "CLIPS, arXiv 2411.16828, sota.png"
OPENVISION: Final = "OpenVision, README and arXiv 2505.04601, tables 1, 3 and 4"
RECALLS: Final = ("r1", "r5", "r10")
WAYS: Final = ("image_to_text", "text_to_image")
RETRIEVAL: Final = ("coco", "flickr30k")


@dataclass(frozen=True)
class Published:
    """One figure of one model."""

    benchmark: str
    model: str
    figure: str
    """As in our results: ``text_to_image_r1``, ``top1``."""
    value: float
    """In 0…1."""
    data: str
    """What it was trained on and at which size, as far as the source tells."""
    source: str


def rows(benchmark: str, figures: Collection[str]) -> list[Published]:
    """Published values of these figures on a benchmark that ``benchmarks`` knows; none where none are known."""
    return [row for row in _all() if row.benchmark == benchmark and row.figure in figures]


def _all() -> Iterator[Published]:
    yield from _same_training()
    yield from _state_of_the_art()
    yield from _openvision()


# Recall at 1, 5 and 10 in percent: COCO image to text, text to image, Flickr30k image to text, text to image.
_SAME_TRAINING: Final = {
    "CLIPA S/16": "55.8/79.5/87.6 35.0/60.9/71.6 79.6/95.4/98.0 59.2/83.2/89.3",
    "CoCa S/16": "55.5/79.2/86.8 35.7/61.3/71.6 79.4/94.1/97.3 59.3/83.4/89.7",
    "CLIPS S/16": "61.8/83.7/90.0 39.4/65.2/75.2 85.9/96.7/98.5 66.4/87.2/92.7",
    "CLIPA B/16": "62.8/85.0/91.0 42.7/67.6/77.5 86.7/97.9/98.7 67.9/88.8/92.8",
    "CoCa B/16": "63.1/84.4/90.1 43.2/68.3/77.6 87.8/97.8/99.2 68.2/88.9/93.2",
    "CLIPS B/16": "68.8/88.4/92.9 48.2/72.8/81.4 92.5/99.3/99.8 75.3/92.4/95.8",
    "CLIPA L/16": "66.8/87.0/92.5 47.8/72.6/81.3 91.3/98.9/99.4 73.9/92.2/95.6",
    "CoCa L/16": "67.0/87.1/92.4 48.0/72.3/80.9 89.7/98.7/99.6 74.1/92.0/95.5",
    "CLIPS L/16": "73.6/90.6/94.5 53.6/76.6/84.4 94.2/99.2/99.9 80.6/95.0/97.2",
}
_SAME_TRAINING_DATA: Final = "2.56 B samples at 112 px and 128 M at 224 px"
_BOTH, _MIXED = "web and synthetic caption in every step", "80 % web and 20 % synthetic captions"


def _same_training() -> Iterator[Published]:
    columns = [(benchmark, f"{way}_{recall}") for benchmark in RETRIEVAL for way in WAYS for recall in RECALLS]
    for model, printed in _SAME_TRAINING.items():
        data = f"{_SAME_TRAINING_DATA}, {_BOTH if model.startswith('CLIPS') else _MIXED}"
        for (benchmark, figure), value in zip(columns, printed.replace(" ", "/").split("/"), strict=True):
            yield _row(benchmark, model, figure, value, data, RETRIEVAL_FIGURE)


# ImageNet top-1, then recall at 1 of COCO and Flickr30k, each image to text and text to image; a dash is not reported.
_STATE_OF_THE_ART: Final = {
    ("OpenAI CLIP L", "WIT-400M, 256 patches"): "75.5 56.3 36.5 85.2 65.0",
    ("CoCa L", "LAION-2B"): "75.6 62.9 45.7 88.4 74.3",
    ("CLIP L", "DataComp-1B"): "79.2 63.3 45.7 89.0 73.4",
    ("OpenCLIP L", "LAION-2B"): "75.5 63.4 46.5 89.5 75.5",
    ("SigLIP L", "WebLI-5B"): "80.5 70.8 52.3 91.8 79.0",
    ("CLOC L", "576 patches"): "80.1 74.8 54.4 - -",
    ("CLIPS L/14", "224 px"): "78.5 75.5 55.6 96.5 82.3",
    ("CLIP-DFN H", "729 patches"): "84.4 71.9 55.6 94.0 82.0",
    ("SigLIP SO400M", "729 patches"): "83.1 72.4 54.2 94.3 83.0",
    ("CLOC H", "576 patches"): "81.3 75.7 55.1 - -",
    ("CLIPS H/14", "224 px"): "79.9 76.4 57.2 96.6 83.9",
}


def _state_of_the_art() -> Iterator[Published]:
    columns = [("imagenet", "top1")]
    columns += [(benchmark, f"{way}_r1") for benchmark in RETRIEVAL for way in WAYS]
    for (model, data), printed in _STATE_OF_THE_ART.items():
        for (benchmark, figure), value in zip(columns, printed.split(), strict=True):
            if value != "-":
                yield _row(benchmark, model, figure, value, data, SOTA_FIGURE)


# ImageNet top-1 by input size in px.
_OPENVISION_IMAGENET: Final = {
    "S/16": {160: "63.5", 224: "65.9", 384: "67.1"},
    "B/16": {160: "72.4", 224: "73.9", 384: "74.5"},
    "L/14": {84: "74.7", 224: "78.5", 336: "78.9"},
    "SoViT-400M": {84: "76.2", 224: "79.7", 384: "79.9"},
    "H/14": {84: "77.4", 224: "80.4"},
}
_OPENVISION_NOTES: Final = {("L/14", 224): "; the paper prints 78.4", ("L/14", 336): "; the paper prints 78.8"}
# COCO recall at 1, text to image and image to text.
_OPENVISION_COCO: Final = {
    ("S/16", 224): "43.6/64.5",
    ("B/16", 224): "51.1/71.6",
    ("L/14", 224): "55.3/75.2",
    ("L/14", 336): "55.9/75.2",
    ("SoViT-400M", 384): "57.6/77.5",
    ("H/14", 224): "57.4/77.0",
}


def _openvision() -> Iterator[Published]:
    for size, by_px in _OPENVISION_IMAGENET.items():
        for image_px, value in by_px.items():
            data = f"{image_px} px{_OPENVISION_NOTES.get((size, image_px), '')}"
            yield _row("imagenet", f"OpenVision {size}", "top1", value, data, OPENVISION)
    for (size, image_px), printed in _OPENVISION_COCO.items():
        for way, value in zip(reversed(WAYS), printed.split("/"), strict=True):
            yield _row("coco", f"OpenVision {size}", f"{way}_r1", value, f"{image_px} px", OPENVISION)


def _row(benchmark: str, model: str, figure: str, printed: str, data: str, source: str) -> Published:
    return Published(benchmark, model, figure, round(float(printed) / 100, 6), data, source)
