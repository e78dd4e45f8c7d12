"""Adoption of folders that others wrote: stock img2dataset's, stock webdataset's, broken and hostile ones."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import webdataset
from pairsmaker import image_bytes
from PIL import Image

from cli.main import main
from clips_data import adopt, foreign, joined, ledger, schema, shard, tars
from clips_data.config import ShardConfig
from clips_data.demo import web
from clips_data.errors import ResumeRefused, UsageError, UserError
from clips_data.executor import Job
from clips_data.forgotten import asked_for, remember
from clips_data.verify import verify

NUM_GOOD = 7
FAULTS = {
    "404": "http_4xx",
    "500": "http_5xx",
    "truncated": "decode_failed",
    "html": "decode_failed",
    "noai": "opt_out",
}
BAD_URLS = {
    "http://no-such-host.invalid/a.jpg?token=s3cr3t": "dns",
    "not a url": "bad_url",
    "http://127.0.0.1:1/a.jpg": "connect",
    "http://127.0.0.1:80/a b.jpg?signature=s3cr3t": "bad_url",
}
SHARD_ROWS = 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the stock img2dataset command wrote, with good URLs and bad ones. Not to be changed."""
    folder = tmp_path_factory.mktemp("img2dataset")
    with web.serve() as (host, port):
        base = f"http://{host}:{port}"
        good = [f"{base}/scenes/3/{i}.jpg?sig=s3cr3t{i}" for i in range(NUM_GOOD)]
        urls = [*good, *(f"{base}/scenes/3/9.jpg?fault={fault}" for fault in FAULTS), *BAD_URLS]
        with (folder / "list.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["url", "alt", "lot", "host"])
            writer.writerows([url, f"caption {i}", i, f"their host {i}"] for i, url in enumerate(urls))
        words = [
            "--url_list", folder / "list.csv", "--input_format", "csv", "--url_col", "url", "--caption_col", "alt",
            "--save_additional_columns", '["lot", "host"]', "--output_folder", folder / "shards",
            "--output_format", "webdataset", "--processes_count", "1", "--thread_count", "8", "--timeout", "10",
            "--number_sample_per_shard", SHARD_ROWS, "--image_size", "64", "--encode_quality", "90",
        ]  # fmt: skip
        command = [sys.executable, "-c", "from img2dataset.main import main; main()", *map(str, words)]
        environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
    yield folder / "shards"


def img2dataset_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pl.read_parquet(path).to_dicts()]


def adopted_rows(work: Path) -> list[dict[str, Any]]:
    pairs = work / "pairs"
    return [
        row for unit in ledger.finished_units(pairs) for row in pl.read_parquet(pairs / f"{unit}.parquet").to_dicts()
    ]


