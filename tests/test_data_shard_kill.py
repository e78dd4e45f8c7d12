"""SIGKILL at twenty random moments of ``clips shard`` with several processes: the end is as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pairsmaker
import pytest

from clips_data import ledger
from clips_data.verify import verify

NUM_FOLDERS = 2
NUM_SHARDS, PAIRS_ROWS, SHARD_ROWS = 3, 20, 1
NUM_TARS = NUM_SHARDS * (PAIRS_ROWS - 1)
PATIENCE_S = 120.0


def start(work: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "clips_cli", "shard", "--work", str(work), "--processes", "2",
        "--shard-rows", str(SHARD_ROWS), "--heldout-ratio", "0.2",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def content(work: Path) -> dict[str, str]:
    """Digests of all files in the folder of shards but sidecars, locks and what is not finished."""
    files = [path for path in (work / "shards").glob("*") if path.is_file() and not path.name.startswith(".")]
    finished = [path for path in files if not path.name.endswith((ledger.PART, ledger.SIDECAR))]
    return {path.name: ledger.digest_file(path) for path in finished}


def finish(work: Path) -> dict[str, str]:
    process = start(work)
    _, said = process.communicate()
    assert process.returncode == 0, said
    return content(work)


def kill_when(work: Path, num_finished: int, chance: random.Random) -> bool:
    """Starts the command and kills it once so many tars are finished; whether it was still at work."""
    process = start(work)
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and len(ledger.finished_units(work / "shards")) < num_finished:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.03))
    was_at_work = process.poll() is None
    if chance.random() < 0.5 and was_at_work:
        os.killpg(process.pid, signal.SIGKILL)  # the machine's end: all processes at once
    else:
        process.kill()  # only the parent: its workers must notice
    process.communicate()
    return was_at_work


def killed(work: Path, wanted: dict[str, str], seed: int, num_kills: int) -> int:
    """Kills runs in ``work`` until its share is done, and lets the last one end; how many kills met one at work."""
    chance, num_hit = random.Random(seed), 0
    for turn in range(num_kills):
        num_hit += kill_when(work, NUM_TARS * turn // num_kills + chance.randrange(3), chance)
        found, finished = content(work), ledger.finished_units(work / "shards")
        for unit in finished:
            for name in (f"{unit}.tar", f"{unit}.index.parquet"):
                assert found[name] == wanted[name], "what a sidecar names is whole"
        assert "index.json" not in found or len(finished) == NUM_TARS
    assert finish(work) == wanted
    assert verify(work, gc=True).is_sound and verify(work).orphans == []
    assert content(work) == wanted
    return num_hit


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_kills", [8, pytest.param(20, marks=pytest.mark.long)])
def test_many_kills_leave_the_bytes_of_an_undisturbed_run(tmp_path: Path, num_kills: int) -> None:
    works = [pairsmaker.write_work(tmp_path / str(n), num_shards=NUM_SHARDS, shard_rows=PAIRS_ROWS) for n in range(3)]
    wanted = finish(works[0])
    assert len(ledger.finished_units(works[0] / "shards")) == NUM_TARS and "index.json" in wanted
    with ThreadPoolExecutor(NUM_FOLDERS) as side_by_side:
        hits = list(
            side_by_side.map(lambda n: killed(works[n], wanted, n, num_kills // NUM_FOLDERS), range(1, 1 + NUM_FOLDERS))
        )
    assert sum(hits) >= num_kills * 3 // 4, "kills that come after the end show nothing"
