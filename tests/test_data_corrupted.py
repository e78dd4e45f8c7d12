"""Damaged and hostile inputs: each is refused by every command that meets it, with file and place, nothing written.

A case damages a small real work folder before its sidecar was written, so that only content can tell: sizes and hashes
agree with the sidecar. ``verify`` meets the same damage after the sidecar was written, and has to say where it is.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pairsmaker
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_data_score import model as model  # a tiny model for stock open_clip

from clips_data import adopt, ledger, score, shard, tars
from clips_data.config import ScoreConfig, ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job
from clips_data.verify import verify
from clips_train.shards import ShardError, ShardReader, open_split

BLOCK = 512


@dataclass(frozen=True)
class Case:
    """``damage(work)`` spoils one file and returns it; ``says`` is what a refusal has to contain."""

    damage: Callable[[Path], Path]
    says: str
    commands: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(says: str, *commands: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def register(damage: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES[damage.__name__] = Case(damage, says, commands)
        return damage

    return register


# --- tars of pairs ----------------------------------------------------------------------------------------------------


def tar_of(work: Path) -> Path:
    return work / "pairs" / "00001.tar"


def members(tar: Path) -> list[tars.Member]:
    return list(tars.read_members(tar))


def rewrite(tar: Path, change: Callable[[bytearray, list[tars.Member]], bytes | bytearray | None]) -> Path:
    data = bytearray(tar.read_bytes())
    changed = change(data, members(tar))
    tar.write_bytes(data if changed is None else changed)
    return tar


def with_header(data: bytearray, position: int, change: Callable[[bytearray], None]) -> bytearray:
    """``data`` with the header at ``position`` changed, and its checksum right again."""
    header = data[position : position + BLOCK]
    change(header)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    data[position : position + BLOCK] = header
    return data


def insert(tar: Path, *infos: tarfile.TarInfo, content: bytes = b"x", form: int = tarfile.USTAR_FORMAT) -> Path:
    """Puts members before the third one."""

    def change(data: bytearray, there: list[tars.Member]) -> bytearray:
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            for info in infos:
                info.size = len(content) if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
                archive.addfile(info, io.BytesIO(content))
            end = archive.offset
        at = there[2].offset - BLOCK
        return data[:at] + file.getvalue()[:end] + data[at:]

    return rewrite(tar, change)


def info(name: str, **about: Any) -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    for field, value in about.items():
        setattr(found, field, value)
    return found


READERS = ("shard", "score", "adopt")


@case(r"00001\.tar .* at byte \d+ 512 bytes are expected", *READERS)
def cut_in_a_header(work: Path) -> Path:
    return rewrite(tar_of(work), lambda data, there: data[: there[4].offset - 100])


@case(r"00001\.tar .* at byte \d+ a member of \d+ bytes begins here and the file ends", *READERS)
def cut_in_data(work: Path) -> Path:
    return rewrite(tar_of(work), lambda data, there: data[: there[3].offset + 10])


@case(r"00001\.tar .* at byte \d+ 512 bytes are expected", *READERS)
def cut_between_members(work: Path) -> Path:
    return rewrite(tar_of(work), lambda data, there: data[: there[6].offset - BLOCK])


@case(r"00001\.tar .* at byte \d+ 1024 bytes are expected", *READERS)
def cut_in_its_end(work: Path) -> Path:
    def change(data: bytearray, there: list[tars.Member]) -> bytearray:
        end = there[-1].offset + there[-1].size_bytes
        return data[: end + -end % BLOCK + BLOCK]

    return rewrite(tar_of(work), change)


@case(r"00001\.tar .* at byte 0 512 bytes are expected", *READERS)
def empty_tar_file(work: Path) -> Path:
    return rewrite(tar_of(work), lambda data, there: b"")


@case(r"no jpg image for key 000010000", "shard", "score")
def tar_without_members(work: Path) -> Path:
    return rewrite(tar_of(work), lambda data, there: bytes(10240))


@case(r"00001\.tar .* at byte 0 no tar header is here", *READERS)
def no_tar_at_all(work: Path) -> Path:
    return rewrite(tar_of(work), lambda data, there: b"PK\3\4 this is another archive".ljust(10240, b"."))


@case(r"00001\.tar .* at byte \d+ the tar header's checksum is wrong", *READERS)
def flipped_header_byte(work: Path) -> Path:
    def change(data: bytearray, there: list[tars.Member]) -> None:
        data[there[3].offset - BLOCK + 5] ^= 1

    return rewrite(tar_of(work), change)


@case(r"Image 000010001 in .*00001\.tar has sha256 \w+ \(at byte \d+\)", "shard", "score")
def flipped_data_byte(work: Path) -> Path:
    def change(data: bytearray, there: list[tars.Member]) -> None:
        data[there[3].offset + 300] ^= 1

    return rewrite(tar_of(work), change)


@case(r"00001\.tar .* at byte \d+ the archive ends here, but more data follow", *READERS)
def appended_garbage(work: Path) -> Path:
    return rewrite(tar_of(work), lambda data, there: data + b"garbage")


@case(r"00001\.tar .* at byte \d+ the archive ends here, but more data follow", *READERS)
def appended_second_tar(work: Path) -> Path:
    return rewrite(tar_of(work), lambda data, there: data + data)


@case(r"00001\.tar .* at byte \d+ member '000010001\.jpg' is there twice", *READERS)
def duplicate_member(work: Path) -> Path:
    return insert(tar_of(work), info("000010001.jpg"))


@case(r"00001\.tar .* at byte \d+ key '000010000' comes back", "adopt")
def key_that_comes_back(work: Path) -> Path:
    def change(data: bytearray, there: list[tars.Member]) -> bytearray:
        first, second = there[2].offset - BLOCK, there[3].offset - BLOCK
        end = there[5].offset + there[5].size_bytes
        end += -end % BLOCK
        return data[:first] + data[second:end] + data[first:second] + data[end:]

    return rewrite(tar_of(work), change)


@case(r"00001\.tar .* at byte \d+ .* has a key with a dot", *READERS)
def key_with_dots(work: Path) -> Path:
    return insert(tar_of(work), info("0000.10009.jpg"))


@case(r"00001\.tar .* at byte \d+ .*is not of the form KEY\.EXTENSION", *READERS)
def name_without_extension(work: Path) -> Path:
    return insert(tar_of(work), info("README"))


@case(r"00001\.tar .* at byte \d+ .*is not of the form KEY\.EXTENSION", *READERS)
def name_without_key(work: Path) -> Path:
    return insert(tar_of(work), info(".jpg"))


@case(r"00001\.tar .* at byte \d+ member '000010009\.exe' has an unknown extension", *READERS)
def unknown_member(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.exe"))


@case(r"00001\.tar .* at byte \d+ member '000010009\.pyd' has an unknown extension", *READERS)
def pickle_member_pyd(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.pyd"), content=b"cos\nsystem\n(S'touch pwned'\ntR.")


@case(r"00001\.tar .* at byte \d+ member '000010009\.pkl' has an unknown extension", *READERS)
def pickle_member_pkl(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.pkl"), content=b"cos\nsystem\n(S'touch pwned'\ntR.")


@case(r"00001\.tar .* at byte \d+ member '000010009\.pth' has an unknown extension", *READERS)
def pickle_member_pth(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.pth"))


@case(r"00001\.tar .* at byte \d+ .* is a symbolic link", *READERS)
def symbolic_link(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"))


@case(r"00001\.tar .* at byte \d+ .* is a hard link", *READERS)
def hard_link(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.jpg", type=tarfile.LNKTYPE, linkname="000010000.jpg"))


@case(r"00001\.tar .* at byte \d+ .* is a device", *READERS)
def character_device(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.jpg", type=tarfile.CHRTYPE))


@case(r"00001\.tar .* at byte \d+ .* is a device", *READERS)
def block_device(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.jpg", type=tarfile.BLKTYPE))


@case(r"00001\.tar .* at byte \d+ .* is a folder", *READERS)
def folder_member(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.jpg", type=tarfile.DIRTYPE))


@case(r"00001\.tar .* at byte \d+ .* is a pipe", *READERS)
def pipe_member(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.jpg", type=tarfile.FIFOTYPE))


@case(r"00001\.tar .* at byte \d+ .* is of tar type b'S'", *READERS)
def sparse_member(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.jpg", type=tarfile.GNUTYPE_SPARSE))


@case(r"00001\.tar .* at byte \d+ .* points into another folder", *READERS)
def absolute_path(work: Path) -> Path:
    return insert(tar_of(work), info("/etc/000010009.jpg"))


@case(r"00001\.tar .* at byte \d+ .* points into another folder", *READERS)
def path_to_the_parent(work: Path) -> Path:
    return insert(tar_of(work), info("../000010009.jpg"))


@case(r"00001\.tar .* at byte \d+ .* points into another folder", *READERS)
def path_with_backslashes(work: Path) -> Path:
    return insert(tar_of(work), info("..\\000010009.jpg"))


@case(r"00001\.tar .* at byte \d+ .* points into another folder", *READERS)
def path_in_the_prefix_field(work: Path) -> Path:
    def change(data: bytearray, there: list[tars.Member]) -> bytearray:
        def prefix(header: bytearray) -> None:
            header[345:353] = b"/etc/ssh"

        return with_header(data, there[3].offset - BLOCK, prefix)

    return rewrite(tar_of(work), change)


@case(r"00001\.tar .* at byte \d+ an extended header sets 'path'", *READERS)
def pax_path(work: Path) -> Path:
    return insert(tar_of(work), info("a.jpg", pax_headers={"path": "/etc/passwd"}), form=tarfile.PAX_FORMAT)


@case(r"00001\.tar .* at byte \d+ an extended header sets 'size'", *READERS)
def pax_size(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.jpg", pax_headers={"size": "9999999"}), form=tarfile.PAX_FORMAT)


@case(r"00001\.tar .* at byte \d+ an extended header sets 'GNU\.sparse\.major'", *READERS)
def pax_sparse(work: Path) -> Path:
    return insert(tar_of(work), info("000010009.jpg", pax_headers={"GNU.sparse.major": "1"}), form=tarfile.PAX_FORMAT)


@case(r"00001\.tar .* at byte \d+ a damaged extended header is here", *READERS)
def pax_record_with_a_wrong_length(work: Path) -> Path:
    def change(data: bytearray, there: list[tars.Member]) -> bytearray:
        header = bytearray(info("000010009.jpg", type=tarfile.XHDTYPE, size=BLOCK).tobuf())
        at = there[3].offset - BLOCK
        return data[:at] + header + b"999 mtime=1\n".ljust(BLOCK, b"\0") + data[at:]

    return rewrite(tar_of(work), change)


@case(r"00001\.tar .* at byte \d+ .* is of tar type b'L'", *READERS)
def gnu_long_name(work: Path) -> Path:
    return insert(tar_of(work), info("9" * 200 + ".jpg"), form=tarfile.GNU_FORMAT)


@case(r"00001\.tar .* at byte \d+ .* holds a NUL character", *READERS)
def nul_in_a_name(work: Path) -> Path:
    def nul(header: bytearray) -> None:
        header[4] = 0

    return rewrite(tar_of(work), lambda data, there: with_header(data, there[3].offset - BLOCK, nul))


@case(r"00001\.tar .* at byte \d+ .* is not UTF-8", *READERS)
def name_that_is_no_utf8(work: Path) -> Path:
    def latin(header: bytearray) -> None:
        header[4] = 0xE9

    return rewrite(tar_of(work), lambda data, there: with_header(data, there[3].offset - BLOCK, latin))


def with_size(work: Path, field: bytes) -> Path:
    def size(header: bytearray) -> None:
        header[124:136] = field

    return rewrite(tar_of(work), lambda data, there: with_header(data, there[3].offset - BLOCK, size))


@case(r"00001\.tar .* at byte \d+ a member of 8589934591 bytes begins here", *READERS)
def huge_size(work: Path) -> Path:
    return with_size(work, b"77777777777\0")


@case(r"00001\.tar .* at byte \d+ (the tar header has a negative size|no tar header)", *READERS)
def negative_size(work: Path) -> Path:
    return with_size(work, b"-0000000100\0")


@case(r"00001\.tar .* at byte \d+ no tar header is here", *READERS)
def size_in_base_256(work: Path) -> Path:
    return with_size(work, b"\x80" + (1 << 40).to_bytes(11, "big"))


@case(r"00001\.tar .* at byte \d+ no tar header is here", *READERS)
def size_that_is_no_number(work: Path) -> Path:
    return with_size(work, b"0x1f0000000\0")


# --- tables -----------------------------------------------------------------------------------------------------------


def pairs_of(work: Path) -> Path:
    return work / "pairs" / "00001.parquet"


def captions_of(work: Path) -> Path:
    return work / "captions" / "synthetic" / "00001.parquet"


def spoil(path: Path, change: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(change(path.read_bytes()))
    return path


def edit(path: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    pq.write_table(change(pq.read_table(path)), path)
    return path


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, name, values if isinstance(values, pa.Array) else pa.array(values))


def with_value(table: pa.Table, name: str, row: int, value: Any) -> pa.Table:
    values = table[name].to_pylist()
    values[row] = value
    return replaced(table, name, pa.array(values, table.schema.field(name).type))


def invalid_text(table: pa.Table, name: str) -> pa.Table:
    """The column with bytes that are not UTF-8 in row 2, as a parquet file can hold them."""
    raw = [value.encode() for value in table[name].to_pylist()]
    raw[2] = b"a caf\xe9 in \xff"
    return replaced(table, name, pa.array(raw, pa.binary()).view(pa.string()))


STAGES = ("shard", "score")
TRUNCATED = r"Cannot read .*{}/00001\.parquet"


@case(TRUNCATED.format("pairs"), *STAGES)
def pairs_table_cut(work: Path) -> Path:
    return spoil(pairs_of(work), lambda data: data[: len(data) // 2])


@case(TRUNCATED.format("pairs"), *STAGES)
def pairs_table_empty(work: Path) -> Path:
    return spoil(pairs_of(work), lambda data: b"")


@case(TRUNCATED.format("pairs"), *STAGES)
def pairs_table_of_zeros(work: Path) -> Path:
    return spoil(pairs_of(work), lambda data: bytes(len(data)))


@case(TRUNCATED.format("pairs"), *STAGES)
def pairs_table_with_another_magic(work: Path) -> Path:
    return spoil(pairs_of(work), lambda data: data[:-4] + b"RAP1")


@case(TRUNCATED.format("pairs"), *STAGES)
def pairs_table_with_a_wrong_footer_length(work: Path) -> Path:
    return spoil(pairs_of(work), lambda data: data[:-8] + (1 << 30).to_bytes(4, "little") + data[-4:])


@case(r"pairs/00001\.parquet.*(sha256)", *STAGES)
def pairs_table_without_sha256(work: Path) -> Path:
    return edit(pairs_of(work), lambda table: table.drop_columns(["sha256"]))


@case(r"pairs/00001\.parquet.*(status)", *STAGES)
def pairs_table_without_status(work: Path) -> Path:
    return edit(pairs_of(work), lambda table: table.drop_columns(["status"]))


@case(r"pairs/00001\.parquet.*key", *STAGES)
def pairs_table_with_numbers_as_keys(work: Path) -> Path:
    return edit(pairs_of(work), lambda table: replaced(table, "key", [int(key) for key in table["key"].to_pylist()]))


@case(r"pairs/00001\.parquet.*key", *STAGES)
def pairs_table_with_a_null_key(work: Path) -> Path:
    return edit(pairs_of(work), lambda table: with_value(table, "key", 2, None))


@case(r"pairs/00001\.parquet.*000010002 more than once", *STAGES)
def pairs_table_with_a_row_twice(work: Path) -> Path:
    return edit(pairs_of(work), lambda table: pa.concat_tables([table, table.slice(2, 1)]))


@case(r"pairs/00001\.parquet.*(UTF-8|utf-8|UTF8)", *STAGES)
def pairs_table_with_a_caption_that_is_no_utf8(work: Path) -> Path:
    return edit(pairs_of(work), lambda table: invalid_text(table, "caption"))


@case(r"000010002", *STAGES)
def pairs_table_that_lacks_a_row(work: Path) -> Path:
    return edit(pairs_of(work), lambda table: pa.concat_tables([table.slice(0, 2), table.slice(3)]))


@case(r"Key 000000001 is in more than one shard", "shard")
def key_of_another_shard(work: Path) -> Path:
    """The same key in tar, pairs and captions of two shards."""
    data = tar_of(work).read_bytes().replace(b"000010001", b"000000001")
    fixed = bytearray(data)
    position = 0
    while any(fixed[position : position + BLOCK]):
        size = int(fixed[position + 124 : position + 135], 8)
        fixed = with_header(fixed, position, lambda header: None)
        position += BLOCK + size + -size % BLOCK
    tar_of(work).write_bytes(fixed)
    for path in (pairs_of(work), captions_of(work), scores_of(work)):
        row = pq.read_table(path)["key"].to_pylist().index("000010001")
        edit(path, lambda table, row=row: with_value(table, "key", row, "000000001"))  # type: ignore[misc]
        recommit(path.parent)
    return pairs_of(work)


@case(TRUNCATED.format("captions/synthetic"), *STAGES)
def captions_cut(work: Path) -> Path:
    return spoil(captions_of(work), lambda data: data[:-100])


@case(TRUNCATED.format("captions/synthetic"), *STAGES)
def captions_empty(work: Path) -> Path:
    return spoil(captions_of(work), lambda data: b"")


@case(TRUNCATED.format("captions/synthetic"), *STAGES)
def captions_that_are_a_tar(work: Path) -> Path:
    return spoil(captions_of(work), lambda data: tar_of(work).read_bytes())


@case(r"captions/synthetic/00001\.parquet", *STAGES)
def captions_with_damaged_pages(work: Path) -> Path:
    return spoil(captions_of(work), lambda data: data[:4] + bytes(len(data[4:200])) + data[200:])


@case(r"captions/synthetic/00001\.parquet.*(UTF-8|utf-8|UTF8)", *STAGES)
def captions_that_are_no_utf8(work: Path) -> Path:
    return edit(captions_of(work), lambda table: invalid_text(table, "caption"))


@case(r"captions/synthetic/00001\.parquet.*caption", *STAGES)
def captions_without_texts(work: Path) -> Path:
    return edit(captions_of(work), lambda table: table.drop_columns(["caption"]))


@case(r"captions/synthetic/00001\.parquet.*caption", *STAGES)
def captions_that_are_lists(work: Path) -> Path:
    return edit(
        captions_of(work), lambda table: replaced(table, "caption", [[text] for text in table["caption"].to_pylist()])
    )


@case(r"captions/synthetic/00001\.parquet.*key", *STAGES)
def captions_with_a_null_key(work: Path) -> Path:
    return edit(captions_of(work), lambda table: with_value(table, "key", 1, None))


@case(r"captions/synthetic/00001\.parquet.*000010001 more than once", *STAGES)
def captions_with_a_row_twice(work: Path) -> Path:
    return edit(captions_of(work), lambda table: pa.concat_tables([table, table.slice(1, 1)]))


@case(r"captions/synthetic/00001\.parquet lacks 1 of 5 keys .* the first is 000010002", *STAGES)
def captions_that_lack_a_row(work: Path) -> Path:
    return edit(captions_of(work), lambda table: pa.concat_tables([table.slice(0, 2), table.slice(3)]))


@case(
    r"pairs/00001\.parquet lacks 1 of 6 keys .*captions/synthetic/00001\.parquet has, the first is 000010009", *STAGES
)
def captions_of_a_sample_that_is_not_there(work: Path) -> Path:
    def change(table: pa.Table) -> pa.Table:
        return pa.concat_tables([table, with_value(table.slice(0, 1), "key", 0, "000010009")])

    return edit(captions_of(work), change)


@case(r"captions/synthetic/00001\.parquet .*key 000010001 has image sha256 0{64}", *STAGES)
def captions_of_another_image(work: Path) -> Path:
    return edit(captions_of(work), lambda table: with_value(table, "sha256", 1, "0" * 64))


@case(r"captions/synthetic/00001\.parquet .*sha256", *STAGES)
def captions_with_a_null_sha256(work: Path) -> Path:
    return edit(captions_of(work), lambda table: with_value(table, "sha256", 1, None))


def scores_of(work: Path) -> Path:
    return work / "scores" / "clip" / "00001.parquet"


@case(TRUNCATED.format("scores/clip"), "shard")
def scores_cut(work: Path) -> Path:
    return spoil(scores_of(work), lambda data: data[:-100])


@case(r"scores/clip/00001\.parquet lacks 1 of 5 keys", "shard")
def scores_that_lack_a_row(work: Path) -> Path:
    return edit(scores_of(work), lambda table: table.slice(1))


@case(r"scores/clip/00001\.parquet.*web", "shard")
def scores_that_are_text(work: Path) -> Path:
    return edit(scores_of(work), lambda table: replaced(table, "web", ["high"] * len(table)))


# --- sidecars ---------------------------------------------------------------------------------------------------------


def sidecar_of(work: Path) -> Path:
    return ledger.sidecar_path(work / "captions" / "synthetic", "00001")


def with_sidecar(work: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    content = json.loads(sidecar_of(work).read_text())
    change(content)
    sidecar_of(work).write_text(json.dumps(content))
    return sidecar_of(work)


@case(r"00001\.done\.json", *STAGES)
def sidecar_cut(work: Path) -> Path:
    return spoil(sidecar_of(work), lambda data: data[: len(data) // 2])


@case(r"00001\.done\.json", *STAGES)
def sidecar_that_is_no_object(work: Path) -> Path:
    return spoil(sidecar_of(work), lambda data: b"[]")


@case(r"00001\.done\.json", *STAGES)
def sidecar_without_files(work: Path) -> Path:
    return with_sidecar(work, lambda content: content.pop("files"))


@case(r"00001\.done\.json has schema version 99", *STAGES)
def sidecar_of_another_version(work: Path) -> Path:
    return with_sidecar(work, lambda content: content.update(schema_version=99))


@case(r"00001\.done\.json", *STAGES)
def sidecar_that_names_a_file_outside(work: Path) -> Path:
    about = {"bytes": pairs_of(work).stat().st_size, "sha256": ledger.digest_file(pairs_of(work))}
    return with_sidecar(work, lambda content: content["files"].update({"../../pairs/00001.parquet": about}))


# --- training shards --------------------------------------------------------------------------------------------------


def shard_tar(work: Path) -> Path:
    return work / "shards" / "train-00001.tar"


def shard_index(work: Path) -> Path:
    return work / "shards" / "train-00001.index.parquet"


def with_index(work: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = work / "shards" / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def with_json(work: Path, text: bytes) -> Path:
    """Writes the tar again with this as the .json member of its second sample."""
    samples = list(tars.read_samples(shard_tar(work)))
    samples[1].members["json"] = text
    rows = pq.read_table(shard_index(work)).to_pylist()
    with shard_tar(work).open("wb") as file:
        writer = tars.TarWriter(file)
        for row, sample in zip(rows, samples, strict=True):
            for kind, ext in (("image", row["image_ext"]), ("txt", "txt"), ("json", "json")):
                row[f"{kind}_offset"] = writer.add(f"{sample.key}.{ext}", sample.members[ext])
                row[f"{kind}_bytes"] = len(sample.members[ext])
        writer.close()
    pq.write_table(pa.Table.from_pylist(rows), shard_index(work))
    refresh_index(work / "shards")
    return shard_tar(work)


def json_of(work: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(list(tars.read_samples(shard_tar(work)))[1].members["json"])
    return content


@case(r"index\.json is not valid JSON", "train")
def index_cut(work: Path) -> Path:
    return spoil(work / "shards" / "index.json", lambda data: data[:-100])


@case(r"index\.json", "train")
def index_that_is_a_list(work: Path) -> Path:
    return spoil(work / "shards" / "index.json", lambda data: b"[1]")


@case(r"index\.json is not valid JSON", "train")
def index_that_is_a_depth_bomb(work: Path) -> Path:
    return spoil(work / "shards" / "index.json", lambda data: b"[" * 1_000_000)


@case(r"index\.json has schema version 99", "train")
def index_of_another_version(work: Path) -> Path:
    return with_index(work, lambda index: index.update(schema_version=99))


@case(r"index\.json is not an index .*digest", "train")
def index_without_digest(work: Path) -> Path:
    return with_index(work, lambda index: index.pop("digest"))


@case(r"index\.json is not an index .*no tar of this folder", "train")
def index_that_names_a_tar_outside(work: Path) -> Path:
    return with_index(work, lambda index: index["splits"]["train"]["shards"][1].update(file="../pairs/00001.tar"))


@case(r"index\.json is not an index .*named twice", "train")
def index_that_names_a_tar_twice(work: Path) -> Path:
    return with_index(
        work, lambda index: index["splits"]["train"]["shards"].append(index["splits"]["train"]["shards"][1])
    )


@case(r"index\.json is not an index .*num_samples", "train")
def index_with_a_negative_count(work: Path) -> Path:
    return with_index(work, lambda index: index["splits"]["train"]["shards"][1].update(num_samples=-4))


@case(r"train-00001\.index\.parquet lists \d samples, index\.json promises 3000", "train")
def index_that_promises_another_count(work: Path) -> Path:
    return with_index(work, lambda index: index["splits"]["train"]["shards"][1].update(num_samples=3000))


@case(r"index\.json promises train-00001\.tar with \d+ bytes, but the file has", "train")
def training_tar_cut(work: Path) -> Path:
    return spoil(shard_tar(work), lambda data: data[:-1000])


@case(r"train-00001\.index\.parquet cannot be read", "train")
def offsets_cut(work: Path) -> Path:
    return spoil(shard_index(work), lambda data: data[: len(data) // 2])


@case(r"train-00001\.index\.parquet has column 'json_bytes' as absent", "train")
def offsets_without_a_column(work: Path) -> Path:
    return edit(shard_index(work), lambda table: table.drop_columns(["json_bytes"]))


@case(r"train-00001\.index\.parquet has column 'image_offset' as string", "train")
def offsets_that_are_text(work: Path) -> Path:
    return edit(
        shard_index(work),
        lambda table: replaced(table, "image_offset", table["image_offset"].cast(pa.string()).combine_chunks()),
    )


@case(r"train-00001\.index\.parquet row 1 has no json_offset", "train")
def offsets_that_are_null(work: Path) -> Path:
    return edit(shard_index(work), lambda table: with_value(table, "json_offset", 1, None))


@case(r"train-00001\.index\.parquet row 1 \(key \d+\) has its json at byte 1099511627776", "train")
def offsets_behind_the_end(work: Path) -> Path:
    return edit(shard_index(work), lambda table: with_value(table, "json_offset", 1, 1 << 40))


@case(r"train-00001\.index\.parquet row 1 \(key \d+\) has its image at byte -512", "train")
def offsets_before_the_begin(work: Path) -> Path:
    return edit(shard_index(work), lambda table: with_value(table, "image_offset", 1, -512))


@case(
    r"train-00001\.index\.parquet row 1 \(key \d+\) has its image at byte \d+ with 9223372036854775807 bytes", "train"
)
def sizes_that_overflow(work: Path) -> Path:
    return edit(shard_index(work), lambda table: with_value(table, "image_bytes", 1, (1 << 63) - 1))


@case("json_of_another_sample", "train")
def offsets_of_another_sample(work: Path) -> Path:
    def change(table: pa.Table) -> pa.Table:
        for name in ("json_offset", "json_bytes"):
            table = with_value(table, name, 1, table[name].to_pylist()[0])
        return table

    return edit(shard_index(work), change)


@case("json_invalid", "train")
def json_cut(work: Path) -> Path:
    return with_json(work, b'{"key": "0000')


@case("json_invalid", "train")
def json_that_is_no_object(work: Path) -> Path:
    return with_json(work, b'["web", "synthetic"]')


@case("json_invalid", "train")
def json_with_nan(work: Path) -> Path:
    return with_json(work, json.dumps(json_of(work) | {"scores": {"web": float("nan")}}).encode())


@case("json_invalid", "train")
def json_that_is_a_depth_bomb(work: Path) -> Path:
    return with_json(work, b'{"extra": ' + b"[" * 1_000_000)


@case("json_invalid", "train")
def json_with_a_name_twice(work: Path) -> Path:
    return with_json(work, json.dumps(json_of(work)).encode()[:-1] + b', "web": "another caption"}')


@case("json_invalid", "train")
def json_with_half_a_character(work: Path) -> Path:
    return with_json(work, json.dumps(json_of(work) | {"web": "a \ud83d"}).encode())


@case("json_invalid", "train")
def json_that_is_no_utf8(work: Path) -> Path:
    return with_json(work, b'{"web": "caf\xe9"}')


@case("json_too_large", "train")
def json_of_a_hundred_megabytes(work: Path) -> Path:
    return with_json(work, b'{"web": "' + b"x" * 100_000_000 + b'"}')


# --- who meets them ---------------------------------------------------------------------------------------------------


def recommit(folder: Path) -> None:
    """The sidecars of ``folder`` as they would be had the files been finished as they are now."""
    for path in folder.glob("*" + ledger.SIDECAR):
        content = json.loads(path.read_text())
        for name in content["files"]:
            file = folder / name
            content["files"][name] = {"bytes": file.stat().st_size, "sha256": ledger.digest_file(file)}
        path.write_text(json.dumps(content))


def refresh_index(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    for entry in index["splits"]["train"]["shards"]:
        entry["bytes"] = (shards / entry["file"]).stat().st_size
    (shards / "index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, captions, scores and training shards, all as they should be."""
    work = pairsmaker.write_work(tmp_path_factory.mktemp("sound"))
    folder = work / "scores" / "clip"
    folder.mkdir(parents=True)
    for unit in ledger.finished_units(work / "pairs"):
        rows = pq.read_table(work / "captions" / "synthetic" / f"{unit}.parquet", columns=["key", "sha256"])
        for column in ("web", "synthetic"):
            rows = rows.append_column(column, pa.array([0.25] * len(rows), pa.float32()))
        pq.write_table(rows, ledger.part(folder / f"{unit}.parquet"))
        ledger.commit(folder, unit, [f"{unit}.parquet"], inputs={}, config={}, counts={"ok": len(rows)})
    shard.run(ShardConfig(shard_rows=4), Job(work=work, quiet=True))
    assert verify(work, deep=True).is_sound
    return work


