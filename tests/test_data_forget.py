"""``clips forget``: nothing of what is forgotten is left, all else is as it was, and no stage has to work again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pairsmaker
import pyarrow.parquet as pq
import pytest
import teachermaker
from safetensors.torch import load_file

from clips_data import adopt, duplicates, ledger, locks, rewrite, schema, score, shard, tars
from clips_data import forget as room
from clips_data.config import ScoreConfig, ShardConfig
from clips_data.errors import ResumeRefused, UsageError, UserError
from clips_data.executor import Job
from clips_data.forget import Outcome, forget
from clips_data.forgotten import Forgotten, asked_for, forgotten, read_list, refuse_unfinished
from clips_data.journal import Journal
from clips_data.verify import verify
from clips_train.shards import ShardReader, open_split

HOSTS = ("good.test", "img.bad.test", "other.test", "bad.test", "good.test", "notbad.test")
NUM_SHARDS, SHARD_ROWS = 3, 6
BAD = [number for number in range(NUM_SHARDS * SHARD_ROWS) if HOSTS[number % 6] in ("bad.test", "img.bad.test")]
BAD_IMAGES = [number for number in BAD if number % SHARD_ROWS != pairsmaker.FAILED_ROW]
CONFIG = ShardConfig(shard_rows=4, heldout_ratio=0.3, seed=1)


def url(number: int) -> str:
    return f"https://{HOSTS[number % 6]}/pictures/{number:04d}-picture.jpg"


def key(number: int) -> str:
    return schema.sample_key(number // SHARD_ROWS, number % SHARD_ROWS)


def several_hosts(number: int, row: pairsmaker.Row) -> None:
    ok = row["status"] == schema.STATUS_SUCCESS
    row.update(
        url=url(number), host=HOSTS[number % 6], caption=f"web text {number:04d}.", scene=f"lot {number:04d}",
        captions=f"list text {number:04d}.", evidence=None, phash=f"{number:016d}" if ok else None, retry_of=None,
        duplicate_of=None, raw_sha256=ledger.digest_bytes(b"raw %d" % number) if ok else None,
    )  # fmt: skip


class FakeScorer:
    """Says how long images and texts are, so that no model is needed."""

    name, preprocessing = "fake", "{}"

    def image_features(self, images: list[bytes], keys: list[str]) -> list[int]:
        return [len(image) for image in images]

    def similarities(self, features: list[int], texts: list[str]) -> list[float | None]:
        return [size / len(text) if text else None for size, text in zip(features, texts, strict=True)]


def use_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "load_scorer", lambda *given, **named: FakeScorer())
    teachermaker.install(monkeypatch)


@pytest.fixture(autouse=True)
def fake_models(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fakes(monkeypatch)


def synthetic(number: int, row: pairsmaker.Row) -> None:
    number = int(row["key"][:5]) * SHARD_ROWS + int(row["key"][5:])
    text = f"A synthetic text {number:04d}. It is long."
    row.update(caption=text, raw=text)
    if number == 4:
        pairsmaker.reject(row)


def write_captions(work: Path, column: str = "synthetic") -> None:
    """A column that knows its inputs as `clips recaption` records them."""
    folder = pairsmaker.write_captions(work, column, change=synthetic)
    for unit in ledger.finished_units(folder):
        ledger.part(folder / f"{unit}.parquet").write_bytes((folder / f"{unit}.parquet").read_bytes())
        ledger.commit(
            folder, unit, [f"{unit}.parquet"], inputs=caption_inputs(work, unit), config={"seed": 0},
            counts=known(folder, unit).counts,
        )  # fmt: skip


def caption_inputs(work: Path, unit: str) -> dict[str, str]:
    return {"pairs": known(work / "pairs", unit).digest}


def known(folder: Path, unit: str) -> ledger.Sidecar:
    sidecar = ledger.read_sidecar(folder, unit)
    assert sidecar is not None
    return sidecar


def run_score(work: Path) -> Any:
    return score.run(ScoreConfig(model="fake-model"), Job(work=work, quiet=True))


def run_shard(work: Path, **options: Any) -> Any:
    return shard.run(CONFIG, Job(work=work, quiet=True, **options))


def make_pairs(work: Path) -> None:
    pairsmaker.write_pairs(work, num_shards=NUM_SHARDS, change=several_hosts)


def make_work(work: Path) -> Path:
    make_pairs(work)
    write_captions(work)
    run_score(work)
    run_shard(work)
    teachermaker.store(work)
    return work


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        use_fakes(patch)
        return make_work(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def work(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "work"))


def everything(work: Path) -> Iterator[tuple[Path, bytes]]:
    """All files, hidden ones too; of tables also the decoded values."""
    for path in sorted(work.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()
            if path.suffix == ".parquet":
                yield path, repr(pq.ParquetFile(path).read().to_pylist()).encode()


def traces(work: Path, number: int) -> list[tuple[str, bytes]]:
    """Where image, URL or any text of one sample is still to be found."""
    image = pairsmaker.image_bytes(number)
    needles = [image, url(number).encode(), b"text %04d" % number, b"lot %04d" % number]
    needles += [ledger.digest_bytes(image).encode(), ledger.digest_bytes(b"raw %d" % number).encode()]
    return [(path.name, needle[:40]) for path, data in everything(work) for needle in needles if needle in data]


def content(work: Path) -> dict[str, bytes]:
    return {p.relative_to(work).as_posix(): p.read_bytes() for p in work.rglob("*") if p.is_file() and p.name[0] != "."}


def samples(tar: Path) -> dict[str, dict[str, bytes]]:
    return {sample.key: sample.members for sample in tars.read_samples(tar)}


def all_samples(work: Path) -> dict[tuple[str, str], dict[str, bytes]]:
    found = [path for folder in ("pairs", "shards") for path in (work / folder).glob("*.tar")]
    return {(path.parent.name, name): members for path in found for name, members in samples(path).items()}


def pair_rows(work: Path) -> dict[str, dict[str, Any]]:
    tables = [pq.ParquetFile(path).read() for path in sorted((work / "pairs").glob("*.parquet"))]
    return {row["key"]: row for table in tables for row in table.to_pylist()}


def check_nothing_is_to_do(work: Path) -> None:
    """Every stage takes its folder for finished, and the trainer reads the shards."""
    for unit in ledger.finished_units(work / "pairs"):
        recorded = known(work / "pairs", unit)
        assert ledger.is_done(work / "pairs", unit, inputs={"list": "0"}, config={"source": "test"}, overwrite=False), (
            unit
        )
        assert sum(recorded.counts.values()) == SHARD_ROWS
        captions = work / "captions" / "synthetic"
        assert ledger.is_done(captions, unit, inputs=caption_inputs(work, unit), config={"seed": 0}, overwrite=False)
    report = run_score(work)
    assert (report.made, report.skipped) == (0, NUM_SHARDS)
    report = run_shard(work)
    assert report.made == 0 and report.skipped
    done = teachermaker.store(work)
    assert (done.made, done.skipped) == (0, len(ledger.finished_units(work / "shards")))
    for name in ("train", "heldout"):
        split = open_split(work / "shards", name)
        reader = ShardReader(split)
        for tar, num_samples in enumerate(split.num_samples_by_shard):
            for place in range(num_samples):
                row = reader.row(tar, place)
                assert row.about["key"] == row.key and ledger.digest_bytes(row.image) == row.about["sha256"]
    checked = verify(work)
    assert not checked.corrupt and not checked.orphans and not checked.contradictions and not checked.stale


# --- a host -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["compare", "search"])
def test_what_no_stage_reads_and_shows_images_is_removed_whole(work: Path, name: str) -> None:
    (work / name).mkdir()
    (work / name / "page.html").write_text("")
    assert forget(work, asked_for(hosts=["nobody.test"])).notes == []
    assert (work / name).is_dir(), "nothing was forgotten"
    notes = forget(work, asked_for(hosts=["bad.test"])).notes
    assert not (work / name).exists() and any(f"clips {name}" in note for note in notes)


def test_nothing_of_a_host_is_left_and_nothing_else_is_changed(work: Path) -> None:
    before, rows = all_samples(work), pair_rows(work)
    assert all(traces(work, number) for number in BAD), "the test finds what is there"
    outcome = forget(work, asked_for(hosts=["bad.test"]))
    images, kept = len(BAD_IMAGES), NUM_SHARDS * (SHARD_ROWS - 1)
    assert outcome.removed == {
        "pairs rows": (len(BAD), NUM_SHARDS * SHARD_ROWS), "pairs images": (images, kept),
        "captions/synthetic": (images, kept), "scores/clip": (images, kept), "shards": (images, kept),
        "embeddings/teacher": (images, kept),
    }  # fmt: skip
    assert 0 < images < len(BAD), "failed rows have URLs and captions too"
    assert [traces(work, number) for number in BAD] == [[]] * len(BAD)
    named = {path.name for path, data in everything(work) if b"bad.test" in data.replace(b"notbad.test", b"")}
    assert named == {"forgotten.json"}
    gone = {key(number) for number in BAD}
    assert all_samples(work) == {name: members for name, members in before.items() if name[1] not in gone}
    after = pair_rows(work)
    assert list(after) == list(rows), "rows are never dropped"
    for name, row in after.items():
        if name in gone:
            left = {column: value for column, value in row.items() if value is not None}
            assert left == {"key": name, "status": "failed_to_download", "code": "forgotten"}
        else:
            assert row == rows[name]
    check_nothing_is_to_do(work)


def test_counts_and_index_are_those_of_what_is_left(work: Path) -> None:
    forget(work, asked_for(hosts=["bad.test"]))
    counts = [known(work / "pairs", unit).counts for unit in ledger.finished_units(work / "pairs")]
    assert all(count == {"ok": 4, "forgotten": 2} for count in counts)
    scores = [known(work / "scores" / "clip", unit).counts for unit in ledger.finished_units(work / "scores" / "clip")]
    assert [dict(count) for count in scores] == [{"ok": 3, "caption_missing": 1}, {"ok": 4}, {"ok": 4}]
    index = json.loads((work / "shards" / "index.json").read_text())
    listed = [tar for split in index["splits"].values() for tar in split["shards"]]
    assert sum(tar["num_samples"] for tar in listed) == sum(index["mix"]["counts"].values()) == 12
    texts = {name: members for (folder, name), members in all_samples(work).items() if folder == "shards"}
    web = sum(members["txt"].startswith(b"web") for members in texts.values())
    assert sum(number for name, number in index["mix"]["counts"].items() if name.startswith("web")) == web
    for tar in listed:
        path = work / "shards" / tar["file"]
        assert (tar["bytes"], tar["sha256"]) == (path.stat().st_size, ledger.digest_file(path))


def test_a_tar_without_samples_is_a_tar_as_it_would_be_written(work: Path, tmp_path: Path) -> None:
    """What remains has the bytes that writing it anew would give."""
    forget(work, asked_for(hosts=["bad.test", "good.test", "other.test"]))
    again = tmp_path / "again.tar"
    for path in [*(work / "pairs").glob("*.tar"), *(work / "shards").glob("*.tar")]:
        with again.open("wb") as file:
            writer = tars.TarWriter(file)
            for name, members in samples(path).items():
                for ext, data in members.items():
                    writer.add(f"{name}.{ext}", data)
            writer.close()
        assert again.read_bytes() == path.read_bytes()
    assert (
        sum(
            tar["num_samples"]
            for tar in json.loads((work / "shards/index.json").read_text())["splits"]["train"]["shards"]
        )
        < 4
    )
    check_nothing_is_to_do(work)


def test_features_of_teachers_are_those_of_what_is_left(work: Path) -> None:
    def rows() -> dict[str, list[Any]]:
        found = {}
        for path in (work / "embeddings" / "teacher").glob("*.safetensors"):
            tensors = load_file(path)
            for row, name in enumerate(tensors.pop("keys").tolist()):
                found[bytes(name).decode()] = [tensor[row].tolist() for _, tensor in sorted(tensors.items())]
        return found

    before, gone = rows(), {key(number) for number in BAD}
    forget(work, asked_for(hosts=["bad.test"]))
    assert str(rows()) == str({name: values for name, values in before.items() if name not in gone}), "NaN is NaN"
    assert set(before) & gone
    anew = work / "anew"
    teachermaker.store(work, anew)
    for path in anew.iterdir():
        assert path.read_bytes() == (work / "embeddings" / "teacher" / path.name).read_bytes(), path.name


def test_every_sample_can_go(work: Path) -> None:
    forget(work, asked_for(hosts=["bad.test", "good.test", "other.test", "notbad.test"]))
    assert not all_samples(work)
    check_nothing_is_to_do(work)


def test_a_second_time_finds_nothing_and_changes_nothing(work: Path) -> None:
    forget(work, asked_for(hosts=["bad.test"]))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in work.rglob("*") if path.is_file()}
    outcome = forget(work, asked_for(hosts=["bad.test"]))
    assert not outcome.found and outcome.removed["pairs rows"] == (0, 18) and outcome.removed["shards"] == (0, 12)
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in work.rglob("*") if path.is_file()}
    assert {p: a for p, a in after.items() if p.name[0] != "."} == {p: b for p, b in before.items() if p.name[0] != "."}


def test_a_dry_run_says_what_the_run_would_and_writes_nothing(work: Path) -> None:
    before = content(work)
    planned = forget(work, asked_for(hosts=["bad.test"]), dry_run=True)
    assert content(work) == before
    assert planned == forget(work, asked_for(hosts=["bad.test"]))


def test_removals_one_after_the_other_end_where_one_removal_does(work: Path, whole: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    forget(work, asked_for(hosts=["bad.test"]))
    forget(work, asked_for(hosts=["other.test"]))
    forget(other, asked_for(hosts=["bad.test", "other.test"]))
    check_nothing_is_to_do(work)
    one, two = content(work), content(other)
    lineages = [json.loads(found.pop("pairs/forgotten.json"))["lineage"] for found in (one, two)]
    assert one == two
    assert len(lineages[0]) == 2 and len(lineages[1]) == 1


# --- what matches -----------------------------------------------------------------------------------------------------


def test_hosts_below_match_and_hosts_that_only_end_alike_do_not() -> None:
    wanted = asked_for(hosts=["Example.COM.", "bücher.test", "com", "127.0.0.1"])
    assert wanted.matches("http://example.com/a.jpg") and wanted.matches("https://u:p@IMG.cdn.example.com.:8080/a?b=c")
    assert wanted.matches("http://xn--bcher-kva.test/1") and wanted.matches("http://bücher.test/1")
    assert wanted.matches("http://127.0.0.1:8000/x") and wanted.matches("http://com/x")
    for other in ("http://notexample.com/a", "http://example.com.evil.test/", "http://evil.test/example.com", "x", ""):
        assert not wanted.matches(other), other
    assert not wanted.matches("http://some.com/x"), "a name without a dot has nothing below it"


def test_a_url_is_the_same_with_a_renewed_signature(work: Path) -> None:
    wanted = asked_for(urls=[f"{url(0)}?X-Amz-Signature=first"])
    assert wanted.matches(f"{url(0)}?X-Amz-Signature=second") and not wanted.matches(url(0))
    assert "first" not in repr(wanted) and url(0) not in repr(wanted)
    outcome = forget(work, asked_for(urls=[url(0)]))
    assert outcome.removed["pairs rows"] == (1, 18) and outcome.removed["shards"] == (1, 15)
    assert not traces(work, 0) and traces(work, 4)
    check_nothing_is_to_do(work)


@pytest.mark.parametrize("kind", ["stored", "raw"])
def test_an_image_goes_by_either_hash_and_its_url_is_not_asked_for_again(work: Path, kind: str) -> None:
    hashes = {"stored": ledger.digest_bytes(pairsmaker.image_bytes(2)), "raw": ledger.digest_bytes(b"raw 2")}
    outcome = forget(work, asked_for(images=[hashes[kind].upper()]))
    assert outcome.removed["pairs rows"] == (1, 18)
    left = {path for path, _ in traces(work, 2)}
    assert left == {"forgotten.json"}, "the list has the hash that was named"
    assert forgotten(work / "pairs").matches(url(2)) and not forgotten(work / "pairs").matches(url(8))
    assert forgotten(work / "pairs").matches("http://elsewhere.test/copy.jpg", hashes[kind])
    check_nothing_is_to_do(work)


def test_other_tries_and_other_rows_of_an_image_go_with_it(tmp_path: Path) -> None:
    def retried(number: int, row: pairsmaker.Row) -> None:
        several_hosts(number, row)
        if number == 8:
            row.update(retry_of=key(3), url=url(3))
        if number == 9:
            row.update(code="duplicate", duplicate_of=key(3), url=url(3))
        if number == 10:
            row.update(final_url="https://far.bad.test/moved.jpg", url="https://start.test/10.jpg", host="start.test")

    pairsmaker.write_pairs(tmp_path, num_shards=2, change=retried)
    forget(tmp_path, asked_for(images=[ledger.digest_bytes(pairsmaker.image_bytes(8))]))
    codes = {name: row["code"] for name, row in pair_rows(tmp_path).items()}
    assert [name for name, code in codes.items() if code == "forgotten"] == [key(3), key(8), key(9)]
    assert pair_rows(tmp_path)[key(8)]["retry_of"] == key(3), "or --retry would take the first try for the latest"
    outcome = forget(tmp_path, asked_for(hosts=["bad.test"]))
    assert outcome.found and pair_rows(tmp_path)[key(10)]["code"] == "forgotten", "redirects end there"
    assert forgotten(tmp_path / "pairs").matches("https://start.test/10.jpg")


def test_a_list_has_hosts_urls_and_hashes_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"# asked for in June\nbad.test\n\n{url(0)}\n{'AB' * 32}\n")
    assert read_list(path) == asked_for(["bad.test"], [url(0)], ["ab" * 32])
    path.write_text("good.test\nbad test\n")
    with pytest.raises(UserError, match=r"list.txt, line 2: 'bad test' is not the name of a host.*Nothing was removed"):
        read_list(path)
    with pytest.raises(UserError, match=r"Cannot read .*none.txt"):
        read_list(tmp_path / "none.txt")
    for wrong in ({"hosts": ["http://a.test/"]}, {"urls": ["a.test/x.jpg"]}, {"images": ["abc"]}):
        with pytest.raises(UsageError):
            asked_for(**wrong)


def test_an_unknown_host_removes_nothing_and_is_refused_later(work: Path) -> None:
    before = content(work)
    outcome = forget(work, asked_for(hosts=["unknown.test"]))
    assert not outcome.found and outcome.removed["pairs rows"] == (0, 18)
    after = content(work)
    assert after.pop("pairs/forgotten.json") and after == before
    assert forgotten(work / "pairs").matches("http://www.unknown.test/1.jpg")


def test_the_list_of_what_was_forgotten_holds_no_url_and_is_checked(work: Path) -> None:
    assert forgotten(work / "pairs") == Forgotten()
    forget(work, asked_for(hosts=["bad.test"], urls=[url(0)]))
    content = json.loads((work / "pairs" / "forgotten.json").read_text())
    assert content["hosts"] == ["bad.test"] and "picture" not in json.dumps(content)
    (work / "pairs" / "forgotten.json").write_text("{}")
    with pytest.raises(UserError, match="is not a list that `clips forget` wrote"):
        forgotten(work / "pairs")


def test_without_pairs_the_message_says_where_to_point(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no finished shards\. Point --work"):
        forget(tmp_path, asked_for(hosts=["bad.test"]))


# --- what else there may be -------------------------------------------------------------------------------------------


def test_an_unfinished_column_keeps_its_other_rows_and_goes_on(work: Path) -> None:
    folder = work / "captions" / "fused"
    header = {
        "inputs": {**caption_inputs(work, "00000"), "synthetic": known(work / "captions/synthetic", "00000").digest}
    }
    header["config"] = {"seed": 0}
    journal = Journal(folder / "00000.journal.jsonl", header)
    journal.append([{"key": key(number), "caption": f"fused text {number:04d}."} for number in (0, 1, 2)])
    journal.close()
    with (folder / "00000.journal.jsonl").open("a") as file:
        file.write('{"key": "0000')
    outcome = forget(work, asked_for(hosts=["bad.test"]))
    assert outcome.removed["captions/fused/00000.journal.jsonl"] == (1, 3)
    assert not traces(work, 1)
    header["inputs"] = {
        **caption_inputs(work, "00000"),
        "synthetic": known(work / "captions/synthetic", "00000").digest,
    }
    again = Journal(folder / "00000.journal.jsonl", header)
    again.close()
    assert [row["key"] for row in again.rows] == [key(0), key(2)]


def test_what_killed_runs_left_goes_too(work: Path) -> None:
    (work / "pairs" / "00009.tar.part").write_bytes(pairsmaker.image_bytes(1))
    (work / "pairs" / "00008.tar").write_bytes(pairsmaker.image_bytes(1))
    for place in ("pairs/_list-0-of-1", "shards/_plan/all"):
        (work / place).mkdir(parents=True)
        (work / place / "00000.rows.parquet").write_text(url(1))
    outcome = forget(work, asked_for(hosts=["bad.test"]))
    assert not traces(work, 1) and "4 files of unfinished work were removed" in outcome.notes[0]
    assert not (work / "pairs" / "_list-0-of-1").exists()


def test_a_download_at_work_is_not_disturbed(work: Path) -> None:
    before = content(work)
    (work / "pairs" / "_list-0-of-1").mkdir()
    with locks.locked(work / "pairs", "list-0-of-1"), pytest.raises(UserError, match="Another clips process"):
        forget(work, asked_for(hosts=["bad.test"]))
    assert content(work) == before


def test_unfinished_shards_are_made_again_and_hold_every_other_sample_once(work: Path) -> None:
    shutil.rmtree(work / "shards")
    run_shard(work, limit=5)
    assert not (work / "shards" / "index.json").exists()
    outcome = forget(work, asked_for(hosts=["bad.test"]))
    assert "run `clips shard` again" in "\n".join(outcome.notes)
    run_shard(work)
    names = [name for folder, name in all_samples(work) if folder == "shards"]
    assert len(names) == 12 and not {key(number) for number in BAD} & set(names)
    assert not any(traces(work, number) for number in BAD)


def test_a_generation_that_is_not_finished_is_made_again_and_the_finished_one_stays(tmp_path: Path) -> None:
    work = make_work(tmp_path / "work")
    for unit in ("00001", "00002"):
        ledger.forget_unit(work / "pairs", unit)
    run_shard(work, overwrite=True)
    first = sorted(path.name for path in (work / "shards").glob("*.tar"))
    make_pairs(work)
    run_shard(work, limit=4)
    assert len(list((work / "shards").glob("*.tar"))) == len(first) + 1
    outcome = forget(work, asked_for(hosts=["bad.test"]))
    assert "1 tars were removed: run `clips shard` again" in "\n".join(outcome.notes)
    assert sorted(path.name for path in (work / "shards").glob("*.tar")) == first
    run_shard(work)
    names = [name for folder, name in all_samples(work) if folder == "shards"]
    assert len(names) == 12 and not {key(number) for number in BAD} & set(names)


def test_logs_and_robots_of_the_host_go_and_others_stay(work: Path) -> None:
    log = work / "pairs" / "log"
    (log / "robots" / "ab").mkdir(parents=True)
    for host in ("bad.test", "good.test"):
        (log / "robots" / "ab" / f"{host[0]}.json").write_text(
            json.dumps({"robots_url": f"https://{host}:443/robots.txt"})
        )
    (log / "img2dataset.log").write_text("began\nfailed: img.BAD.test:443 slow\nnotbad.test is fine\n")
    forget(work, asked_for(hosts=["bad.test"]))
    assert [path.name for path in (log / "robots").rglob("*.json")] == ["g.json"]
    assert (log / "img2dataset.log").read_text() == "began\nnotbad.test is fine\n"


def test_a_copy_of_a_forgotten_image_becomes_the_first_of_its_kind(tmp_path: Path) -> None:
    def copies(number: int, row: pairsmaker.Row) -> None:
        several_hosts(number, row)
        if number in (1, 2, 4):
            row["image"] = pairsmaker.image_bytes(1)

    pairsmaker.write_pairs(tmp_path, num_shards=2, change=copies)
    write_captions(tmp_path)
    assert duplicates.write(tmp_path / "pairs", "sha256") == 2
    run_score(tmp_path)
    run_shard(tmp_path)
    forget(tmp_path, asked_for(hosts=["bad.test"]))
    found = duplicates.read(tmp_path / "pairs")
    assert found is not None and found.select("key", "duplicate_of").rows() == [(key(4), key(2))]
    report = run_shard(tmp_path)
    assert report.made == 0 and report.skipped
    forget(tmp_path, asked_for(hosts=["other.test"]))
    found = duplicates.read(tmp_path / "pairs")
    assert found is not None and found.is_empty()
    assert run_shard(tmp_path).made == 0, "also without anything that is left out"
    forget(tmp_path, asked_for(hosts=["good.test", "notbad.test"]))
    assert duplicates.read(tmp_path / "pairs") is None


def test_shards_of_some_pairs_only_stay_finished(work: Path) -> None:
    shutil.rmtree(work / "shards")
    only = (work / "pairs" / "00001.tar", work / "pairs" / "00002.tar")
    run_shard(work, only=only)
    forget(work, asked_for(hosts=["bad.test"]))
    report = run_shard(work, only=only)
    assert report.made == 0 and report.skipped


def test_adopted_tars_are_the_users_own_and_stay_as_they_are(tmp_path: Path) -> None:
    theirs, work = tmp_path / "theirs", tmp_path / "work"
    theirs.mkdir()
    for number, hosts in enumerate((("bad.test", "good.test"), ("good.test", "good.test"))):
        with (theirs / f"cc-{number}.tar").open("wb") as file:
            writer = tars.TarWriter(file)
            for place, host in enumerate(hosts):
                writer.add(f"img{place}.jpg", pairsmaker.image_bytes(number * 2 + place))
                writer.add(f"img{place}.json", json.dumps({"url": f"http://{host}/{number}{place}.jpg"}).encode())
                writer.add(f"img{place}.cls", b"7")
            writer.close()
    before = content(theirs)
    adopt.adopt(theirs, Job(work=work, quiet=True), ignore=("cls",))
    assert (work / "pairs" / "00000.tar").is_symlink()
    outcome = forget(work, asked_for(hosts=["bad.test"]))
    assert content(theirs) == before and outcome.originals == [str((theirs / "cc-0.tar").resolve())]
    tar = work / "pairs" / "00000.tar"
    assert not tar.is_symlink() and (work / "pairs" / "00001.tar").is_symlink()
    assert [member.name for member in tars.read_members(tar, extensions=None)] == ["img1.jpg", "img1.json", "img1.cls"]
    assert pairsmaker.image_bytes(0) not in tar.read_bytes()
    rows = pair_rows(work)
    assert [row["code"] for row in rows.values()] == ["forgotten", "ok", "ok", "ok"]
    assert [row["source_key"] for row in rows.values()] == [None, "img1", "img0", "img1"]
    assert not verify(work).corrupt
    report = adopt.adopt(theirs, Job(work=work, quiet=True), ignore=("cls",))
    assert (report.made, report.skipped) == (0, 2)


def test_runs_that_saw_the_samples_are_listed_and_not_changed(work: Path) -> None:
    def train(name: str) -> None:
        run = work / "runs" / name
        (run / "checkpoints" / "step-00000010").mkdir(parents=True)
        digest = open_split(work / "shards", "train").digest
        Journal(run / "begun.jsonl", {"shards": digest, "seed": 0}).close()
        ledger.part(run / "config.json").write_text("{}")
        ledger.commit(run, "train", ["config.json"], inputs={"shards": digest}, config={}, counts={})

    train("first")
    (work / "runs" / "first" / "eval").mkdir()
    (work / "runs" / "first" / "eval" / "captions.jsonl").write_text(json.dumps({"key": key(1), "web": "w"}) + "\n")
    (work / "runs" / "first" / "eval" / "eval.json").write_text(json.dumps({"loss": float(f"0.{key(1)}"), "n": 1}))
    (work / "runs" / "first" / "report.html").write_text(f"<li>{key(7)}</li>")
    runs, trained = content(work / "runs"), {name for path in train_tars(work) for name in samples(path)}
    outcome = forget(work, asked_for(hosts=["bad.test"]))
    assert content(work / "runs") == runs
    (seen,) = outcome.seen_by
    assert (seen.run, seen.checkpoints) == ("runs/first", ["runs/first/checkpoints/step-00000010"])
    assert seen.num_samples == len(trained & {key(number) for number in BAD})
    assert outcome.shown_in == ["runs/first/eval/captions.jsonl", "runs/first/report.html"]
    train("second")
    outcome = forget(work, asked_for(hosts=["good.test", "notbad.test"]))
    assert [run.run for run in outcome.seen_by] == ["runs/first", "runs/second"], "first saw what was there later, too"
    assert forget(work, asked_for(hosts=["bad.test"])).seen_by == []


def train_tars(work: Path) -> list[Path]:
    return list((work / "shards").glob("train-*.tar"))


def test_a_damaged_tar_is_not_promised_anew(work: Path) -> None:
    tar = work / "pairs" / "00001.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 255
    tar.write_bytes(bytes(data))
    before = content(work)
    with pytest.raises(UserError, match=r"00001\.tar has another content.*Nothing was removed"):
        forget(work, asked_for(hosts=["bad.test"]))
    before["pairs/forgotten.json"] = b""
    assert {**content(work), "pairs/forgotten.json": b""} == before


# --- kills ------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def test_a_kill_at_any_rename_is_completed_by_the_next_run(whole: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Every commit point, by turns before and after its rename; what is read in between is right or refused."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # these kills leave the disk's cache as it is
    wanted = asked_for(hosts=["bad.test"])
    right = Path(shutil.copytree(whole, tmp_path / "right"))
    outcome = forget(right, wanted)
    real, calls = Path.replace, 0

    def counted(path: Path, target: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == stop and stop % 2:
            raise Killed
        done = real(path, target)
        if calls == stop:
            raise Killed
        return done

    monkeypatch.setattr(Path, "replace", counted)
    refused = 0
    for stop in range(1, 1000):
        calls, work = 0, tmp_path / str(stop)
        shutil.copytree(whole, work)
        try:
            forget(work, wanted)
            break
        except Killed:
            calls = -1000
        refused += reading_is_right_or_refused(work)
        check_completed(work, wanted, outcome, right)
        shutil.rmtree(work)
    assert stop > 30 and refused > 10


def reading_is_right_or_refused(work: Path) -> bool:
    """Whether some stage refused what it found half-way."""
    try:
        run_shard(work, dry_run=True)
        for name in ("train", "heldout"):
            split = open_split(work / "shards", name)
            reader = ShardReader(split)
            for tar, num_samples in enumerate(split.num_samples_by_shard):
                for place in range(num_samples):
                    row = reader.row(tar, place)
                    assert row.about["key"] == row.key and ledger.digest_bytes(row.image) == row.about["sha256"]
    except (UserError, ResumeRefused) as error:
        assert str(error)
        return True
    return False


def check_completed(work: Path, wanted: Forgotten, outcome: Outcome, right: Path) -> None:
    again = forget(work, wanted)
    assert again.removed["pairs rows"][0] in (len(BAD), 0)
    if again.found:
        assert {name: number for name, (number, _) in again.removed.items()} == {
            name: number for name, (number, _) in outcome.removed.items()
        }
    assert content(work) == content(right)
    assert not forget(work, wanted).found


def test_sigkill_at_random_moments_is_completed_by_another_removal(whole: Path, tmp_path: Path) -> None:
    right = Path(shutil.copytree(whole, tmp_path / "right"))
    forget(right, asked_for(hosts=["bad.test"]))
    forget(right, asked_for(urls=[url(0)]))
    code = (
        "import sys; from pathlib import Path; import pyarrow.parquet, polars\n"
        "from clips_data.forget import forget; from clips_data.forgotten import asked_for\n"
        "print('ready', flush=True)\n"
        "forget(Path(sys.argv[1]), asked_for(hosts=['bad.test']))"
    )
    work, chance, unfinished = tmp_path / "work", random.Random(0), 0
    for _ in range(6):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(whole, work)
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(work)], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONPATH": "."},
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while process.poll() is None and not (work / "pairs" / room.PLAN).exists():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if (work / "pairs" / room.PLAN).exists():
            unfinished += 1
            with pytest.raises(UserError, match="stopped half-way"):
                refuse_unfinished(work / "pairs")
            with pytest.raises(UserError, match="without --dry-run"):
                forget(work, asked_for(urls=[url(0)]), dry_run=True)
        outcome = forget(work, asked_for(urls=[url(0)]))
        assert not any(traces(work, number) for number in [0, *BAD]) and outcome.found
        assert content(work) == content(right)
        refuse_unfinished(work / "pairs")
    assert unfinished, "kills that come after the end show nothing"


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_counts_lists_and_refuses_wrong_words(work: Path, capsys: Any) -> None:
    from cli.main import main

    assert main(["forget", "--host", "bad.test", "--work", str(work), "--dry-run"]) == 0
    assert "to remove" in capsys.readouterr().out and traces(work, 1)
    assert main(["forget", "--host", "bad.test", "--url", url(0), "--work", str(work)]) == 0
    said = capsys.readouterr()
    assert "pairs rows                7  18" in said.out and "forgotten.json" in said.err
    assert main(["forget", "--host", "bad.test", "--work", str(work), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["found"] is False and told["removed"]["pairs rows"] == [0, 18]
    (work / "list.txt").write_text("\n")
    assert main(["forget", "--work", str(work)]) == 2 and "Nothing to forget" in capsys.readouterr().err
    assert main(["forget", "--list", str(work / "list.txt"), "--work", str(work)]) == 2
    assert main(["forget", "--host", "http://bad.test/", "--work", str(work)]) == 2
    assert main(["forget", "--host", "bad.test", "--work", str(work / "pairs")]) == 1


def test_clips_run_passes_over_every_data_stage_afterwards(work: Path, capsys: Any) -> None:
    from cli.main import main

    manifest = work.parent / "manifest.yaml"
    options = "shard_rows: 4\n    heldout_ratio: 0.3\n    seed: 1"
    manifest.write_text(
        f"name: trial\nwork: {work}\nstages:\n  score:\n    model: fake-model\n  shard:\n    {options}\n"
    )
    assert main(["run", str(manifest), "--json"]) == 0
    assert main(["forget", "--host", "bad.test", "--work", str(work), "--quiet"]) == 0
    capsys.readouterr()
    made = content(work)
    assert main(["run", str(manifest), "--json", "--quiet"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [(stage["stage"], stage["what"]) for stage in stages] == [("score", "skipped"), ("shard", "skipped")]
    changed = {
        name for name, data in content(work).items() if made.get(name) != data and not name.startswith(".stages")
    }
    assert not changed


def test_the_rows_that_stay_are_named_by_the_room_that_empties_them() -> None:
    assert set(rewrite.KEPT_COLUMNS) <= set(schema.PAIR_COLUMNS) and rewrite.FORGOTTEN in schema.DOWNLOAD_CODES
