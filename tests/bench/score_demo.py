"""What `clips score` tells on the demo world, where the truth is known. Needs torch; some minutes on two cores.

    python tests/bench/score_demo.py --work FOLDER

makes FOLDER/pairs (2,500 pairs of world 0) and its scores where they are missing, and prints

- web captions: ROC-AUC of right against wrong ones; the share of right ones after `--where 'score.web >= t'`, as
  predicted on one half of the images and as realised on the other;
- support: ROC-AUC of true descriptions against those in which one, two or three facts were changed;
- near duplicates: seconds and memory for 200,000 captions, and how many of the planted ones were found.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from clips_data import download, joined, near_duplicates, score, support
from clips_data.config import DownloadConfig, ScoreConfig
from clips_data.demo import scenes, truth
from clips_data.demo.scorer import kind_of_web_caption, roc_auc
from clips_data.executor import Job

LEAST_RIGHT_SHARE = 0.98
"""The threshold is the lowest at which so many of the kept captions of the first half are right."""
CHANGED_WORLD = 31
NUM_CHANGED = 1000
NEIGHBOURS = (10, 20, 50, 100)


def web(work: Path) -> dict[str, Any]:
    """How well `score.web` tells right from wrong web captions."""
    download.run(DownloadConfig(source="demo", num_pairs=2500), Job(work=work, quiet=True))
    report = score.run(ScoreConfig(columns=("web",)), Job(work=work, quiet=True))
    found: dict[str, list[float]] = {"right": [], "wrong": [], "vague": []}
    halves: list[list[tuple[float, bool]]] = [[], []]
    given = joined.open_inputs(work, ("web",))
    for unit in given.units:
        scores = dict(joined.read_table(work / "scores" / "clip" / f"{unit}.parquet").select("key", "web").iter_rows())
        for key, url, caption in given.table(unit).select("key", "url", "text.web").iter_rows():
            scene = truth.scene_of(url)
            assert scene is not None
            kind = kind_of_web_caption(scene, caption)
            found[kind].append(scores[key])
            halves[int(key) % 2].append((scores[key], kind == "right"))
    first, second = halves
    threshold = _threshold(first)
    return {
        "captions": {kind: len(values) for kind, values in found.items()},
        "auc_right_wrong": round(roc_auc(found["right"], found["wrong"]), 4),
        "auc_right_vague": round(roc_auc(found["right"], found["vague"]), 4),
        "threshold": round(threshold, 4),
        "right_share_of_all": _share(second, -1.0),
        "right_share_predicted": _share(first, threshold),
        "right_share_realised": _share(second, threshold),
        "kept_share_predicted": round(sum(value >= threshold for value, _ in first) / len(first), 4),
        "kept_share_realised": round(sum(value >= threshold for value, _ in second) / len(second), 4),
        "images_per_s": report.facts.get("images_per_s"),
    }


def _threshold(half: Sequence[tuple[float, bool]]) -> float:
    kept = right = 0
    threshold = max(value for value, _ in half)
    for value, is_right in sorted(half, reverse=True):
        kept, right = kept + 1, right + is_right
        if right >= LEAST_RIGHT_SHARE * kept:
            threshold = value
    return threshold


def _share(half: Sequence[tuple[float, bool]], threshold: float) -> float:
    kept = [right for value, right in half if value >= threshold]
    return round(sum(kept) / len(kept), 4)


def facts() -> dict[str, Any]:
    """How well the support of the least supported word tells true descriptions from changed ones."""
    import torch

    scorer = score.load_scorer(score.resolve_model(ScoreConfig()), None, name="demo")
    draw = random.Random(5)
    shown = [scenes.make_scene(CHANGED_WORLD, index) for index in range(NUM_CHANGED)]
    num_changes = [draw.choice((0, 0, 1, 2, 3)) for _ in shown]
    told = [_changed(scene, number, draw) for scene, number in zip(shown, num_changes, strict=True)]
    texts = [scenes.describe(scene) for scene in told]
    images = [_jpeg(scene) for scene in shown]
    image_NE = torch.cat([scorer.image_features(some, [""] * len(some)) for some in _batches(images)]).cpu()
    text_NE = torch.cat([scorer.text_features(some) for some in _batches(texts)]).cpu()
    cosines = torch.nn.functional.cosine_similarity(image_NE, text_NE).tolist()
    found: dict[str, Any] = {"cosine": _aucs(cosines, num_changes)}
    for count in NEIGHBOURS:
        values = support.supports(image_NE.numpy(), text_NE.numpy(), texts, count)
        found[f"support_{count}"] = _aucs([value or 0.0 for value in values], num_changes)
    return found


def _changed(scene: scenes.Scene, number: int, draw: random.Random) -> scenes.Scene:
    """The scene with the colour or the shape of some objects replaced by one that none of its objects has."""
    objects = list(scene.objects)
    for place in draw.sample(range(len(objects)), min(number, len(objects))):
        attribute, values = draw.choice((("colour", tuple(scenes.COLOURS)), ("shape", scenes.SHAPES)))
        absent = [value for value in values if value not in {getattr(thing, attribute) for thing in scene.objects}]
        objects[place] = dataclasses.replace(objects[place], **{attribute: draw.choice(absent)})
    return dataclasses.replace(scene, objects=tuple(objects))


def _jpeg(scene: scenes.Scene) -> bytes:
    import io

    file = io.BytesIO()
    scenes.draw_scene(scene).save(file, "JPEG", quality=90)
    return file.getvalue()


def _batches(items: Sequence[Any], size: int = 64) -> list[Any]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _aucs(values: Sequence[float], num_changes: Sequence[int]) -> dict[str, float]:
    def of(wanted: Callable[[int], bool]) -> list[float]:
        return [value for value, number in zip(values, num_changes, strict=True) if wanted(number)]

    true = of(lambda number: number == 0)
    named = {"any": lambda n: n > 0, "one": lambda n: n == 1, "two": lambda n: n == 2, "three": lambda n: n == 3}
    return {name: round(roc_auc(true, of(wanted)), 3) for name, wanted in named.items()}


def repeated(num_captions: int) -> dict[str, Any]:
    """Seconds for captions of 4 to 60 words of a skewed vocabulary, a tenth of them near copies, a tenth of a form."""
    import polars as pl

    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(30_000)]
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(words))))
    texts = [
        " ".join(draw.choices(words, cum_weights=weights, k=draw.randint(4, 60))) for _ in range(num_captions * 8 // 10)
    ]
    forms = [f"{draw.choice(words)} Wall Art | Free Shipping | Buy {draw.choice(words)} Prints Online - Best Price!!"
             for _ in range(num_captions // 10)]  # fmt: skip
    originals = draw.sample(range(len(texts)), num_captions - len(texts) - len(forms))
    copies = [texts[number].upper() + "!!" for number in originals]
    texts += forms + copies
    with tempfile.TemporaryDirectory() as folder:
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        captions = near_duplicates.Captions(Path(folder) / "captions")
        for first in range(0, num_captions, 1000):
            keys = [f"{number:09d}" for number in range(first, min(first + 1000, num_captions))]
            captions.add(pl.Series(keys), pl.Series(texts[first : first + 1000]))
        added = time.monotonic()
        first_of = captions.near_duplicates()
        found = sum(first_of[num_captions - len(copies) :] >= 0)
        return {
            "captions": num_captions,
            "reading_s": round(added - started, 1),
            "comparing_s": round(time.monotonic() - added, 1),
            "copies_found": f"{found} of {len(copies)}",
            "scratch_bytes_per_caption": sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
            // num_captions,
            "memory_added_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) // 1024,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", choices=("web", "facts", "repeated"))
    options = parser.parse_args()
    for name, measure in (
        ("web", lambda: web(options.work)), ("facts", facts), ("repeated", lambda: repeated(200_000)),
    ):  # fmt: skip
        if options.only in (None, name):
            print(name, json.dumps(measure(), indent=1), flush=True)


if __name__ == "__main__":
    main()
