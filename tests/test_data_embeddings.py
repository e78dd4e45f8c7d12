"""Stored features of teachers as ``clips verify``, ``--gc`` and ``clips stats`` see them; ``clips forget`` has its own
tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pairsmaker
import pytest
import teachermaker

from cli.main import main
from clips_data import embeddings, ledger, shard, stats
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job
from clips_data.verify import verify
from clips_train.shards import ShardReader, open_split

CONFIG = ShardConfig(shard_rows=4, heldout_ratio=0.4, heldout_max=3)


@pytest.fixture(autouse=True)
def fake_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    teachermaker.install(monkeypatch)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    pairsmaker.write_work(tmp_path)
    shard.run(CONFIG, Job(work=tmp_path, quiet=True))
    teachermaker.store(tmp_path)
    return tmp_path


def test_sound_features_have_nothing_to_tell_and_a_flipped_byte_is_found(work: Path) -> None:
    found = verify(work / "embeddings", deep=True)
    assert found.is_sound and not found.missing and not found.stale and not found.orphans and found.num_files == 3
    file = work / "embeddings" / "teacher" / "train-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert list(verify(work).corrupt) == ["embeddings/teacher/train-00001.safetensors"]


def test_features_of_other_shards_are_told_as_such(work: Path) -> None:
    shutil.rmtree(work / "shards")
    shard.run(CONFIG.model_copy(update={"web_ratio": 0.1}), Job(work=work, quiet=True))
    stale = verify(work).stale
    assert set(stale) == {f"embeddings/teacher/{unit}.done.json" for unit in ledger.finished_units(work / "shards")}
    assert all("was made from another shards/" in reason for reason in stale.values())


def test_features_that_are_missing_for_a_tar_are_told_only_for_splits_that_were_begun(work: Path) -> None:
    folder = work / "embeddings" / "teacher"
    ledger.remove_unit(folder, "train-00001")
    assert verify(work).missing == {"embeddings/teacher": ["train-00001"]}
    ledger.remove_unit(folder, "heldout-00000")
    assert verify(work).missing == {"embeddings/teacher": ["train-00001"]}


def test_features_in_another_order_than_their_tar_are_a_contradiction(work: Path) -> None:
    folder = work / "embeddings" / "teacher"
    one, other = (folder / f"train-0000{number}.safetensors" for number in range(2))
    sidecar = ledger.read_sidecar(folder, "train-00000")
    assert sidecar is not None
    ledger.part(one).write_bytes(other.read_bytes())
    ledger.commit(
        folder, "train-00000", [one.name], inputs=sidecar.inputs, config=sidecar.config, counts=sidecar.counts
    )
    told = verify(work).contradictions["embeddings/teacher/train-00000.safetensors"]
    assert any("row 0 is not of the sample that train-00000.index.parquet has there" in text for text in told)


def test_gc_removes_what_a_killed_run_left_and_no_features(work: Path) -> None:
    folder = work / "embeddings" / "teacher"
    for name in ("train-00007.safetensors", "train-00008.safetensors.part"):
        (folder / name).write_bytes(b"half")
    found = verify(work, gc=True)
    assert found.removed == [f"embeddings/teacher/train-0000{end}" for end in ("7.safetensors", "8.safetensors.part")]
    assert verify(work).is_sound and teachermaker.store(work).made == 0


def test_a_damaged_index_is_named_with_the_command_that_makes_it_again(work: Path) -> None:
    (work / "embeddings" / "teacher" / "index.json").write_text("{")
    assert "`clips embed`" in verify(work).corrupt["embeddings/teacher/index.json"]
    with pytest.raises(UserError, match=r"index.json is damaged.*clips embed"):
        stats.gather(work)


def test_stats_count_rows_with_their_denominator_and_say_what_is_stored(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (found,) = stats.gather(work)["embeddings"].values()
    samples = stats.gather(work)["shards"]["succeeded"]
    assert found["attempted"] == found["succeeded"] == samples and found["failures"] == {}
    assert (found["teachers"], found["augmentations"], found["width"], found["type"]) == ("fake", 2, 2, "F32")
    assert (found["texts"], found["complete_splits"]) == ("web, synthetic", "heldout, train")
    for folder in ("embeddings", "embeddings/teacher"):
        assert stats.gather(work / folder) == {"embeddings": {"teacher": found}}
    assert main(["stats", "--work", str(work)]) == 0
    assert f"{samples} of {samples}" in capsys.readouterr().out
    (work / "embeddings" / "teacher" / "index.json").unlink()
    assert stats.gather(work)["embeddings"]["teacher"]["complete_splits"] == "none"


@pytest.mark.parametrize("spoil", ["short", "header", "none"])
def test_a_file_that_is_no_file_of_features_is_named(work: Path, spoil: str) -> None:
    path = work / "embeddings" / "teacher" / "train-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes({"short": data[:-1], "header": b"\xff" * 8 + data[8:], "none": b""}[spoil])
    with pytest.raises(UserError, match=r"train-00000.safetensors cannot be read"):
        embeddings.read(path)


def test_keys_are_those_of_the_tar_in_its_order(work: Path) -> None:
    folder = work / "embeddings" / "teacher"
    index = json.loads((folder / "index.json").read_text())
    for name, split in index["splits"].items():
        stored = [embeddings.read(folder / file).keys() for file in split["files"]]
        reader = ShardReader(open_split(work / "shards", name))
        rows = enumerate(reader.split.num_samples_by_shard)
        assert stored == [[reader.key(tar, row) for row in range(number)] for tar, number in rows], name
        assert sum(map(len, stored)) == split["num_samples"] > 0