def state(folder: Path) -> dict[str, tuple[str, int]]:
    return {path.name: (ledger.digest_file(path), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())}


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_plain(folder: Path, num_tars: int = 2, samples: int = 3, **more: Any) -> Path:
    """Tars as webdataset's own writer makes them, with names that are no numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_tars):
        with webdataset.TarWriter(str(folder / f"cc-{number:03d}.tar")) as sink:
            for place in range(samples):
                name, number_of_image = f"img{place:02d}", number * samples + place
                sink.write({"__key__": name, "jpeg": image_bytes(number_of_image), "txt": f"text {place}", **more})
    return folder


def run(folder: Path, work: Path, **changes: Any) -> Any:
    options = {name: changes.pop(name) for name in list(changes) if name in Job.__dataclass_fields__}
    return adopt.adopt(folder, Job(work=work, quiet=True, **options), **changes)


# --- what img2dataset made --------------------------------------------------------------------------------------------


def test_every_row_of_img2dataset_is_a_row_of_ours_with_its_code(made: Path, tmp_path: Path) -> None:
    report = run(made, tmp_path)
    theirs, ours = img2dataset_rows(made), adopted_rows(tmp_path)
    codes = ["ok"] * NUM_GOOD + list(FAULTS.values()) + list(BAD_URLS.values())
    assert len(theirs) == len(ours) == len(codes)
    assert [row["source_key"] for row in ours] == [row["key"] for row in theirs]
    assert {row["lot"]: row["code"] for row in ours} == dict(enumerate(codes))
    assert [row["status"] for row in ours] == [row["status"] for row in theirs]
    assert [row["key"] for row in ours] == [
        schema.sample_key(place // SHARD_ROWS, place % SHARD_ROWS) for place in range(len(codes))
    ]
    assert report.counts == {code: codes.count(code) for code in set(codes)}
    assert report.made == len(report.units) == 2
    assert not report.notes


def test_adopted_rows_carry_the_lists_columns_and_what_the_images_say(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path)
    theirs = {row["key"]: row for row in img2dataset_rows(made)}
    images = {sample.key: sample.members["jpg"] for sample in tars.read_samples(made / "00000.tar")}
    good = [row for row in adopted_rows(tmp_path) if row["code"] == "ok"]
    assert len(good) == NUM_GOOD
    for row in good:
        their, data = theirs[row["source_key"]], images[row["source_key"]]
        assert (row["caption"], row["lot"], row["source_host"]) == (their["caption"], their["lot"], their["host"])
        assert (row["host"], row["image_ext"], row["bytes"]) == ("127.0.0.1", "jpg", len(data))
        assert (row["width"], row["height"]) == Image.open(io.BytesIO(data)).size == (64, 64)
        assert (row["original_width"], row["original_height"]) == (their["original_width"], their["original_height"])
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
        assert row["raw_sha256"] == their["sha256"] != row["sha256"]
    columns = pl.read_parquet(tmp_path / "pairs" / "00000.parquet").columns
    assert set(columns) == {*schema.PAIR_COLUMNS, "url", "caption", "lot", "source_host"}


def test_nothing_is_copied_and_their_folder_stays_as_it_is(made: Path, tmp_path: Path) -> None:
    before = state(made)
    run(made, tmp_path)
    assert state(made) == before
    link = tmp_path / "pairs" / "00000.tar"
    assert link.is_symlink() and link.readlink() == made.resolve() / "00000.tar"
    assert {path.name for path in (tmp_path / "pairs").iterdir()} == {
        f"{unit}{ending}" for unit in ("00000", "00001") for ending in (".tar", ".parquet", ".done.json")
    }


def test_worker_processes_make_the_same_bytes(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path / "a")
    run(made, tmp_path / "b", processes=2)
    for unit in ("00000", "00001"):
        name = f"pairs/{unit}.parquet"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_secrets_of_their_urls_are_in_no_file_of_ours(made: Path, tmp_path: Path) -> None:
    run(made, tmp_path)
    assert any("s3cr3t" in row["url"] for row in img2dataset_rows(made))
    written = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) == 4
    for row in adopted_rows(tmp_path):
        assert "s3cr3t" not in json.dumps(row)
    assert not [path for path in written if b"s3cr3t" in path.read_bytes()]


def test_an_adopted_folder_is_verified_through_its_links(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "theirs")
    run(tmp_path / "theirs", tmp_path)
    found = verify(tmp_path / "pairs")
    assert (found.num_files, found.num_intact, found.orphans) == (4, 4, [])
    tar = tmp_path / "theirs" / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[600] ^= 1
    tar.write_bytes(bytes(content))
    (said,) = verify(tmp_path / "pairs").corrupt.values()
    assert said.startswith("has another content than when it was finished: ")


def test_a_killed_shard_is_refused_by_name_and_the_others_are_adopted(made: Path, tmp_path: Path) -> None:
    """What a SIGKILL leaves of img2dataset: a cut tar, an empty table, no statistics."""
    shutil.copytree(made, tmp_path / "theirs")
    (tmp_path / "theirs" / "00001_stats.json").unlink()
    (tmp_path / "theirs" / "00001.parquet").write_bytes(b"")
    tar = tmp_path / "theirs" / "00000.tar"
    shutil.copy(tar, tmp_path / "theirs" / "00001.tar")
    with pytest.raises(UserError, match=r"1 of 2 tars were refused; 1 are adopted(.|\n)*00001\.parquet cannot be read"):
        run(tmp_path / "theirs", tmp_path)
    assert ledger.finished_units(tmp_path / "pairs") == ["00000"]
    os.truncate(tmp_path / "theirs" / "00001.tar", 3000)
    with pytest.raises(UserError, match=r"1 of 1 tars were refused(.|\n)*00001\.tar is not a usable shard: at byte"):
        run(tmp_path / "theirs", tmp_path)
    for ending in (".tar", ".parquet", "_stats.json"):
        shutil.copy(made / f"00001{ending}", tmp_path / "theirs")
    assert run(tmp_path / "theirs", tmp_path).made == 1
    assert ledger.finished_units(tmp_path / "pairs") == ["00000", "00001"]


def test_where_table_and_tar_disagree_the_tar_is_right_and_the_difference_is_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "theirs")
    folder = tmp_path / "theirs"
    samples = list(tars.read_samples(folder / "00000.tar"))
    members = [(f"{s.key}.{ext}", data) for s in samples[1:] for ext, data in s.members.items()]
    write_tar(folder / "00000.tar", [*members, ("stray.jpg", image_bytes(1)), ("stray.txt", b"a stray")])
    report = run(folder, tmp_path)
    rows = {row["source_key"]: row for row in adopted_rows(tmp_path)}
    lost = rows[samples[0].key]
    assert (lost["code"], lost["error_message"], lost["sha256"]) == ("internal", "the tar lacks this sample", None)
    assert (rows["stray"]["code"], rows["stray"]["caption"], rows["stray"]["url"]) == ("ok", "a stray", None)
    assert report.counts["ok"] == NUM_GOOD
    assert report.notes == [
        f"1 rows that say success without a sample in the tar; the first: 00000.tar {samples[0].key}",
        "1 images without a row in img2dataset's table; the first: 00000.tar stray",
    ]


def test_rows_that_img2dataset_lost_are_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "theirs")
    table = pl.read_parquet(tmp_path / "theirs" / "00001.parquet")
    table.head(len(table) - 1).write_parquet(tmp_path / "theirs" / "00001.parquet")
    (note,) = run(tmp_path / "theirs", tmp_path).notes
    assert "another number of rows than _stats.json; the first: 00001.tar (8 URLs, 7 rows)" in note


# --- running again ----------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_a_changed_tar_is_refused(made: Path, tmp_path: Path) -> None:
    folder, work = write_plain(tmp_path / "theirs"), tmp_path / "work"
    run(folder, work)
    digests = {path.name: ledger.digest_file(path) for path in (work / "pairs").iterdir()}
    again = run(folder, work)
    assert (again.made, again.skipped, again.counts) == (0, 2, {"ok": 6})
    assert {path.name: ledger.digest_file(path) for path in (work / "pairs").iterdir()} == digests
    write_tar(folder / "cc-001.tar", [("a.jpg", image_bytes(1)), ("a.txt", b"new")])
    with pytest.raises(ResumeRefused, match="input tar_bytes"):
        run(folder, work)
    assert run(folder, work, overwrite=True).made == 1
    assert [row["caption"] for row in adopted_rows(work)] == ["text 0", "text 1", "text 2", "new"]


def test_only_what_is_missing_is_done_in_slices_and_within_a_limit(tmp_path: Path) -> None:
    folder, work = write_plain(tmp_path / "theirs", num_tars=4), tmp_path / "work"
    assert run(folder, work, limit=7).made == 2  # the third tar does not fit as a whole
    assert run(folder, work, dry_run=True).facts == {"shards_to_do": 2}
    assert run(folder, work, slice="1/2").made == 1
    assert ledger.finished_units(work / "pairs") == ["00000", "00001", "00003"]
    assert run(folder, work).made == 1


def test_another_folder_is_never_mixed_in(tmp_path: Path) -> None:
    work = tmp_path / "work"
    run(write_plain(tmp_path / "long", num_tars=3), work)
    short = write_plain(tmp_path / "short", num_tars=1)
    with pytest.raises(ResumeRefused, match=r"2 adopted shards that .*short has no tar for \(00001, 00002\)"):
        run(short, work)
    run(short, work, overwrite=True)
    assert ledger.finished_units(work / "pairs") == ["00000"]
    assert (work / "pairs" / "00000.tar").readlink() == short.resolve() / "cc-000.tar"


def test_what_a_kill_leaves_is_no_link_that_another_writer_would_write_through(tmp_path: Path) -> None:
    """A later download opens its ``*.part`` for writing; none of ours may lead into their folder."""
    folder, work = write_plain(tmp_path / "theirs", num_tars=1), tmp_path / "work"
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from clips_data import adopt, ledger\n"
        "from clips_data.executor import Job\n"
        "replace = Path.replace\n"
        "def killed(path, target):\n"
        "    os._exit(9) if Path(target).suffix == '.tar' else replace(path, target)\n"
        "Path.replace = killed\n"
        "adopt.adopt(Path(sys.argv[1]), Job(work=Path(sys.argv[2]), quiet=True))\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, folder, work], cwd=root, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 9
    links = [path for path in (work / "pairs").iterdir() if path.is_symlink()]
    assert links and not [path for path in links if path.name.endswith((ledger.PART, ".tar"))]
    assert run(folder, work).made == 1
    assert not [path for path in (work / "pairs").iterdir() if path.name.endswith((ledger.PART, ".link"))]


# --- plain webdataset folders -----------------------------------------------------------------------------------------


def test_a_plain_webdataset_folder_becomes_pairs_with_captions_from_txt(tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "theirs", json={"url": "http://me:pw@a.test/1.jpg?token=x", "note": "n"})
    report = run(folder, tmp_path)
    assert report.counts == {"ok": 6}
    rows = adopted_rows(tmp_path)
    assert [(row["key"], row["source_key"], row["caption"]) for row in rows] == [
        (schema.sample_key(number, place), f"img{place:02d}", f"text {place}")
        for number in (0, 1)
        for place in range(3)
    ]
    assert {row["url"] for row in rows} == {"http://REDACTED@a.test/1.jpg?token=REDACTED"}
    assert {(row["host"], row["image_ext"], row["width"], row["height"]) for row in rows} == {("a.test", "jpg", 32, 24)}


def test_captions_are_taken_from_another_member_or_from_a_key_of_the_json(tmp_path: Path) -> None:
    folder = write_plain(tmp_path / "theirs", 1, 1, json={"alt": "from json"}, caption=b"from caption", cls=b"3")
    ignore = ("cls", "caption")
    run(folder, tmp_path / "a", caption_ext="caption", ignore=("cls",))
    run(folder, tmp_path / "b", caption_key="alt", ignore=ignore)
    report = run(folder, tmp_path / "c", caption_key="alternative", ignore=ignore)
    assert [adopted_rows(tmp_path / name)[0]["caption"] for name in "abc"] == ["from caption", "from json", None]
    assert report.notes == ["1 samples without a text 'alternative' in their json; the first: cc-000.tar img00"]


def test_a_bad_image_is_a_row_and_not_the_end(tmp_path: Path) -> None:
    gif = io.BytesIO()
    Image.new("RGB", (8, 8)).save(gif, "GIF")
    good = image_bytes(1, size_px=80)
    members = [
        ("cut.jpg", good[:-60]), ("html.jpg", b"<html>"), ("gif.jpg", gif.getvalue()), ("good.jpg", good),
        ("large.png", image_bytes(2, "PNG", size_px=200)), ("png.jpg", image_bytes(3, "PNG")),
        ("text.txt", b"no image"),
    ]  # fmt: skip
    (tmp_path / "theirs").mkdir()
    write_tar(tmp_path / "theirs" / "7.tar", members)
    run(tmp_path / "theirs", tmp_path, max_pixels=10_000)
    rows = {row["source_key"]: row for row in adopted_rows(tmp_path)}
    assert {key: row["code"] for key, row in rows.items()} == {
        "cut": "decode_failed", "html": "not_an_image", "gif": "not_an_image", "good": "ok",
        "large": "too_many_pixels", "png": "ok", "text": "not_an_image",
    }  # fmt: skip
    assert (rows["png"]["image_ext"], rows["good"]["image_ext"]) == ("png", "jpg")  # by content, not by name
    assert rows["good"]["key"] == schema.sample_key(7, 3)
    assert all(row["error_message"] for row in rows.values() if row["code"] != "ok")


def test_tars_with_numbers_keep_them_and_others_are_counted_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("numbers", "words"):
        (tmp_path / name).mkdir()
    for tar in ("numbers/00003.tar", "numbers/0012.tar", "words/b.tar", "words/a.tar", "words/00007.tar"):
        write_tar(tmp_path / tar, [("x.jpg", image_bytes(1))])
    run(tmp_path / "numbers", tmp_path / "1")
    run(tmp_path / "words", tmp_path / "2")
    assert ledger.finished_units(tmp_path / "1" / "pairs") == ["00003", "00012"]
    links = {path.name: path.readlink().name for path in (tmp_path / "2" / "pairs").glob("*.tar")}
    assert links == {"00000.tar": "00007.tar", "00001.tar": "a.tar", "00002.tar": "b.tar"}


@pytest.mark.parametrize(
    ("members", "why"),
    [
        (
            [("a.jpg", b"x"), ("a.pyd", b"cos\nsystem\n(S'true'\ntR.")],
            r"at byte 1024 member 'a\.pyd' has an unknown ext",
        ),
        ([("a.jpg", b"x"), ("a.b.jpg", b"x")], r"at byte 1024 member name 'a\.b\.jpg' has a key with a dot"),
        (
            [("a.jpg", b"x"), ("train/b.jpg", b"x")],
            r"at byte 1024 member name 'train/b\.jpg' points into another folder",
        ),
        ([("a.jpg", b"x"), ("a.jpg", b"y")], r"at byte 1024 member 'a\.jpg' is there twice"),
        ([("a.jpg", b"x"), ("b.jpg", b"y"), ("a.txt", b"z")], r"at byte 2048 key 'a' comes back after other keys"),
        ([("a.jpg", b"x"), ("a.png", b"y")], r"at byte 1024 sample 'a' has a second image"),
        ([(f"{i}.txt", b"") for i in range(10_001)], "holds 10001 samples, and a shard has at most 10000"),
    ],
)
def test_a_hostile_tar_is_refused_with_its_place(tmp_path: Path, members: list[tuple[str, bytes]], why: str) -> None:
    (tmp_path / "theirs").mkdir()
    write_tar(tmp_path / "theirs" / "bad.tar", members)
    write_tar(tmp_path / "theirs" / "good.tar", [("a.jpg", image_bytes(1))])
    with pytest.raises(UserError, match=why) as caught:
        run(tmp_path / "theirs", tmp_path)
    assert "1 of 2 tars were refused; 1 are adopted" in str(caught.value)
    assert ledger.finished_units(tmp_path / "pairs") == ["00001"]


def test_links_in_a_tar_are_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    with tarfile.open(tmp_path / "theirs" / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="is a symbolic link, not a plain file"):
        run(tmp_path / "theirs", tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"ignore": ("png",)}, UsageError, "is an extension of images"),
        ({"caption_ext": "a.txt"}, UsageError, "is no extension of members"),
        ({"folder": "nowhere"}, UserError, "There is no folder"),
        ({"folder": "empty"}, UserError, "holds no .tar files"),
        ({"work": "theirs"}, UserError, "lies in the folder that is to be adopted"),
    ],
)
def test_a_bad_choice_is_one_sentence_and_writes_nothing(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], why: str
) -> None:
    (tmp_path / "empty").mkdir()
    write_plain(tmp_path / "theirs", 1, 1)
    folder, work = tmp_path / changes.pop("folder", "theirs"), tmp_path / changes.pop("work", "work")
    with pytest.raises(error, match=why):
        run(folder, work, **changes)
    assert not (work / "pairs").exists()


# --- what comes after -------------------------------------------------------------------------------------------------


def test_the_stages_to_the_right_find_adopted_images_by_their_own_keys(made: Path, tmp_path: Path) -> None:
    for folder in (made, write_plain(tmp_path / "plain", cls=b"1")):
        work = tmp_path / f"work-{folder.name}"
        run(folder, work, ignore=("cls",))
        given = joined.open_inputs(work, ("web",))
        for unit in given.units:
            table = given.table(unit)
            images = list(joined.read_images(given.pairs, unit, table))
            assert [ledger.digest_bytes(image) for image in images] == table["sha256"].to_list()
        shard.run(ShardConfig(columns=("web",), scores=None), Job(work=work, quiet=True))
        samples = [s for path in sorted((work / "shards").glob("*.tar")) for s in tars.read_samples(path)]
        assert {s.key: s.members["txt"].decode() for s in samples} == {
            row["key"]: row["caption"] for row in adopted_rows(work) if row["code"] == "ok"
        }
        assert len(samples) >= 6


def test_the_prompts_of_recaption_get_the_adopted_images(made: Path, tmp_path: Path) -> None:
    from clips_data.recaption import prompts, rows

    run(made, tmp_path)
    found = rows.sample_rows(tmp_path, prompts.load("describe"), 1000)
    assert len(found) == NUM_GOOD
    assert [ledger.digest_bytes(row.image) for row in found] == [row.sha256 for row in found]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_adopted_shards_and_its_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_plain(tmp_path / "theirs", cls=b"1")
    words = ["adopt", str(folder), "--work", str(tmp_path / "work")]
    assert main(words) == 1
    assert "member 'img00.cls' has an unknown extension" in capsys.readouterr().err
    assert main([*words, "--ignore-members", "cls,npy"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / "work" / "pairs" / f"{unit}.tar") for unit in ("00000", "00001")]
    assert "adopt: 2 made, 0 skipped" in err and "6 of 6 succeeded" in err


def test_captions_of_a_table_become_a_column_of_adopted_pairs(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Joined by URLs whose signatures were renewed since."""
    run(made, tmp_path)
    good = [row for row in img2dataset_rows(made) if row["status"] == "success"]
    table = [{"link": row["url"].replace("s3cr3t", "renewed"), "long": f"long {row['lot']}"} for row in good[1:]]
    pl.DataFrame(table).write_parquet(tmp_path / "recap.parquet")
    words = ["adopt", str(tmp_path / "recap.parquet"), "--captions", "long", "--as", "recap", "--work", str(tmp_path)]
    assert main([*words, "--by", "url", "--table-key", "link"]) == 0
    assert capsys.readouterr().out.split()[0] == str(tmp_path / "captions" / "recap" / "00000.parquet")
    given = joined.open_inputs(tmp_path, ("web", "recap"))
    rows = pl.concat([given.table(unit).select("lot", "text.recap", "code.recap") for unit in given.units])
    expected = {row["lot"]: (f"long {row['lot']}", "ok") for row in good[1:]} | {good[0]["lot"]: ("", "empty")}
    assert {lot: (text, code) for lot, text, code in rows.iter_rows()} == expected


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (["theirs", "--by", "url"], 2, "--by is about a table of captions"),
        (["theirs", "--caption-ext", "a", "--caption-key", "b"], 2, "Give one of them"),
        (["list.csv"], 1, "is a file. Name a folder of tars"),
        (["list.csv", "--captions", "text", "--caption-ext", "a"], 2, "--caption-ext is about a folder of tars"),
        (["list.csv", "--captions", "text", "--slice", "0/2"], 2, "--slice is about a folder of tars"),
        (["list.csv", "--captions", "text", "--as", "other"], 2, "--by KEY"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    why: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_plain(tmp_path / "theirs", 1, 1)
    (tmp_path / "list.csv").write_text("url,text\n")
    assert main(["adopt", *words]) == code
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("<urlopen error timed out>", "timeout"),
        ("<urlopen error _ssl.c:1015: The handshake operation timed out>", "timeout"),
        ("HTTP Error 504: Gateway Time-out", "http_5xx"),
        ("HTTP Error 308: Permanent Redirect", "http_3xx"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("<urlopen error [Errno 11001] getaddrinfo failed>", "dns"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed (_ssl.c:1006)>", "tls"),
        ("[Errno 104] Connection reset by peer", "connect"),
        ("IncompleteRead(0 bytes read)", "connect"),
        ("hash mismatch", "hash_mismatch"),
        ("image area too large", "too_many_pixels"),
        ("image too small", "internal"),
    ],
)
def test_img2datasets_messages_have_codes(message: str, code: str) -> None:
    assert foreign.code_of(message) == code


def test_overwriting_does_not_bring_back_what_was_forgotten(tmp_path: Path) -> None:
    folder, work = write_plain(tmp_path / "theirs"), tmp_path / "work"
    run(folder, work)
    remember(work / "pairs", asked_for(hosts=["example.com"]))
    with pytest.raises(UserError, match="told to forget"):
        run(folder, work, overwrite=True)
    assert run(folder, work).skipped == 2
