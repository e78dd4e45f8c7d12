"""``clips trace``: what became of one sample, found by any of its names, and what does not fit together any more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pairsmaker
import polars as pl
import pytest

from clips_data import draws, duplicates, ledger, schema, shard, tars, trace_find
from clips_data.config import ShardConfig
from clips_data.errors import UsageError, UserError
from clips_data.executor import Job
from clips_data.forget import forget
from clips_data.forgotten import asked_for
from clips_data.trace import trace

REFUSED, NO_TEXT, FAILED, TRIED_AGAIN, TRIED_TWICE, SAME_URL, SAME_IMAGE = 1, 2, 3, 9, 11, 8, 10
CONFIG = ShardConfig(shard_rows=4, heldout_ratio=0.4, web_ratio=0.5)


def key(number: int) -> str:
    return schema.sample_key(number // 6, number % 6)


def url(number: int) -> str:
    return f"https://images.test/{number:04d}.jpg?key=REDACTED-{number:08d}"


def spoil_pair(number: int, row: pairsmaker.Row) -> None:
    ok = row["status"] == schema.STATUS_SUCCESS
    row.update(
        url=url(number), host="images.test", evidence=None, phash=None, retry_of=None, duplicate_of=None,
        source_key=None if ok else f"theirs-{number}", final_url=f"https://cdn.test/{number}.jpg" if ok else None,
        raw_sha256=ledger.digest_bytes(b"raw %d" % number) if ok else None,
    )  # fmt: skip
    if number == NO_TEXT:
        row["caption"] = " "
    if number == TRIED_AGAIN:
        row.update(retry_of=key(FAILED), code="timeout")
    if number == TRIED_TWICE:
        row.update(retry_of=key(FAILED))
    if number == SAME_URL:
        row.update(duplicate_of=key(7))
    if number == SAME_IMAGE:
        row["image"] = pairsmaker.image_bytes(4)


def spoil_caption(number: int, row: pairsmaker.Row) -> None:
    row.update(seed=number, engine="vllm", prompt_variant="1", request=f"request {number}")
    if number in (REFUSED, NO_TEXT):
        pairsmaker.reject(row)


def write_captions(work: Path, change: Callable[[int, pairsmaker.Row], None] = spoil_caption) -> Path:
    """A column that knows its inputs as ``clips recaption`` records them."""
    folder = pairsmaker.write_captions(work, change=change)
    for unit in ledger.finished_units(folder):
        recommit(folder, unit, inputs={"pairs": ledger.digests_of(work / "pairs")[unit]})
    return folder


def recommit(folder: Path, unit: str, inputs: dict[str, str]) -> None:
    ledger.part(folder / f"{unit}.parquet").write_bytes((folder / f"{unit}.parquet").read_bytes())
    ledger.commit(folder, unit, [f"{unit}.parquet"], inputs=inputs, config={"seed": 0}, counts={})


def write_scores(work: Path) -> None:
    folder = work / "scores" / "clip"
    folder.mkdir(parents=True)
    captions = work / "captions" / "synthetic"
    for unit in ledger.finished_units(captions):
        rows = pl.read_parquet(captions / f"{unit}.parquet").select("key", "sha256")
        table = rows.with_columns(web=pl.lit(0.25), synthetic=pl.lit(None, pl.Float64))
        table.write_parquet(ledger.part(folder / f"{unit}.parquet"), metadata={"model": '"a scorer"'})
        inputs = {"pairs": ledger.digests_of(work / "pairs")[unit], "captions/synthetic": _digest(captions, unit)}
        ledger.commit(folder, unit, [f"{unit}.parquet"], inputs=inputs, config={}, counts={})


def _digest(folder: Path, unit: str) -> str:
    return ledger.digests_of(folder)[unit]


def write_run(work: Path, name: str, shards: str) -> None:
    run = work / "runs" / name
    (run / "checkpoints" / "step-00000010").mkdir(parents=True)
    (run / "begun.jsonl").write_text(json.dumps({"shards": shards, "seed": 0}) + "\n")


def index_of(work: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((work / "shards" / "index.json").read_text())
    return index


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs with a retry, duplicates and failures, one column, scores, shards and two runs."""
    work = tmp_path_factory.mktemp("work")
    pairsmaker.write_pairs(work, change=spoil_pair)
    duplicates.write(work / "pairs", "sha256")
    write_captions(work)
    write_scores(work)
    shard.run(CONFIG, Job(work=work, quiet=True))
    write_run(work, "first", index_of(work)["digest"])
    write_run(work, "elsewhere", "of shards that are gone")
    return work


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def traced(work: Path, number: int) -> dict[str, Any]:
    found = trace(work, key(number))
    assert found is not None
    assert json.loads(json.dumps(found)) == found
    return found


