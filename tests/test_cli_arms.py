"""Manifests with arms: what runs once, what runs per arm and seed, what is kept in the results and shown of them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import fake_stages
import pytest

from cli import arms, results
from cli.main import main
from cli.manifest import load_manifest
from cli.stages import STAGES
from clips_data import ledger
from clips_data.errors import Interrupted, UsageError, UserError

EXPERIMENT = """\
name: trial
work: here
results: results/trial.json
seeds: [0, 1]
stages:
  download:
    source: demo
    num_pairs: 8
  shard:
  train:
    size: tiny
    samples: 600
  eval:
    queries: [captions, dense]
arms:
  web:
    core: true
    expected: "paper: 10 | 20"
    train:
      views: [web]
  short:
    train:
      views:
        - web
        - {from: synthetic, reduce: block, tokens: 16}
"""

TRAINED: list[tuple[str, int]] = []
"""Run and seed of every training, in order."""


def train(config: Any, *, shards: Path, out: Path, index: Path, overwrite: bool, quiet: bool) -> dict[str, Any]:
    assert (shards / "train-00000.tar").exists(), "the shared stages come first"
    if config.grad_clip == 13:
        raise Interrupted("stopped in the middle")
    settings = config.model_dump(mode="json")
    done = ledger.is_done(out, "train", inputs={}, config=settings, overwrite=overwrite)
    if not done:
        TRAINED.append((out.name, config.seed))
        out.mkdir(parents=True, exist_ok=True)
        rows = [{"samples": n * config.samples // 2, "samples_per_s": rate} for n, rate in ((1, 10.0), (2, 5.0))]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ledger.part(out / "config.json").write_text("{}")
        ledger.commit(out, "train", ["config.json"], inputs={}, config=settings, counts={})
    return {"samples": config.samples, "loss": 1.0, "skipped": done}


def evaluate(
    config: Any, *, run: Path, shards: Path, overwrite: bool, quiet: bool, derived: dict[str, Any], given: Any
) -> dict[str, Any]:
    """Scores that tell arms and seeds apart: the more there is in a run's name, the better it is."""
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "eval.json").write_text("{}")
    seed = int(run.name[-1])
    score = len(run.name) / 100 + seed / 100
    return {
        "num_images": 8,
        "text_to_image_r1": score,
        "chance_text_to_image_r1": 1 / 8,
        "dense_text_to_image_r1": score / 2,
        "dense_chance_text_to_image_r1": 1 / 4,
    }


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    fake_stages.install(monkeypatch, STAGES)
    for name, entry in (("train", "train"), ("eval", "evaluate")):
        monkeypatch.setitem(STAGES, name, dataclasses.replace(STAGES[name], entry=f"{__name__}:{entry}"))
    TRAINED.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.yaml").write_text(EXPERIMENT)
    return tmp_path


def refusal(folder: Path, text: str) -> str:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load_manifest("bad.yaml")
    return str(refused.value)


def rows(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "results" / "trial.json").read_text())["rows"].values())


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_arm_and_seed_is_a_run_with_the_arms_values_over_those_of_the_stages(folder: Path) -> None:
    manifest = load_manifest("trial.yaml")
    assert list(manifest.stages) == ["download", "shard"]
    assert manifest.results == Path("results/trial.json")
    runs: list[Any] = [run.manifest for run in arms.runs_of(manifest)]
    assert [run.name for run in runs] == ["trial-web-s0", "trial-short-s0", "trial-web-s1", "trial-short-s1"]
    assert all(list(run.stages) == ["download", "shard", "train", "eval"] for run in runs)
    assert [run.stages["train"].seed for run in runs] == [0, 0, 1, 1]
    assert {run.stages["train"].samples for run in runs} == {600}
    assert [view.reduce for view in runs[1].stages["train"].views] == ["none", "block"]
    assert [run.run_of("eval") for run in runs] == [run.name for run in runs]


