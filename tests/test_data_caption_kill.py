"""SIGKILL at twenty random moments of ``clips recaption``: no row twice, none missing, the same captions."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pairsmaker
import polars as pl
import pytest

from clips_data import ledger

NUM_SHARDS, SHARD_ROWS, NUM_KILLS, NUM_FOLDERS = 6, 30, 20, 4
NUM_CAPTIONS = 2 * NUM_SHARDS * (SHARD_ROWS - 1)
PROMPT = "inputs: [image, web]\nuser: 'Alt-text {web}'\nsampling: {temperature: 0.9, num_samples: 2}\n"


def start(work: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable, str(Path(__file__).parent / "captionmaker.py"), "recaption", "--work", str(work), "--prompt",
        str(work / "p.yaml"), "--column", "c", "--batch-rows", "4",
    ]  # fmt: skip
    settings = {"CAPTIONMAKER": json.dumps({"max_batch_rows": 4, "delay_s": 0.04})}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | settings | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        start_new_session=True,
    )


def new_work(folder: Path) -> Path:
    pairsmaker.write_pairs(folder, num_shards=NUM_SHARDS, shard_rows=SHARD_ROWS)
    (folder / "p.yaml").write_text(PROMPT)
    return folder


def content(work: Path) -> dict[str, str]:
    """Digests of everything that is promised to be the same bytes."""
    files = sorted((work / "captions").rglob("*.parquet"))
    return {path.relative_to(work).as_posix(): ledger.digest_file(path) for path in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    work = new_work(tmp_path_factory.mktemp("undisturbed"))
    process = start(work)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return content(work)


@pytest.mark.parametrize("folder", range(NUM_FOLDERS))
def test_captions_after_kills_are_those_of_an_undisturbed_run(
    tmp_path: Path, undisturbed: dict[str, str], folder: int
) -> None:
    work = new_work(tmp_path / "w")
    moments = random.Random(folder)
    in_the_middle = 0
    for kill in range(NUM_KILLS // NUM_FOLDERS):
        before = journalled_and_committed(work)
        process = start(work)
        if kill:  # the first falls anywhere, mostly before the first caption
            while process.poll() is None and journalled_and_committed(work) == before:
                time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.5))
        if kill % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:  # the parent alone: its engine must end by itself
            process.kill()
        process.communicate()
        in_the_middle += before < journalled_and_committed(work) < NUM_CAPTIONS
    process = start(work)
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert content(work) == undisturbed
    for column in ("c_0", "c_1"):
        table = pl.concat(pl.read_parquet(path) for path in sorted((work / "captions" / column).glob("*.parquet")))
        assert len(table) == table["key"].n_unique() == NUM_CAPTIONS // 2
        assert set(table["code"]) == {"ok"}
    assert not list((work / "captions").rglob("*.journal.jsonl"))
    assert in_the_middle >= 2, "too few kills fell between the first caption and the last"


def journalled_and_committed(work: Path) -> int:
    """Captions that no later run has to ask for."""
    committed = sum(len(pl.read_parquet(path, columns=["key"])) for path in (work / "captions").rglob("*.parquet"))
    lines = sum(path.read_bytes().count(b'"key"') for path in (work / "captions").rglob("*.journal.jsonl"))
    return committed + lines
