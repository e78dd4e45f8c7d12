"""Image-text retrieval: recall at k, both ways, with any number of images and captions per image.

The rank of an answer is the number of wrong answers that score strictly higher plus half of those that tie with it: its
expected rank when ties are broken at random. A collapsed model, whose scores all tie, therefore scores like chance and
not like a perfect one.

Shape suffixes: N images, M captions (all images together), E embedding width, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)
QUERIES_PER_BLOCK = 1024


def retrieval_scores(image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor) -> dict[str, float]:
    """Recall at 1, 5 and 10 in 0…1 of text→image and image→text, each beside what a random ranking would score.

    ``image_NE`` and ``text_ME`` are unit vectors of any float type, ``image_of_text_M`` int64 indices into the images.
    An image counts as found when any one of its captions ranks high enough. Every image needs a caption.
    """
    num_images = len(image_NE)
    captions_per_image = torch.bincount(image_of_text_M, minlength=num_images)
    assert num_images > 0 and len(captions_per_image) == num_images and int(captions_per_image.min()) > 0
    text_ranks = text_to_image_ranks(image_NE, text_ME, image_of_text_M)
    image_ranks = image_to_text_ranks(image_NE, text_ME, image_of_text_M)
    scores: dict[str, float] = {}
    for k in RECALL_AT:
        scores[f"text_to_image_r{k}"] = _share_below(text_ranks, k)
        scores[f"image_to_text_r{k}"] = _share_below(image_ranks, k)
        scores[f"chance_text_to_image_r{k}"] = min(1.0, k / num_images)
        scores[f"chance_image_to_text_r{k}"] = chance_image_to_text(captions_per_image.tolist(), k)
    return scores


def text_to_image_ranks(image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor) -> Tensor:
    """float32 [M]: the 0-based rank of each caption's image among all images."""
    ranks = []
    for start in range(0, len(text_ME), QUERIES_PER_BLOCK):
        block = slice(start, start + QUERIES_PER_BLOCK)
        scores_QN = text_ME[block].float() @ image_NE.float().T
        right_Q1 = scores_QN.gather(1, image_of_text_M[block].unsqueeze(1))
        # The right answer ties with itself, which is no tie with a wrong one.
        ranks.append((scores_QN > right_Q1).sum(1) + ((scores_QN == right_Q1).sum(1) - 1) / 2)
    return torch.cat(ranks)


def image_to_text_ranks(image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor) -> Tensor:
    """float32 [N]: the 0-based rank, among the captions of other images, of each image's best own caption."""
    ranks = []
    for start in range(0, len(image_NE), QUERIES_PER_BLOCK):
        scores_QM = image_NE[start : start + QUERIES_PER_BLOCK].float() @ text_ME.float().T
        images_Q1 = torch.arange(start, start + len(scores_QM), device=scores_QM.device).unsqueeze(1)
        own_QM = image_of_text_M.unsqueeze(0) == images_Q1
        best_Q1 = scores_QM.masked_fill(~own_QM, -torch.inf).amax(1, keepdim=True)
        wrong_QM = scores_QM.masked_fill(own_QM, -torch.inf)
        ranks.append((wrong_QM > best_Q1).sum(1) + (wrong_QM == best_Q1).sum(1) / 2)
    return torch.cat(ranks)


def chance_image_to_text(captions_per_image: Sequence[int], k: int) -> float:
    """Expected image→text recall at ``k`` of a random ranking of all captions."""
    total = sum(captions_per_image)
    misses = [comb(total - own, k) / comb(total, k) if k <= total else 0.0 for own in captions_per_image]
    return 1 - sum(misses) / len(misses)


def _share_below(ranks: Tensor, k: int) -> float:
    return float((ranks < k).float().mean())
