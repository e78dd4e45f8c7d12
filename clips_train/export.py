"""``clips export``: a checkpoint in the formats of other libraries, each loaded back by its own library and compared.

``export/`` is what stock open_clip loads by ``local-dir:``, ready to be pushed to a hub: configuration, weights, the
tokenizer's files where stock open_clip needs them, a model card. Beside these lies the captioner
(``export_decoder.load``), and below them ``timm/``, ``transformers/`` with ``llava/``, and ``onnx/``.
``clips_export.json`` says what was compared and how close it came. Nothing in it is a pickle.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clips_data import ledger
from clips_data.errors import ResumeRefused, UserError
from clips_data.schema import SCHEMA_VERSION
from clips_train import (
    checkpoint,
    export_card,
    export_decoder,
    export_onnx,
    export_open_clip,
    export_timm,
    export_transformers,
    generate,
    shards,
    transforms,
)
from clips_train.config import ModelConfig
from clips_train.export_check import Differences, Inputs, Loaded, compare, inputs_of, worst
from clips_train.export_towers import Towers
from clips_train.generate import Trained, load_trained
from clips_train.towers import open_clip_config
from clips_train.use_config import ExportConfig

FOLDER, ABOUT, CARD, DATA_CARD = "export", "clips_export.json", "README.md", "DATA.md"
LLAVA = "llava"
LIBRARIES = {"open_clip": "open_clip_torch", "timm": "timm", "transformers": "transformers", "onnx": "onnxruntime"}
"""What each format was loaded by, as packages are named."""
PACKAGES = {"transformers": (("transformers",), "train"), "onnx": (("onnx", "onnxruntime", "onnxscript"), "onnx")}
"""What formats need beyond what a model needs, and the extra that brings it."""


@dataclass(frozen=True)
class Format:
    """A library's format, in the folder of its name below the export. ``why_not`` ends a sentence."""

    write: Callable[[Towers, Path], None]
    load: Callable[[Path, Towers], Loaded]
    why_not: Callable[[Towers], str | None] = lambda towers: None


FORMATS = {
    "timm": Format(export_timm.write, export_timm.load, export_timm.why_not),
    "transformers": Format(export_transformers.write, export_transformers.load, export_transformers.why_not),
    "onnx": Format(export_onnx.write, export_onnx.load),
}