@pytest.fixture
def work(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "work"))


def run_shard(work: Path, model: str) -> None:
    config = ShardConfig(scores="clip", shard_rows=100)
    shard.run(config, Job(work=work, out=work / "out", quiet=True))


def run_score(work: Path, model: str) -> None:
    score.run(ScoreConfig(name="again", model=model, batch=8), Job(work=work, out=work / "out", quiet=True))


def run_adopt(work: Path, model: str) -> None:
    theirs = work / "theirs"
    theirs.mkdir()
    shutil.copy(tar_of(work), theirs / "00001.tar")
    adopt.adopt(theirs, Job(work=work / "adopted", out=work / "out", quiet=True))


def run_train(work: Path, model: str) -> None:
    split = open_split(work / "shards", "train")
    reader = ShardReader(split)
    for number, rows in enumerate(split.num_samples_by_shard):
        for row in range(rows):
            reader.row(number, row)


COMMANDS = {"shard": run_shard, "score": run_score, "adopt": run_adopt, "train": run_train}


def written(out: Path) -> set[str]:
    """What a reader would take for finished. Partial files, locks and folders of plans are none."""
    finished = re.compile(r".*\.(tar|parquet|done\.json)|index\.json|sizes\.json|README\.md")
    return {path.name for path in out.glob("*") if finished.fullmatch(path.name)}


