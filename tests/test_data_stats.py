"""Counts with denominators (``stats``), and evidence about finished files (``verify``)."""

from __future__ import annotations

import json
from pathlib import Path

import pairsmaker
import pytest

from clips_data import ledger, shard, stats, verify
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job


@pytest.fixture
def work(tmp_path: Path) -> Path:
    def spoil_caption(number: int, row: pairsmaker.Row) -> None:
        if number in (1, 2):
            pairsmaker.reject(row, "refused" if number == 1 else "loop")
        row["flags"] = ["hit_token_cap"] if number == 4 else []

    def spoil_pair(number: int, row: pairsmaker.Row) -> None:
        row["caption"] = "" if number in (2, 5) else row["caption"]

    pairsmaker.write_pairs(tmp_path, change=spoil_pair)
    pairsmaker.write_captions(tmp_path, change=spoil_caption)
    config = ShardConfig(shard_rows=4, web_ratio=1.0, heldout_ratio=0.4, heldout_max=3)
    shard.run(config, Job(work=tmp_path, quiet=True))
    return tmp_path


def test_every_stage_is_counted_with_its_denominator(work: Path) -> None:
    found = stats.gather(work)
    assert json.loads(json.dumps(found)) == found
    download = found["download"]
    assert (download["attempted"], download["succeeded"], download["failures"]) == (12, 10, {"http_4xx": 2})
    assert download["web_caption_words"]["num"] == 8 and download["web_caption_words"]["mean"] == 4
    captions = found["captions"]["synthetic"]
    assert (captions["attempted"], captions["succeeded"]) == (10, 8)
    assert captions["failures"] == {"loop": 1, "refused": 1} and captions["flags"] == {"hit_token_cap": 1}
    assert captions["caption_words"]["median"] == 16
    shards = found["shards"]
    assert (shards["attempted"], shards["succeeded"], shards["failures"]) == (10, 9, {"no_caption": 1})
    assert sum(shards["splits"].values()) == 9 and 0 < shards["splits"]["heldout"] <= 3
    assert shards["fallbacks"] == {"synthetic_for_missing_web": 1} and shards["txt"] == {"web": 8, "synthetic": 1}
    assert shards["web_ratio"] == {"wanted": 1.0, "realised": round(8 / 9, 6)}
    assert shards["sub_captions"]["synthetic"] == {"num": 9, "min": 0, "mean": 2.6667, "median": 3, "p95": 3, "max": 3}


def test_an_empty_folder_has_no_stages(tmp_path: Path) -> None:
    assert stats.gather(tmp_path) == {}


def test_an_undisturbed_folder_is_intact(work: Path) -> None:
    found = verify.verify(work)
    assert found.num_intact == found.num_files > 6 and not found.corrupt and not found.orphans


def test_corrupt_cut_and_missing_files_are_named(work: Path) -> None:
    flipped = bytearray((work / "pairs" / "00000.tar").read_bytes())
    flipped[600] ^= 1
    (work / "pairs" / "00000.tar").write_bytes(bytes(flipped))
    (work / "pairs" / "00001.parquet").write_bytes(b"cut")
    (work / "captions" / "synthetic" / "00000.parquet").unlink()
    (work / "captions" / "synthetic" / "00001.done.json").write_text("{")
    assert verify.verify(work, gc=True).corrupt == {
        "captions/synthetic/00000.parquet": "is missing",
        "captions/synthetic/00001.done.json": "is not a sidecar that clips wrote",
        "pairs/00000.tar": "has another content than when it was finished",
        "pairs/00001.parquet": "has 3 bytes instead of " + str(_promised(work, "00001", "00001.parquet")),
    }
    assert (work / "pairs" / "00000.tar").exists()


def _promised(work: Path, unit: str, name: str) -> int:
    return int(json.loads((work / "pairs" / f"{unit}.done.json").read_text())["files"][name]["bytes"])


def test_gc_removes_orphans_and_nothing_else(work: Path) -> None:
    before = {path for path in work.rglob("*") if path.is_file()}
    orphans = [
        work / "shards" / "train-00009.tar.part",
        work / "shards" / "train-00009.tar",
        work / "runs" / "a.json.part",
    ]
    kept = [work / "shards" / "notes.txt", work / "captions" / "synthetic" / "00002.journal.jsonl", work / "mine.tar"]
    for path in (*orphans, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert verify.verify(work).orphans == sorted(path.relative_to(work).as_posix() for path in orphans)
    assert verify.verify(work, gc=True).removed
    assert {path for path in work.rglob("*") if path.is_file()} == before | set(kept)
    assert verify.verify(work).orphans == []


def test_a_corrupt_sidecar_keeps_its_files_from_gc(work: Path) -> None:
    ledger.sidecar_path(work / "pairs", "00000").write_text("{")
    verify.verify(work, gc=True)
    assert (work / "pairs" / "00000.tar").exists()


def test_a_folder_without_finished_work_is_clear(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished work"):
        verify.verify(tmp_path)
