"""Image-text retrieval: recall at k, both ways, with any number of images and captions per image.

Where answers tie, a query is found at k with the probability that it would have if ties were broken at random. A
collapsed model, whose scores all tie, therefore scores exactly like chance, and not like a perfect one.

Shape suffixes: N images, M captions (all images together), E embedding width, Q queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import comb
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from clips_data.errors import UserError
from clips_train.encoders import Encoder
from clips_train.evals import embedding, text_lengths
from clips_train.evals.items import DataSet, Item
from clips_train.evals.outcome import Figure, Outcome
from clips_train.use_config import Benchmark, EvalConfig

RECALL_AT = (1, 5, 10)
QUERIES_PER_BLOCK = 512
SCORES_PER_BLOCK = 1 << 25
"""Similarities that are looked at together, 128 MB of them, and as much again to work in."""
NUM_HARDEST: Final = 24
NUM_FIRST: Final = 3
SHOWN_CHARS: Final = 1000
"""Of a text in the details."""
ABOUT: Final = {
    "ties": "found at k with the probability of a random order of the answers that tie",
    "rank": "of the hardest: wrong answers that score higher, plus half of those that tie",
    "text_to_image": "every text is a query for its image among all images",
    "image_to_text": "every image is a query, found by any of its texts among all texts",
    "unit": "an image with all of its texts",
    "equal_texts": "have equal features and so tie",
}


def score(encoder: Encoder, data: DataSet, config: EvalConfig, benchmark: Benchmark) -> Outcome:
    """Recall at 1, 5 and 10 both ways.

    Images that cannot be used are left out together with their texts, and counted. Recalls that every ranking has, as
    at 10 among 10 images, are left out, and named in ``about``. Raises ``UserError`` for fewer than two images.
    """
    counts: Counter[str] = Counter(data.about.get("left_out", {}))
    pictures = embedding.embed_images(encoder, [item.read for item in data.items], config)
    items = [data.items[number] for number in pictures.numbers]
    if len(items) < 2:
        raise UserError(f"{data.about['path']} has {len(items)} usable image; retrieval needs at least two.")
    texts = [text for item in items for text in item.texts]
    image_of_text_M = torch.tensor([number for number, item in enumerate(items) for _ in item.texts])
    text_ME = embedding.embed_texts(encoder, texts, config)
    counts += pictures.counts
    counts["texts.of_bad_images"] = sum(len(data.items[number].texts) for number in pictures.reasons)
    counts += _counts(items, benchmark)
    text_places = text_to_image_places(pictures.image_NE, text_ME, image_of_text_M)
    image_places = image_to_text_places(pictures.image_NE, text_ME, image_of_text_M)
    found = _figures(text_places, image_places, image_of_text_M)
    certain = sorted(name for name, figure in found.items() if figure.chance == 1)
    return Outcome(
        figures={name: figure for name, figure in found.items() if name not in certain},
        counts=+counts,
        about={
            **ABOUT,
            "captions_per_image": benchmark.captions_per_image or "all",
            "figures_left_out": {name: "any ranking scores 1" for name in certain},
            "text_lengths": text_lengths.about(encoder, texts),
        },
        details={
            "hardest": hardest(
                pictures.image_NE, text_ME, image_of_text_M, text_places.ranks, [item.key for item in items], texts
            )
        },
    )


def _counts(items: Sequence[Item], benchmark: Benchmark) -> Counter[str]:
    counts = Counter({"images.scored": len(items), "texts.scored": sum(len(item.texts) for item in items)})
    wanted = benchmark.captions_per_image or 0
    return counts + Counter(f"images.with_{len(item.texts)}_captions" for item in items if len(item.texts) < wanted)


def hardest(
    image_NE: Tensor,
    text_ME: Tensor,
    image_of_text_M: Tensor,
    ranks_M: Tensor,
    keys: Sequence[str],
    texts: Sequence[str],
) -> list[dict[str, Any]]:
    """The texts whose image is found last, with its rank from 1 and the images that come first instead."""
    last = [number for number in ranks_M.argsort(descending=True, stable=True)[:NUM_HARDEST].tolist()]
    last = [number for number in last if ranks_M[number] >= 1]
    first_QK = (text_ME[last] @ image_NE.T).topk(min(NUM_FIRST, len(keys)), dim=1).indices
    return [
        {
            "text": texts[number] if len(texts[number]) <= SHOWN_CHARS else texts[number][:SHOWN_CHARS] + "…",
            "key": keys[int(image_of_text_M[number])],
            "rank": float(ranks_M[number]) + 1,
            "first": [keys[place] for place in first_K],
        }
        for number, first_K in zip(last, first_QK.tolist(), strict=True)
    ]


# --- from features to figures -----------------------------------------------------------------------------------------


def figures(image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor) -> dict[str, Figure]:
    """``text_to_image_r1`` and so on, each beside what a random ranking would score; units are images.

    ``image_NE`` and ``text_ME`` are unit vectors of any float type, ``image_of_text_M`` int64 indices into the images.
    An image counts as found when any one of its captions ranks high enough. Every image needs a caption.
    """
    text_places = text_to_image_places(image_NE, text_ME, image_of_text_M)
    return _figures(text_places, image_to_text_places(image_NE, text_ME, image_of_text_M), image_of_text_M)


def _figures(text_places: Places, image_places: Places, image_of_text_M: Tensor) -> dict[str, Figure]:
    image_of_text_M = image_of_text_M.cpu()
    num_images = len(image_places.above)
    captions_N = torch.bincount(image_of_text_M, minlength=num_images)
    assert num_images > 0 and len(captions_N) == num_images and int(captions_N.min()) > 0
    found: dict[str, Figure] = {}
    for k in RECALL_AT:
        hits_N = torch.zeros(num_images, dtype=torch.float64)
        hits_N.index_add_(0, image_of_text_M, text_places.found_at(k).cpu())
        found[f"text_to_image_r{k}"] = Figure.mean(hits_N, captions_N, chance=min(1.0, k / num_images))
        chance = chance_image_to_text(captions_N.tolist(), k)
        found[f"image_to_text_r{k}"] = Figure.mean(image_places.found_at(k).cpu(), chance=chance)
    return found


def retrieval_scores(image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor) -> dict[str, float]:
    """The values of ``figures``, and their chances as ``chance_text_to_image_r1`` and so on."""
    scores: dict[str, float] = {}
    for name, figure in figures(image_NE, text_ME, image_of_text_M).items():
        assert figure.chance is not None
        scores |= {name: figure.value, f"chance_{name}": figure.chance}
    return scores


class Places(NamedTuple):
    """Where the best right answer of each query stands, float32 [Q] each."""

    above: Tensor
    """How many wrong answers score higher."""
    wrong: Tensor
    """How many wrong answers tie with it."""
    right: Tensor
    """How many right answers do, itself included."""

    @property
    def ranks(self) -> Tensor:
        """float32 [Q], from 0: half of the wrong answers that tie count as better."""
        return self.above + self.wrong / 2

    def found_at(self, k: int) -> Tensor:
        """float64 [Q]: the probability that a right answer is among the first ``k`` where ties are broken at random."""
        above, wrong, right = (number.double() for number in self)
        missed = torch.ones_like(above)
        for place in range(k):
            # Of those that tie and are not yet placed, a wrong one comes next.
            next_is_wrong = (wrong - place).clamp(min=0) / (wrong + right - place).clamp(min=1)
            missed = torch.where(above + place < k, missed * next_is_wrong, missed)
        return 1 - missed


def text_to_image_places(image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor) -> Places:
    """Of each caption's image among all images."""
    found = []
    for block, scores_QN, spare_QN in _blocks(text_ME, image_NE):
        right_Q1 = scores_QN.gather(1, image_of_text_M[block].unsqueeze(1))
        above_Q, tied_Q = _above_and_tied(scores_QN, right_Q1, spare_QN)
        # The right answer ties with itself, which is no tie with a wrong one.
        found.append((above_Q, tied_Q - 1, torch.ones_like(tied_Q)))
    return Places(*(torch.cat(column) for column in zip(*found, strict=True)))


