"""The demo world's facts after ``clips eval``: our captioner beside the MLLM, from what eval wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.facts import dense_texts, score_run
from clips_data.demo import scenes

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
