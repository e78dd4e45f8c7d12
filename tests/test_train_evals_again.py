"""A second ``clips eval`` reads back what nothing has changed for, and refuses to pass the old off as the new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peermaker
import pytest
import runmaker
import shardmaker
from pydantic import ValidationError

from clips_data.errors import ResumeRefused, UserError
from clips_train.evals.formats import open_data
from clips_train.evals.run import evaluate_models
from clips_train.use_config import Benchmark, EvalConfig


@pytest.fixture
def work(tmp_path: Path) -> Path:
    peermaker.write_export(tmp_path)
    (tmp_path / "pictures" / "all").mkdir(parents=True)
    rows = []
    for number in range(6):
        data, about = shardmaker.sample(number)
        for folder in ("all", shardmaker.COLOURS[number % 3]):
            (tmp_path / "pictures" / folder).mkdir(exist_ok=True)
            (tmp_path / "pictures" / folder / f"{number}.jpg").write_bytes(data)
        rows.append({"image": f"{number}.jpg", "caption": about["web"]})
    (tmp_path / "pictures" / "all" / "list.json").write_text(json.dumps(rows))
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\nall\n")
    (tmp_path / "templates.txt").write_text("a {c} thing\n")
    return tmp_path


def again(work: Path, model: str = "", **benchmark: Any) -> dict[str, Any]:
    judge = benchmark.pop("judge", None)
    model = model or f"local-dir:{work / 'export'}"
    config = EvalConfig(model=(model,), benchmark=({"name": "one"} | benchmark,), heldout=False, judge=judge)
    found = evaluate_models(config, work=work, shards=work / "shards", out=work / "evals", quiet=True)
    return next(iter(found.values()))


def retrieval(work: Path) -> dict[str, Any]:
    return again(work, data=str(work / "pictures" / "all"), task="retrieval")


def classes(work: Path) -> dict[str, Any]:
    files = {name: str(work / f"{name}.txt") for name in ("classes", "templates")}
    return again(work, data=str(work / "pictures"), task="zero_shot", **files)


def test_other_images_of_the_same_names_are_not_the_same_data(work: Path) -> None:
    first = retrieval(work)
    assert retrieval(work) == first
    (work / "pictures" / "all" / "0.jpg").write_bytes(shardmaker.sample(5, size_px=90)[0])
    with pytest.raises(ResumeRefused, match="input images"):
        retrieval(work)


@pytest.mark.parametrize("name, text", [("classes", "red\ngreen\nblue\nall\nmore\n"), ("templates", "the {c}\n")])
def test_files_of_classes_and_templates_are_known_by_what_is_in_them(work: Path, name: str, text: str) -> None:
    first = classes(work)
    assert classes(work) == first
    (work / f"{name}.txt").write_text(text)
    with pytest.raises(ResumeRefused, match=f"input {name}"):
        classes(work)


def test_a_judge_is_known_by_its_weights(work: Path) -> None:
    runmaker.write_run(work / "runs" / "captioner")
    runmaker.write_run(work / "runs" / "judge", seed=1)

    def captioning() -> dict[str, Any]:
        data = str(work / "pictures" / "all")
        return again(work, "run:captioner", data=data, task="captioning", judge="run:judge")

    first = captioning()
    assert captioning() == first
    (work / "runs" / "judge").rename(work / "runs" / "before")
    runmaker.write_run(work / "runs" / "judge", seed=2)
    with pytest.raises(ResumeRefused, match="input judge"):
        captioning()


@pytest.mark.parametrize("names, says", [(("one", "one"), "is there twice"), (("eval",), "held-out split")])
def test_every_benchmark_has_a_result_of_its_own(names: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        EvalConfig(benchmark=tuple({"name": name, "data": name, "task": "retrieval"} for name in names))


def opened(work: Path, **change: str) -> None:
    path = work / "pictures" / "all" / "list.json"
    rows = json.loads(path.read_text())
    (path.parent / "changed.json").write_text(json.dumps([rows[0] | change, *rows[1:]]))
    annotations = str(path.parent / "changed.json")
    open_data(Benchmark(name="one", data=str(path.parent), task="retrieval", annotations=annotations))


def test_half_a_character_and_a_name_that_no_file_can_have_are_refused(work: Path) -> None:
    with pytest.raises(UserError, match=r"'0.jpg' has a text that is no Unicode .*Mend it"):
        opened(work, caption="a \ud800 thing")
    with pytest.raises(UserError, match=r"1 of the 6 images .* are not in .*x{200}\. Complete them"):
        opened(work, image="x" * 5000)
