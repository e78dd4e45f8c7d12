"""Published sets: each told by its columns, each with the right column for URL, caption, identity and captions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from clips_data import adapters, sources
from clips_data.config import DownloadConfig
from clips_data.errors import UsageError, UserError
from clips_data.sources import UrlList

URL = "http://host.test/1.jpg"
# One row of each set, with all columns that its own page shows; what is checked stands beside it.
SETS: dict[str, tuple[str, dict[str, Any], str, str | None, str | None, dict[str, str]]] = {
    "datacomp": (
        "parquet",
        {"uid": "0ab", "url": URL, "text": "web", "original_width": 9, "original_height": 9,
         "clip_b32_similarity_score": 0.2, "clip_l14_similarity_score": 0.1, "face_bboxes": [[0.1, 0.2, 0.3, 0.4]],
         "sha256": "ff"},
        URL, "web", "0ab", {},
    ),
    "recap-datacomp-1b": (
        "parquet",
        {"url": URL, "re_caption": "long", "org_caption": "web", "sha256": "ff", "key": "0001", "re_clip_score": 0.5,
         "org_clip_score": 0.5, "re_length": 1, "org_length": 1, "re_gpt4v_score": 1, "org_gpt4v_score": 1,
         "re_caption_condition_diverse_topk": "longer"},
        URL, "web", "0001", {"recap": "long", "recap_v2": "longer"},
    ),
    "laion": (
        "parquet",
        {"SAMPLE_ID": 7, "URL": URL, "TEXT": "web", "HEIGHT": 9, "WIDTH": 9, "LICENSE": "?", "NSFW": "UNLIKELY",
         "similarity": 0.3},
        URL, "web", "7", {},
    ),
    "coyo": (
        "parquet",
        {"id": 5, "url": URL, "text": "web", "width": 9, "height": 9, "image_phash": "00ff", "text_length": 3,
         "clip_similarity_vitb32": 0.2},
        URL, "web", "5", {},
    ),
    "dreamlip": (
        "csv",
        {"Image Path": URL, "raw_caption": "web", "shortIB_captions": "a", "longIB_captions": "b",
         "shortSV_captions": "c", "longSV_captions": "d", "shortLLA_captions": "e", "longLLA_captions": "f"},
        URL, "web", None,
        {"short_instructblip": "a", "long_instructblip": "b", "short_sharegpt4v": "c", "long_sharegpt4v": "d",
         "short_llava": "e", "long_llava": "f"},
    ),
    "pixelprose": (
        "parquet",
        {"uid": "0ab", "url": URL, "key": "k", "status": "success", "original_caption": "web", "vlm_model": "gemini",
         "vlm_caption": "dense", "toxicity": 0.1, "aesthetic_score": 5.0, "watermark_class_id": 1},
        URL, "web", "0ab", {"pixelprose": "dense"},
    ),
    "capsfusion": (
        "parquet", {"image_url": URL, "laion_2b": "web", "laion_coco": "blip", "capsfusion": "fused"},
        URL, "web", None, {"capsfusion": "fused", "laion_coco": "blip"},
    ),
    "kale": (
        "parquet", {"url": URL, "caption": "dense", "cogvlm_caption": "cog"},
        URL, None, None, {"kale": "dense", "kale_cogvlm": "cog"},
    ),
}  # fmt: skip


def locate(source: Path, **changes: Any) -> UrlList:
    return sources.locate(DownloadConfig(source=str(source), **changes), source.parent / "scratch")


def the_row(found: UrlList) -> dict[str, Any]:
    files = sorted(found.path.glob("*.parquet")) if found.path.is_dir() else [found.path]
    (row,) = pl.concat([pl.read_parquet(file) for file in files]).to_dicts()
    return row


@pytest.mark.parametrize("choice", ["auto", "named"])
@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_by_its_own_columns(tmp_path: Path, name: str, choice: str) -> None:
    suffix, values, url, caption, identity, captions = SETS[name]
    source = tmp_path / f"list.{suffix}"
    frame = pl.DataFrame([values])
    frame.write_parquet(source) if suffix == "parquet" else frame.write_csv(source)
    found = locate(source, adapter="auto" if choice == "auto" else name)
    row = the_row(found)
    assert found.adapter == name
    assert row[found.url_column] == url
    assert (row[found.caption_column] if found.caption_column else None) == caption
    assert (str(row[found.id_column]) if found.id_column else None) == identity
    assert {column: row[carried] for column, carried in found.captions.items()} == captions
    assert set(found.captions.values()) <= set(found.extra_columns)
    assert name in found.notes[0]


def test_the_hash_of_a_set_can_be_asked_for_by_its_own_name(tmp_path: Path) -> None:
    pl.DataFrame([SETS["datacomp"][1]]).write_parquet(tmp_path / "list.parquet")
    found = locate(tmp_path / "list.parquet", verify_hash="sha256")
    assert the_row(found)[str(found.hash_column)] == "ff"


@pytest.mark.parametrize("adapter", ["auto", "named"])
@pytest.mark.parametrize(
    ("name", "line"),
    [("cc3m", f'"a" cat\'s hat, 5" wide\t{URL}'), ("cc12m", f'{URL}\t"a" cat\'s hat, 5" wide')],
)
def test_tables_without_header_are_told_by_their_first_line(tmp_path: Path, name: str, line: str, adapter: str) -> None:
    source = tmp_path / "list.tsv"
    source.write_text(line + "\n")
    found = locate(source, adapter="auto" if adapter == "auto" else name)
    assert the_row(found) == {"url": URL, "caption": '"a" cat\'s hat, 5" wide'}
    assert found.adapter == name


def test_a_header_that_was_added_to_such_a_table_is_one(tmp_path: Path) -> None:
    source = tmp_path / "list.tsv"
    source.write_text(f'url\tcaption\n{URL}\t"a" cat\n')
    assert the_row(locate(source, adapter="cc12m")) == {"url": URL, "caption": '"a" cat'}


def test_no_adapter_means_the_plain_names(tmp_path: Path) -> None:
    pl.DataFrame([SETS["laion"][1]]).write_parquet(tmp_path / "list.parquet")
    with pytest.raises(UserError, match=r"no column 'url'.*--url-column"):
        locate(tmp_path / "list.parquet", adapter="none")
    found = locate(tmp_path / "list.parquet", adapter="none", url_column="URL", caption_column=None)
    assert (found.adapter, found.url_column, found.caption_column) == (None, "URL", None)


def test_a_named_column_goes_before_the_adapters(tmp_path: Path) -> None:
    pl.DataFrame([SETS["pixelprose"][1]]).write_parquet(tmp_path / "list.parquet")
    found = locate(tmp_path / "list.parquet", caption_column="vlm_caption")
    assert the_row(found)["caption"] == "dense"


def test_the_set_with_the_most_telling_columns_wins() -> None:
    both = {**SETS["datacomp"][1], **SETS["pixelprose"][1]}
    assert adapters.recognise(list(both)) is adapters.named("pixelprose")
    assert adapters.recognise(["url", "caption"]) is None


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no adapter 'pixelprosa'. Did you mean 'pixelprose'"):
        adapters.named("pixelprosa")


def test_sets_without_urls_are_refused_with_their_use(tmp_path: Path) -> None:
    source = tmp_path / "vlm.jsonl"
    source.write_text(json.dumps({"uid": "0ab", "long": "dense"}))
    with pytest.raises(UserError, match=r"no URLs.*clips adopt .* --captions COLUMN --as NAME --by uid`"):
        locate(source, adapter="vlm-150m")
    tar = tmp_path / "0.tar"
    members = {"k.url.txt": b"http://h", "k.syn.json": b'{"syn_text": ["a"]}', "k.json": b'{"uid": "0ab"}'}
    with tarfile.open(tar, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=r"set datacompdr.*--by uid --table-key json/uid`"):
        locate(tar)


def test_other_tars_are_pointed_to_adopt(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        info = tarfile.TarInfo("k.txt")
        file.addfile(info, io.BytesIO())
    with pytest.raises(UserError, match=r"a tar of samples. `clips adopt`"):
        locate(tmp_path / "0.tar")
