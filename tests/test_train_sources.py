"""The loader's mix: at epoch 0 the bytes of the shards' ``.txt``, later what the rules draw, and all of it counted."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pytest
from bytemaker import TOKENIZER, Bytes

from clips_data import draws, ledger, shard, tars
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job
from clips_train import shards, sources
from clips_train.config import TrainConfig
from clips_train.data import Batch, SampleStream
from clips_train.train import train

COLUMNS = ("web", "synthetic", "long")
RULES = (
    "web=0.6,synthetic=0.3,long=0.1",
    "epoch>=1: web=0.2,long=0.8",
    "score.web<0.25: synthetic=0.9,web=0.1",
    "epoch>=2 and score.web>=0.25 and score.other.value<0.5: long=1",
)
SEED, NUM_SAMPLES = 5, 44


def plain_shares(epoch: int, scores: Mapping[str, float]) -> dict[str, float]:
    """``RULES`` in other words."""
    bad = "web" in scores and scores["web"] < 0.25
    if epoch >= 2 and "web" in scores and not bad and scores.get("other.value", 1) < 0.5:
        return {"long": 1}
    if bad:
        return {"synthetic": 0.9, "web": 0.1}
    return {"web": 0.2, "long": 0.8} if epoch >= 1 else {"web": 0.6, "synthetic": 0.3, "long": 0.1}


def plain_outcome(about: Mapping[str, Any], epoch: int, seed: int = SEED) -> str:
    shares = plain_shares(epoch, about["scores"])
    u, running, wanted = draws.uniform(seed, "mix", epoch, about["key"]), 0.0, ""
    for column in COLUMNS:
        running += shares.get(column, 0)
        if u < running and not wanted:
            wanted = column
    for column in (wanted, *(c for c in COLUMNS if c in shares), *COLUMNS):
        if about[column]:
            return column if column == wanted else f"{column}_for_missing_{wanted}"
    raise AssertionError("a sample without any text was written")


def texts_of(number: int) -> dict[str, str]:
    """Some of them empty, but never all of a sample."""
    return {
        "web": "" if number % 7 == 1 else f"wêb {number} 猫",
        "synthetic": "" if number % 5 == 2 else f"A thing {number} stands. Another one lies.",
        "long": "" if number % 3 == 2 and number % 7 != 1 else f"Long, {number}: it goes on. And on.",
    }


def write_shards(work: Path, **options: Any) -> Path:
    """Pairs with three columns and two folders of scores, some of all missing, become shards."""

    def caption(column: str, number: int, row: pairsmaker.Row) -> None:
        row["caption"] = texts_of(number)[column]
        if "finish_reason" in row and not row["caption"]:
            pairsmaker.reject(row)

    pairsmaker.write_pairs(work, num_shards=4, shard_rows=12, change=functools.partial(caption, "web"))
    for column in COLUMNS[1:]:
        pairsmaker.write_captions(work, column, change=functools.partial(caption, column))
    write_scores(work, "clip", "web", lambda n: None if n % 11 == 4 else 0.25 + (n % 9 - 4) * 4e-7)
    write_scores(work, "other", "value", lambda n: None if n % 4 == 1 else n % 10 / 10)
    settings = {"columns": COLUMNS, "scores": ("clip", "other"), "mix": RULES, "seed": SEED, "shard_rows": 12}
    shard.run(ShardConfig(**settings | options), Job(work=work, quiet=True))
    return work / "shards"


def write_scores(work: Path, name: str, field: str, score: Callable[[int], float | None]) -> None:
    """``score`` gets a number of its own for every pair."""
    folder, numbers = work / "scores" / name, itertools.count()
    folder.mkdir(parents=True)
    for unit in ledger.finished_units(work / "pairs"):
        rows = pl.read_parquet(work / "pairs" / f"{unit}.parquet").filter(status="success").select("key", "sha256")
        scores = pl.Series(field, [score(next(numbers)) for _ in range(len(rows))], pl.Float64)
        rows.with_columns(scores).write_parquet(ledger.part(folder / f"{unit}.parquet"))
        ledger.commit(folder, unit, [f"{unit}.parquet"], inputs={}, config={}, counts={"ok": len(rows)})


def members(folder: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Of every sample the bytes of ``.txt`` and the content of ``.json``."""
    found = [sample for tar in sorted(folder.glob("*.tar")) for sample in tars.read_samples(tar)]
    return {sample.key: (sample.members["txt"], json.loads(sample.members["json"])) for sample in found}


