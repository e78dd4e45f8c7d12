"""The report's story of a run: no sample is lost without a name, figures have intervals, and the page stays small."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pairsmaker
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_data_report import HOSTILE, Page, make, write_run
from test_data_trace import write_scores

from clips_data import (
    duplicates,
    joined,
    report_charts,
    report_funnel,
    report_marks,
    report_pictures,
    shard,
    stats,
)
from clips_data.config import ShardConfig
from clips_data.executor import Job
from clips_data.forget import forget
from clips_data.forgotten import asked_for

WIDE = "pairs.width >= 30"
NOT_THIS = "key != '000010001'"


def spoil(number: int, row: pairsmaker.Row) -> None:
    if number == 7:
        row["image"] = pairsmaker.image_bytes(6)
    if number == 4:
        row["width"] = 8
    if number == 10:
        row["caption"] = ""


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Duplicates, a refused caption, a sample without any, filters, a held-out split and a run."""
    pairsmaker.write_pairs(tmp_path, change=spoil)
    duplicates.write(tmp_path / "pairs", "sha256")
    pairsmaker.write_captions(
        tmp_path, change=lambda number, row: pairsmaker.reject(row) if number in (0, 10) else None
    )
    config = ShardConfig(where=(WIDE, NOT_THIS), heldout_ratio=0.4, shard_rows=4)
    shard.run(config, Job(work=tmp_path, quiet=True))
    write_run(tmp_path)
    return tmp_path


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Page(page).words))


def result(
    work: Path, *, model: str = "default", folder: str = "runs/default/eval", file: str = "held.json", **change: Any
) -> None:
    """Writes a result file of ``clips eval``."""
    scores = {
        "text_to_image_r10": {"value": 0.5, "low": 0.4, "high": 0.6, "chance": 0.1},
        "text_to_image_r5": {"value": 0.25, "low": 0.125, "high": 0.375},
        "cider": {"value": 1.25, "low": 1.0, "high": 1.5},
    }
    about = {
        "schema_version": 1, "benchmark": "held", "task": "retrieval", "command": "clips eval --benchmark held",
        "model": {"model": model}, "preprocessing": {"resize_mode": "squash"}, "tokenizer": {"name": "bpe"},
        "data": {"format": "shards", "split": "heldout"}, "scores": scores, "counts": {"images": 4, "texts": 20},
        "environment": {"versions": {"torch": "9.8.7"}}, "details": {},
    }  # fmt: skip
    path = work / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / file).write_text(json.dumps(about | change))


def heldout_keys(work: Path) -> list[str]:
    (file, *_) = (work / "shards").glob("heldout-*.index.parquet")
    return joined.read_table(file)["key"].to_list()


# --- the funnel -------------------------------------------------------------------------------------------------------


def test_every_loss_of_the_funnel_has_a_name(work: Path) -> None:
    metrics = [{"step": 3, "samples": 2, "counts": {"loaded": 3, "bad.decode_failed": 1}}]
    found = report_funnel.steps(stats.gather(work), work, work / "runs" / "default", metrics)
    way = [step for step in found if not step.side]
    assert [step.label for step in way] == [
        "URLs tried", "Pairs of image and text", "Given to the filters", "Kept by the filters", "In shards",
        "To train on", "Seen in training",
    ]  # fmt: skip
    for before, step in zip([way[0], *way], way, strict=False):
        assert step.of == before.number and step.number + sum(step.losses.values()) == step.of, step
    losses = {name: number for step in way for name, number in step.losses.items()}
    splits = stats.gather(work)["shards"]["splits"]
    assert losses == {
        "http_4xx": 2,
        "image repeats an earlier one": 1,
        f"removed by where {WIDE}": 1,
        "no usable caption in any column": 1,
        "held out for evaluation": splits["heldout"],
        "not drawn yet": splits["train"] - 2,
    }
    (captions,) = (step for step in found if step.side)
    assert (captions.number, captions.of, captions.losses) == (8, 10, {"refused": 2})
    assert "1 of 3 draws gave way to another sample: decode_failed" in way[-1].notes


def test_the_funnel_is_a_picture_and_a_table(work: Path) -> None:
    page = make(work)
    labels = [attributes.get("aria-label") or "" for attributes in Page(page).all("svg")]
    assert any(
        label.startswith("URLs tried 12; Pairs of image and text 10; With a synthetic caption 8") for label in labels
    )
    assert "image repeats an earlier one − 1 10 10.0 %" in words_of(page)


