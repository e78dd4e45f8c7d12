"""The nearest stored features to queries, by inner product: exactly, or through an index on disk that looks at a part.

The exact way reads the mapped features block by block, so that nothing is stored twice and new shards cost nothing; its
time grows with the number of features. Above ``EXACT_UP_TO`` of them an inverted file of faiss (IVF) is built beside
them: features are sorted into lists around centroids of k-means, and a query looks into the lists whose centroids are
nearest. It holds the same fp16 features, so its scores are those of the exact way, and it is mapped as well: a query
reads the lists that it looks into. What it misses is measured in ``tests/bench/search.py``.

Shape suffixes: Q queries, K nearest, N features, E width.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clips_data import ledger
from clips_data.errors import ResumeRefused, UserError
from clips_train.search_store import Store, alone

Way = Literal["auto", "exact", "ivf"]
EXACT_UP_TO: Final = 1_000_000
BLOCK_ROWS: Final = 1 << 14
"""Rows that are made float32 at a time: 48 MiB at a width of 768."""
BLOCK_QUERIES: Final = 1 << 10
LISTS_PER_ROOT: Final = 2
"""An index of N features has this many times √N lists."""
TRAINING_ROWS_PER_LIST: Final = 64
"""Features that k-means sees for each list; faiss warns below 39."""
ITERATIONS: Final = 10
PROBED_SHARE: Final = 1 / 16
"""Of the lists, that a query looks into."""
SEED: Final = 1234
FILE_SUFFIX: Final = ".ivf.faiss"


class Nearest(NamedTuple):
    scores_QK: np.ndarray
    """float32, falling; -inf where there are fewer than K."""
    positions_QK: np.ndarray
    """int64, in the store; -1 where there are fewer than K."""


def library() -> Any:
    """faiss. Raises ``UserError`` where it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise UserError(
            "An index needs faiss, which is not installed. pip install 'clips[search]' (--index exact does without)."
        ) from None
    return faiss


def way(wanted: Way, num_rows: int) -> Literal["exact", "ivf"]:
    """How so many are searched. Raises ``UserError`` where that needs what is not installed."""
    chosen = wanted if wanted != "auto" else "exact" if num_rows <= EXACT_UP_TO else "ivf"
    if chosen == "ivf":
        library()
    return chosen


def exact(store: Store, queries_QE: np.ndarray, num: int) -> Nearest:
    """The ``num`` nearest of all features; those that tie are in the order of their positions."""
    parts = [
        _exact(store, torch.from_numpy(queries_QE[first : first + BLOCK_QUERIES]), num)
        for first in range(0, len(queries_QE), BLOCK_QUERIES)
    ]
    return Nearest(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _exact(store: Store, queries_QE: Tensor, num: int) -> Nearest:
    best = _nothing(len(queries_QE))
    for positions_N, features_NE in store.blocks(BLOCK_ROWS):
        scores_QN = queries_QE @ features_NE.float().T
        scores_QK, rows_QK = _highest(scores_QN, min(num, len(features_NE)))
        best = _best(best, Nearest(scores_QK.numpy(), positions_N[rows_QK].numpy()), num)
    return best


def _highest(scores_QN: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Scores and rows; of rows that tie for the last places the first ones, which ``topk`` does not promise."""
    scores_QK, rows_QK = scores_QN.topk(num)
    last_Q1 = scores_QK[:, -1:]
    for query in torch.nonzero((scores_QN >= last_Q1).sum(1) > num).flatten().tolist():
        rows = torch.nonzero(scores_QN[query] >= last_Q1[query]).flatten()
        chosen = scores_QN[query][rows].argsort(descending=True, stable=True)[:num]
        rows_QK[query] = rows[chosen]
        scores_QK[query] = scores_QN[query][rows_QK[query]]
    return scores_QK, rows_QK


def _nothing(num_queries: int) -> Nearest:
    return Nearest(np.empty((num_queries, 0), dtype=np.float32), np.empty((num_queries, 0), dtype=np.int64))


def _best(one: Nearest, other: Nearest, num: int) -> Nearest:
    scores = np.concatenate([one.scores_QK, other.scores_QK], axis=1)
    positions = np.concatenate([one.positions_QK, other.positions_QK], axis=1)
    order = np.lexsort((positions, -scores), axis=1)[:, :num]
    return Nearest(np.take_along_axis(scores, order, 1), np.take_along_axis(positions, order, 1))


# --- the index on disk ------------------------------------------------------------------------------------------------


def approximate(store: Store, queries_QE: np.ndarray, num: int, *, num_probed: int | None = None) -> Nearest:
    """As ``exact``, but looking into the nearest lists of the index, which is built where it is missing or old."""
    index = opened(store)
    index.nprobe = num_probed or probed(index.nlist)
    scores_QK, positions_QK = index.search(queries_QE, min(num, store.num_features))
    scores_QK[positions_QK < 0] = -np.inf
    return _best(_nothing(len(queries_QE)), Nearest(scores_QK, positions_QK), num)


def probed(num_lists: int) -> int:
    return max(1, math.ceil(num_lists * PROBED_SHARE))


def opened(store: Store) -> Any:
    """The mapped index of these very features."""
    faiss = library()
    unit = f"{store.split.name}.ivf"
    path = store.folder / (store.split.name + FILE_SUFFIX)
    num_lists = max(1, min(round(LISTS_PER_ROOT * math.sqrt(store.num_features)), store.num_features))
    about = {
        "lists": num_lists,
        "training_rows_per_list": TRAINING_ROWS_PER_LIST,
        "iterations": ITERATIONS,
        "seed": SEED,
        "faiss": faiss.__version__,
    }

    def mapped() -> Any:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)

    def kept() -> Any:
        """None where it is to be made again of the features: missing, of others, of another faiss, or damaged."""
        with contextlib.suppress(UserError, ResumeRefused, RuntimeError):
            if ledger.is_done(store.folder, unit, inputs=store.digests, config=about, overwrite=False):
                return mapped()
        return None

    if (index := kept()) is not None:
        return index
    with ledger.readable_disk_errors(store.folder), alone(store.folder):
        if (index := kept()) is not None:
            return index
        ledger.forget_unit(store.folder, unit)
        faiss.write_index(_built(store, num_lists), str(ledger.part(path)))
        counts = {"features": store.num_features}
        ledger.commit(store.folder, unit, [path.name], inputs=store.digests, config=about, counts=counts)
    return mapped()


def _built(store: Store, num_lists: int) -> Any:
    faiss = library()
    centroids = faiss.IndexFlatIP(store.width)
    index = faiss.IndexIVFScalarQuantizer(
        centroids, store.width, num_lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.spherical, index.cp.niter, index.cp.seed = True, ITERATIONS, SEED
    index.cp.min_points_per_centroid = 1
    index.train(_training_rows(store, num_lists * TRAINING_ROWS_PER_LIST))
    for positions_N, features_NE in store.blocks(BLOCK_ROWS):
        index.add_with_ids(features_NE.float().numpy(), positions_N.numpy())
    return index


def _training_rows(store: Store, num_wanted: int) -> np.ndarray:
    """Features spread evenly over the store, as float32."""
    step = max(1, store.num_features // num_wanted)
    kept, skip = [], 0
    for _, features_NE in store.blocks(BLOCK_ROWS):
        kept.append(features_NE[skip::step].float().numpy())
        skip = (skip - len(features_NE)) % step
    return np.concatenate(kept)
