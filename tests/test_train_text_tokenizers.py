"""Token ids of models from elsewhere: a CLIPS text tower gets its own layout, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import goldens
import peermaker
import pytest

from clips_data.errors import UserError
from clips_train import encoders, text_tokenizers
from clips_train.tokenizer import build_tokenizer

BERT = {"hf_tokenizer_name": "bert-base-uncased"}
MODE = {"tokenizer_mode": "clips"}
MARKS = {"pool_type": "last", "no_causal_mask": True, "vocab_size": 32_000, "context_length": 80}
needs_bert_vocab = pytest.mark.skipif(not goldens.BERT_VOCAB.is_file(), reason="the BERT vocabulary is not here")


def folder_of(folder: Path, **text: Any) -> str:
    """A ``local-dir:`` of a CLIPS tower, for its tokenizer alone."""
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": MARKS | text}}))
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    "text", [{}, {"hf_tokenizer_name": "xlm-roberta-base"}, MODE, MODE | {"hf_tokenizer_name": "t5"}]
)
def test_a_clips_tower_is_refused_with_another_tokenizer(tmp_path: Path, text: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="CLIPS text tower, which knows the word pieces of bert-base-uncased only"):
        text_tokenizers.of_open_clip(folder_of(tmp_path / "model", **text))


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "model", **BERT)
    words = tmp_path / "model" / "vocab.txt"
    words.write_text("[PAD]\n[unused0]\n[unused1]\n[UNK]\nword\n")
    with pytest.raises(UserError, match=r"is not the vocabulary of bert-base-uncased.*--bert-vocab"):
        text_tokenizers.of_open_clip(source)
    with pytest.raises(UserError, match="does not exist"):
        text_tokenizers.of_open_clip(source, str(tmp_path / "absent.txt"))


@needs_bert_vocab
def test_a_released_clips_tower_has_the_layout_it_was_trained_with(tmp_path: Path) -> None:
    found = text_tokenizers.of_open_clip(folder_of(tmp_path / "model", **BERT), str(goldens.BERT_VOCAB))
    ours = build_tokenizer("bert", str(goldens.BERT_VOCAB))
    assert found.name == "clips" and found.context_length == 80
    assert found.ids(["a red circle"]).equal(ours.text_ids(["a red circle"], 80))


def _without(name: str) -> Any:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()

    return spoil


def _configured(part: str, **values: Any) -> Any:
    def spoil(folder: Path) -> None:
        about = json.loads((folder / "open_clip_config.json").read_text())
        about["model_cfg"][part].update(values)
        (folder / "open_clip_config.json").write_text(json.dumps(about))

    return spoil


def _pickled(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\nq\x00.")


@pytest.mark.parametrize(
    "spoil",
    [
        _without("open_clip_model.safetensors"),
        _configured("vision_cfg", strange=1),
        _configured("text_cfg", heads=3),
        lambda folder: (folder / "open_clip_model.safetensors").write_bytes(b"\x00" * 100),
        _pickled,
    ],
    ids=["no weights", "unknown setting", "heads that do not fit", "damaged weights", "a pickle of code"],
)
def test_a_spoilt_folder_is_refused_in_words(tmp_path: Path, spoil: Any) -> None:
    folder = peermaker.write_export(tmp_path)
    spoil(folder)
    with pytest.raises(UserError, match=r"open_clip could not load --model .*Check its name, tag and files"):
        peermaker.ours(folder)


def test_one_architecture_with_two_tags_is_two_models(tmp_path: Path) -> None:
    models = encoders.find(["RN50", "RN50"], ["openai", "yfcc15m"], tmp_path)
    assert [one.name for one in models] == ["RN50:openai", "RN50:yfcc15m"]