def test_a_run_on_other_shards_is_told(work: Path) -> None:
    (work / "runs" / "default" / "begun.jsonl").write_text(json.dumps({"shards": "0123456789abcdef"}) + "\n")
    assert "trained on shards of another digest (0123456789ab)" in words_of(make(work))


def test_filters_show_pictures_of_what_they_removed(work: Path) -> None:
    words = words_of(make(work, gallery=0))
    assert f"where {WIDE} 1 9 11.1 %" in words and f"where {WIDE} 1 of 1 Web caption photo 4 for sale" in words
    assert f"where {WIDE} is null" not in words


def test_a_forgotten_sample_is_no_example_any_more(work: Path) -> None:
    assert "photo 4 for sale" in make(work, gallery=0)
    forget(work, asked_for(urls=["http://images.test/4.jpg?signature=secret"]))
    words = words_of(make(work, gallery=0))
    assert "photo 4 for sale" not in words and f"where {WIDE} 1 9 11.1 %" in words


# --- texts ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1))
def test_bins_of_lengths_hold_what_is_usual(low: int, length: int, share: float) -> None:
    high, usual = low + length, low + share * length
    first, width, number = report_charts.bins_for(low, high, usual, whole=True)
    assert width >= 1 and width == int(width) and 1 <= number <= 60 and first <= low
    assert first + number * width > min(high, 2 * usual)


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_bins_of_scores_hold_all(low: float, length: float) -> None:
    first, width, number = report_charts.bins_for(low, low + length, low, whole=False)
    assert 1 <= number <= 60 and first <= low + width / 1000 and first + number * width > low + length - width / 1000


def test_histograms_count_every_caption(work: Path) -> None:
    write_scores(work)
    page = make(work)
    labels = [
        label for attributes in Page(page).all("svg") if "values" in (label := attributes.get("aria-label") or "")
    ]
    assert "synthetic captions: 8 values, median 16, 16 to 16" in labels
    assert any(label.startswith("clip of web: ") for label in labels)
    counted = re.findall(r"<title>[^<]*: (\d+)</title>", page.partition("synthetic captions")[2].partition("</svg>")[0])
    assert sum(map(int, counted)) == 8


def test_mixes_of_the_run_are_told_with_their_denominators(work: Path) -> None:
    counts = {"loaded": 10, "mix.web": 6, "mix.synthetic_for_missing_web": 2, "fallback.synthetic_empty": 3}
    metrics = work / "runs" / "default" / "metrics.jsonl"
    metrics.write_text(json.dumps({"step": 1, "samples": 10, "loss": 1.0, "counts": counts}) + "\n")
    words = words_of(make(work))
    assert "in training, mix: web 6 of 8 75.0 %" in words
    assert "in training, mix: synthetic for a missing web 2 of 8 25.0 %" in words
    assert "another text stood in, as synthetic was empty 3 of 10 30.0 %" in words


# --- evaluations ------------------------------------------------------------------------------------------------------


def test_figures_are_shown_with_intervals_and_how_they_were_made(work: Path) -> None:
    result(work)
    words = words_of(make(work))
    assert "held: retrieval · 4 images, 20 texts · shards heldout · images squash · tokenizer bpe" in words
    assert re.search(
        r"cider 1\.25 1 1\.5 – .*R@5 25\.0 % 12\.5 % 37\.5 % – .*R@10 50\.0 % 40\.0 % 60\.0 % 10\.0 %", words
    )
    assert "evaluation, torch 9.8.7" in words and "clips eval --benchmark held" in words


def test_models_on_one_benchmark_stand_beside_each_other(work: Path) -> None:
    result(work)
    result(work, model="ViT-B-32:openai", folder="evals/vit-b-32")
    words = words_of(make(work))
    assert (
        re.search(r"R@10 default 50\.0 % .*R@10 ViT-B-32:openai 50\.0 %", words) and words.count("held: retrieval") == 1
    )


def test_a_figure_of_another_model_alone_is_not_taken_for_the_runs(work: Path) -> None:
    result(work, model="ViT-B-32:openai", folder="evals/vit-b-32")
    words = words_of(make(work))
    assert "figure model value" in words and "R@10 ViT-B-32:openai 50.0 %" in words


def test_models_that_were_measured_in_different_ways_are_told_apart(work: Path) -> None:
    result(work, counts={"images.scored": 4, "images.tied": 0})
    result(work, model="other", folder="evals/other", counts={"images.scored": 4}, tokenizer={"name": "bert"})
    words = words_of(make(work))
    alike = "retrieval · 4 images scored · shards heldout · images squash · tokenizer"
    assert f"held: default: {alike} bpe; other: {alike} bert" in words


