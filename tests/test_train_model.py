from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import goldens
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clips_data.errors import UserError
from clips_train import model as model_room
from clips_train import transforms
from clips_train.blocks import Block
from clips_train.config import ModelConfig
from clips_train.decoder import CaptionDecoder
from clips_train.losses import caption_loss, clips_contrastive_loss
from clips_train.model import ClipsModel, build_model, sincos_positions
from clips_train.texts import trim
from clips_train.tokenizer import build_tokenizer
from clips_train.towers import SIZES, open_clip_config, tower_config

SMALL = ModelConfig(size="tiny", image_px=48, target_length=8)
TEXTS = ["a red circle left of a blue square", "", "Wow! It's &amp; more", "many words " * 60]


@pytest.fixture(scope="module")
def small() -> ClipsModel:
    return build_model(SMALL).eval()


def _towers(model_cfg: dict) -> open_clip.CLIP:
    """The reference's switches come from our own config, its sizes from the golden file."""
    ours = tower_config(ModelConfig())
    image, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    head_width = image.get("head_width") or image["width"] // image["heads"]
    sizes = {name: image[name] for name in ("image_size", "patch_size", "width", "layers")} | {"head_width": head_width}
    text_sizes = {name: text[name] for name in ("context_length", "vocab_size", "width", "heads", "layers")}
    return open_clip.CLIP(
        embed_dim=model_cfg["embed_dim"],
        vision_cfg=ours["vision_cfg"] | sizes,
        text_cfg=ours["text_cfg"] | text_sizes,
    )


def test_tower_features_are_the_references() -> None:
    golden = goldens.tensors("towers_p14")
    towers = _towers(goldens.about("towers_p14")["config"]["model_cfg"])
    towers.load_state_dict(goldens.towers_state(goldens.under(golden, "param.")))
    model = ClipsModel(towers, None)
    image_BE, patch_tokens = model.encode_image(golden["input.images"])
    text_BE, token_states = model.encode_text(golden["input.texts"])
    raw_image, raw_text = towers.encode_image(golden["input.images"]), towers.encode_text(golden["input.texts"])
    found = {
        "output.image_features": raw_image,
        "output.text_features": raw_text,
        "output.image_features_normalized": image_BE,
        "output.text_features_normalized": text_BE,
    }
    for name, ours in found.items():
        goldens.assert_meets("towers_p14", ours, golden[name], name)
    assert patch_tokens.shape == (4, 16, 64)
    assert token_states.shape == (4, 79, 48)


