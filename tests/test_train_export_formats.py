"""Each format, loaded by its own library, computes what the towers compute; what cannot be expressed is said."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.nn import functional

from clips_data.errors import UserError
from clips_train import export as export_module
from clips_train import export_open_clip, export_timm, export_transformers
from clips_train.export_check import Inputs, compare, inputs_of, rows, worst
from clips_train.export_towers import Towers
from clips_train.model import ClipsModel

EXACT = 1e-5
"""What float32 leaves between two orders of the same sums."""
PREPROCESS = {
    "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bilinear", "resize_mode": "squash",
}  # fmt: skip
VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
GAP = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "norm_kwargs": {"eps": 1e-6}}
TEXT = {"context_length": 12, "vocab_size": 300, "width": 48, "heads": 3, "layers": 2}


def towers_of(vision: dict[str, Any], text: dict[str, Any] | None = None, **others: Any) -> Towers:
    """Random towers, of which every parameter counts: norms and biases are no ones and zeros."""
    torch.set_num_threads(1)
    config = {"embed_dim": 32, "vision_cfg": {**VISION, **vision}, "text_cfg": {**TEXT, **(text or {})}, **others}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ClipsModel(open_clip.CLIP(**copy.deepcopy(config)), None).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return Towers(model, {"model_cfg": config, "preprocess_cfg": PREPROCESS})


def inputs_for(towers: Towers) -> Inputs:
    noise = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
    ids_NL = torch.randint(1, towers.vocab_size, (2, towers.context_length), generator=torch.Generator().manual_seed(1))
    return inputs_of(towers, [Image.fromarray(one) for one in noise], ["a", "b"], ids_NL, 3)


def test_golden_towers_go_to_every_format_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("timm", "transformers", "onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    golden, config = goldens.tensors("towers_p14"), goldens.about("towers_p14")["config"]
    stock = open_clip.CLIP(**copy.deepcopy(config["model_cfg"]))
    stock.load_state_dict(goldens.towers_state(goldens.under(golden, "param.")))
    towers = Towers(ClipsModel(stock, None).eval(), config)
    folders = {name: tmp_path / name for name in ("open_clip", *export_module.FORMATS)}
    folders["open_clip"].mkdir()
    export_open_clip.write(towers, folders["open_clip"])
    loaded = {"open_clip": export_open_clip.load(folders["open_clip"], towers, tokenizer=False)}
    for name, kind in export_module.FORMATS.items():
        assert kind.why_not(towers) is None
        kind.write(towers, folders[name])
        loaded[name] = kind.load(folders[name], towers)
    given = {"pixels": golden["input.images"], "ids": golden["input.texts"]}
    wanted = {
        name: golden[f"output.{name.replace(' ', '_')}_normalized"] for name in ("image features", "text features")
    }
    table = {}
    with torch.inference_mode():
        for name, export in loaded.items():
            for output in export.outputs:
                if output.name in wanted:
                    features = functional.normalize(output.theirs(given[output.reads]), dim=-1)
                    goldens.assert_meets("towers_p14", features, wanted[output.name], f"{name} {output.name}")
                    table[name, output.name] = float((features - wanted[output.name]).abs().max())
    with capsys.disabled():
        print("\n\nlargest difference from the golden features, at unit length")
        for (name, what), value in table.items():
            print(f"  {name:<13} {what:<15} {value:.1e}")
    assert len(table) == 6  # two towers of open_clip and onnx, the image tower of the two others
    assert max(table.values()) <= EXACT


@pytest.mark.parametrize(
    ("vision", "others"),
    [
        (GAP, {}),
        (GAP | {"ls_init_value": 0.1}, {}),
        (GAP | {"mlp_ratio": 4.5, "norm_kwargs": {"eps": 1e-5}}, {"quick_gelu": True}),
        (GAP | {"act_kwargs": {"approximate": "tanh"}}, {}),
        (GAP | {"final_ln_after_pool": False}, {}),
        ({}, {}),
        ({"mlp_ratio": 5.0}, {"quick_gelu": True}),
        ({"ls_init_value": 0.1}, {}),
    ],
)
def test_all_plain_towers_are_timms_and_wrapped_by_transformers(
    vision: dict[str, Any], others: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    towers = towers_of(vision, **others)
    assert export_timm.why_not(towers) is None
    export_timm.write(towers, tmp_path / "a folder, été #1")
    found = compare("timm", export_timm.load(tmp_path / "a folder, été #1", towers), inputs_for(towers))
    assert list(found) == ["image features", "pooled", "pooled (AutoModel)"]
    assert worst(found) <= EXACT


@pytest.mark.parametrize(
    ("vision", "others", "outputs"),
    [
        (GAP, {}, ["pooled", "image features"]),
        (
            GAP | {"ls_init_value": 0.1, "norm_kwargs": {"eps": 1e-5}},
            {"quick_gelu": True},
            ["pooled", "image features"],
        ),
        ({}, {}, ["image features", "text features"]),
        ({"mlp_ratio": 5.0, "norm_kwargs": {"eps": 1e-6}}, {"quick_gelu": True}, ["image features", "text features"]),
    ],
)
def test_towers_are_an_exact_architecture_of_transformers_and_the_eyes_of_a_llava(
    vision: dict[str, Any], others: dict[str, Any], outputs: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    towers = towers_of(vision, **others)
    differences, left_out = export_module.write_and_compare(towers, ["transformers"], tmp_path, inputs_for(towers))
    assert not left_out
    assert list(differences["transformers"]) == outputs and list(differences["llava"]) == ["patch states"]
    assert all(worst(found) <= EXACT for found in differences.values())
    llava = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert (llava["vision_feature_layer"], llava["image_seq_length"]) == (-2, 4)


def test_a_llava_with_our_eyes_generates(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    towers = towers_of(GAP)
    export_transformers.write(towers, tmp_path / "transformers")
    export_transformers.write_llava(towers, tmp_path / "llava")
    config = transformers.LlavaConfig.from_pretrained(tmp_path / "llava")
    config.text_config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    config.image_token_index = 63
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llava = transformers.LlavaForConditionalGeneration(config).eval()
    export_transformers.put_vision_tower(llava, tmp_path / "transformers")
    ids = torch.tensor([[1, *[63] * config.image_seq_length, 5]])
    one, other = inputs_for(towers).pixels_NCHW[:1], inputs_for(towers).pixels_NCHW[1:]
    with torch.inference_mode():
        logits = [llava(input_ids=ids, pixel_values=pixels).logits[0, -1] for pixels in (one, one, other)]
    assert torch.equal(logits[0], logits[1]) and not torch.allclose(logits[0], logits[2])


@pytest.mark.parametrize(
    ("vision", "text", "others", "reason"),
    [
        (GAP | {"final_ln_after_pool": False}, {}, {}, "choice of norms and pooling"),
        ({"ls_init_value": 0.1}, {}, {}, "no layer scale"),
        ({}, {"no_causal_mask": True, "pool_type": "last"}, {}, "not causal"),
        ({}, {}, {"init_logit_bias": -10.0}, "bias that the sigmoid loss learnt"),
        ({"attentional_pool": True}, {}, {}, "pools by attention"),
        ({"qk_norm": True}, {}, {}, "open_clip's"),
    ],
)
def test_what_transformers_cannot_express_is_left_out_with_the_reason(
    vision: dict[str, Any], text: dict[str, Any], others: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    towers = towers_of(vision, text, **others)
    differences, left_out = export_module.write_and_compare(towers, ["transformers"], tmp_path, None)  # type: ignore[arg-type]
    assert not differences and not any(tmp_path.iterdir())
    assert reason in left_out["transformers"] and left_out["transformers"].endswith(".")


def test_an_epsilon_that_timm_cannot_state_is_left_out_with_the_reason() -> None:
    assert "1e-07" in str(export_timm.why_not(towers_of(GAP | {"norm_kwargs": {"eps": 1e-7}})))


def test_a_format_that_computes_otherwise_is_seen(tmp_path: Path) -> None:
    towers = towers_of(GAP)
    export_timm.write(towers, tmp_path / "timm")
    path = tmp_path / "timm" / "config.json"
    about = json.loads(path.read_text())
    for change in ({"act_layer": "gelu_tanh"}, {"num_heads": 4}):
        path.write_text(json.dumps({**about, "model_args": {**about["model_args"], **change}}))
        assert worst(compare("timm", export_timm.load(tmp_path / "timm", towers), inputs_for(towers))) > EXACT
    about["pretrained_cfg"]["crop_mode"] = "center"
    path.write_text(json.dumps(about))
    found = compare("timm", export_timm.load(tmp_path / "timm", towers), inputs_for(towers))
    assert found["image features"]["random"] <= EXACT < found["image features"]["real"]  # its own preprocessing counts


def test_not_a_number_is_a_difference() -> None:
    found = {"image features": {"random": 0.0, "real": float("nan")}}
    assert not worst(found) <= 1.0
    assert rows({"timm": {"pooled": {"random": 0.5, "real": 0.25}}}) == [("timm", "pooled", 0.5, 0.25)]


def test_missing_packages_are_named_with_the_line_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    absent = ("onnxruntime", "transformers")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    export_module.check_installed("open_clip")
    with pytest.raises(UserError, match=r"onnxruntime, which is not installed. Run: pip install 'clips\[onnx\]'"):
        export_module.check_installed("onnx")
    with pytest.raises(UserError, match=r"transformers, which is not installed. Run: pip install 'clips\[train\]'"):
        export_module.check_installed("transformers")