def test_figures_of_further_queries_are_named_as_those_of_the_first(work: Path) -> None:
    result(work, scores={"dense_text_to_image_r1": {"value": 0.5, "low": 0.4, "high": 0.6}})
    assert "dense Text → image R@1 50.0 %" in words_of(make(work))


def test_hardest_misses_show_the_image_and_what_came_first(work: Path) -> None:
    keys = heldout_keys(work)
    first = [*keys[:1], "not-here"]
    hardest = [
        {"text": "near", "key": keys[0], "rank": 1, "first": first},
        {"text": f"far {HOSTILE}" + "x" * 100_000, "key": keys[-1], "rank": 6.5, "first": first},
        {"text": "gone", "key": "not-here", "rank": 3, "first": first},
    ]
    result(work, details={"hardest": hardest})
    page = make(work, gallery=0)
    words = words_of(page)
    assert (
        words.index("above, at rank 6.5") < words.index("not-here is not in these shards") < words.index("at rank 1 ")
    )
    assert len(Page(page).all("img")) == 2 + 3 + _examples(page)
    assert page.count("<script") == 1 and "more characters" in words and len(page) < 200_000
    result(work, details={"hardest": hardest}, data={"format": "webdataset"}, file="elsewhere.json")
    assert len(Page(make(work, gallery=0)).all("img")) == 2 + 3 + _examples(page)


def _examples(page: str) -> int:
    return page.partition("Hardest misses</h2>")[0].count("<img ")


# --- the page ---------------------------------------------------------------------------------------------------------


def noise(number: int, row: pairsmaker.Row) -> None:
    file = io.BytesIO()
    Image.frombytes("RGB", (400, 300), random.Random(number).randbytes(360_000)).save(file, "JPEG")
    row["image"] = file.getvalue()


def test_a_large_gallery_gets_smaller_pictures_and_then_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairsmaker.write_pairs(tmp_path, change=noise)
    shard.run(ShardConfig(columns=("web",)), Job(work=tmp_path, quiet=True))
    found = []
    for limit in (1_000_000, 500_000, 200_000, 60_000, 30_000):
        monkeypatch.setattr(report_pictures, "MAX_PAGE_BYTES", limit)
        page = make(tmp_path)
        assert len(page.encode()) < limit
        widths = {int(attributes["width"] or 0) for attributes in Page(page).all("img")}
        assert len(widths) == 1 and ("To keep this page below" in page) == (limit < 1_000_000)
        found.append((*widths, len(Page(page).all("article"))))
    assert found[:4] == [(360, 10), (240, 10), (160, 10), (96, 10)] and found[4][0] == 96 and 0 < found[4][1] < 10
    assert f"{found[4][1]} of 10 samples are shown" in page


def test_hostile_settings_and_names_are_text(work: Path) -> None:
    folder = work / "runs" / "default"
    (folder / "manifest.yaml").write_text(f"name: '{HOSTILE}'\n")
    result(
        work,
        command=f"clips eval {HOSTILE}",
        benchmark=HOSTILE,
        model={"model": HOSTILE},
        environment={HOSTILE: HOSTILE},
    )
    result(work, folder=f"evals/{'x' * 20}", model=HOSTILE)
    page = make(work)
    assert not Page(page).open and page.count("<script") == 1 and "<b>bold" not in page
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", page)


def test_commands_make_it_again_without_a_path_of_this_machine(work: Path) -> None:
    page = make(work)
    words = words_of(page)
    assert f"clips shard --heldout-ratio 0.4 --shard-rows 4 --where '{WIDE}' --where" not in words  # no comma in either
    assert "--heldout-ratio 0.4" in words and "--shard-rows 4" in words and WIDE in words
    assert str(work) not in page and str(Path.home()) + "/" not in page


def test_signed_addresses_do_not_reach_the_page(work: Path) -> None:
    stamps = work / ".stages"
    stamps.mkdir()
    about = {"config": {"source": "https://lists.test/a.parquet?X-Amz-Signature=0123456789abcdef", "threads": 4}}
    (stamps / "download.done.json").write_text(json.dumps(about))
    page = make(work)
    assert "0123456789abcdef" not in page and "clips download" in page and "--threads 4" in page


def test_the_name_of_the_list_is_safe(work: Path) -> None:
    assert report_marks.file_name("a/b \"c'.x") == "marks-a-b-c-.x.jsonl"
