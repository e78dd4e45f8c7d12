"""Towers in architectures of transformers that compute exactly the same, and a LLaVA whose eyes they are.

The paper's image tower is a BEiT: no norm before the blocks, a class token, the mean over the patches and the norm
behind it. BEiT has no bias of keys, and needs none: it adds the same to all logits of a query, which softmax takes out.
The projection to the features is BEiT's classifier, with a bias of zeros. No text tower of transformers pools the last
slot of a text whose padding is attended to, so the text tower is left out. Plain CLIP towers are a ``CLIPModel``, both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clips_train.export_check import Loaded, Output
from clips_train.export_open_clip import plain
from clips_train.export_towers import Towers, Transformer

MODEL = "model.safetensors"
LLAVA_LAYER = -2
"""The layer that LLaVA reads: the last but one, as in LLaVA 1.5."""
LLAVA_VOCABULARY, LLAVA_IMAGE_TOKEN = 32064, 32000
"""Of LLaVA 1.5's language model, whose sizes the configuration states until its user puts another one in."""
BILINEAR, BICUBIC = 2, 3
"""Pillow's numbers, as ``resample``."""
ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
BEIT_NAMES = {
    "ln_1": "layernorm_before", "ln_2": "layernorm_after", "attn.out_proj": "attention.o_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
CLIP_NAMES = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip


def why_not(towers: Towers) -> str | None:
    """Why no architecture of transformers computes the same, as the end of a sentence."""
    odd = towers.why_image_is_odd()
    if odd or _is_beit(towers):
        return odd
    if towers.visual.pool_type != "tok" or not towers.has_pre_norm:
        return "transformers has no image tower with its choice of norms and pooling"
    text = towers.model.towers
    if towers.image.has_layer_scale or towers.text.has_layer_scale:
        return "transformers' CLIP has no layer scale"
    if text.attn_mask is None or text.text_pool_type != "argmax":
        return "its text tower is not causal, as transformers' CLIP is"
    if towers.model.logit_bias is not None:
        return "transformers' CLIP has no place for the bias that the sigmoid loss learnt"
    return towers.text.why_odd("text")


def is_whole(towers: Towers) -> bool:
    """Whether the export has both towers."""
    return not _is_beit(towers)


def _is_beit(towers: Towers) -> bool:
    return towers.visual.pool_type == "avg" and towers.norms_after_pooling and not towers.has_pre_norm


def write(towers: Towers, folder: Path) -> None:
    folder.mkdir(parents=True)
    config, weights = (_beit_config, _beit_weights) if _is_beit(towers) else (_clip_config, _clip_weights)
    with quietly():
        config(towers).save_pretrained(folder)
        _image_processor(towers).save_pretrained(folder)
    save_file(plain(weights(towers)), folder / MODEL, metadata={"format": "pt"})


def write_llava(towers: Towers, folder: Path) -> None:
    """A configuration alone; the weights of its vision tower are those of the folder beside it."""
    from transformers import LlamaConfig, LlavaConfig

    vision = _beit_config(towers) if _is_beit(towers) else _clip_config(towers).vision_config
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=LLAVA_VOCABULARY),
        image_token_index=LLAVA_IMAGE_TOKEN,
        image_seq_length=towers.num_patches,
        vision_feature_layer=LLAVA_LAYER,
        vision_feature_select_strategy="default",
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(folder)


def _image_processor(towers: Towers) -> Any:
    from transformers import BeitImageProcessor, CLIPImageProcessor

    side, preprocess = towers.image_px, towers.preprocess
    squash = preprocess["resize_mode"] == "squash"
    settings: dict[str, Any] = {
        "do_resize": True,
        "size": {"height": side, "width": side} if squash else {"shortest_edge": side},
        "do_center_crop": not squash,
        "crop_size": {"height": side, "width": side},
        "resample": {"bilinear": BILINEAR, "bicubic": BICUBIC}[preprocess["interpolation"]],
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }
    return BeitImageProcessor(**settings) if _is_beit(towers) else CLIPImageProcessor(**settings)


# --- the paper's image tower ------------------------------------------------------------------------------------------


def _beit_config(towers: Towers) -> Any:
    from transformers import BeitConfig

    settings: dict[str, Any] = {
        **_sizes(towers.image),
        "architectures": ["BeitForImageClassification"],
        "image_size": towers.image_px,
        "patch_size": towers.patch_px,
        "num_labels": towers.embed_dim,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
        "layer_scale_init_value": float(towers.image.has_layer_scale),
        "drop_path_rate": 0.0,
    }
    return BeitConfig(**settings)


def _sizes(tower: Transformer) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "intermediate_size": tower.mlp_width,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }


def _beit_weights(towers: Towers) -> dict[str, Tensor]:
    visual = towers.visual
    weights = {
        "beit.embeddings.cls_token": visual.class_embedding[None, None],
        "beit.embeddings.position_embeddings": visual.positional_embedding[None],
        "beit.embeddings.patch_embeddings.projection.weight": visual.conv1.weight,
        "beit.embeddings.patch_embeddings.projection.bias": torch.zeros(towers.image.width),
        "beit.pooler.layernorm.weight": visual.ln_post.weight,
        "beit.pooler.layernorm.bias": visual.ln_post.bias,
        "classifier.weight": visual.proj.T,
        "classifier.bias": torch.zeros(towers.embed_dim),
    }
    for number, block in enumerate(towers.image.block_weights()):
        under = f"beit.layers.{number}."
        weights |= _block(block, under, BEIT_NAMES, "attention")
        del weights[f"{under}attention.k_proj.bias"]
        if towers.image.has_layer_scale:
            weights |= {f"{under}lambda_{which}": block[f"ls_{which}.gamma"] for which in (1, 2)}
    return weights


