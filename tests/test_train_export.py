"""The export: stock open_clip loads it and agrees, or it does not appear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import shardmaker
import torch
from safetensors.torch import load_file

from clips_data.errors import ResumeRefused, UserError
from clips_train import export as export_module
from clips_train.config import TrainConfig
from clips_train.export import export
from clips_train.generate import load_trained
from clips_train.train import train
from clips_train.transforms import squash
from clips_train.use_config import ExportConfig

BERT_VOCAB = Path(__file__).parents[2] / "shared" / "golden" / "bert-vocab.txt"


def train_tiny(folder: Path, **change: Any) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    shards = shardmaker.write_shards(folder / "shards", num_train=8)
    settings: dict[str, Any] = {
        "size": "tiny", "image_px": 32, "context_length": 12, "target_length": 16, "batch": 8, "samples": 8, "lr": 1e-2,
        "warmup_samples": 0, "caption_negatives": 50,
    }  # fmt: skip
    train(TrainConfig(**settings | change), shards=shards, out=folder / "run", quiet=True)
    return folder / "run", shards


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return train_tiny(tmp_path_factory.mktemp("export"))


def test_stock_open_clip_gives_our_features_from_files_to_pixels_to_features(run: tuple[Path, Path]) -> None:
    folder, shards = run
    facts = export(ExportConfig(), run=folder, shards=shards)
    assert facts["num_compared"] == 8
    assert all(value < 1e-4 for name, value in facts.items() if name.startswith("max_abs"))

    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'export'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'export'}")
    trained = load_trained(folder, "cpu")
    from io import BytesIO

    from PIL import Image

    picture = Image.open(BytesIO(shardmaker.sample(1)[0])).convert("RGB")
    with torch.inference_mode():
        image = model.encode_image(preprocess(picture).unsqueeze(0), normalize=True)
        text = model.encode_text(tokenizer(["a red circle"]), normalize=True)
        ours, _ = trained.model.encode_image(export_module.transforms.normalise(squash(picture, 32).unsqueeze(0)))
        our_text, _ = trained.model.encode_text(trained.tokenizer.text_ids(["a red circle"], 12))
    torch.testing.assert_close(image, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(text, our_text, rtol=0, atol=1e-5)


def test_the_decoder_lies_beside_and_fits_its_own_config(run: tuple[Path, Path]) -> None:
    folder, shards = run
    export(ExportConfig(), run=folder, shards=shards)
    from clips_train.decoder import CaptionDecoder

    about = json.loads((folder / "export" / "decoder_config.json").read_text())
    assert about.pop("schema_version") == 1 and about.pop("tokenizer") == "bpe"
    decoder = CaptionDecoder(vocab_size=49408, **about)
    decoder.load_state_dict(load_file(folder / "export" / "decoder.safetensors"))


def test_a_model_of_the_sigmoid_loss_keeps_its_bias_and_any_captioner_its_shape(tmp_path: Path) -> None:
    folder, shards = train_tiny(
        tmp_path, contrastive="sigmoid", decoder="teacher_forced", fusion="cross_attention", condition=None
    )
    export(ExportConfig(), run=folder, shards=shards)
    stock, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'export'}")
    trained = load_trained(folder, "cpu").model
    assert trained.logit_bias is not None
    assert stock.logit_bias.item() == trained.logit_bias.item() != 0
    from clips_train.decoder import CaptionDecoder

    about = json.loads((folder / "export" / "decoder_config.json").read_text())
    del about["schema_version"], about["tokenizer"]
    CaptionDecoder(vocab_size=49408, **about).load_state_dict(load_file(folder / "export" / "decoder.safetensors"))


def test_a_model_that_masks_padding_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder, shards = train_tiny(tmp_path, text_padding="trimmed")
    with pytest.raises(UserError, match=r"text_padding=trimmed.*Use `clips eval`"):
        export(ExportConfig(), run=folder, shards=shards)
    assert not (folder / "export").exists()


def test_features_off_by_more_than_the_tolerance_leave_no_export(
    run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shards = run
    before = sorted((folder / "export").glob("*")) if (folder / "export").exists() else []
    original = export_module.open_clip_config

    def other_activation(config: Any, **given: Any) -> dict[str, Any]:
        changed: dict[str, Any] = json.loads(json.dumps(original(config, **given)))
        changed["model_cfg"]["text_cfg"]["act_kwargs"] = {}
        return changed

    monkeypatch.setattr(export_module, "open_clip_config", other_activation)
    with pytest.raises(UserError, match="more than the tolerance"):
        export(ExportConfig(tolerance=1e-7), run=folder, shards=shards, overwrite=True)
    assert sorted((folder / "export").glob("*")) == before


def test_an_export_is_skipped_when_made_and_refused_when_of_another_checkpoint(
    run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shards = run
    first = export(ExportConfig(), run=folder, shards=shards)
    monkeypatch.setattr(export_module, "load_trained", None)
    assert export(ExportConfig(), run=folder, shards=shards) == first
    path = folder / "export" / "clips_export.json"
    about = path.read_text()
    path.write_text(about.replace(json.loads(about)["weights_sha256"], "0" * 64))
    with pytest.raises(ResumeRefused, match="--overwrite"):
        export(ExportConfig(), run=folder, shards=shards)
    path.write_text(about)


@pytest.mark.skipif(not BERT_VOCAB.exists(), reason="the BERT vocabulary is not here")
def test_a_model_with_the_bert_tokenizer_brings_its_tokenizer_along(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder, shards = train_tiny(tmp_path, tokenizer="bert", bert_vocab=str(BERT_VOCAB))
    export(ExportConfig(), run=folder, shards=shards)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'export'}")
    ours = load_trained(folder, "cpu").tokenizer
    texts = ["a red circle", "", "Ein Café, 3.5 m", "word " * 40]
    assert torch.equal(tokenizer(texts), ours.text_ids(texts, 12))
    assert tokenizer(texts)[:, -1].tolist() == [101] * 4