def test_there_are_forty_cases_for_tars_tables_and_texts() -> None:
    assert len(CASES) >= 40


@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for name, case in CASES.items() for command in case.commands]
)
def test_damaged_inputs_are_refused_with_file_and_place(command: str, name: str, work: Path, model: str) -> None:
    case = CASES[name]
    damaged = case.damage(work)
    if not damaged.name.endswith(ledger.SIDECAR):
        recommit(damaged.parent)
    with pytest.raises((UserError, ShardError)) as refused:
        COMMANDS[command](work, model)
    assert re.search(case.says, str(refused.value)), str(refused.value)
    finished = (
        {path for path in written(work / "out") if "00000" not in path} if command == "score" else written(work / "out")
    )
    assert finished == set(), "nothing is half-written"


@pytest.mark.parametrize("name", CASES)
def test_verify_says_where_the_damage_is(name: str, work: Path) -> None:
    before = {path.relative_to(work) for path in work.rglob("*")}
    damaged = CASES[name].damage(work)
    found, where = verify(work), damaged.relative_to(work).as_posix()
    assert not found.is_sound
    if where not in found.corrupt:  # no sidecar names index.json, and one case is about files that are all intact
        assert found.contradictions[where]
    elif damaged.suffix == ".tar":
        assert re.search(r"at byte \d+", found.corrupt[where]), found.corrupt
    elif damaged.suffix == ".parquet":
        assert re.search(r"row group|footer|at byte 0", found.corrupt[where]), found.corrupt
    assert {path.relative_to(work) for path in work.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pairs_table_cut", "cannot be read"),
        ("pairs_table_of_zeros", "cannot be read"),
        ("pairs_table_with_a_null_key", "row 2 has key None"),
        ("pairs_table_with_numbers_as_keys", "row 0 has key 10000,"),
        ("pairs_table_with_a_row_twice", "has key '000010002' more than once"),
        ("pairs_table_with_a_caption_that_is_no_utf8", "cannot be read"),
    ],
)
def test_a_damaged_table_of_img2dataset_is_refused_by_adopt(name: str, says: str, work: Path) -> None:
    CASES[name].damage(work)
    theirs = work / "theirs"
    theirs.mkdir()
    for path in (tar_of(work), pairs_of(work)):
        shutil.copy(path, theirs)
    with pytest.raises(UserError, match=rf"theirs/00001\.parquet.*{re.escape(says)}"):
        adopt.adopt(theirs, Job(work=work / "adopted", out=work / "out", quiet=True))
    assert written(work / "out") == set()


