"""``clips run | plan | status``: what a manifest says, what is skipped, what is done again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import fake_stages
import pytest
import yaml

from cli.main import main
from cli.manifest import Manifest, load_manifest, packaged_manifests
from cli.stages import STAGES
from clips_data.config import DownloadConfig
from clips_data.errors import TooFewSucceeded, UsageError, UserError

THREE_STAGES = """\
name: trial
work: here
stages:
  download:
    source: demo
    num_pairs: 8
  recaption:
    column: synthetic
  shard:
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    fake_stages.install(monkeypatch, STAGES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trial.yaml").write_text(THREE_STAGES)
    return tmp_path


def refusal(folder: Path, text: str) -> str:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        load_manifest("bad.yaml")
    return str(refused.value)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_stages_keep_their_order_and_become_configs(folder: Path) -> None:
    manifest = load_manifest("trial.yaml")
    assert (manifest.name, manifest.work) == ("trial", Path("here"))
    assert list(manifest.stages) == ["download", "recaption", "shard"]
    assert manifest.stages["download"] == DownloadConfig(source="demo", num_pairs=8)


def test_set_overrides_and_adds_values(folder: Path) -> None:
    manifest = load_manifest("trial.yaml", ["download.num_pairs=12", "shard.columns=[web]", "name=other", "work=w"])
    assert manifest.stages["download"].num_pairs == 12  # type: ignore[attr-defined]
    assert manifest.stages["shard"].columns == ("web",)  # type: ignore[attr-defined]
    assert (manifest.name, manifest.work) == ("other", Path("w"))


def test_environment_is_read_and_typed_like_yaml(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUM", "24")
    monkeypatch.setenv("WHERE", "scratch")
    text = THREE_STAGES.replace("num_pairs: 8", "num_pairs: ${NUM}").replace("here", "${WHERE}/clips")
    (folder / "env.yaml").write_text(text)
    manifest = load_manifest("env.yaml")
    assert manifest.stages["download"].num_pairs == 24  # type: ignore[attr-defined]
    assert manifest.work == Path("scratch/clips")


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("num_pairs: 8", "num_pair: 8", "bad.yaml, line 6: download has no key 'num_pair'. Did you mean 'num_pairs'?"),
        ("num_pairs: 8", "num_pairs: many", "line 6: download.num_pairs is 'many'; it should be a valid integer."),
        ("num_pairs: 8", "num_pairs: 0", "bad.yaml, line 6: download.num_pairs is 0; it should be greater than 0."),
        ("num_pairs: 8", "source: other", "'source' is given a second time; it was first at bad.yaml, line 5."),
        ("num_pairs: 8", "num_pairs: ${UNSET_NUMBER}", "line 6: the environment has no variable UNSET_NUMBER."),
        ("    source: demo\n", "", "bad.yaml: download.source is missing."),
        ("recaption:", "recaptoin:", "bad.yaml, line 7: there is no stage 'recaptoin'. Did you mean 'recaption'?"),
        ("work:", "wrk:", "bad.yaml, line 2: the manifest has no key 'wrk'. Did you mean 'work'?"),
        ("name: trial", "name: a b", "bad.yaml, line 1: name is 'a b'; a manifest needs a name of letters"),
        ("    column: synthetic", "    - synthetic", "line 8: recaption should be a mapping of keys to values."),
        ("work: here", "work: [", "this is not YAML"),
    ],
)  # fmt: skip
def test_mistakes_name_file_line_key_and_what_is_right(folder: Path, before: str, after: str, sentence: str) -> None:
    assert before in THREE_STAGES
    assert sentence in refusal(folder, THREE_STAGES.replace(before, after))


@pytest.mark.parametrize("text", ["", "name: x\n", "name: x\nstages:\n", "name: x\nstages: {}\n", "- a\n", "just text"])
def test_files_that_are_no_manifest_are_refused(folder: Path, text: str) -> None:
    assert refusal(folder, text).startswith("bad.yaml")


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("shard", "is not of the form stage.key=value"),
        ("shrd.seed=1", "the manifest has no stage 'shrd'. Did you mean 'shard'?"),
        ("shard.columns=[web", "is not a YAML value"),
    ],
)
def test_bad_settings_are_usage_errors(folder: Path, setting: str, sentence: str) -> None:
    with pytest.raises(UsageError, match="--set") as refused:
        load_manifest("trial.yaml", [setting])
    assert sentence in str(refused.value)