def test_settings_of_the_command_line_count_in_every_arm(folder: Path) -> None:
    manifest: Any = load_manifest("trial.yaml", ["train.views=[synthetic]", "results=mine.json"])
    assert {run.stages["train"].views[0].source for arm in manifest.arms for run in arm.runs.values()} == {"synthetic"}
    assert manifest.results == Path("mine.json")


def test_results_lie_beside_the_manifest_wherever_it_is_called_from(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "trial.yaml").rename(folder / "recipes" / "trial.yaml")
    assert load_manifest("recipes/trial.yaml").results == Path("recipes/results/trial.json")
    (folder / "bare.yaml").write_text(EXPERIMENT.replace("results: results/trial.json\n", ""))
    assert load_manifest("bare.yaml").results == Path("here/results/trial.json")


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("  short:", "  a b:", "bad.yaml, line 21: an arm is named 'a b'; it needs a name of letters"),
        ("  short:", "  core:", "bad.yaml, line 21: an arm is named 'core'"),
        ("  short:", "  web:", "bad.yaml, line 21: 'web' is given a second time; it was first at bad.yaml, line 16."),
        ("core: true", "coer: true", "bad.yaml, line 17: arm web has no key 'coer'. Did you mean 'core'?"),
        ("core: true", "core: 3", "bad.yaml, line 17: arm web: core is 3; it should be true or false."),
        ("core: true", "shard:", "line 17: arm web cannot change shard, which is done once for all arms."),
        ("core: true", "eval: {batsh: 3}", "line 17: eval has no key 'batsh'. Did you mean 'batch'?"),
        ("views: [web]", "views: web", "bad.yaml, line 20: train.views is 'web'; it should be a list."),
        ("views: [web]", "view: [web]", "bad.yaml, line 20: train has no key 'view'. Did you mean 'views'?"),
        ("reduce: block", "reduce: blok", "bad.yaml, line 25: train.views.1.reduce is 'blok'; it should be 'none'"),
        ("tokens: 16", "tokns: 16", "bad.yaml, line 25: train.views.1 has no key 'tokns'. Did you mean 'tokens'?"),
        ("from: synthetic", "from: {web: x}", "line 25: train.views.1.from.web is 'x'; it should be a valid number."),
        ("views: [web]", "decoder: none", "bad.yaml, line 16, arm web: train: caption_weight 2.0 needs a captioner"),
        ("views: [web]", "seed: 3", "bad.yaml, line 20: train.seed comes from `seeds`, where there are `arms`."),
        ("views: [web]", "name: x", "bad.yaml, line 20: train.name comes from the experiment, the arm and the seed"),
        ("seeds: [0, 1]", "seeds: [0, 0]", "line 4: seeds is [0, 0]; it should be a list of different whole numbers"),
        ("seeds: [0, 1]", "seeds: 3", "bad.yaml, line 4: seeds is 3; it should be a list"),
        ("results/trial.json", "results.md", "line 3: results is 'results.md'; it should be the name of a .json file."),
        ("  eval:\n    queries: [captions, dense]\n", "", "line 13: arms are compared by what train and eval say, "),
        ("num_pairs: 8", "num_pairs: no", "bad.yaml, line 8: download.num_pairs is False"),
    ],
)  # fmt: skip
def test_mistakes_name_their_line(folder: Path, before: str, after: str, sentence: str) -> None:
    assert before in EXPERIMENT
    assert sentence in refusal(folder, EXPERIMENT.replace(before, after, 1))


