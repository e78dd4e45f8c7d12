"""Reading and writing of webdataset tars: offsets, damage, hostile members, equal bytes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data import tars
from clips_data.errors import UserError

MEMBERS = [("000000000.jpg", b"\xff\xd8image"), ("000000000.txt", b"caption"), ("000000000.json", b"{}"),
           ("000000001.webp", bytes(1024)), ("000000001.txt", b""), ("000000001.json", b'{"a": 1}')]  # fmt: skip


def write(path: Path, members: list[tuple[str, bytes]]) -> list[int]:
    with path.open("wb") as file:
        writer = tars.TarWriter(file)
        offsets = [writer.add(name, data) for name, data in members]
        writer.close()
    return offsets


def write_foreign(path: Path, *infos: tarfile.TarInfo, data: bytes = b"x") -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info in infos:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def test_writer_writes_what_the_standard_library_writes(tmp_path: Path) -> None:
    write(tmp_path / "ours.tar", MEMBERS)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()


@given(st.from_regex(r"[!-\-0-\[\]-~]{1,90}\.[a-z]{1,5}", fullmatch=True), st.integers(0, tars.MAX_MEMBER_BYTES))
def test_headers_are_those_of_the_standard_library(name: str, size_bytes: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size_bytes, 0o644, 0
    assert tars.header(name, size_bytes) == info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


@pytest.mark.parametrize(
    "name",
    [
        "x" * 97 + ".jpg",
        "",
        ".",
        "a.b.jpg",
        "jpg",
        "a/b.jpg",
        "ü.jpg",
        "a\0.jpg",
        "a b.jpg",
        "\n.jpg",
        ".jpg",
        "a\\b.jpg",
    ],
)
def test_names_that_a_reader_could_not_tell_apart_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name of a member"):
        tars.header(name, 0)


def test_the_longest_name_and_the_largest_member_fit_and_no_more() -> None:
    longest = "x" * 96 + ".jpg"
    info = tarfile.TarInfo.frombuf(tars.header(longest, tars.MAX_MEMBER_BYTES), "ascii", "strict")
    assert (info.name, info.size) == (longest, 8 * 2**30 - 1)
    with pytest.raises(UserError, match=r"1\.jpg has 8589934592 bytes"):
        tars.header("1.jpg", tars.MAX_MEMBER_BYTES + 1)


def test_archives_of_many_pieces_are_those_of_the_standard_library(tmp_path: Path) -> None:
    """Members around the size in which bytes are handed on, and around that of a block."""
    piece = 1 << 20
    lengths = [0, 1, 511, 512, 513, piece - 513, piece - 512, piece, piece + 1, 3 * piece + 7, *[300_000] * 9, 5]
    members = [(f"{number:09d}.jpg", bytes([number + 1]) * length) for number, length in enumerate(lengths)]
    offsets = write(tmp_path / "ours.tar", members)
    with tarfile.open(tmp_path / "theirs.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    assert offsets == [member.offset for member in tars.read_members(tmp_path / "ours.tar")]


def test_offsets_point_at_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    offsets = write(path, MEMBERS)
    content = path.read_bytes()
    assert [content[at : at + len(data)] for at, (_, data) in zip(offsets, MEMBERS, strict=True)] == [
        data for _, data in MEMBERS
    ]
    assert [(m.name, m.offset, m.size_bytes) for m in tars.read_members(path)] == [
        (name, at, len(data)) for at, (name, data) in zip(offsets, MEMBERS, strict=True)
    ]


def test_samples_are_grouped_by_key(tmp_path: Path) -> None:
    offsets = write(tmp_path / "a.tar", MEMBERS)
    first, second = tars.read_samples(tmp_path / "a.tar")
    assert (first.key, first.image_ext, first.members["txt"]) == ("000000000", "jpg", b"caption")
    assert (second.key, second.image_ext, second.members["txt"]) == ("000000001", "webp", b"")
    assert second.offsets["webp"] == offsets[3]


def test_webdatasets_own_tars_are_read(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "w.tar")) as sink:
        sink.write({"__key__": "000000000", "jpg": b"image", "txt": "caption", "json": {"a": 1}})
    (sample,) = tars.read_samples(tmp_path / "w.tar")
    assert sample.members == {"jpg": b"image", "txt": b"caption", "json": b'{"a": 1}'}


@pytest.mark.parametrize("cut", [100, 512, 700, 5000])
def test_a_truncated_tar_is_refused_with_its_offset(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.tar"
    write(path, MEMBERS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"cut\.tar is not a usable shard: at byte \d+"):
        list(tars.read_samples(path))


def test_a_tar_cut_between_members_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    offsets = write(path, MEMBERS)
    path.write_bytes(path.read_bytes()[: offsets[3] - 512])
    with pytest.raises(UserError, match=f"at byte {offsets[3] - 512} "):
        list(tars.read_members(path))


def test_a_flipped_header_and_an_appended_tar_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write(path, MEMBERS)
    good = path.read_bytes()
    path.write_bytes(b"9" + good[1:])
    with pytest.raises(UserError, match="at byte 0 the tar header's checksum is wrong"):
        list(tars.read_members(path))
    path.write_bytes(good + good)
    with pytest.raises(UserError, match="more data follow"):
        list(tars.read_members(path))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../000000000.jpg", "another folder"),
        ("/etc/000000000.jpg", "another folder"),
        ("sub/000000000.jpg", "another folder"),
        ("000.000.jpg", "a key with a dot"),
        ("000000000.pyd", "unknown extension"),
        ("000000000", "not of the form"),
        (".jpg", "not of the form"),
        ("x" * 200 + ".jpg", "extended header sets 'path'"),
    ],
)
def test_hostile_names_are_refused(tmp_path: Path, name: str, why: str) -> None:
    path = write_foreign(tmp_path / "a.tar", tarfile.TarInfo("000000009.txt"), tarfile.TarInfo(name))
    with pytest.raises(UserError, match=why) as caught:
        list(tars.read_members(path))
    assert "at byte 1024 " in str(caught.value)


def test_a_name_with_nul_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("000000000_.jpg")
    info.mtime = 0
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[9:10] = b"\0"
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(UserError, match="NUL"):
        list(tars.read_members(tmp_path / "a.tar"))


@pytest.mark.parametrize(("kind", "word"), [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"),
                                             (tarfile.DIRTYPE, "folder"), (tarfile.CHRTYPE, "device")])  # fmt: skip
def test_links_folders_and_devices_are_refused(tmp_path: Path, kind: bytes, word: str) -> None:
    info = tarfile.TarInfo("000000000.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match=word):
        list(tars.read_members(write_foreign(tmp_path / "a.tar", info)))


def test_duplicate_members_and_returning_keys_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "twice.tar", [("1.jpg", b"a"), ("1.jpg", b"b")])
    with pytest.raises(UserError, match=r"'1\.jpg' is there twice"):
        list(tars.read_members(tmp_path / "twice.tar"))
    write(tmp_path / "back.tar", [("1.jpg", b"a"), ("2.jpg", b"b"), ("1.txt", b"c")])
    with pytest.raises(UserError, match="'1' comes back"):
        list(tars.read_samples(tmp_path / "back.tar"))


def test_a_missing_tar_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read"):
        list(tars.read_members(tmp_path / "no.tar"))
