"""Zero-shot classification: its figures against CLIP_benchmark's, its prompts, folders and lists that are not right."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import peermaker
import pytest
import shardmaker
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clips_data.errors import UserError
from clips_train.encoders import Encoder
from clips_train.evals import format_folder, prompts, zero_shot
from clips_train.evals.formats import open_data
from clips_train.evals.grouped import mean_of_shares
from clips_train.evals.items import DataSet, Item
from clips_train.evals.outcome import Outcome
from clips_train.evals.zero_shot import classify
from clips_train.use_config import Benchmark, EvalConfig

COLOURS = sorted(shardmaker.COLOURS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody trained it, so that it is right and wrong about equally often."""
    return peermaker.write_export(tmp_path_factory.mktemp("model"), image_px=32, seed=3)


@pytest.fixture(scope="module")
def encoder(exported: Path) -> Encoder:
    return peermaker.ours(exported)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """48 shapes in folders by colour, the folders of unequal size."""
    return write_folders(tmp_path / "pictures")


def write_folders(root: Path, num_images: int = 48, classes: int = 8) -> Path:
    for number in range(num_images):
        colour = shardmaker.COLOURS[number % 8]
        if COLOURS.index(colour) < classes and number // 8 <= 2 + COLOURS.index(colour) % 4:
            (root / colour).mkdir(parents=True, exist_ok=True)
            (root / colour / f"{number:03d}.jpg").write_bytes(shardmaker.sample(number)[0])
    return root


def benchmark(data: Path, **settings: Any) -> Benchmark:
    return Benchmark(name="shapes", data=str(data), task="zero_shot", **settings)


def scored(encoder: Encoder, bench: Benchmark, **settings: Any) -> Outcome:
    config = EvalConfig(**settings)
    return zero_shot.score(encoder, format_folder.open(bench), config, bench)


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("templates", ["openai", "photo"])
@pytest.mark.parametrize("num_classes", [8, 3])
def test_figures_equal_clip_benchmarks_to_the_last_digit(
    exported: Path, encoder: Encoder, tmp_path: Path, templates: str, num_classes: int
) -> None:
    from clip_benchmark.metrics import zeroshot_classification as peer
    from torchvision.datasets import ImageFolder

    root = write_folders(tmp_path / "pictures", classes=num_classes)
    model, transform, tokenizer = peermaker.theirs(exported)
    loader = torch.utils.data.DataLoader(ImageFolder(str(root), transform=transform), batch_size=5)
    texts = list(prompts.templates(templates).texts)
    theirs = peer.evaluate(model, loader, tokenizer, loader.dataset.classes, texts, "cpu", amp=False)

    outcome = scored(encoder, benchmark(root, templates=templates), batch=7)
    assert 0 < theirs["mean_per_class_recall"] < 1
    assert torch.tensor(outcome.figures["top1"].value) == torch.tensor(theirs["acc1"])
    assert torch.tensor(outcome.figures["mean_per_class_recall"].value) == torch.tensor(theirs["mean_per_class_recall"])
    if num_classes < 5:
        assert "top5" not in outcome.figures and "3 classes" in outcome.about["top5"]
    else:
        assert torch.tensor(outcome.figures["top5"].value) == torch.tensor(theirs["acc5"])

    weights_EC = peer.zero_shot_classifier(model, tokenizer, COLOURS[:num_classes], texts, "cpu", amp=False)
    logits_NC, labels_N = peer.run_classification(model, weights_EC, loader, "cpu", amp=False)
    confused = {(entry["true"], entry["predicted"]): entry["n"] for entry in outcome.details["confused"]}
    for label, other in zip(labels_N.tolist(), logits_NC.argmax(1).tolist(), strict=True):
        if label != other:
            confused[COLOURS[label], COLOURS[other]] -= 1
    assert not any(confused.values())


