"""Comparing recipes: the same images for all, nothing paid twice, failures told, a page that captions cannot hurt."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pairsmaker
import pyarrow.parquet as pq
import pytest
from talker import HOSTILE, TOKENS, BuildTalker

from cli.main import main
from clips_data import ledger
from clips_data.config import RecaptionConfig
from clips_data.demo import scenes, truth, web
from clips_data.errors import UserError
from clips_data.recaption import choose, compare, compare_table
from clips_data.recaption.compare import Compared, Comparison

NUM_IMAGES = 10
"""Of ``pairsmaker``'s two shards of six, in each of which one download failed."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pairsmaker.write_pairs(tmp_path)
    (tmp_path / "asked.txt").touch()
    monkeypatch.setattr(choose, "build", lambda config, prompt: ("talker", BuildTalker(config.model, tmp_path)))
    monkeypatch.setattr(choose, "model_digest", lambda config: config.model)
    return tmp_path


def num_asked(work: Path, model: str) -> int:
    return (work / "asked.txt").read_text().splitlines().count(model)


def run(work: Path, *models: str, prompts: tuple[str, ...] = ("describe",), **options: Any) -> Compared:
    comparison = Comparison(prompts, models, **{"scorer": None, **options})
    return compare.run(comparison, work, quiet=True)


def column(compared: Compared, name: str) -> dict[str, Any]:
    """The only column of this name, or of this model."""
    (found,) = (column for column in compared.table if name in (column["name"], column.get("model")))
    return found


def captions(compared: Compared) -> list[tuple[str, str]]:
    return [(row["key"], row["caption"]) for row in compared.said[0].columns[""]]


def prompt_file(work: Path, name: str, text: str) -> str:
    path = work / f"{name}.yaml"
    path.write_text(f"about: a test\ninputs: [image]\nuser: Describe it.\n{text}")
    return str(path)


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_every_recipe_captions_the_same_drawn_images(work: Path) -> None:
    compared = run(work, "a", "b", num_rows=4)
    assert compared.num_images == 4
    keys = [[row["key"] for row in one.columns[""]] for one in compared.said]
    assert keys[0] == keys[1] == sorted(keys[0]) and len(set(keys[0])) == 4
    other = run(work, "a", num_rows=4, settings=RecaptionConfig(seed=1))
    assert [row["key"] for row in other.said[0].columns[""]] != keys[0]


def test_a_repeated_comparison_asks_nothing_and_a_new_recipe_only_itself(work: Path) -> None:
    first = run(work, "a")
    again = run(work, "a", "b")
    assert (num_asked(work, "a"), num_asked(work, "b")) == (NUM_IMAGES, NUM_IMAGES)
    assert again.said[0].columns == first.said[0].columns
    assert [one.was_kept for one in again.said] == [True, False]
    assert column(again, "a")["run"]["images_per_s"] == column(first, "a")["run"]["images_per_s"]
    assert any("earlier comparison" in note and "a" in note for note in again.notes)


def test_what_decides_the_captions_is_asked_anew(work: Path) -> None:
    for number, change in enumerate(["", "sampling: {temperature: 1.0}\n", "clean: {first_sentence: true}\n"]):
        run(work, "a", prompts=(prompt_file(work, "p", change),))
        assert num_asked(work, "a") == (number + 1) * NUM_IMAGES


def test_a_recipe_that_stopped_half_way_goes_on_from_there(work: Path) -> None:
    first = run(work, "dies")
    assert "no such device" in first.failures["describe"] and 4 <= num_asked(work, "dies") < NUM_IMAGES
    (work / "mended").touch()
    again = run(work, "dies")
    assert num_asked(work, "dies") == NUM_IMAGES
    assert column(again, "dies")["captions_ok"] == NUM_IMAGES
    assert again.said[0].stats["tokens"] == TOKENS * NUM_IMAGES
    assert captions(again) == captions(run(work, "whole"))
    assert not list(work.glob("compare/*/*.journal.jsonl"))


