"""``clips shard`` again in a folder with a past: what killed runs, grown lists and removals left changes nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pairsmaker
import pytest

from clips_data import ledger, shard, shard_index, shard_plan, sharding, tars
from clips_data.config import ShardConfig
from clips_data.errors import UserError
from clips_data.executor import Job, Report
from clips_data.forget import forget
from clips_data.forgotten import Forgotten


class Killed(BaseException):
    """Stands for SIGKILL: what comes after it is not done."""


def make(work: Path, **options: Any) -> Report:
    job = {name: options.pop(name) for name in list(options) if name in Job.__dataclass_fields__}
    return shard.run(ShardConfig(**{"shard_rows": 4, **options}), Job(work=work, quiet=True, **job))


def abouts(work: Path, split: str = "train") -> dict[str, dict[str, Any]]:
    """What the index leads to, by key; a key that is there twice is an error."""
    index = json.loads((work / "shards" / "index.json").read_text())
    tars_of = [work / "shards" / about["file"] for about in index["splits"][split]["shards"]]
    found = [(sample.key, json.loads(sample.members["json"])) for tar in tars_of for sample in tars.read_samples(tar)]
    assert len({key for key, _ in found}) == len(found)
    return dict(found)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Of all but locks."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[0] != "."}


def killed_while_sorting(work: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(shard_plan, "_sort", kill)
        patched.setattr(sharding, "_remove_scratch", kill)
        with pytest.raises(Killed):
            make(work, **options)
    assert list((work / "shards").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"heldout_ratio": 0.5, "heldout_max": 3}, {"heldout_ratio": 0.5}),
        ({"heldout_ratio": 0.5, "heldout_max": 3}, {}),
        ({}, {"only": (Path("pairs/00001.tar"),)}),
    ],
)
def test_rows_that_a_killed_run_spooled_do_not_come_into_another_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any], after: dict[str, Any]
) -> None:
    whole, killed = (pairsmaker.write_work(tmp_path / name, num_shards=6) for name in ("whole", "killed"))
    killed_while_sorting(killed, monkeypatch, **before)
    make(killed, **after)
    make(whole, **after)
    assert folder_bytes(killed / "shards") == folder_bytes(whole / "shards")


def test_a_dry_run_leaves_the_rows_of_the_run_that_is_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_while_sorting(pairsmaker.write_work(tmp_path), monkeypatch)
    rows = {path: path.read_bytes() for path in (tmp_path / "shards").rglob("*.arrow")}
    make(tmp_path, dry_run=True)
    assert {path: path.read_bytes() for path in (tmp_path / "shards").rglob("*.arrow")} == rows


def grown(work: Path, **options: Any) -> Path:
    make(pairsmaker.write_work(work), **options)
    make(pairsmaker.write_work(work, num_shards=3), **options)
    return work


def test_a_tar_of_a_grown_folder_is_made_again_and_later_generations_stay_in_the_index(tmp_path: Path) -> None:
    before = folder_bytes(grown(tmp_path, heldout_ratio=0.3) / "shards")
    ledger.forget_unit(tmp_path / "shards", "train-00000")
    report = make(tmp_path, heldout_ratio=0.3)
    assert report.made == 1 and folder_bytes(tmp_path / "shards") == before


def test_explaining_a_finished_folder_changes_nothing(tmp_path: Path) -> None:
    options = {"where": ("key != '000000001'",)}
    before = folder_bytes(grown(tmp_path, **options) / "shards")
    for overwrite in (False, True):
        if overwrite:
            make(tmp_path, **options, overwrite=True)
            before = folder_bytes(tmp_path / "shards")
        report = make(tmp_path, **options, explain=1, overwrite=overwrite)
        assert report.made == 0 and any("key='000000001'" in note for note in report.notes)
        assert folder_bytes(tmp_path / "shards") == before


def test_explaining_after_a_removal_loses_no_sample(tmp_path: Path) -> None:
    make(pairsmaker.write_work(tmp_path), where=("key != '000000001'",))
    forget(tmp_path, Forgotten(images=frozenset(ledger.digest_bytes(pairsmaker.image_bytes(n)) for n in (0, 2, 4))))
    before = folder_bytes(tmp_path / "shards")
    for overwrite in (False, True):
        make(tmp_path, where=("key != '000000001'",), explain=1, overwrite=overwrite)
        assert folder_bytes(tmp_path / "shards") == before and len(abouts(tmp_path)) == 6


@pytest.mark.parametrize("where", ["score.wbe > 1", "key = 'nobody'"])
def test_overwriting_with_a_filter_that_is_refused_leaves_all_as_it_was(tmp_path: Path, where: str) -> None:
    before = folder_bytes(grown(tmp_path) / "shards")
    with pytest.raises(UserError):
        make(tmp_path, where=(where,), overwrite=True)
    assert folder_bytes(tmp_path / "shards") == before


def test_new_pairs_without_a_sample_are_no_error_and_go_together_with_later_ones(tmp_path: Path) -> None:
    where = ("key < '000010000' or key >= '000020000'",)
    make(pairsmaker.write_work(tmp_path, num_shards=1), where=where)
    before = folder_bytes(tmp_path / "shards")
    report = make(pairsmaker.write_work(tmp_path, num_shards=2), where=where)
    assert "none of the 5 pairs of new shards becomes a sample" in report.notes
    assert folder_bytes(tmp_path / "shards") == before
    make(pairsmaker.write_work(tmp_path, num_shards=3), where=where)
    assert shard_index.generations(tmp_path / "shards") == [["00000"], ["00001", "00002"]]
    assert len(abouts(tmp_path)) == 10


@pytest.mark.parametrize("text", ['["\\ud800"]', "[NaN]", "[" * 100_000, "[1e999]", "[no list"])
def test_captions_that_json_cannot_say_are_carried_all_the_same(tmp_path: Path, text: str) -> None:
    pairsmaker.write_pairs(tmp_path, change=lambda number, row: row.update(captions=text))
    pairsmaker.write_captions(tmp_path)
    make(tmp_path)
    carried = {json.dumps(about["extra"]["captions"]) for about in abouts(tmp_path).values()}
    assert carried == {"[null]" if text in ("[NaN]", "[1e999]") else json.dumps(text)}


def test_numbers_of_the_list_that_json_has_not_are_null(tmp_path: Path) -> None:
    def priced(number: int, row: pairsmaker.Row) -> None:
        row |= {"price": math.nan if number == 1 else 1.5, "sizes": [math.inf, float(number)]}

    pairsmaker.write_pairs(tmp_path, change=priced)
    pairsmaker.write_captions(tmp_path)
    make(tmp_path)
    extra = {key: about["extra"] for key, about in abouts(tmp_path).items()}
    assert (extra["000000001"]["price"], extra["000000002"]["price"]) == (None, 1.5)
    assert extra["000000002"]["sizes"] == [None, 2.0]


def test_columns_of_the_list_with_names_of_ours_do_not_take_their_place(tmp_path: Path) -> None:
    names = ("text.synthetic", "code.synthetic", "place.ext", "score.web")
    pairsmaker.write_pairs(tmp_path, change=lambda number, row: row.update(dict.fromkeys(names, "theirs")))
    pairsmaker.write_captions(tmp_path)
    make(tmp_path)
    assert all("theirs" not in json.dumps(about) for about in abouts(tmp_path).values())
    assert abouts(tmp_path)["000000001"]["synthetic"] == pairsmaker.synthetic_caption(1)
