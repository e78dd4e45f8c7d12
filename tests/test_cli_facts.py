"""The demo world's facts after ``clips eval``: our captioner beside the MLLM, from what eval wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import shardmaker

from cli.facts import attribute_items, dense_texts, score_run
from clips_data.demo import attributes, scenes
from clips_data.errors import UserError
from clips_train.use_config import Benchmark

WORLD = 3


def evaluated(folder: Path, ours: dict[int, str], *, demo: bool = True) -> Path:
    """A run's folder as ``eval`` leaves it; the MLLM's captions are the truth."""
    run = folder / "runs" / "first"
    (run / "eval").mkdir(parents=True)
    rows = [
        {
            "key": f"{index:09d}",
            "web": "web",
            "synthetic": scenes.describe(scenes.make_scene(WORLD, index)),
            "caption": text,
            "extra": {"scene": f"{WORLD}/{index}"} if demo else {},
        }
        for index, text in ours.items()
    ]
    (run / "eval" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_both_captioners_are_scored_on_the_same_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = {index: scenes.describe(scenes.make_scene(WORLD, index + index % 2)) for index in range(6)}
    run = evaluated(tmp_path, ours)
    figures = score_run(run, quiet=False)
    assert figures["mllm_fact_precision"] == figures["mllm_fact_recall"] == 1.0
    assert 0 < figures["clips_fact_precision"] < 1.0
    saved = json.loads((run / "eval" / "facts.json").read_text())
    assert saved["num_captions"] == 6
    assert saved["clips"]["precision"] == figures["clips_fact_precision"]
    assert saved["mllm"]["facts"] == saved["clips"]["facts"] > 0
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "eval: facts in 6 of 6 captions"
    assert [line.split()[0] for line in err[1:]] == ["captioner", "mllm", "clips"]


def test_missing_captions_find_nothing(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {1: "", 2: ""})
    figures = score_run(run, quiet=True)
    assert figures["clips_fact_recall"] == 0
    assert "clips_fact_precision" not in figures


def test_other_shards_have_no_facts(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {1: "a dog"}, demo=False)
    assert score_run(run, quiet=True) == {}
    assert not (run / "eval" / "facts.json").exists()


def test_run_without_captions_has_no_facts(tmp_path: Path) -> None:
    run = evaluated(tmp_path, {1: "a dog"})
    (run / "eval" / "captions.jsonl").unlink()
    assert score_run(run, quiet=True) == {}


def test_dense_queries_are_the_scenes_true_descriptions() -> None:
    assert dense_texts({"extra": {"scene": f"{WORLD}/7"}}) == [scenes.describe(scenes.make_scene(WORLD, 7))]
    assert dense_texts({"extra": {}}) is None and dense_texts({}) is None


def asked(shards: Path, name: str) -> Benchmark:
    return Benchmark(name=name, data=str(shards), task="zero_shot")


@pytest.mark.parametrize("name", attributes.QUESTIONS)
def test_attributes_of_heldout_scenes_are_classes_with_the_truth_as_labels(tmp_path: Path, name: str) -> None:
    shards = shardmaker.write_shards(tmp_path, num_train=4, num_heldout=20)
    data = attribute_items(asked(shards, f"demo-{name}"))
    assert data is not None
    for item in data.items:
        scene = scenes.make_scene(0, int(item.key))
        value = data.classes[item.label if item.label is not None else -1]
        matching = {
            "background": scene.background == value,
            "number": len(scene.objects) == {word: n for n, word in scenes.NUMBER_WORDS.items()}.get(value),
        }
        things = [thing for thing in scene.objects if not name.startswith("center") or thing.place == "center"]
        kind = name.removeprefix("center-")
        num_of = {v: sum(getattr(thing, kind, None) == v for thing in things) for v in data.classes}
        assert matching.get(name, all(num_of[value] > number for v, number in num_of.items() if v != value))
    assert len(data.items) + data.about["left_out"].get("images.without_answer", 0) == 20
    assert len(data.items) > 3 and data.items[0].read()[:2] == b"\xff\xd8"
    assert all("{c}" in template for template in data.templates)
    assert data.about["question"] and data.about["split"] == "heldout"


def test_attributes_are_asked_of_the_demo_world_only_and_by_their_names(tmp_path: Path) -> None:
    def of_another_world(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return image, {**about, "extra": {}}

    shards = shardmaker.write_shards(tmp_path, num_heldout=3, change=of_another_world)
    assert attribute_items(asked(shards, "pets")) is None
    with pytest.raises(UserError, match=r"no benchmark 'demo-color'. Did you mean 'demo-colour'"):
        attribute_items(asked(shards, "demo-color"))
    with pytest.raises(UserError, match=r"images\.without_answer 3"):
        attribute_items(asked(shards, "demo-colour"))