def config(**change: Any) -> TrainConfig:
    settings: dict[str, Any] = {"size": "tiny", "image_px": 16, "context_length": 128, "target_length": 128}
    settings |= {"augment": "none", "batch": NUM_SAMPLES, "seed": 1}
    drawn = change.pop("drawn", "shards")
    return TrainConfig(**settings | {"views": [drawn, {"from": "synthetic", "reduce": "one_piece"}]} | change)


def batches(folder: Path, number: int, state: dict[str, Any] | None = None, **change: Any) -> list[Batch]:
    """With the default batch, each is one epoch."""
    stream = SampleStream(shards.open_split(folder, "train"), config(**change), TOKENIZER, state).batches()
    taken = list(itertools.islice(stream, number))
    stream.close()
    return taken


def web_bytes(batch: Batch) -> dict[str, bytes]:
    """The drawn view of every key of the batch."""
    rows = batch.views[0].ids_NKL[:, 0].tolist()
    return {key: bytes(row[1 : row.index(Bytes.eos_id)]) for key, row in zip(batch.keys, rows, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("mixed"))


def test_epoch_0_is_the_txt_byte_for_byte_and_later_epochs_are_what_the_rules_draw(folder: Path) -> None:
    written = members(folder)
    assert len(written) == NUM_SAMPLES
    taken = batches(folder, 4)
    assert [batch.state["epoch"] for batch in taken] == [0, 1, 2, 3]
    assert web_bytes(taken[0]) == {key: text for key, (text, _) in written.items()}
    counts = Counter[str]()
    for epoch, batch in enumerate(taken):
        outcomes = {key: plain_outcome(about, epoch) for key, (_, about) in written.items()}
        columns = {key: outcome.partition("_for_missing_")[0] for key, outcome in outcomes.items()}
        assert web_bytes(batch) == {key: written[key][1][column].encode() for key, column in columns.items()}
        counts.update(outcomes.values())
        found = {n.removeprefix("mix."): c for n, c in batch.state["counts"].items() if n.startswith("mix.")}
        assert found == counts
    assert len({outcome for outcome in counts if "_for_missing_" in outcome}) >= 4, "the case tests too little"
    assert {*map(len, (set(web_bytes(batch).items()) for batch in taken))} == {NUM_SAMPLES}
    assert len({frozenset(web_bytes(batch).items()) for batch in taken}) == 4, "no epoch differs from another"


def test_scores_on_the_edge_of_a_bucket_fall_on_the_same_side_in_the_txt_and_in_the_loader(folder: Path) -> None:
    scores = {about["scores"].get("web") for _, about in members(folder).values()}
    assert {0.249999, 0.25, 0.250001, None} <= scores


def test_shards_from_before_there_were_rules_are_drawn_by_their_ratio(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, mix=(), web_ratio=0.4)
    index = json.loads((folder / "index.json").read_text())
    entry = {"web_ratio": 0.4, "seed": SEED, "counts": index["mix"]["counts"]}
    (folder / "index.json").write_text(json.dumps(index | {"mix": entry}))
    first, second = batches(folder, 2)
    written = members(folder)
    assert web_bytes(first) == {key: text for key, (text, _) in written.items()}
    for key, text in web_bytes(second).items():
        wanted = "web" if draws.uniform(SEED, "mix", 1, key) < 0.4 else "synthetic"
        filled = [c for c in (wanted, *COLUMNS) if written[key][1][c]]
        assert text == written[key][1][filled[0]].encode()


def test_rules_of_ones_own_are_drawn_with_the_runs_seed_and_may_follow_those_of_the_shards(folder: Path) -> None:
    written = members(folder)
    (own,) = batches(folder, 1, drawn=RULES)
    for key, text in web_bytes(own).items():
        about = written[key][1]
        assert text == about[plain_outcome(about, 0, seed=1).partition("_for_missing_")[0]].encode()
    assert web_bytes(own) != {key: text for key, (text, _) in written.items()}
    first, second = batches(folder, 2, drawn=("shards", "epoch>=1: long=1"))
    assert web_bytes(first) == {key: text for key, (text, _) in written.items()}
    for key, text in web_bytes(second).items():
        assert text == next(filter(None, (written[key][1][c] for c in ("long", *COLUMNS)))).encode()


def test_without_rules_the_web_view_is_the_web_column(folder: Path) -> None:
    (batch,) = batches(folder, 1, drawn="web", batch=40)
    written = members(folder)
    for key, text in web_bytes(batch).items():
        assert text.decode() == (written[key][1]["web"] or written[key][1]["synthetic"])
    assert not any(name.startswith(("mix", "empty.", "no_score.")) for name in batch.state["counts"])


def test_outcomes_rules_empty_columns_and_missing_scores_are_counted(folder: Path) -> None:
    (batch,) = batches(folder, 1)
    counts, abouts = batch.state["counts"], [about for _, about in members(folder).values()]
    assert counts["loaded"] == NUM_SAMPLES
    for column in COLUMNS:
        assert counts[f"empty.{column}"] == sum(not about[column] for about in abouts) > 0
    for name in ("web", "other.value"):
        assert counts[f"no_score.{name}"] == sum(name not in about["scores"] for about in abouts) > 0
    bad = sum(about["scores"].get("web", 1) < 0.25 for about in abouts)
    assert (counts["mix_rule.1"], counts["mix_rule.3"]) == (NUM_SAMPLES - bad, bad)
    told = sources.facts(counts)
    taken = sum(n for name, n in counts.items() if name == "mix.web" or name.startswith("mix.web_for"))
    assert f"web {taken / NUM_SAMPLES:.2%}" in told["mix"] and told["mix"].count("stood in for") >= 2
    assert told["mix_rules"] == f"1 {NUM_SAMPLES - bad}, 3 {bad} of {NUM_SAMPLES}"
    assert told["empty_captions"].startswith("long ") and told["missing_scores"].startswith("other.value ")
    assert sources.facts({"loaded": 3, "fallback.web_empty": 1}) == {}


def test_a_stream_that_was_stopped_or_has_workers_mixes_alike(folder: Path) -> None:
    undisturbed = batches(folder, 9, batch=10)
    again = batches(folder, 3, json.loads(json.dumps(undisturbed[5].state)), batch=10)
    workers = batches(folder, 9, batch=10, num_workers=1)
    for batch, other in zip([*undisturbed[6:], *undisturbed], [*again, *workers], strict=True):
        assert web_bytes(batch) == web_bytes(other) and batch.state == other.state


def test_in_the_control_arm_an_image_has_the_txt_of_another(folder: Path) -> None:
    (batch,) = batches(folder, 1, shuffle_captions=True)
    written = {key: text for key, (text, _) in members(folder).items()}
    found = web_bytes(batch)
    assert sorted(found.values()) == sorted(written.values())
    assert all(found[key] != written[key] for key in written)


def test_rules_that_the_shards_cannot_follow_end_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Rule 5 .*character 11: there is no column 'lnog'. Did you mean 'long'"):
        train(config(drawn=("shards", "epoch>=1: lnog=1")), shards=folder, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"Rule 2 .*'shards'.*would undo"):
        batches(folder, 1, drawn=("web=1", "shards"))


DAMAGED = [
    None, {}, [], {"rules": 3, "seed": 0}, {"rules": ["web=1"]}, {"rules": [7], "seed": 0},
    {"rules": ["web=1"], "seed": "0"}, {"rules": ["wb=1"], "seed": 0}, {"web_ratio": "most", "seed": 0},
]  # fmt: skip


@pytest.mark.parametrize("entry", DAMAGED)
def test_an_index_that_does_not_say_how_it_was_mixed_is_a_sentence(folder: Path, tmp_path: Path, entry: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "index.json").write_text(json.dumps(index | {"mix": entry}))
    with pytest.raises(UserError, match=r"texts were mixed|Rule 1 of the mix.*Did you mean 'web'"):
        batches(tmp_path, 1)