def test_settings_are_checked_like_the_manifest(folder: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_manifest("trial.yaml", ["shard.sed=1"])
    assert str(refused.value) == "--set shard.sed=1: shard has no key 'sed'. Did you mean 'seed'?"


def test_unknown_manifest_names_the_nearest_packaged_one_and_exits_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "quikstart"]) == 1
    err = capsys.readouterr().err
    assert err == (
        "clips: There is no manifest 'quikstart': no such file or packaged manifest. Did you mean 'quickstart'?\n"
    )
    assert main(["run", "nosuch"]) == 1
    assert "quickstart" in capsys.readouterr().err


# --- running ----------------------------------------------------------------------------------------------------------


def test_run_does_the_stages_in_order_and_ends_with_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "trial.yaml"]) == 0
    assert fake_stages.CALLS == ["download", "recaption", "shard"]
    assert all(job.work == Path("here") for job in fake_stages.JOBS)
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["stage", "what", "rows", "seconds", "folder"]
    assert lines[1] == ["download", "made", "6", "of", "8", "ok", "0.5", "here/pairs"]
    assert [line[-1] for line in lines[2:]] == ["here/captions/synthetic", "here/shards"]
    assert "download: missing (not begun)" in err
    assert "6 of 8 succeeded" in err


def test_run_saves_the_resolved_manifest_beside_the_outputs(folder: Path) -> None:
    main(["run", "trial.yaml", "--set", "shard.seed=5"])
    saved = folder / "here" / "runs" / "trial" / "manifest.yaml"
    content = yaml.safe_load(saved.read_text())
    assert content["stages"]["shard"]["seed"] == 5
    assert content["stages"]["download"]["timeout_s"] == DownloadConfig(source="demo").timeout_s
    again = load_manifest(str(saved))
    assert again.stages == load_manifest("trial.yaml", ["shard.seed=5"]).stages


def test_second_run_skips_every_stage_without_importing_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "trial.yaml"]) == 0
    for name in fake_stages.READS:
        monkeypatch.setitem(STAGES, name, dataclasses.replace(STAGES[name], entry="no_such_module:run"))
    capsys.readouterr()
    assert main(["run", "trial.yaml"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["skipped"] * 3
    assert "download: finished before, 6 of 8 ok, skipped" in err


def test_a_log_that_grows_after_its_stage_has_ended_changes_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = folder / "here" / "captions" / "synthetic" / "log" / "engine.log"
    call = STAGES["recaption"].call

    def talks(*given: Any) -> Any:
        report = call(*given)
        log.parent.mkdir()
        log.write_text("the engine is up\n")
        return report

    monkeypatch.setitem(STAGES, "recaption", dataclasses.replace(STAGES["recaption"], call=talks))
    assert main(["run", "trial.yaml"]) == 0
    log.write_text("the engine is up\nwhat it left running ended later\n")
    fake_stages.CALLS.clear()
    assert main(["run", "trial.yaml"]) == 0
    assert fake_stages.CALLS == []


def test_work_option_moves_the_outputs(folder: Path) -> None:
    assert main(["run", "trial.yaml", "--work", "there"]) == 0
    assert (folder / "there" / "pairs" / "00000.done.json").exists()
    assert not (folder / "here").exists()


def test_new_shards_are_missing_work_for_the_stages_to_the_right(folder: Path) -> None:
    main(["run", "trial.yaml"])
    before = (folder / "here" / "captions" / "synthetic" / "00000.tar").stat().st_mtime_ns
    fake_stages.CALLS.clear()
    assert main(["run", "trial.yaml", "--set", "download.num_pairs=12", "--set", "shard.seed=0", "--overwrite"]) == 0
    assert fake_stages.CALLS == ["download", "recaption", "shard"]
    captions = folder / "here" / "captions" / "synthetic"
    assert (captions / "00002.done.json").exists()
    assert (captions / "00000.tar").stat().st_mtime_ns == before


def test_changed_config_is_refused_with_exit_4_unless_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["run", "trial.yaml"])
    fake_stages.CALLS.clear()
    assert main(["run", "trial.yaml", "--set", "recaption.seed=7"]) == 4
    assert "config seed: 0 before, 7 now" in capsys.readouterr().err
    assert fake_stages.CALLS == ["recaption"]
    fake_stages.CALLS.clear()
    assert main(["run", "trial.yaml", "--set", "recaption.seed=7", "--overwrite"]) == 0
    assert fake_stages.CALLS == ["recaption", "shard"]


def test_removed_output_is_made_again(folder: Path) -> None:
    main(["run", "trial.yaml"])
    for file in (folder / "here" / "captions" / "synthetic").glob("00001*"):
        file.unlink()
    fake_stages.CALLS.clear()
    assert main(["run", "trial.yaml"]) == 0
    assert fake_stages.CALLS[0] == "recaption"
    assert (folder / "here" / "captions" / "synthetic" / "00001.done.json").exists()


def test_cut_output_is_named_and_nothing_is_lost(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "trial.yaml"])
    (folder / "here" / "pairs" / "00001.tar").write_text("cut")
    assert main(["run", "trial.yaml"]) == 1
    err = capsys.readouterr().err
    assert "00001.done.json promises 00001.tar" in err
    assert (folder / "here" / "pairs" / "00000.tar").exists()


