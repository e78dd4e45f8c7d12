"""What the report says of caption columns: figures with denominators, and on the demo world how much of it is true."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pairsmaker
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data import report, report_captions, stats
from clips_data.config import ReportConfig
from clips_data.demo import facts, scenes, truth, web
from clips_data.executor import Job

WORLD = 11
HOSTILE = "<script>alert(1)</script>\x1b[31m"


def demo_pair(number: int, row: pairsmaker.Row) -> None:
    row.update(web.demo_rows(number + 1, WORLD)[number])


def true_caption(number: int, row: pairsmaker.Row) -> None:
    """Every second caption describes another scene."""
    shown = number if number % 2 else number + 1
    row["caption"] = scenes.describe(scenes.make_scene(WORLD, shown))


def words_of(page: str) -> str:
    found: list[str] = []
    parser = html.parser.HTMLParser()
    parser.handle_data = found.append  # type: ignore[method-assign]
    parser.feed(page)
    return re.sub(r"\s+", " ", " ".join(found))


def rendered(work: Path) -> str:
    return words_of(report_captions.render(stats.gather(work), work))


def write_figures(work: Path, column: str, **change: Any) -> None:
    figures = {
        "rows": 5, "tokens": 1234, "prompt_tokens": 5, "seconds": 7200.0, "captions_per_s": 2.5, "tokens_per_s": 61.0,
        "gpu_hours": 0.0, "num_gpus": 0, "device": "cpu", "engine": "vllm", "engine_version": "0.32.0",
        "engine_deaths": 1, "reused": 2,
    }  # fmt: skip
    (work / "captions" / column / "00000_stats.json").write_text(json.dumps(figures | change))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_columns_are_shown_with_makers_rules_and_cost(tmp_path: Path) -> None:
    def change(number: int, row: pairsmaker.Row) -> None:
        if number == 0:
            pairsmaker.reject(row)
        row["flags"] = ["hit_token_cap", "url"] if number < 3 else []
        row["finish_reason"] = "length" if number < 3 else "stop"

    pairsmaker.write_pairs(tmp_path)
    pairsmaker.write_captions(tmp_path, change=change)
    pairsmaker.write_captions(tmp_path, "other")
    write_figures(tmp_path, "synthetic")
    words = rendered(tmp_path)
    assert "synthetic demo, prompt describe, vllm 0 9 of 10 16 20 30.0 % of 10 10.0 % of 10 0.0 % of 9" in words
    assert "synthetic hit_token_cap 3 of 10 30.0 % synthetic url 3 of 10 30.0 %" in words
    assert "synthetic vllm 0.32.0 on cpu 2.5 61 1 234 2 CPU 2 of 5 1" in words
    assert words.count(" on cpu") == 1 and "Facts" not in words


def test_hours_are_those_of_the_device_that_worked(tmp_path: Path) -> None:
    pairsmaker.write_work(tmp_path)
    write_figures(tmp_path, "synthetic", num_gpus=1, gpu_hours=2.0, device="NVIDIA H200")
    assert "on NVIDIA H200" in rendered(tmp_path) and " 2 GPU " in rendered(tmp_path)
    write_figures(tmp_path, "synthetic", device="http://127.0.0.1:8000/v1")
    assert " 2 server " in rendered(tmp_path)


def test_hostile_names_stay_text_on_the_page(tmp_path: Path) -> None:
    pairsmaker.write_pairs(tmp_path)
    pairsmaker.write_captions(tmp_path, change=lambda number, row: row.update(flags=[HOSTILE]))
    write_figures(tmp_path, "synthetic", device=HOSTILE, engine=HOSTILE)
    page = report.run(ReportConfig(), Job(work=tmp_path, quiet=True)).units[0].read_text()
    assert "<script" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;alert(1)") == 4  # flag, engine, and its device at two places
    assert "Caption columns" in page


def test_without_columns_there_is_no_section(tmp_path: Path) -> None:
    pairsmaker.write_pairs(tmp_path)
    assert report_captions.render(stats.gather(tmp_path), tmp_path) == ""


# --- facts ------------------------------------------------------------------------------------------------------------


def test_facts_of_every_column_are_counted_on_the_same_images(tmp_path: Path) -> None:
    pairsmaker.write_pairs(tmp_path, change=demo_pair)
    pairsmaker.write_captions(tmp_path, change=true_caption)
    pairsmaker.write_captions(tmp_path, "refused", change=lambda number, row: pairsmaker.reject(row))
    found = report_captions.facts(tmp_path, ["synthetic", "refused"])
    assert list(found) == ["web", "synthetic", "refused"]
    assert {total["num_captions"] for total in found.values()} == {10}
    assert len({total["facts"] for total in found.values()}) == 1
    numbers = [number for number in range(12) if number % 6 != pairsmaker.FAILED_ROW]
    urls = [web.demo_rows(number + 1, WORLD)[number]["url"] for number in numbers]
    shown = [int(re.findall(r"/(\d+)\.jpg", url)[0]) for url in urls]
    right = facts.total(
        facts.score(scenes.describe(scenes.make_scene(WORLD, n if n % 2 else n + 1)), scenes.make_scene(WORLD, index))
        for n, index in zip(numbers, shown, strict=True)
    )
    assert {name: found["synthetic"][name] for name in right} == right
    assert found["synthetic"]["hallucination"] == pytest.approx(1 - found["synthetic"]["precision"])
    assert (found["refused"]["precision"], found["refused"]["recall"], found["refused"]["claims"]) == (None, 0, 0)
    words = rendered(tmp_path)
    total = found["synthetic"]
    assert (
        f"synthetic 10 {100 * total['precision']:.1f} % of {total['claims']} {100 * total['hallucination']:.1f} % "
        f"of {total['claims']} {100 * total['recall']:.1f} % of {total['facts']} {total['claims'] / 10:.4g}" in words
    )
    assert f"refused 10 – – 0.0 % of {total['facts']} 0" in words


def test_other_images_have_no_facts(tmp_path: Path) -> None:
    pairsmaker.write_work(tmp_path)
    assert report_captions.facts(tmp_path, ["synthetic"]) == {}


def test_only_so_many_captions_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairsmaker.write_pairs(tmp_path, change=demo_pair)
    pairsmaker.write_captions(tmp_path, change=true_caption)
    monkeypatch.setattr(report_captions, "MOST_FACTS", 4)
    first = report_captions.facts(tmp_path, ["synthetic"])
    assert first["synthetic"]["num_captions"] == 4 and report_captions.facts(tmp_path, ["synthetic"]) == first


@pytest.mark.parametrize("rest", ["7/3.jpg", "7/3.jpg?fault=noai"])
def test_the_scene_is_told_by_the_url(rest: str) -> None:
    assert truth.scene_of(truth.URL_START + rest) == scenes.make_scene(7, 3)


@pytest.mark.parametrize(
    "url", [None, "", "http://images.test/scenes/7/3.jpg", truth.URL_START, truth.URL_START + "7/3.png", "http://["]
)
def test_other_urls_show_no_scene(url: str | None) -> None:
    assert truth.scene_of(url) is None


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_every_url_of_the_demo_list_names_its_scene(world: int, index: int) -> None:
    row = web.demo_rows(1, world)[0]
    scene = truth.scene_of(row["url"])
    assert scene == truth.scene_named(row["scene"]) == scenes.make_scene(world, 0)
    assert truth.judge([(scenes.describe(scene), scene)])["hallucination"] == 0
    assert truth.scene_of(f"{truth.URL_START}{world}/{index}.jpg") == scenes.make_scene(world, index)
