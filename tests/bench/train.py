"""The training step beside open_clip's: time, arithmetic and memory, on the same batch in the same process.

    uv run python tests/bench/train.py step   [--sizes S/16] [--batch 64] [--rounds 7]
    uv run python tests/bench/train.py clips  [--sizes S/16] [--batch 64] [--rounds 5]
    uv run python tests/bench/train.py memory [--batch 64]
    uv run python tests/bench/train.py profile [--sizes S/16] [--batch 64]
    uv run python tests/bench/train.py step --device cuda --sizes B/16,L/14 --image-px 224 --batch 256

``step`` trains the towers alone, as open_clip trains its CLIP: gradient and optimiser. ``clips`` adds the second view
and the captioner, with texts trimmed and not, and sets them beside open_clip's CLIP and CoCa. ``memory`` is that of the
captioning loss, in a process of its own for each way to compute it. ``profile`` says which operations take the time.

Each prints and writes its figures as JSON (--out). Rivals take turns in every round, so that a busy machine is busy for
all of them. Ratios are of medians: above 1 means faster than the rival. On a CPU they are of processor seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clips_train import parts, step, transforms
from clips_train.batch import Batch, ViewTexts
from clips_train.config import TrainConfig
from clips_train.distributed import World
from clips_train.flops import peak_tflops
from clips_train.losses import caption_loss
from clips_train.model import build_model
from clips_train.optim import build_optimizer
from clips_train.tokenizer import Tokenizer, build_tokenizer
from clips_train.towers import VOCAB_SIZES, open_clip_config, sizes_of

RATE, WEIGHT_DECAY, BETAS = 1e-4, 0.2, (0.9, 0.95)
CAPTION_WEIGHT = 2.0
MIB = 1 << 20
NUM_PROFILED = 15

NUM_WORDS = {
    "web": (3, 5, 6, 7, 8, 8, 9, 9, 10, 11, 12, 14, 16, 22),
    "one_piece": (6, 7, 8, 9, 10, 11, 11, 12, 13, 14, 15, 16, 18, 20),
    "target": (38, 44, 47, 50, 53, 55, 57, 59, 61, 63, 66, 69, 74, 84),
}
"""Lengths of texts, each as likely as the others: 10, 12 and 59 words on average."""
WORDS = (
    "man", "old", "woman", "small", "dog", "red", "table", "white", "boat", "street", "window", "kitchen", "sky",
    "of", "the", "a", "with", "on", "near", "behind", "river", "sign", "garden", "bridge", "two", "children",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*BENCHES, *LOSSES_OF_CAPTIONS])
    parser.add_argument("--sizes", default="S/16")
    parser.add_argument("--image-px", type=int, default=112)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what in LOSSES_OF_CAPTIONS:
        print(json.dumps(measured_captions(options)))
        return
    text = json.dumps(BENCHES[options.what](options), indent=1)
    (options.out or Path(f"train_{options.what}.json")).write_text(text + "\n")
    print(text)


# --- batches ----------------------------------------------------------------------------------------------------------


def make_texts(kind: str, num: int) -> list[str]:
    drawn = random.Random(kind)
    return [" ".join(drawn.choices(WORDS, k=drawn.choice(NUM_WORDS[kind]))) for _ in range(num)]


def make_batch(config: TrainConfig, tokenizer: Tokenizer) -> Batch:
    """Random images; texts of realistic lengths."""
    generator = torch.Generator().manual_seed(0)
    num = config.batch

    def view(kind: str) -> ViewTexts:
        ids_NKL = tokenizer.text_ids(make_texts(kind, num), config.context_length).unsqueeze(1)
        there, none = torch.ones(num, 1, dtype=torch.bool), torch.zeros(num, 0, dtype=torch.bool)
        return ViewTexts(ids_NKL, there, ids_NKL[:, :0], none)

    labels_NQ, mask_NQ = tokenizer.targets(make_texts("target", num), config.target_length)
    size = (num, 3, config.image_px, config.image_px)
    return Batch(
        image_NCHW=torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
        views=tuple(view(kind) for kind in ("web", "one_piece")[: len(config.views)]),
        condition_NL=None,
        dropped_N=torch.zeros(num, dtype=torch.bool),
        labels_NQ=labels_NQ,
        mask_NQ=mask_NQ,
        kept_NP=None,
        teacher={},
        keys=[f"{number:09d}" for number in range(num)],
        first_slot=0,
        state={"digest": "", "seed": 0, "epoch": 0, "sample": num, "counts": {}},
    )


def facts(batch: Batch) -> dict[str, Any]:
    """Mean numbers of tokens, so that lengths can be compared with those of other data."""
    used = {f"view_{number}": (view.ids_NKL != 0).sum(-1).float() for number, view in enumerate(batch.views)}
    return {name: round(found.mean().item(), 1) for name, found in used.items()} | {
        "target": round(batch.mask_NQ.sum(1).float().mean().item(), 1),
        "longest_target": int(batch.mask_NQ.sum(1).max()),
    }


# --- rivals -----------------------------------------------------------------------------------------------------------


@dataclass
class Rival:
    """Something that trains: two calls make a step."""

    name: str
    gradient: Callable[[], None]
    optimizer: torch.optim.Optimizer
    batch: int
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"gradient": [], "update": []})
    flops: float = 0.0
    peak_bytes: int = 0

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def step_s(self) -> float:
        return statistics.median(map(sum, zip(*self.seconds.values(), strict=True)))

    def median_s(self, part: str) -> float:
        return statistics.median(self.seconds[part])

    def figures(self, device: torch.device) -> dict[str, Any]:
        found = {
            "step_s": round(self.step_s, 4),
            "gradient_s": round(self.median_s("gradient"), 4),
            "update_s": round(self.median_s("update"), 4),
            "samples_per_s": round(self.batch / self.step_s, 2),
            "gflop_per_step": round(self.flops / 1e9, 1),
            "gflops_of_gradient": round(self.flops / self.median_s("gradient") / 1e9, 1),
        }
        if device.type == "cuda":
            peak = peak_tflops(device) * 1e12
            found["peak_mib"] = round(self.peak_bytes / MIB)
            found["mfu"] = round(self.flops / self.step_s / peak, 3) if peak else None
        return found


def ours(name: str, config: TrainConfig, device: torch.device, tokenizer: Tokenizer, *, trim: bool = True) -> Rival:
    """``clips train``'s own step. Without ``trim`` targets keep all their slots too, as texts do by default."""
    trainee = step.Trainee(build_model(config.model).to(device), config, tokenizer)
    optimizer = build_optimizer(trainee.model, weight_decay=WEIGHT_DECAY, beta1=BETAS[0], beta2=BETAS[1])
    set_rate(optimizer)
    batch = make_batch(config, tokenizer)

    def gradient() -> None:
        with mock.patch.object(parts, "rounded_up", parts.rounded_up if trim else lambda _: config.target_length):
            step.backward(trainee, batch, config, device, World.alone(device))

    return Rival(name, gradient, optimizer, config.batch)


