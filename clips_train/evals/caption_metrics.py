"""Captions against references: CIDEr, BLEU, ROUGE-L and METEOR as pycocoevalcap has them, and what needs no references.

Every figure is a sum over images, or made of some, so that each has an interval. What is computed from all captions
together stays as it is when images are drawn anew: CIDEr's document frequencies, and how often an n-gram occurs.

Shape suffixes: U images, N images with features, M references of all images together, E embedding, D sums, R resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor

from clips_train.evals import caption_tokens, meteor
from clips_train.evals.caption_tokens import Tokenizer
from clips_train.evals.outcome import Figure, Outcome

MAX_N: Final = 4
ROUGE_BETA: Final = 1.2
CLIP_SCORE_WEIGHT: Final = 2.5
CLIP_SCORE_PROMPT: Final = "A photo depicts "
"""What Hessel et al. 2021 (arXiv 2104.08718) put before captions and references."""

Words = list[str]


def measure(
    captions: Sequence[str], references: Sequence[Sequence[str]], *, tokenizer: Tokenizer | None = None
) -> Outcome:
    """One caption of each image against its references; without ``tokenizer`` by the usual one.

    A reference without a word does not count, and an image without any is left out of what needs references. A caption
    without a word scores 0. CIDEr is nothing on one image, where every n-gram is in every document; it is left out.
    """
    assert len(captions) == len(references)
    tokenizer = tokenizer or caption_tokens.usual()
    written = tokenizer.tokens(captions)
    flat = iter(tokenizer.tokens([text for texts in references for text in texts]))
    kept = [[words for words in (next(flat) for _ in texts) if words] for texts in references]
    outcome = Outcome(
        diversity(written),
        Counter({"captions": len(captions), "captions.empty": sum(not words for words in written)}),
        {"tokenizer": tokenizer.name, "distinct": "different n-grams over all n-grams of all captions together"},
    )
    judged = [(words, given) for words, given in zip(written, kept, strict=True) if given]
    outcome.counts["references"] = sum(len(given) for _, given in judged)
    outcome.counts["images.without_references"] = len(captions) - len(judged)
    if judged:
        outcome.figures |= against_references([one[0] for one in judged], [one[1] for one in judged], outcome.about)
    return outcome


def against_references(
    captions: Sequence[Words], references: Sequence[Sequence[Words]], about: dict[str, Any]
) -> dict[str, Figure]:
    """Figures of tokenized captions; each has references, none of them empty. Adds to ``about`` what is missing."""
    figures = bleu(captions, references) | {"rouge_l": rouge_l(captions, references)}
    if len(captions) > 1:
        figures["cider"] = cider(captions, references)
    else:
        about["cider"] = "not defined on one image: what tells n-grams apart is in how many images they are"
    if caption_tokens.java():
        figures["meteor"] = meteor.figure(captions, references)
    else:
        about["meteor"] = "not computed: it needs Java"
    about["spice"] = "not computed: it needs Java 8 and parser models that pycocoevalcap downloads"
    return figures


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> Figure:
    """CIDEr-D, in 0…10; papers show 100 times as much."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=MAX_N)
    for words, given in zip(captions, references, strict=True):
        scorer += (" ".join(words), [" ".join(one) for one in given])
    _, scores = scorer.compute_score()
    return Figure.mean(torch.tensor(scores, dtype=torch.float64))


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, Figure]:
    """BLEU-1 to BLEU-4 of all captions together, each against the reference whose length is closest."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=MAX_N)
    for words, given in zip(captions, references, strict=True):
        scorer += (" ".join(words), [" ".join(one) for one in given])
    rows = []
    for found in scorer.ctest:
        closest = min((abs(length - found["testlen"]), length) for length in found["reflen"])[1]
        rows.append([*found["correct"], *found["guess"], found["testlen"], closest])
    units_UD = torch.tensor(rows, dtype=torch.float64)
    return {f"bleu{n}": Figure(units_UD, _Bleu(n)) for n in range(1, MAX_N + 1)}


class _Bleu:
    """BLEU-n from sums of right n-grams and n-grams by n, and of the lengths of captions and references."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __call__(self, sums_RD: Tensor) -> Tensor:
        # pycocoevalcap's own small numbers, which keep 0 / 0 at 0.
        right_RN, all_RN = sums_RD[:, : self._n] + 1e-15, sums_RD[:, MAX_N : MAX_N + self._n] + 1e-9
        lengths_R2 = sums_RD[:, 2 * MAX_N :]
        ratio_R = (lengths_R2[:, 0] + 1e-15) / (lengths_R2[:, 1] + 1e-9)
        brevity_R = torch.exp((1 - 1 / ratio_R).clamp(max=0))
        precision_R: Tensor = (right_RN / all_RN).prod(1) ** (1 / self._n)
        return precision_R * brevity_R