# --- the lineage ------------------------------------------------------------------------------------------------------


def test_a_sample_is_followed_from_its_url_to_the_runs_that_saw_it(work: Path) -> None:
    found = traced(work, 0)
    assert found["list"]["row"]["url"] == url(0) and found["list"]["row"]["final_url"] == "https://cdn.test/0.jpg"
    image = found["image"]
    assert (image["width"], image["height"], image["member"]) == (32, 24, f"{key(0)}.jpg")
    with tars.open_tar(work / image["where"]) as file:
        data = tars.read_at(file, work, image["offset"], image["stored_bytes"])
    assert data == pairsmaker.image_bytes(0) and image["sha256"] == ledger.digest_bytes(data)
    assert image["raw_sha256"] == ledger.digest_bytes(b"raw 0")
    caption = found["captions"]["synthetic"]
    assert caption["row"]["request"] == "request 0" and caption["row"]["prompt_variant"] == "1"
    assert caption["made_by"]["model"] == "demo" and caption["made_by"]["prompt"] == "describe"
    assert caption["tool_version"] and caption["config"] == {"seed": 0}
    assert found["scores"]["clip"]["row"]["web"] == 0.25
    assert found["scores"]["clip"]["made_by"] == {"model": "a scorer"}
    assert found["problems"] == []


def test_the_place_in_shards_is_where_the_bytes_are(work: Path) -> None:
    for number in (0, 1, 4, 5, 6, 7, 11):
        (step,) = traced(work, number)["shards"]
        samples = list(tars.read_samples(work / "shards" / step["tar"]))
        sample = samples[step["row"]]
        assert sample.key == key(number) and step["split"] == step["tar"].partition("-")[0]
        assert sample.members["txt"].decode() == step["txt"]["text"] == step["texts"][step["txt"]["column"]]
        pieces = step["sub_captions"]["synthetic"]
        about = json.loads(sample.members["json"])
        assert [[piece["start"], piece["end"]] for piece in pieces] == about["sub_captions"]["synthetic"]
        assert all(about["synthetic"][piece["start"] : piece["end"]] == piece["text"] for piece in pieces)


def test_the_text_is_explained_by_the_draw_and_by_what_stood_in(work: Path) -> None:
    whys = {}
    for number in (0, REFUSED, 4, 5, 6, 7, 11):
        (step,) = traced(work, number)["shards"]
        drawn = draws.uniform(CONFIG.seed, "mix", 0, key(number))
        assert f"{drawn:.4f}" in step["txt"]["why"]
        assert f"asks for {'web' if drawn < 0.5 else 'synthetic'}" in step["txt"]["why"]
        whys[number] = step["txt"]
    assert {about["outcome"] for about in whys.values()} >= {"web", "synthetic"}
    config = CONFIG.model_copy(update={"web_ratio": 0.0})
    shutil.rmtree(work / "shards")
    shard.run(config, Job(work=work, quiet=True))
    (step,) = traced(work, REFUSED)["shards"]
    assert step["txt"]["outcome"] == "web_for_missing_synthetic"
    assert step["txt"]["why"].endswith("asks for synthetic; that is empty (code refused), so web stands in")


