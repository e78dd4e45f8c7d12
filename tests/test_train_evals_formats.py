"""Data sets from the files that people have: what is in them, and what is said where something is wrong."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shardmaker
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clips_data.errors import UserError
from clips_train.evals import format_karpathy, list_rows
from clips_train.evals.formats import find_format, open_data
from clips_train.evals.items import DataSet
from clips_train.use_config import Benchmark


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (number % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


def put(path: Path, content: bytes | str | list[Any] | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def opened(data: Path, **change: Any) -> DataSet:
    return open_data(Benchmark(**{"name": "own", "data": str(data), "task": "retrieval", **change}), data / "work")


def texts(data: DataSet) -> dict[str, tuple[str, ...]]:
    return {item.key: tuple(item.texts) for item in data.items}


def refused(data: Path, says: str, **change: Any) -> None:
    with pytest.raises(UserError, match=says):
        opened(data, **change)


# --- Karpathy ---------------------------------------------------------------------------------------------------------


def karpathy_row(number: int, split: str = "test", num_captions: int = 5, **more: Any) -> dict[str, Any]:
    sentences = [{"raw": f"image {number} way {way}", "tokens": []} for way in range(num_captions)]
    return {"filename": f"{number}.jpg", "filepath": "val2014", "split": split, "sentences": sentences, **more}


def coco(folder: Path, rows: list[dict[str, Any]], images: str = "val2014") -> Path:
    put(folder / "annotations" / "dataset_coco.json", {"images": rows, "dataset": "coco"})
    for row in rows:
        put(folder / images / row["filename"], picture(int(Path(row["filename"]).stem)))
    return folder


@pytest.mark.parametrize("images", ["val2014", "images/val2014", "images", "flickr30k-images", "."])
def test_karpathys_test_images_are_found_where_people_put_them(tmp_path: Path, images: str) -> None:
    rows = [karpathy_row(7), karpathy_row(3, "train"), karpathy_row(1, num_captions=6), karpathy_row(2, "restval")]
    data = opened(coco(tmp_path, rows, images), captions_per_image=5)
    assert [Path(item.key).name for item in data.items] == ["7.jpg", "1.jpg"]
    assert list(data.items[1].texts) == [f"image 1 way {way}" for way in range(5)]
    assert data.items[1].read() == picture(1)
    assert data.about["split"] == "test" and data.about["num_images_of_protocol"] == 5000
    assert (data.about["num_images"], data.about["num_texts"], data.about["left_out"]) == (2, 10, {})


def test_train_has_restval_in_it_and_test_has_not(tmp_path: Path) -> None:
    rows = [karpathy_row(1), karpathy_row(2, "train"), karpathy_row(3, "restval"), karpathy_row(4, "val")]
    data = opened(coco(tmp_path, rows), split="train")
    assert list(texts(data)) == ["val2014/2.jpg", "val2014/3.jpg"]
    assert data.about["splits"] == ["train", "restval"]
    assert list(texts(opened(tmp_path, split="val"))) == ["val2014/4.jpg"]


def test_flickrs_list_has_no_folders_of_images(tmp_path: Path) -> None:
    row = karpathy_row(5)
    del row["filepath"]
    put(tmp_path / "dataset_flickr30k.json", {"images": [row]})
    put(tmp_path / "flickr30k-images" / "5.jpg", picture(5))
    data = opened(tmp_path)
    assert list(texts(data)) == ["flickr30k-images/5.jpg"] and data.about["num_images_of_protocol"] == 1000


def test_captions_that_are_missing_or_blank_are_counted(tmp_path: Path) -> None:
    blank = karpathy_row(2)
    blank["sentences"] = [{"raw": " \n"}]
    rows = [karpathy_row(1, num_captions=4), blank, karpathy_row(3, num_captions=0)]
    data = opened(coco(tmp_path, rows), captions_per_image=5)
    assert list(texts(data)) == ["val2014/1.jpg"] and len(data.items[0].texts) == 4
    assert data.about["left_out"] == {"images.without_texts": 2, "texts.blank": 1}


def test_missing_images_stop_with_their_number_and_names(tmp_path: Path) -> None:
    coco(tmp_path, [karpathy_row(1), karpathy_row(2), karpathy_row(3)])
    (tmp_path / "val2014" / "2.jpg").unlink()
    refused(tmp_path, r"1 of the 3 images that .*dataset_coco.json lists are not in .*: '?val2014/2.jpg")
    assert len(opened(tmp_path, max_samples=1).items) == 1  # the others are not asked for


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"split": "tset"}, "no images of split 'tset'.*'test'"),
        ({"annotations": "nowhere.json"}, "nowhere.json, the annotations of the benchmark own, is not there"),
    ],
)
def test_absent_splits_and_files_are_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    refused(coco(tmp_path, [karpathy_row(1)]), says, **change)


def test_absent_data_are_named(tmp_path: Path) -> None:
    for chosen in ({}, {"format": "karpathy"}, {"format": "webdataset"}, {"task": "zero_shot"}):
        refused(tmp_path / "nowhere", "nowhere, the data of the benchmark own, is not there", **chosen)


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "http://host/1.jpg"])
def test_images_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path / "secret.jpg", picture(1))
    put(tmp_path / "in" / "dataset_coco.json", {"images": [karpathy_row(1, filename=name, filepath="")]})
    refused(tmp_path / "in", "does not lie in|are not in")
    put(tmp_path / "list" / "own.json", [{"image": name, "caption": "a text"}])
    refused(tmp_path / "list", "does not lie in|are not in")


def test_two_lists_or_none_have_to_be_told_apart(tmp_path: Path) -> None:
    coco(tmp_path, [karpathy_row(1)])
    put(tmp_path / "dataset_coco_small.json", {"images": [karpathy_row(1)]})
    refused(tmp_path, "but has these: dataset_.*, dataset_.*. Name the list with annotations")
    data = opened(tmp_path, annotations=str(tmp_path / "dataset_coco_small.json"))
    assert data.about["annotations"] == "dataset_coco_small.json"


# --- CLIP_benchmark's webdataset --------------------------------------------------------------------------------------


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def wds(folder: Path, ext: str = "txt", per_tar: int = 2, num: int = 3, kind: str | None = "retrieval") -> Path:
    text = {"txt": lambda number: f"text {number}\nanother {number}", "cls": lambda number: str(number % 2)}[ext]
    members = [
        [(f"s{number:07d}.png", picture(number)), (f"s{number:07d}.{ext}", text(number).encode())]
        for number in range(num)
    ]
    for shard, first in enumerate(range(0, num, per_tar)):
        tar(folder / "test" / f"{shard}.tar", [member for pair in members[first : first + per_tar] for member in pair])
    put(folder / "test" / "nshards.txt", f"{-(-num // per_tar)}\n")
    if kind:
        put(folder / "dataset_type.txt", kind + "\n")
    return folder


def test_clip_benchmarks_tars_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    data = opened(wds(tmp_path, num=12, per_tar=1))
    assert list(texts(data).values()) == [(f"text {number}", f"another {number}") for number in range(12)]
    assert [item.read() for item in data.items] == [picture(number) for number in range(12)]
    assert data.about["format"] == "webdataset" and data.about["tars"] == 12


def test_classes_and_templates_come_with_the_tars(tmp_path: Path) -> None:
    wds(tmp_path, "cls", kind=None)
    put(tmp_path / "classnames.txt", "red fox\nblue whale \n")
    put(tmp_path / "zeroshot_classification_templates.txt", "a photo of {c}.\nart of {c}\n")
    data = opened(tmp_path, task="zero_shot")
    assert [item.label for item in data.items] == [0, 1, 0]
    assert list(data.classes) == ["red fox", "blue whale"] and list(data.templates) == ["a photo of {c}.", "art of {c}"]


def test_one_tar_or_a_folder_of_tars_is_enough(tmp_path: Path) -> None:
    folder = wds(tmp_path / "wds") / "test"
    assert len(opened(folder).items) == 3
    assert len(opened(folder / "0.tar").items) == 2


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda wds: (wds / "test" / "1.tar").unlink(), "promises 2 tars, of which 1 are not there: 1.tar"),
        (lambda wds: put(wds / "test" / "nshards.txt", "many"), "should be the number of tars, but says 'many'"),
        (lambda wds: put(wds / "dataset_type.txt", "multilabel"), "says 'multilabel'; clips reads"),
        (lambda wds: put(wds / "dataset_type.txt", "classification"), "a data set for classification, and the bench"),
        (lambda wds: (wds / "test").rename(wds / "train"), "no tars of split 'test'"),
        (lambda wds: tar(wds / "test" / "0.tar", [("a.png", picture(1))]), "sample 'a' has no .txt but png"),
        (lambda wds: tar(wds / "test" / "0.tar", [("a.txt", b"a"), ("a.txt", b"b")]), "member 'a.txt' twice"),
        (
            lambda wds: tar(wds / "test" / "0.tar", [("a.png", b""), ("a.txt", b"\xff\xfe")]),
            "0.tar: a.txt is no UTF-8 text",
        ),
        (
            lambda wds: put(wds / "test" / "1.tar", (wds / "test" / "0.tar").read_bytes()[:1000]),
            "1.tar is not a usable shard: at byte",
        ),
    ],
)
def test_spoilt_tars_are_refused_with_the_place(tmp_path: Path, spoil: Callable[[Path], Any], says: str) -> None:
    spoil(wds(tmp_path))
    refused(tmp_path, says)


def test_labels_that_are_no_class_are_refused(tmp_path: Path) -> None:
    wds(tmp_path, "cls", kind=None)
    put(tmp_path / "classnames.txt", "only one\n")
    refused(tmp_path, "is class 1, but classnames.txt names 1", task="zero_shot")
    tar(tmp_path / "test" / "0.tar", [("a.png", picture(1)), ("a.cls", b"-1")])
    refused(tmp_path, "is '-1' and no class from 0", task="zero_shot")


def test_samples_without_an_image_are_counted(tmp_path: Path) -> None:
    wds(tmp_path)
    tar(tmp_path / "test" / "0.tar", [("a.txt", b"alone"), ("b.txt", b"text"), ("b.jpg", b"1"), ("b.webp", b"2")])
    data = opened(tmp_path)
    assert data.about["left_out"] == {"samples.without_image": 1}
    assert data.items[0].read() == b"2"  # as CLIP_benchmark, which asks for webp first


def test_a_tar_that_shrinks_later_is_an_unreadable_image(tmp_path: Path) -> None:
    data = opened(wds(tmp_path))
    put(tmp_path / "test" / "0.tar", b"")
    fresh = data.items[0].read
    with pytest.raises(OSError, match="short_read"):
        fresh()


# --- our shards -------------------------------------------------------------------------------------------------------


def test_held_out_samples_come_with_all_their_captions(tmp_path: Path) -> None:
    shardmaker.write_shards(tmp_path / "shards", num_heldout=3)
    data = opened(tmp_path / "shards")
    image, about = shardmaker.sample(32)
    assert list(data.items[0].texts) == about["extra"]["captions"] and data.items[0].read() == image
    assert data.items[0].about == {"web": about["web"]}
    assert data.about["split"] == "heldout" and len(data.items) == 3
    other = opened(tmp_path / "shards", texts="synthetic", split="train", max_samples=2)
    assert [list(item.texts) for item in other.items] == [[shardmaker.sample(n)[1]["synthetic"]] for n in range(2)]
    assert other.about["digest"] != data.about["digest"]


def test_a_sample_whose_texts_are_damaged_is_counted(tmp_path: Path) -> None:
    shards = shardmaker.write_shards(tmp_path / "shards", num_heldout=3)
    path = shards / "heldout-00000.tar"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'{"extra"', b'["extra"', 1))
    assert opened(shards).about["left_out"] == {"images.bad.json_invalid": 1}


def test_an_absent_column_or_split_is_named(tmp_path: Path) -> None:
    shards = shardmaker.write_shards(tmp_path / "shards")
    refused(shards, "no caption column 'syntetic'.*'synthetic'", texts="syntetic")
    refused(shards, "no split 'test'", split="test")


# --- lists ------------------------------------------------------------------------------------------------------------

AS_TEXT = {
    "own.json": lambda rows: json.dumps(rows),
    "own.jsonl": lambda rows: "\n".join(map(json.dumps, rows)) + "\n\n",
    "own.csv": lambda rows: "\ufeffimage,caption\n" + "".join(f'{row["image"]},"{row["caption"]}"\n' for row in rows),
    "own.tsv": lambda rows: "image\tcaption\n" + "".join(f"{row['image']}\t{row['caption']}\n" for row in rows),
}


@pytest.mark.parametrize("name", [*AS_TEXT])
def test_rows_of_the_same_image_are_one_image(tmp_path: Path, name: str) -> None:
    rows = [{"image": f"{number}.png", "caption": f"{way}, of {number}"} for way in "ab" for number in (2, 1)]
    for number in (1, 2):
        put(tmp_path / f"{number}.png", picture(number))
    put(tmp_path / name, AS_TEXT[name](rows))
    for data in (tmp_path, tmp_path / name):
        assert texts(opened(data)) == {"2.png": ("a, of 2", "b, of 2"), "1.png": ("a, of 1", "b, of 1")}


def test_lists_may_lie_elsewhere_and_hold_several_texts(tmp_path: Path) -> None:
    put(tmp_path / "images" / "val2014" / "1.jpg", picture(1))
    rows = [{"image": "val2014/1.jpg", "caption": ["one", "two"], "long": "a long one", "image_id": 5}]
    blip = put(tmp_path / "lists" / "coco_karpathy_test.json", rows)
    chosen = {"annotations": str(blip), "captions_per_image": 1}
    assert texts(opened(tmp_path / "images", **chosen)) == {"val2014/1.jpg": ("one",)}
    assert texts(opened(tmp_path / "images", **chosen, texts="long")) == {"val2014/1.jpg": ("a long one",)}
    refused(tmp_path / "images", "row 1, has no text under 'lang'.*'long'", **chosen, texts="lang")


def test_docci_has_splits_in_its_rows(tmp_path: Path) -> None:
    rows = [
        {"split": split, "image_file": f"{split}.jpg", "description": f"about {split}"} for split in ("train", "test")
    ]
    put(tmp_path / "docci_descriptions.jsonlines", "\n".join(map(json.dumps, rows)))
    put(tmp_path / "images" / "test.jpg", picture(1))
    chosen = {"annotations": str(tmp_path / "docci_descriptions.jsonlines")}
    assert texts(opened(tmp_path / "images", **chosen)) == {"test.jpg": ("about test",)}
    refused(tmp_path / "images", "no images of split 'qual_dev'", **chosen, split="qual_dev")


def test_sharegpt4vs_first_thousand_are_read_without_the_rest(tmp_path: Path) -> None:
    def row(number: int) -> dict[str, Any]:
        turns = [{"from": "human", "value": "What is this?\n<image>"}, {"from": "gpt", "value": f"It is\n{number}."}]
        return {"id": f"{number}", "image": f"sam/images/sa_{number}.jpg", "conversations": turns}

    for number in range(2):
        put(tmp_path / f"sam/images/sa_{number}.jpg", picture(number))
    put(tmp_path / "share-captioner.json", json.dumps([row(number) for number in range(5)])[:-30] + "cut off")
    data = opened(tmp_path, max_samples=2)
    assert texts(data) == {f"sam/images/sa_{number}.jpg": (f"It is {number}.",) for number in range(2)}
    refused(tmp_path, "share-captioner.json cannot be read as json")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("own.json", '[{"image": "1.png", "caption": 5}]', "row 1, has texts that are none: '5'"),
        ("own.json", '[{"image": 7, "caption": "a"}]', "row 1, has no path of an image but '7'"),
        ("own.json", '[{"caption": "a"}]', "has no image under 'image' or"),
        ("own.json", '[{"image": "1.png"}, 5]', "has no text under 'captions' or"),
        ("own.json", '["1.png"]', "row 1 is no object"),
        ("own.json", '{"rows": []}', "neither a list nor an object with a list 'images'"),
        ("own.json", "[]", "holds no image that the benchmark own can be scored on"),
        ("own.json", '[{"image": "1.png", "caption": "a"}] more', "more follows after character 37"),
        ("own.json", "[" * 100_000, "cannot be read as json"),
        ("own.jsonl", '{"image": "1.png", "caption": "a"}\n{', "cannot be read as jsonl"),
        ("own.csv", "image,caption\n1.png\n", "line 2 has not as many fields"),
        ("own.csv", b"image,caption\n1.png,\xff\n", "cannot be read as csv"),
        ("own.tsv", "image\ttext\n1.png\t \n", "images.without_texts 1"),
        ("own.xml", "<a/>", "no data set that clips knows by its files"),
    ],
)
def test_spoilt_lists_are_refused_with_the_place(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    put(tmp_path / "1.png", picture(1))
    refused(put(tmp_path / name, content), says)


NAMES = st.text(alphabet='ab,:"\\{}[] \n\té😀', max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(
    rows=st.lists(st.dictionaries(NAMES, VALUES, max_size=3), max_size=5),
    before=VALUES,
    chunk=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
    escaped=st.booleans(),
)
def test_json_is_read_piece_by_piece_as_it_is_at_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], before: Any, chunk: int, indent: Any, escaped: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_rows, "CHUNK_CHARS", chunk)
        for content in (rows, {"info": before, "images": rows, "n": 12}):
            path.write_text(json.dumps(content, indent=indent, ensure_ascii=escaped), encoding="utf-8")
            assert list(list_rows.rows(path)) == rows


# --- pairs of folders -------------------------------------------------------------------------------------------------


def urban(folder: Path, num: int = 3) -> Path:
    for number in range(1, num + 1):
        put(folder / "image" / f"{number}.jpg", picture(number))
        put(folder / "caption" / f"{number}.txt", f"The image shows {number}.\nA second line.\n")
    return folder


def test_urban_1k_has_the_first_line_of_each_text(tmp_path: Path) -> None:
    data = opened(urban(tmp_path), captions_per_image=1)
    assert texts(data) == {f"{number}.jpg": (f"The image shows {number}.",) for number in (1, 2, 3)}
    assert data.items[2].read() == picture(3)


def test_an_image_without_a_text_or_the_other_way_round_is_named(tmp_path: Path) -> None:
    (urban(tmp_path) / "caption" / "2.txt").unlink()
    refused(tmp_path, "1 images or texts lack the other, 2 first: .* has 3 images, .* has 2 .txt")


def dci(folder: Path) -> Path:
    for number in range(3):
        put(folder / "photos" / f"sa_{number}.jpg", picture(number))
        about = {"image": f"sa_{number}.jpg", "short_caption": f"short {number}", "extra_caption": f"long {number} "}
        put(folder / "annotations" / f"{number}.json", about)
    put(folder / "splits.json", {"train": ["0.json", "2.json"], "test": ["1.json"]})
    return folder


def test_dci_joins_its_captions_and_knows_its_splits(tmp_path: Path) -> None:
    dci(tmp_path / "densely_captioned_images")
    data = opened(tmp_path, captions_per_image=1)
    assert texts(data) == {f"sa_{number}.jpg": (f"short {number}\nlong {number}",) for number in (0, 2, 1)}
    assert data.about["split"] == "all"
    assert data.about["texts"] == "short_caption and extra_caption, joined by a line break"
    assert texts(opened(tmp_path, split="test", texts="extra_caption")) == {"sa_1.jpg": ("long 1",)}
    refused(tmp_path, "no images of split 'val'", split="val")
    refused(tmp_path, "has no text 'summary'", texts="summary")


def test_dcis_splits_name_no_file_elsewhere(tmp_path: Path) -> None:
    put(dci(tmp_path) / "splits.json", {"test": ["../photos/x.json"]})
    refused(tmp_path, "names '../photos/x.json', which is no file of")


# --- the door ---------------------------------------------------------------------------------------------------------


def test_the_format_is_found_out(tmp_path: Path) -> None:
    def found(data: Path, task: str = "retrieval") -> str:
        return find_format(Benchmark(name="own", data=str(data), task=task))  # type: ignore[arg-type]

    assert found(coco(tmp_path / "coco", [karpathy_row(1)])) == "karpathy"
    assert found(tmp_path / "coco" / "annotations" / "dataset_coco.json") == "karpathy"
    assert found(wds(tmp_path / "wds")) == found(tmp_path / "wds", "zero_shot") == "webdataset"
    assert found(shardmaker.write_shards(tmp_path / "shards")) == "shards"
    assert found(urban(tmp_path / "urban")) == found(dci(tmp_path / "dci")) == "json"
    put(tmp_path / "classes" / "fox" / "1.png", picture(1))
    assert found(tmp_path / "classes", "zero_shot") == "folder"
    put(tmp_path / "winoground" / "examples.jsonl", "")
    assert found(tmp_path / "winoground", "compositionality") == "winoground"
    assert found(tmp_path / "classes", "compositionality") == "sugarcrepe"


def test_the_digest_is_of_keys_texts_and_labels(tmp_path: Path) -> None:
    before = opened(urban(tmp_path)).about["digest"]
    assert opened(tmp_path).about["digest"] == before
    put(tmp_path / "caption" / "1.txt", "Something else.")
    assert opened(tmp_path).about["digest"] != before


def test_an_image_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    refused(coco(tmp_path, [karpathy_row(1), karpathy_row(1)]), "has the image 'val2014/1.jpg' twice")


def test_places_of_images_agree_with_what_is_documented() -> None:
    assert [place("val2014", "1.jpg") for place in format_karpathy.PLACES][:3] == [
        "val2014/1.jpg", "images/val2014/1.jpg", "1.jpg",
    ]  # fmt: skip
