"""Evaluation beside CLIP_benchmark, and the embedding loop beside a bare one.

    uv run python tests/bench/evaluate.py retrieval [--num-images 5000] [--captions 5] [--width 768]
    uv run python tests/bench/evaluate.py embedding [--num-images 128] [--model ViT-B-16] [--rounds 3]

`retrieval` takes features as given and times what comes after: ranks, recalls and their intervals, with peak memory, of
ours and of CLIP_benchmark's ``zeroshot_retrieval.evaluate``, each in a process of its own, and compares the recalls.
`embedding` embeds JPEGs of web-like sizes from memory, and in turn runs the model alone over batches that are ready;
what decoding costs by itself is told beside it. Each prints and writes its figures as JSON (--out).
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

NOISE = 7.0
"""Length of what texts have beside the unit feature of their image: recalls are then far from 0 and from 1."""
BATCH = 64
LIMIT_S, LIMIT_MB = 10, 2000
RECALLS = (1, 5, 10)
JPEG_PX = (500, 375)
SIDES = ("clips", "clip_benchmark")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*BENCHES])
    parser.add_argument("--num-images", type=int, default=0)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--model", default="ViT-B-16", help="An architecture of open_clip, with random weights.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        print(json.dumps(measured(options)))
        return
    text = json.dumps(BENCHES[options.what](options), indent=1)
    (options.out or Path(f"evaluate_{options.what}.json")).write_text(text + "\n")
    print(text)


# --- retrieval --------------------------------------------------------------------------------------------------------


def retrieval(options: argparse.Namespace) -> dict[str, Any]:
    options.num_images = options.num_images or 5000
    found: dict[str, Any] = {"num_images": options.num_images, "num_texts": options.num_images * options.captions}
    for side in SIDES:
        passed = [f"--{name}={getattr(options, name.replace('-', '_'))}"
                  for name in ("num-images", "captions", "width", "threads")]  # fmt: skip
        command = [sys.executable, __file__, "retrieval", f"--side={side}", *passed]
        found[side] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ours, theirs = (found[side] for side in SIDES)
    return found | {
        "times_as_fast": round(theirs["wall_s"] / ours["wall_s"], 1),
        "times_as_fast_by_cpu": round(theirs["cpu_s"] / ours["cpu_s"], 1),
        "recalls_equal": ours["recalls"] == theirs["recalls"],
        f"within_{LIMIT_S}_s": ours["wall_s"] <= LIMIT_S,
        f"within_{LIMIT_MB}_mb": ours["peak_mb"] <= LIMIT_MB,
    }


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Of one side: seconds, and the peak of the whole process, libraries and features included."""
    generator = torch.Generator().manual_seed(0)
    image_NE = functional.normalize(torch.randn(options.num_images, options.width, generator=generator), dim=1)
    text_ME = torch.randn(options.num_images * options.captions, options.width, generator=generator)
    text_ME = text_ME.mul_(NOISE / options.width**0.5).add_(image_NE.repeat_interleave(options.captions, 0))
    compute = {"clips": ours, "clip_benchmark": theirs}[options.side](image_NE, text_ME, options)
    before_mb, wall, cpu = _peak_mb(), time.perf_counter(), time.process_time()
    recalls = compute()
    return {
        "wall_s": round(time.perf_counter() - wall, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "peak_mb": _peak_mb(),
        "peak_mb_before": before_mb,
        "recalls": {name: float(torch.tensor(value, dtype=torch.float32)) for name, value in recalls.items()},
    }


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 1_000_000


def ours(image_NE: Tensor, text_ME: Tensor, options: argparse.Namespace) -> Callable[[], dict[str, float]]:
    from clips_train.evals import retrieval

    text_ME = functional.normalize(text_ME, dim=1)
    image_of_text_M = torch.arange(len(image_NE)).repeat_interleave(options.captions)

    def compute() -> dict[str, float]:
        figures = retrieval.figures(image_NE, text_ME, image_of_text_M)
        return {name: figure.shown(seed=0)["value"] for name, figure in figures.items()}

    return compute


def theirs(image_NE: Tensor, text_ME: Tensor, options: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """CLIP_benchmark's, with a model whose features are there already; its texts are their numbers."""
    from clip_benchmark.metrics import zeroshot_retrieval

    class Given:
        encode_image = encode_text = staticmethod(lambda features: features)

    numbers = [[str(number * options.captions + way) for way in range(options.captions)]
               for number in range(len(image_NE))]  # fmt: skip
    batches = [(image_NE[first : first + BATCH], numbers[first : first + BATCH])
               for first in range(0, len(image_NE), BATCH)]  # fmt: skip

    def compute() -> dict[str, float]:
        found = zeroshot_retrieval.evaluate(
            Given(), batches, lambda texts: text_ME[[int(text) for text in texts]], "cpu", False, list(RECALLS)
        )
        names = {"text_to_image": "image_retrieval_recall", "image_to_text": "text_retrieval_recall"}
        return {f"{name}_r{k}": found[f"{other}@{k}"] for k in RECALLS for name, other in names.items()}

    return compute


# --- embedding --------------------------------------------------------------------------------------------------------


def embedding(options: argparse.Namespace) -> dict[str, Any]:
    from clips_train import transforms
    from clips_train.evals.embedding import embed_images
    from clips_train.use_config import EvalConfig

    encoder, config = _encoder(options), EvalConfig(batch=min(BATCH, 16) if options.device == "cpu" else BATCH)
    num_images = options.num_images or 128
    jpegs = _jpegs(min(num_images, 200))
    reads = [lambda number=number: jpegs[number % len(jpegs)] for number in range(num_images)]
    transform = encoder.preprocessing.transform()
    batch_NCHW = torch.stack([transform(transforms.decode_whole(read())) for read in reads[: config.batch]])

    def bare() -> None:
        for _ in range(0, num_images, config.batch):
            encoder.image_features(batch_NCHW).cpu()

    def decode() -> None:
        for read in reads:
            transform(transforms.decode_whole(read()))

    ways: dict[str, Callable[[], Any]] = {
        "embed": lambda: embed_images(encoder, reads, config, quiet=True), "bare": bare, "decode": decode,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    encoder.image_features(batch_NCHW)
    for _ in range(options.rounds):
        for name, do in ways.items():
            wall, used = time.perf_counter(), time.process_time()
            do()
            seconds[name].append(time.perf_counter() - wall)
            cpu[name].append(time.process_time() - used)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    median_cpu = {name: statistics.median(values) for name, values in cpu.items()}
    return {
        "model": options.model,
        "device": options.device,
        "num_images": num_images,
        "batch": config.batch,
        "images_per_s": {name: round(num_images / value, 2) for name, value in median.items()},
        "throughput_of_bare": round(median["bare"] / median["embed"], 4),
        "throughput_of_bare_by_round": [
            round(bare_s / embed_s, 4) for bare_s, embed_s in zip(seconds["bare"], seconds["embed"], strict=True)
        ],
        "cpu_ms_per_image": {name: round(1000 * value / num_images, 2) for name, value in median_cpu.items()},
        "peak_mb": _peak_mb(),
    }


def _encoder(options: argparse.Namespace) -> Any:
    import open_clip

    from clips_train import encoders

    model = open_clip.create_model(options.model).to(options.device).eval()
    width = model.encode_text(torch.zeros(1, 77, dtype=torch.long, device=options.device)).shape[-1]
    side_px = model.visual.image_size if isinstance(model.visual.image_size, int) else model.visual.image_size[0]
    return encoders.Encoder(
        encoders.Named(options.model, "open_clip", options.model, None, ""),
        encoders.Preprocessing(side_px, "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        tokenizer="clip",
        context_length=77,
        width=width,
        logit_scale=1.0,
        trained=None,
        device=torch.device(options.device),
        _encode_image=model.encode_image,
        _encode_text=model.encode_text,
        _arithmetic=torch.float32,
    )


def _jpegs(number: int) -> list[bytes]:
    from PIL import Image

    from clips_data.demo import scenes

    files = []
    for index in range(number):
        file = io.BytesIO()
        scenes.draw_scene(scenes.make_scene(0, index)).resize(JPEG_PX, Image.Resampling.BICUBIC).save(file, "JPEG")
        files.append(file.getvalue())
    return files


BENCHES = {"retrieval": retrieval, "embedding": embedding}


if __name__ == "__main__":
    main()
