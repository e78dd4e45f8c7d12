"""Our loader beside open_clip's own, on the same tars: samples per second, and CPU time per sample.

    uv run python tests/bench/loader.py [--num-samples 2000] [--rounds 5] [--image-px 112 224]

Both read 512-px JPEGs (quality 90, noise with the spectrum of photographs) from shards as `clips shard` writes them,
make the same crops (40-100 % of the area, bilinear with antialias, no colour changes), tokenise the same captions, and
end in normalised float batches: open_clip normalises each picture, we send bytes and normalise batches. Each is one
process with torch on one thread. open_clip's pipeline has no threads and ours has its own, so that CPU time per sample
is what compares them; wall time is told beside it. Rounds alternate; figures are medians, with best and worst ratio.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SOURCE_PX, QUALITY = 512, 90
SPECTRUM = 1.55
"""Amplitudes fall with this power of the frequency: JPEGs come out at about 60 KB."""
NUM_PICTURES = 200
"""Different ones; further samples repeat them. Nothing is kept between samples on either side."""
SHARD_ROWS = 500
BATCH, CONTEXT = 100, 77
REST_S = 1.0
WORDS = ("a", "photo", "of", "the", "old", "red", "house", "by", "river", "with", "two", "dogs", "in", "front", "under",
         "large", "tree", "cat", "street", "sun", "market", "boat")  # fmt: skip
SIDES = ("clips", "open_clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--image-px", type=int, nargs="+", default=[112, 224])
    parser.add_argument("--work", type=Path, help="Keep the shards here for a next time.")
    parser.add_argument("--out", type=Path, default=Path("loader.json"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options.work, options.image_px[0])))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        if not (work / "index.json").exists():
            image_bytes = write_shards(work, options.num_samples)
            print(f"{options.num_samples} samples, {image_bytes / 1000:.0f} KB a picture", file=sys.stderr)
        result = {f"{px}_px": compare(work, px, options.rounds) for px in options.image_px}
    text = json.dumps(result, indent=1)
    options.out.write_text(text + "\n")
    print(text)


def compare(work: Path, image_px: int, rounds: int) -> dict[str, Any]:
    """Alternating rounds, each in a process of its own."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            command = [sys.executable, __file__, "--side", side, "--work", str(work), "--image-px", str(image_px)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    figures: dict[str, Any] = {
        side: {name: round(statistics.median(of_round[name] for of_round in of_side), 4) for name in of_side[0]}
        for side, of_side in found.items()
    }
    for name in ("cpu_ms", "wall_ms"):
        ratios = [other[name] / ours[name] for ours, other in zip(found["clips"], found["open_clip"], strict=True)]
        figures[f"{name}_ratio"] = {
            "median": round(statistics.median(ratios), 2),
            "worst": round(min(ratios), 2),
            "best": round(max(ratios), 2),
        }
    return figures


def measure(side: str, work: Path, image_px: int) -> dict[str, float]:
    """Milliseconds per sample of one epoch, after a first batch, and samples per CPU second."""
    import torch

    torch.set_num_threads(1)
    batches = {"clips": ours, "open_clip": theirs}[side](work, image_px)
    assert next(batches) == (BATCH, 3, image_px, image_px)
    idle_since()
    num_samples, wall, cpu = 0, time.perf_counter(), time.process_time()
    for shape in batches:
        num_samples += shape[0]
    wall, cpu = idle_since() - wall, time.process_time() - cpu
    return {
        "cpu_ms": cpu / num_samples * 1000,
        "wall_ms": wall / num_samples * 1000,
        "samples_per_cpu_s": num_samples / cpu,
        "num_samples": num_samples,
    }


def idle_since() -> float:
    """When this process last did something, once it has rested: what is made ahead is then as much as before."""
    last = time.perf_counter()
    while time.perf_counter() - last < REST_S:
        before = time.process_time()
        time.sleep(REST_S / 20)
        if time.process_time() - before > REST_S / 2000:
            last = time.perf_counter()
    return last


