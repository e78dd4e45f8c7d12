"""What the command line adds to the probe: facts against the truth of the demo world, and their places in a table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import fake_stages
import pytest
from click.testing import CliRunner

from cli import probed
from cli.main import cli, main
from cli.stages import STAGES
from clips_data.demo import scenes

WORLD = 5
EXPERIMENT = """\
name: eyes
work: here
results: results/eyes.json
seeds: [0, 1]
stages:
  download:
    source: demo
    num_pairs: 8
  shard:
  train:
    size: tiny
  eval:
  probe:
    layer: -1
arms:
  clips:
    expected: "paper: POPE 86.7"
  clip:
    train: {views: [web]}
    probe: {samples: 64}
"""


def write_captions(folder: Path, captions: list[str], *, start: int = 0) -> Path:
    rows = [
        {"caption": caption, "reference": scenes.describe(scenes.make_scene(WORLD, number)),
         "extra": {"scene": f"{WORLD}/{number}"}, "key": str(number)}
        for number, caption in enumerate(captions, start)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def true_caption(number: int) -> str:
    return scenes.describe(scenes.make_scene(WORLD, number))


def test_true_captions_have_all_facts_and_those_of_other_images_show_chance(tmp_path: Path) -> None:
    found = probed.score_captions(write_captions(tmp_path / "probe", [*map(true_caption, range(30))]), quiet=True)
    for kind in ("fact", "shape", "colour", "size", "texture", "place", "relation"):
        assert found[f"{kind}_precision"] == found[f"{kind}_recall"] == 1
    assert 0.2 < found["chance_fact_precision"] < 0.5 and 0.2 < found["chance_fact_recall"] < 0.5
    saved = json.loads((tmp_path / "probe" / "facts.json").read_text())
    assert saved["exact_captions"] == 30 and saved["chance"]["precision"] == found["chance_fact_precision"]


def test_an_empty_caption_finds_nothing_and_claims_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = probed.score_captions(write_captions(tmp_path / "probe", [true_caption(0), ""]), quiet=False)
    assert found["fact_precision"] == 1 and 0 < found["fact_recall"] < 1
    err = capsys.readouterr().err
    assert "facts in 2 of 2 captions, 1 of them exactly the text" in err
    assert "recall by chance" in err and "background" in err
    nothing = probed.score_captions(write_captions(tmp_path / "none", ["", ""]), quiet=True)
    assert "fact_precision" not in nothing and nothing["fact_recall"] == 0


def test_other_worlds_have_no_facts(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(json.dumps({"caption": "a dog", "reference": "a cat", "extra": {}}) + "\n")
    assert probed.score_captions(tmp_path, quiet=True) == {}
    assert not (tmp_path / "facts.json").exists()


# --- in an experiment -------------------------------------------------------------------------------------------------


def probe(config: Any, *, run: Path, shards: Path, overwrite: bool, quiet: bool, derived: Any) -> dict[str, Any]:
    """Captions of which those of more seeds are true; ``clips`` has one more than ``clip``."""
    good = int(run.name[-1]) + ("clips" in run.name)
    if not (run / "probe").exists():
        captions = [true_caption(number if number < good else number + 100) for number in range(4)]
        write_captions(run / "probe", captions)
    (about,) = derived["dense"]({"extra": {"scene": f"{WORLD}/0"}})
    assert about == true_caption(0)
    return {"num_images": 4, "token_loss": 1.5 - good / 10, "train_s": 60.0, "skipped": False}


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    fake_stages.install(monkeypatch, STAGES)
    entries = {"train": "test_cli_arms:train", "eval": "test_cli_arms:evaluate", "probe": f"{__name__}:probe"}
    for name, entry in entries.items():
        monkeypatch.setitem(STAGES, name, dataclasses.replace(STAGES[name], entry=entry))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eyes.yaml").write_text(EXPERIMENT)
    return tmp_path


def test_figures_of_the_probe_stand_beside_those_of_eval(folder: Path) -> None:
    assert main(["run", "eyes.yaml", "--quiet"]) == 0
    rows = json.loads((folder / "results" / "eyes.json").read_text())["rows"].values()
    figures = {(row["arm"], row["seed"]): row["figures"] for row in rows}
    assert figures["clips", 1]["probe_token_loss"] == 1.3 and figures["clip", 0]["probe_num_images"] == 4
    assert figures["clips", 1]["text_to_image_r1"] == pytest.approx(len("eyes-clips-s1") / 100 + 0.01)
    assert figures["clips", 1]["probe_shape_recall"] > figures["clip", 0]["probe_shape_recall"]
    assert {row["settings"]["probe"].get("samples") for row in rows} == {None, 64}


def test_the_table_shows_facts_chance_loss_and_kinds_and_what_a_difference_means(folder: Path) -> None:
    assert main(["run", "eyes.yaml", "--quiet"]) == 0
    page = (folder / "results" / "eyes.md").read_text()
    assert "Arms whose difference is smaller than the spreads beside it have not been told apart." in page
    tables = [part.splitlines() for part in page.split("\n\n") if part.startswith("|")]
    cells = [[[cell.strip() for cell in line.strip("|").split("|")] for line in table] for table in tables]
    heads, _, chance, clips, clip = cells[0]
    assert heads[2:] == [
        "probe precision", "probe recall", "probe loss", "probe minutes", "minutes", "seeds", "expected",
    ]  # fmt: skip
    assert 0 < float(chance[2].split()[0]) < 60 and chance[4] == ""
    assert float(clips[2].split()[0]) > float(clip[2].split()[0])
    assert (clips[4], clip[4], clips[5]) == ("1.350 ± 0.071", "1.450 ± 0.071", "1.0")
    assert clips[8] == "paper: POPE 86.7"
    assert cells[1][0] == ["arm", "shape", "colour", "size", "texture", "place", "relation"]
    assert [line[0] for line in cells[1][2:]] == ["clips", "clip"] and cells[1][2][1].count("±") == 2


def test_a_probe_changes_nothing_that_eval_and_train_have_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "eyes.yaml", "--seeds", "0"]) == 0
    (folder / "results" / "eyes.json").unlink()
    capsys.readouterr()
    assert main(["run", "eyes.yaml", "--seeds", "0"]) == 0
    err = capsys.readouterr().err
    assert err.count("train: finished before") == err.count("eval: finished before") == 2
    assert err.count("probe: finished before") == 2


def test_experiments_without_a_probe_have_a_table_without_it(folder: Path) -> None:
    text = EXPERIMENT.replace("  probe:\n    layer: -1\n", "").replace("    probe: {samples: 64}\n", "")
    (folder / "eyes.yaml").write_text(text)
    assert main(["run", "eyes.yaml", "--quiet"]) == 0
    assert "probe" not in (folder / "results" / "eyes.md").read_text().lower()


def test_the_command_shows_its_options_with_their_defaults() -> None:
    shown = " ".join(CliRunner().invoke(cli, ["probe", "--help"]).output.split())
    for part in ("--layer", "[default: -2]", "--column", "[default: synthetic]", "--name", "clips probe --name first"):
        assert part in shown
