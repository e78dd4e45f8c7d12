"""Compositionality: which of two texts, or of two images, that differ in one thing belongs to the other.

A score counts only where the right match is strictly better: with ties counted as right, as argmax counts those of
the first of two, a model that sees no difference at all would be right always.

Shape suffixes: P pairs, I images and T texts of a pair, M texts of all, E embedding.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from clips_data.errors import UserError
from clips_train.encoders import Encoder
from clips_train.evals.embedding import Read, embed_images, embed_texts
from clips_train.evals.grouped import mean_of_shares
from clips_train.evals.items import DataSet, Pairing
from clips_train.evals.outcome import Figure, Outcome
from clips_train.use_config import Benchmark, EvalConfig

MISSES: Final = 24
CHANCE: Final = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}
"""Of random scores that never tie: two comparisons each, and all four of six orders of them."""
TIES: Final = "a match counts only where it is strictly better; ties are wrong"


def score(encoder: Encoder, data: DataSet, config: EvalConfig, benchmark: Benchmark) -> Outcome:
    """``accuracy`` where an image has a right and a wrong text, else ``text_score``, ``image_score``, ``group_score``.

    Raises ``UserError`` where there are no pairings, or none whose images can all be used.
    """
    if not data.pairings:
        raise UserError(f"{benchmark.name} in {benchmark.data} holds no pairs of texts to choose from.")
    counts = Counter({"pairs": len(data.pairings)})
    pairings, scores, images = _similarities(encoder, data.pairings, config, counts)
    if not pairings:
        raise UserError(f"No pair of {benchmark.name} has images that can be used: {dict(counts)}.")
    counts["pairs.scored"] = len(pairings)
    if all(len(pairing.images) == 1 for pairing in pairings):
        return _right_text(pairings, scores, images, counts)
    return _both_ways(pairings, scores, counts)


def _right_text(
    pairings: Sequence[Pairing], scores: Sequence[Tensor], images: Sequence[int], counts: Counter[str]
) -> Outcome:
    """One image, and texts of which the first is right. ``images`` numbers the image of each pair."""
    margin_P = torch.stack([scores_IT[0, 0] - scores_IT[0, 1:].max() for scores_IT in scores])
    counts["pairs.tied"] = int((margin_P == 0).sum())
    right_P = margin_P > 0
    unit_P = torch.tensor(images).unique(return_inverse=True)[1]
    tags = list(dict.fromkeys(pairing.tags[0] if pairing.tags else "" for pairing in pairings))
    group_P = torch.tensor([tags.index(pairing.tags[0] if pairing.tags else "") for pairing in pairings])
    figures = {"accuracy": mean_of_shares(right_P, group_P, unit_P, chance=1 / 2)}
    for number, tag in enumerate(tags):
        if tag:
            of_tag_P = group_P == number
            units_P = unit_P[of_tag_P].unique(return_inverse=True)[1]
            one_P = torch.zeros_like(units_P)
            figures[f"accuracy_{tag}"] = mean_of_shares(right_P[of_tag_P], one_P, units_P, chance=1 / 2)
            counts[f"pairs.{tag}"] = int(of_tag_P.sum())
    about = {
        "accuracy": "the mean of the files' accuracies, each file counting alike",
        "ties": TIES,
        "unit": "an image with all of its texts is drawn anew for the intervals",
    }
    return Outcome(figures, counts, about, {"misses": _misses(pairings, margin_P)})


def _both_ways(pairings: Sequence[Pairing], scores: Sequence[Tensor], counts: Counter[str]) -> Outcome:
    """Winoground: for each image its text must win, for each text its image, and for the group score both."""
    assert all(len(pairing.images) == len(pairing.texts) for pairing in pairings)
    text_P = torch.stack([_least_margin(scores_IT) for scores_IT in scores])
    image_P = torch.stack([_least_margin(scores_IT.T) for scores_IT in scores])
    group_P = torch.minimum(text_P, image_P)
    counts["pairs.tied"] = int(((text_P == 0) | (image_P == 0)).sum())
    margins = {"text_score": text_P, "image_score": image_P, "group_score": group_P}
    figures = {name: Figure.mean(margin_P > 0, chance=CHANCE[name]) for name, margin_P in margins.items()}
    about = {
        "text_score": "for both images the own text scores higher than the other text",
        "image_score": "for both texts the own image scores higher than the other image",
        "group_score": "both",
        "ties": TIES,
        "unit": "a pair of images and texts is drawn anew for the intervals",
    }
    details = {"by_tag": _by_tag(pairings, margins), "misses": _misses(pairings, group_P)}
    return Outcome(figures, counts, about, details)


def _least_margin(scores_IT: Tensor) -> Tensor:
    """float32: by how much the own column of a row beats the best other one, in the row where it does so least."""
    own_II = torch.eye(*scores_IT.shape, dtype=torch.bool)
    return (scores_IT.diagonal() - scores_IT.masked_fill(own_II, -torch.inf).amax(1)).amin()


def _similarities(
    encoder: Encoder, pairings: Sequence[Pairing], config: EvalConfig, counts: Counter[str]
) -> tuple[list[Pairing], list[Tensor], list[int]]:
    """Cosines [I, T] of the pairings whose images can all be used, and the number of the first image of each.

    An image that several pairings share is embedded once.
    """
    numbers: dict[Read, int] = {}
    for pairing in pairings:
        for read in pairing.images:
            numbers.setdefault(read, len(numbers))
    pictures = embed_images(encoder, list(numbers), config)
    counts["images"] = len(numbers)
    counts.update(pictures.counts)
    row_of = {number: row for row, number in enumerate(pictures.numbers)}
    whole = [pairing for pairing in pairings if all(numbers[read] in row_of for read in pairing.images)]
    counts["pairs.unreadable_image"] = len(pairings) - len(whole)
    text_ME = embed_texts(encoder, [text for pairing in whole for text in pairing.texts], config)
    scores = [
        pictures.image_NE[[row_of[numbers[read]] for read in pairing.images]] @ text_TE.T
        for pairing, text_TE in zip(whole, text_ME.split([len(pairing.texts) for pairing in whole]), strict=True)
    ]
    return whole, scores, [numbers[pairing.images[0]] for pairing in whole]


def _by_tag(pairings: Sequence[Pairing], margins: dict[str, Tensor]) -> list[dict[str, Any]]:
    numbers = defaultdict(list)
    for number, pairing in enumerate(pairings):
        for tag in pairing.tags:
            numbers[tag].append(number)
    return [
        {
            "tag": tag,
            "n": len(some),
            **{name: float((margin_P[some] > 0).double().mean()) for name, margin_P in margins.items()},
        }
        for tag, some in sorted(numbers.items())
    ]


def _misses(pairings: Sequence[Pairing], margin_P: Tensor) -> list[dict[str, Any]]:
    """The pairs that are wrong by most."""
    wrong = torch.nonzero(margin_P <= 0).flatten()
    worst = wrong[margin_P[wrong].argsort(stable=True)][:MISSES].tolist()
    return [
        {
            "key": pairings[number].key,
            "texts": list(pairings[number].texts),
            "margin": round(float(margin_P[number]), 4),
        }
        for number in worst
    ]
