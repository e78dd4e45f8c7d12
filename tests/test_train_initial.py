from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed
from safetensors.torch import save_file
from torch import Tensor

from clips_data.errors import UserError
from clips_data.schema import SCHEMA_VERSION
from clips_train import checkpoint, export_decoder, export_open_clip
from clips_train.config import TrainConfig
from clips_train.initial import start_from
from clips_train.model import ClipsModel, build_model, sincos_positions
from clips_train.towers import open_clip_config

CONFIG = TrainConfig(size="tiny", image_px=48, context_length=16, target_length=8, pos_embed="learned")


def _changed(**changes: Any) -> TrainConfig:
    return TrainConfig(**CONFIG.model_dump(exclude_unset=True) | changes)


def _built(config: TrainConfig, seed: int) -> ClipsModel:
    return build_model(config.model, seed=seed, sigmoid=config.contrastive == "sigmoid")


@pytest.fixture(scope="module")
def source() -> ClipsModel:
    return _built(CONFIG, seed=1)


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}


def _run(folder: Path, model: ClipsModel, config: TrainConfig = CONFIG) -> Path:
    """A checkpoint as training leaves it, without what a start does not read."""
    made = checkpoint.folder_of(folder, 4)
    made.mkdir(parents=True)
    save_file(_weights(model), made / checkpoint.WEIGHTS)
    about = {"schema_version": SCHEMA_VERSION, "progress": {}, "config": config.model_dump(mode="json")}
    (made / checkpoint.ABOUT).write_text(json.dumps(about))
    (folder / checkpoint.CHECKPOINTS / checkpoint.LATEST).write_text(made.name)
    return folder


