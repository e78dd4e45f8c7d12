"""Samples that a list leaves out: by key, by image, or by both, counted under a name of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data import exclude, ledger, schema, shard, stats, tars
from clips_data.config import ShardConfig
from clips_data.errors import ResumeRefused, UserError
from clips_data.executor import Job, Report
from clips_data.trace import trace

SHA = {number: ledger.digest_bytes(pairsmaker.image_bytes(number)) for number in range(12)}


def key(number: int) -> str:
    return schema.sample_key(number // 6, number % 6)


def marked(number: int, mark: str = "flag", **change: str) -> str:
    return json.dumps({"key": key(number), "sha256": SHA[number], "mark": mark} | change)


def listed(work: Path, *lines: str, name: str = "marks.jsonl") -> str:
    path = work / name
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def make(work: Path, file: str | None, overwrite: bool = False, **options: Any) -> Report:
    return shard.run(ShardConfig(exclude=file, **options), Job(work=work, quiet=True, overwrite=overwrite))


def keys(work: Path) -> set[str]:
    files = sorted((work / "shards").glob("*.tar"))
    return {sample.key for file in files for sample in tars.read_samples(file)}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return pairsmaker.write_work(tmp_path)


def test_flagged_samples_are_left_out_and_counted_first(work: Path) -> None:
    make(work, None)
    everything = keys(work)
    file = listed(work, marked(0), marked(1, "keep"), key(2), SHA[7].upper(), "")
    report = make(work, file, overwrite=True, where=("key != '000000005'",))
    assert everything - keys(work) == {key(0), key(2), key(7), key(5)}
    found = stats.gather(work)["shards"]["removed"]
    assert list(found.items())[:2] == [("exclude marks.jsonl", 3), ("where key != '000000005'", 1)]
    assert "exclude marks.jsonl: removed 3 of 10" in report.notes
    assert report.facts["exclude"] == "3 samples listed, 0 of them unknown"


def test_a_key_with_another_images_hash_takes_nothing_away_and_is_told(work: Path) -> None:
    file = listed(work, marked(0, sha256=SHA[1]), "000990001", "f" * 64, marked(pairsmaker.FAILED_ROW), marked(4))
    report = make(work, file)
    assert key(0) in keys(work) and key(1) in keys(work) and key(4) not in keys(work)
    (note,) = (note for note in report.notes if "shards of" in note)
    assert note.startswith("4 of 5 samples in ") and "are in none of the 2 shards of" in note


def test_of_several_marks_of_a_sample_the_last_counts(work: Path) -> None:
    make(work, listed(work, marked(0), marked(1), marked(0, "keep")))
    assert key(0) in keys(work) and key(1) not in keys(work)


def test_the_list_is_part_of_what_tars_are_made_from(work: Path) -> None:
    make(work, listed(work, marked(0)))
    assert make(work, listed(work, marked(0))).made == 0
    listed(work, marked(1))
    with pytest.raises(ResumeRefused, match="input exclude"):
        make(work, str(work / "marks.jsonl"))
    with pytest.raises(ResumeRefused, match="config exclude"):
        make(work, None)


def test_tars_without_a_list_are_what_they_were_before_there_could_be_one(work: Path) -> None:
    make(work, None)
    sidecar = ledger.read_sidecar(work / "shards", "train-00000")
    assert sidecar is not None and "exclude" not in sidecar.config and "exclude" not in sidecar.inputs


def test_the_trace_of_a_flagged_sample_tells_of_the_list(work: Path) -> None:
    make(work, listed(work, marked(0)))
    found = trace(work, key(0))
    assert found is not None and "exclude marks.jsonl" in json.dumps(found["shards"])


def test_the_index_names_some_of_what_each_filter_removed(work: Path) -> None:
    make(work, listed(work, *(marked(n) for n in (0, 1, 2, 4, 5))), where=("key != '000010000'",))
    (generation,) = json.loads((work / "shards" / "index.json").read_text())["generations"]
    examples = dict(generation["examples"])
    assert len(examples["exclude marks.jsonl"]) == 3
    assert set(examples["exclude marks.jsonl"]) < {key(n) for n in (0, 1, 2, 4, 5)}
    assert examples["where key != '000010000'"] == [key(6)]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("hello", "'hello' is neither a key nor a sha256"),
        ('{"key": "1", "mark": "maybe"}', "the mark 'maybe' is neither flag nor keep"),
        ('{"mark": "flag"}', "neither a key nor a sha256"),
        ('{"key": 7}', "its key is no text"),
        ('{"key": "a.b"}', "are no key and no sha256"),
        ('{"key": ', "Expecting value"),
        ("{" * 100_000, "line 2"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(work: Path, line: str, told: str) -> None:
    with pytest.raises(UserError, match=r"marks\.jsonl line 2: ") as error:
        make(work, listed(work, key(0), line))
    assert told in str(error.value) and not (work / "shards" / "index.json").exists()


def test_a_list_that_is_not_there_or_empty_is_clear(work: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read --exclude .*nowhere"):
        make(work, str(work / "nowhere"))
    with pytest.raises(UserError, match="lists nothing"):
        make(work, listed(work, "", "  "))


@given(st.sets(st.integers(0, 11)), st.sampled_from(["key", "sha256", "both"]))
def test_rows_are_judged_by_what_the_lines_say(
    tmp_path_factory: pytest.TempPathFactory, numbers: set[int], by: str
) -> None:
    form = {"key": key, "sha256": SHA.__getitem__, "both": marked}[by]
    path = Path(listed(tmp_path_factory.mktemp("list"), *map(form, sorted(numbers)), marked(11, "keep", key="77777")))
    view = pl.DataFrame({"key": [key(n) for n in range(12)], "sha256": [SHA[n] for n in range(12)]})
    assert exclude.find(path).judge(view).to_list() == [int(n in numbers) for n in range(12)]