def _golden_step() -> tuple[ClipsModel, dict[str, Tensor]]:
    golden, config = goldens.tensors("step_n4"), goldens.about("step_n4")["config"]
    towers, sizes = _towers(config), config["decoder_cfg"]
    towers.load_state_dict(goldens.towers_state(goldens.under(golden, "param.towers.")))
    decoder = CaptionDecoder(
        width=sizes["width"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        num_queries=sizes["queries"],
        vocab_size=config["text_cfg"]["vocab_size"],
        image_width=config["vision_cfg"]["width"],
        text_width=config["text_cfg"]["width"],
    )
    decoder.load_state_dict(goldens.decoder_state(goldens.under(golden, "param.decoder."), sizes["layers"]))
    return ClipsModel(towers, decoder), golden


def test_a_whole_step_gives_the_references_losses_and_every_gradient() -> None:
    model, golden = _golden_step()
    assert model.decoder is not None
    image_BE, patch_tokens = model.encode_image(golden["input.images"])
    texts = torch.cat([golden["input.web_texts"], golden["input.short_texts"]])
    (text_BE, token_states), count = model.encode_text(texts), len(image_BE)
    states = model.caption_states(patch_tokens, token_states[:count])
    web_BE, short_BE = text_BE[:count], text_BE[count:]
    contrast = clips_contrastive_loss(image_BE, web_BE, short_BE, model.logit_scale.exp())
    caption = caption_loss(
        states, model.decoder.head.weight, golden["input.labels"], golden["input.label_mask"], chunk=9
    )
    total = contrast + 2 * caption
    total.backward()
    found = {
        "output.image_features_normalized": image_BE,
        "output.web_text_features_normalized": web_BE,
        "output.short_text_features_normalized": short_BE,
        "output.caption_logits": model.decoder.head(states),
        "output.contrastive_loss": contrast,
        "output.caption_loss": caption,
        "output.total_loss": total,
    }
    for name, ours in found.items():
        goldens.assert_meets("step_n4", ours, golden[name], name)
    wanted = goldens.under(golden, "grad.towers.")
    decoder = goldens.decoder_state(goldens.under(golden, "grad.decoder."), layers=2)
    wanted = {f"towers.{name}": grad for name, grad in wanted.items()}
    wanted |= {f"decoder.{name}": grad for name, grad in decoder.items()}
    parameters = dict(model.named_parameters())
    assert set(wanted) == set(parameters) - {"towers.visual.positional_embedding"}
    for name, grad in wanted.items():
        ours = parameters[name].grad
        assert ours is not None, name
        goldens.assert_meets("step_n4", ours, grad, name)


def test_the_position_table_is_the_references() -> None:
    goldens.assert_meets("posembed", sincos_positions(4, 64), goldens.tensors("posembed")["sincos2d.4x4.width64"])
    large = goldens.about("posembed")["large"]
    table = sincos_positions(large["grid"][0], large["width"])
    assert list(table.shape) == large["shape"]
    assert table.double().sum().item() == pytest.approx(large["sum"], rel=1e-6)
    for sample in large["samples"]:
        assert table[sample["row"], sample["column"]].item() == pytest.approx(sample["value"], abs=2e-6)


def test_the_table_is_fixed_and_made_for_each_resolution(small: ClipsModel) -> None:
    positions = small.towers.visual.positional_embedding
    assert not positions.requires_grad
    assert torch.equal(positions, sincos_positions(3, 128))
    larger = build_model(SMALL.model_copy(update={"image_px": 96, "decoder": "none"}))
    assert torch.equal(larger.towers.visual.positional_embedding, sincos_positions(6, 128))
    learned = build_model(SMALL.model_copy(update={"pos_embed": "learned", "decoder": "none"}))
    assert learned.towers.visual.positional_embedding.requires_grad


def _assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def _batch(generator_seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(generator_seed)
    return torch.randn(4, 3, 48, 48, generator=generator), build_tokenizer("bpe").text_ids(TEXTS, 80)


def _export(model: ClipsModel, config: ModelConfig, folder: Path) -> str:
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(config)))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.towers.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    return f"local-dir:{folder}"


def test_stock_open_clip_loads_the_config_and_gives_the_same_features_and_ids(
    small: ClipsModel, tmp_path: Path
) -> None:
    name = _export(small, SMALL, tmp_path)
    stock, preprocess = open_clip.create_model_from_pretrained(name, return_transform=True)
    images, ids = _batch()
    assert torch.equal(open_clip.get_tokenizer(name)(TEXTS), ids)
    with torch.no_grad():
        _assert_close(small.encode_image(images)[0], stock.eval().encode_image(images, normalize=True))
        _assert_close(small.encode_text(ids)[0], stock.encode_text(ids, normalize=True))
    steps = {type(step).__name__: step for step in preprocess.transforms}
    assert steps["Resize"].size == (48, 48)  # both sides: squashed, not cropped
    assert steps["Resize"].interpolation.value == "bilinear"
    assert tuple(steps["Normalize"].mean) == transforms.IMAGE_MEAN
    assert tuple(steps["Normalize"].std) == transforms.IMAGE_STD