def test_keys_of_experiments_need_arms(folder: Path) -> None:
    text = EXPERIMENT.partition("arms:")[0]
    assert refusal(folder, text) == "bad.yaml, line 4: seeds is for manifests that have `arms`."
    assert refusal(folder, text + "arms: {}\n") == "bad.yaml, line 15: `arms` names no arm."


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--arms", "wep"], "the manifest has no arm 'wep'. Did you mean 'web'?"),
        (["--seeds", "7"], "the manifest's seeds are 0, 1."),
    ],
)
def test_arms_and_seeds_that_there_are_not_are_usage_errors(
    folder: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("run", "plan", "status"):
        assert main([command, "trial.yaml", *words]) == 2
        assert sentence in capsys.readouterr().err
    assert not (folder / "here").exists()


def test_only_manifests_with_arms_can_be_asked_for_some(folder: Path) -> None:
    (folder / "plain.yaml").write_text("name: plain\nstages:\n  shard:\n")
    manifest = load_manifest("plain.yaml")
    assert arms.chosen(manifest, arms.runs_of(manifest), None, None) == []
    with pytest.raises(UsageError, match=r"plain\.yaml has no `arms`"):
        arms.chosen(manifest, [], "web", None)
    (folder / "unmarked.yaml").write_text(EXPERIMENT.replace("core: true", "core: false"))
    unmarked = load_manifest("unmarked.yaml")
    with pytest.raises(UsageError, match=r"no arm in unmarked\.yaml is marked"):
        arms.chosen(unmarked, arms.runs_of(unmarked), "core", None)


# --- running ----------------------------------------------------------------------------------------------------------


def test_shared_stages_run_once_and_runs_seed_by_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "trial.yaml"]) == 0
    assert fake_stages.CALLS == ["download", "shard"]
    assert TRAINED == [("trial-web-s0", 0), ("trial-short-s0", 0), ("trial-web-s1", 1), ("trial-short-s1", 1)]
    assert sorted(path.name for path in (folder / "here" / "runs").iterdir()) == sorted(name for name, _ in TRAINED)
    again = load_manifest("here/runs/trial-short-s1/manifest.yaml")
    assert again.stages == load_manifest("trial.yaml").arms[1].runs[1].stages
    out, err = capsys.readouterr()
    assert "arm short, seed 0 (2 of 4)" in err
    heads, chance, web, short = out.splitlines()
    assert heads.split("  ")[0] == "arm" and "short t→i" in heads and "dense t→i" in heads
    assert chance.split() == ["(chance)", "12.5", "25.0"]
    assert web.split(maxsplit=9)[:10] == [
        "web", "12.5", "±", "0.7", "6.2", "±", "0.4", "1.5", "2", "paper: 10 | 20",
    ]  # fmt: skip
    assert short.split()[:4] == ["short", "14.5", "±", "0.7"]


def test_the_table_is_also_a_page_beside_the_results(folder: Path) -> None:
    assert main(["run", "trial.yaml", "--seeds", "0", "--quiet"]) == 0
    page = (folder / "results" / "trial.md").read_text().splitlines()
    assert page[0] == "# trial" and page[2].startswith("2 of 4 runs")
    assert page[4:] == [
        "| arm | short t→i | dense t→i | minutes | seeds | expected |",
        "| --- | --- | --- | --- | --- | --- |",
        "| (chance) | 12.5 | 25.0 |  |  |  |",
        "| web | 12.0 | 6.0 | 1.5 | 1 | paper: 10 \\| 20 |",
        "| short | 14.0 | 7.0 | 1.5 | 1 |  |",
    ]


def test_results_outlive_the_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "trial.yaml"]) == 0
    first = capsys.readouterr().out
    before = (folder / "results" / "trial.json").read_bytes()
    shutil.rmtree(folder / "here")
    fake_stages.CALLS.clear(), TRAINED.clear()
    assert main(["run", "trial.yaml"]) == 0
    assert capsys.readouterr().out == first
    assert not TRAINED and not fake_stages.CALLS and not (folder / "here").exists()
    assert (folder / "results" / "trial.json").read_bytes() == before


def test_a_changed_arm_is_done_anew_and_the_others_are_not(folder: Path) -> None:
    assert main(["run", "trial.yaml"]) == 0
    TRAINED.clear()
    (folder / "trial.yaml").write_text(EXPERIMENT.replace("tokens: 16", "tokens: 32"))
    assert main(["run", "trial.yaml"]) == 4, "the old run is in the way, and is the user's to overwrite"
    assert main(["run", "trial.yaml", "--overwrite"]) == 0
    assert TRAINED == [("trial-short-s0", 0), ("trial-short-s1", 1)]
    assert len(rows(folder)) == 6, "rows of other settings stay, and count again when the settings do"
    TRAINED.clear()
    (folder / "trial.yaml").write_text(EXPERIMENT)
    assert main(["run", "trial.yaml"]) == 0
    assert TRAINED == []


