"""The benchmarks that clips knows by name: what is scored, on which split, by which protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from clips_data.errors import UserError, did_you_mean
from clips_train.use_config import Benchmark

KARPATHY: Final = {"task": "retrieval", "split": "test", "captions_per_image": 5}
IMAGENET: Final = {"task": "zero_shot", "classes": "imagenet", "templates": "openai"}
LONG: Final = {"task": "retrieval", "captions_per_image": 1}

KNOWN: Final[Mapping[str, Mapping[str, Any]]] = {
    # COCO's 5,000 and Flickr30k's 1,000 test images of Karpathy's split, five captions an image.
    "coco": KARPATHY,
    "flickr30k": KARPATHY,
    "coco-captions": KARPATHY | {"task": "captioning"},
    "flickr30k-captions": KARPATHY | {"task": "captioning"},
    # One long text an image.
    "urban1k": LONG,
    "dci": LONG,
    "sharegpt4v": LONG | {"max_samples": 1000},  # the first rows, as Long-CLIP
    # ImageNet and the sets with its classes, or some of them.
    "imagenet": IMAGENET,
    "imagenet-v2": IMAGENET,
    "imagenet-a": IMAGENET | {"classes": "imagenet-a"},
    "imagenet-r": IMAGENET | {"classes": "imagenet-r"},
    "imagenet-sketch": IMAGENET,
    "objectnet": IMAGENET | {"classes": None},
    # Which of two texts, and of two images.
    "sugarcrepe": {"task": "compositionality", "format": "sugarcrepe"},
    "winoground": {"task": "compositionality", "format": "winoground"},
}


def resolved(benchmark: Benchmark) -> Benchmark:
    """With what is known of its name; what the user gave wins. Raises ``UserError`` for a name that says no task."""
    known = KNOWN.get(benchmark.name, {})
    given = benchmark.model_dump(exclude_defaults=True)
    whole = Benchmark(**{**{name: value for name, value in known.items() if value is not None}, **given})
    if whole.task is None:
        raise UserError(
            f"The benchmark {benchmark.name!r} is none that clips knows, so it needs a task. "
            f"{did_you_mean(benchmark.name, list(KNOWN))} Or write it as "
            f"{{name: {benchmark.name}, data: {benchmark.data}, task: retrieval}}; other tasks are zero_shot, "
            "captioning and compositionality."
        )
    return whole