NARROW = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
SHORT = {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 2, "layers": 3}
CLIPA_IMAGE = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
KINDS: dict[str, dict[str, Any]] = {
    "ViT-B-32": {"vision_cfg": NARROW, "text_cfg": SHORT},
    "quickgelu": {"vision_cfg": NARROW, "text_cfg": SHORT, "quick_gelu": True},
    "layer scale": {"vision_cfg": NARROW | {"ls_init_value": 0.1}, "text_cfg": SHORT | {"ls_init_value": 0.1}},
    "CLIPA": {
        "vision_cfg": NARROW | CLIPA_IMAGE,
        "text_cfg": SHORT | {"pool_type": "last", "no_causal_mask": True},
    },
    "worldwide": {"vision_cfg": NARROW, "text_cfg": SHORT | {"pool_type": "eos", "eos_id": 2}},
    "first": {
        "vision_cfg": NARROW | {"pool_type": "avg"},
        "text_cfg": SHORT | {"pool_type": "first", "no_causal_mask": True, "proj_bias": True},
    },
    "SigLIP": {
        "vision_cfg": NARROW | {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
        "text_cfg": SHORT | {"pool_type": "last", "no_causal_mask": True},
        "init_logit_bias": -10,
    },
}


def _of_kind(kind: str) -> tuple[ClipsModel, open_clip.CLIP]:
    """Random towers of that kind, as ours and as stock open_clip has them."""
    torch.manual_seed(5)
    stock = open_clip.CLIP(embed_dim=16, **KINDS[kind]).eval()
    for parameter in stock.parameters():
        parameter.data.normal_(std=0.2)
    return ClipsModel(copy.deepcopy(stock), None).eval(), stock


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_open_clips_own_kinds_of_towers_are_stock_ones(kind: str) -> None:
    ours, stock = _of_kind(kind)
    assert all(type(block) is Block for block in ours.towers.transformer.resblocks)
    images, ids = torch.randn(3, 3, 32, 32), torch.randint(3, 60, (5, 12))
    ids[:, 7] = 2  # the end token of "eos"
    with torch.no_grad():
        _assert_close(ours.encode_image(images)[0], stock.encode_image(images, normalize=True))
        _assert_close(ours.encode_text(ids)[0], stock.encode_text(ids, normalize=True))
        _assert_close(ours.towers.encode_text(ids), stock.encode_text(ids))  # as export and score call it
        states = stock.forward_intermediates(text=ids, text_indices=1)["text_intermediates"][0]
        torch.testing.assert_close(ours.encode_text(ids)[1], states[:, :-1], rtol=1e-5, atol=1e-5)
    assert ours.encode_image(images)[1].shape == (3, 16, 32)


def _texts_of_lengths(lengths: list[int]) -> Tensor:
    """Ids of 12 slots in which 59 ends the text and 0 pads it."""
    ids = torch.randint(3, 59, (len(lengths), 12), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        ids[row, length - 1] = 59
        ids[row, length:] = 0
    return ids


@pytest.mark.parametrize("kind", ["CLIPA", "ViT-B-32"])
@torch.no_grad()
def test_trimmed_texts_are_whole_ones_with_their_padding_masked(kind: str) -> None:
    model, _ = _of_kind(kind)
    ids = _texts_of_lengths([3, 6, 5])
    keep_last = kind == "CLIPA"
    short, mask, positions = trim(ids, 59, keep_last=keep_last)
    assert short.shape == (3, 8)
    whole_mask = torch.arange(12) < torch.tensor([[3], [6], [5]])
    whole_mask[:, -1] |= keep_last
    features, states = model.encode_text(short, mask, positions)
    whole_features, whole_states = model.encode_text(ids, whole_mask)
    _assert_close(features, whole_features)
    used = whole_mask[:, :7]
    torch.testing.assert_close(states[:, :7][used], whole_states[:, :7][used], rtol=1e-5, atol=1e-5)
    changed = torch.where(whole_mask, ids, 7)  # what is masked is never read
    if keep_last:
        _assert_close(model.encode_text(changed, whole_mask)[0], whole_features)
        assert (model.encode_text(changed)[0] - model.encode_text(ids)[0]).abs().max() > 1e-3


@torch.no_grad()
def test_a_mask_keeps_a_causal_tower_causal() -> None:
    model, _ = _of_kind("ViT-B-32")
    ids = _texts_of_lengths([12, 12])
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 4] = False
    later, masked = ids.clone(), ids.clone()
    later[:, 8], masked[:, 4] = 5, 5
    before = model.encode_text(ids, mask)[1]
    assert ((model.encode_text(later, mask)[1] - before).abs().amax(dim=(0, 2)) > 1e-6).tolist() == [
        slot >= 8 for slot in range(11)
    ]
    assert ((model.encode_text(masked, mask)[1] - before).abs().amax(dim=(0, 2)) > 1e-6).tolist() == [
        slot == 4 for slot in range(11)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_gradient_of_the_towers(small: ClipsModel, dtype: torch.dtype) -> None:
    images, ids = _batch()
    mask = torch.ones(4, 80, dtype=torch.bool)

    def gradients(enabled: bool) -> list[Tensor | None]:
        small.set_gradient_checkpointing(enabled)
        small.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            (image, tokens), (text, states) = small.encode_image(images), small.encode_text(ids, mask)
            total = (image * text).sum() + small.caption_states(tokens, states).square().mean()
        total.backward()
        return [parameter.grad for parameter in small.parameters()]

    wanted, found = gradients(False), gradients(True)
    small.set_gradient_checkpointing(False)
    assert sum(grad is not None for grad in wanted) > 40
    torch.testing.assert_close(found, wanted)


def test_the_towers_compile_to_one_graph_each(small: ClipsModel) -> None:
    images, ids = _batch()
    mask = ids != 0
    mask[:, -1] = True
    for name, inputs in (("encode_image", (images,)), ("encode_text", (ids, mask, torch.arange(80)))):
        torch.compiler.reset()
        plain = getattr(small, name)
        compiled = torch.compile(plain, fullgraph=True, backend="eager")
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(compiled(*inputs), plain(*inputs))


NAMED = {"size": "ViT-S-32-alt", "image_px": 64, "context_length": 77, "target_length": 8, "pos_embed": "learned"}


def test_a_size_of_open_clip_has_its_towers_and_a_captioner_as_large_as_its_text_tower() -> None:
    config = ModelConfig(**NAMED)
    made = build_model(config)
    with torch.device("meta"):
        stock = open_clip.create_model("ViT-S-32-alt", load_weights=False, force_image_size=64, device="meta")
    shapes = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    assert {name: tensor.shape for name, tensor in made.towers.state_dict().items()} == shapes
    assert made.decoder is not None
    assert len(made.decoder.transformer.resblocks) == 10
    assert made.decoder.head.weight.shape == (49408, 256)
    assert all(parameter.isfinite().all() for parameter in made.parameters())
    assert made.encode_image(torch.zeros(1, 3, 64, 64))[1].shape == (1, 4, 384)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": "ViT-B-23"}, "nor the name of an open_clip .* model. Did you mean 'ViT-B-32'"),
        ({"size": "B-16"}, "Did you mean 'B/16'"),
        ({"size": "hf-hub:org/model"}, "neither one of tiny"),
        ({"size": "RN50"}, "its image tower is a ResNet"),
        ({"size": "convnext_base"}, "its image tower is convnext_base of timm"),
        ({"size": "ViT-B-16-SigLIP"}, "it keeps its text tower apart"),
        ({"size": "roberta-ViT-B-32"}, "its text tower is roberta-base from Hugging Face"),
        ({"size": "coca_ViT-B-32"}, "it has a captioner of its own"),
        ({"size": "ViT-L-14-CLIPA"}, "its tokenizer is bert-base-uncased with 32,000 entries"),
        ({"size": "ViT-B-32", "context_length": 80}, "texts of 77 slots.* Set context_length to 77"),
        ({"size": "ViT-B-32", "image_px": 80}, "not a multiple of the 32 px patch"),
        ({"size": "ViT-B-32", "tokenizer": "bert", "bert_vocab": "vocab.txt"}, "set tokenizer to bpe"),
    ],
)
def test_sizes_that_cannot_be_trained_are_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(ModelConfig(**NAMED | changes))