def _export(folder: Path, model: ClipsModel, *, decoder: bool = True, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(_weights(model.towers), folder / export_open_clip.MODEL)
    (folder / export_open_clip.MODEL_CONFIG).write_text(json.dumps(config or open_clip_config(CONFIG)))
    if decoder:
        assert model.decoder is not None
        save_file(_weights(model.decoder), folder / export_decoder.DECODER)
    return folder


def _started(config: TrainConfig, source: Path | str) -> tuple[ClipsModel, list[str]]:
    model = _built(config, seed=2)
    return model, start_from(model, config, str(source))


def _assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    wanted = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_a_run_its_checkpoint_and_an_export_give_all_their_weights(source: ClipsModel, tmp_path: Path) -> None:
    run = _run(tmp_path / "run", source)
    exported = _export(tmp_path / "export", source)
    for place in (
        run,
        checkpoint.find(run),
        exported,
        f"local-dir:{exported}",
        checkpoint.find(run) / "model.safetensors",
    ):
        model, lines = _started(CONFIG, place)
        _assert_same(model, source)
        assert lines == [f"starting from {str(place).removeprefix('local-dir:')}"] or place == run


def test_the_moving_average_is_what_a_run_is_started_from(source: ClipsModel, tmp_path: Path) -> None:
    run = _run(tmp_path, _built(CONFIG, seed=7))
    save_file(_weights(source), checkpoint.find(run) / checkpoint.AVERAGED)
    _assert_same(_started(CONFIG, run)[0], source)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_a_file_of_open_clips_names_gives_the_towers(
    source: ClipsModel, tmp_path: Path, suffix: str, prefix: str
) -> None:
    tensors = {prefix + name: tensor for name, tensor in _weights(source.towers).items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        wrapped = {"epoch": 3, "state_dict": tensors} if prefix else tensors
        torch.save(wrapped, path, _use_new_zipfile_serialization=suffix != ".bin")
    fresh = _built(CONFIG, seed=2)
    model, lines = _started(CONFIG, path)
    _assert_same(model.towers, source.towers)
    assert model.decoder is not None and fresh.decoder is not None
    _assert_same(model.decoder, fresh.decoder)
    assert lines[1:] == ["captioner: starts afresh, the weights have none"]


def test_half_precision_a_one_dimensional_scale_and_a_text_prefix_are_taken(source: ClipsModel, tmp_path: Path) -> None:
    tensors = {}
    for name, tensor in _weights(source.towers).items():
        of_text = not name.startswith(("visual.", "logit_"))
        tensors[f"text.{name}" if of_text else name] = tensor.half().reshape(tensor.shape or (1,))
    save_file(tensors, tmp_path / "weights.safetensors")
    model, _ = _started(CONFIG, tmp_path / "weights.safetensors")
    assert model.logit_scale.shape == ()
    for name, tensor in model.towers.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, source.towers.state_dict()[name].half().float()), name


# --- what is adapted --------------------------------------------------------------------------------------------------


def test_learned_image_positions_are_interpolated_as_open_clip_does_it(source: ClipsModel, tmp_path: Path) -> None:
    config = _changed(image_px=80)
    model, lines = _started(config, _run(tmp_path, source))
    wanted = {"visual.positional_embedding": source.towers.visual.positional_embedding.detach().clone()}
    resize_pos_embed(wanted, model.towers)
    found = model.towers.visual.positional_embedding
    torch.testing.assert_close(found.detach(), wanted["visual.positional_embedding"])
    assert torch.equal(found[0], source.towers.visual.positional_embedding[0])
    assert "image positions: 3 x 3 became 5 x 5, interpolated" in lines


def test_a_fixed_table_is_computed_anew_for_another_resolution(tmp_path: Path) -> None:
    small = _changed(pos_embed="sincos")
    made = _built(small, seed=1)
    save_file({name: tensor.bfloat16() for name, tensor in _weights(made).items()}, tmp_path / "weights.safetensors")
    model, lines = _started(_changed(pos_embed="sincos", image_px=96), tmp_path / "weights.safetensors")
    assert torch.equal(model.towers.visual.positional_embedding, sincos_positions(6, 128))
    assert not model.towers.visual.positional_embedding.requires_grad
    assert "image positions: 3 x 3 became 6 x 6, computed anew" in lines
    same, _ = _started(small, tmp_path / "weights.safetensors")
    assert torch.equal(same.towers.visual.positional_embedding, sincos_positions(3, 128))  # not what bf16 left of it


def test_learned_positions_are_not_thrown_away_for_the_table(source: ClipsModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Set pos_embed to learned"):
        _started(_changed(pos_embed="sincos"), _run(tmp_path, source))


@pytest.mark.parametrize(("length", "how"), [(10, "cut"), (24, "interpolated")])
def test_text_positions_follow_the_context_and_the_pooled_slot_keeps_its_own(
    source: ClipsModel, tmp_path: Path, length: int, how: str
) -> None:
    model, lines = _started(_changed(context_length=length), _run(tmp_path, source))
    old, new = source.towers.positional_embedding.detach(), model.towers.positional_embedding.detach()
    assert f"text positions: 16 became {length}, {how}" in lines
    assert torch.equal(new[-1], old[-1])
    if how == "cut":
        assert torch.equal(new[:-1], old[: length - 1])
    else:
        body = torch.nn.functional.interpolate(old[:-1].T[None], size=length - 1, mode="linear")[0].T
        torch.testing.assert_close(new[:-1], body)


@pytest.mark.parametrize(("decoder", "name"), [("queries", "queries"), ("teacher_forced", "positional_embedding")])
@pytest.mark.parametrize("length", [5, 12])
def test_target_slots_are_cut_or_go_on_with_fresh_ones(tmp_path: Path, decoder: str, name: str, length: int) -> None:
    old_config, new_config = _changed(decoder=decoder), _changed(decoder=decoder, target_length=length)
    made = _built(old_config, seed=1)
    model, lines = _started(new_config, _run(tmp_path, made, old_config))
    fresh = _built(new_config, seed=2)
    old, new, unused = (getattr(some.decoder, name) for some in (made, model, fresh))
    kept = min(8, length)
    assert torch.equal(new[:kept], old[:kept])
    assert torch.equal(new[kept:], unused[kept:])
    assert f"target slots: 8 became {length}, {'cut' if length < 8 else 'new ones start afresh'}" in lines


def test_another_kind_of_captioner_takes_what_means_the_same(source: ClipsModel, tmp_path: Path) -> None:
    run = _run(tmp_path, source)
    model, lines = _started(_changed(decoder="teacher_forced", condition=None), run)
    assert model.decoder is not None and source.decoder is not None
    assert torch.equal(model.decoder.head.weight, source.decoder.head.weight)
    assert "captioner: decoder.positional_embedding, decoder.token_embedding.weight starts afresh" in lines
    assert "captioner: decoder.queries, decoder.text_projection.weight left out" in lines
    crossing, lines = _started(_changed(fusion="cross_attention"), run)
    assert lines[1:] == ["captioner: starts afresh, that of the weights has fusion concat"]
    without, lines = _started(_changed(decoder="none", caption_weight=0), run)
    assert lines[1:] == ["captioner: left out, this run has none"]
    _assert_same(without.towers, source.towers)
    _assert_same(crossing.towers, source.towers)


def test_the_sigmoid_losss_scale_and_bias_belong_together(source: ClipsModel, tmp_path: Path) -> None:
    sigmoid = _changed(contrastive="sigmoid")
    model, lines = _started(sigmoid, _run(tmp_path / "softmax", source))
    assert model.logit_bias is not None
    assert (model.logit_bias.item(), model.logit_scale.exp().item()) == (-10, pytest.approx(10))
    assert any("both start as for the sigmoid loss" in line for line in lines)
    made = _built(sigmoid, seed=1)
    assert made.logit_bias is not None
    made.logit_bias.data.fill_(-12)
    run = _run(tmp_path / "sigmoid", made, sigmoid)
    again = _started(sigmoid, run)[0]
    assert again.logit_bias is not None and again.logit_bias.item() == -12
    back, lines = _started(CONFIG, run)
    assert back.logit_bias is None and "logit bias: left out, the softmax loss has none" in lines


def test_another_use_of_equal_weights_is_told(source: ClipsModel, tmp_path: Path) -> None:
    about: dict[str, Any] = open_clip_config(CONFIG)
    about["model_cfg"] |= {"quick_gelu": True}
    del about["model_cfg"]["text_cfg"]["no_causal_mask"]
    about["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    _, lines = _started(CONFIG, _export(tmp_path, source, config=about))
    assert lines[1:] == [
        "note: quick_gelu was True for the weights, and is False here",
        "note: text_cfg.no_causal_mask was False for the weights, and is True here",
        "note: images had mean (0.5, 0.5, 0.5) for the weights, and have (0.485, 0.456, 0.406) here",
    ]
    _, lines = _started(_changed(text_padding="trimmed"), _run(tmp_path / "run", source))
    assert lines[1:] == ["note: text_padding was reference for the weights, and is trimmed here"]


# --- what does not fit ------------------------------------------------------------------------------------------------


def _file(tmp_path: Path, **shapes: tuple[int, ...]) -> Path:
    """Towers of other shapes, with no more weights than what tells them apart."""
    names = {"patch": "visual.conv1.weight", "proj": "visual.proj", "tokens": "token_embedding.weight"}
    found = {"patch": (128, 3, 16, 16), "proj": (128, 128), "tokens": (49408, 128)} | shapes
    tensors = {names.get(name, name): torch.zeros(shape, dtype=torch.uint8) for name, shape in found.items()}
    for block in range(2):
        tensors[f"visual.transformer.resblocks.{block}.ln_1.weight"] = torch.ones(128)
    tensors["transformer.resblocks.0.ln_1.weight"] = torch.ones(128)
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"patch": (256, 3, 16, 16)}, "image width is 256 in the weights and 128 in the model"),
        ({"patch": (128, 3, 14, 14)}, "patch side in pixels is 14 in the weights and 16"),
        ({"tokens": (32000, 128)}, "vocabulary is 32,000 .* size tiny and the tokenizer bert"),
        ({"visual.transformer.resblocks.2.ln_1.weight": (128,)}, "image blocks is 3 in the weights and 2"),
    ],
)
def test_other_shapes_are_refused_with_both_sides(tmp_path: Path, shapes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _started(CONFIG, _file(tmp_path, **shapes))


def test_weights_that_the_model_has_no_place_for_are_refused(source: ClipsModel, tmp_path: Path) -> None:
    tensors = _weights(source.towers)
    save_file(tensors | {"visual.ln_pre.weight": torch.ones(128)}, tmp_path / "more.safetensors")
    with pytest.raises(
        UserError, match=r"visual.ln_pre.weight is \[128\] in the weights and nothing in the model\. Set"
    ):
        _started(CONFIG, tmp_path / "more.safetensors")
    del tensors["ln_final.bias"], tensors["logit_scale"]
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"ln_final.bias is nothing in the weights .*; towers.logit_scale is missing"):
        _started(CONFIG, tmp_path / "less.safetensors")