def test_what_was_said_is_a_finished_unit_with_its_figures_beside_it(work: Path) -> None:
    run(work, "a")
    (table,) = work.glob("compare/*/*.parquet")
    unit = table.name.removesuffix(".parquet")
    sidecar = ledger.read_sidecar(table.parent, unit)
    assert sidecar is not None and list(sidecar.files) == [table.name] and sidecar.counts == {"ok": NUM_IMAGES}
    assert pq.read_table(table).num_rows == NUM_IMAGES
    stats = json.loads((table.parent / f"{unit}_stats.json").read_text())
    assert (stats["rows"], stats["tokens"], stats["device"]) == (NUM_IMAGES, TOKENS * NUM_IMAGES, "cpu")


# --- what fails -------------------------------------------------------------------------------------------------------


def test_a_recipe_whose_engine_fails_is_told_and_the_others_go_on(work: Path) -> None:
    compared = run(work, "broken", "a")
    assert "no such device" in compared.failures["broken"] and list(compared.failures) == ["broken"]
    assert column(compared, "a")["captions_ok"] == NUM_IMAGES
    page = compared.page.read_text()
    assert "no such device" in page and "<b>broken</b> failed" in page


def test_a_recipe_without_a_single_caption_failed(work: Path) -> None:
    compared = run(work, "silent")
    assert compared.failures == {"describe": f"None of {NUM_IMAGES} captions is usable: {NUM_IMAGES} empty."}
    assert column(compared, "silent")["codes"] == {"empty": NUM_IMAGES}
    assert "run" not in column(compared, "silent")


def test_an_unknown_prompt_or_scorer_ends_before_anything_is_asked(work: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'describe'"):
        run(work, "a", prompts=("describe", "descrbe"))
    with pytest.raises(UserError, match="There is no folder /nowhere"):
        run(work, "a", scorer="local-dir:/nowhere")
    assert not num_asked(work, "a")


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_table_has_every_figure_with_its_denominator(work: Path) -> None:
    compared = run(work, "a", "capped")
    lines = {line.label.strip(): line.cells for line in compare_table.lines(compared.table)}
    assert lines["captions"] == [(str(NUM_IMAGES), f"of {NUM_IMAGES}")] * 3
    assert lines["words"][1:] == [("11 / 11", f"of {NUM_IMAGES}"), ("7 / 7", f"of {NUM_IMAGES}")]
    assert lines["tokens"] == [("", ""), ("12 / 12", f"of {NUM_IMAGES}"), ("12 / 12", f"of {NUM_IMAGES}")]
    assert lines["cap hit"][1:] == [("0.0 %", f"of {NUM_IMAGES}"), ("100.0 %", f"of {NUM_IMAGES}")]
    assert lines["clauses"][1] == ("3.0", f"of {NUM_IMAGES} captions")
    assert lines["distinct-3"][1][1] == f"of {9 * NUM_IMAGES} runs"
    assert lines["images/s"][0] == ("", "") and lines["images/s"][1][1] == f"of {NUM_IMAGES}"


def test_hours_and_money_follow_from_the_rate_and_money_is_of_gpus_only() -> None:
    figures = {
        "rows": 50, "seconds": 10.0, "tokens": 1000, "num_gpus": 1, "device": "H200", "engine": "vllm",
        "engine_version": "1", "startup_s": 1.0, "engine_deaths": 0,
    }  # fmt: skip
    gpu = compare_table.of_run(figures, 3.6)
    assert (gpu["images_per_s"], gpu["tokens_per_s"], gpu["hours_are_of"]) == (5.0, 100.0, "GPU")
    assert gpu["hours_per_million_images"] == pytest.approx(200_000 / 3600)
    assert gpu["usd_per_million_images"] == pytest.approx(200.0)
    assert compare_table.of_run(figures, None)["usd_per_million_images"] is None
    cpu = compare_table.of_run({**figures, "num_gpus": 0, "device": "cpu"}, 3.6)
    assert (cpu["hours_are_of"], cpu["usd_per_million_images"]) == ("CPU", None)
    assert cpu["hours_per_million_images"] == gpu["hours_per_million_images"]
    server = compare_table.of_run({**figures, "num_gpus": 0, "device": "endpoint"}, 3.6)
    assert (server["hours_are_of"], server["usd_per_million_images"]) == ("server", None)
    assert compare_table.of_run({**figures, "seconds": 0}, 1.0)["images_per_s"] is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0, "0"),
        (0.01234, "0.0123"),
        (9.999, "10.00"),
        (51.26, "51.3"),
        (7512.4, "7,512"),
        (1e6, "1,000,000"),
    ],
)
def test_rates_have_three_digits_and_no_exponent(value: float | None, text: str) -> None:
    assert compare_table._rate(value)[0] == text