def image_to_text_places(image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor) -> Places:
    """Of each image's best own caption among all captions."""
    order_M = image_of_text_M.argsort(stable=True)
    text_ME, image_of_text_M = text_ME[order_M], image_of_text_M[order_M]
    found = []
    for block, scores_QM, spare_QM in _blocks(image_NE, text_ME):
        edges = torch.tensor([block.start, block.stop], device=image_of_text_M.device)
        first, stop = torch.searchsorted(image_of_text_M, edges).tolist()
        row_O = image_of_text_M[first:stop] - block.start
        own_O = scores_QM[row_O, torch.arange(first, stop, device=row_O.device)]
        best_Q = own_O.new_full((len(scores_QM),), -torch.inf).scatter_reduce_(0, row_O, own_O, "amax")
        above_Q, tied_Q = _above_and_tied(scores_QM, best_Q.unsqueeze(1), spare_QM)
        # None of its own captions is above the best of them, but some tie with it: itself at least.
        tied_own_Q = torch.zeros_like(best_Q).index_add_(0, row_O, (own_O == best_Q[row_O]).float())
        found.append((above_Q, tied_Q - tied_own_Q, tied_own_Q))
    return Places(*(torch.cat(column) for column in zip(*found, strict=True)))


def text_to_image_ranks(image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor) -> Tensor:
    """float32 [M]: the 0-based rank of each caption's image among all images."""
    return text_to_image_places(image_NE, text_ME, image_of_text_M).ranks


def image_to_text_ranks(image_NE: Tensor, text_ME: Tensor, image_of_text_M: Tensor) -> Tensor:
    """float32 [N]: the 0-based rank, among the captions of other images, of each image's best own caption."""
    return image_to_text_places(image_NE, text_ME, image_of_text_M).ranks


def _blocks(query_QE: Tensor, answer_AE: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which queries, their float32 similarities to all answers, and as much memory to work in."""
    answer_EA = answer_AE.float().T
    num_answers = len(answer_AE)
    rows = max(1, min(QUERIES_PER_BLOCK, SCORES_PER_BLOCK // num_answers, len(query_QE)))
    scores, spare = (torch.empty(rows, num_answers, device=query_QE.device) for _ in range(2))
    for start in range(0, len(query_QE), rows):
        block = slice(start, min(start + rows, len(query_QE)))
        here = slice(0, block.stop - block.start)
        yield block, torch.mm(query_QE[block].float(), answer_EA, out=scores[here]), spare[here]


def _above_and_tied(scores_QA: Tensor, than_Q1: Tensor, spare_QA: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [Q]: how many scores are above one of their row, and how many equal it.

    Counted in floats, exact up to 2^24 answers: sums of booleans take several times as long.
    """
    above_Q = torch.gt(scores_QA, than_Q1, out=spare_QA).sum(1)
    return above_Q, torch.eq(scores_QA, than_Q1, out=spare_QA).sum(1)


def chance_image_to_text(captions_per_image: Sequence[int], k: int) -> float:
    """Expected image→text recall at ``k`` of a random ranking of all captions."""
    total = sum(captions_per_image)
    misses = sum(
        times * (comb(total - own, k) / comb(total, k) if k <= total else 0.0)
        for own, times in Counter(captions_per_image).items()
    )
    return 1 - misses / len(captions_per_image)