def test_changed_file_named_by_a_config_calls_the_stage_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    urls = folder / "urls.csv"
    urls.write_text("url\nhttp://a.example/1.jpg\n")
    watched = dataclasses.replace(STAGES["download"], watches=lambda config: {"source": Path(config.source)})
    monkeypatch.setitem(STAGES, "download", watched)
    words = ["run", "trial.yaml", "--set", "download.source=urls.csv"]
    assert main(words) == 0 and main(words) == 0
    assert fake_stages.CALLS.count("download") == 1
    urls.write_text("url\nhttp://a.example/2.jpg\n")
    main(words)
    assert fake_stages.CALLS.count("download") == 2


def test_stage_that_fails_leaves_the_earlier_ones_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_few(config: object, job: object) -> None:
        raise TooFewSucceeded("3 of 8 rows got a caption, less than --min-success 0.95.")

    monkeypatch.setattr(fake_stages, "recaption", too_few)
    assert main(["run", "trial.yaml"]) == 3
    assert capsys.readouterr().err.endswith("clips: 3 of 8 rows got a caption, less than --min-success 0.95.\n")
    assert fake_stages.CALLS == ["download"]
    main(["status", "trial.yaml", "--json"])
    states = [stage["what"] for stage in json.loads(capsys.readouterr().out)["stages"]]
    assert states == ["finished", "missing", "missing"]


def test_mistake_in_a_late_stage_is_found_before_the_first_one_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "trial.yaml", "--set", "shard.web_ratio=2"]) == 1
    assert "--set shard.web_ratio=2: shard.web_ratio is 2; it should be" in capsys.readouterr().err
    assert fake_stages.CALLS == []


def test_run_answers_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "trial.yaml", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [stage["what"] for stage in json.loads(out)["stages"]] == ["made"] * 3


# --- plan and status --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["plan", "trial.yaml", "--sample", "0"], ["status", "trial.yaml"], ["run", "trial.yaml", "--dry-run"]]
)
def test_plan_and_status_do_nothing(folder: Path, words: list[str]) -> None:
    assert main(words) == 0
    assert fake_stages.CALLS == []
    assert [path.name for path in folder.iterdir()] == ["trial.yaml"]


def test_plan_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "trial.yaml", "--sample", "0"])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["run"] * 3
    main(["run", "trial.yaml"])
    capsys.readouterr()
    main(["plan", "trial.yaml", "--set", "recaption.seed=3", "--json", "--sample", "0"])
    download, recaption, shard = json.loads(capsys.readouterr().out)["stages"]
    assert (download["what"], download["why"]) == ("skip", "nothing has changed")
    assert (recaption["what"], recaption["why"]) == ("run", "changed: seed was 0, is 3")
    assert recaption["rows in"] == 8
    assert (shard["what"], shard["why"]) == ("skip", "finished, as long as recaption leaves its inputs as they are")


