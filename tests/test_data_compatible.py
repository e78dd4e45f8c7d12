"""Other people's loaders read what we write: stock webdataset, open_clip's training loader, Hugging Face datasets."""

from __future__ import annotations

import io
import json
import random
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pairsmaker
import pytest
import webdataset
from PIL import Image

from clips_data import download, shard, tars
from clips_data.config import DownloadConfig, ShardConfig
from clips_data.executor import Job

NUM_PAIRS = 24
COLUMNS = ("web", "synthetic")
Pairs = list[tuple[str, bytes]]
"""Caption and image bytes of each sample."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pairs of the demo, a caption column that lacks some, and the training shards made of both."""
    folder = tmp_path_factory.mktemp("work")
    download.run(DownloadConfig(source="demo", num_pairs=NUM_PAIRS, shard_rows=10), Job(work=folder, quiet=True))

    def lose_some(number: int, row: pairsmaker.Row) -> None:
        if number % 5 == 0:
            pairsmaker.reject(row)

    pairsmaker.write_captions(folder, change=lose_some)
    config = ShardConfig(columns=COLUMNS, shard_rows=9, heldout_ratio=0.2, web_ratio=0.5)
    shard.run(config, Job(work=folder, quiet=True))
    yield folder


def tars_of(folder: Path, split: str = "") -> list[str]:
    return [str(path) for path in sorted(folder.glob(f"{split}*.tar"))]


def ours(folder: Path, split: str = "") -> Pairs:
    """What our own reader finds, in the order of the tars."""
    samples = [sample for path in tars_of(folder, split) for sample in tars.read_samples(Path(path))]
    assert samples
    return [(sample.members["txt"].decode(), sample.members[str(sample.image_ext)]) for sample in samples]


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def abouts(work: Path) -> list[dict[str, Any]]:
    samples = [sample for path in tars_of(work / "shards") for sample in tars.read_samples(Path(path))]
    return [json.loads(sample.members["json"]) for sample in samples]


@pytest.mark.parametrize("folder", ["pairs", "shards"])
def test_stock_webdataset_reads_the_same_captions_and_pixels(work: Path, folder: str) -> None:
    expected = ours(work / folder)
    assert len(expected) > NUM_PAIRS * 0.8
    read = webdataset.WebDataset(tars_of(work / folder), shardshuffle=False).decode("pilrgb")
    found = list(read.to_tuple("jpg;png;webp", "txt", "json"))
    assert [text for _, text, _ in found] == [text for text, _ in expected]
    for (image, _, about), (_, data) in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(image), pixels(data))
        assert len(about["sha256"]) == 64


@pytest.mark.parametrize("folder", ["pairs", "shards"])
def test_open_clips_training_loader_reads_the_same_captions_and_pixels(work: Path, folder: str) -> None:
    """One epoch of its loader, shuffled as in training; every sample is told by its caption and pixels.

    Of shards it learns from ``sizes.json`` how many samples there are; of pairs the user has to tell it.
    """
    import torch
    from open_clip_train.data import get_wds_dataset

    split = "train" if folder == "shards" else ""
    expected = ours(work / folder, split)
    longest = max(len(text.encode()) for text, _ in expected)

    def tokenize(text: str) -> Any:
        """The bytes of the caption, so that it can be read back from the batch."""
        return torch.tensor([list(text.encode().ljust(longest, b"\0"))])

    def preprocess(image: Image.Image) -> Any:
        return torch.from_numpy(np.array(image.resize((40, 40))))

    options = Namespace(
        train_data="::".join(tars_of(work / folder, split)), dataset_resampled=False,
        train_num_samples=None if folder == "shards" else len(expected),
        train_data_upsampling_factors=None, seed=0, workers=0, world_size=1, batch_size=1,
    )  # fmt: skip
    loader = get_wds_dataset(options, preprocess, is_train=True, tokenizer=tokenize).dataloader
    found = [(bytes(text[0].tolist()).rstrip(b"\0").decode(), image[0].numpy().tobytes()) for image, text in loader]
    assert loader.num_samples == len(found) == len(expected)
    wanted = [
        (text, np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((40, 40)))) for text, data in expected
    ]
    assert sorted(found) == sorted((text, image.tobytes()) for text, image in wanted)


def test_open_clip_reads_the_sizes_of_every_tar(work: Path) -> None:
    from open_clip_train.data import get_dataset_size

    for split in ("train", "heldout"):
        files = tars_of(work / "shards", split)
        assert get_dataset_size("::".join(files)) == (len(ours(work / "shards", split)), len(files))