def test_failed_downloads_are_traced_with_their_tries(work: Path) -> None:
    found = traced(work, FAILED)
    assert found["list"]["row"]["code"] == "http_4xx" and found["image"] is None
    again = {"relation": "another try", "key": key(TRIED_AGAIN), "code": "timeout"}
    twice = {"relation": "another try", "key": key(TRIED_TWICE), "code": "ok"}
    assert found["related"] == [again, twice]
    assert found["captions"]["synthetic"]["absent"] == "the download failed, so there is no image"
    assert found["shards"][0]["absent"] == "the download failed, so there is no image"
    assert found["runs"] == [] and found["problems"] == []
    first = {"relation": "the first try", "key": key(FAILED), "code": "http_4xx"}
    assert traced(work, TRIED_AGAIN)["related"] == [first, twice]
    assert traced(work, TRIED_TWICE)["related"] == [first, again]


def test_repetitions_are_told_in_both_directions(work: Path) -> None:
    assert traced(work, 7)["related"] == [{"relation": "repeats its URL", "key": key(SAME_URL), "code": "ok"}]
    assert traced(work, SAME_URL)["related"] == [
        {"relation": "the row whose URL it repeats", "key": key(7), "code": "ok"}
    ]
    assert traced(work, 4)["related"] == [{"relation": "has the same sha256 and is left out", "key": key(SAME_IMAGE)}]
    assert traced(work, SAME_IMAGE)["related"] == [{"relation": "has the same sha256 and is kept", "key": key(4)}]


def test_it_is_said_why_a_sample_is_in_no_shard(work: Path) -> None:
    assert traced(work, SAME_IMAGE)["shards"][0]["absent"] == f"left out, as it has the same image as {key(4)}"
    assert traced(work, NO_TEXT)["shards"][0]["absent"] == (
        "dropped, as none of the columns web, synthetic has a usable caption for it"
    )
    (work / "shards" / "index.json").unlink()
    assert "not all of them are finished" in traced(work, NO_TEXT)["shards"][0]["absent"]


def test_a_sample_that_a_filter_removed_is_not_said_to_be_of_other_shards(tmp_path: Path) -> None:
    work = pairsmaker.write_work(tmp_path)
    config = ShardConfig(where=("CAST(key AS INT) % 2 = 0",))
    shard.run(config, Job(work=work, quiet=True, only=(work / "pairs" / "00000.parquet",)))
    assert "absent" not in traced(work, 0)["shards"][0]
    assert traced(work, 1)["shards"][0]["absent"] == "left out by a filter: where CAST(key AS INT) % 2 = 0"
    assert "made from other shards of pairs" in traced(work, 7)["shards"][0]["absent"]


def test_a_damaged_index_is_named(work: Path) -> None:
    (work / "shards" / "index.json").write_text("{")
    (problem,) = traced(work, 0)["shards"][0]["problems"]
    assert "index.json is no JSON" in problem


def test_only_part_of_the_pairs_was_sharded(tmp_path: Path) -> None:
    work = pairsmaker.write_work(tmp_path)
    shard.run(CONFIG, Job(work=work, quiet=True, only=(work / "pairs" / "00000.parquet",)))
    assert traced(work, 0)["problems"] == []
    assert "made from other shards of pairs" in traced(work, 6)["shards"][0]["absent"]


def test_runs_are_told_by_the_shards_that_they_were_trained_on(work: Path) -> None:
    for number in (0, 1, 4, 5, 6, 7, 11):
        found = traced(work, number)
        first, other = found["runs"]
        assert (first["run"], first["shards"], first["split"]) == ("runs/first", "shards", found["shards"][0]["split"])
        assert first["checkpoints"] == ["runs/first/checkpoints/step-00000010"]
        assert (other["run"], other["shards"]) == ("runs/elsewhere", None)
    assert {traced(work, number)["runs"][0]["split"] for number in (0, 1, 4, 5, 6, 7, 11)} == {"train", "heldout"}


def test_runs_are_known_also_after_other_samples_were_forgotten(work: Path) -> None:
    forget(work, asked_for(urls=[url(0)]))
    found = traced(work, 4)
    assert [run["run"] for run in found["runs"] if run["shards"]] == ["runs/first"] and found["problems"] == []
    gone = traced(work, 0)
    assert gone["list"]["row"]["code"] == "forgotten" and gone["list"]["row"]["url"] is None
    assert gone["shards"][0]["absent"] == "it was removed by `clips forget`"