def test_status_counts_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "trial.yaml"])
    (folder / "here" / "shards" / "train-00000.done.json").unlink()
    capsys.readouterr()
    assert main(["status", "trial.yaml", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["what"] for stage in stages] == ["finished", "finished", "missing"]
    assert stages[0]["units"] == 2 and stages[0]["rows"] == "6 of 8 ok"


# --- what comes with clips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(packaged_manifests()))
def test_packaged_manifests_are_valid_and_open_with_their_command(name: str) -> None:
    manifest = load_manifest(name)
    assert isinstance(manifest, Manifest)
    text = packaged_manifests()[name]
    command = f"clips run {name.replace('recipes/', 'recipe/')}" if manifest.recipe else f"clips run {name}"
    assert text.startswith("# ") and command in text.split("name:")[0]


def test_quickstart_walks_every_stage_from_urls_to_report_on_the_demo_world() -> None:
    """Without the two that are not on the way: teachers' features, and the probe of a finished tower."""
    manifest = load_manifest("quickstart")
    assert list(manifest.stages) == [stage for stage in STAGES if stage not in ("embed", "probe")]
    assert manifest.stages["download"].source == "demo"  # type: ignore[attr-defined]
    assert {manifest.run_of(stage) for stage in manifest.stages} == {"quickstart"}


def test_schema_files_are_current() -> None:
    from cli.manifest import packaged_file
    from cli.schema import EVAL_FILE, FILE, eval_schema, manifest_schema, schema_text

    for file, schema in ((FILE, manifest_schema()), (EVAL_FILE, eval_schema())):
        assert packaged_file(file).read_text() == schema_text(schema), "write it anew: python -m cli.schema"


def test_schema_knows_every_key_and_no_other() -> None:
    from cli.schema import manifest_schema

    definitions = manifest_schema()["$defs"]
    for name, stage in STAGES.items():
        keys = {field.alias or key for key, field in stage.config_class.model_fields.items()}
        assert keys == set(definitions[name]["properties"])
        assert definitions[name]["additionalProperties"] is False


@pytest.mark.parametrize("name", list(packaged_manifests()))
def test_schema_accepts_what_is_packaged_and_sees_typos_in_it(name: str) -> None:
    import jsonschema

    from cli.schema import manifest_schema

    check = jsonschema.Draft202012Validator(manifest_schema())
    content = yaml.safe_load(packaged_manifests()[name])
    check.validate(content)
    content.setdefault("stages", {}).setdefault("train", {})
    stages = [content["stages"], *(arm for arm in content.get("arms", {}).values() if "train" in arm)]
    for holder in stages:
        holder["train"]["smaples"] = 3
        assert not check.is_valid(content)
        del holder["train"]["smaples"]


def test_a_signed_address_of_a_list_is_written_down_without_its_signature(folder: Path) -> None:
    signed = "https://bucket.test/list.parquet?X-Amz-Signature=s3cr3t0123456789&versionId=7"
    assert main(["run", "trial.yaml", "--set", f"download.source={signed}"]) == 0
    ours = [*(folder / "here" / ".stages").rglob("*"), *(folder / "here" / "runs").rglob("*")]
    written = [path.read_text() for path in ours if path.is_file()]
    assert any("versionId=7" in text for text in written)
    assert not any("s3cr3t" in text for text in written)


def test_a_comment_in_a_prompt_file_makes_nothing_out_of_date(tmp_path: Path) -> None:
    from cli.stamps import digest_watched

    path = tmp_path / "prompt.yaml"
    digests = []
    for text in (
        "user: Say what.\n",
        "# Why.\nuser: Say what. # so\n",
        "user: Say it.\n",
        "user: 2026-01-01\n",
        "a: [\n",
    ):
        path.write_text(text)
        digests.append(digest_watched(path))
    assert digests[0] == digests[1] and len(set(digests)) == 4