def test_several_outputs_are_measured_each(work: Path) -> None:
    text = "output:\n  long: {kind: text, about: all}\n  tags: {kind: list, about: things, max_items: 4}\n"
    compared = run(work, "a", prompts=(prompt_file(work, "shaped", text),))
    assert [column["name"] for column in compared.table] == ["web caption", "shaped / long", "shaped / tags"]
    assert column(compared, "shaped / tags")["words"]["median"] == 2
    assert "run" in column(compared, "shaped / long") and "run" not in column(compared, "shaped / tags")
    drawn = prompt_file(work, "drawn", "sampling: {temperature: 1.0, num_samples: 2}\n")
    compared = run(work, "a", prompts=(drawn,))
    assert [column["name"] for column in compared.table[1:]] == ["drawn / 0", "drawn / 1"]
    assert all(column["captions"] == NUM_IMAGES for column in compared.table)
    assert column(compared, "drawn / 0")["run"]["rows"] == NUM_IMAGES


def test_claims_are_counted_on_demo_images_only() -> None:
    scene = scenes.make_scene(3, 7)
    assert truth.scene_of(f"http://{web.DEMO_HOST}/scenes/3/7.jpg?fault=redirect") == scene
    for url in (None, "", "http://[", "http://images.test/scenes/3/7.jpg", f"http://{web.DEMO_HOST}/other.jpg"):
        assert truth.scene_of(url) is None
    other = scenes.make_scene(3, 8)
    captions = {"1": scenes.describe(scene), "2": ""}
    facts = compare_table.of_scenes(captions, {"1": scene, "2": other})
    assert facts is not None and (facts["precision"], facts["hallucination"], facts["images"]) == (1.0, 0.0, 2)
    assert (facts["captions"], facts["claims_mean"]) == (1, facts["claims"])
    assert facts["recall"] == pytest.approx(facts["claims"] / facts["facts"], abs=1e-4) and facts["recall"] < 1
    assert compare_table.of_scenes({}, {}) is None


def test_demo_facts_and_similarities_of_a_work_folder(work: Path) -> None:
    def demo(number: int, row: dict[str, Any]) -> None:
        row |= {"url": f"http://{web.DEMO_HOST}/scenes/4/{number}.jpg", "image": web.jpeg(4, number)}
        row["caption"] = scenes.describe(scenes.make_scene(4, number)) if number else "nothing"
        if number == 5:
            row.update(url="http://images.test/5.jpg", image=b"\xff\xd8 no image")

    pairsmaker.write_pairs(work, num_shards=1, change=demo)
    for path in (work / "pairs").glob("00001.*"):
        path.unlink()
    compared = run(work, "a", scorer="demo")
    found = column(compared, "web caption")
    assert found["demo_facts"]["precision"] == 1.0 and found["demo_facts"]["images"] == 4
    assert found["similarity"]["of"] == 4 and found["similarity"]["mean"] > 0.3
    assert column(compared, "a")["similarity"]["of"] == 4
    assert column(compared, "a")["demo_facts"]["recall"] == 0
    assert "This image cannot be decoded" in compared.page.read_text()


