"""Retrieval scores, and the evaluation of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shardmaker
import torch
from torch import Tensor
from torch.nn import functional

from clips_data.errors import ResumeRefused, UserError
from clips_train import encoders
from clips_train import shards as shard_files
from clips_train.config import TrainConfig
from clips_train.evals import retrieval
from clips_train.evals.retrieval import chance_image_to_text, image_to_text_ranks, retrieval_scores, text_to_image_ranks
from clips_train.evals.run import evaluate, retrieval_by_queries
from clips_train.generate import load_trained
from clips_train.train import train
from clips_train.use_config import EvalConfig


def unit(*shape: int, seed: int = 0) -> Tensor:
    return functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def ranks_by_sorting(scores_QA: Tensor, right: list[set[int]]) -> list[int]:
    """The slow way, for scores without ties: wrong answers before the first right one."""
    ranks = []
    for scores, answers in zip(scores_QA, right, strict=True):
        order = scores.argsort(descending=True).tolist()
        ranks.append(next(rank for rank, answer in enumerate(order) if answer in answers))
    return ranks


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_ranks_agree_with_sorting_for_any_block_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "QUERIES_PER_BLOCK", block)
    image_NE, text_ME = unit(7, 5), unit(16, 5, seed=1)
    image_of_text_M = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 6, 1, 2, 0, 5, 4])
    own = [{m for m, n in enumerate(image_of_text_M.tolist()) if n == image} for image in range(7)]
    expected = ranks_by_sorting(text_ME @ image_NE.T, [{int(n)} for n in image_of_text_M])
    assert text_to_image_ranks(image_NE, text_ME, image_of_text_M).tolist() == expected
    assert image_to_text_ranks(image_NE, text_ME, image_of_text_M).tolist() == ranks_by_sorting(
        image_NE @ text_ME.T, own
    )


def test_a_perfect_model_scores_one_and_a_swapped_one_does_not() -> None:
    image_NE = torch.eye(12)
    text_ME, image_of_text_M = torch.eye(12).repeat_interleave(5, 0), torch.arange(12).repeat_interleave(5)
    scores = retrieval_scores(image_NE, text_ME, image_of_text_M)
    assert scores["text_to_image_r1"] == scores["image_to_text_r1"] == scores["text_to_image_r10"] == 1
    swapped = retrieval_scores(image_NE.roll(1, 0), text_ME, image_of_text_M)
    assert swapped["text_to_image_r1"] == swapped["image_to_text_r1"] == 0


@pytest.mark.parametrize(("images", "texts"), [(2, 2), (8, 8), (40, 200), (12, 36)])
def test_a_collapsed_model_scores_exactly_like_chance(images: int, texts: int) -> None:
    of = torch.arange(images).repeat_interleave(texts // images)
    scores = retrieval_scores(torch.ones(images, 4), torch.ones(texts, 4), of)
    for way in ("text_to_image", "image_to_text"):
        for k in (1, 5, 10):
            assert scores[f"{way}_r{k}"] == pytest.approx(scores[f"chance_{way}_r{k}"], abs=1e-9)


def test_among_ties_a_query_is_found_as_often_as_random_orders_find_it() -> None:
    for above, wrong, right, k in ((0, 3, 2, 1), (2, 4, 1, 5), (1, 1, 3, 5), (4, 9, 2, 10), (5, 0, 1, 5), (0, 0, 1, 1)):
        generator = torch.Generator().manual_seed(7)
        hits = 0
        for _ in range(4000):
            order = torch.randperm(wrong + right, generator=generator)
            hits += bool((order[: max(0, k - above)] < right).any())
        places = retrieval.Places(*(torch.tensor([float(number)]) for number in (above, wrong, right)))
        assert float(places.found_at(k)) == pytest.approx(hits / 4000, abs=0.03)


def test_a_collapsed_model_scores_no_better_than_chance() -> None:
    scores = retrieval_scores(torch.ones(40, 4), torch.ones(200, 4), torch.arange(40).repeat_interleave(5))
    for k in (1, 5, 10):  # but for rounding
        assert scores[f"text_to_image_r{k}"] - 1e-15 <= scores[f"chance_text_to_image_r{k}"] == k / 40
        assert scores[f"image_to_text_r{k}"] - 1e-15 <= scores[f"chance_image_to_text_r{k}"]


def test_half_of_the_ties_count_as_better() -> None:
    image_NE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    ranks = text_to_image_ranks(image_NE, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 3]))
    assert ranks.tolist() == [1.0, 0.0]


def test_stated_chance_is_what_random_rankings_score() -> None:
    assert chance_image_to_text([1] * 20, 5) == pytest.approx(5 / 20)
    assert chance_image_to_text([2, 2], 4) == 1
    found = 0
    for seed in range(400):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:5]
        found += bool((order < 3).any())
    assert chance_image_to_text([3] * 20, 5) == pytest.approx(found / 400, abs=0.06)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evals")
    shards = shardmaker.write_shards(folder / "shards")
    config = TrainConfig(
        size="tiny", image_px=16, context_length=12, target_length=24, batch=8, samples=16, caption_negatives=50
    )
    train(config, shards=shards, out=folder / "run", quiet=True)
    return folder / "run", shards


def test_evaluation_writes_scores_and_captions_of_every_held_out_sample(run: tuple[Path, Path]) -> None:
    folder, shards = run
    scores = evaluate(EvalConfig(batch=3), run=folder, shards=shards, quiet=True)
    assert scores["num_images"] == 8 and scores["num_texts"] == 40 and scores["unreadable"] == 0
    assert scores["chance_text_to_image_r1"] == 1 / 8
    result = json.loads((folder / "eval" / "eval.json").read_text())
    assert result["schema_version"] == 1 and result["step"] == 2 and result["checkpoint"] == "step-00000002"
    assert {name: scores[name] for name in result["retrieval"]} == result["retrieval"]
    assert result["scores"]["text_to_image_r1"].keys() == {"value", "low", "high", "chance"}
    keys = {f"{number:09d}" for number in range(32, 40)}
    misses = result["details"]["hardest"]
    assert misses and all(miss["key"] in keys and miss["rank"] > 1 and set(miss["first"]) <= keys for miss in misses)
    rows = [json.loads(line) for line in (folder / "eval" / "captions.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [f"{number:09d}" for number in range(32, 40)]
    for row in rows:
        about = shardmaker.sample(int(row["key"]))[1]
        assert isinstance(row["caption"], str)
        assert {name: row[name] for name in ("web", "synthetic", "extra")} == {
            name: about[name] for name in ("web", "synthetic", "extra")
        }


def test_the_batch_size_changes_nothing_and_a_second_time_is_read_back(
    run: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, shards = run
    first = evaluate(EvalConfig(batch=3), run=folder, shards=shards, quiet=True)
    monkeypatch.setattr("clips_train.generate.load_trained", None)
    assert evaluate(EvalConfig(batch=8), run=folder, shards=shards, quiet=True) == first
    with pytest.raises(ResumeRefused, match=r"max_samples.*\nUse --overwrite to make it again\.$"):  # it has no --out
        evaluate(EvalConfig(max_samples=4), run=folder, shards=shards, quiet=True)


def test_samples_without_captions_of_their_own_are_searched_by_the_web_caption(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    def change(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return (b"<html>" if number == 33 else image), about | {"extra": {}}

    shards = shardmaker.write_shards(tmp_path / "shards", change=change)
    config = EvalConfig(captions=False)
    scores = evaluate(config, run=run[0], shards=shards, overwrite=True, quiet=True)
    assert scores["num_images"] == scores["num_texts"] == 7
    assert scores["unreadable"] == 1
    assert json.loads((run[0] / "eval" / "eval.json").read_text())["counts"]["bad.not_an_image"] == 1
    assert (run[0] / "eval" / "captions.jsonl").read_text() == ""


def test_a_split_without_samples_and_a_missing_column_are_named(run: tuple[Path, Path], tmp_path: Path) -> None:
    empty = shardmaker.write_shards(tmp_path / "shards", num_heldout=0)
    with pytest.raises(UserError, match="heldout-ratio"):
        evaluate(EvalConfig(), run=run[0], shards=empty, overwrite=True, quiet=True)
    assert shard_files.open_split(empty, "train").num_samples == 32
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate(EvalConfig(), run=tmp_path, shards=run[1], quiet=True)


# --- query sets -------------------------------------------------------------------------------------------------------


def result(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval" / "eval.json").read_text())
    return found


def scored(run: tuple[Path, Path], shards: Path | None = None, **given: Any) -> dict[str, Any]:
    """Figures of an evaluation with ``queries``, and ``derived`` texts."""
    derived = given.pop("derived", None)
    config = EvalConfig(captions=False, **given)
    return evaluate(config, run=run[0], shards=shards or run[1], overwrite=True, quiet=True, derived=derived)


def test_every_query_set_has_the_scores_that_it_has_alone(run: tuple[Path, Path]) -> None:
    alone = {name: scored(run, queries=[name]) for name in ("captions", "synthetic", "web")}
    both = scored(run, queries=["captions", "synthetic", "web"], batch=3)
    by_queries = result(run[0])["retrieval_by_queries"]
    assert sorted(by_queries) == ["captions", "synthetic", "web"]
    assert {name: both[name] for name in alone["captions"]} == alone["captions"], "the first is the headline"
    for name in ("synthetic", "web"):
        assert by_queries[name] == {key: value for key, value in alone[name].items() if key != "unreadable"}
        assert {key: both[f"{name}_{key}"] for key in by_queries[name]} == by_queries[name]
    assert (by_queries["captions"]["num_texts"], by_queries["web"]["num_texts"]) == (40, 8)
    recalls = {tuple(value for key, value in scores.items() if "chance" not in key) for scores in by_queries.values()}
    assert len(recalls) == 3, "they are different texts"


def test_derived_texts_are_asked_for_by_name_and_cut_to_the_context(run: tuple[Path, Path]) -> None:
    asked: list[str] = []

    def dense(about: dict[str, Any]) -> list[str]:
        asked.append(about["extra"]["scene"])
        return [about["synthetic"] + " more words than the model's context has room for" * 20]

    scores = scored(run, queries=["captions", "dense"], derived={"dense": dense})
    assert sorted(asked) == sorted(f"0/{number}" for number in range(32, 40))
    assert scores["dense_num_texts"] == 8
    assert scores["dense_chance_text_to_image_r1"] == 1 / 8
    asked.clear()
    scored(run, queries=["captions"], derived={"dense": dense})
    assert asked == []


def test_images_without_a_text_of_a_set_are_left_out_of_that_set_only(run: tuple[Path, Path], tmp_path: Path) -> None:
    def change(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return image, about | {"long": "" if number in (32, 35) else about["synthetic"]}

    shards = shardmaker.write_shards(tmp_path / "shards", change=change)
    scores = scored(run, shards, queries=["captions", "long"], batch=2)
    assert (scores["num_images"], scores["long_num_images"], scores["long_num_texts"]) == (8, 6, 6)
    assert result(run[0])["counts"]["no_text.long"] == 2

    def only_the_others(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return (b"<html>" if number in (32, 35) else image), about | {"long": about["synthetic"]}

    others = shardmaker.write_shards(tmp_path / "others", change=only_the_others)
    whole = scored(run, others, queries=["long"])
    assert whole["text_to_image_r1"] == scores["long_text_to_image_r1"]
    assert whole["image_to_text_r5"] == scores["long_image_to_text_r5"]


def test_further_columns_of_the_list_are_query_sets(run: tuple[Path, Path], tmp_path: Path) -> None:
    def change(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        extra = about["extra"] | {"title": f"picture {number}", "tags": ["one", "", "two"]}
        return image, about | {"extra": extra}

    shards = shardmaker.write_shards(tmp_path / "shards", change=change)
    scores = scored(run, shards, queries=["title", "tags"])
    assert (scores["num_texts"], scores["tags_num_texts"]) == (8, 16)


def test_unknown_and_empty_query_sets_are_named(run: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no caption column 'synthetics'\. Did you mean 'synthetic'\?"):
        scored(run, queries=["captions", "synthetics"])
    with pytest.raises(UserError, match="no caption column 'sha256'"):
        scored(run, queries=["sha256"])
    with pytest.raises(UserError, match="no caption column 'dense'"):
        scored(run, queries=["dense"], derived={"dense": lambda about: None})

    def empty(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return image, about | {"long": " "}

    shards = shardmaker.write_shards(tmp_path / "shards", change=empty)
    with pytest.raises(UserError, match="None of 8 samples has a text of the queries 'long'"):
        scored(run, shards, queries=["captions", "long"])


def test_a_model_in_training_is_scored_without_files(run: tuple[Path, Path]) -> None:
    before = (run[0] / "eval" / "eval.json").read_bytes()
    trained = load_trained(run[0])
    split = shard_files.open_split(run[1], "heldout")
    encoder = encoders.of_trained(trained, encoders.run_in(run[0]))
    by_queries = retrieval_by_queries(encoder, split, EvalConfig(queries=("captions", "web")))
    assert by_queries["captions"]["num_images"] == 8
    assert (run[0] / "eval" / "eval.json").read_bytes() == before
    assert by_queries == (scored(run, queries=["captions", "web"]) and result(run[0])["retrieval_by_queries"])