def open_clips(config: TrainConfig, device: torch.device, tokenizer: Tokenizer) -> Rival:
    """open_clip's CLIP with our towers' sizes, on the images and web captions of our batch, as open_clip trains it."""
    model = open_clip.CLIP(**open_clip_config(config.model)["model_cfg"]).to(device)
    batch = make_batch(config, tokenizer)
    image_NCHW, text_NL = transforms.normalise(batch.image_NCHW.to(device)), batch.views[0].ids_NKL[:, 0].to(device)
    loss = open_clip.loss.ClipLoss()

    def gradient() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            total = loss(*model(image_NCHW, text_NL))
        total.backward()
        total.item()

    return Rival("open_clip", gradient, open_clips_optimizer(model), config.batch)


def coca(config: TrainConfig, device: torch.device, tokenizer: Tokenizer) -> Rival:
    """open_clip's CoCa with our towers' sizes: one text, the target caption, for both of its losses."""
    sizes = sizes_of(config.model)
    settings = open_clip.get_model_config("coca_ViT-B-32")
    settings.pop("custom_text")
    text = {"width": sizes.text.width, "heads": sizes.text.heads, "layers": sizes.text.layers}
    settings["embed_dim"] = sizes.embed_dim
    settings["vision_cfg"] |= {
        "image_size": config.image_px,
        "patch_size": sizes.patch_px,
        "width": sizes.image.width,
        "layers": sizes.image.layers,
        "head_width": sizes.image.width // sizes.image.heads,
    }
    settings["text_cfg"] |= text
    settings["multimodal_cfg"] |= text
    model = open_clip.CoCa(**settings).to(device)
    image_NCHW = transforms.normalise(make_batch(config, tokenizer).image_NCHW.to(device))
    texts = make_texts("target", config.batch)
    text_NL = open_clip.tokenize(texts, context_length=settings["text_cfg"]["context_length"]).to(device)
    loss = open_clip.loss.CoCaLoss(caption_loss_weight=CAPTION_WEIGHT, clip_loss_weight=1)

    def gradient() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            found = model(image_NCHW, text_NL)
            found.pop("logit_bias", None)
            total = sum(loss(**found))
        total.backward()
        total.item()

    return Rival("coca", gradient, open_clips_optimizer(model), config.batch)


