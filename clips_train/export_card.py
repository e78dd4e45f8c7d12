"""The model card of an export: ``README.md`` with the front matter of the Hugging Face Hub.

Everything in it is read from files: the export itself, the run's resolved config, the result files of ``clips eval``,
the shards' index. Names, texts and paths that others wrote stand in code spans, in one line, where Markdown and HTML
mean nothing. The licence is its user's to fill in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clips_train.checkpoint import read_about
from clips_train.config import ModelConfig, TrainConfig
from clips_train.export_check import rows

EVAL_FOLDER, DATA_CARD, INDEX = "eval", "DATA.md", "index.json"
MOST_CHARACTERS = 300
NOT_IN_RECIPE = frozenset(
    {"name", "device", "num_workers", "log_steps", "log_to", "cache_bytes", "checkpoints_kept", "peak_tflops"}
)
"""Choices that change nothing about the model."""


def card(about: Mapping[str, Any], *, folder: Path, run: Path, shards: Path) -> str:
    """``about`` is the content of ``clips_export.json``, ``folder`` holds the exported files."""
    checkpoint = read_about(run / "checkpoints" / about["checkpoint"])
    config = TrainConfig(**checkpoint["config"])
    sections = [
        _front_matter(config, about),
        _summary(config, about, checkpoint),
        _loading_section(config, about, folder),
        _scores_section(run / EVAL_FOLDER, about),
        _data_section(shards, folder),
        _recipe_section(config),
        _equality_section(about),
        _limits_section(config, about),
        _licence_section(),
    ]
    return "\n".join("\n".join(lines) + "\n" for lines in sections if lines)


def _front_matter(config: TrainConfig, about: Mapping[str, Any]) -> list[str]:
    content = {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "clips", *(name for name in about["formats"] if name != "open_clip")],
    }
    return ["---", yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip(), "---"]


def _summary(config: TrainConfig, about: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> list[str]:
    text = {"bpe": "open_clip's byte pairs", "bert": "BERT's word pieces in the CLIPS layout"}[config.tokenizer]
    lines = [
        f"# {code(config.name)}",
        "",
        "An image tower and a text tower whose features can be compared by their cosine, trained by `clips`, which",
        "follows CLIPS (arXiv 2411.16828). With what texts it was trained is said by `views` of the recipe below.",
        "",
        f"- size {code(config.size)}, images of {config.image_px} x {config.image_px} px, texts of "
        f"{config.context_length} tokens in {text}",
        f"- checkpoint {code(about['checkpoint'])}: {checkpoint['step']} steps, {checkpoint['samples']} samples",
    ]
    if config.decoder != "none":
        reads = "the image alone" if config.condition is None else f"the image and {code(config.condition)}"
        lines.append(f"- with a captioner ({code(config.decoder)}), which reads {reads}")
    return lines


# --- how to load ------------------------------------------------------------------------------------------------------


def _loading_section(config: ModelConfig, about: Mapping[str, Any], folder: Path) -> list[str]:
    """Paths are relative to the folder of the card."""
    lines = ["## How to load", "", "Put the path of this folder in place of `FOLDER`."]
    lines += _snippet(
        "open_clip, both towers (`hf-hub:OWNER/NAME` once this folder is on a hub):",
        "import open_clip",
        "",
        'model, preprocess = open_clip.create_model_from_pretrained("local-dir:FOLDER")',
        'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")',
    )
    if "timm" in about["formats"]:
        lines += _snippet(
            "timm, the image tower; the classifier is the projection to the features:",
            "import timm",
            "",
            'model = timm.create_model("local-dir:FOLDER/timm", pretrained=True).eval()',
            "data = timm.data.resolve_model_data_config(model)",
            "preprocess = timm.data.create_transform(**data, is_training=False)",
        )
    if "transformers" in about["formats"]:
        lines += _transformers_snippets(folder)
    if "onnx" in about["formats"]:
        lines += _snippet(
            "ONNX, both towers, any batch size; `onnx/config.json` says how pixels and ids are made:",
            "import onnxruntime",
            "",
            'image = onnxruntime.InferenceSession("FOLDER/onnx/image.onnx")',
            'features = image.run(None, {"pixels": pixels})[0]  # float32 [N, 3, H, W] to unit vectors',
            'text = onnxruntime.InferenceSession("FOLDER/onnx/text.onnx")',
            'features = text.run(None, {"ids": ids})[0]  # int64 [N, L]',
        )
    if config.decoder != "none":
        lines += _snippet(
            "The captioner, with `clips`:",
            "from pathlib import Path",
            "",
            "from clips_train import export_decoder, generate",
            "",
            'trained = export_decoder.load(Path("FOLDER"))',
            "captions = generate.captions(trained, pixels, web_captions)  # uint8 [N, 3, H, W], squashed",
        )
    return lines


def _transformers_snippets(folder: Path) -> list[str]:
    whole = json.loads((folder / "transformers" / "config.json").read_text())["model_type"] == "clip"
    what = "both towers, as its CLIP" if whole else "the image tower, which its BEiT computes exactly"
    classifier = [
        'model = AutoModelForImageClassification.from_pretrained("FOLDER/transformers")  # .logits are the features',
    ]
    return [
        *_snippet(
            f"transformers, {what}:",
            "from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification",
            "",
            'model = AutoModel.from_pretrained("FOLDER/transformers")  # .pooler_output is before the projection'
            if not whole
            else 'model = AutoModel.from_pretrained("FOLDER/transformers")',
            *([] if whole else classifier),
            'processor = AutoImageProcessor.from_pretrained("FOLDER/transformers", backend="pil")',
        ),
        *_snippet(
            "LLaVA with these eyes, in transformers; `text_config` is to be that of your language model:",
            "from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration",
            "",
            'config = LlavaConfig.from_pretrained("FOLDER/llava")',
            "config.text_config = language_model.config",
            "llava = LlavaForConditionalGeneration(config)",
            'tower = AutoModel.from_pretrained("FOLDER/transformers")',
            f"llava.model.vision_tower.load_state_dict(tower{'.vision_model' if whole else ''}.state_dict())",
        ),
    ]


def _snippet(about: str, *lines: str) -> list[str]:
    return ["", about, "", "```python", *lines, "```"]


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Score:
    benchmark: str
    name: str
    value: float
    low: float | None
    high: float | None


def _scores_section(folder: Path, about: Mapping[str, Any]) -> list[str]:
    found, others = [], []
    for path in sorted(folder.glob("*.json")):
        result = _result(path)
        if result is None:
            continue
        if _is_of_other_weights(result, about):
            others.append(path.name)
        else:
            found += list(_scores_of(path.stem, result))
    lines = ["## Scores", ""]
    if found:
        lines += ["By `clips eval`; the interval is that of the result file. Shares are in 0…1.", ""]
        lines += ["| benchmark | score | value | interval |", "|---|---|---:|---:|"]
        lines += [f"| {cell(s.benchmark)} | {cell(s.name)} | {s.value:.4g} | {_interval(s)} |" for s in found]
    else:
        lines += ["Not scored yet: run `clips eval`, and then `clips export` again."]
    if others:
        lines += ["", f"Left out, as they are of other weights: {', '.join(code(name) for name in others)}."]
    return lines


def _result(path: Path) -> dict[str, Any] | None:
    """A result file of ``clips eval``, or ``None`` for its sidecars and other files."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    is_result = isinstance(found, dict) and any(isinstance(found.get(key), dict) for key in ("scores", "retrieval"))
    return found if is_result else None