def test_figures_of_a_webdataset_equal_clip_benchmarks_with_its_classes_and_templates(
    exported: Path, encoder: Encoder, tmp_path: Path
) -> None:
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_classification as peer

    files = {"classnames.txt": "\n".join(COLOURS), "zeroshot_classification_templates.txt": "a {c} shape\n{c}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "nshards.txt").write_text("2")
    for shard in range(2):
        with tarfile.open(tmp_path / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard * 15, shard * 15 + 15):
                label = COLOURS.index(shardmaker.COLOURS[number % 8])
                for ext, content in (("cls", str(label).encode()), ("jpg", shardmaker.sample(number)[0])):
                    member = tarfile.TarInfo(f"s{number:04d}.{ext}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    model, transform, tokenizer = peermaker.theirs(exported)
    dataset = build_wds_dataset("shapes", transform, data_dir=str(tmp_path))
    loader = torch.utils.data.DataLoader(dataset.batched(4), batch_size=None)
    theirs = peer.evaluate(model, loader, tokenizer, dataset.classes, dataset.templates, "cpu", amp=False)

    bench = benchmark(tmp_path)
    outcome = zero_shot.score(encoder, open_data(bench), EvalConfig(batch=7), bench)
    assert outcome.counts["images.scored"] == 30 and outcome.about["first_prompt"] == "a black shape"
    for ours, name in (("top1", "acc1"), ("top5", "acc5"), ("mean_per_class_recall", "mean_per_class_recall")):
        assert torch.tensor(outcome.figures[ours].value) == torch.tensor(theirs[name])


def test_recalls_by_class_average_to_the_mean_and_have_an_interval_around_it(encoder: Encoder, pictures: Path) -> None:
    outcome = scored(encoder, benchmark(pictures))
    by_class = outcome.details["per_class"]
    figure = outcome.figures["mean_per_class_recall"].shown(seed=0)
    assert sum(entry["recall"] for entry in by_class) / 8 == pytest.approx(figure["value"])
    assert (
        sum(entry["n"] for entry in by_class) == outcome.counts["images.scored"] == len(list(pictures.rglob("*.jpg")))
    )
    assert figure["low"] <= figure["value"] <= figure["high"] and figure["chance"] == 1 / 8
    assert outcome.details["misses"][0]["margin"] >= outcome.details["misses"][-1]["margin"] > 0
    assert all(miss["true"] != miss["predicted"] and miss["rank"] > 1 for miss in outcome.details["misses"])


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=1, max_size=20),
    st.lists(st.integers(-3, 3).filter(bool), min_size=3, max_size=6),
    st.data(),
)
def test_ranks_count_the_classes_that_come_before_with_the_lower_number_first_among_ties(
    images: list[list[int]], weights: list[int], data: st.DataObject
) -> None:
    image_NE = torch.tensor(images).float()
    class_DE = torch.tensor([[float(w), 1.0, 0.0] for w in weights])
    feature_C = torch.tensor(data.draw(st.lists(st.integers(0, len(weights) - 1), min_size=2, max_size=8)))
    label_N = torch.tensor(
        data.draw(st.lists(st.integers(0, len(feature_C) - 1), min_size=len(images), max_size=len(images)))
    )
    answers = classify(image_NE, label_N, class_DE, feature_C)
    for row, label, rank, predicted in zip(
        image_NE @ class_DE[feature_C].T, label_N.tolist(), answers.rank_N, answers.predicted_N, strict=True
    ):
        order = sorted(range(len(row)), key=lambda number: (-float(row[number]), number))
        assert order.index(label) == rank and order[0] == predicted


def test_model_that_sees_nothing_scores_like_chance_and_says_that_everything_ties() -> None:
    image_NE, class_DE = torch.ones(40, 4) / 2, torch.ones(10, 4) / 2
    answers = classify(image_NE, torch.arange(40) % 10, class_DE, torch.arange(10))
    figures = zero_shot.figures(answers, 10)
    assert [figures[name].value for name in ("top1", "top5", "mean_per_class_recall")] == [0.1, 0.5, 0.1]
    assert bool(answers.tied_N.all())


def test_classes_of_one_name_tie_exactly_and_the_first_of_them_is_taken(encoder: Encoder, pictures: Path) -> None:
    (pictures / "blue").rename(pictures / "green_")
    outcome = scored(encoder, benchmark(pictures))
    assert outcome.about["equal_names"] == 0  # "green " differs from "green"
    names = pictures.parent / "names.txt"
    names.write_text("\n".join(["missile", "a", "missile", "b"]))
    for label, colour in enumerate(("red", "white", "yellow", "purple")):
        (pictures / colour).rename(pictures / str(label))
    for other in ("black", "green", "green_", "orange"):
        assert (pictures / other).is_dir()
    with pytest.raises(UserError, match=r"'black' in .* is none of the 4 classes"):
        format_folder.open(benchmark(pictures, classes=str(names)))
    items = [
        Item(path.as_posix(), path.read_bytes, label=label)
        for label in range(4)
        for path in sorted((pictures / str(label)).glob("*.jpg"))
    ]
    bench = benchmark(pictures, classes=str(names))
    outcome = zero_shot.score(encoder, DataSet(items, {}), EvalConfig(), bench)
    assert outcome.about["equal_names"] == 1
    assert outcome.counts["images.tied"] == sum(item.label in (0, 2) for item in items)
    assert {entry["label"]: entry["recall"] for entry in outcome.details["per_class"]}[2] == 0


