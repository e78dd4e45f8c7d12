"""``clips score`` with a tiny randomly initialised model that stock open_clip loads."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pairsmaker
import pyarrow.parquet as pq
import pytest

from clips_data import duplicates, ledger, near_duplicates, score, score_table, split
from clips_data.config import ScoreConfig
from clips_data.errors import ResumeRefused, UserError
from clips_data.executor import Job, Report

MODEL = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tiny = open_clip.CLIP(**MODEL["model_cfg"])
    save_file(
        {name: value.contiguous() for name, value in tiny.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(MODEL))
    return f"local-dir:{folder}"


def run(work: Path, model: str, overwrite: bool = False, limit: int | None = None, **options: Any) -> Report:
    config = ScoreConfig(**{"model": model, "batch": 4, **options})
    return score.run(config, Job(work=work, quiet=True, overwrite=overwrite, limit=limit))


def rows(work: Path, unit: str = "00000") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(work / "scores" / "clip" / f"{unit}.parquet").to_pylist()
    return found


def test_scores_are_the_cosines_of_stock_open_clip(tmp_path: Path, model: str) -> None:
    import open_clip
    import torch
    from PIL import Image

    report = run(pairsmaker.write_work(tmp_path), model)
    assert report.counts == {"ok": 10} and report.made == 2
    stock, preprocess = open_clip.create_model_from_pretrained(model)
    tokenize = open_clip.get_tokenizer(model)
    numbers = [0, 1, 2, 4, 5]
    images = [Image.open(io.BytesIO(pairsmaker.image_bytes(n))).convert("RGB") for n in numbers]
    with torch.inference_mode():
        image_NE = stock.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        for column, caption in (("web", pairsmaker.web_caption), ("synthetic", pairsmaker.synthetic_caption)):
            text_NE = stock.encode_text(tokenize([caption(n) for n in numbers]), normalize=True)
            wanted = (image_NE * text_NE).sum(1).tolist()
            assert [row[column] for row in rows(tmp_path)] == pytest.approx(wanted, abs=0.02)
    assert len({round(row["web"], 4) for row in rows(tmp_path)}) > 1


def test_an_empty_caption_has_no_score_and_is_counted(tmp_path: Path, model: str) -> None:
    pairsmaker.write_pairs(tmp_path)
    pairsmaker.write_captions(tmp_path, change=lambda number, row: pairsmaker.reject(row) if number == 2 else None)
    assert run(tmp_path, model).counts == {"ok": 9, "caption_missing": 1}
    (row,) = [row for row in rows(tmp_path) if row["key"] == "000000002"]
    assert row["synthetic"] is None and isinstance(row["web"], float)
    assert row["synthetic_flags"] == [] and row["web_flags"] == []


def test_the_table_says_who_scored_and_how(tmp_path: Path, model: str) -> None:
    run(pairsmaker.write_work(tmp_path), model)
    table = pq.read_schema(tmp_path / "scores" / "clip" / "00000.parquet")
    flags = "list<element: string>"
    assert [(field.name, str(field.type)) for field in table] == [
        ("key", "string"), ("sha256", "string"), ("web", "float"), ("synthetic", "float"), ("web_flags", flags),
        ("synthetic_flags", flags),
    ]  # fmt: skip
    metadata = {name.decode(): value.decode() for name, value in table.metadata.items()}
    assert json.loads(metadata["model"]) == model and json.loads(metadata["preprocessing"])["size"] == [16, 16]
    assert json.loads(metadata["pretrained"]) is None and json.loads(metadata["precision"]) == "bf16 autocast"


def test_a_second_run_skips_and_equal_runs_are_equal_bytes(tmp_path: Path, model: str) -> None:
    for name in ("a", "b"):
        run(pairsmaker.write_work(tmp_path / name), model)
    files = [tmp_path / name / "scores" / "clip" / "00001.parquet" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    again = run(tmp_path / "a", model)
    assert (again.made, again.skipped, again.counts) == (0, 2, {"ok": 10})
    pairsmaker.write_captions(tmp_path / "a", change=lambda number, row: row.update(caption="other"))
    with pytest.raises(ResumeRefused, match="input captions/synthetic"):
        run(tmp_path / "a", model)


def test_a_limit_finishes_only_whole_shards(tmp_path: Path, model: str) -> None:
    report = run(pairsmaker.write_work(tmp_path), model, limit=7)
    assert report.made == 1 and ledger.finished_units(tmp_path / "scores" / "clip") == ["00000"]


def test_models_that_cannot_be_loaded_are_clear(tmp_path: Path) -> None:
    pairsmaker.write_work(tmp_path)
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        run(tmp_path, f"local-dir:{tmp_path}/nowhere")
    with pytest.raises(UserError, match="Add --pretrained TAG"):
        run(tmp_path, "ViT-B-32")
    with pytest.raises(UserError, match="open_clip could not load --model ViT-nonsense"):
        run(tmp_path, "ViT-nonsense", pretrained="openai")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="open_clip could not load"):
        run(tmp_path, f"local-dir:{tmp_path}/empty")


def test_without_torch_the_message_says_how_to_install_it(tmp_path: Path, model: str, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match=r"pip install 'clips\[train\]'"):
        run(pairsmaker.write_work(tmp_path), model)


@pytest.mark.parametrize(
    ("columns", "message"), [(("web", "web"), "Name each column once"), ((), "names no caption column")]
)
def test_columns_are_some_and_each_named_once(
    tmp_path: Path, model: str, columns: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(pairsmaker.write_work(tmp_path), model, columns=columns)
    assert not (tmp_path / "scores").exists()


def test_images_that_repeat_an_earlier_one_are_not_scored(tmp_path: Path, model: str) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        if number in (4, 8):
            row["image"] = pairsmaker.image_bytes(1)

    pairsmaker.write_pairs(tmp_path, change=change)
    pairsmaker.write_captions(tmp_path, change=lambda number, row: pairsmaker.reject(row) if number == 2 else None)
    duplicates.write(tmp_path / "pairs", "sha256")
    whole = run(tmp_path, model, sentences=True, support=3)
    assert whole.counts == {"ok": 7, "caption_missing": 1, "duplicate": 2}
    (row,) = [row for row in rows(tmp_path) if row["key"] == "000000004"]
    assert row.pop("sha256") and row.pop("key") and set(row.values()) == {None}
    table = pq.read_table(tmp_path / "scores" / "clip" / "00000.parquet")
    assert score_table.count(table) == {"ok": 3, "caption_missing": 1, "duplicate": 1}
    (tmp_path / "pairs" / duplicates.FOLDER / "duplicates.done.json").unlink()
    assert run(tmp_path, model, sentences=True, support=3).counts == {"ok": 9, "caption_missing": 1}


def test_sentences_are_scored_one_by_one(tmp_path: Path, model: str) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        if number == 0:
            row["caption"] = "…"  # has no sentence, so it is one as a whole
        if number == 2:
            pairsmaker.reject(row)

    pairsmaker.write_pairs(tmp_path)
    pairsmaker.write_captions(tmp_path, change=change)
    run(tmp_path, model, sentences=True, columns=("synthetic",))
    scorer = score.load_scorer(model, None, name="")
    for number, row in zip((0, 1, 2, 4, 5), rows(tmp_path), strict=True):
        text = pairsmaker.synthetic_caption(number)
        pieces = ["…"] if number == 0 else [text[start:end] for start, end in split.split(text, "sentence")]
        if number == 2:
            assert row["synthetic_sentences"] is None and row["synthetic_min_sentence"] is None
            continue
        image_NE = scorer.image_features([pairsmaker.image_bytes(number)] * len(pieces), [""] * len(pieces))
        wanted = scorer.similarities(image_NE, pieces)
        assert row["synthetic_sentences"] == pytest.approx(wanted, abs=0.02) and len(pieces) in (1, 3)
        assert row["synthetic_min_sentence"] == min(row["synthetic_sentences"])


def test_support_is_told_of_the_captions_of_the_same_shard(tmp_path: Path, model: str) -> None:
    report = run(pairsmaker.write_work(tmp_path), model, support=2)
    assert report.counts == {"ok": 10}
    for row in rows(tmp_path):
        assert 0 < row["web_support"] < 1 and 0 < row["synthetic_support"] < 1


def test_near_duplicates_are_told_after_the_last_shard_without_scoring_again(tmp_path: Path, model: str) -> None:
    pairsmaker.write_work(tmp_path)
    folder = tmp_path / "scores" / "clip"
    first = run(tmp_path, model, limit=7, near_duplicates=True)
    assert first.made == 1 and "1 are not yet" in first.notes[0] and near_duplicates.read(folder, "00000") is None
    assert run(tmp_path, model).made == 1
    again = run(tmp_path, model, near_duplicates=True)
    assert again.made == 0 and again.facts == {"near_duplicates_web": 0, "near_duplicates_synthetic": 0}
    table = near_duplicates.read(folder, "00000")
    assert table is not None
    assert table.columns == ["key", "web_near_duplicate_of", "synthetic_near_duplicate_of"]


def test_a_run_of_ours_scores_as_its_export_does(tmp_path: Path) -> None:
    from clips_data.schema import SCHEMA_VERSION
    from clips_train import checkpoint, export, export_open_clip, generate
    from clips_train.config import TrainConfig
    from clips_train.export_towers import Towers
    from clips_train.model import build_model
    from clips_train.towers import open_clip_config

    config = TrainConfig(size="tiny", image_px=32, decoder=False, caption_weight=0)
    folder = tmp_path / "runs" / "first" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    from safetensors.torch import save_file

    save_file(export_open_clip.plain(build_model(config.model).state_dict()), folder / checkpoint.WEIGHTS)
    about = {"schema_version": SCHEMA_VERSION, "step": 1, "samples": 1, "config": config.model_dump(mode="json")}
    (folder / checkpoint.ABOUT).write_text(json.dumps(about))
    (folder.parent / checkpoint.LATEST).write_text(folder.name + "\n")
    exported = tmp_path / "export"
    exported.mkdir()
    model = generate.load_trained(folder, "cpu").model
    export.write_open_clip(Towers(model, open_clip_config(config.model)), config.model, exported)
    pairsmaker.write_work(tmp_path)
    found = []
    for name in (str(tmp_path / "runs" / "first"), f"local-dir:{folder}", str(exported)):
        run(tmp_path, name, overwrite=True)
        found.append([row[column] for row in rows(tmp_path) for column in ("web", "synthetic")])
    assert found[0] == found[1] == pytest.approx(found[2], abs=0.01) and len(set(found[0])) > 5
    masked = {**about, "config": {**about["config"], "text_padding": "trimmed"}}
    (folder / checkpoint.ABOUT).write_text(json.dumps(masked))
    run(tmp_path, str(folder), overwrite=True)
    assert [row["web"] for row in rows(tmp_path)] != pytest.approx(found[0][::2], abs=1e-6), "padding is attended to"
