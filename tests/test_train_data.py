"""The stream of batches: its order on any number of processes and workers, resumption, bad samples, clean ends."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shardmaker
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clips_data.errors import ResumeRefused, UserError
from clips_train import ahead, shards
from clips_train.batch import Batch
from clips_train.config import TrainConfig
from clips_train.data import Loader, SampleStream, Task, kept_patches
from clips_train.shards import SampleOrder
from clips_train.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer("bpe")
Change = Callable[[str, int, bytes, dict[str, Any]], tuple[bytes, dict[str, Any]]]


def config(**change: Any) -> TrainConfig:
    chosen: dict[str, Any] = {"size": "tiny", "image_px": 16, "context_length": 12, "target_length": 24, "batch": 6}
    return TrainConfig(**chosen | change)


def batches(
    folder: Path,
    number: int,
    state: dict[str, Any] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
    **change: Any,
) -> list[Batch]:
    split = shards.open_split(folder, shards.TRAIN)
    stream = SampleStream(split, config(**change), TOKENIZER, state, rank=rank, world_size=world_size).batches()
    taken = list(itertools.islice(stream, number))
    stream.close()
    return taken


def tensors(batch: Batch) -> list[torch.Tensor]:
    of_views = [
        tensor
        for view in batch.views
        for tensor in (view.ids_NKL, view.there_NK, view.negatives_NML, view.negatives_there_NM)
    ]
    others = (batch.image_NCHW, batch.condition_NL, batch.dropped_N, batch.labels_NQ, batch.mask_NQ, batch.kept_NP)
    return [*of_views, *(tensor for tensor in others if tensor is not None)]


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys == b.keys and a.state == b.state
        for one, other in zip(tensors(a), tensors(b), strict=True):
            assert torch.equal(one, other)


def text(ids: torch.Tensor) -> str:
    return TOKENIZER.decode(ids.tolist()[1:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shardmaker.write_shards(tmp_path_factory.mktemp("data") / "shards")  # 32 samples in tars of 12, 12 and 8


def test_tensors_have_the_promised_shapes_and_content(folder: Path) -> None:
    (batch,) = batches(folder, 1, augment="none")
    assert batch.image_NCHW.shape == (6, 3, 16, 16) and batch.image_NCHW.dtype == torch.uint8
    web, short = batch.views
    assert web.ids_NKL.shape == short.ids_NKL.shape == (6, 1, 12) and bool(web.there_NK.all())
    assert batch.labels_NQ.shape == batch.mask_NQ.shape == (6, 24)
    assert batch.first_slot == 0 and batch.kept_NP is None and not batch.teacher
    for row, key in enumerate(batch.keys):
        _, about = shardmaker.sample(int(key))
        assert torch.equal(web.ids_NKL[row], TOKENIZER.text_ids([about["web"]], 12))
        assert TOKENIZER.decode(batch.labels_NQ[row].tolist()) == about["synthetic"].lower()
        assert text(short.ids_NKL[row, 0]) + "." in about["synthetic"].lower()


def test_an_epoch_visits_each_sample_at_most_once_and_the_next_one_in_another_order(folder: Path) -> None:
    taken = batches(folder, 10)
    first = [key for batch in taken[:5] for key in batch.keys]
    second = [key for batch in taken[5:] for key in batch.keys]
    assert [(batch.state["epoch"], batch.state["sample"]) for batch in taken] == [
        (epoch, sample) for epoch in range(2) for sample in range(6, 31, 6)
    ]
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


# --- any number of processes and workers ------------------------------------------------------------------------------


def joined(of_ranks: list[list[Batch]]) -> list[tuple[Any, ...]]:
    """Steps as all processes together see them: where they end, keys, images, the texts of both views, counts."""
    steps = []
    for parts in zip(*of_ranks, strict=True):
        assert [part.first_slot for part in parts] == [number * len(parts[0].keys) for number in range(len(parts))]
        counts = sum((Counter(part.state["counts"]) for part in parts), Counter[str]())
        whole = [torch.cat(column) for column in zip(*map(tensors, parts), strict=True)]
        keys = [key for part in parts for key in part.keys]
        states = {(part.state["epoch"], part.state["sample"]) for part in parts}
        assert len(states) == 1
        steps.append((states, keys, [tensor.tolist() for tensor in whole], counts))
    return steps


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


def spoiling(numbers: set[int]) -> Change:
    def change(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return (b"" if number in numbers else image), about

    return change


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_processes_together_see_one_sequence_wherever_and_with_how_many_they_resume(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    num_samples = data.draw(st.integers(8, 30))
    bad = data.draw(st.sets(st.integers(0, num_samples - 1), max_size=num_samples // 4))
    folder = shardmaker.write_shards(
        tmp_path_factory.mktemp("data"), num_train=num_samples, num_heldout=0, shard_rows=7, change=spoiling(bad)
    )
    choices: dict[str, Any] = {"batch": data.draw(st.sampled_from([4, 8])), "seed": data.draw(st.integers(0, 3))}
    try:
        undisturbed = batches(folder, 7, **choices)
    except UserError as error:
        assert bad and "unusable" in str(error)  # a slot may have had nothing but bad samples
        return
    expected = joined([undisturbed])
    for epoch, steps in itertools.groupby(undisturbed, key=lambda batch: batch.state["epoch"]):
        for batch in steps:
            assert len(set(batch.keys)) == len(batch.keys) and not {int(key) for key in batch.keys} & bad, epoch
    stop = data.draw(st.integers(0, 6))
    state = None
    for world_size, first, last in ((data.draw(st.sampled_from([1, 2, 4])), 0, stop), (2, stop, 7), (4, stop, 7)):
        if first == last:
            continue
        parts = [
            batches(folder, last - first, state, rank=rank, world_size=world_size, **choices)
            for rank in range(world_size)
        ]
        assert joined(parts) == expected[first:last]
        if last == stop:
            counts = sum((Counter(part[-1].state["counts"]) for part in parts), Counter[str]())
            state = json.loads(json.dumps(parts[-1][-1].state | {"counts": dict(counts)}))


@pytest.mark.parametrize("workers", [1, 3])
def test_worker_processes_change_nothing_also_when_there_are_several_processes(tmp_path: Path, workers: int) -> None:
    folder = shardmaker.write_shards(tmp_path / "shards", change=spoil)
    undisturbed = batches(folder, 8)
    assert_equal(batches(folder, 8, num_workers=workers), undisturbed)
    resumed = [
        batches(folder, 5, undisturbed[2].state, rank=rank, world_size=2, num_workers=workers) for rank in (0, 1)
    ]
    assert joined(resumed) == joined([undisturbed[3:]])


def test_the_picture_cache_changes_nothing(folder: Path) -> None:
    for augment in ("none", "crop", "full"):
        undisturbed = batches(folder, 8, cache_bytes=0, augment=augment)
        for cache_bytes in (12_000, 10_000_000):
            assert_equal(batches(folder, 8, cache_bytes=cache_bytes, augment=augment), undisturbed)


def test_a_batch_that_the_processes_cannot_share_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"batch of 6 .* 4 processes"):
        batches(folder, 1, world_size=4)


def test_state_of_other_data_or_another_seed_is_refused(folder: Path) -> None:
    (batch,) = batches(folder, 1)
    with pytest.raises(ResumeRefused, match=r"seed 0.*1"):
        batches(folder, 1, batch.state, seed=1)
    with pytest.raises(ResumeRefused, match="digest"):
        batches(folder, 1, batch.state | {"digest": "other"})


# --- bad samples ------------------------------------------------------------------------------------------------------


def test_bad_samples_are_counted_by_reason_and_replaced_by_those_in_their_slot(tmp_path: Path) -> None:
    whole = shardmaker.write_shards(tmp_path / "whole")
    folder = shardmaker.write_shards(tmp_path / "shards", change=spoil)
    order = [key for batch in batches(whole, 5) for key in batch.keys]
    taken = batches(folder, 5)  # five batches of six, and two samples that are left over
    keys = [key for batch in taken for key in batch.keys]
    split = shards.open_split(folder, shards.TRAIN)
    places = SampleOrder(split.num_samples_by_shard, seed=0, window_shards=16)
    reader = shards.ShardReader(split)
    for position, (key, undisturbed) in enumerate(zip(keys, order, strict=True)):
        if int(undisturbed) not in (3, 5, 7):
            assert key == undisturbed
            continue
        column = [*range(position, 32, 6), *range(position % 6, position, 6)]
        of_column = [reader.key(*places.locate(0, place)) for place in column]
        assert key == next(other for other in of_column if int(other) not in (3, 5, 7))
    counts = taken[-1].state["counts"]
    num_bad = sum(int(key) in (3, 5, 7) for key in order)
    assert counts["replaced"] == num_bad
    assert counts["loaded"] == 30 + sum(number for name, number in counts.items() if name.startswith("bad."))
    assert {name for name in counts if name.startswith("bad.")} <= {
        "bad.decode_failed",
        "bad.not_an_image",
        "bad.no_caption",
    }
    assert counts["fallback.synthetic_empty"] == keys.count("000000009")


def test_too_few_samples_for_one_batch_end_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"32 train samples.*batch of 64"):
        batches(folder, 1, batch=64)
    everything = set(range(32))
    with pytest.raises(UserError, match=r"all [56] .*unusable.*bad\.not_an_image"):
        batches(shardmaker.write_shards(tmp_path / "bad", change=spoiling(everything)), 1)
    with pytest.raises(UserError, match="0 train samples"):
        batches(shardmaker.write_shards(tmp_path / "none", num_train=0), 1)


# --- the choices ------------------------------------------------------------------------------------------------------


def test_the_control_arm_gives_every_image_another_ones_captions_and_always_the_same(folder: Path) -> None:
    straight = batches(folder, 5, augment="none")
    shuffled = batches(folder, 5, augment="none", shuffle_captions=True)
    texts = {}
    for a, b in zip(straight, shuffled, strict=True):
        assert a.keys == b.keys and torch.equal(a.image_NCHW, b.image_NCHW)
        for row, key in enumerate(b.keys):
            texts[key] = text(b.views[0].ids_NKL[row, 0])
            assert not torch.equal(a.views[0].ids_NKL[row], b.views[0].ids_NKL[row])
    assert len(set(texts.values())) == 30, "a caption was given twice"
    again = batches(folder, 10, augment="none", shuffle_captions=True)[5:]
    for batch in again:
        for row, key in enumerate(batch.keys):
            found = text(batch.views[0].ids_NKL[row, 0])
            assert texts.get(key, found) == found


def test_overfitting_repeats_the_first_samples_unaugmented_with_the_same_draws(folder: Path) -> None:
    taken = batches(folder, 6, overfit=14, batch=7, augment="full")
    seen: dict[str, tuple[Any, ...]] = {}
    for batch in taken:
        for row, key in enumerate(batch.keys):
            of_row = tuple(tensor[row].tolist() for tensor in tensors(batch))
            assert seen.setdefault(key, of_row) == of_row
    assert sorted(map(int, seen)) == list(range(14))
    assert taken[0].keys != taken[2].keys, "the order is that of the epoch all the same"
    plain = {
        key: image
        for batch in batches(folder, 5, augment="none")
        for key, image in zip(batch.keys, batch.image_NCHW, strict=True)
    }
    for key, image in zip(taken[0].keys, taken[0].image_NCHW, strict=True):
        assert key not in plain or torch.equal(image, plain[key])
    with pytest.raises(UserError, match=r"overfit takes 3"):
        batches(folder, 1, overfit=3)


def test_the_patches_for_the_captioner_are_drawn_anew_each_epoch(folder: Path) -> None:
    taken = batches(folder, 10, image_px=64, image_tokens_kept=0.35)
    kept: dict[str, list[list[int]]] = {}
    for batch in taken:
        assert batch.kept_NP is not None and batch.kept_NP.shape == (6, 6) and batch.kept_NP.dtype == torch.int64
        for key, row in zip(batch.keys, batch.kept_NP.tolist(), strict=True):
            assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < 16
            kept.setdefault(key, []).append(row)
    assert sum(len(rows) == 2 and rows[0] != rows[1] for rows in kept.values()) > 20
    without = {"image_tokens_kept": 0.35, "decoder": "none", "caption_weight": 0}
    assert batches(folder, 1, **without)[0].kept_NP is None


def test_kept_patches_are_as_many_as_asked_for_and_fall_evenly() -> None:
    assert kept_patches(16, 0.01, 0, 0, "a").shape == (1,)
    drawn = Counter[int]()
    for number in range(400):
        drawn.update(kept_patches(16, 0.25, 0, 0, str(number)).tolist())
    assert sum(drawn.values()) == 1600 and len(drawn) == 16
    assert max(drawn.values()) < 140 and min(drawn.values()) > 65, drawn


# --- clean ends -------------------------------------------------------------------------------------------------------


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clips-")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_left_running_when_a_stream_is_closed_or_fails(
    folder: Path, tmp_path: Path, num_workers: int
) -> None:
    batches(folder, 1, num_workers=num_workers)
    assert not loader_threads() and not multiprocessing.active_children()
    bad = shardmaker.write_shards(tmp_path / "bad", change=spoiling(set(range(32))))
    with pytest.raises(UserError, match="too few for one batch of 6"):
        batches(bad, 1, num_workers=num_workers)
    assert not loader_threads() and not multiprocessing.active_children()


def test_a_worker_that_is_killed_ends_the_stream_with_a_sentence(folder: Path) -> None:
    stream = SampleStream(shards.open_split(folder, "train"), config(num_workers=2), TOKENIZER).batches()
    next(stream)
    victim = multiprocessing.active_children()[0]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"clips-loader-\d.*code -9.*num_workers"):
        list(itertools.islice(stream, 100))
    assert not loader_threads() and not multiprocessing.active_children()


def test_workers_leave_signals_to_the_training_process_and_end_with_it(folder: Path) -> None:
    stream = SampleStream(shards.open_split(folder, "train"), config(num_workers=2), TOKENIZER).batches()
    next(stream)
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(itertools.islice(stream, 20))) == 20
    stream.close()


def test_batches_wait_up_to_a_number_and_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make() -> Any:
        for number in range(50):
            made.append(number)
            yield number

    def num_made_after_one(size_bytes: int) -> int:
        made.clear()
        stream = ahead.made_ahead(make, lambda _: size_bytes)
        assert next(stream) == 0
        before = -1
        while len(made) != before:
            before = len(made)
            time.sleep(0.05)
        assert list(itertools.islice(stream, 5)) == [1, 2, 3, 4, 5]
        stream.close()
        return before

    monkeypatch.setattr(ahead, "BYTES_AHEAD", 1000)
    assert num_made_after_one(10) == 1 + ahead.BATCHES_AHEAD + 1  # taken, waiting, and the one that finds no room
    assert num_made_after_one(500) == 1 + 2 + 1
    assert num_made_after_one(5000) == 1 + 1 + 1


def test_a_loader_makes_the_same_of_a_task_wherever_it_is_cut(folder: Path) -> None:
    split = shards.open_split(folder, "train")
    loader = Loader(split, config(), TOKENIZER, None)
    whole = loader(Task(0, 0, 6))
    parts = [loader(Task(0, start, start + 2)) for start in (0, 2, 4)]
    assert whole.keys == [key for part in parts for key in part.keys]
    for name, tensor in whole.tensors.items():
        assert torch.equal(tensor, torch.cat([part.tensors[name] for part in parts]))


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
