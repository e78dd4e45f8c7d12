"""The export: the libraries load it and agree, or it does not appear. Its captioner and its card come along."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import goldens
import open_clip
import pytest
import runmaker
import shardmaker
import torch
import yaml

from clips_data import ledger
from clips_data.errors import ResumeRefused, UserError
from clips_train import checkpoint, export_card, export_decoder, generate
from clips_train import export as export_module
from clips_train.config import TrainConfig
from clips_train.export import export
from clips_train.generate import load_trained
from clips_train.train import train
from clips_train.transforms import normalise, squash
from clips_train.use_config import ExportConfig

OPEN_CLIP = ExportConfig(formats=("open_clip",))
HOSTILE = "<script>alert(1)</script> | `x` \x1b[31m \u202e [a](javascript:b)\n# h"


def train_tiny(folder: Path, **change: Any) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    shards = shardmaker.write_shards(folder / "shards", num_train=8)
    settings: dict[str, Any] = {
        "size": "tiny", "image_px": 32, "context_length": 12, "target_length": 16, "batch": 8, "samples": 8, "lr": 1e-2,
        "warmup_samples": 0, "caption_negatives": 50,
    }  # fmt: skip
    train(TrainConfig(**settings | change), shards=shards, out=folder / "run", quiet=True)
    return folder / "run", shards


def untrained(folder: Path, **change: Any) -> tuple[Path, Path]:
    """A run without training: as good as a trained one for whatever does not look at what it learnt."""
    torch.set_num_threads(1)
    run = runmaker.write_run(folder / "run", spread=50.0, **{"image_px": 32, "target_length": 16, **change})
    return run, shardmaker.write_shards(folder / "shards", num_train=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return train_tiny(tmp_path_factory.mktemp("export"))


def test_a_run_is_exported_to_all_libraries_that_need_nothing_more(run: tuple[Path, Path]) -> None:
    pytest.importorskip("transformers")
    folder, shards = run
    facts = export(ExportConfig(), run=folder, shards=shards)
    assert facts["formats"] == "open_clip, timm, transformers" and facts["num_compared"] == 8
    differences = {name: value for name, value in facts.items() if name.startswith("max_abs_difference_")}
    assert set(differences) == {f"max_abs_difference_{name}" for name in ("open_clip", "timm", "transformers", "llava")}
    assert max(differences.values()) <= 1e-5
    files = [path for path in (folder / "export").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}  # no pickles
    about = json.loads((folder / "export" / "clips_export.json").read_text())
    assert about["max_abs_differences"]["timm"]["image features"].keys() == {"random", "real"}
    assert about["versions"].keys() == {"open_clip", "timm", "transformers"}


def test_stock_open_clip_gives_our_features_from_files_to_pixels_to_features(run: tuple[Path, Path]) -> None:
    folder, shards = run
    export(ExportConfig(), run=folder, shards=shards)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'export'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'export'}")
    trained = load_trained(folder, "cpu")
    from io import BytesIO

    from PIL import Image

    picture = Image.open(BytesIO(shardmaker.sample(1)[0])).convert("RGB")
    with torch.inference_mode():
        image = model.encode_image(preprocess(picture).unsqueeze(0), normalize=True)
        text = model.encode_text(tokenizer(["a red circle"]), normalize=True)
        ours, _ = trained.model.encode_image(normalise(squash(picture, 32).unsqueeze(0)))
        our_text, _ = trained.model.encode_text(trained.tokenizer.text_ids(["a red circle"], 12))
    torch.testing.assert_close(image, ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(text, our_text, rtol=0, atol=1e-5)


def test_a_model_of_the_sigmoid_loss_keeps_its_bias(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path, contrastive="sigmoid")
    export(OPEN_CLIP, run=folder, shards=shards)
    stock, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'export'}")
    trained = load_trained(folder, "cpu").model
    assert trained.logit_bias is not None
    assert stock.logit_bias.item() == trained.logit_bias.item() != 0


def test_a_model_that_masks_padding_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path, text_padding="trimmed")
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
    with pytest.raises(UserError, match=r"open_clip loads it with features that differ .* more than the tolerance"):
        export(ExportConfig(tolerance=1e-7), run=folder, shards=shards, overwrite=True)
    assert sorted((folder / "export").glob("*")) == before


def test_a_tokenizer_that_gives_other_ids_leaves_no_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, shards = untrained(tmp_path)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: lambda texts: torch.ones(len(texts), 12).long())
    with pytest.raises(UserError, match="open_clip gives other token ids than training did for 'red square photo 8"):
        export(OPEN_CLIP, run=folder, shards=shards)
    assert not (folder / "export").exists()


# --- once made --------------------------------------------------------------------------------------------------------


def test_an_export_is_skipped_when_made_and_refused_when_of_another_checkpoint_or_without_a_format(
    run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shards = run
    first = export(ExportConfig(), run=folder, shards=shards)
    monkeypatch.setattr(export_module, "load_trained", None)
    assert export(ExportConfig(), run=folder, shards=shards) == first
    assert export(OPEN_CLIP, run=folder, shards=shards) == first
    with pytest.raises(ResumeRefused, match=r"without onnx\. Use --overwrite"):
        export(ExportConfig(formats=("onnx",)), run=folder, shards=shards)
    path = folder / "export" / "clips_export.json"
    about = path.read_text()
    path.write_text(about.replace(json.loads(about)["weights_sha256"], "0" * 64))
    with pytest.raises(ResumeRefused, match="--overwrite"):
        export(ExportConfig(), run=folder, shards=shards)
    path.write_text(about)


def test_an_export_that_is_further_off_than_is_now_asked_for_is_refused(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path)
    first = export(OPEN_CLIP, run=folder, shards=shards)
    path = folder / "export" / "clips_export.json"
    about = json.loads(path.read_text())
    about["max_abs_differences"]["open_clip"]["image features"]["real"] = 5e-5
    path.write_text(json.dumps(about))
    assert export(OPEN_CLIP, run=folder, shards=shards)["checkpoint"] == first["checkpoint"]
    with pytest.raises(ResumeRefused, match=r"open_clip is further off than 1e-05\. .*--overwrite"):
        export(OPEN_CLIP.model_copy(update={"tolerance": 1e-5}), run=folder, shards=shards)


def test_an_export_of_an_older_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path)
    newest = checkpoint.find(folder)
    older = {"checkpoint": newest.name, "weights_sha256": ledger.digest_file(newest / checkpoint.WEIGHTS)}
    (folder / "export").mkdir()
    (folder / "export" / "clips_export.json").write_text(json.dumps(older))
    with pytest.raises(ResumeRefused, match="--overwrite"):
        export(OPEN_CLIP, run=folder, shards=shards)
    assert export(OPEN_CLIP, run=folder, shards=shards, overwrite=True)["formats"] == "open_clip"


def test_the_card_takes_up_new_scores_unless_somebody_changed_it(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path)
    export(OPEN_CLIP, run=folder, shards=shards)
    card = folder / "export" / "README.md"
    assert "Not scored yet" in card.read_text()
    (folder / "eval").mkdir()
    score = {"value": 0.25, "low": 0.2, "high": 0.3125}
    (folder / "eval" / "coco.json").write_text(json.dumps({"scores": {"text_to_image_r1": score}}))
    export(OPEN_CLIP, run=folder, shards=shards)
    assert "| `coco` | `text_to_image_r1` | 0.25 | 0.2 to 0.3125 |" in card.read_text()
    export(OPEN_CLIP, run=folder, shards=shards)
    card.write_text(card.read_text() + "The licence is mine.\n")
    (folder / "eval" / "coco.json").unlink()
    export(OPEN_CLIP, run=folder, shards=shards)
    assert card.read_text().endswith("mine.\n") and "`coco`" in card.read_text()


# --- the captioner ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"decoder": "teacher_forced", "condition_drop": 0.1},
        {"decoder": "teacher_forced", "fusion": "cross_attention", "condition": None},
        {"condition": {"web": 0.5, "synthetic": 0.5}, "contrastive": "sigmoid"},
    ],
)
def test_the_captioner_of_an_export_writes_what_the_checkpoints_does(change: dict[str, Any], tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path, **change)
    export(OPEN_CLIP, run=folder, shards=shards)
    there, here = export_decoder.load(folder / "export", "cpu"), load_trained(folder, "cpu")
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = ["a red circle", "", "blue"]
    assert (found := generate.captions(there, pixels, texts)) == generate.captions(here, pixels, texts)
    assert len({caption.text for caption in found}) > 1 and all(caption.ids for caption in found)
    assert there.needs_text == here.needs_text


def test_a_model_without_captioner_exports_none(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path, decoder="none", caption_weight=0)
    export(OPEN_CLIP, run=folder, shards=shards)
    assert not list((folder / "export").glob("decoder*"))
    with pytest.raises(UserError, match="no export of a model with a captioner"):
        export_decoder.load(folder / "export")


def test_a_captioner_whose_files_do_not_belong_together_is_refused(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path)
    export(OPEN_CLIP, run=folder, shards=shards)
    path = folder / "export" / "decoder_config.json"
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "model": {**about["model"], "target_length": 8}}))
    with pytest.raises(UserError, match=r"decoder.queries is \[16, 128\] in the checkpoint and \[8, 128\]"):
        export_decoder.load(folder / "export")
    for damaged in ("{", "[]", json.dumps({"schema_version": 1}), json.dumps({**about, "schema_version": 99})):
        path.write_text(damaged)
        with pytest.raises(UserError, match="not written by this version of clips"):
            export_decoder.load(folder / "export")


def test_an_export_whose_captioner_writes_otherwise_does_not_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shards = untrained(tmp_path)
    original = export_decoder.load

    def other(*given: Any) -> Any:
        trained = original(*given)
        trained.model.decoder.head.weight.data.neg_()
        return trained

    monkeypatch.setattr(export_decoder, "load", other)
    with pytest.raises(UserError, match="its captioner writes"):
        export(OPEN_CLIP, run=folder, shards=shards)
    assert not (folder / "export").exists()


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not goldens.BERT_VOCAB.exists(), reason="the BERT vocabulary is not here")
def test_stock_open_clip_gives_the_golden_ids_after_export(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder, shards = untrained(tmp_path, tokenizer="bert", bert_vocab=str(goldens.BERT_VOCAB), context_length=80)
    export(OPEN_CLIP, run=folder, shards=shards)
    assert str(goldens.BERT_VOCAB) not in (folder / "export" / "decoder_config.json").read_text()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'export'}")
    # [unused0] is a token of its own to stock open_clip; the reference cuts texts of 128 slots at 80 (golden/README).
    cases = [
        case
        for case in goldens.cases("tokenizer")
        if "[unused" not in case["text"] and not (case["truncated"] and case["context_length"] != 80)
    ]
    for case in cases:
        ids = tokenizer([case["text"]], context_length=case["context_length"])[0].tolist()
        assert ids == case["ids"], (case["text"][:60], case["context_length"])
    assert len(cases) > 90
    there = export_decoder.load(folder / "export", "cpu")
    assert torch.equal(there.tokenizer.text_ids(["Ein Café"], 80), tokenizer(["Ein Café"]))


# --- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_has_the_hubs_front_matter_and_every_snippet_is_python(run: tuple[Path, Path]) -> None:
    folder, shards = run
    (shards / "README.md").write_text("# Dataset card\n")
    export(ExportConfig(), run=folder, shards=shards, overwrite=True)
    card = (folder / "export" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "open_clip",
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "clips", "timm", "transformers"],
    }
    assert "None is stated yet. Whoever publishes this model fills it in" in body
    assert "[DATA.md](DATA.md)" in body and (folder / "export" / "DATA.md").read_text() == "# Dataset card\n"
    assert "| `heldout` | 8 |" in body and "| `lr` | `0.01` |" in body
    assert (
        len(re.findall(r"\| `(?:open_clip|timm|transformers|llava)` \| `[^`]+` \| [0-9.e+-]+ \| [0-9.e+-]+ \|", body))
        == 8
    )
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(snippet, "card", "exec")


def test_the_snippets_of_the_card_do_what_they_say(run: tuple[Path, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    folder, shards = run
    export(ExportConfig(), run=folder, shards=shards)
    card = (folder / "export" / "README.md").read_text()
    small = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    given = {"language_model": type("LanguageModel", (), {"config": small})}
    given |= {"pixels": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "web_captions": ["a", "b"]}
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(snippet.replace("FOLDER", str(folder / "export")), given)
    assert len(given["captions"]) == 2 and given["llava"].config.vision_feature_layer == -2


def test_scores_of_other_weights_are_named_and_left_out(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path)
    (folder / "eval").mkdir()
    scores = {"top1": {"value": 0.5, "low": 0.4, "high": 0.6}}
    (folder / "eval" / "old.json").write_text(json.dumps({"scores": scores, "model": {"digest": "0" * 64}}))
    (folder / "eval" / "older.json").write_text(json.dumps({"retrieval": {"r1": 0.125}, "checkpoint": "step-9"}))
    (folder / "eval" / "mine.json").write_text(
        json.dumps({"retrieval": {"r1": 0.125, "chance_r1": 0.1}, "checkpoint": "step-00000000"})
    )
    (folder / "eval" / "eval.done.json").write_text(json.dumps({"counts": {}}))
    export(OPEN_CLIP, run=folder, shards=shards)
    card = (folder / "export" / "README.md").read_text()
    assert "Left out, as they are of other weights: `old.json`, `older.json`." in card
    assert "| `mine` | `r1` | 0.125 |  |" in card and "chance" not in card and "top1" not in card


def test_hostile_names_stay_inert_in_the_card(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path, condition=HOSTILE)
    index = json.loads((shards / "index.json").read_text())
    index["columns"].append(HOSTILE)
    index["about"] = {"licence": HOSTILE * 20}
    (shards / "index.json").write_text(json.dumps(index))
    (folder / "eval").mkdir()
    (folder / "eval" / "x.json").write_text(json.dumps({"scores": {HOSTILE: {"value": 1, "low": 0, "high": 1}}}))
    export(OPEN_CLIP, run=folder, shards=shards)
    card = (folder / "export" / "README.md").read_text()
    assert all(char.isprintable() or char == "\n" for char in card)
    for line in card.splitlines():
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)
        assert "script" not in outside and "javascript" not in outside, line
    (row,) = [line for line in card.splitlines() if line.startswith("| `condition` |")]
    assert row.count("|") == 3  # none of the hostile ones ends a cell
    assert len(card) < 20_000 and "\n# h" not in card


@pytest.mark.parametrize("text", ["", "`", "``", "a`b", "`a`", "\n", "x" * 1000, {"a": "`"}])
def test_code_spans_hold_any_text_on_one_line(text: Any) -> None:
    span = export_card.code(text)
    fence = re.match("`+", span)
    assert fence and span.endswith(fence[0]) and "\n" not in span
    inner = span[len(fence[0]) : -len(fence[0])]
    assert inner and fence[0] not in re.findall("`+", inner)


def test_a_finished_export_that_was_spoilt_is_refused_and_made_again(tmp_path: Path) -> None:
    folder, shards = untrained(tmp_path, decoder="none", caption_weight=0)
    config = ExportConfig(formats=("open_clip", "timm"))
    export(config, run=folder, shards=shards)
    weights, about = folder / "export" / "open_clip_model.safetensors", folder / "export" / "clips_export.json"
    for spoil, says in (
        (weights.unlink, "open_clip_model.safetensors of the finished export is not there any more"),
        (lambda: shutil.rmtree(folder / "export" / "timm"), "timm of the finished export is not there any more"),
        (lambda: about.write_text('{"checkpoint": 1'), "clips_export.json is damaged, or of an older version"),
        (lambda: about.write_text("{}"), "clips_export.json is damaged, or of an older version"),
    ):
        spoil()
        with pytest.raises(ResumeRefused, match=f"{says}.*--overwrite"):
            export(config, run=folder, shards=shards)
        export(config, run=folder, shards=shards, overwrite=True)
    assert export(config, run=folder, shards=shards)["num_compared"] > 0