def test_a_change_of_the_data_does_every_arm_anew(folder: Path) -> None:
    settings = ["--set", "download.num_pairs=12"]
    digests = [{run.digest for run in arms.runs_of(load_manifest("trial.yaml", given))} for given in ((), settings[1:])]
    assert len(digests[0]) == len(digests[1]) == 4 and not digests[0] & digests[1]


def test_files_that_the_stages_read_are_part_of_the_settings(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = folder / "prompt.yaml"
    watched = dataclasses.replace(STAGES["shard"], watches=lambda config: {"prompt": prompt})
    monkeypatch.setitem(STAGES, "shard", watched)
    digests = []
    for text in ("describe", "describe it", "describe"):
        prompt.write_text(text)
        digests.append(arms.runs_of(load_manifest("trial.yaml"))[0].digest)
    assert digests[0] == digests[2] != digests[1]


def test_what_only_reads_a_run_changes_no_result(folder: Path) -> None:
    more = EXPERIMENT.replace("arms:\n", "  export:\n    tolerance: 0.1\narms:\n")
    (folder / "more.yaml").write_text(more)
    assert [run.digest for run in arms.runs_of(load_manifest("more.yaml"))] == [
        run.digest for run in arms.runs_of(load_manifest("trial.yaml"))
    ]


def test_arms_of_equal_settings_are_trained_once_and_both_shown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "twins.yaml").write_text(EXPERIMENT + "  twin:\n    train: {views: [web]}\n")
    assert main(["run", "twins.yaml", "--seeds", "1"]) == 0
    assert TRAINED == [("trial-web-s1", 1), ("trial-short-s1", 1)]
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["arm", "(chance)", "web", "short", "twin"]
    assert "arm twin, seed 1 (3 of 3): another run of the same settings is finished, skipped" in err


@pytest.mark.parametrize(("words", "trained"), [
    (["--arms", "short"], ["trial-short-s0", "trial-short-s1"]),
    (["--arms", "core", "--seeds", "1"], ["trial-web-s1"]),
    (["--arms", "core,short", "--seeds", "0"], ["trial-web-s0", "trial-short-s0"]),
])  # fmt: skip
def test_some_arms_and_seeds_can_be_asked_for(folder: Path, words: list[str], trained: list[str]) -> None:
    assert main(["run", "trial.yaml", *words]) == 0
    assert [name for name, _ in TRAINED] == trained


def test_an_interrupted_experiment_keeps_the_finished_arms_and_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = EXPERIMENT.replace("    train:\n      views:\n", "    train:\n      grad_clip: 13\n      views:\n")
    (folder / "stopped.yaml").write_text(stopped)
    assert main(["run", "stopped.yaml"]) == 130
    assert [(row["arm"], row["seed"]) for row in rows(folder)] == [("web", 0)]
    assert "1 of 4 runs" in (folder / "results" / "trial.md").read_text()
    fake_stages.CALLS.clear()
    assert main(["run", "trial.yaml"]) == 0
    assert len(rows(folder)) == 4 and [name for name, _ in TRAINED].count("trial-web-s0") == 1
    assert fake_stages.CALLS == [], "the shared stages' stamps hold"


def test_a_run_whose_row_was_not_written_is_not_trained_again(folder: Path) -> None:
    assert main(["run", "trial.yaml"]) == 0
    before = rows(folder)
    (folder / "results" / "trial.json").unlink()
    TRAINED.clear()
    assert main(["run", "trial.yaml"]) == 0
    assert TRAINED == [] and rows(folder) == before


