"""``clips shard``: the join, the mix, the split, the bytes, and what happens when inputs change or a run is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clips_data import draws, ledger, locks, shard, shuffle, tars
from clips_data.config import ShardConfig
from clips_data.errors import ResumeRefused, UserError
from clips_data.executor import Job, Report


def make(work: Path, **options: Any) -> Report:
    job = {name: options.pop(name) for name in list(options) if name in Job.__dataclass_fields__}
    config = ShardConfig(**{"shard_rows": 4, **options})
    return shard.run(config, Job(work=work, quiet=True, **job))


def samples(work: Path, split: str = "train") -> list[tars.Sample]:
    index = json.loads((work / "shards" / "index.json").read_text())
    return [s for file in index["splits"][split]["shards"] for s in tars.read_samples(work / "shards" / file["file"])]


def about(sample: tars.Sample) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(sample.members["json"])
    return content


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Of all but locks."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file() and path.name[0] != "."}


def test_every_successful_pair_arrives_once_with_its_bytes_columns_and_extra(tmp_path: Path) -> None:
    report = make(pairsmaker.write_work(tmp_path))
    found = {sample.key: sample for sample in samples(tmp_path)}
    assert len(found) == 10 and report.counts == Counter(report.counts) and sum(report.counts.values()) == 10
    assert [path.name for path in report.units] == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    for unit in (0, 1):
        for source in tars.read_samples(tmp_path / "pairs" / f"{unit:05d}.tar"):
            sample = found[source.key]
            number = unit * 6 + int(source.key[-4:])
            assert list(sample.members) == ["jpg", "txt", "json"]
            assert sample.members["jpg"] == source.members["jpg"] == pairsmaker.image_bytes(number)
            content = about(sample)
            assert content["web"] == pairsmaker.web_caption(number)
            assert content["synthetic"] == pairsmaker.synthetic_caption(number)
            assert content["extra"] == {"scene": f"0/{number}", "captions": [f"box {number}", f"a box {number}"]}
            assert content["sha256"] == ledger.digest_bytes(sample.members["jpg"])
            assert content["provenance"]["url"] == f"http://images.test/{number}.jpg"
            assert content["scores"] == {}
            assert sample.members["json"] == json.dumps(content, sort_keys=True, ensure_ascii=False).encode()


def test_sub_captions_are_spans_of_the_synthetic_column(tmp_path: Path) -> None:
    make(pairsmaker.write_work(tmp_path))
    content = about(samples(tmp_path)[0])
    pieces = [content["synthetic"][start:end] for start, end in content["sub_captions"]["synthetic"]]
    assert pieces[1:] == ["It stands on the left", "The ground is plain"]
    assert set(content["sub_captions"]) == {"synthetic"}


def test_the_offset_index_finds_every_member(tmp_path: Path) -> None:
    make(pairsmaker.write_work(tmp_path))
    content = (tmp_path / "shards" / "train-00000.tar").read_bytes()
    rows = pq.read_table(tmp_path / "shards" / "train-00000.index.parquet")
    assert rows.schema.field("image_offset").type == pa.int64() and rows.schema.names[:3] == [
        "key",
        "sha256",
        "image_ext",
    ]
    given = list(tars.read_samples(tmp_path / "shards" / "train-00000.tar"))
    for row, sample in zip(rows.to_pylist(), given, strict=True):
        assert row["key"] == sample.key and row["image_ext"] == "jpg"
        for member, ext in (("image", "jpg"), ("txt", "txt"), ("json", "json")):
            start = row[f"{member}_offset"]
            assert content[start : start + row[f"{member}_bytes"]] == sample.members[ext]


def test_the_mix_is_the_draw_of_each_key(tmp_path: Path) -> None:
    make(pairsmaker.write_work(tmp_path, num_shards=4), web_ratio=0.5, seed=3)
    texts = {sample.key: (sample.members["txt"].decode(), about(sample)) for sample in samples(tmp_path)}
    wanted = {key: "web" if draws.uniform(3, "mix", 0, key) < 0.5 else "synthetic" for key in texts}
    assert {*wanted.values()} == {"web", "synthetic"}
    assert {key: text for key, (text, _) in texts.items()} == {key: c[wanted[key]] for key, (_, c) in texts.items()}


def test_fallbacks_and_drops_are_counted(tmp_path: Path) -> None:
    def empty_web(number: int, row: pairsmaker.Row) -> None:
        if number in (1, 2, 4):
            row["caption"] = {1: None, 2: "", 4: " \n"}[number]

    def rejected(number: int, row: pairsmaker.Row) -> None:
        if number in (2, 5):
            pairsmaker.reject(row)

    pairsmaker.write_pairs(tmp_path, change=empty_web)
    pairsmaker.write_captions(tmp_path, change=rejected)
    report = make(tmp_path, web_ratio=1.0)
    assert report.counts == {"web": 7, "synthetic_for_missing_web": 2, "dropped_without_caption": 1}
    assert make(tmp_path, web_ratio=1.0).counts == report.counts
    texts = {sample.key: sample.members["txt"].decode() for sample in samples(tmp_path)}
    assert "000000002" not in texts and texts["000000001"] == pairsmaker.synthetic_caption(1)
    report = make(tmp_path, web_ratio=0.0, overwrite=True)
    assert report.counts == {"synthetic": 8, "web_for_missing_synthetic": 1, "dropped_without_caption": 1}


def test_copies_of_an_image_stay_on_one_side_of_the_heldout_split(tmp_path: Path) -> None:
    def copies(number: int, row: pairsmaker.Row) -> None:
        row["image"] = pairsmaker.image_bytes(number % 7)

    pairsmaker.write_pairs(tmp_path, num_shards=6, change=copies)
    pairsmaker.write_captions(tmp_path)
    make(tmp_path, heldout_ratio=0.5, seed=1)
    train = {about(sample)["sha256"] for sample in samples(tmp_path)}
    heldout = {about(sample)["sha256"] for sample in samples(tmp_path, "heldout")}
    assert train and heldout and not train & heldout
    assert len(train | heldout) == 7


def copies_of_seven(number: int, row: pairsmaker.Row) -> None:
    row["image"] = pairsmaker.image_bytes(number % 7)


def hashes_of(work: Path, split: str) -> list[str]:
    return [about(sample)["sha256"] for sample in samples(work, split)]


def test_heldout_max_takes_the_lowest_draws_and_is_never_exceeded(tmp_path: Path) -> None:
    pairsmaker.write_pairs(tmp_path, num_shards=12, change=copies_of_seven)
    pairsmaker.write_captions(tmp_path)
    make(tmp_path, heldout_ratio=0.99, heldout_max=20)
    heldout, train = hashes_of(tmp_path, "heldout"), hashes_of(tmp_path, "train")
    assert len(heldout) + len(train) == 60 and not set(heldout) & set(train)
    assert 10 <= len(heldout) <= 20
    drawn = {sha256: draws.uniform(0, "heldout", 0, sha256) for sha256 in {*heldout, *train}}
    assert max(drawn[sha256] for sha256 in heldout) < min(drawn[sha256] for sha256 in train)


def test_a_large_shuffle_and_a_small_one_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rows_at_once in (("a", 1 << 14), ("b", 7)):
        monkeypatch.setattr(shuffle, "ROWS_AT_ONCE", rows_at_once)
        pairsmaker.write_pairs(tmp_path / name, num_shards=12, change=copies_of_seven)
        pairsmaker.write_captions(tmp_path / name)
        make(tmp_path / name, heldout_ratio=0.9, heldout_max=20)
    assert folder_bytes(tmp_path / "a" / "shards") == folder_bytes(tmp_path / "b" / "shards")


def test_shard_bytes_ends_a_tar_before_it_is_larger(tmp_path: Path) -> None:
    pairsmaker.write_work(tmp_path)
    make(tmp_path, shard_rows=100, shard_bytes=20_000)
    sizes = [path.stat().st_size for path in (tmp_path / "shards").glob("*.tar")]
    assert len(samples(tmp_path)) == 10 and len(sizes) > 1
    assert max(sizes) < 20_000 + 10_240  # the end of an archive fills a record


# --- data that grow ---------------------------------------------------------------------------------------------------


def test_new_shards_of_pairs_become_a_further_generation_and_finished_tars_stay(tmp_path: Path) -> None:
    pairsmaker.write_pairs(tmp_path)
    pairsmaker.write_captions(tmp_path)
    make(tmp_path)
    before = folder_bytes(tmp_path / "shards")
    pairsmaker.write_pairs(tmp_path, num_shards=4)
    pairsmaker.write_captions(tmp_path)
    report = make(tmp_path)
    assert (report.made, report.skipped) == (3, 3) and len({s.key for s in samples(tmp_path)}) == 20
    assert any("generation 1" in note for note in report.notes)
    after = folder_bytes(tmp_path / "shards")
    assert {name: after[name] for name in before if name.startswith("train-")} == {
        name: data for name, data in before.items() if name.startswith("train-")
    }
    assert make(tmp_path).made == 0
    index = json.loads(after["index.json"])
    assert [generation["tars"] for generation in index["generations"]] == [
        ["train-00000", "train-00001", "train-00002"],
        ["train-00003", "train-00004", "train-00005"],
    ]


def test_overwriting_a_grown_folder_shuffles_all_together(tmp_path: Path) -> None:
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    for num_shards in (2, 4):
        pairsmaker.write_pairs(grown, num_shards=num_shards)
        pairsmaker.write_captions(grown)
        make(grown)
    make(grown, overwrite=True)
    pairsmaker.write_pairs(whole, num_shards=4)
    pairsmaker.write_captions(whole)
    make(whole)
    assert folder_bytes(grown / "shards") == folder_bytes(whole / "shards")


def test_a_copy_of_a_held_out_image_that_comes_later_is_held_out_too(tmp_path: Path) -> None:
    for num_shards in (6, 12):
        pairsmaker.write_pairs(tmp_path, num_shards=num_shards, change=copies_of_seven)
        pairsmaker.write_captions(tmp_path)
        make(tmp_path, heldout_ratio=0.99, heldout_max=10)
    heldout, train = hashes_of(tmp_path, "heldout"), hashes_of(tmp_path, "train")
    assert len(heldout) + len(train) == 60 and heldout and not set(heldout) & set(train)


def test_a_shard_of_pairs_that_is_not_named_any_more_is_refused(tmp_path: Path) -> None:
    pairsmaker.write_work(tmp_path)
    make(tmp_path)
    only = (tmp_path / "pairs" / "00001.tar",)
    with pytest.raises(ResumeRefused, match=r"not among those given now \(00000; 1 of 2\)"):
        make(tmp_path, only=only)
    make(tmp_path, only=only, overwrite=True)
    assert len(samples(tmp_path)) == 5


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_seeds_shuffle(tmp_path: Path) -> None:
    pairsmaker.write_work(tmp_path)
    make(tmp_path)
    first = [sample.key for sample in samples(tmp_path)]
    make(tmp_path, seed=1, overwrite=True)
    second = [sample.key for sample in samples(tmp_path)]
    assert first != second and sorted(first) == sorted(second) and first != sorted(first)


def test_two_runs_and_two_processes_make_the_same_bytes(tmp_path: Path) -> None:
    for name, processes in (("a", 1), ("b", 2)):
        make(pairsmaker.write_work(tmp_path / name), processes=processes, heldout_ratio=0.3)
    assert folder_bytes(tmp_path / "a" / "shards") == folder_bytes(tmp_path / "b" / "shards")
    assert {"index.json", "heldout-00000.tar", "train-00000.done.json"} <= set(folder_bytes(tmp_path / "a" / "shards"))


def test_slices_together_make_what_one_run_makes(tmp_path: Path) -> None:
    make(pairsmaker.write_work(tmp_path / "whole"))
    sliced = pairsmaker.write_work(tmp_path / "sliced")
    make(sliced, slice="0/2")
    assert not (sliced / "shards" / "index.json").exists()
    make(sliced, slice="1/2")
    assert folder_bytes(sliced / "shards") == folder_bytes(tmp_path / "whole" / "shards")


def test_a_limit_makes_whole_tars_only_and_the_rest_comes_later(tmp_path: Path) -> None:
    pairsmaker.write_work(tmp_path)
    report = make(tmp_path, limit=5)
    assert (report.made, report.facts["shards_missing"]) == (1, 2)
    assert not (tmp_path / "shards" / "index.json").exists()
    report = make(tmp_path)
    assert (report.made, report.skipped) == (2, 1) and len(samples(tmp_path)) == 10


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    pairsmaker.write_work(tmp_path)
    assert make(tmp_path, dry_run=True).facts["shards_to_do"] == 3
    assert not (tmp_path / "shards").exists()


def test_a_second_run_skips_everything(tmp_path: Path) -> None:
    first = make(pairsmaker.write_work(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("[!.]*")}
    second = make(tmp_path)
    assert (second.made, second.skipped, second.counts, second.units) == (0, 3, first.counts, first.units)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").glob("[!.]*")} == before


def test_a_second_process_on_the_same_slice_is_refused_and_on_another_is_not(tmp_path: Path) -> None:
    work = pairsmaker.write_work(tmp_path)
    with locks.locked(work / "shards", "sharding-0-of-2"):
        with pytest.raises(UserError, match="Another clips process is at work"):
            make(work, slice="0/2")
        assert make(work, slice="1/2").made == 1


def test_changed_captions_and_changed_config_are_refused_until_overwritten(tmp_path: Path) -> None:
    make(pairsmaker.write_work(tmp_path))
    with pytest.raises(ResumeRefused, match=r"config web_ratio: 0\.8 before, 0\.5 now"):
        make(tmp_path, web_ratio=0.5)
    pairsmaker.write_captions(tmp_path, change=lambda number, row: row.update(caption=f"Other {number}."))
    with pytest.raises(ResumeRefused, match="input captions/synthetic"):
        make(tmp_path)
    make(tmp_path, overwrite=True)
    assert about(samples(tmp_path)[0])["synthetic"].startswith("Other")


def test_overwriting_with_fewer_tars_leaves_none_of_the_old_ones(tmp_path: Path) -> None:
    make(pairsmaker.write_work(tmp_path))
    make(tmp_path, shard_rows=10, overwrite=True)
    assert [path.name for path in (tmp_path / "shards").glob("*.tar")] == ["train-00000.tar"]


def test_a_caption_about_another_image_names_key_and_both_hashes(tmp_path: Path) -> None:
    pairsmaker.write_pairs(tmp_path)
    pairsmaker.write_captions(tmp_path, change=lambda number, row: number == 7 and row.update(sha256="0" * 64))
    right = ledger.digest_bytes(pairsmaker.image_bytes(7))
    with pytest.raises(UserError, match=f"key 000010001 has image sha256 {'0' * 64} there and {right}"):
        make(tmp_path)


def test_rows_are_joined_by_key_and_not_by_place(tmp_path: Path) -> None:
    pairsmaker.write_work(tmp_path)
    path = tmp_path / "captions" / "synthetic" / "00000.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(list(reversed(range(len(table))))), ledger.part(path))
    ledger.commit(path.parent, "00000", [path.name], inputs={}, config={}, counts={})
    make(tmp_path)
    for sample in samples(tmp_path):
        number = int(sample.key[:5]) * 6 + int(sample.key[-4:])
        assert about(sample)["synthetic"] == pairsmaker.synthetic_caption(number)


@pytest.mark.parametrize("side", ["pairs", "captions"])
def test_a_row_missing_on_one_side_is_named(tmp_path: Path, side: str) -> None:
    pairsmaker.write_work(tmp_path)
    folder = tmp_path / ("pairs" if side == "pairs" else "captions/synthetic")
    table = pl.read_parquet(folder / "00001.parquet").filter(pl.col("key") != "000010002")
    table.write_parquet(ledger.part(folder / "00001.parquet"))
    if side == "pairs":
        (folder / "00001.tar.part").write_bytes((folder / "00001.tar").read_bytes())
    files = ["00001.parquet", "00001.tar"][: 2 if side == "pairs" else 1]
    ledger.commit(folder, "00001", files, inputs={}, config={}, counts={})
    with pytest.raises(UserError, match=r"lacks 1 of . keys .* the first is 000010002"):
        make(tmp_path)


def test_missing_columns_shards_and_pairs_are_clear(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished shards\. Run `clips download`"):
        make(tmp_path)
    pairsmaker.write_work(tmp_path)
    with pytest.raises(UserError, match=r"There is no .*synthetik.* Did you mean 'synthetic'"):
        make(tmp_path, columns=("web", "synthetik"))
    with pytest.raises(UserError, match="has to be 'web'"):
        make(tmp_path, columns=("synthetic",))
    ledger.sidecar_path(tmp_path / "captions" / "synthetic", "00001").unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 2 shards .*\(00001\).*clips recaption --column synthetic"):
        make(tmp_path)
    assert make(tmp_path, only=(tmp_path / "pairs" / "00000.tar",)).counts.keys() <= {"web", "synthetic"}
    assert len(samples(tmp_path)) == 5


def test_damaged_inputs_are_clear(tmp_path: Path) -> None:
    work = pairsmaker.write_work(tmp_path)
    parquet = work / "captions" / "synthetic" / "00000.parquet"
    good = parquet.read_bytes()
    parquet.write_bytes(bytes(len(good)))
    with pytest.raises(UserError, match=r"Cannot read .*00000\.parquet"):
        make(work)
    parquet.write_bytes(good)
    tar = work / "pairs" / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[700] ^= 255
    tar.write_bytes(bytes(content))
    with pytest.raises(UserError, match="the tar was changed after it was finished"):
        make(work)
    assert not (work / "shards" / "index.json").exists()


def test_named_scores_must_be_there_and_default_ones_are_said_to_be_absent(tmp_path: Path) -> None:
    work = pairsmaker.write_work(tmp_path)
    with pytest.raises(UserError, match="clips score --name clip"):
        make(work, scores="clip")
    assert "does not exist" in str(make(work).facts["scores"])
    write_scores(work)
    with pytest.raises(ResumeRefused, match=r'config scores: \[\] before, \["clip"\] now'):
        make(work)
    make(work, overwrite=True)
    assert about(samples(work)[0])["scores"] == {"web": 0.25}


def write_scores(work: Path) -> None:
    (work / "scores" / "clip").mkdir(parents=True)
    for unit in ("00000", "00001"):
        rows = pq.read_table(work / "captions" / "synthetic" / f"{unit}.parquet", columns=["key", "sha256"])
        values = pa.array([0.25] * len(rows), pa.float32()), pa.array([None] * len(rows), pa.float32())
        rows = rows.append_column("web", values[0]).append_column("synthetic", values[1])
        pq.write_table(rows, ledger.part(work / "scores" / "clip" / f"{unit}.parquet"))
        ledger.commit(
            work / "scores" / "clip", unit, [f"{unit}.parquet"], inputs={}, config={}, counts={"ok": len(rows)}
        )


def test_stock_webdataset_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    make(pairsmaker.write_work(tmp_path))
    urls = sorted(str(path) for path in (tmp_path / "shards").glob("train-*.tar"))
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg;png;webp", "txt", "json"))
    assert len(read) == 10
    for image, text, content in read:
        assert image.size == (32, 24) and text in (content["web"], content["synthetic"])


def test_open_clips_loader_reads_the_shards(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from open_clip_train.data import get_wds_dataset

    make(pairsmaker.write_work(tmp_path))
    shards = f"{tmp_path}/shards/train-{{00000..00002}}.tar"
    args = SimpleNamespace(
        train_data=shards, val_data=shards, train_num_samples=10, val_num_samples=10, dataset_resampled=False, seed=0,
        batch_size=5, world_size=1, workers=0, train_data_upsampling_factors=None,
    )  # fmt: skip
    data = get_wds_dataset(args, lambda image: image.size[0], is_train=False, tokenizer=lambda text: [text])
    read = [text for _, texts in data.dataloader for text in texts]
    assert sorted(read) == sorted(sample.members["txt"].decode() for sample in samples(tmp_path))


def test_a_kill_at_any_point_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole = pairsmaker.write_work(tmp_path / "whole", num_shards=3)
    make(whole, shard_rows=1)
    killed = pairsmaker.write_work(tmp_path / "killed", num_shards=3)
    code = (
        "from clips_data import shard, sharding; from clips_data.config import ShardConfig\n"
        "from clips_data.executor import Job\n"
        "from pathlib import Path; import sys, time\n"
        "write = sharding.write_tar\n"
        "def slow(*given):\n"
        "    time.sleep(0.02)\n"
        "    return write(*given)\n"
        "sharding.write_tar = slow\n"
        "shard.run(ShardConfig(shard_rows=1), Job(work=Path(sys.argv[1]), quiet=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(killed)], env={**os.environ, "PYTHONPATH": "."})
    while process.poll() is None and len(list((killed / "shards").glob("*.done.json"))) < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= len(list((killed / "shards").glob("*.done.json"))) < 15
    assert not (killed / "shards" / "index.json").exists()
    report = make(killed, shard_rows=1)
    assert report.skipped >= 4 and report.made == 15 - report.skipped
    assert folder_bytes(killed / "shards") == folder_bytes(whole / "shards")
    assert not (killed / "shards" / "_plan").exists()
