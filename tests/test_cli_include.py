"""Manifests that include others, stages that are done several times, and scales."""

from __future__ import annotations

from pathlib import Path

import fake_stages
import pytest

from cli.main import main
from cli.manifest import load_manifest
from cli.stages import STAGES
from clips_data.errors import UsageError, UserError

BASE = """\
name: base
stages:
  download: {source: demo, num_pairs: 8}
  recaption: {column: synthetic}
  score:
  shard: {web_ratio: 0.8}
  train: {samples: 64, batch: 8}
"""
VARIANT = """\
name: variant
include: base
stages:
  score:
  recaption fused: {column: fused, prompt: veclip}
  score fused: {name: fused, columns: [fused]}
  train: {batch: 16}
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "variant.yaml").write_text(VARIANT)
    return tmp_path


def test_an_including_manifest_changes_keys_and_puts_stages_where_it_names_them(folder: Path) -> None:
    base, variant = load_manifest("base.yaml"), load_manifest("variant.yaml")
    order = ["download", "recaption", "score", "recaption fused", "score fused", "shard", "train"]
    assert list(variant.stages) == order
    assert variant.name == "variant"
    for stage in ("download", "recaption", "score", "shard"):
        assert variant.stages[stage] == base.stages[stage]
    assert variant.saved("train", defaults=False) == {"name": "variant", "samples": 64, "batch": 16}
    assert variant.saved("recaption fused", defaults=False) == {"column": "fused", "prompt": "veclip"}


def test_an_included_stage_can_be_left_out(folder: Path) -> None:
    (folder / "plain.yaml").write_text("name: plain\ninclude: base\nwithout: [recaption, score]\n")
    assert list(load_manifest("plain.yaml").stages) == ["download", "shard", "train"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ninclude: bse\n", r"a.yaml, line 2: include: There is no manifest 'bse'.*"),
        ("name: a\ninclude: a\n", r"a.yaml, line 2: include goes round in a circle: a.yaml → .*a.yaml"),
        ("name: a\ninclude: base\nwithout: [scor]\n", r"line 3: without: .*base.yaml has no stage 'scor'. .*score'.$"),
        ("name: a\ninclude: base\ntrain: {}\n", r"line 3: .* no key 'train'. It is a stage; write it under `stages`"),
        ("name: a\ninclude: recipes/clisp\n", r"There is no manifest 'recipes/clisp': no such file. Did you mean 'rec"),
        ("name: a\nwithout: [score]\nstages: {shard: }\n", "line 2: without names stages of an included manifest"),
        ("name: a\nstages: {train long: }\n", "'train long' has a label, which only recaption, score, embed may have"),
        ("name: a\nstages: {score of two: }\n", "'score of two' has a label.* of one word"),
        ("name: a\nrecipe: VeCLIP\nstages: {shard: }\n", "recipe should be a mapping"),
    ],
)
def test_mistakes_are_told_with_file_and_line(folder: Path, text: str, message: str) -> None:
    (folder / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_manifest("a.yaml")


def test_a_mistake_in_the_included_manifest_is_told_with_its_own_line(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.replace("web_ratio: 0.8", "web_ratio: 8"))
    with pytest.raises(UserError, match=r"base.yaml, line 6: shard.web_ratio is 8"):
        load_manifest("variant.yaml")


def test_set_reaches_all_stages_of_a_name_or_the_one_with_a_label(folder: Path) -> None:
    found = load_manifest("variant.yaml", ["recaption.model=other", "recaption fused.seed=3"])
    models = {stage: found.saved(stage)["model"] for stage in found.stages if stage.startswith("recaption")}
    assert models == {"recaption": "other", "recaption fused": "other"}
    assert (found.saved("recaption")["seed"], found.saved("recaption fused")["seed"]) == (0, 3)
    with pytest.raises(UsageError, match=r"no stage .recaption fusd.\. Did you mean .recaption fused."):
        load_manifest("variant.yaml", ["recaption fusd.seed=3"])


def test_a_scale_goes_over_the_manifest_and_below_what_was_set(folder: Path) -> None:
    found = load_manifest("variant.yaml", ["train.samples=640"], scale="demo")
    assert found.saved("download")["num_pairs"] == 3500
    assert {found.saved(stage)["model"] for stage in ("recaption", "recaption fused", "score fused")} == {"demo"}
    assert (found.saved("train")["samples"], found.saved("train")["size"]) == (640, "tiny")
    assert found.saved("recaption fused")["prompt"] == "veclip"
    with pytest.raises(UserError, match=r"no scale .demi.\. Did you mean .demo."):
        load_manifest("variant.yaml", scale="demi")


def test_stages_with_labels_are_done_in_order_and_skipped_one_by_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_stages.install(monkeypatch, STAGES)
    text = "name: two\nstages:\n  download: {source: demo, num_pairs: 8}\n  recaption short: {column: short}\n"

    def done(written: str) -> list[str]:
        (folder / "two.yaml").write_text(written)
        before = len(fake_stages.CONFIGS)
        assert main(["run", "two.yaml", "--quiet"]) == 0
        return [getattr(config, "column", "none") for config in fake_stages.CONFIGS[before:]]

    assert done(text) == ["none", "short"]
    assert done(text + "  recaption long: {column: long}\n") == ["long"]
    assert done(text) == []


def test_data_is_the_users_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_stages.install(monkeypatch, STAGES)
    (folder / "urls.txt").write_text("https://example.org/a.jpg\n")
    (folder / "base.yaml").write_text("name: base\nstages: {download: {source: demo, num_pairs: 8}}\n")
    assert main(["run", "base.yaml", "--data", "urls.txt", "--quiet"]) == 0
    assert "source: urls.txt" in (folder / "runs" / "base" / "manifest.yaml").read_text()