def test_mean_of_shares_leaves_out_groups_without_answers() -> None:
    figure = mean_of_shares(torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 3, 3]))
    assert figure.value == 0.75
    low, high = figure.interval(seed=1)
    assert 0 <= low < 0.75 < high <= 1


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_named_templates_are_open_clips_and_the_papers_add_the_bare_name_and_are_canonical() -> None:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    assert prompts.templates("openai").prompts("cat") == [text("cat") for text in OPENAI_IMAGENET_TEMPLATES]
    assert prompts.templates("simple").prompts("cat") == [text("cat") for text in SIMPLE_IMAGENET_TEMPLATES]
    assert prompts.templates("photo").prompts("cat") == ["a photo of a cat."]
    paper = prompts.templates("clip_paper")
    found = paper.prompts("Great_white shark, kite (bird of prey),")
    assert len(paper.texts) == 81 and len(found) == 162
    assert found[0] == "a bad photo of a great white shark" and found[80] == "great white shark"
    assert found[161] == "kite bird of prey" and "a closeup photo of a kite bird of prey" in found


def test_imagenets_classes_are_in_the_order_of_labels_and_its_parts_are_clip_benchmarks() -> None:
    import inspect
    import re

    from clip_benchmark.datasets import builder

    whole = prompts.class_names("imagenet")
    assert len(whole.names) == len(set(whole.synsets)) == 1000
    assert list(whole.synsets) == list(builder.all_imagenet_wordnet_ids)
    source = inspect.getsource(builder.build_dataset)
    for subset, variable in (("imagenet-a", "imagenet_a_wnids"), ("imagenet-r", "imagenet_r_wnids")):
        line = re.search(rf"{variable} = .*", source)
        assert line is not None
        ids = set(re.findall(r"n\d{8}", line[0]))
        part = prompts.class_names(subset)
        assert part.synsets == tuple(synset for synset in whole.synsets if synset in ids)
        assert part.names == tuple(whole.names[whole.synsets.index(synset)] for synset in part.synsets)


def test_labels_are_said_by_id_then_name_then_number_and_the_first_of_equal_names_is_meant() -> None:
    classes = prompts.ClassNames(("missile", "2", "red kite", "missile"), "ours", ("n00000009", "n00000008"))
    words = ("missile", "2", "3", "red_kite", "red kite", "n00000008", "4", "-1", "kite")
    assert [classes.label(word) for word in words] == [0, 1, 3, 2, 2, 1, None, None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "holds no templates"), ("a {c}\n\nb {c}", "Line 2"), ("a photo", "would be the same for every class")],
)
def test_template_files_that_cannot_be_right_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.txt"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        prompts.templates(str(file))


def test_unknown_names_of_templates_and_classes_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="'clip_paper'"):
        prompts.templates("clip-paper")
    with pytest.raises(UserError, match="'imagenet-a'"):
        prompts.class_names("imagenet_a")


def test_templates_of_the_data_are_used_unless_others_are_asked_for(encoder: Encoder, pictures: Path) -> None:
    bench = benchmark(pictures)
    data = format_folder.open(bench)
    own = DataSet(data.items, data.about, classes=data.classes, templates=["itap of {c}", "{c}"])
    assert zero_shot.score(encoder, own, EvalConfig(), bench).about["first_prompt"] == "itap of black"
    asked = benchmark(pictures, templates="photo")
    assert zero_shot.score(encoder, own, EvalConfig(), asked).about["first_prompt"] == "a photo of a black."
    with pytest.raises(UserError, match="same for every class"):
        zero_shot.score(encoder, DataSet(data.items, {}, classes=data.classes, templates=["x"]), EvalConfig(), bench)


# --- data that is not right -------------------------------------------------------------------------------------------


