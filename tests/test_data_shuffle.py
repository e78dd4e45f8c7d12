"""The shuffle on disk: the same order however rows come, every row once, and any slice of it."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clips_data import draws, shuffle
from clips_data.errors import UserError


def table(keys: list[str]) -> pl.DataFrame:
    drawn = [draws.uniform(0, "shuffle", 0, key) for key in keys]
    kinds = {"key": pl.String, "unit": pl.String, "text": pl.String, shuffle.DRAW: pl.Float64}
    rows = [(key, key[:2], f"text of {key}", draw) for key, draw in zip(keys, drawn, strict=True)]
    return pl.DataFrame(rows, schema=kinds, orient="row")


def shuffled(folder: Path, tasks: list[list[str]], num_buckets: int) -> shuffle.Sorted:
    spool = shuffle.Spool(folder / "spool", num_buckets)
    for number, keys in enumerate(tasks):
        spool.write(table(keys), f"{number:05d}")
    ends, total = [], 0
    for bucket in range(num_buckets):
        total += shuffle.sort_bucket(spool, bucket, folder / "sorted")
        ends.append(total)
    return shuffle.Sorted(folder / "sorted", tuple(ends))


@settings(max_examples=30)
@given(st.integers(1, 3000), st.integers(1, 7), st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_order_is_that_of_the_draws_whatever_the_tasks_and_buckets(
    num_rows: int, num_tasks: int, num_buckets: int, chance: random.Random
) -> None:
    keys = [f"{number:09d}" for number in range(num_rows)]
    chance.shuffle(keys)
    tasks = [keys[start::num_tasks] for start in range(num_tasks)]
    with tempfile.TemporaryDirectory() as folder:
        order = shuffled(Path(folder), tasks, num_buckets)
        assert order.num_rows == num_rows
        rows = order.rows(0, num_rows)
        assert rows["key"].to_list() == sorted(keys, key=lambda key: draws.uniform(0, "shuffle", 0, key))
        assert rows["text"].to_list() == [f"text of {key}" for key in rows["key"]]
        first = chance.randrange(num_rows)
        length = chance.randrange(1, num_rows - first + 1)
        assert order.rows(first, length).equals(rows.slice(first, length))
        assert pl.concat(order.column("key")).to_list() == rows["key"].to_list()


def test_a_key_that_two_shards_have_is_named_with_them(tmp_path: Path) -> None:
    twice = table(["000000001", "000000002"])
    spool = shuffle.Spool(tmp_path / "spool", 1)
    spool.write(twice, "00000")
    spool.write(twice.with_columns(unit=pl.lit("00007")).head(1), "00001")
    with pytest.raises(UserError, match=r"Key 000000001 is in more than one shard of the pairs \(00, 00007\)"):
        shuffle.sort_bucket(spool, 0, tmp_path / "sorted")


def test_nothing_spooled_is_an_empty_order(tmp_path: Path) -> None:
    assert shuffled(tmp_path / "none", [], 3).num_rows == 0
    assert shuffled(tmp_path / "empty", [[]], 3).num_rows == 0


def test_buckets_grow_only_once_there_are_many_of_them() -> None:
    assert shuffle.num_buckets(0) == 1
    assert shuffle.num_buckets(10 * shuffle.ROWS_AT_ONCE + 1) == 11
    assert shuffle.rows_of_task(10 * shuffle.ROWS_AT_ONCE) == shuffle.ROWS_AT_ONCE
    assert shuffle.num_buckets(100_000_000) == shuffle.MOST_BUCKETS
    assert shuffle.rows_of_task(100_000_000) == 97_657


@given(st.lists(st.integers(1, 50)), st.integers(1, 9), st.integers(1, 120))
def test_cut_fills_each_run_as_far_as_both_limits_let_it(sizes: list[int], most_rows: int, most_bytes: int) -> None:
    lengths = shuffle.cut(iter([sizes[:3], sizes[3:]]), most_rows, most_bytes)
    assert sum(lengths) == len(sizes)
    start = 0
    for length in lengths:
        run, after = sizes[start : start + length], sizes[start + length : start + length + 1]
        assert 0 < length <= most_rows
        assert length == 1 or sum(run) <= most_bytes
        assert not after or length == most_rows or sum(run) + after[0] > most_bytes
        start += length