def test_the_sigmoid_loss_starts_from_its_own_scale_and_bias(small: ClipsModel, tmp_path: Path) -> None:
    assert small.logit_bias is None
    made = build_model(SMALL, sigmoid=True)
    assert made.logit_bias is not None
    assert (made.logit_bias.item(), made.logit_scale.exp().item()) == (-10, pytest.approx(10))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(open_clip_config(SMALL, sigmoid=True)))
    save_file(
        {name: tensor.contiguous() for name, tensor in made.towers.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    stock, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    assert stock.logit_bias.item() == -10


def test_the_captioner_is_what_the_config_says() -> None:
    forced = build_model(SMALL.model_copy(update={"decoder": "teacher_forced", "fusion": "cross_attention"})).decoder
    alone = build_model(SMALL.model_copy(update={"condition": None})).decoder
    assert forced is not None and alone is not None
    assert (forced.mode, forced.fusion, len(forced.transformer.resblocks)) == ("teacher_forced", "cross_attention", 2)
    assert alone.text_projection is None
    assert build_model(SMALL.model_copy(update={"decoder": "none"})).decoder is None


def test_decoder_tokens_come_from_before_the_final_norms(small: ClipsModel) -> None:
    images, ids = _batch()
    towers = small.towers
    with torch.no_grad():
        patch_tokens, token_states = small.encode_image(images)[1], small.encode_text(ids)[1]
        pooled = towers.visual.ln_post(patch_tokens.mean(dim=1)) @ towers.visual.proj
        torch.testing.assert_close(pooled, towers.encode_image(images))
        stock = towers.forward_intermediates(text=ids, text_indices=1)["text_intermediates"][0]
    assert patch_tokens.shape == (4, 9, 128)
    torch.testing.assert_close(token_states, stock[:, :-1])


def test_a_text_is_read_in_both_directions_and_pooled_at_its_last_slot(small: ClipsModel) -> None:
    _, ids = _batch()
    later = ids.clone()
    later[0, 6] = 1000
    with torch.no_grad():
        (features, states), (moved, moved_states) = small.encode_text(ids), small.encode_text(later)
    assert (states[0, 1] - moved_states[0, 1]).abs().max() > 1e-5
    assert (features[0] - moved[0]).abs().max() > 1e-5
    torch.testing.assert_close(features[1:], moved[1:])


@pytest.mark.parametrize(
    ("size", "image_m", "text_m", "decoder_m", "image_heads", "text_heads"),
    [
        ("S/16", 21.8, 33.8, 33.9, 6, 6),
        ("B/16", 86.2, 54.5, 54.9, 12, 8),
        ("L/16", 304.0, 110.3, 111.1, 16, 12),
        ("L/14", 304.0, 110.3, 111.1, 16, 12),
        ("H/14", 632.1, 336.2, 337.6, 16, 16),
    ],
)
def test_sizes_have_the_papers_numbers_of_parameters_and_heads(
    size: str, image_m: float, text_m: float, decoder_m: float, image_heads: int, text_heads: int
) -> None:
    config = ModelConfig(size=size, tokenizer="bert", bert_vocab="vocab.txt")
    row = SIZES[size]
    with torch.device("meta"):
        towers = open_clip.CLIP(**tower_config(config))
        decoder = CaptionDecoder(
            width=row.decoder.width,
            layers=row.decoder.layers,
            heads=row.decoder.heads,
            num_queries=128,
            vocab_size=32_000,
            image_width=row.image.width,
            text_width=row.text.width,
        )
    count = {"visual": 0, "text": 0}
    for name, parameter in towers.named_parameters():
        count["visual" if name.startswith("visual.") else "text"] += parameter.numel()
    assert count["visual"] / 1e6 == pytest.approx(image_m, rel=0.005)
    assert count["text"] / 1e6 == pytest.approx(text_m, rel=0.005)
    assert sum(p.numel() for p in decoder.parameters()) / 1e6 == pytest.approx(decoder_m, rel=0.005)
    for tower, heads in ((towers.visual, image_heads), (towers, text_heads), (decoder, text_heads)):
        assert tower.transformer.resblocks[0].attn.num_heads == heads


def test_image_gelu_is_exact_and_the_others_are_tanh(small: ClipsModel) -> None:
    assert small.decoder is not None
    approximations = {
        name: {module.approximate for module in tower.modules() if isinstance(module, nn.GELU)}
        for name, tower in (
            ("image", small.towers.visual),
            ("text", small.towers.transformer),
            ("decoder", small.decoder),
        )
    }
    assert approximations == {"image": {"none"}, "text": {"tanh"}, "decoder": {"tanh"}}
    assert {module.eps for module in small.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_bert_config_selects_the_clips_layout() -> None:
    config = ModelConfig(tokenizer="bert", bert_vocab="vocab.txt")
    text = open_clip_config(config)["model_cfg"]["text_cfg"]
    assert (text["tokenizer_mode"], text["vocab_size"], text["context_length"]) == ("clips", 32_000, 80)
    assert open_clip_config(ModelConfig())["model_cfg"]["text_cfg"]["vocab_size"] == 49_408


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = build_model(SMALL, seed=4).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second, other = build_model(SMALL, seed=4).state_dict(), build_model(SMALL, seed=5).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["decoder.head.weight"], other["decoder.head.weight"])


def test_initial_values_have_the_measured_spread() -> None:
    small = build_model(ModelConfig(size="S/16", image_px=32, target_length=8))
    visual, text, decoder = small.towers.visual, small.towers.transformer, small.decoder
    assert decoder is not None
    spread = {
        visual.class_embedding: 1e-6,
        visual.transformer.resblocks[3].attn.in_proj_weight: 0.02,
        visual.transformer.resblocks[3].mlp.c_fc.weight: 0.02,
        visual.transformer.resblocks[3].mlp.c_proj.weight: (0.3072 / 384) ** 0.5,
        text.resblocks[1].attn.in_proj_weight: 384**-0.5,
        text.resblocks[1].attn.out_proj.weight: 384**-0.5 / 24**0.5,
        text.resblocks[1].mlp.c_proj.weight: 384**-0.5 / 24**0.5,
        small.towers.token_embedding.weight: 0.02,
        small.towers.positional_embedding: 0.01,
        decoder.queries: 1.0,
        decoder.transformer.resblocks[0].mlp.c_proj.weight: 384**-0.5 / 24**0.5,
    }
    forced = CaptionDecoder(
        width=128, layers=2, heads=4, num_queries=64, vocab_size=4000, image_width=128, text_width=128,
        mode="teacher_forced", fusion="cross_attention",
    )  # fmt: skip
    model_room._initialise_decoder(forced, torch.Generator().manual_seed(0))
    crossing = forced.transformer.resblocks[1]
    spread |= {
        forced.token_embedding.weight: 0.02,
        forced.positional_embedding: 0.01,
        crossing.attn.in_proj_weight: 128**-0.5,
        crossing.attn.out_proj.weight: 128**-0.5 / 24**0.5,
    }
    for parameter, std in spread.items():
        tolerance = 4 / (2 * parameter.numel()) ** 0.5  # four standard errors of a standard deviation
        assert parameter.std().item() == pytest.approx(std, rel=tolerance)
    assert small.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert not any(p.any() for name, p in small.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("decoder", ["queries", "teacher_forced"])
@pytest.mark.parametrize("fusion", ["concat", "cross_attention"])
def test_initialisation_reaches_every_parameter(decoder: str, fusion: str) -> None:
    changes = {"pos_embed": "learned", "decoder": decoder, "fusion": fusion}
    made = build_model(SMALL.model_copy(update=changes), sigmoid=True)
    for parameter in made.parameters():
        parameter.data.fill_(float("nan"))
    model_room.initialise(made, torch.Generator().manual_seed(0))
    assert [name for name, parameter in made.named_parameters() if not parameter.isfinite().all()] == []


def test_bf16_trains_every_parameter(small: ClipsModel) -> None:
    images, ids = _batch()
    labels, mask = build_tokenizer("bpe").targets(TEXTS, 8)
    assert small.decoder is not None
    small.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        image_BE, patch_tokens = small.encode_image(images)
        text_BE, token_states = small.encode_text(ids)
        states = small.caption_states(patch_tokens, token_states)
        loss = clips_contrastive_loss(image_BE, text_BE, text_BE.flip(0), small.logit_scale.exp())
        loss = loss + 2 * caption_loss(states, small.decoder.head.weight, labels, mask)
    loss.backward()
    assert image_BE.dtype == text_BE.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(image_BE.norm(dim=-1), torch.ones(4))
    missing = [n for n, p in small.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert missing == []
    with torch.no_grad():
        exact = small.encode_image(images)[0]
    torch.testing.assert_close(image_BE, exact, rtol=0.05, atol=0.02)


def test_an_image_size_that_patches_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of the 14 px patch"):
        ModelConfig(size="L/14", image_px=96)
    with pytest.raises(ValueError, match="bert_vocab"):
        ModelConfig(tokenizer="bert")
