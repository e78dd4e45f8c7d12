"""Trains the small CLIP that ``clips score`` uses in the demo: an open_clip ``local-dir`` of 2.2 M parameters.

    python -m clips_data.demo.scorer --captioner weights/captioner --out weights/clip

The image tower starts from the captioner's, which knows the scenes already; text tower and projections learn to match
pictures with true texts about them: short captions, single sentences and whole descriptions. The tokenizer is the
captioner's, because the field's own vocabularies alone would take more than the 5 MB that the package may carry.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from clips_data import ledger
from clips_data.demo import captioner, scenes

if TYPE_CHECKING:
    import numpy as np

WEIGHTS: Final = "open_clip_model.safetensors"

CONTEXT_LENGTH = 96
EMBED_DIM = 128
SCORER_WORLD = 7003  # its first scenes, never trained on, measure the result
_SAY_NOTHING: Final = ("untitled", "nice picture", "image may contain: art", "thumbnail")
_FILE_NAME: Final = re.compile(r"IMG_\d{4}\.JPG")


def open_clip_config(vocab_size: int) -> dict[str, Any]:
    """What stock open_clip's ``local-dir:`` reads."""
    return {
        "model_cfg": {
            "embed_dim": EMBED_DIM,
            "vision_cfg": {
                "image_size": captioner.IMAGE_PX, "patch_size": captioner.PATCH_PX, "width": captioner.WIDTH,
                "layers": 6, "head_width": 32, "pool_type": "avg", "final_ln_after_pool": True,
            },
            "text_cfg": {
                "context_length": CONTEXT_LENGTH, "vocab_size": vocab_size, "width": captioner.WIDTH,
                "heads": 4, "layers": 4,
                "hf_tokenizer_name": "demo", "no_causal_mask": True, "pool_type": "first",
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "squash",
        },
    }  # fmt: skip


def true_texts(scene: scenes.Scene) -> list[str]:
    """All true texts about a scene that the model should match with it."""
    whole = scenes.describe(scene)
    return [
        whole,
        *[sentence.strip() + "." for sentence in whole.split(".") if sentence.strip()],
        *scenes.five_captions(scene),
    ]


def train(
    captioner_dir: Path,
    out: Path,
    start: Path | None,
    num_scenes: int,
    steps: int,
    web_steps: int,
    batch: int,
    seed: int,
    num_processes: int,
) -> None:
    """Two phases: true texts alone, then as many web captions beside them, noise and all, as real CLIPs learn from."""
    import open_clip
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(captioner_dir)
    config = open_clip_config(len(tokenizer))
    model: Any = open_clip.CLIP(**config["model_cfg"])
    if start is None:
        llava = load_file(captioner_dir / "model.safetensors")
        model.visual.load_state_dict(image_tower_weights(llava), strict=False)
    else:
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(start / WEIGHTS).items()})
    images, _ = captioner.render_pool(num_scenes, num_processes)
    worlds = [scenes.make_scene(captioner.TRAIN_WORLD, i) for i in range(num_scenes)]
    true = [true_texts(scene) for scene in worlds]
    if start is None:
        fit(model, tokenizer, images, true, num_steps=steps, peak=1e-3, batch=batch, seed=seed)
    both = [[*texts, *[scenes.web_caption(scene)] * len(texts)] for texts, scene in zip(true, worlds, strict=True)]
    fit(model, tokenizer, images, both, num_steps=web_steps, peak=5e-4, batch=batch, seed=seed + 1)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    ledger.write_json(out / "open_clip_config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(captioner_dir / name, out / name)
    measured = measure(out)
    ledger.write_json(out / "measured.json", measured)
    captioner.say(json.dumps(measured))


def fit(
    model: Any,
    tokenizer: Any,
    images: np.ndarray,
    texts: list[list[str]],
    *,
    num_steps: int,
    peak: float,
    batch: int,
    seed: int,
) -> None:
    """CLIP's loss over ``num_steps`` batches of pictures (uint8 [N, H, W, 3]), each with one of its texts."""
    import numpy as np
    import torch
    from torch.nn import functional

    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    rng, chooser, started = np.random.default_rng(seed), random.Random(seed), time.monotonic()
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        rows = rng.choice(len(images), batch, replace=False)
        pixels_BCHW = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float().sub(127.5).div(127.5)
        ids_BL = text_ids(tokenizer, [chooser.choice(texts[i]) for i in rows])
        with torch.autocast("cpu", torch.bfloat16):
            image_BE, text_BE = (
                model.encode_image(pixels_BCHW, normalize=True),
                model.encode_text(ids_BL, normalize=True),
            )
        logits_BB = model.logit_scale.exp() * image_BE.float() @ text_BE.float().T
        target = torch.arange(batch)
        loss = (functional.cross_entropy(logits_BB, target) + functional.cross_entropy(logits_BB.T, target)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if (step + 1) % 25 == 0:
            captioner.say(f"scorer {step + 1}/{num_steps} loss {loss.item():.3f} {time.monotonic() - started:.0f} s")


def image_tower_weights(llava: dict[str, Any]) -> dict[str, Any]:
    """The captioner's vision tower under open_clip's names."""
    import torch

    prefix = "vision_tower.vision_model."
    tower = {name.removeprefix(prefix): tensor.float() for name, tensor in llava.items() if name.startswith(prefix)}
    renamed = {
        "class_embedding": tower["embeddings.class_embedding"],
        "conv1.weight": tower["embeddings.patch_embedding.weight"],
        "positional_embedding": tower["embeddings.position_embedding.weight"],
        "ln_pre.weight": tower["pre_layrnorm.weight"],
        "ln_pre.bias": tower["pre_layrnorm.bias"],
    }
    for layer in range(6):
        old, new = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            renamed[f"{new}attn.in_proj_{kind}"] = torch.cat([tower[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"])
            renamed[f"{new}attn.out_proj.{kind}"] = tower[f"{old}self_attn.out_proj.{kind}"]
            renamed[f"{new}ln_1.{kind}"] = tower[f"{old}layer_norm1.{kind}"]
            renamed[f"{new}ln_2.{kind}"] = tower[f"{old}layer_norm2.{kind}"]
            renamed[f"{new}mlp.c_fc.{kind}"] = tower[f"{old}mlp.fc1.{kind}"]
            renamed[f"{new}mlp.c_proj.{kind}"] = tower[f"{old}mlp.fc2.{kind}"]
    return renamed


def text_ids(tokenizer: Any, texts: list[str]) -> Any:
    """As open_clip's HFTokenizer: int64 [N, CONTEXT_LENGTH], the first id is ``<s>``."""
    encoded = tokenizer(texts, return_tensors="pt", max_length=CONTEXT_LENGTH, padding="max_length", truncation=True)
    return encoded["input_ids"]


def kind_of_web_caption(scene: scenes.Scene, caption: str) -> Literal["right", "wrong", "vague"]:
    """Whether a scene's web caption says something of it, is the caption of another page, or says nothing.

    Another page's caption that happens to be true of this scene is right.
    """
    if caption.strip() in _SAY_NOTHING or _FILE_NAME.fullmatch(caption.strip()):
        return "vague"
    first, second, *_ = scenes.make_scene(scene.seed + 1, scene.index).objects
    if caption.strip() != f"{first.colour} {first.shape} and {second.colour} {second.shape}":
        return "right"
    seen = {(thing.colour, thing.shape) for thing in scene.objects}
    return "right" if {(first.colour, first.shape), (second.colour, second.shape)} <= seen else "wrong"


def roc_auc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """The chance that one of ``higher`` scores above one of ``lower``; ties count half."""
    import numpy as np

    ordered = np.sort(np.asarray(lower))
    below = np.searchsorted(ordered, higher, side="left") + np.searchsorted(ordered, higher, side="right")
    return float(below.mean() / 2 / len(ordered))


def measure(folder: Path, num_scenes: int = 500, num_web: int = 2000) -> dict[str, float]:
    """On unseen scenes, the model loaded by stock open_clip: R@1 by short caption and description, and ROC-AUC of right
    web captions against wrong ones."""
    import open_clip
    import torch

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    unseen = [scenes.make_scene(SCORER_WORLD, i) for i in range(num_web)]
    with torch.inference_mode():

        def in_batches(encode: Callable[[Any], Any], items: Sequence[Any]) -> Any:
            return torch.cat([encode(items[first : first + 250]) for first in range(0, len(items), 250)])

        def image_features(some: Sequence[scenes.Scene]) -> Any:
            pixels = torch.stack([preprocess(scenes.draw_scene(scene)) for scene in some])
            return model.encode_image(pixels, normalize=True)

        def text_features(texts: Sequence[str]) -> Any:
            return in_batches(lambda some: model.encode_text(tokenize(some), normalize=True), texts)

        image_NE = in_batches(image_features, unseen)

        measured = {"num_scenes": float(num_scenes), "num_web_captions": float(num_web)}
        for name, texts in (
            ("short", [scenes.five_captions(scene)[0] for scene in unseen[:num_scenes]]),
            ("description", [scenes.describe(scene) for scene in unseen[:num_scenes]]),
        ):
            right = (text_features(texts) @ image_NE[:num_scenes].T).argmax(1) == torch.arange(num_scenes)
            measured[f"{name}_text_to_image_r1"] = round(right.float().mean().item(), 4)
        captions = [scenes.web_caption(scene) for scene in unseen]
        cosines = (text_features(captions) * image_NE).sum(1).tolist()
    of_kind: dict[str, list[float]] = {"right": [], "wrong": [], "vague": []}
    for scene, caption, cosine in zip(unseen, captions, cosines, strict=True):
        of_kind[kind_of_web_caption(scene, caption)].append(cosine)
    measured["web_right_wrong_auc"] = round(roc_auc(of_kind["right"], of_kind["wrong"]), 4)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--captioner", type=Path, required=True, dest="captioner_dir", help="folder of the captioner's weights"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-scenes", type=int, default=40_000)
    parser.add_argument("--start", type=Path, help="a scorer that has had the first phase, to go on from")
    parser.add_argument("--steps", type=int, default=400, help="of the first phase, on true texts")
    parser.add_argument("--web-steps", type=int, default=300, help="of the second, on true texts and web captions")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-processes", type=int, default=2)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
