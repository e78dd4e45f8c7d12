"""``clips eval`` as people see it: what is said above the table of a benchmark."""

from __future__ import annotations

from typing import Any

from cli.scores import about_of


def result(**data: Any) -> dict[str, Any]:
    scores = {"text_to_image_r1": {"value": 0.5, "low": 0.25, "high": 0.625}}
    return {"data": data, "scores": scores, "interval": {"level": 0.95}}


def test_a_table_tells_the_number_of_images_and_what_its_figures_are() -> None:
    assert (
        about_of("mine", {"run:a": {"mine": result(num_images=50)}}, compare=False)
        == "50 images; figures in % ± the larger half of their 95 % intervals"
    )
    held = {**result(), "num_images": 500}
    assert about_of("heldout", {"run:a": {"heldout": held}, "demo": {}}, compare=False).startswith("500 images; ")
    assert about_of("winoground", {"run:a": {"winoground": result()}}, compare=False).startswith("figures in %")


def test_fewer_images_than_the_published_figures_are_of_are_told() -> None:
    part = {"run:a": {"coco": result(num_images=50, num_images_of_protocol=5000)}}
    assert about_of("coco", part, compare=True).startswith("50 images, of 5000 in the protocol; ")
    whole = {"run:a": {"coco": result(num_images=5000, num_images_of_protocol=5000)}}
    assert about_of("coco", whole, compare=True).startswith("5000 images; ")


def test_a_comparison_with_nothing_published_says_so() -> None:
    assert about_of("mine", {"a": {"mine": result()}}, compare=True).endswith("; no published figures are known")
    assert "published" not in about_of("coco", {"a": {"coco": result()}}, compare=True)
