"""Search over stored features: building, queries per second and what an index misses, beside brute force in numpy.

uv run python tests/bench/search.py [--rows 1000000] [--width 512] [--queries 64] [--out search.json]

Features are synthetic: unit vectors whose spectrum falls as 1/rank, as those of image encoders do about, without groups
that would be easy to find again. A query is a row with as much of the same noise as of itself. Features are stored as
``clips search`` stores them, in files of 10,000 rows. Every way answers the same queries in the same process on the
same threads:

    numpy      float32 features that are in memory already: one matrix product, then argpartition
    exact      ours: mapped fp16 files, made float32 block by block
    ivf        ours: the mapped index, looking into 1/64, 1/16 (the default) and 1/4 of its lists

Recall at 10 is the share of numpy's first ten that a way finds. One query at a time, and all at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clips_train import search_index
from clips_train.features import SUFFIX, FeatureWriter
from clips_train.search_store import FEATURES, OK, THERE_TENSOR, Store
from clips_train.shards import Split

SHARD_ROWS = 10_000
NOISE, SEED = 1.0, 1 << 32
TOP = 10
SINGLE_QUERIES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--work", type=Path, default=None, help="folder for the data; a temporary one by default")
    parser.add_argument("--out", type=Path, default=Path("search.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        store = stored(Path(folder), options.rows, options.width)
        queries_QE = queries(store, options.queries)
        result = {
            "rows": options.rows,
            "width": options.width,
            "queries": options.queries,
            "threads": torch.get_num_threads(),
            **compared(store, queries_QE),
        }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def stored(folder: Path, num_rows: int, width: int) -> Store:
    sizes = tuple(min(SHARD_ROWS, num_rows - first) for first in range(0, num_rows, SHARD_ROWS))
    paths = []
    for shard, size in enumerate(sizes):
        layout = {FEATURES: (torch.float16, (size, width)), THERE_TENSOR: (torch.bool, (size,))}
        paths.append(folder / f"train-{shard:05d}{SUFFIX}")
        with contextlib.closing(FeatureWriter(paths[-1], layout, {})) as writer:
            writer.write(FEATURES, 0, torch.from_numpy(drawn(shard, size, width)))
            writer.write(THERE_TENSOR, 0, torch.ones(size, dtype=torch.bool))
    split = Split(folder, "train", tuple(f"train-{shard:05d}.tar" for shard in range(len(sizes))), sizes, (), "")
    return opened(folder, split, paths)


def drawn(seed: int, num: int, width: int) -> np.ndarray:
    """Unit vectors, float32 [num, width]."""
    scale_E = 1 / np.sqrt(np.arange(1, width + 1, dtype=np.float32))
    return unit(np.random.default_rng(seed).standard_normal((num, width), dtype=np.float32) * scale_E)


def unit(vectors_NE: np.ndarray) -> np.ndarray:
    lengths_N1: np.ndarray = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    return vectors_NE / lengths_N1


def opened(folder: Path, split: Split, paths: list[Path]) -> Store:
    from safetensors import safe_open

    features, there = [], []
    for path in paths:
        with safe_open(path, "pt") as file:
            features.append(file.get_tensor(FEATURES))
            there.append(file.get_tensor(THERE_TENSOR))
    digests = {path.stem: path.stem for path in paths}
    return Store(folder, split, features, there, digests, Counter({OK: split.num_samples}))


def queries(store: Store, number: int) -> np.ndarray:
    positions = np.random.default_rng(SEED).integers(store.split.num_samples, size=number)
    rows = [store.place(int(position)) for position in positions]
    found_QE = np.stack([store.features_NE[shard][row].float().numpy() for shard, row in rows])
    return unit(found_QE + NOISE * drawn(SEED, number, store.width))


def compared(store: Store, queries_QE: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    before_kb = peak_kb()
    found["exact"], exact = measured(lambda some: search_index.exact(store, some, TOP), queries_QE)
    found["exact"]["peak_mib_above_start"] = (peak_kb() - before_kb) // 1024
    found["numpy"], truth = measured(brute_force(store), queries_QE)
    started = time.perf_counter()
    index = search_index.opened(store)
    found["ivf_build_s"] = round(time.perf_counter() - started, 1)
    found["ivf_lists"] = index.nlist
    found["ivf_bytes"] = sum(path.stat().st_size for path in store.folder.glob(f"*{search_index.FILE_SUFFIX}"))
    found["exact"]["recall_at_10"] = recall(exact, truth)
    for part in (64, 16, 4):
        num_probed = max(1, round(index.nlist / part))

        def look(some: np.ndarray, num_probed: int = num_probed) -> search_index.Nearest:
            return search_index.approximate(store, some, TOP, num_probed=num_probed)

        name = f"ivf_1/{part}"
        found[name], answers = measured(look, queries_QE)
        found[name]["recall_at_10"] = recall(answers, truth)
    found["default_lists_probed"] = search_index.probed(index.nlist)
    return found


def brute_force(store: Store) -> Callable[[np.ndarray], search_index.Nearest]:
    all_NE = np.concatenate([block.float().numpy() for _, block in store.blocks(SHARD_ROWS)])

    def look(queries_QE: np.ndarray) -> search_index.Nearest:
        scores_QN = queries_QE @ all_NE.T
        best = np.argpartition(scores_QN, -TOP, axis=1)[:, -TOP:]
        scores_QK = np.take_along_axis(scores_QN, best, 1)
        order = np.argsort(-scores_QK, axis=1)
        return search_index.Nearest(np.take_along_axis(scores_QK, order, 1), np.take_along_axis(best, order, 1))

    return look


def measured(
    look: Callable[[np.ndarray], search_index.Nearest], queries_QE: np.ndarray
) -> tuple[dict[str, Any], search_index.Nearest]:
    """Both figures after one call that is not counted, which brings the files into memory."""
    look(queries_QE[:1])
    started = time.perf_counter()
    for number in range(SINGLE_QUERIES):
        look(queries_QE[number : number + 1])
    single_ms = (time.perf_counter() - started) / SINGLE_QUERIES * 1000
    started = time.perf_counter()
    answers = look(queries_QE)
    seconds = time.perf_counter() - started
    return {"one_query_ms": round(single_ms, 2), "queries_per_s": round(len(queries_QE) / seconds, 1)}, answers


def recall(found: search_index.Nearest, truth: search_index.Nearest) -> float:
    shares = [len(set(mine) & set(right)) / TOP for mine, right in zip(found[1], truth[1], strict=True)]
    return round(float(np.mean(shares)), 4)


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
