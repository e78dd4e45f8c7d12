"""The golden numbers of the reference implementations, and how their parameters are named in ours.

``tests/golden/*.safetensors`` hold tensors, the ``.json`` beside each says what they are and how close ours must come.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
BERT_VOCAB = Path(__file__).parents[2] / "shared" / "golden" / "bert-vocab.txt"
"""Not part of the repository; tests that need it are skipped where it is absent."""


def about(name: str) -> dict[str, Any]:
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def cases(name: str) -> list[dict[str, Any]]:
    return list(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


def tensors(name: str) -> dict[str, Tensor]:
    return dict(load_file(FOLDER / f"{name}.safetensors"))


def assert_meets(name: str, ours: Tensor, golden: Tensor, what: str = "") -> None:
    """Within the tolerance that the golden file itself states."""
    tolerance = about(name)["tolerance"]
    difference = (ours.detach().float().reshape(golden.shape) - golden).abs()
    excess = (difference - tolerance["atol"] - tolerance["rtol"] * golden.abs()).max().item()
    assert excess <= 0, f"{name} {what}: {excess:.2e} beyond the tolerance"


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def towers_state(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference stores its logit scale with one dimension, open_clip without."""
    return golden | {"logit_scale": golden["logit_scale"].reshape(())}


def decoder_state(flax: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Flax paths, kernels [in, out] and separate q, k, v, as the state_dict of ``CaptionDecoder``."""
    state = {
        "queries": flax["learnable_tokens"],
        "image_projection.weight": flax["image_projection_layer.kernel"].T,
        "text_projection.weight": flax["text_projection_layer.kernel"].T,
        "ln_final.weight": flax["decoder_norm.scale"],
        "ln_final.bias": flax["decoder_norm.bias"],
        "head.weight": flax["head.kernel"].T,
    }
    for layer in range(layers):
        block = under(flax, f"Transformer.encoderblock_{layer}.")
        attention = under(block, "MultiHeadDotProductAttention_0.")
        ours = {
            "attn.in_proj_weight": torch.cat([attention[f"{name}.kernel"].T for name in ("query", "key", "value")]),
            "attn.in_proj_bias": torch.cat([attention[f"{name}.bias"] for name in ("query", "key", "value")]),
            "attn.out_proj.weight": attention["out.kernel"].T,
            "attn.out_proj.bias": attention["out.bias"],
        }
        for number, (norm, linear) in enumerate((("ln_1", "mlp.c_fc"), ("ln_2", "mlp.c_proj"))):
            ours[f"{norm}.weight"] = block[f"LayerNorm_{number}.scale"]
            ours[f"{norm}.bias"] = block[f"LayerNorm_{number}.bias"]
            ours[f"{linear}.weight"] = block[f"MlpBlock_0.Dense_{number}.kernel"].T
            ours[f"{linear}.bias"] = block[f"MlpBlock_0.Dense_{number}.bias"]
        state |= {f"transformer.resblocks.{layer}.{name}": tensor for name, tensor in ours.items()}
    return state
