"""The image tower as a ``VisionTransformer`` of timm, in the layout of its hub; transformers wraps it as well.

What the paper's tower needs is there: the mean over the patches without the class token, and the final norm behind it
(``fc_norm``). The projection to the features is the classifier, with a bias of zeros.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from clips_train.export_check import Loaded, Output
from clips_train.export_open_clip import plain
from clips_train.export_towers import Towers
from clips_train.export_transformers import quietly

MODEL, MODEL_CONFIG = "model.safetensors", "config.json"
ARCHITECTURES = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch32_clip_224"}
"""By the epsilon of their norms, the one choice of timm's that a configuration cannot state. Sizes are stated."""
CROP_MODES = {"squash": "squash", "shortest": "center", "longest": "border"}
NAMES = {
    "ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


def why_not(towers: Towers) -> str | None:
    """Why timm has no such tower, as the end of a sentence."""
    if towers.image.norm_eps not in ARCHITECTURES:
        return f"its norms have an epsilon of {towers.image.norm_eps:g}, which timm's configurations cannot state"
    return towers.why_image_is_odd()


def write(towers: Towers, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / MODEL_CONFIG).write_text(json.dumps(_config(towers), indent=2, sort_keys=True) + "\n")
    save_file(plain(_weights(towers)), folder / MODEL, metadata={"format": "pt"})  # transformers wants to be told


def _config(towers: Towers) -> dict[str, Any]:
    image, pool = towers.image, {"avg": "avg", "tok": "token"}[towers.visual.pool_type]
    args: dict[str, Any] = {
        "img_size": towers.image_px,
        "patch_size": towers.patch_px,
        "embed_dim": image.width,
        "depth": image.layers,
        "num_heads": image.heads,
        "mlp_ratio": image.mlp_width / image.width,
        "act_layer": image.activation,
        "class_token": True,
        "global_pool": pool,
        "fc_norm": pool == "avg" and towers.norms_after_pooling,
        "pre_norm": towers.has_pre_norm,
    }
    if image.has_layer_scale:
        args["init_values"] = 1.0  # that there are scales; their values are among the weights
    preprocess = towers.preprocess
    return {
        "architecture": ARCHITECTURES[image.norm_eps],
        "num_classes": towers.embed_dim,
        "num_features": image.width,
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, towers.image_px, towers.image_px],
            "fixed_input_size": True,
            "interpolation": preprocess["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": CROP_MODES[preprocess["resize_mode"]],
            "mean": list(preprocess["mean"]),
            "std": list(preprocess["std"]),
            "num_classes": towers.embed_dim,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _weights(towers: Towers) -> dict[str, Tensor]:
    visual = towers.visual
    final_norm = "fc_norm" if visual.pool_type == "avg" and towers.norms_after_pooling else "norm"
    weights = {
        "cls_token": visual.class_embedding[None, None],
        "pos_embed": visual.positional_embedding[None],
        "patch_embed.proj.weight": visual.conv1.weight,
        f"{final_norm}.weight": visual.ln_post.weight,
        f"{final_norm}.bias": visual.ln_post.bias,
        "head.weight": visual.proj.T,
        "head.bias": torch.zeros(towers.embed_dim),
    }
    if towers.has_pre_norm:
        weights |= {"norm_pre.weight": visual.ln_pre.weight, "norm_pre.bias": visual.ln_pre.bias}
    else:
        weights["patch_embed.proj.bias"] = torch.zeros(towers.image.width)
    for number, block in enumerate(towers.image.block_weights()):
        under = f"blocks.{number}."
        for kind in ("weight", "bias"):
            weights[f"{under}attn.qkv.{kind}"] = block[f"attn.in_proj_{kind}"]
            weights |= {f"{under}{theirs}.{kind}": block[f"{ours}.{kind}"] for ours, theirs in NAMES.items()}
        if towers.image.has_layer_scale:
            weights |= {f"{under}ls{which}.gamma": block[f"ls_{which}.gamma"] for which in (1, 2)}
    return weights


def load(folder: Path, towers: Towers) -> Loaded:
    """By timm, and by transformers' wrapper of timm where transformers is there."""
    import timm

    data: Any = timm.data
    model: Any = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True).eval()
    transform = data.create_transform(**data.resolve_model_data_config(model), is_training=False)
    outputs = [
        Output("image features", "pixels", model, lambda image: towers.model.encode_image(image)[0]),
        Output("pooled", "pixels", lambda x: model.forward_head(model.forward_features(x), True), towers.pooled),
    ]
    with quietly() as transformers:
        if transformers is not None:
            wrapped = transformers.AutoModel.from_pretrained(folder).eval()
            outputs.append(Output("pooled (AutoModel)", "pixels", lambda x: wrapped(x).pooler_output, towers.pooled))
    return Loaded(outputs=outputs, pixels=transform)
