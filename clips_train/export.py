"""``clips export``: a checkpoint becomes a folder that stock open_clip loads by ``local-dir:``, checked by loading it.

The folder holds ``open_clip_config.json`` and ``open_clip_model.safetensors``, the tokenizer's files where stock
open_clip needs them, and beside them the captioner as ``decoder.safetensors`` with ``decoder_config.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor

from clips_data import ledger
from clips_data.errors import ResumeRefused, UserError
from clips_data.schema import SCHEMA_VERSION
from clips_train import checkpoint, shards, transforms
from clips_train.config import ModelConfig
from clips_train.generate import Trained, load_trained
from clips_train.towers import open_clip_config, sizes_of
from clips_train.use_config import ExportConfig

FOLDER = "export"
MODEL, MODEL_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
DECODER, DECODER_CONFIG = "decoder.safetensors", "decoder_config.json"
ABOUT = "clips_export.json"
BERT_BOS, BERT_EOS = "[unused0]", "[unused1]"
RANDOM_SEED = 0


def export(config: ExportConfig, *, run: Path, shards: Path, overwrite: bool = False) -> dict[str, Any]:
    """Writes ``export/`` under ``run`` and returns the largest differences found when loading it back.

    The folder appears only when stock open_clip gives our token ids exactly and our features within
    ``config.tolerance``, on random and on held-out input; otherwise ``UserError``. ``ResumeRefused`` when an export of
    another checkpoint is there.
    """
    folder = run / FOLDER
    newest = checkpoint.find(run)
    weights_digest = ledger.digest_file(newest / checkpoint.WEIGHTS)
    if folder.exists() and not overwrite:
        return _finished(folder, newest, weights_digest)
    trained = load_trained(newest, "cpu")
    _check_stock_can_load(trained)
    part = ledger.part(folder)
    with ledger.readable_disk_errors(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_folder(trained, part)
        differences = compare(trained, part, _pictures_and_texts(shards, trained.config, config.batch), config.batch)
        worst = max(value for name, value in differences.items() if name.startswith("max_abs"))
        if not worst <= config.tolerance:
            raise UserError(
                f"The export of {newest} was not made: stock open_clip {open_clip.__version__} loads it with features "
                f"that differ by {worst:.2e}, more than the tolerance of {config.tolerance:.0e}. "
                "Use the open_clip_torch version that this version of clips asks for."
            )
        about = {"schema_version": SCHEMA_VERSION, "checkpoint": newest.name, "weights_sha256": weights_digest}
        about |= {"open_clip_version": open_clip.__version__, "tolerance": config.tolerance, **differences}
        (part / ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
        checkpoint.publish(part, folder)
    return _facts(about)


def _check_stock_can_load(trained: Trained) -> None:
    if trained.config.text_padding == "trimmed":
        raise UserError(
            f"The export of {trained.folder} was not made: it was trained with text_padding=trimmed, which masks the "
            "padding of texts. Stock open_clip cannot, and would give other features. Use `clips eval` and "
            "`clips caption` on the run, or train with text_padding=reference."
        )


def _finished(folder: Path, newest: Path, weights_digest: str) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.is_file():
        raise ResumeRefused(f"{folder} is there but was not made by `clips export`. Use --overwrite to replace it.")
    about = json.loads(path.read_text())
    if about["weights_sha256"] != weights_digest:
        raise ResumeRefused(
            f"{folder} was exported from {about['checkpoint']}, the newest checkpoint is {newest.name} with other "
            "weights. Use --overwrite to export that one."
        )
    return _facts(about)


def _facts(about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in about.items() if name.startswith(("max_abs", "num_")) or name == "checkpoint"
    }


def write_folder(trained: Trained, folder: Path) -> None:
    """All files of the export but the one that says it was checked."""
    config, model = trained.config, trained.model
    stock = open_clip_config(config, sigmoid=model.logit_bias is not None)
    (folder / MODEL_CONFIG).write_text(json.dumps(stock, indent=2, sort_keys=True) + "\n")
    save_file(_plain(model.towers.state_dict()), folder / MODEL)
    if config.tokenizer == "bert":
        _write_bert_tokenizer(config, folder)
    if model.decoder is not None:
        save_file(_plain(model.decoder.state_dict()), folder / DECODER)
        (folder / DECODER_CONFIG).write_text(json.dumps(_decoder_config(config), indent=2, sort_keys=True) + "\n")


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _decoder_config(config: ModelConfig) -> dict[str, Any]:
    sizes = sizes_of(config)
    return {
        "schema_version": SCHEMA_VERSION,
        "mode": config.decoder,
        "fusion": config.fusion,
        "width": sizes.decoder.width,
        "layers": sizes.decoder.layers,
        "heads": sizes.decoder.heads,
        "num_queries": config.target_length,
        "image_width": sizes.image.width,
        "text_width": None if config.condition is None else sizes.text.width,
        "tokenizer": config.tokenizer,
    }


def _write_bert_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Tokenizer files with start and end tokens set, which open_clip's ``clips`` mode needs (METHOD §1.5)."""
    try:
        from transformers.models.bert.tokenization_bert import BertTokenizer
    except ImportError:
        raise UserError(
            "Exporting a model with tokenizer=bert needs the package transformers, as stock open_clip does to load it. "
            "Run: pip install transformers"
        ) from None
    assert config.bert_vocab is not None
    entries = Path(config.bert_vocab).read_text(encoding="utf-8").splitlines()
    vocabulary = {entry: number for number, entry in enumerate(entries)}
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True, bos_token=BERT_BOS, eos_token=BERT_EOS)
    tokenizer.save_pretrained(folder)