def test_without_torch_similarities_are_missing_and_that_is_said(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    compared = run(work, "a", scorer="demo")
    assert any("torch is not installed" in note for note in compared.notes)
    assert not any("similarity" in column for column in compared.table)


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_hostile_captions_prompts_and_names_stay_text(work: Path) -> None:
    pairsmaker.write_pairs(work, change=lambda number, row: row.update(caption=HOSTILE))
    prompt = prompt_file(work, "p", f"system: {json.dumps('</style>' + HOSTILE)}\n")
    text = run(work, "hostile", "broken", prompts=(prompt,)).page.read_text()
    page = Page(text)
    assert not page.open
    assert not {"script", "link", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert sum(tag == "style" for tag, _ in page.tags) == 1
    assert all("href" not in about and not any(name.startswith("on") for name in about) for _, about in page.tags)
    images = [about["src"] or "" for tag, about in page.tags if tag == "img"]
    assert images and all(source.startswith("data:image/jpeg;base64,") for source in images)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "&lt;/style&gt;" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", text)
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("num", [1, 2, 6])
def test_the_page_shows_each_image_once_with_one_part_per_recipe(work: Path, num: int) -> None:
    compared = run(work, *(f"m{i}" for i in range(num)), gallery=6)
    page = Page(compared.page.read_text())
    assert sum(tag == "article" for tag, _ in page.tags) == 6
    assert sum(tag == "img" for tag, _ in page.tags) == 6
    assert sum(tag == "section" for tag, _ in page.tags) == 6 * num
    keys = [one.row.key for one in (*compared.different, *compared.drawn)]
    assert len(set(keys)) == 6


def test_the_gallery_opens_with_the_most_different_and_goes_on_with_drawn_images(work: Path) -> None:
    compared = run(work, "a", "varied", gallery=6)
    assert len(compared.different) == 3 and len(compared.drawn) == 3
    differences = [one.difference for one in compared.different]
    assert differences == sorted(differences, reverse=True) and differences[0] > differences[-1] > 0
    assert all(one.difference <= differences[-1] for one in compared.drawn)
    assert not run(work, "a", "b", gallery=6).different  # they said the same of every image
    assert not run(work, "a", "silent", gallery=6).different  # a rejected caption is no different opinion
    assert run(work, "a", gallery=0).page.read_text().count("<article") == 0


def test_the_same_comparison_gives_the_same_page(work: Path) -> None:
    run(work, "a", "b")
    first = run(work, "a", "b")
    page = first.page.read_bytes()
    again = run(work, "a", "b")
    assert again.page == first.page and again.page.read_bytes() == page


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_table_to_stderr_and_the_page_to_stdout(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", "describe", "--model", "a", "--model", "b", "--scorer", "none", "--work", str(work)]
    assert main([*words, "--limit", "5", "--out", str(work / "page")]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{work / 'page' / 'index.html'}\n"
    assert re.search(r"^captions +5 of 5 +5 of 5 +5 of 5$", printed.err, re.M)
    assert main([*words, "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert not printed.err
    assert [column["name"] for column in found["columns"]] == ["web caption", "a", "b"]
    assert Path(found["page"]).with_name("table.json").exists()


def test_a_failed_recipe_is_exit_code_3_after_the_table(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "describe", "--model", "a", "--model", "broken", "--scorer", "none", "--work", str(work)]
    assert main(words) == 3
    printed = capsys.readouterr()
    assert Path(printed.out.strip()).exists()
    assert "1 of 2 recipes failed. broken: " in printed.err and "no such device" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--seed", "-1"], "--seed is -1"), (["--limit", "0"], "--limit"), (["--price", "0"], "--price")],
)
def test_values_out_of_range_are_usage_errors(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "describe", *words]) == 2
    assert message in capsys.readouterr().err


def test_recipes_are_named_by_what_tells_them_apart(work: Path) -> None:
    assert compare._names(["p"], ["m"]) == ["p"]
    assert compare._names(["p", "q"], ["m"]) == ["p", "q"]
    assert compare._names(["p"], ["m", "n"]) == ["m", "n"]
    assert compare._names(["p", "q"], ["m", "n"]) == ["p · m", "p · n", "q · m", "q · n"]
    assert compare._names(["p", "p"], ["m"]) == ["p #1", "p #2"]
