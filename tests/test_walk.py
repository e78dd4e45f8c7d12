"""The whole walk on real input: one small manifest from URLs to a report, undisturbed and killed on the way."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MANIFEST = """
name: walk
stages:
  download: {source: demo, num_pairs: 120, shard_rows: 40, min_success: 0.8}
  recaption: {column: synthetic, prompt: describe, batch_rows: 8}
  score: {}
  shard: {heldout_ratio: 0.25, heldout_max: 30, shard_rows: 40}
  train: {size: tiny, image_px: 96, batch: 16, samples: 320, warmup_samples: 32, checkpoint_samples: 32, log_steps: 1}
  eval: {}
  export: {}
  report: {gallery: 6}
"""
DATA_FOLDERS = ("pairs", "captions", "shards")


def start(manifest: Path, work: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cli", "run", str(manifest), "--work", str(work), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(manifest: Path, work: Path, *more: str) -> subprocess.CompletedProcess[str]:
    process = start(manifest, work, *more)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill_when(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    """SIGKILL to the main process alone, as a full memory would; its children have to notice by themselves."""
    for _ in range(3000):
        if ready():
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("the moment to kill never came")


def data_digests(work: Path) -> dict[str, str]:
    """Content of every tar, parquet and index file: what "the same bytes" promises."""
    return {
        str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in DATA_FOLDERS
        for path in sorted((work / folder).rglob("*"))
        if path.suffix in (".tar", ".parquet") or path.name == "index.json"
    }


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("manifest") / "walk.yaml"
    path.write_text(MANIFEST)
    return path


@pytest.fixture(scope="module")
def walked(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    work = tmp_path_factory.mktemp("undisturbed")
    return work, finish(manifest, work)


def test_the_walk_ends_with_a_table_of_all_stages_on_stdout(walked: tuple[Path, Any]) -> None:
    process = walked[1]
    for stage in ("download", "recaption", "score", "shard", "train", "eval", "export", "report"):
        assert stage in process.stdout


def test_img2dataset_downloaded_in_a_worker_process(walked: tuple[Path, Any]) -> None:
    work, _ = walked
    for path in sorted((work / "pairs").glob("*_stats.json")):
        stats = json.loads(path.read_text())
        assert stats["downloaded_by"] == "img2dataset.downloader.Downloader.download_shard"
        assert stats["worker_pid"] != stats["parent_pid"]
    assert len(list((work / "pairs").glob("*_stats.json"))) == 3


def test_every_url_has_one_row_and_faults_have_codes(walked: tuple[Path, Any]) -> None:
    import polars

    work, _ = walked
    rows = polars.read_parquet(work / "pairs" / "*.parquet")
    assert len(rows) == 120
    assert rows["key"].n_unique() == 120
    failed = rows.filter(polars.col("status") != "success")
    assert 0 < len(failed) < 24
    assert failed["code"].is_in(["ok"]).sum() == 0


def test_captions_say_that_vllm_made_them(walked: tuple[Path, Any]) -> None:
    import polars

    from clips_data.recaption.run import describe_metadata

    work, _ = walked
    paths = sorted((work / "captions" / "synthetic").glob("*.parquet"))
    assert len(paths) == 3
    for path in paths:
        about = describe_metadata(path)
        assert about["engine"] == "vllm"
        assert about["prompt"] == "describe"
        table = polars.read_parquet(path)
        assert set(table["engine"]) == {"vllm"}
        assert table.filter(polars.col("code") == "ok")["caption"].str.len_chars().min() > 50  # type: ignore[operator]


def test_stock_open_clip_loads_the_export(walked: tuple[Path, Any]) -> None:
    import open_clip
    import torch

    work, _ = walked
    folder = work / "runs" / "walk" / "export"
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.inference_mode():
        assert model.encode_text(tokenizer(["a red circle"])).shape == (1, 128)
    assert preprocess is not None


def test_running_again_skips_everything_and_changes_nothing(manifest: Path, walked: tuple[Path, Any]) -> None:
    work, _ = walked
    before = data_digests(work)
    process = finish(manifest, work)
    assert process.stderr.count("skipped") >= 8
    assert data_digests(work) == before


def test_killed_in_recaptioning_and_in_training_it_finishes_with_the_same_bytes(
    manifest: Path, walked: tuple[Path, Any], tmp_path: Path
) -> None:
    undisturbed, _ = walked
    process = start(manifest, tmp_path)
    column = tmp_path / "captions" / "synthetic"
    journal = column / "00001.journal.jsonl"
    kill_when(process, lambda: journal.exists() and journal.read_bytes().count(b"\n") > 8)
    kept = journal.read_bytes()
    assert not (column / "00001.parquet").exists()

    process = start(manifest, tmp_path)
    metrics = tmp_path / "runs" / "walk" / "metrics.jsonl"
    kill_when(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 6)
    assert not journal.exists()
    assert len(kept) > 0

    finish(manifest, tmp_path)
    assert data_digests(tmp_path) == data_digests(undisturbed)
    assert losses(tmp_path) == losses(undisturbed)


def losses(work: Path) -> list[tuple[int, float]]:
    lines = (work / "runs" / "walk" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


def test_a_changed_config_is_refused_with_exit_4_and_the_difference(manifest: Path, walked: tuple[Path, Any]) -> None:
    work, _ = walked
    before = data_digests(work)
    process = start(manifest, work, "--set", "shard.web_ratio=0.5")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 4
    assert "web_ratio" in err
    assert "Traceback" not in err
    assert data_digests(work) == before


def test_where_stderr_is_no_terminal_there_are_plain_lines_and_no_bars(walked: tuple[Path, Any]) -> None:
    process = walked[1]
    assert "\r" not in process.stderr
    assert "train: 1 made" in process.stderr