def export(config: ExportConfig, *, run: Path, shards: Path, overwrite: bool = False) -> dict[str, Any]:
    """Writes ``export/`` under ``run`` and returns the largest differences found when loading it back, by format.

    The folder appears only when stock open_clip gives our token ids exactly, every library our features within
    ``config.tolerance``, on random and on held-out input, and the captioner our captions; otherwise ``UserError``. A
    finished export is left as it is, but for its card, which takes up new results of ``clips eval`` unless somebody
    changed it. ``ResumeRefused`` when an export of another checkpoint, or without one of the formats, is there.
    """
    folder = run / FOLDER
    newest = checkpoint.find(run)
    weights_digest = ledger.digest_file(newest / checkpoint.WEIGHTS)
    if folder.exists() and not overwrite:
        return _finished(config, folder, newest, weights_digest, shards)
    for name in config.formats:
        check_installed(name)
    trained = load_trained(newest, "cpu")
    _check_stock_can_load(trained)
    part = ledger.part(folder)
    with ledger.readable_disk_errors(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        about = {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": newest.name,
            "weights_sha256": weights_digest,
            "tolerance": config.tolerance,
            **_make(config, trained, part, shards),
        }
        _write_about(part, about, run, shards)
        checkpoint.publish(part, folder)
    return _facts(about)


def check_installed(name: str) -> None:
    """Raises ``UserError`` where a format lacks a package."""
    packages, extra = PACKAGES.get(name, ((), ""))
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        are = "is" if len(missing) == 1 else "are"
        raise UserError(
            f"The format {name} needs {' and '.join(missing)}, which {are} not installed. "
            f"Run: pip install 'clips[{extra}]', or leave {name} out of --formats."
        )


def _check_stock_can_load(trained: Trained) -> None:
    if trained.config.text_padding == "trimmed":
        raise UserError(
            f"The export of {trained.folder} was not made: it was trained with text_padding=trimmed, which masks the "
            "padding of texts. Stock open_clip cannot, and would give other features. Use `clips eval` and "
            "`clips caption` on the run, or train with text_padding=reference."
        )


def _make(config: ExportConfig, trained: Trained, part: Path, shards: Path) -> dict[str, Any]:
    """Writes and compares everything but card and about file; what the about file says of it."""
    towers = Towers(trained.model, open_clip_config(trained.config, sigmoid=trained.model.logit_bias is not None))
    pictures, texts = _pictures_and_texts(shards, trained.config, config.batch)
    ids_NL = trained.tokenizer.text_ids(texts, trained.config.context_length)
    inputs = inputs_of(towers, pictures, texts, ids_NL, config.batch)
    write_open_clip(towers, trained.config, part)
    export_decoder.write(trained, part)
    differences = {"open_clip": compare("open_clip", export_open_clip.load(part, towers), inputs)}
    written, left_out = write_and_compare(towers, [name for name in config.formats if name in FORMATS], part, inputs)
    differences |= written
    for name, found in differences.items():
        if not worst(found) <= config.tolerance:
            raise UserError(
                f"The export of {trained.folder} was not made: {name} loads it with features that differ by "
                f"{worst(found):.2e}, more than the tolerance of {config.tolerance:.0e}. "
                f"Use the version of {name} that this version of clips asks for."
            )
    if trained.model.decoder is not None:
        _check_captions(trained, part, inputs)
    return {
        "formats": ["open_clip", *(name for name in config.formats if name in differences and name != "open_clip")],
        "left_out": left_out,
        "max_abs_differences": differences,
        "num_compared": len(pictures),
        "versions": {name: metadata.version(LIBRARIES[name]) for name in sorted({*differences} & {*LIBRARIES})},
    }


def write_open_clip(towers: Towers, config: ModelConfig, folder: Path) -> None:
    export_open_clip.write(towers, folder)
    if config.tokenizer == "bert":
        assert config.bert_vocab is not None
        export_open_clip.write_bert_tokenizer(Path(config.bert_vocab), folder)


def write_and_compare(
    towers: Towers, formats: list[str], folder: Path, inputs: Inputs
) -> tuple[dict[str, Differences], dict[str, str]]:
    """The differences of these formats of ``FORMATS``, and why the others of them were left out."""
    differences: dict[str, Differences] = {}
    left_out: dict[str, str] = {}
    for name in formats:
        kind, below = FORMATS[name], folder / name
        if reason := kind.why_not(towers):
            left_out[name] = f"{name} was left out: {reason}."
            continue
        kind.write(towers, below)
        differences[name] = compare(name, kind.load(below, towers), inputs)
        if name == "transformers":
            export_transformers.write_llava(towers, folder / LLAVA)
            llava = export_transformers.load_llava(folder / LLAVA, below, towers)
            differences[LLAVA] = compare(LLAVA, llava, inputs)
    return differences, left_out


def _check_captions(trained: Trained, part: Path, inputs: Inputs) -> None:
    pixels_NCHW = torch.stack([transforms.squash(picture, trained.config.image_px) for picture in inputs.pictures])
    ours = generate.caption_images(trained, pixels_NCHW, inputs.texts)
    theirs = generate.caption_images(export_decoder.load(part, "cpu"), pixels_NCHW, inputs.texts)
    if theirs != ours:
        number = next(number for number, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise UserError(
            f"The export of {trained.folder} was not made: its captioner writes {theirs[number][:80]!r} where the "
            f"checkpoint's writes {ours[number][:80]!r}. This is a mistake in clips; please report it."
        )


def _pictures_and_texts(folder: Path, config: ModelConfig, limit: int) -> tuple[list[Image.Image], list[str]]:
    """Real input: up to ``limit`` pictures and their web captions, from the held-out split.

    The training split stands in for an empty held-out one.
    """
    split = shards.open_split(folder, shards.HELDOUT)
    if split.num_samples == 0:
        split = shards.open_split(folder, shards.TRAIN)
    reader = shards.ShardReader(split)
    pictures: list[Image.Image] = []
    texts: list[str] = []
    for shard, num_rows in enumerate(split.num_samples_by_shard):
        for row in range(num_rows):
            if len(pictures) == limit:
                return pictures, texts
            try:
                picture = transforms.decode(reader.image(shard, row), config.image_px)
                about = reader.about(shard, row)
            except (shards.ShardError, transforms.BadImage):
                continue  # what cannot be read is counted by train and eval; here any other sample does as well
            pictures.append(picture)
            texts.append(next((about[name] for name in split.columns if about.get(name)), ""))
    if not pictures:
        raise UserError(f"{folder} holds no readable sample to compare the export on. Make the shards again.")
    return pictures, texts


# --- what is said of it -----------------------------------------------------------------------------------------------


def _write_about(folder: Path, about: dict[str, Any], run: Path, shards: Path) -> None:
    """The card, and the about file, which knows the card's digest."""
    if (shards / CARD).is_file():
        shutil.copyfile(shards / CARD, folder / DATA_CARD)
    card = export_card.card(about, folder=folder, run=run, shards=shards).encode()
    ledger.write_bytes(folder / CARD, card)
    ledger.write_json(folder / ABOUT, {**about, "card_sha256": ledger.digest_bytes(card)})


def _place(folder: Path, name: str) -> Path:
    """What of a format has to be there: its folder, or open_clip's weights, which lie in the export itself."""
    return folder / (export_open_clip.MODEL if name == "open_clip" else name)


def _finished(config: ExportConfig, folder: Path, newest: Path, weights_digest: str, shards: Path) -> dict[str, Any]:
    path = folder / ABOUT
    if not path.is_file():
        raise ResumeRefused(f"{folder} is there but was not made by `clips export`. Use --overwrite to replace it.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        about["weights_sha256"], about["checkpoint"], about["max_abs_differences"].items(), about["card_sha256"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResumeRefused(
            f"{path} is damaged, or of an older version of clips ({type(error).__name__}: {error}). Use --overwrite to "
            "export again."
        ) from None
    if about["weights_sha256"] != weights_digest:
        raise ResumeRefused(
            f"{folder} was exported from {about['checkpoint']}, the newest checkpoint is {newest.name} with other "
            "weights. Use --overwrite to export that one."
        )
    missing = [name for name in config.formats if name not in {*about.get("formats", ()), *about.get("left_out", ())}]
    if missing:
        raise ResumeRefused(
            f"{folder} was exported without {' and '.join(missing)}. Use --overwrite to export it again."
        )
    gone = [name for name in about["formats"] if not _place(folder, name).exists()]
    if gone:
        raise ResumeRefused(
            f"{_place(folder, gone[0])} of the finished export is not there any more. Use --overwrite to export again."
        )
    if off := [name for name, found in about["max_abs_differences"].items() if not worst(found) <= config.tolerance]:
        raise ResumeRefused(
            f"{folder} was exported with a tolerance of {about['tolerance']:.0e}, and {off[0]} is further off than "
            f"{config.tolerance:.0e}. Give a larger --tolerance, or use --overwrite to export it again."
        )
    card = folder / CARD
    if not card.is_file() or ledger.digest_file(card) == about["card_sha256"]:
        _write_about(folder, about, folder.parent, shards)
    return _facts(about)


def _facts(about: Mapping[str, Any]) -> dict[str, Any]:
    """For the command's report."""
    return {
        "checkpoint": about["checkpoint"],
        "formats": ", ".join(about["formats"]),
        **{f"max_abs_difference_{name}": worst(found) for name, found in about["max_abs_differences"].items()},
        "num_compared": about["num_compared"],
        **{f"left_out_{name}": reason for name, reason in about["left_out"].items()},
    }