def test_hugging_face_datasets_reads_the_same_captions_and_pixels(work: Path, tmp_path: Path) -> None:
    """Through its webdataset builder, and through the card of the folder, which names the splits."""
    datasets = pytest.importorskip("datasets")
    folder = work / "shards"
    named = datasets.load_dataset(
        "webdataset", data_files={"train": tars_of(folder, "train")}, split="train", cache_dir=str(tmp_path / "a")
    )
    by_card = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "b"))
    assert set(by_card) == {"train", "heldout"}
    for split, table in (("train", named), *by_card.items()):
        expected = ours(folder, split)
        assert [row["txt"] for row in table] == [text for text, _ in expected]
        for row, (_, data) in zip(table, expected, strict=True):
            assert np.array_equal(np.asarray(row["jpg"].convert("RGB")), pixels(data))
            assert {name: row["json"][name] for name in COLUMNS} == {name: str(row["json"][name]) for name in COLUMNS}


def test_hugging_face_datasets_reads_by_the_card_what_it_could_not_guess(tmp_path: Path) -> None:
    """Images of several kinds, and a caption column of which the first samples have none."""
    datasets = pytest.importorskip("datasets")

    def some_png(number: int, row: pairsmaker.Row) -> None:
        if number % 3 == 0:
            row |= {"image_ext": "png", "image": pairsmaker.image_bytes(number, "PNG")}

    def mostly_rejected(number: int, row: pairsmaker.Row) -> None:
        if number < 13:
            pairsmaker.reject(row)

    pairsmaker.write_pairs(tmp_path, num_shards=3, change=some_png)
    pairsmaker.write_captions(tmp_path, change=mostly_rejected)
    shard.run(ShardConfig(columns=COLUMNS), Job(work=tmp_path, quiet=True))
    with pytest.raises(ValueError, match="don't share the same prefix or the same types"):
        datasets.load_dataset("webdataset", data_files=tars_of(tmp_path / "shards"), cache_dir=str(tmp_path / "a"))
    read = datasets.load_dataset(str(tmp_path / "shards"), split="train", cache_dir=str(tmp_path / "b"))
    expected = ours(tmp_path / "shards")
    assert [row["txt"] for row in read] == [text for text, _ in expected]
    for row, (_, data), about in zip(read, expected, abouts(tmp_path), strict=True):
        assert np.array_equal(np.asarray((row["jpg"] or row["png"]).convert("RGB")), pixels(data))
        assert row["json"]["sub_captions"] == about["sub_captions"] and row["json"]["provenance"] == about["provenance"]


def json_text(about: Mapping[str, Any], keys: str, order: Sequence[int] | None = None) -> str:
    """The rule of open_clip's coming ``--json-text-key "a;b;c"``: the first key with a text that is not blank.

    ``order`` is that in which ``--json-text-key-probs`` drew the keys.
    """
    names = keys.split(";")
    for place in order if order is not None else range(len(names)):
        value = about.get(names[place])
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def drawn_order(weights: Sequence[float], drawn: random.Random) -> list[int]:
    """Keys with a weight in an order drawn by it, those without after them, as they stand."""
    left = [place for place, weight in enumerate(weights) if weight]
    order = []
    while left:
        order.append(drawn.choices(left, [weights[place] for place in left])[0])
        left.remove(order[-1])
    return order + [place for place, weight in enumerate(weights) if not weight]


def test_json_keys_are_what_open_clips_json_text_key_needs(work: Path) -> None:
    found = abouts(work)
    assert any(not about["synthetic"] for about in found) and all(isinstance(a[c], str) for a in found for c in COLUMNS)
    for about in found:
        assert json_text(about, "synthetic") == about["synthetic"]
        assert json_text(about, "synthetic;web") == (about["synthetic"] or about["web"])
        assert json_text(about, "missing;sub_captions;scores;web") == about["web"]


def test_weighted_json_keys_mix_as_they_say_and_fall_back(work: Path) -> None:
    """Weights (1, 0) take the second only where the first is empty; 0.7 to 0.3 come out so where both have a text."""
    found, drawn = abouts(work), random.Random(0)
    for about in found:
        assert json_text(about, "synthetic;web", drawn_order((1, 0), drawn)) == (about["synthetic"] or about["web"])
    both = [about for about in found if about["synthetic"]]
    texts = [(json_text(a, "web;synthetic", drawn_order((0.7, 0.3), drawn)), a) for a in both for _ in range(200)]
    share = sum(text == about["web"] for text, about in texts) / len(texts)
    assert abs(share - 0.7) < 4 * (0.21 / len(texts)) ** 0.5