def test_files_of_runs_that_name_the_key_are_listed(work: Path) -> None:
    (work / "runs" / "first" / "eval").mkdir()
    (work / "runs" / "first" / "eval" / "captions.jsonl").write_text(json.dumps({"key": key(5)}) + "\n")
    assert traced(work, 5)["shown_in"] == ["runs/first/eval/captions.jsonl"]
    assert traced(work, 4)["shown_in"] == []


# --- some stages only -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["pairs", "captions", "scores", "shards"])
def test_a_folder_with_one_stage_is_enough(work: Path, left: str) -> None:
    for stage in {"pairs", "captions", "scores", "shards", "runs"} - {left}:
        shutil.rmtree(work / stage)
    found = traced(work, 0)
    assert ("absent" in found["list"]) == (left != "pairs")
    assert bool(found["captions"]) == (left == "captions") and bool(found["scores"]) == (left == "scores")
    assert bool(found["shards"]) == (left == "shards")
    assert found["problems"] == []


def test_a_shard_that_is_not_finished_is_told_from_its_journal(work: Path) -> None:
    folder = work / "captions" / "synthetic"
    ledger.forget_unit(folder, "00001")
    lines = [{"inputs": {}}, {"key": key(6), "code": "ok"}, {"key": key(7), "code": "refused"}]
    (folder / "00001.journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"key": "0')
    start = "shard 00001 is not finished here"
    assert traced(work, 7)["captions"]["synthetic"]["absent"] == (
        f"{start}; its journal has 2 answers, this one with the code refused"
    )
    assert traced(work, 8)["captions"]["synthetic"]["absent"] == f"{start}; its journal has 2 answers, not this one"
    ledger.forget_unit(work / "scores" / "clip", "00001")
    assert traced(work, 8)["scores"]["clip"]["absent"] == start


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_captions_made_again_are_noticed_to_their_right(work: Path) -> None:
    write_captions(work, change=lambda number, row: row.update(caption="All new."))
    problems = traced(work, 0)["problems"]
    assert len(problems) == 3
    assert problems[0].startswith("scores/clip/00000.parquet: shard 00000 of captions/synthetic was made again since")
    assert problems[1] == (
        "shards: its synthetic caption reads otherwise by now; the tar keeps the one that it was made with"
    )
    assert problems[2] == "shards: captions/synthetic has other contents now than when this folder was made"


def test_a_column_made_of_another_and_of_scores_knows_both(work: Path) -> None:
    folder = pairsmaker.write_captions(work, "fused")
    for unit in ledger.finished_units(folder):
        sources = {
            "pairs": work / "pairs",
            "synthetic": work / "captions" / "synthetic",
            "clip": work / "scores" / "clip",
        }
        recommit(folder, unit, inputs={name: _digest(source, unit) for name, source in sources.items()} | {"list": "0"})
    assert traced(work, 0)["captions"]["fused"]["problems"] == []
    recommit(work / "scores" / "clip", "00000", inputs={})
    write_captions(work, change=lambda number, row: row.update(caption="All new."))
    (problem,) = traced(work, 0)["captions"]["fused"]["problems"]
    assert problem.startswith("shard 00000 of captions/synthetic was made again since")
    ledger.forget_unit(work / "scores" / "clip", "00000")
    problems = traced(work, 0)["captions"]["fused"]["problems"]
    assert len(problems) == 2
    assert problems[0] == "it was made from shard 00000 of scores/clip, which is not finished any more"


def test_pairs_made_again_are_noticed_by_every_stage(work: Path) -> None:
    shutil.rmtree(work / "pairs")
    pairsmaker.write_pairs(work, change=lambda number, row: row.update(image=pairsmaker.image_bytes(number + 50)))
    found = traced(work, 0)
    steps = (found["captions"]["synthetic"], found["scores"]["clip"])
    for step in steps:
        again, image = step["problems"]
        assert again.startswith("shard 00000 of pairs was made again since") and "about another image" in image
    assert any("another one than pairs has now" in problem for problem in found["shards"][0]["problems"])


def test_an_upstream_that_is_gone_is_noticed(work: Path) -> None:
    ledger.forget_unit(work / "captions" / "synthetic", "00000")
    found = traced(work, 0)
    assert found["scores"]["clip"]["problems"] == [
        "it was made from shard 00000 of captions/synthetic, which is not finished any more"
    ]
    assert "captions/synthetic is not there, or not whole, any more" in found["shards"][0]["problems"]


def test_damage_costs_its_own_step_only(work: Path) -> None:
    tar = work / "pairs" / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[traced(work, 0)["image"]["offset"] + 9] ^= 1
    tar.write_bytes(bytes(data))
    (work / "captions" / "synthetic" / "00000.parquet").write_bytes(b"cut")
    found = traced(work, 0)
    assert "its table says" in found["image"]["problems"][0]
    assert found["captions"]["synthetic"]["absent"] == "its table cannot be read"
    assert found["shards"][0]["split"] and found["list"]["row"]["code"] == "ok"
    shards = work / "shards" / found["shards"][0]["tar"]
    data = bytearray(shards.read_bytes())
    data[found["shards"][0]["image_offset"] + 9] ^= 1
    shards.write_bytes(bytes(data))
    assert "its table says" in traced(work, 0)["shards"][0]["problems"][0]
    shards.write_bytes(b"cut")
    assert traced(work, 0)["shards"][0]["absent"] == "it cannot be read"


# --- names of a sample ------------------------------------------------------------------------------------------------


def test_a_sample_is_found_by_hash_url_and_key_of_its_own(work: Path) -> None:
    image = ledger.digest_bytes(pairsmaker.image_bytes(4))
    assert trace_find.by_sha256(work, image.upper()) == [key(4), key(SAME_IMAGE)]
    assert trace_find.by_sha256(work, ledger.digest_bytes(b"raw 5")) == [key(5)]
    assert trace_find.by_url(work, url(5)) == trace_find.by_url(work, "https://cdn.test/5.jpg") == [key(5)]
    assert trace_find.by_source_key(work, f"theirs-{FAILED}") == [key(FAILED)]
    shutil.rmtree(work / "pairs")
    assert trace_find.by_sha256(work, image) == [key(4), key(SAME_IMAGE)]


def test_a_url_is_found_under_a_renewed_signature(tmp_path: Path) -> None:
    signed = "https://images.test/a.jpg?X-Amz-Signature="
    stored = signed + "REDACTED"
    pairsmaker.write_pairs(tmp_path, change=lambda number, row: row.update(url=stored) if number in (1, 3, 9) else None)
    assert trace_find.by_url(tmp_path, signed + "new") == [key(1), key(9), key(3)]


def test_what_is_not_there_is_said_with_the_nearest_thing(work: Path) -> None:
    assert trace(work, "7") is trace(work, key(99)) is trace(work, "../../etc") is None
    assert "Did you mean '000000007'?" in str(trace_find.no_such_key(work, "7"))
    near = str(trace_find.no_such_key(work, "000000099"))
    assert "Shard 00000 of pairs has the keys 000000000 to 000000005" in near
    assert "captions/synthetic (2 shards, 00000 to 00001)" in near and "--sha256 or --url" in near
    assert "pairs has no finished shard 00009" in str(trace_find.no_such_key(work, "000090000"))
    with pytest.raises(
        UserError, match=r"No row of .*pairs has the URL https://images\.test/x\.jpg.* 12 rows .* from im"
    ):
        trace_find.by_url(work, "https://images.test/x.jpg")
    with pytest.raises(UserError, match=r"No sample under .* has an image with sha256 0000"):
        trace_find.by_sha256(work, "0" * 64)
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        trace_find.by_sha256(work, "abc")


def test_what_was_forgotten_is_said_so(work: Path) -> None:
    image = ledger.digest_bytes(pairsmaker.image_bytes(5))
    forget(work, asked_for(images=[image]))
    with pytest.raises(UserError, match="It was forgotten on request"):
        trace_find.by_sha256(work, image)


def test_a_folder_without_work_is_clear(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        trace(tmp_path / "nowhere", key(0))
    assert trace(tmp_path, key(0)) is None
    assert "There is no finished work in" in str(trace_find.no_such_key(tmp_path, key(0)))