def _is_of_other_weights(result: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    model = result.get("model")
    digest = model.get("digest") if isinstance(model, dict) else None
    if digest is not None:
        return bool(digest != about["weights_sha256"])
    return "checkpoint" in result and result["checkpoint"] != about["checkpoint"]


def _scores_of(benchmark: str, result: Mapping[str, Any]) -> Iterator[_Score]:
    scores = result["scores"] if isinstance(result.get("scores"), dict) else result["retrieval"]
    for name, score in scores.items():
        about = score if isinstance(score, dict) else {"value": score}
        if isinstance(about.get("value"), int | float) and not name.startswith("chance_"):
            yield _Score(benchmark, name, float(about["value"]), about.get("low"), about.get("high"))


def _interval(score: _Score) -> str:
    return "" if score.low is None or score.high is None else f"{score.low:.4g} to {score.high:.4g}"


# --- data, recipe, limits ---------------------------------------------------------------------------------------------


def _data_section(shards: Path, folder: Path) -> list[str]:
    index = json.loads((shards / INDEX).read_text(encoding="utf-8"))
    columns = ", ".join(code(name) for name in index["columns"])
    lines = ["## Data", "", f"Images with captions in the columns {columns}.", "", "| split | samples |", "|---|---:|"]
    lines += [f"| {cell(name)} | {split['num_samples']} |" for name, split in index["splits"].items()]
    lines += ["", f"Digest of the shards: {code(index['digest'])}."] if "digest" in index else []
    licence = (index.get("about") or {}).get("licence")
    if licence:
        lines += [f"Licence of the data, as stated by whoever made them: {code(licence)}."]
    if (folder / DATA_CARD).is_file():
        lines += [f"Where they came from, and what was kept and dropped: [{DATA_CARD}]({DATA_CARD})."]
    return lines


def _recipe_section(config: TrainConfig) -> list[str]:
    """The resolved config. Absolute paths, which tell of a machine, are cut to their names."""
    chosen = config.model_dump(mode="json", by_alias=True, exclude=set(NOT_IN_RECIPE))
    lines = ["## Recipe", "", "The resolved config of `clips train`:", "", "| key | value |", "|---|---|"]
    for name, value in sorted(chosen.items()):
        if isinstance(value, str) and Path(value).is_absolute():
            value = Path(value).name
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        lines.append(f"| {cell(name)} | {cell(shown)} |")
    return lines


def _equality_section(about: Mapping[str, Any]) -> list[str]:
    """What was measured when this folder was made."""
    lines = [
        "## Equality of the formats",
        "",
        f"Largest absolute difference of any component from the checkpoint's, vectors at unit length, on random input "
        f"and on {about['num_compared']} pictures and texts of the shards, each loaded by the format's own library:",
        "",
        "| format | output | random | real |",
        "|---|---|---:|---:|",
    ]
    table = rows(about["max_abs_differences"])
    lines += [f"| {cell(name)} | {cell(output)} | {random:.1e} | {real:.1e} |" for name, output, random, real in table]
    left_out = [f"- {plain(reason)}" for reason in about["left_out"].values()]
    return [*lines, *(["", *left_out] if left_out else [])]


def _limits_section(config: TrainConfig, about: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Limits",
        "",
        "- It knows what its captions told it, and repeats what is wrong in them: synthetic captions name things that",
        "  are not in the picture, and web captions carry the prejudices of their writers. It was checked for neither.",
        f"- Pictures are made square of {config.image_px} px by squashing; other preprocessing gives other scores.",
        f"- Texts beyond {config.context_length} tokens, special ones included, are cut.",
    ]
    if config.tokenizer == "bert":
        lines.append("- Its text tower means nothing with a tokenizer other than the one in this folder.")
    if config.decoder == "queries":
        lines.append("- The captioner predicts all words at once and cannot be made to choose among sentences.")
    if "transformers" in about["formats"]:
        lines.append(
            '- `backend="pil"` resizes as training did; the default of transformers resizes a little otherwise.'
        )
    return lines


def _licence_section() -> list[str]:
    return [
        "## Licence",
        "",
        "None is stated yet. Whoever publishes this model fills it in here, and as `license` in the front matter, with",
        "regard to the data it was trained on. `clips export` leaves a card alone that somebody changed.",
    ]


# --- escaping ---------------------------------------------------------------------------------------------------------


def code(value: Any) -> str:
    """A code span of one line that holds ``value`` whatever it is, without characters that cannot be seen."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) > MOST_CHARACTERS:
        text = text[:MOST_CHARACTERS] + "…"
    seen = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text) or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", seen)), default=0) + 1)
    pad = " " if seen.startswith("`") or seen.endswith("`") else ""
    return f"{fence}{pad}{seen}{pad}{fence}"


def cell(value: Any) -> str:
    """``code`` for a table, where a bar would begin the next cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return code(text.replace("|", "\N{BROKEN BAR}"))


def plain(text: str) -> str:
    """A sentence of ours, with nothing that Markdown or HTML would read otherwise."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