def ours(work: Path, image_px: int) -> Iterator[tuple[int, ...]]:
    from clips_train import shards, transforms
    from clips_train.config import TrainConfig
    from clips_train.data import SampleStream
    from clips_train.tokenizer import build_tokenizer

    config = TrainConfig(
        image_px=image_px, context_length=CONTEXT, views=("web",), decoder="none", caption_weight=0, batch=BATCH,
        augment="crop", cache_bytes=0, device="cpu",
    )  # fmt: skip
    split = shards.open_split(work, "train")
    stream = SampleStream(split, config, build_tokenizer("bpe")).batches()
    for batch in itertools.islice(stream, split.num_samples // BATCH):
        yield tuple(transforms.normalise(batch.image_NCHW).shape)


def theirs(work: Path, image_px: int) -> Iterator[tuple[int, ...]]:
    import open_clip
    from open_clip.transform import MaybeConvertMode, MaybeToTensor
    from open_clip_train.data import get_wds_dataset
    from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomResizedCrop

    from clips_train import transforms

    preprocess = Compose(  # open_clip's own training transform, which is bicubic whatever it is told
        [
            RandomResizedCrop(image_px, scale=transforms.CROP_AREA, interpolation=InterpolationMode.BILINEAR),
            MaybeConvertMode(),
            MaybeToTensor(),
            Normalize(transforms.IMAGE_MEAN, transforms.IMAGE_STD),
        ]
    )
    index = json.loads((work / "index.json").read_text())
    tars = [work / shard["file"] for shard in index["splits"]["train"]["shards"]]
    args = types.SimpleNamespace(
        train_data="::".join(map(str, tars)), train_num_samples=index["splits"]["train"]["num_samples"],
        train_data_upsampling_factors=None, dataset_resampled=False, seed=0, batch_size=BATCH, workers=0, world_size=1,
    )  # fmt: skip
    data = get_wds_dataset(args, preprocess, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    for images, texts in data.dataloader:
        assert texts.shape == (BATCH, CONTEXT)
        yield tuple(images.shape)


# --- the shards -------------------------------------------------------------------------------------------------------


def picture(seed: int) -> bytes:
    """A JPEG of coloured noise whose channels mostly agree, as those of photographs do."""
    random = np.random.default_rng(seed)
    noise = np.fft.rfft2(random.standard_normal((SOURCE_PX, SOURCE_PX, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(SOURCE_PX)[:, None], np.fft.rfftfreq(SOURCE_PX)[None])
    frequency[0, 0] = 1 / SOURCE_PX
    pixels = np.fft.irfft2(noise / (frequency**SPECTRUM)[..., None], s=(SOURCE_PX, SOURCE_PX), axes=(0, 1))
    grey = pixels.mean(-1, keepdims=True)
    pixels = grey + 0.3 * (pixels - grey)
    pixels = 128 + 55 * (pixels - pixels.mean()) / pixels.std()
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_shards(folder: Path, num_samples: int) -> float:
    """A folder as `clips shard` leaves it, with its own writer of tars; returns the mean bytes of a picture."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clips_data import tars

    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    pictures = [picture(seed) for seed in range(min(NUM_PICTURES, num_samples))]
    shards = []
    for first in range(0, num_samples, SHARD_ROWS):
        path = folder / f"train-{first // SHARD_ROWS:05d}.tar"
        rows = []
        with path.open("wb") as file:
            writer = tars.TarWriter(file)
            for number in range(first, min(first + SHARD_ROWS, num_samples)):
                image, text = pictures[number % len(pictures)], " ".join(random.choice(WORDS, 12))
                key, sha256 = f"{number:09d}", hashlib.sha256(image).hexdigest()
                synthetic = " ".join(" ".join(random.choice(WORDS, 15)) + "." for _ in range(5))
                about = {"key": key, "sha256": sha256, "web": text, "synthetic": synthetic, "scores": {}}
                about["sub_captions"] = {"synthetic": [[0, 20]]}
                row: dict[str, Any] = {"key": key, "sha256": sha256, "image_ext": "jpg"}
                for kind, ext, data in (
                    ("image", "jpg", image),
                    ("txt", "txt", text.encode()),
                    ("json", "json", json.dumps(about).encode()),
                ):
                    row |= {f"{kind}_offset": writer.add(f"{key}.{ext}", data), f"{kind}_bytes": len(data)}
                rows.append(row)
            writer.close()
        pq.write_table(pa.Table.from_pylist(rows), path.with_name(path.stem + ".index.parquet"))
        shards.append({"file": path.name, "num_samples": len(rows), "bytes": path.stat().st_size})
    index = {
        "schema_version": 1,
        "splits": {"train": {"num_samples": num_samples, "shards": shards}},
        "columns": ["web", "synthetic"],
        "digest": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
    }
    (folder / "index.json").write_text(json.dumps(index))
    return statistics.mean(map(len, pictures))


if __name__ == "__main__":
    main()
