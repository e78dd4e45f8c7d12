"""Duplicates are marked beside the shards: the first image per hash is kept, by key, and marks know their shards."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pairsmaker
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips_data import duplicates, ledger, schema, shard, stats, verify
from clips_data.config import ShardConfig
from clips_data.errors import ResumeRefused, UserError
from clips_data.executor import Job


def write_shards(pairs: Path, shards: Sequence[Sequence[str | None]], *, first_shard: int = 0) -> list[str]:
    """Tables whose rows have just these hashes; ``None`` is a row that failed. Every third has the phash ``near``."""
    pairs.mkdir(parents=True, exist_ok=True)
    units = []
    for number, hashes in enumerate(shards, first_shard):
        unit = schema.shard_name(number)
        rows = {
            "key": [schema.sample_key(number, i) for i in range(len(hashes))],
            "status": ["failed_to_download" if sha256 is None else schema.STATUS_SUCCESS for sha256 in hashes],
            "code": ["dns" if sha256 is None else "ok" for sha256 in hashes],
            "sha256": hashes,
            "phash": [None if sha256 is None else "near" if i % 3 == 0 else None for i, sha256 in enumerate(hashes)],
        }
        table = pl.DataFrame(rows, schema=dict.fromkeys(rows, pl.String))
        table.write_parquet(ledger.part(pairs / f"{unit}.parquet"))
        ledger.commit(pairs, unit, [f"{unit}.parquet"], inputs={}, config={}, counts={})
        units.append(unit)
    return units


hashes = st.sampled_from([None, *"abcdefgh"])


@settings(max_examples=60)
@given(st.lists(st.lists(hashes, min_size=1, max_size=12), min_size=1, max_size=4), st.sampled_from([3, 1 << 20]))
def test_just_one_image_is_kept_per_hash_and_it_is_the_first_by_key(
    shards: list[list[str | None]], hashes_at_once: int
) -> None:
    images = [
        (schema.sample_key(number, i), sha256)
        for number, shard in enumerate(shards)
        for i, sha256 in enumerate(shard)
        if sha256 is not None
    ]
    first: dict[str, str] = {}
    for key, sha256 in images:
        first.setdefault(sha256, key)
    right = [(key, sha256, first[sha256], "sha256") for key, sha256 in images if first[sha256] != key]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "HASHES_AT_ONCE", hashes_at_once)
        pairs = Path(folder)
        write_shards(pairs, shards)
        if not images:
            with pytest.raises(UserError, match=r"No image in .* has a sha256"):
                duplicates.write(pairs, "sha256")
            return
        assert duplicates.write(pairs, "sha256") == len(right)
        found = duplicates.read(pairs)
        assert found is not None
        assert found.columns == ["key", "sha256", "duplicate_of", "by"] and found.rows() == right
        kept = Counter(sha256 for key, sha256 in images if key not in set(found["key"]))
        assert set(kept) == set(first) and set(kept.values()) == {1}


def test_images_that_look_alike_are_told_by_phash(tmp_path: Path) -> None:
    write_shards(tmp_path, [["a", "b", "c", "d"], ["e", None]])
    assert duplicates.write(tmp_path, "phash") == 2
    found = duplicates.read(tmp_path)
    assert found is not None
    assert found.rows() == [
        ("000000003", "d", "000000000", "phash"),
        ("000010000", "e", "000000000", "phash"),
    ]


def test_without_perceptual_hashes_there_is_nothing_to_tell_by(tmp_path: Path) -> None:
    pairs = pairsmaker.write_pairs(tmp_path)
    with pytest.raises(UserError, match="Download with --dedup phash"):
        duplicates.write(pairs, "phash")
    assert duplicates.read(pairs) is None and duplicates.refresh(pairs) is None


def test_some_of_the_shards_keep_one_image_of_a_kind_too(tmp_path: Path) -> None:
    def gone(*units: str) -> dict[str, list[str]]:
        return {unit: keys.to_list() for unit, keys in duplicates.left_out(tmp_path, units).items()}

    write_shards(tmp_path, [["a", "a"], ["a", "b"], ["b", "a"]])
    assert gone("00000", "00001", "00002") == {}
    duplicates.write(tmp_path, "sha256")
    assert gone("00000", "00001", "00002") == {
        "00000": ["000000001"], "00001": ["000010000"], "00002": ["000020000", "000020001"],
    }  # fmt: skip
    assert gone("00001", "00002") == {"00002": ["000020000", "000020001"]}
    assert gone("00002") == {}
    write_shards(tmp_path, [["c"]], first_shard=3)
    with pytest.raises(UserError, match="--dedup sha256"):
        gone("00002")


def test_added_shards_make_the_marks_stale_until_they_are_refreshed(tmp_path: Path) -> None:
    write_shards(tmp_path, [["a", "b"]])
    assert duplicates.read(tmp_path) is None and not duplicates.is_current(tmp_path)
    assert duplicates.digest(tmp_path) is None and duplicates.marked_by(tmp_path) is None
    assert duplicates.write(tmp_path, "sha256") == 0 and duplicates.is_current(tmp_path)
    before = duplicates.digest(tmp_path)
    write_shards(tmp_path, [["b", "c"]], first_shard=1)
    assert not duplicates.is_current(tmp_path)
    assert duplicates.refresh(tmp_path) == 1 and duplicates.is_current(tmp_path)
    assert duplicates.digest(tmp_path) not in (None, before)


def test_marks_are_made_again_only_for_other_shards_or_another_hash(tmp_path: Path) -> None:
    write_shards(tmp_path, [["a", "a", "b", "c"]])
    duplicates.write(tmp_path, "sha256")
    table = tmp_path / duplicates.FOLDER / "duplicates.parquet"
    first = table.stat().st_ino
    assert duplicates.write(tmp_path, "sha256") == 1 and table.stat().st_ino == first
    assert duplicates.write(tmp_path, "phash") == 1 and duplicates.marked_by(tmp_path) == "phash"
    again = table.read_bytes()
    duplicates.write(tmp_path, "sha256")
    duplicates.write(tmp_path, "phash")
    assert table.read_bytes() == again


def test_a_cut_table_of_marks_is_noticed(tmp_path: Path) -> None:
    write_shards(tmp_path, [["a", "a"]])
    duplicates.write(tmp_path, "sha256")
    (tmp_path / duplicates.FOLDER / "duplicates.parquet").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"duplicates\.parquet"):
        duplicates.read(tmp_path)


def test_marks_are_no_shard_and_are_verified_with_the_rest(tmp_path: Path) -> None:
    pairs = pairsmaker.write_pairs(tmp_path)
    units, counted = ledger.finished_units(pairs), stats.gather(tmp_path)
    duplicates.write(pairs, "sha256")
    assert ledger.finished_units(pairs) == units and stats.gather(tmp_path) == counted
    found = verify.verify(tmp_path, gc=True)
    assert found.num_intact == found.num_files == 2 * len(units) + 1 and not found.orphans
    (pairs / duplicates.FOLDER / "duplicates.parquet").write_bytes(b"cut")
    assert set(verify.verify(tmp_path).corrupt) == {"pairs/_duplicates/duplicates.parquet"}


def test_urls_and_images_that_repeat_are_counted(tmp_path: Path) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        row["url"] = "http://x/same" if number in (1, 8) else row["url"]
        row["image"] = pairsmaker.image_bytes(0) if number in (2, 4, 7) else row["image"]
        row["retry_of"] = "000000003" if number == 8 else None

    pairs = pairsmaker.write_pairs(tmp_path, change=change)
    units = ledger.finished_units(pairs)
    right = {"urls": 11, "duplicate_urls": 0, "images": 10, "duplicate_images": 3}
    assert duplicates.count(pairs, units) == right
    assert duplicates.count(pairs, units[:1]) == {"urls": 6, "duplicate_urls": 0, "images": 5, "duplicate_images": 2}


def test_a_url_that_was_skipped_as_a_repetition_counts_as_one(tmp_path: Path) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        if number == 5:
            row.update(url="http://images.test/0.jpg?signature=secret", code="duplicate", status="failed_to_download")

    pairs = pairsmaker.write_pairs(tmp_path, change=change)
    found = duplicates.count(pairs, ledger.finished_units(pairs))
    assert (found["urls"], found["duplicate_urls"], found["images"]) == (12, 1, 9)


def test_shards_hold_just_one_image_of_a_kind(tmp_path: Path) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        row["image"] = pairsmaker.image_bytes(0) if number in (2, 4, 7) else row["image"]

    pairs = pairsmaker.write_pairs(tmp_path, change=change)
    pairsmaker.write_captions(tmp_path)
    config, job = ShardConfig(), Job(work=tmp_path, quiet=True)
    assert "left_out_as_duplicates" not in shard.run(config, job).facts
    assert stats.gather(tmp_path / "shards")["shards"]["succeeded"] == 10
    duplicates.write(pairs, "sha256")
    with pytest.raises(ResumeRefused, match="left_out_duplicates"):
        shard.run(config, job)
    again = shard.run(config, Job(work=tmp_path, quiet=True, overwrite=True))
    assert stats.gather(tmp_path / "shards")["shards"]["succeeded"] == 7
    assert again.facts["left_out_as_duplicates"] == 3
    skipped = shard.run(config, job)
    assert (skipped.skipped, skipped.made, skipped.facts["left_out_as_duplicates"]) == (1, 0, 3)