def test_unreadable_images_are_left_out_and_counted(encoder: Encoder, pictures: Path) -> None:
    whole = {folder.name: len(list(folder.iterdir())) for folder in pictures.iterdir()}
    (pictures / "black" / "000.jpg").write_bytes(b"no image")
    (pictures / "red" / "zz.jpg").write_bytes((pictures / "red" / "000.jpg").read_bytes()[:-100])
    outcome = scored(encoder, benchmark(pictures))
    assert outcome.counts["images"] == sum(whole.values()) + 2
    assert outcome.counts["images.scored"] == sum(whole.values())
    assert outcome.counts["images.bad.not_an_image"] == outcome.counts["images.bad.decode_failed"] == 1
    assert {entry["name"]: entry["n"] for entry in outcome.details["per_class"]} == whole


def test_data_without_any_readable_image_is_an_error(encoder: Encoder, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="None of 2 images can be used: not_an_image 2"):
        scored(encoder, benchmark(tmp_path))


def test_class_without_images_competes_and_is_stated(encoder: Encoder, pictures: Path) -> None:
    (pictures / "aquamarine_blue").mkdir()
    (pictures / ".cache").mkdir()
    outcome = scored(encoder, benchmark(pictures))
    assert outcome.counts["classes"] == 9 and outcome.counts["classes.without_images"] == 1
    assert outcome.about["classes_without_images"] == ["aquamarine blue"]
    assert len(outcome.details["per_class"]) == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "has no folders of classes"),
        (lambda root: [(root / name).mkdir() for name in "ab"], "hold no images"),
        (lambda root: [(root / name).mkdir() for name in ("n01440764", "n01443537")], "WordNet ids"),
        (lambda root: [(root / name).mkdir() for name in ("test", "val")], "has no split 'dev'"),
    ],
)
def test_folders_that_are_no_classes_are_refused(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path)
    split = "dev" if "split" in message else None
    with pytest.raises(UserError, match=message):
        format_folder.open(benchmark(tmp_path, split=split))


def test_labels_outside_of_the_classes_and_single_classes_are_refused(encoder: Encoder, pictures: Path) -> None:
    items = [Item("x", (pictures / "red" / "000.jpg").read_bytes, label=7)]
    bench = benchmark(pictures)
    with pytest.raises(UserError, match=r"1 of the 1 labels .* none of its 2 classes, such as 7 of 'x'"):
        zero_shot.score(encoder, DataSet(items, {}, classes=["a", "b"]), EvalConfig(), bench)
    with pytest.raises(UserError, match="has 1 class to tell apart"):
        zero_shot.score(encoder, DataSet(items, {}, classes=["a"]), EvalConfig(), bench)
    with pytest.raises(UserError, match=r"None of the 1 images of shapes .* has a class"):
        zero_shot.score(encoder, DataSet([Item("x", bytes)], {}, classes=["a", "b"]), EvalConfig(), bench)


def test_folders_of_imagenet_are_known_by_id_and_those_of_v2_by_number(tmp_path: Path) -> None:
    picture = shardmaker.sample(0)[0]
    for folder in ("n01443537", "n15075141"):
        (tmp_path / "a" / "val" / folder).mkdir(parents=True)
        (tmp_path / "a" / "val" / folder / "x.JPEG").write_bytes(picture)
    data = format_folder.open(benchmark(tmp_path / "a", classes="imagenet", split="val"))
    assert [item.label for item in data.items] == [1, 999] and len(data.classes) == 1000
    assert data.items[0].key == "n01443537/x.JPEG" and data.about["split"] == "val"
    for folder in ("10", "2", "999"):
        (tmp_path / "v2" / folder).mkdir(parents=True)
        (tmp_path / "v2" / folder / "0.jpeg").write_bytes(picture)
    data = format_folder.open(benchmark(tmp_path / "v2", classes="imagenet", max_samples=2))
    assert [item.label for item in data.items] == [10, 2]
    with pytest.raises(UserError, match=r"n01443537' .* none of the 200 classes of imagenet-a"):
        format_folder.open(benchmark(tmp_path / "a", classes="imagenet-a"))


