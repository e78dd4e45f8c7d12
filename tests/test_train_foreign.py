"""Others' webdataset tars, read in place: grouping, columns, damage, the kept index."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import shardmaker
import torch
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips_data import split
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_train import foreign, shards
from clips_train.config import TrainConfig
from clips_train.data import SampleStream
from clips_train.shards import ShardError, ShardReader, Split
from clips_train.tokenizer import build_tokenizer

PICTURE, _ = shardmaker.sample(0)


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pair(key: str, text: str = "a dog", **about: Any) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.jpg", PICTURE),
        (f"{key}.txt", text.encode()),
        (f"{key}.json", json.dumps({"key": key, **about}).encode()),
    ]


def opened(tmp_path: Path, *given: Path) -> tuple[Split, ShardReader]:
    found = foreign.open_shards(list(given), shards.TRAIN, index=tmp_path / "work" / "index")
    return found, ShardReader(found)


def rows(found: Split, reader: ShardReader) -> list[tuple[str, bytes, str]]:
    return [
        (reader.key(shard, row), reader.image(shard, row), reader.about(shard, row).get("txt", ""))
        for shard, count in enumerate(found.num_samples_by_shard)
        for row in range(count)
    ]


def test_columns_are_the_txt_and_every_text_of_the_json(tmp_path: Path) -> None:
    members = pair("0", caption="one. two.", width=7, url=None) + pair("1", caption=None, alt="x") + [("2.png", b"p")]
    found, reader = opened(tmp_path, write_tar(tmp_path / "theirs" / "a.tar", members))
    assert found.columns == ("txt", "alt", "caption") and found.num_samples == 3
    about = [reader.about(0, row) for row in range(3)]
    assert [row["caption"] for row in about] == ["one. two.", "", ""]
    assert [row["alt"] for row in about] == ["", "x", ""]
    assert [row["txt"] for row in about] == ["a dog", "a dog", ""]
    assert about[0]["sub_captions"]["caption"] == split.split("one. two.", foreign.SPLIT_RULE)
    assert "width" not in about[0]["sub_captions"] and None not in about[0]["sub_captions"]
    assert ShardConfig.model_fields["split"].default == foreign.SPLIT_RULE


def test_sub_captions_that_are_there_are_used_where_they_fit_their_text(tmp_path: Path) -> None:
    spans = {"caption": [[0, 5]], "alt": [[0, 99]], "other": [["0", 1]]}
    members = pair("0", caption="three words. here", alt="a. b", other="c. d", sub_captions=spans)
    _, reader = opened(tmp_path, write_tar(tmp_path / "a.tar", members))
    found = reader.about(0, 0)["sub_captions"]
    assert [list(span) for span in found["caption"]] == [[0, 5]]
    assert len(found["alt"]) == len(found["other"]) == 2


names = st.text(alphabet="ab./_J", min_size=1, max_size=8).filter(lambda name: not name.endswith("/"))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.lists(names, min_size=1, max_size=5, unique=True),
    exts=st.lists(st.sampled_from(["jpg", "txt", "png", "JPG", "cls", "0001.jpg", ""]), min_size=1, max_size=4),
)
def test_samples_are_grouped_as_webdataset_groups_them(
    heads: list[str], exts: list[str], tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    members = [(f"{head}.{ext}", f"{head}.{ext}".encode()) for head in heads for ext in exts]
    tar = write_tar(folder / "a.tar", members)
    try:
        theirs = list(webdataset.WebDataset(str(tar), shardshuffle=False, handler=webdataset.reraise_exception))
    except (ValueError, IndexError):
        with pytest.raises(UserError, match="twice"):
            opened(folder, tar)
        return
    expected = []
    for sample in theirs:
        image = next((sample[ext] for ext in foreign.IMAGES if ext in sample), None)
        if image is not None:
            expected.append((sample["__key__"], image, sample.get("txt", b"").decode()))
    keys = [sample["__key__"] for sample in theirs]
    if len(set(keys)) < len(keys):
        with pytest.raises(UserError, match="comes back"):
            opened(folder, tar)
    elif not expected:
        with pytest.raises(UserError, match="hold no sample"):
            opened(folder, tar)
    else:
        assert rows(*opened(folder, tar)) == expected


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_read_in_both_ways_that_tars_write_them(tmp_path: Path, form: int) -> None:
    keys = ["x" * 90 + "/" + "ü" * 80 + str(number) for number in range(3)]
    tar = write_tar(tmp_path / "a.tar", [member for key in keys for member in pair(key, key)], form)
    assert rows(*opened(tmp_path, tar)) == [(key, PICTURE, key) for key in keys]


def test_what_is_no_part_of_a_sample_is_ignored_and_counted(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name, data in [("README", b"x"), *pair("0"), ("0.cls", b"1"), ("0.pickle", b"x"), ("1.txt", b"alone")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    found, reader = opened(tmp_path, tar)
    assert [key for key, _, _ in rows(found, reader)] == ["0"]
    assert isinstance(found, foreign.ForeignSplit)
    assert found.ignored == {"no_plain_file": 2, "no_extension": 1, "cls": 1, "pickle": 1, "no_image": 1}


def test_a_tar_cut_anywhere_is_refused_with_file_and_offset(tmp_path: Path) -> None:
    members = [member for number in range(3) for member in pair(str(number))]
    data = write_tar(tmp_path / "whole.tar", members).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        end = max(member.offset_data + member.size for member in tar)
    begins = sorted({0, 1, 511, 512, 513, 1024, 5000, end - 1, end, -(-end // 512) * 512})
    for length in begins:
        (tmp_path / "cut.tar").write_bytes(data[:length])
        with pytest.raises(UserError, match=r"cut\.tar .*at byte \d+"):
            opened(tmp_path, tmp_path / "cut.tar")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:1536] + b"\xff" * 512 + data[2048:], r"at byte 1536 no tar header"),
        (lambda data: data + data, "more data follow"),
        (lambda data: b"\x1f\x8b" + data[2:], "compressed"),
    ],
)
def test_damage_is_refused(tmp_path: Path, spoil: Any, reason: str) -> None:
    tar = write_tar(tmp_path / "a.tar", [member for number in range(3) for member in [(f"{number}.jpg", b"x" * 600)]])
    tar.write_bytes(spoil(tar.read_bytes()))
    with pytest.raises(UserError, match=reason):
        opened(tmp_path, tar)


def test_members_and_keys_that_come_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.tar .*at byte 1536 member '0\.jpg' is there twice"):
        opened(tmp_path, write_tar(tmp_path / "a.tar", [("0.txt", b""), ("0.jpg", b"x"), ("0.jpg", b"y")]))
    with pytest.raises(UserError, match=r"b\.tar .*key '0' comes back"):
        opened(tmp_path, write_tar(tmp_path / "b.tar", [("0.jpg", b"x"), ("1.jpg", b"x"), ("0.txt", b"y")]))


def test_bad_texts_have_a_reason(tmp_path: Path) -> None:
    members = [("0.jpg", PICTURE), ("0.txt", b"\xff"), ("1.jpg", PICTURE), ("1.json", b"{"), ("2.jpg", PICTURE)]
    members += [("2.json", b'{"text": "\\ud800"}'), ("3.jpg", PICTURE), ("3.json", b"[]")]
    members += [("4.jpg", PICTURE), ("4.json", b'{"similarity": NaN}')]
    _, reader = opened(tmp_path, write_tar(tmp_path / "a.tar", members))
    reasons = []
    for row in range(4):
        with pytest.raises(ShardError) as caught:
            reader.about(0, row)
        reasons.append(caught.value.reason)
    assert reasons == ["txt_invalid", "json_invalid", "json_invalid", "json_invalid"]
    assert reader.about(0, 4)["txt"] == ""


def test_the_index_is_made_once_and_again_when_a_tar_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tmp_path / "theirs"
    tars = [write_tar(theirs / f"{number}.tar", pair(str(number))) for number in range(2)]
    before = sorted(theirs.iterdir())
    first, _ = opened(tmp_path, theirs)
    assert sorted(theirs.iterdir()) == before, "their folder was written to"
    scanned: list[Path] = []
    scan = foreign._Scan
    monkeypatch.setattr(foreign, "_Scan", lambda path: scanned.append(path) or scan(path))
    assert opened(tmp_path, theirs)[0] == first and scanned == []
    os.utime(tars[0], ns=(1, 1))
    assert opened(tmp_path, theirs)[0].digest == first.digest and scanned == [tars[0]]
    write_tar(tars[1], pair("1", "a longer text than before"))
    assert opened(tmp_path, theirs)[0].digest != first.digest and scanned == tars
    index = next((tmp_path / "work" / "index").glob("0-*.parquet"))
    index.write_bytes(index.read_bytes()[:-3])
    assert opened(tmp_path, theirs)[0].num_samples == 2 and scanned == [*tars, tars[0]]


def test_many_tars_are_indexed_by_several_processes_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        write_tar(tmp_path / "theirs" / f"{number}.tar", pair(str(number)))
    alone = foreign.open_shards([tmp_path / "theirs"], "train", index=tmp_path / "index")
    monkeypatch.setattr(foreign, "TARS_PER_PROCESS", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    together = foreign.open_shards([tmp_path / "theirs"], "train", index=tmp_path / "index_2")
    assert together.digest == alone.digest and together.num_samples_by_shard == (1,) * 6
    write_tar(tmp_path / "theirs" / "9.tar", pair("9")).write_bytes(b"x" * 700)
    with pytest.raises(UserError, match=r"9\.tar .*at byte 0"):
        foreign.open_shards([tmp_path / "theirs"], "train", index=tmp_path / "index_3")


def test_tars_are_named_by_path_folder_glob_and_braces(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / "t" / f"{number:05d}.tar", pair(str(number))) for number in range(12)]
    folder = tmp_path / "t"
    assert foreign.tars_named([folder]) == tars
    assert foreign.tars_named([folder / "{00002..00010}.tar"]) == tars[2:11]
    assert foreign.tars_named([folder / "{00003,00001}.tar", tars[1]]) == [tars[3], tars[1]]
    assert foreign.tars_named([folder / "0000?.tar"]) == tars[:10]
    assert foreign.open_shards(tars[1], "train", index=tmp_path / "index").num_samples == 1
    for wrong in ("{00002..00013}.tar", "none*.tar", "gone.tar"):
        with pytest.raises(UserError, match="names no tar"):
            foreign.tars_named([folder / wrong])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="names no tar"):
        foreign.tars_named([tmp_path / "empty"])


def test_our_own_shards_are_opened_as_such_and_give_the_same_through_this_door(tmp_path: Path) -> None:
    folder = shardmaker.write_shards(tmp_path / "shards")
    index = tmp_path / "index"
    ours = shards.open_split(folder, "train")
    assert foreign.open_shards(folder, "train", index=index) == ours
    assert foreign.open_shards([folder / "train-00000.tar"], "train", index=index) == ours
    copies = tmp_path / "copies"
    copies.mkdir()
    for file in ours.files:
        (copies / file).write_bytes((folder / file).read_bytes())
    theirs = foreign.open_shards(copies, "train", index=index)
    assert {"web", "synthetic"} <= set(theirs.columns)
    config = TrainConfig(size="tiny", image_px=16, context_length=12, target_length=24, batch=6)
    tokenizer = build_tokenizer("bpe")
    streams = [SampleStream(found, config, tokenizer).batches() for found in (ours, theirs)]
    for one, other in itertools.islice(zip(*streams, strict=True), 7):
        assert one.keys == other.keys and torch.equal(one.image_NCHW, other.image_NCHW)
        assert torch.equal(one.labels_NQ, other.labels_NQ)
        for number in range(2):
            assert torch.equal(one.views[number].ids_NKL, other.views[number].ids_NKL)
    for stream in streams:
        stream.close()


def test_an_unfinished_folder_without_tars_says_what_open_split_says(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with pytest.raises(UserError, match="clips shard"):
        foreign.open_shards(tmp_path / "shards", "train", index=tmp_path / "index")
