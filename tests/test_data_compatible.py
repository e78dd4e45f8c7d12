"""Other people's loaders read what we write: stock webdataset and open_clip's own training loader."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from clips_data import download, shard, tars
from clips_data.config import DownloadConfig, ShardConfig
from clips_data.executor import Job

NUM_PAIRS = 24
Pairs = list[tuple[str, bytes]]
"""Caption and image bytes of each sample."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Pairs of the demo and the training shards made of them."""
    folder = tmp_path_factory.mktemp("work")
    download.run(DownloadConfig(source="demo", num_pairs=NUM_PAIRS, shard_rows=10), Job(work=folder, quiet=True))
    shard.run(ShardConfig(columns=("web",), scores=None, shard_rows=9), Job(work=folder, quiet=True))
    yield folder


def tars_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def ours(folder: Path) -> Pairs:
    """What our own reader finds, in the order of the tars."""
    samples = [sample for path in tars_of(folder) for sample in tars.read_samples(Path(path))]
    assert len(samples) > NUM_PAIRS * 0.8
    return [(sample.members["txt"].decode(), sample.members[str(sample.image_ext)]) for sample in samples]


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("folder", ["pairs", "shards"])
def test_stock_webdataset_reads_the_same_captions_and_pixels(work: Path, folder: str) -> None:
    expected = ours(work / folder)
    read = webdataset.WebDataset(tars_of(work / folder), shardshuffle=False).decode("pilrgb")
    found = list(read.to_tuple("jpg;png;webp", "txt", "json"))
    assert [text for _, text, _ in found] == [text for text, _ in expected]
    for (image, _, about), (_, data) in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(image), pixels(data))
        assert len(about["sha256"]) == 64


@pytest.mark.parametrize("folder", ["pairs", "shards"])
def test_open_clips_training_loader_reads_the_same_captions_and_pixels(work: Path, folder: str) -> None:
    """One epoch of its loader, shuffled as in training; every sample is told by its caption and pixels."""
    import torch
    from open_clip_train.data import get_wds_dataset

    expected = ours(work / folder)
    longest = max(len(text.encode()) for text, _ in expected)

    def tokenize(text: str) -> Any:
        """The bytes of the caption, so that it can be read back from the batch."""
        return torch.tensor([list(text.encode().ljust(longest, b"\0"))])

    def preprocess(image: Image.Image) -> Any:
        return torch.from_numpy(np.array(image.resize((40, 40))))

    options = Namespace(
        train_data="::".join(tars_of(work / folder)), train_num_samples=len(expected), dataset_resampled=False,
        train_data_upsampling_factors=None, seed=0, workers=0, world_size=1, batch_size=1,
    )  # fmt: skip
    loader = get_wds_dataset(options, preprocess, is_train=True, tokenizer=tokenize).dataloader
    found = [(bytes(text[0].tolist()).rstrip(b"\0").decode(), image[0].numpy().tobytes()) for image, text in loader]
    assert loader.num_samples == len(found) == len(expected)
    wanted = [
        (text, np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((40, 40)))) for text, data in expected
    ]
    assert sorted(found) == sorted((text, image.tobytes()) for text, image in wanted)