def open_clips_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """As in open_clip_train's main.py."""
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            excluded = parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
            (plain if excluded else decayed).append(parameter)
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]
    return torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=1e-8)


def set_rate(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATE


# --- the race ---------------------------------------------------------------------------------------------------------


def race(rivals: Sequence[Rival], rounds: int, device: torch.device) -> None:
    """Fills in the rivals' figures. The first step of each, which counts its arithmetic, is not timed."""
    for rival in rivals:
        rival.flops = counted(rival.gradient)
        print(rival.name, f"{rival.flops / 1e9:.1f} GFLOP a step", file=sys.stderr, flush=True)
        rival.update()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rival.gradient()
        rival.update()
        if device.type == "cuda":
            rival.peak_bytes = torch.cuda.max_memory_allocated(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    for number in range(rounds):
        for rival in rivals if number % 2 == 0 else reversed(rivals):
            for part, call in (("gradient", rival.gradient), ("update", rival.update)):
                rival.seconds[part].append(timed(call, clock, device))
        print({rival.name: round(rival.step_s, 3) for rival in rivals}, file=sys.stderr, flush=True)


def timed(work: Callable[[], object], clock: Callable[[], float], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def counted(work: Callable[[], object]) -> float:
    """FLOPs of matrix products and convolutions. With plain attention, as torch counts its fused ones only in part."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def configured(size: str, options: Any, **settings: Any) -> TrainConfig:
    return TrainConfig(size=size, image_px=options.image_px, batch=options.batch, lr=RATE, **settings)


def contrastive_step(options: Any) -> dict[str, Any]:
    """The towers alone, web captions in 80 slots on both sides."""
    return {size: _contrastive_step(size, options) for size in options.sizes.split(",")}


def _contrastive_step(size: str, options: Any) -> dict[str, Any]:
    device, tokenizer = torch.device(options.device), build_tokenizer("bpe")
    config = configured(size, options, views=["web"], decoder="none", caption_weight=0)
    mine, theirs = ours("clips", config, device, tokenizer), open_clips(config, device, tokenizer)
    race([mine, theirs], options.rounds, device)
    return {
        **about(options, device),
        **{rival.name: rival.figures(device) for rival in (mine, theirs)},
        "times_open_clip": ratio(theirs.step_s, mine.step_s),
        "times_open_clip_gradient": ratio(theirs.median_s("gradient"), mine.median_s("gradient")),
        "times_open_clip_update": ratio(theirs.median_s("update"), mine.median_s("update")),
    }


def clips_step(options: Any) -> dict[str, Any]:
    """Two views and the captioner: as the reference pads, and trimmed."""
    return {size: _clips_step(size, options) for size in options.sizes.split(",")}


def _clips_step(size: str, options: Any) -> dict[str, Any]:
    device, tokenizer = torch.device(options.device), build_tokenizer("bpe")
    config = configured(size, options, caption_weight=CAPTION_WEIGHT)
    padded = ours("clips_padded", config, device, tokenizer, trim=False)
    default = ours("clips", config, device, tokenizer)
    short = config.model_copy(update={"text_padding": "trimmed"})
    trimmed = ours("clips_trimmed", short, device, tokenizer)
    plain = open_clips(config, device, tokenizer)
    peer = coca(config, device, tokenizer)
    rivals = [padded, default, trimmed, plain, peer]
    race(rivals, options.rounds, device)
    return {
        **about(options, device),
        "mean_tokens": facts(make_batch(config, tokenizer)),
        **{rival.name: rival.figures(device) for rival in rivals},
        "flops_rate_times_open_clip": {
            rival.name: ratio(rival.flops / rival.step_s, plain.flops / plain.step_s) for rival in rivals
        },
        "samples_times_padded": {rival.name: ratio(padded.step_s, rival.step_s) for rival in (default, trimmed, peer)},
    }


def profile(options: Any) -> dict[str, Any]:
    """Seconds of the operations that cost most in one step, for finding out where a figure falls short."""
    device, tokenizer, size = torch.device(options.device), build_tokenizer("bpe"), options.sizes.split(",")[0]
    config = configured(size, options, caption_weight=CAPTION_WEIGHT)
    trimmed = config.model_copy(update={"text_padding": "trimmed"})
    rivals = [
        ours("clips", config, device, tokenizer),
        ours("clips_trimmed", trimmed, device, tokenizer),
        open_clips(config, device, tokenizer),
    ]
    return {**about(options, device), **{rival.name: profiled(rival, device) for rival in rivals}}


def profiled(rival: Rival, device: torch.device) -> dict[str, float]:
    rival.gradient()
    rival.update()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        rival.gradient()
        rival.update()
    which = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    seconds = {event.key: getattr(event, which) / 1e6 for event in found.key_averages()}
    most = sorted(seconds, key=lambda name: seconds[name], reverse=True)[:NUM_PROFILED]
    return {name: round(seconds[name], 3) for name in most}


def ratio(one: float, other: float) -> float:
    return round(one / other, 3)


def about(options: Any, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"device": name, "batch": options.batch, "image_px": options.image_px, "torch": torch.__version__}


# --- memory of the captioning loss ------------------------------------------------------------------------------------

CAPTION_SLOTS, CAPTION_WIDTH = 128, 512


def caption_memory(options: Any) -> dict[str, Any]:
    """Above the inputs, at the peak of the loss and its gradient, with all slots counted: a process for each way."""
    found: dict[str, Any] = {}
    for name in LOSSES_OF_CAPTIONS:
        command = [sys.executable, __file__, name, "--batch", str(options.batch), "--device", options.device]
        found[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(name, found[name], file=sys.stderr, flush=True)
    clips, plain, products = found["chunked"], found["plain"], found["products"]
    return {
        **about(options, torch.device(options.device)),
        "slots": options.batch * CAPTION_SLOTS,
        "vocabulary": VOCAB_SIZES["bpe"],
        "width": CAPTION_WIDTH,
        **found,
        "share_of_plain_memory": ratio(clips["peak_mib"], plain["peak_mib"]),
        "times_plain": ratio(plain["seconds"], clips["seconds"]),
        "share_of_products_rate": ratio(products["seconds"], clips["seconds"]),
    }


def measured_captions(options: Any) -> dict[str, Any]:
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    num_slots, num_tokens = options.batch * CAPTION_SLOTS, VOCAB_SIZES["bpe"]
    states = torch.randn(options.batch, CAPTION_SLOTS, CAPTION_WIDTH, generator=generator).to(device).requires_grad_()
    head = torch.randn(num_tokens, CAPTION_WIDTH, generator=generator).mul_(CAPTION_WIDTH**-0.5)
    head = head.to(device).requires_grad_()
    labels = torch.randint(0, num_tokens, (options.batch, CAPTION_SLOTS), generator=generator).to(device)
    compute = LOSSES_OF_CAPTIONS[options.what]

    def work(rows: slice) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            compute(states[rows], head, labels[rows])
        states.grad = head.grad = None

    work(slice(0, 1))  # libraries set themselves up
    before = used_bytes(device, reset=True)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = timed(partial(work, slice(None)), clock, device)
    peak_bytes = used_bytes(device, reset=False) - before
    flops = 6 * num_slots * num_tokens * CAPTION_WIDTH
    return {
        "peak_mib": round(peak_bytes / MIB),
        "seconds": round(seconds, 3),
        "gflops": round(flops / seconds / 1e9, 1),
    }


def used_bytes(device: torch.device, *, reset: bool) -> int:
    """The peak since the last reset; on a reset what is used now. Of this process alone: ``getrusage`` would begin with
    the peak of the process that started it."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS" if reset else "VmHWM"].split()[0]) * 1024


def clips_captions(states: Tensor, head: Tensor, labels: Tensor) -> None:
    caption_loss(states, head, labels, torch.ones_like(labels, dtype=torch.bool)).backward()


def plain_captions(states: Tensor, head: Tensor, labels: Tensor) -> None:
    """All logits at once, as open_clip's CoCa computes them."""
    functional.cross_entropy((states @ head.T).flatten(0, 1), labels.flatten()).backward()


def products_alone(states: Tensor, head: Tensor, labels: Tensor) -> None:
    """The three products that no captioning loss can do without, in bf16, with no loss."""
    weight = head.detach().bfloat16()
    for part in states.detach().flatten(0, 1).bfloat16().split(1024):
        logits = part @ weight.T
        logits @ weight
        logits.T @ part


LOSSES_OF_CAPTIONS: Mapping[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "chunked": clips_captions,
    "plain": plain_captions,
    "products": products_alone,
}
BENCHES: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "step": contrastive_step,
    "clips": clips_step,
    "memory": caption_memory,
    "profile": profile,
}

if __name__ == "__main__":
    main()