def rouge_l(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> Figure:
    """ROUGE-L: best precision and best recall of the longest common subsequence, over the references."""
    scores = []
    for words, given in zip(captions, references, strict=True):
        common = [common_length(words, one) for one in given]
        precision = max(common) / max(1, len(words))
        recall = max(length / len(one) for length, one in zip(common, given, strict=True))
        weight = ROUGE_BETA**2
        scores.append((1 + weight) * precision * recall / (recall + weight * precision) if precision else 0.0)
    return Figure.mean(torch.tensor(scores, dtype=torch.float64))


def common_length(one: Words, other: Words) -> int:
    """Length of the longest common subsequence.

    Bit i of ``free`` is unset where the table's row grows at word i (Hyyrö 2004). pycocoevalcap keeps the whole table
    as Python lists: 400 million numbers for two texts of 100 kB.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(one)) - 1
    free = every
    for word in other:
        match = free & places.get(word, 0)
        free = ((free + match) | (free - match)) & every
    return len(one) - free.bit_count()


def diversity(captions: Sequence[Words]) -> dict[str, Figure]:
    """Words per caption, and distinct-1, -2 and -3: different n-grams over all n-grams.

    An n-gram that occurs k times counts as 1 / k wherever it occurs, which sums to the number of different ones.
    """
    figures = {"mean_words": Figure.mean(torch.tensor([len(words) for words in captions], dtype=torch.float64))}
    for n in (1, 2, 3):
        grams = [list(zip(*(words[start:] for start in range(n)), strict=False)) for words in captions]
        times = Counter(chain.from_iterable(grams))
        if times:
            shares = torch.tensor([sum(1 / times[gram] for gram in some) for some in grams], dtype=torch.float64)
            figures[f"distinct_{n}"] = Figure.mean(shares, torch.tensor([len(some) for some in grams]))
    return figures


def clip_scores(
    image_NE: Tensor, caption_NE: Tensor, references_ME: Tensor, image_of_reference_M: Tensor
) -> dict[str, Figure]:
    """CLIPScore and RefCLIPScore of unit features; the latter over the images that have references."""
    score_N = CLIP_SCORE_WEIGHT * (image_NE.double() * caption_NE.double()).sum(1).clamp(min=0)
    figures = {"clip_score": Figure.mean(score_N)}
    if len(image_of_reference_M):
        likeness_M = (caption_NE.double()[image_of_reference_M] * references_ME.double()).sum(1).clamp(min=0)
        best_N = torch.zeros(len(score_N), dtype=torch.float64)
        best_N.scatter_reduce_(0, image_of_reference_M, likeness_M, "amax")
        images = image_of_reference_M.unique()
        score_N, best_N = score_N[images], best_N[images]
        harmonic_N = 2 * score_N * best_N / (score_N + best_N).clamp(min=torch.finfo(torch.float64).tiny)
        figures["ref_clip_score"] = Figure.mean(harmonic_N)
    return figures
