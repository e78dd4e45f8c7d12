"""The recipes: that each changes what it says and nothing else, and how they are listed and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli import recipes
from cli.main import main
from cli.manifest import Manifest, load_manifest
from cli.recipes import FIRST, names
from cli.results import Results

SYSTEMS = (
    "clips", "clips-paper", "clips-openvision", "clip", "clipa-80-20", "coca-80-20", "recap-v1", "recap-v2",
    "veclip", "laclip", "capsfusion", "kale", "altogether", "dreamlip", "alip", "nguyen", "text-shearing",
    "sharegpt4v", "pixelprose", "hq-clip", "mobileclip-dr", "metaclip", "long-clip", "quality-captions",
    "openvision2", "synthclip",
)  # fmt: skip


def differences(manifest: Manifest, base: Manifest) -> list[str]:
    """``stage.key`` where both have it, ``-stage`` and ``+stage`` else; the names of runs are left out."""
    found = [f"-{stage}" for stage in base.stages if stage not in manifest.stages]
    for stage in manifest.stages:
        if stage not in base.stages:
            found.append(f"+{stage}")
            continue
        ours, theirs = manifest.saved(stage), base.saved(stage)
        found += [f"{stage}.{key}" for key in ours if ours[key] != theirs[key] and key != "name"]
    return sorted(found)


def test_there_is_a_recipe_for_every_system() -> None:
    assert set(names()) == set(SYSTEMS) and names()[0] == FIRST


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_changes_exactly_what_it_says(name: str) -> None:
    manifest = load_manifest(f"recipe/{name}")
    assert manifest.recipe.keys() == {"system", "source", "inputs", "decoding", "mixing", "unknown", "changes"}
    assert differences(manifest, load_manifest(f"recipe/{FIRST}")) == sorted(manifest.recipe["changes"])


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_recipe_has_a_form_for_the_demo_world_with_equal_samples(name: str) -> None:
    from clips_data.recaption import prompts

    manifest = load_manifest(f"recipe/{name}", scale="demo")
    train = manifest.saved("train")
    assert (train["size"], train["samples"], train["stages"], train["init"]) == ("tiny", 25600, [], None)
    assert manifest.saved("download")["source"] == "demo"
    made = {"web"}
    for stage in manifest.stages:
        config: Any = manifest.stages[stage]
        if stage.startswith("recaption"):
            prompt = prompts.load(config.prompt)
            assert config.model == "demo" and set(prompt.columns) <= made, stage
            made |= set(prompt.column_names(config.column))
        elif stage.startswith("score"):
            assert set(config.columns) <= made, stage
    assert set(manifest.saved("shard")["columns"]) <= made


def test_recipes_are_listed_with_what_they_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--json"]) == 0
    lines = {line["recipe"]: line for line in json.loads(capsys.readouterr().out)}
    assert list(lines) == names()
    assert lines["clips-paper"]["changes"] == "train.views" and lines["veclip"]["system"] == "VeCLIP / VeCap"
    assert main(["recipes", "veclip"]) == 0
    shown = capsys.readouterr().out
    assert "unknown:" in shown and "recaption fused:" in shown


def test_a_recipe_that_is_not_there_is_named_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "vecilp"]) == 1
    assert "There is no recipe 'vecilp'. Did you mean 'veclip'?" in capsys.readouterr().err
    assert main(["recipes", "--measure", "--only", "clip,laclpi"]) == 1
    assert "Did you mean 'laclip'?" in capsys.readouterr().err
    assert main(["recipes", "--measure", "--seeds", "a"]) == 2
    assert main(["recipes", "--only", "clip"]) == 2


def test_measuring_does_what_is_missing_and_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[tuple[str, int]] = []

    def row(name: str, seed: int, manifest: Manifest, job: Any) -> dict[str, Any]:
        assert manifest.work == tmp_path / "work" / name and manifest.saved("train")["seed"] == seed
        done.append((name, seed))
        figures = {"text_to_image_r1": 0.05 + seed / 100, "caption_tokens": 1000}
        made = {"commit": "abc", "machine": "x, 2 cores", "python": "3.11"}
        return {"arm": name, "seed": seed, "train_s": 60.0, "figures": figures, "settings": {}, "made_on": made}

    monkeypatch.setattr(recipes, "_row", row)
    kept = tmp_path / "kept.json"
    words = ["recipes", "--measure", "--work", str(tmp_path / "work"), "--results", str(kept), "--quiet"]
    assert main([*words, "--only", "clip,clips"]) == 0
    assert main([*words, "--only", "clips,clip", "--seeds", "0,1"]) == 0
    assert done == [("clip", 0), ("clips", 0), ("clips", 1), ("clip", 1)]
    assert len(Results(kept).rows()) == 4
    table = kept.with_suffix(".md").read_text()
    assert "| clips | CLIPS | 5.5 ± 0.7 |" in table and "| veclip | VeCLIP / VeCap |" in table
    assert "commit abc on x, 2 cores, Python 3.11." in table
    assert "measured, 2 seeds" in capsys.readouterr().out