def _pictures_and_texts(folder: Path, config: ModelConfig, limit: int) -> tuple[list[Tensor], list[str]]:
    """Real input: up to ``limit`` pictures at the model's size, uint8, and their web captions, from the held-out split.

    The training split stands in for an empty held-out one.
    """
    split = shards.open_split(folder, shards.HELDOUT)
    if split.num_samples == 0:
        split = shards.open_split(folder, shards.TRAIN)
    reader = shards.ShardReader(split)
    pictures: list[Tensor] = []
    texts: list[str] = []
    for shard, num_rows in enumerate(split.num_samples_by_shard):
        for row in range(min(num_rows, limit - len(pictures))):
            try:
                picture = transforms.decode(reader.image(shard, row), config.image_px)
                about = reader.about(shard, row)
            except (shards.ShardError, transforms.BadImage):
                continue  # what cannot be read is counted by train and eval; here any other sample does as well
            pictures.append(transforms.squash(picture, config.image_px))
            texts.append(next((about[name] for name in split.columns if about.get(name)), ""))
    if not pictures:
        raise UserError(f"{folder} holds no readable sample to compare the export on. Make the shards again.")
    return pictures, texts


@torch.inference_mode()
def compare(trained: Trained, folder: Path, real: tuple[list[Tensor], list[str]], num_random: int) -> dict[str, Any]:
    """Largest absolute differences between our features and those of ``folder`` loaded by stock open_clip.

    Raises ``UserError`` when its tokenizer gives other ids than ours.
    """
    stock, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder}", device="cpu")
    stock_tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    stock.eval()
    pictures, texts = real
    config, generator = trained.config, torch.Generator().manual_seed(RANDOM_SEED)
    ids_NL = trained.tokenizer.text_ids(texts, config.context_length)
    for text, ours, theirs in zip(texts, ids_NL, stock_tokenizer(texts), strict=True):
        if not torch.equal(ours, theirs):
            raise UserError(
                f"The export was not made: stock open_clip {open_clip.__version__} gives other token ids than training "
                f"did for {text[:60]!r}. Use the open_clip_torch version that this version of clips asks for."
            )
    random_ids_NL = torch.randint(
        1, trained.tokenizer.vocab_size, (num_random, config.context_length), generator=generator
    )
    random_NCHW = torch.randn(num_random, 3, config.image_px, config.image_px, generator=generator)
    return {
        "max_abs_difference_image": _difference(trained, stock, transforms.normalise(torch.stack(pictures)), None),
        "max_abs_difference_image_random": _difference(trained, stock, random_NCHW, None),
        "max_abs_difference_text": _difference(trained, stock, None, ids_NL),
        "max_abs_difference_text_random": _difference(trained, stock, None, random_ids_NL),
        "num_compared": len(pictures),
    }


def _difference(trained: Trained, stock: Any, image_NCHW: Tensor | None, ids_NL: Tensor | None) -> float:
    if image_NCHW is not None:
        ours, theirs = trained.model.encode_image(image_NCHW)[0], stock.encode_image(image_NCHW, normalize=True)
    else:
        assert ids_NL is not None
        ours, theirs = trained.model.encode_text(ids_NL)[0], stock.encode_text(ids_NL, normalize=True)
    return float((ours - theirs).abs().max())