def test_objectnet_is_read_as_clip_benchmark_reads_it(tmp_path: Path) -> None:
    from clip_benchmark.datasets.objectnet import ObjectNetDataset

    names = {"air_freshener": "Air freshener", "banana": "Banana", "alarm_clock": "Alarm clock", "t_shirt": "T-shirt"}
    shared = {"Banana": "banana", "Alarm clock": "analog clock; digital clock", "T-shirt": "jersey, T-shirt"}
    maps = {
        "folder_to_objectnet_label": names,
        "objectnet_to_imagenet_1k": shared,
        "pytorch_to_imagenet_2012_id": {str(number): number for number in range(4)},
    }
    for name, content in maps.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "imagenet_to_label_2012_v2").write_text("banana\nanalog clock\ndigital clock\njersey, T-shirt\n")
    for folder in names:
        (tmp_path / "objectnet-1.0" / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9), "red").save(tmp_path / "objectnet-1.0" / "images" / folder / "x.png")
    theirs = ObjectNetDataset(str(tmp_path), None)
    ours = format_folder.open(benchmark(tmp_path))
    assert list(ours.classes) == theirs.classes == ["alarm clock", "banana", "t-shirt"]
    assert [item.label for item in ours.items] == [theirs[number][1] for number in range(len(theirs))] == [0, 1, 2]
    assert ours.about["folders_of_other_classes"] == 1 and "kept" in ours.about["border"]


# --- lists of labels --------------------------------------------------------------------------------------------------

LISTS = {
    "labels.csv": "filename,label\nx.jpg,red_kite\nsub/y.jpg,cow\n",
    "labels.tsv": "image\tclass\nx.jpg\tred kite\nsub/y.jpg\tcow\n",
    "labels.jsonl": '{"path": "x.jpg", "cls": "red_kite"}\n{"path": "sub/y.jpg", "cls": "cow"}\n',
    "labels.json": '[{"file": "x.jpg", "label": "red_kite"}, {"file": "sub/y.jpg", "label": "cow"}]',
    "labels.txt": "x.jpg red_kite\nsub/y.jpg cow\n",
}


def write_listed(root: Path) -> Path:
    (root / "sub").mkdir(parents=True)
    for name in ("x.jpg", "sub/y.jpg"):
        (root / name).write_bytes(shardmaker.sample(0)[0])
    return root


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_labels_are_read_in_their_order(tmp_path: Path, name: str) -> None:
    root = write_listed(tmp_path / "data")
    (tmp_path / name).write_text(LISTS[name])
    data = format_folder.open(benchmark(root, annotations=str(tmp_path / name)))
    assert [(item.key, data.classes[item.label or 0]) for item in data.items] == [
        ("x.jpg", "red kite"),
        ("sub/y.jpg", "cow"),
    ]
    assert data.items[1].read() == shardmaker.sample(0)[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "x.jpg cow\nz.jpg cow", r"1 of the 2 images .* are not in .*: z.jpg"),
        ("a.txt", "../a.txt cow", "does not lie in"),
        ("a.txt", "/etc/hostname cow", "does not lie in"),
        ("a.txt", "//etc/hostname cow", "does not lie in"),
        ("a.txt", "x.jpg cow\nx.jpg hen", "twice"),
        ("a.txt", "x.jpg", "Line 1 of .* has no label"),
        ("a.txt", "x.jpg 3", "are numbers, and nothing names their classes"),
        ("a.csv", "file,number\nx.jpg,cow", "names no label"),
        ("a.csv", "", "holds no image"),
        ("a.json", "{", "cannot be read as json"),
        ("a.jsonl", "3", "row 1 is no object"),
        ("a.jsonl", '{"label": 3}', "Row 1 of .* names no image"),
    ],
)
def test_lists_that_cannot_be_right_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    root = write_listed(tmp_path / "data")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        format_folder.open(benchmark(root, annotations=str(tmp_path / name)))


def test_labels_by_number_need_a_class_each(tmp_path: Path) -> None:
    root = write_listed(tmp_path / "data")
    (tmp_path / "names.txt").write_text("cow\nred kite\n")
    settings = {"annotations": str(tmp_path / "a.txt"), "classes": str(tmp_path / "names.txt")}
    (tmp_path / "a.txt").write_text("x.jpg 1\nsub/y.jpg cow")
    assert [item.label for item in format_folder.open(benchmark(root, **settings)).items] == [1, 0]
    (tmp_path / "a.txt").write_text("x.jpg 2")
    with pytest.raises(UserError, match=r"label '2' .* none of the 2 classes"):
        format_folder.open(benchmark(root, **settings))