def test_json_that_no_text_can_hold_is_adopted_as_far_as_it_is_text(work: Path) -> None:
    """JSON of others is not refused: what of it is unusable becomes a coded or repaired row, and is counted."""
    theirs, samples = work / "theirs", list(tars.read_samples(tar_of(work)))
    theirs.mkdir()
    texts = [
        rb'{"caption": "half \ud83d of it \u0000.", "url": "http://a.test/\udc00"}', b"[" * 1_000_000,
        b'{"caption": NaN}', b'["caption"]', b'{"caption": "caf\xe9"}',
    ]  # fmt: skip
    with (theirs / "00001.tar").open("wb") as file:
        writer = tars.TarWriter(file)
        for sample, text in zip(samples, texts, strict=True):
            writer.add(f"{sample.key}.jpg", sample.members["jpg"])
            writer.add(f"{sample.key}.json", text)
        writer.close()
    report = adopt.adopt(theirs, Job(work=work / "adopted", out=work / "out", quiet=True), caption_key="caption")
    rows = pq.read_table(work / "out" / "00001.parquet").to_pylist()
    assert [row["caption"] for row in rows] == ["half \ufffd of it \0.", None, None, None, None]
    assert [row["code"] for row in rows] == ["ok"] * 5
    assert any("2 unreadable json members" in note for note in report.notes)


def test_a_sound_folder_is_refused_by_nobody(work: Path, model: str) -> None:
    for command in ("shard", "score", "adopt", "train"):
        shutil.rmtree(work / "out", ignore_errors=True)
        COMMANDS[command](work, model)
        assert command == "train" or written(work / "out")
