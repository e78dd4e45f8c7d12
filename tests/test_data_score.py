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

from clips_data import ledger, score
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


def test_the_table_says_who_scored_and_how(tmp_path: Path, model: str) -> None:
    run(pairsmaker.write_work(tmp_path), model)
    table = pq.read_schema(tmp_path / "scores" / "clip" / "00000.parquet")
    assert [(field.name, str(field.type)) for field in table][2:] == [("web", "float"), ("synthetic", "float")]
    metadata = {name.decode(): value.decode() for name, value in table.metadata.items()}
    assert json.loads(metadata["model"]) == model and json.loads(metadata["preprocessing"])["size"] == [16, 16]


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