def _block(block: dict[str, Tensor], under: str, names: dict[str, str], attention: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        weights |= {f"{under}{theirs}.{kind}": block[f"{ours}.{kind}"] for ours, theirs in names.items()}
        parts = block[f"attn.in_proj_{kind}"].chunk(3)
        weights |= {f"{under}{attention}.{part}_proj.{kind}": tensor for part, tensor in zip("qkv", parts, strict=True)}
    return weights


# --- plain CLIP towers ------------------------------------------------------------------------------------------------


def _clip_config(towers: Towers) -> Any:
    from transformers import CLIPConfig

    vision = {**_sizes(towers.image), "image_size": towers.image_px, "patch_size": towers.patch_px}
    text = {
        **_sizes(towers.text),
        "vocab_size": towers.vocab_size,
        "max_position_embeddings": towers.context_length,
        "eos_token_id": 2,  # which transformers takes for: pool the slot with the largest id, as open_clip does
    }
    return CLIPConfig(
        vision_config={**vision, "projection_dim": towers.embed_dim},
        text_config={**text, "projection_dim": towers.embed_dim},
        projection_dim=towers.embed_dim,
        architectures=["CLIPModel"],
    )


def _clip_weights(towers: Towers) -> dict[str, Tensor]:
    visual, text = towers.visual, towers.model.towers
    text_projection = text.text_projection
    weights = {
        "logit_scale": towers.model.logit_scale,
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "visual_projection.weight": visual.proj.T,
        "text_model.embeddings.token_embedding.weight": text.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": text.positional_embedding,
        "text_projection.weight": text_projection.weight
        if isinstance(text_projection, nn.Module)
        else text_projection.T,
    }
    norms = {
        "vision_model.pre_layrnorm": visual.ln_pre,  # transformers spells it so
        "vision_model.post_layernorm": visual.ln_post,
        "text_model.final_layer_norm": text.ln_final,
    }
    for name, norm in norms.items():
        weights |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    for tower, under in ((towers.image, "vision_model"), (towers.text, "text_model")):
        for number, block in enumerate(tower.block_weights()):
            weights |= _block(block, f"{under}.encoder.layers.{number}.", CLIP_NAMES, "self_attn")
    return weights


# --- loading ----------------------------------------------------------------------------------------------------------


def load(folder: Path, towers: Towers) -> Loaded:
    from transformers import AutoImageProcessor

    with quietly() as transformers:
        model = transformers.AutoModel.from_pretrained(folder).eval()
        # Resizes with Pillow, as training did; torchvision's resizing, the default, differs by a level of 255.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        if _is_beit(towers):
            classifier = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
            outputs = [
                Output("pooled", "pixels", lambda image: model(image).pooler_output, towers.pooled),
                Output("image features", "pixels", lambda image: classifier(image).logits, _image_features(towers)),
            ]
        else:
            outputs = [
                Output("image features", "pixels", _pooler(model.get_image_features), _image_features(towers)),
                Output("text features", "ids", _pooler(model.get_text_features), _text_features(towers)),
            ]
    return Loaded(outputs=outputs, pixels=lambda picture: processor(picture, return_tensors="pt")["pixel_values"][0])


def _image_features(towers: Towers) -> Any:
    return lambda image_NCHW: towers.model.encode_image(image_NCHW)[0]


def _text_features(towers: Towers) -> Any:
    return lambda ids_NL: towers.model.encode_text(ids_NL)[0]


def _pooler(get_features: Any) -> Any:
    return lambda inputs: get_features(inputs).pooler_output


def load_llava(folder: Path, beside: Path, towers: Towers) -> Loaded:
    """LLaVA's own choice of states, with a language model of the smallest sizes in place of the one to be put in."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(folder)
    config.text_config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    with quietly(), torch.random.fork_rng(devices=[]):
        llava: Any = LlavaForConditionalGeneration(config).eval()
        put_vision_tower(llava, beside)
    llava.model.multi_modal_projector = nn.Identity()  # what the projector would be given

    def states(image_NCHW: Tensor) -> Tensor:
        found = llava.get_image_features(
            pixel_values=image_NCHW,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return torch.stack(list(found.pooler_output))

    ours = Output("patch states", "pixels", states, lambda image: towers.patch_states(image, LLAVA_LAYER))
    return Loaded(outputs=(ours,))


def put_vision_tower(llava: Any, folder: Path) -> None:
    """The weights of an export's ``transformers`` folder become those of a LLaVA's vision tower."""
    from transformers import AutoModel

    with quietly():
        model: Any = AutoModel.from_pretrained(folder)
    tower = getattr(model, "vision_model", model)
    llava.model.vision_tower.load_state_dict(tower.state_dict())


@contextlib.contextmanager
def quietly() -> Iterator[Any]:
    """transformers without its talk, or ``None`` where it is not installed."""
    try:
        import transformers
    except ImportError:
        yield None
        return
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
