"""The stream of batches: order, resumption, workers, bad samples, the control arm."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import shardmaker
import torch

from clips_data.errors import ResumeRefused, UserError
from clips_train import shards
from clips_train.config import TrainConfig
from clips_train.data import Batch, SampleStream
from clips_train.shards import SampleOrder
from clips_train.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer("bpe")


def config(**change: Any) -> TrainConfig:
    settings: dict[str, Any] = {"size": "tiny", "image_px": 16, "context_length": 12, "target_length": 24, "batch": 6}
    return TrainConfig(**settings | change)


def batches(folder: Path, number: int, state: dict[str, Any] | None = None, **change: Any) -> list[Batch]:
    split = shards.open_split(folder, shards.TRAIN)
    stream = SampleStream(split, config(**change), TOKENIZER, state).batches()
    taken = list(itertools.islice(stream, number))
    stream.close()
    return taken


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys == b.keys and a.state == b.state
        for name in ("image_NCHW", "web_NL", "short_NL", "labels_NQ", "mask_NQ"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shardmaker.write_shards(tmp_path_factory.mktemp("data") / "shards")  # 32 samples in tars of 12, 12 and 8


def test_tensors_have_the_promised_shapes_and_content(folder: Path) -> None:
    (batch,) = batches(folder, 1, augment="none")
    assert batch.image_NCHW.shape == (6, 3, 16, 16) and batch.image_NCHW.dtype == torch.uint8
    assert batch.web_NL.shape == batch.short_NL.shape == (6, 12)
    assert batch.labels_NQ.shape == batch.mask_NQ.shape == (6, 24)
    for row, key in enumerate(batch.keys):
        _, about = shardmaker.sample(int(key))
        assert torch.equal(batch.web_NL[row : row + 1], TOKENIZER.text_ids([about["web"]], 12))
        assert TOKENIZER.decode(batch.labels_NQ[row].tolist()) == about["synthetic"].lower()
        assert TOKENIZER.decode(batch.short_NL[row].tolist()[1:]) + "." in about["synthetic"].lower()


def test_an_epoch_visits_each_sample_at_most_once_and_the_next_one_in_another_order(folder: Path) -> None:
    taken = batches(folder, 10)
    first = [key for batch in taken[:5] for key in batch.keys]
    second = [key for batch in taken[5:] for key in batch.keys]
    assert [batch.state["epoch"] for batch in taken] == [0] * 5 + [1] * 5
    assert len(set(first)) == len(set(second)) == 30
    assert first != second and first != sorted(first)


@pytest.mark.parametrize("window_shards", [1, 2, 16])
def test_the_order_is_a_permutation_for_any_window(window_shards: int) -> None:
    counts = [3, 0, 5, 1, 4]
    order = SampleOrder(counts, seed=0, window_shards=window_shards)
    everything = {(shard, row) for shard, count in enumerate(counts) for row in range(count)}
    for epoch in range(3):
        places = [order.locate(epoch, position) for position in range(13)]
        assert set(places) == everything
    if window_shards == 1:
        shard_of = [shard for shard, _ in places]
        assert len(list(itertools.groupby(shard_of))) == 4, "tars are left before they are read to their end"


def test_a_resumed_stream_continues_exactly_wherever_it_stopped(folder: Path) -> None:
    undisturbed = batches(folder, 9)
    for stopped_after in (1, 4, 5, 7):
        state = json.loads(json.dumps(undisturbed[stopped_after - 1].state))
        assert_equal(batches(folder, 9 - stopped_after, state), undisturbed[stopped_after:])


def test_worker_processes_and_the_picture_cache_change_nothing(folder: Path) -> None:
    undisturbed = batches(folder, 8, cache_bytes=0)
    assert_equal(batches(folder, 8, cache_bytes=3 * 16 * 2 * 38 * 5), undisturbed)
    assert_equal(batches(folder, 8, num_workers=2), undisturbed)


def test_state_of_other_data_or_another_seed_is_refused(folder: Path) -> None:
    (batch,) = batches(folder, 1)
    with pytest.raises(ResumeRefused, match=r"seed 0.*1"):
        batches(folder, 1, batch.state, seed=1)
    with pytest.raises(ResumeRefused, match="digest"):
        batches(folder, 1, batch.state | {"digest": "other"})


def spoil(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    if number == 3:
        return image[:-60], about
    if number == 5:
        return b"<html>", about
    if number == 7:
        return image, about | {"web": "", "synthetic": "", "sub_captions": {"synthetic": []}}
    if number == 9:
        return image, about | {"synthetic": "", "sub_captions": {"synthetic": []}}
    return image, about


def test_bad_samples_are_counted_by_reason_and_replaced_by_the_next_ones(tmp_path: Path) -> None:
    folder = shardmaker.write_shards(tmp_path / "shards", change=spoil)
    taken = batches(folder, 5)  # 29 of 32 are usable, so the fifth batch of 6 is in the second epoch
    assert [len(batch.keys) for batch in taken] == [6] * 5
    assert [batch.state["epoch"] for batch in taken] == [0, 0, 0, 0, 1]
    keys = {int(key) for batch in taken for key in batch.keys}
    assert not keys & {3, 5, 7}
    counts = batches(folder, 8)[-1].state["counts"]
    assert counts["loaded"] >= 48
    assert counts["bad.decode_failed"] >= 1 and counts["bad.not_an_image"] >= 1 and counts["bad.no_caption"] >= 1
    assert counts["fallback.synthetic_empty"] >= 1


def test_too_few_samples_for_one_batch_end_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"32 train samples.*batch of 64"):
        batches(folder, 1, batch=64)

    def ruin(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return b"", about

    with pytest.raises(UserError, match=r"bad\.not_an_image.*32"):
        batches(shardmaker.write_shards(tmp_path / "bad", change=ruin), 1)
    with pytest.raises(UserError, match="0 train samples"):
        batches(shardmaker.write_shards(tmp_path / "none", num_train=0), 1)


def test_the_control_arm_gives_every_image_another_ones_captions_and_always_the_same(folder: Path) -> None:
    straight = batches(folder, 5, augment="none")
    shuffled = batches(folder, 5, augment="none", shuffle_captions=True)
    texts = {}
    for a, b in zip(straight, shuffled, strict=True):
        assert a.keys == b.keys and torch.equal(a.image_NCHW, b.image_NCHW)
        for row, key in enumerate(b.keys):
            texts[key] = TOKENIZER.decode(b.web_NL[row].tolist()[1:])
            assert not torch.equal(a.web_NL[row], b.web_NL[row])
    assert len(set(texts.values())) == 30, "a caption was given twice"
    again = batches(folder, 10, augment="none", shuffle_captions=True)[5:]
    for batch in again:
        for row, key in enumerate(batch.keys):
            assert texts.get(key, text := TOKENIZER.decode(batch.web_NL[row].tolist()[1:])) == text


def test_shards_that_are_not_as_promised_are_refused(tmp_path: Path) -> None:
    folder = shardmaker.write_shards(tmp_path / "shards")
    with pytest.raises(UserError, match=r"no split 'hedout'.*'heldout'"):
        shards.open_split(folder, "hedout")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        shards.open_split(folder, "train")
    (folder / "index.json").write_text(json.dumps(index))
    tar = folder / "train-00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00001\.tar"):
        shards.open_split(folder, "train")
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match="clips shard"):
        shards.open_split(folder, "train")
