"""``clips tune``: a grid becomes an experiment, which resumes, is drawn, and ends with a line to paste."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import fake_stages
import pytest
import test_cli_arms as fakes
import yaml

from cli.main import main
from cli.stages import STAGES
from cli.tune import GRIDS, dots, experiment
from clips_data.errors import UserError
from clips_train.config import TrainConfig


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    fake_stages.install(monkeypatch, STAGES)
    for name, entry in (("train", "train"), ("eval", "evaluate")):
        monkeypatch.setitem(STAGES, name, dataclasses.replace(STAGES[name], entry=f"test_cli_arms:{entry}"))
    monkeypatch.setattr("cli.scores.score_run", lambda run, quiet: {})
    fakes.TRAINED.clear()
    (tmp_path / "shards").mkdir()
    for name in ("index.json", "train-00000.tar"):
        (tmp_path / "shards" / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize("kind", GRIDS)
def test_every_value_of_a_grid_is_a_config_that_trains(work: Path, kind: str) -> None:
    found = experiment(kind, GRIDS[kind].values, [0, 1], "quickstart", ("web", "synthetic"), 6400, [], work)
    assert len(found.arms) == len(GRIDS[kind].values)
    configs = [arm.runs[1].stages["train"] for arm in found.arms]
    assert len({config.model_dump_json() for config in configs}) == len(configs)
    for config in configs:
        assert isinstance(config, TrainConfig)
        assert (config.samples, config.seed, config.decoder, config.size) == (6400, 1, "none", "tiny")


def test_a_ratio_of_all_or_nothing_names_one_column() -> None:
    assert GRIDS["ratio"].train(1, "web", "fused")["views"] == [{"from": "web"}]
    assert GRIDS["ratio"].train(0, "web", "fused")["views"] == [{"from": "fused"}]
    assert GRIDS["ratio"].train(0.8, "web", "fused")["views"] == [{"from": {"web": 0.8, "fused": 0.2}}]


def test_a_grid_is_run_once_drawn_and_answered_with_a_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", "ratio", "--work", str(work), "--grid", "1,0.5", "--seeds", "0,1", "--samples", "600"]
    assert main(words) == 0
    told = capsys.readouterr().err
    assert len(fakes.TRAINED) == 4
    # The fake scores grow with the length of a run's name, so that 0.5 wins.
    line = told.strip().splitlines()[-1].strip()
    assert line == "train: {views: [{from: {web: 0.5, synthetic: 0.5}}]}"
    assert TrainConfig(views=yaml.safe_load(line)["train"]["views"]).views[0].source == {"web": 0.5, "synthetic": 0.5}
    page = (work / "tune" / "ratio.html").read_text()
    assert "text → image R@1" in page and page.count('class="dot"') == 2 * 4
    assert main(words) == 0
    assert len(fakes.TRAINED) == 4, "nothing is trained twice"
    assert main([*words[:5], "1,0.5,0", *words[6:]]) == 0
    assert len(fakes.TRAINED) == 6, "a further value costs its own runs only"


def at_chance(config: Any, *, run: Path, **_: Any) -> dict[str, Any]:
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "eval.json").write_text("{}")
    return {"num_images": 8, "text_to_image_r1": 1 / 8, "chance_text_to_image_r1": 1 / 8}


def test_no_line_is_recommended_where_nothing_is_above_chance(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGES, "eval", dataclasses.replace(STAGES["eval"], entry=f"{__name__}:at_chance"))
    assert main(["tune", "ratio", "--work", str(work), "--grid", "1,0.5", "--samples", "600"]) == 0
    told = capsys.readouterr().err
    assert "give the proxies more --samples" in told and "train: {views" not in told


def test_bad_grids_and_missing_shards_are_told(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "ratio", "--work", str(work), "--grid", "1,2"]) == 2
    assert "ratio takes shares from 0 to 1" in capsys.readouterr().err
    assert main(["tune", "length", "--work", str(work), "--grid", "a"]) == 2
    assert main(["tune", "views", "--work", str(work), "--seeds", "x"]) == 2
    assert main(["tune", "ratio", "--work", str(work / "nowhere")]) == 1
    assert "holds no finished shards to tune on" in capsys.readouterr().err
    with pytest.raises(UserError, match="without arms"):
        experiment("ratio", (1,), [0], "recipes/ablation", ("web", "synthetic"), None, [], work)


def test_dots_have_a_line_through_their_means_and_escaped_titles() -> None:
    svg = dots("<b>", [(1, [10.0, 12.0]), (0.5, [20.0])], "x & y")
    assert "&lt;b&gt;. 1: 11.0 %, 0.5: 20.0 %" in svg and "x &amp; y" in svg
    assert svg.count("<circle") == 3 and svg.count('class="mean"') == 1
