"""The table of published figures: every number as METHOD has it, and in the names and units of our own results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clips_train.evals import benchmarks, published

METHOD = Path(__file__).resolve().parents[2] / "shared" / "METHOD.md"
NUMBER = r"\d+\.\d"
RECALLS = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
R1 = ["image_to_text_r1", "text_to_image_r1"]
FIGURES = [*RECALLS, "top1"]


def method(section: str) -> str:
    if not METHOD.is_file():
        pytest.skip("METHOD.md lies beside the checkout of who has it")
    found = re.search(rf"### {re.escape(section)} .*?\n(.*?)\n##", METHOD.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


def table(section: str) -> list[list[str]]:
    lines = [line for line in method(section).splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("*", "") for cell in line.strip("|").split("|")] for line in lines]


def values(benchmark: str, model: str, source: str, figures: list[str]) -> list[float]:
    """In the order of ``figures``, in percent."""
    found = {
        row.figure: row.value
        for row in published.rows(benchmark, figures)
        if row.model == model and source in row.source
    }
    return [round(100 * found[figure], 4) for figure in figures if figure in found]


def test_retrieval_of_equal_training_is_as_in_method() -> None:
    size, checked = "", 0
    for first, model, *cells in table("7.1"):
        size = first or size
        printed = [float(number) for cell in cells for number in re.findall(NUMBER, cell)]
        assert len(printed) == 12
        name = f"{model} {size}"
        found = [value for one in ("coco", "flickr30k") for value in values(one, name, "retrieval.png", RECALLS)]
        assert found == printed, name
        checked += 1
    assert checked == len({row.model for row in published.rows("coco", RECALLS) if "retrieval.png" in row.source}) == 9


def test_the_comparison_with_others_is_as_in_method() -> None:
    names = {row.model for row in published.rows("imagenet", FIGURES) if "sota.png" in row.source}
    for printed_name, *cells in table("7.2"):
        name = next(name for name in names if printed_name.startswith(name))
        names.remove(name)
        imagenet, coco, flickr = ([float(number) for number in re.findall(NUMBER, cell)] for cell in cells)
        assert values("imagenet", name, "sota.png", ["top1"]) == imagenet
        assert values("coco", name, "sota.png", R1) == coco
        assert values("flickr30k", name, "sota.png", R1) == flickr
    assert not names


def test_openvision_is_as_in_method() -> None:
    imagenet, coco = method("7.5").split("COCO T→I/I→T R@1:")
    without_notes = re.sub(r"\(.*?\)", "", imagenet.partition("IN-1K:")[2])
    printed_by_size = re.findall(rf"(\S+) ({NUMBER}(?:/{NUMBER})+)", without_notes)
    assert len(printed_by_size) == 5
    for name, printed in printed_by_size:
        found = [row.value for row in published.rows("imagenet", ["top1"]) if row.model == f"OpenVision {name}"]
        assert [round(100 * value, 4) for value in found] == [float(value) for value in printed.split("/")], name
    rows = {(row.model, row.data, row.figure): row.value for row in published.rows("coco", R1)}
    pairs = re.findall(rf"(\S+)@(\d+) ({NUMBER})/({NUMBER})", coco)
    assert len(pairs) == 6
    for name, px, text_to_image, image_to_text in pairs:
        model = next(f"OpenVision {full}" for full in ("S/16", "B/16", "L/14", "SoViT-400M", "H/14") if name in full)
        found = [rows[model, f"{px} px", figure] for figure in R1]
        assert [round(100 * value, 4) for value in found] == [float(image_to_text), float(text_to_image)]


@pytest.mark.parametrize("benchmark", ["coco", "flickr30k", "imagenet"])
def test_rows_are_shares_on_known_benchmarks_with_their_source(benchmark: str) -> None:
    rows = published.rows(benchmark, FIGURES)
    assert benchmark in benchmarks.KNOWN
    assert rows and all(0 < row.value < 1 and row.source and row.data for row in rows)
    assert len({(row.model, row.data, row.figure, row.source) for row in rows}) == len(rows)


def test_only_what_is_asked_for_comes() -> None:
    assert {row.figure for row in published.rows("coco", ["text_to_image_r5"])} == {"text_to_image_r5"}
    assert published.rows("coco", ["top1"]) == published.rows("winoground", FIGURES) == []
