"""SugarCrepe and Winoground: their scores by definition and against CLIP_benchmark's, and files that are not right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peermaker
import pytest
import shardmaker
import torch
from PIL import Image
from torch import Tensor

from clips_data.errors import UserError
from clips_train.encoders import Encoder
from clips_train.evals import compositionality, format_sugarcrepe, format_winoground
from clips_train.evals.items import DataSet, Pairing
from clips_train.evals.outcome import Outcome
from clips_train.use_config import Benchmark, EvalConfig

NUM_IMAGES = 12


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peermaker.write_export(tmp_path_factory.mktemp("model"), image_px=32, seed=1)


@pytest.fixture(scope="module")
def encoder(exported: Path) -> Encoder:
    return peermaker.ours(exported)


@pytest.fixture
def sugarcrepe(tmp_path: Path) -> Path:
    """All seven files, of one to seven pairs for each of some images of val2017."""
    root = tmp_path / "sugarcrepe"
    write_images(root / "val2017", ".jpg")
    for size, name in enumerate(format_sugarcrepe.FILES, start=3):
        rows = {}
        for number in range(size):
            captions = shardmaker.sample(number)[1]["extra"]["captions"]
            wrong = shardmaker.sample(number + size)[1]["extra"]["captions"]
            rows[str(2 * number)] = {
                "filename": f"{number % NUM_IMAGES:03d}.jpg",
                "caption": captions[size % 5],
                "negative_caption": wrong[(size + 1) % 5],
            }
        (root / f"{name}.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def winoground(tmp_path: Path) -> Path:
    root = tmp_path / "winoground"
    write_images(root / "images", ".png")
    rows = [
        {
            "id": number,
            **{f"image_{place}": f"{number + place:03d}" for place in (0, 1)},
            **{
                f"caption_{place}": shardmaker.sample(number + place)[1]["synthetic"] + f" {number}" for place in (0, 1)
            },
            "tag": "x",
            "secondary_tag": "Series, Symbolic" if number == 1 else "",
            "collapsed_tag": ("Object", "Relation")[number % 2],
        }
        for number in range(NUM_IMAGES - 1)
    ]
    (root / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def write_images(folder: Path, suffix: str) -> None:
    folder.mkdir(parents=True)
    for number in range(NUM_IMAGES):
        kind = "PNG" if suffix == ".png" else "JPEG"
        (folder / f"{number:03d}{suffix}").write_bytes(shardmaker.sample(number, image_format=kind)[0])


def benchmark(data: Path, **settings: Any) -> Benchmark:
    return Benchmark(name="pairs", data=str(data), task="compositionality", **settings)


def scored(encoder: Encoder, data: DataSet, **settings: Any) -> Outcome:
    return compositionality.score(encoder, data, EvalConfig(**settings), benchmark(Path()))


class Told:
    """An encoder whose features were told: images by their red value, texts by themselves."""

    def __init__(self, images: dict[int, Sequence[float]], texts: dict[str, Sequence[float]]) -> None:
        self.images, self.texts = images, texts
        self.width, self.device = 2, torch.device("cpu")
        self.preprocessing = self

    def resized(self, resize: str) -> Told:
        return self

    def transform(self) -> Callable[[Image.Image], Tensor]:
        return lambda picture: torch.tensor(picture.getpixel((0, 0))[0])

    def image_features(self, pixels: Tensor) -> Tensor:
        return torch.tensor([self.images[int(red)] for red in pixels])

    def text_features(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self.texts[text] for text in texts])


def picture(folder: Path, red: int) -> Callable[[], bytes]:
    path = folder / f"{red}.png"
    Image.new("RGB", (2, 2), (red, 0, 0)).save(path)
    return path.read_bytes


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", format_sugarcrepe.FILES)
def test_accuracy_of_each_file_equals_clip_benchmarks_to_the_last_digit(
    exported: Path, encoder: Encoder, sugarcrepe: Path, name: str
) -> None:
    from clip_benchmark.datasets.sugar_crepe import SugarCrepe

    file = sugarcrepe / f"{name}.json"
    model, transform, tokenizer = peermaker.theirs(exported)
    dataset = SugarCrepe(str(sugarcrepe / "val2017"), str(file), transform=transform)
    theirs = peer_scores(model, dataset, tokenizer)
    data = format_sugarcrepe.open(benchmark(sugarcrepe, annotations=str(file)))
    outcome = scored(encoder, data, batch=4)
    assert outcome.counts["pairs.tied"] == 0
    assert torch.tensor(outcome.figures["accuracy"].value) == torch.tensor(theirs["acc"])
    assert torch.tensor(outcome.figures[f"accuracy_{name}"].value) == torch.tensor(theirs["text_acc"])
    assert outcome.figures["accuracy"].chance == 0.5


def test_winogrounds_scores_equal_clip_benchmarks_to_the_last_digit(
    exported: Path, encoder: Encoder, winoground: Path
) -> None:
    class Examples(torch.utils.data.Dataset[Any]):
        """CLIP_benchmark's WinoGround with the hub's file in place of the hub."""

        def __init__(self) -> None:
            self.rows = [json.loads(line) for line in (winoground / "examples.jsonl").read_text().splitlines()]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> tuple[Tensor, list[str]]:
            row = self.rows[number]
            images = [Image.open(winoground / "images" / f"{row[f'image_{place}']}.png") for place in (0, 1)]
            return torch.stack([transform(image) for image in images]), [row["caption_0"], row["caption_1"]]

    model, transform, tokenizer = peermaker.theirs(exported)
    theirs = peer_scores(model, Examples(), tokenizer)
    outcome = scored(encoder, format_winoground.open(benchmark(winoground)), batch=5)
    assert outcome.counts["pairs.scored"] == NUM_IMAGES - 1 and outcome.counts["images"] == NUM_IMAGES
    for name, peers in (("text_score", "text_acc"), ("image_score", "image_acc"), ("group_score", "acc")):
        assert torch.tensor(outcome.figures[name].value).float() == torch.tensor(theirs[peers]), name
    assert theirs["text_acc"] > 0 or theirs["image_acc"] > 0


def peer_scores(model: Any, dataset: Any, tokenizer: Any) -> dict[str, float]:
    from clip_benchmark.datasets.builder import image_captions_collate_fn
    from clip_benchmark.metrics import image_caption_selection

    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=image_captions_collate_fn)
    scores: dict[str, float] = image_caption_selection.evaluate(model, loader, tokenizer, "cpu", amp=False)
    return scores


def test_accuracy_is_the_mean_of_the_files_and_an_image_is_drawn_anew_with_all_its_pairs(tmp_path: Path) -> None:
    one, two = picture(tmp_path, 1), picture(tmp_path, 2)
    encoder: Any = Told({1: (1, 0), 2: (0, 1)}, {"a": (1, 0), "b": (0, 1)})
    pairings = [
        Pairing("1", (one,), ("a", "b"), tags=("swap_att",)),
        Pairing("2", (two,), ("a", "b"), tags=("swap_att",)),
        Pairing("3", (two,), ("a", "b"), tags=("swap_att",)),
        Pairing("4", (two,), ("a", "b"), tags=("swap_att",)),
        Pairing("5", (two,), ("b", "a"), tags=("add_obj",)),
    ]
    outcome = scored(encoder, DataSet([], {}, pairings))
    assert {name: figure.value for name, figure in outcome.figures.items()} == {
        "accuracy": (1 / 4 + 1) / 2,
        "accuracy_swap_att": 1 / 4,
        "accuracy_add_obj": 1,
    }
    assert len(outcome.figures["accuracy"].units_UD) == 2 and outcome.counts["images"] == 2
    assert [miss["key"] for miss in outcome.details["misses"]] == ["2", "3", "4"]
    assert outcome.details["misses"][0]["margin"] == -1


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"a": (1, 0), "b": (0, 1)}, (1, 1, 1)),
        ({"a": (0, 1), "b": (1, 0)}, (0, 0, 0)),
        # Both images like b better, and each text likes its own image.
        ({"a": (0.2, 0.1), "b": (0.5, 0.6)}, (0, 1, 0)),
        # Both texts like the first image better, and each image its own text.
        ({"a": (1.0, 0.2), "b": (0.5, 0.4)}, (1, 0, 0)),
        # What ties is wrong, wherever it stands.
        ({"a": (0.5, 0.5), "b": (0.5, 0.5)}, (0, 0, 0)),
        ({"a": (1, 0), "b": (0, 0)}, (0, 0, 0)),
    ],
)
def test_winogrounds_scores_are_strict_and_both_ways(
    tmp_path: Path, texts: dict[str, tuple[float, float]], expected: tuple[int, int, int]
) -> None:
    encoder: Any = Told({1: (1, 0), 2: (0, 1)}, texts)
    pairing = Pairing("1", (picture(tmp_path, 1), picture(tmp_path, 2)), ("a", "b"), tags=("Object",))
    outcome = scored(encoder, DataSet([], {}, [pairing]))
    found = tuple(outcome.figures[name].value for name in ("text_score", "image_score", "group_score"))
    assert found == expected
    assert [figure.chance for figure in outcome.figures.values()] == [0.25, 0.25, pytest.approx(1 / 6)]
    assert outcome.details["by_tag"][0]["n"] == 1 and outcome.details["by_tag"][0]["group_score"] == expected[2]


def test_model_that_sees_no_difference_is_never_right(tmp_path: Path) -> None:
    encoder: Any = Told({1: (1, 0)}, {"a": (1, 0), "b": (1, 0)})
    outcome = scored(encoder, DataSet([], {}, [Pairing("1", (picture(tmp_path, 1),), ("a", "b"))]))
    assert outcome.figures["accuracy"].value == 0 and outcome.counts["pairs.tied"] == 1


def test_chance_of_winogrounds_scores_is_what_random_scores_get() -> None:
    scores = torch.rand(20_000, 2, 2, generator=torch.Generator().manual_seed(0))
    pairings = [Pairing(str(number), (bytes, bytes), ("a", "b")) for number in range(len(scores))]
    outcome = compositionality._both_ways(pairings, list(scores), compositionality.Counter())
    for figure in outcome.figures.values():
        assert figure.value == pytest.approx(figure.chance, abs=0.01)


# --- data that is not right -------------------------------------------------------------------------------------------


def test_pairs_with_an_image_that_cannot_be_used_are_left_out_and_counted(encoder: Encoder, winoground: Path) -> None:
    (winoground / "images" / "003.png").write_bytes(b"no image")
    outcome = scored(encoder, format_winoground.open(benchmark(winoground)))
    assert outcome.counts["pairs.unreadable_image"] == 2
    assert outcome.counts["pairs.scored"] == NUM_IMAGES - 3 == len(outcome.figures["text_score"].units_UD)
    for number in range(0, NUM_IMAGES, 2):
        (winoground / "images" / f"{number:03d}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="No pair of pairs has images that can be used"):
        scored(encoder, format_winoground.open(benchmark(winoground)))


def test_data_without_pairs_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="holds no pairs"):
        scored(encoder, DataSet([], {}))


def test_sugarcrepes_seven_files_have_their_names_as_tags(sugarcrepe: Path) -> None:
    data = format_sugarcrepe.open(benchmark(sugarcrepe))
    assert data.about["files"] == list(format_sugarcrepe.FILES)
    assert [pairing.tags for pairing in data.pairings[:4]] == [("add_att",)] * 3 + [("add_obj",)]
    assert data.pairings[1].key == "add_att/2"
    assert data.pairings[0].images[0]() == (sugarcrepe / "val2017" / "000.jpg").read_bytes()
    assert len(format_sugarcrepe.open(benchmark(sugarcrepe, max_samples=2)).pairings) == 2


def test_incomplete_sugarcrepe_is_refused_and_one_file_of_it_is_not(sugarcrepe: Path) -> None:
    (sugarcrepe / "swap_att.json").unlink()
    (sugarcrepe / "swap_obj.json").unlink()
    with pytest.raises(UserError, match=r"lacks swap_att\.json, swap_obj\.json of SugarCrepe's 7 files"):
        format_sugarcrepe.open(benchmark(sugarcrepe))
    one = benchmark(sugarcrepe, annotations=str(sugarcrepe / "replace_rel.json"))
    assert len(format_sugarcrepe.open(one).pairings) == 7


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "should hold"),
        ({}, "should hold"),
        ({"1": {"filename": "000.jpg", "caption": "a"}}, "Row '1' of .* has no text under 'negative_caption'"),
        ({"1": {"filename": "000.jpg", "caption": " ", "negative_caption": "b"}}, "no text under 'caption'"),
        (
            {"1": {"filename": "x.jpg", "caption": "a", "negative_caption": "b"}},
            r"1 of the 1 images .* are not in .*: x.jpg",
        ),
        ({"1": {"filename": "../add_obj.json", "caption": "a", "negative_caption": "b"}}, "does not lie in"),
    ],
)
def test_sugarcrepe_files_that_cannot_be_right_are_refused(sugarcrepe: Path, rows: Any, message: str) -> None:
    (sugarcrepe / "add_att.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        format_sugarcrepe.open(benchmark(sugarcrepe))


def test_winogrounds_tags_and_images_are_read(winoground: Path) -> None:
    data = format_winoground.open(benchmark(winoground))
    assert data.pairings[1].tags == ("Relation", "Series", "Symbolic") and data.pairings[0].tags == ("Object",)
    assert data.pairings[2].images[1]() == (winoground / "images" / "003.png").read_bytes()
    moved = winoground.parent / "elsewhere"
    moved.mkdir()
    (winoground / "examples.jsonl").rename(moved / "examples.jsonl")
    with pytest.raises(UserError, match=r"There is no .*examples\.jsonl"):
        format_winoground.open(benchmark(winoground))
    again = format_winoground.open(benchmark(winoground, annotations=str(moved / "examples.jsonl")))
    assert again.about["digest"] == data.about["digest"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no examples"),
        ("{", "not valid JSON"),
        ('{"image_0": "000", "image_1": "001", "caption_0": "a"}', "Row 0 of .* has no text under 'caption_1'"),
        ('{"image_0": "0", "image_1": "001", "caption_0": "a", "caption_1": "b"}', r"1 of the 2 images .* 0\.png"),
    ],
)
def test_winoground_files_that_cannot_be_right_are_refused(winoground: Path, text: str, message: str) -> None:
    (winoground / "examples.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        format_winoground.open(benchmark(winoground))