def test_rows_of_other_processes_stay(folder: Path) -> None:
    here = results.Results(folder / "results" / "trial.json")
    here.check_writable()
    row = {"arm": "web", "seed": 0, "train_s": None, "figures": {}}
    here.add("a", row)
    results.Results(here.path).add("b", row | {"seed": 1})
    here.add("c", row)
    assert sorted(here.rows()) == ["a", "b", "c"]
    assert sorted(path.name for path in here.path.parent.iterdir()) == ["trial.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": {}}', '{"schema_version": 1, "rows": {"a": {"arm": "web"}}}'])
def test_a_file_that_holds_no_results_is_refused_before_anything_runs(
    folder: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "results").mkdir()
    (folder / "results" / "trial.json").write_text(text)
    assert main(["run", "trial.yaml"]) == 1
    assert "results/trial.json holds no results that clips wrote" in capsys.readouterr().err
    assert fake_stages.CALLS == []


def test_results_that_cannot_be_written_are_refused_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").write_text("")
    assert main(["run", "trial.yaml", "--set", "results=file/trial.json"]) == 1
    assert "Name another file with --set results=FILE.json" in capsys.readouterr().err
    assert fake_stages.CALLS == []


def test_run_answers_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "trial.yaml", "--json", "--quiet", "--seeds", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"] == "results/trial.json"
    assert [line["arm"] for line in found["arms"]] == ["(chance)", "web", "short"]
    assert [stage["what"] for stage in found["stages"]] == ["made", "made"]


# --- plan and status --------------------------------------------------------------------------------------------------


def test_plan_and_status_show_arms_and_do_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["plan", "trial.yaml", "--sample", "0"],
        ["run", "trial.yaml", "--dry-run"],
        ["status", "trial.yaml"],
    ):
        assert main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:3] for line in lines[-4:]] == [
            ["web", "0", "missing"], ["short", "0", "missing"], ["web", "1", "missing"], ["short", "1", "missing"],
        ]  # fmt: skip
    assert [path.name for path in folder.iterdir()] == ["trial.yaml"]


def test_plan_says_which_arms_are_finished_and_why_others_are_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", "trial.yaml", "--arms", "web"])
    capsys.readouterr()
    main(["plan", "trial.yaml", "--sample", "0", "--json", "--seeds", "0"])
    plan = json.loads(capsys.readouterr().out)
    assert [stage["what"] for stage in plan["stages"]] == ["skip", "skip"]
    assert [(row["arm"], row["what"], row["why"]) for row in plan["arms"]] == [
        ("web", "finished", "its figures are in results/trial.json"),
        ("short", "missing", "train: not begun"),
    ]
    shutil.rmtree(folder / "here")
    main(["plan", "trial.yaml", "--sample", "0", "--json", "--arms", "web"])
    assert json.loads(capsys.readouterr().out)["stages"] == [], "nothing is needed for results that are there"


# --- figures ----------------------------------------------------------------------------------------------------------


def test_spread_is_the_deviation_over_seeds() -> None:
    assert results.spread([]) == ""
    assert results.spread([1.25]) == "1.2"
    assert results.spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert results.spread([0.0, 0.0]) == "0.0"


def test_training_time_counts_every_stage_and_is_unknown_without_metrics(tmp_path: Path) -> None:
    assert results.train_seconds(tmp_path) is None
    for path, rate in ((tmp_path, 10), (tmp_path / "stages" / "0", 20)):
        path.mkdir(parents=True, exist_ok=True)
        (path / "metrics.jsonl").write_text(json.dumps({"samples": 100, "samples_per_s": rate}) + "\n")
    assert results.train_seconds(tmp_path) == 15.0


def test_the_packaged_ablation_has_its_arms_and_trains_equal_ones_once() -> None:
    manifest: Any = load_manifest("recipes/ablation")
    runs = arms.runs_of(manifest)
    assert len(arms.chosen(manifest, runs, "core", "0")) == 8
    assert len({run.digest for run in runs}) == len(runs) - 3, "sub_caption_32 is clips_no_captioner"
    trains = [run.manifest.stages["train"] for run in runs]
    for key in ("samples", "batch", "size", "lr", "augment", "caption_every", "caption_negatives"):
        assert len({getattr(train, key) for train in trains}) == 1, key