def test_the_remedy_names_the_size_of_the_weights(tmp_path: Path) -> None:
    like_b = {
        "visual.conv1.weight": (768, 3, 16, 16),
        "visual.proj": (768, 512),
        "token_embedding.weight": (49408, 512),
    }
    tensors = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in like_b.items()}
    for block in range(12):
        tensors[f"visual.transformer.resblocks.{block}.ln_1.weight"] = torch.ones(768)
        tensors[f"transformer.resblocks.{block}.ln_1.weight"] = torch.ones(512)
    save_file(tensors, tmp_path / "ours.safetensors")
    with pytest.raises(UserError, match="have the size B/16 and the tokenizer bpe"):
        _started(CONFIG, tmp_path / "ours.safetensors")
    save_file(tensors | {"visual.ln_pre.weight": torch.ones(768)}, tmp_path / "stock.safetensors")
    with pytest.raises(UserError, match="have the size ViT-B-16 and the tokenizer bpe"):
        _started(CONFIG, tmp_path / "stock.safetensors")


def test_another_tokenizer_is_refused(source: ClipsModel, tmp_path: Path) -> None:
    about = open_clip_config(CONFIG)
    for name, remedy in (("bert-base-uncased", "Set tokenizer to bert"), ("xlm-v", "Take other weights")):
        about["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = name
        with pytest.raises(UserError, match=f"this run those of bpe. {remedy}"):
            _started(CONFIG, _export(tmp_path, source, config=about))


def test_a_captioner_of_another_depth_is_refused(source: ClipsModel, tmp_path: Path) -> None:
    folder = _export(tmp_path, source)
    assert source.decoder is not None
    deeper = {
        f"transformer.resblocks.1.{name}": tensor.clone()
        for name, tensor in _weights(source.decoder.transformer.resblocks[0]).items()
    }
    save_file(_weights(source.decoder) | deeper, folder / export_decoder.DECODER)
    with pytest.raises(UserError, match="captioner whose number of blocks is 2, that of size tiny has 1"):
        _started(CONFIG, folder)


# --- what cannot be read ----------------------------------------------------------------------------------------------


class _Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("touched"),))  # type: ignore[return-value]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_more_than_weights_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    if zipped:
        torch.save({"visual.proj": _Evil()}, "weights.pt")
    else:
        Path("weights.pt").write_bytes(pickle.dumps({"visual.proj": _Evil()}))
    with pytest.raises(UserError, match=r"weights\.pt cannot be read as plain weights.*never run"):
        _started(CONFIG, "weights.pt")
    assert not Path("touched").exists()


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    contents: dict[str, Any] = {
        "list.pt": [torch.ones(2)],
        "number.pt": {"visual.proj": 3},
        "other.pt": {"vision.w": torch.ones(2)},
    }
    messages = {
        "list.pt": "holds no weights by name, but list",
        "number.pt": "'visual.proj', which is int and no tensor",
        "other.pt": "its names are vision.w",
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=messages[name]):
            _started(CONFIG, tmp_path / name)
    for name, message in (
        ("cut.safetensors", "cannot be read"),
        ("cut.pt", "cannot be read as plain weights"),
        ("weights.npz", "does not end in .safetensors"),
    ):
        (tmp_path / name).write_bytes(b"\x08\x00")
        with pytest.raises(UserError, match=message):
            _started(CONFIG, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/absent", "init 'runs/absent' does not exist"),
        ("local-dir:absent", "does not exist"),
        ("ViT-B-23:openai", "nor a model of open_clip. Did you mean 'ViT-B-32'"),
        ("ViT-B-32:laion", "knows no weights 'laion' of ViT-B-32. Did you mean 'laion"),
        ("ViT-S-32-alt:any", "It has no published weights"),
    ],
)
def test_names_of_nothing_are_refused_with_the_nearest_one(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _started(CONFIG, name)


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        _started(CONFIG, tmp_path)
    (tmp_path / export_open_clip.MODEL_CONFIG).write_text("{}")
    with pytest.raises(UserError, match="but no weights"):
        _started(CONFIG, tmp_path)
    save_file({"visual.proj": torch.ones(2)}, tmp_path / export_open_clip.MODEL)
    with pytest.raises(UserError, match="no configuration of open_clip"):
        _started(CONFIG, tmp_path)


# --- published weights ------------------------------------------------------------------------------------------------


def test_weights_from_the_hub_are_those_of_its_files(
    source: ClipsModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = _export(tmp_path, source, decoder=False), []

    def download(*, repo_id: str, filename: str, revision: str | None, cache_dir: str | None) -> str:
        asked.append((repo_id, filename, revision))
        if not (folder / filename).is_file():
            raise FileNotFoundError(filename)
        return str(folder / filename)

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", download)
    model, lines = _started(CONFIG, "hf-hub:owner/model@v2")
    _assert_same(model.towers, source.towers)
    assert lines[0] == "starting from hf-hub:owner/model@v2"
    assert set(asked) == {
        ("owner/model", export_open_clip.MODEL, "v2"),
        ("owner/model", export_open_clip.MODEL_CONFIG, "v2"),
    }
    (folder / export_open_clip.MODEL).unlink()
    with pytest.raises(UserError, match=r"hf-hub:owner/model could not be fetched.*Check the name"):
        _started(CONFIG, "hf-hub:owner/model")


def test_weights_of_open_clip_are_fetched_by_model_and_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(
        size="ViT-S-32-alt", image_px=32, context_length=77, pos_embed="learned", decoder="none", caption_weight=0
    )
    made = _built(config, seed=1)
    save_file(_weights(made.towers), tmp_path / "weights.safetensors")
    tags = {"mine": {"file": str(tmp_path / "weights.safetensors"), "quick_gelu": True, "mean": (0.5, 0.5, 0.5)}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-S-32-alt", tags)
    model, lines = _started(config, "ViT-S-32-alt:mine")
    _assert_same(model, made)
    assert lines[1:] == [
        "note: quick_gelu was True for the weights, and is False here",
        "note: images had mean (0.5, 0.5, 0.5) for the weights, and have (0.485, 0.456, 0.406) here",
    ]
