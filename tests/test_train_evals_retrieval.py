"""Retrieval on data sets: equal to CLIP_benchmark's, and never a silent number."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runmaker
import shardmaker
import torch
from PIL import Image
from torch import Tensor

from clips_data.demo import scenes
from clips_data.errors import UserError
from clips_train import encoders
from clips_train.encoders import Encoder, Named
from clips_train.evals import embedding, formats, retrieval
from clips_train.evals.items import DataSet, Item
from clips_train.evals.outcome import Outcome
from clips_train.export import export
from clips_train.use_config import Benchmark, EvalConfig, ExportConfig

NUM_IMAGES, NUM_CAPTIONS = 30, 5
SIZE_PX = 64
PEER = """
import json, sys, types
import open_clip, torch
from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn
from clip_benchmark.metrics import zeroshot_retrieval
from clip_benchmark.webdataset_builder import convert_retrieval_dataset

torch.set_num_threads(1)
wds, rows, *models = sys.argv[1:]
rows = [(open(path, "rb").read(), captions) for path, captions in json.load(open(rows))]
# Its loader starts eight processes, to read what is in memory here already.
torch.utils.data.DataLoader, loader = (lambda dataset, **_: iter(dataset)), torch.utils.data.DataLoader
convert_retrieval_dataset(rows, "test", wds, image_format="png", max_count=25, verbose=False)
torch.utils.data.DataLoader = loader
found = {}
for folder in models:
    model, transform = open_clip.create_model_from_pretrained("local-dir:" + folder, device="cpu")
    model.eval()
    tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
    for batch in (16, 30):
        dataset = build_dataset("wds/test", root=wds, transform=transform, split="test", task="zeroshot_retrieval")
        batches = torch.utils.data.DataLoader(dataset.batched(batch), batch_size=None, shuffle=False, num_workers=0)
        found[f"{folder}/{batch}"] = zeroshot_retrieval.evaluate(
            model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10]
        )
print(json.dumps(found))
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True)
class World:
    """The same pictures and captions as Karpathy's list and as CLIP_benchmark's tars, and what it scores on them."""

    karpathy: Path
    wds: Path
    models: dict[str, Path]
    theirs: dict[str, dict[str, float]]


def png(scene: scenes.Scene) -> bytes:
    file = io.BytesIO()
    scenes.draw_scene(scene).resize((SIZE_PX + 16, SIZE_PX)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("retrieval")
    run = runmaker.write_run(folder / "run", image_px=32, context_length=24)
    export(ExportConfig(formats=("open_clip",)), run=run, shards=shardmaker.write_shards(folder / "shards"))
    (demo,) = encoders.find(["demo"], [], Path())
    models = {"tiny": run / "export", "demo": Path(demo.source.removeprefix(encoders.LOCAL))}
    karpathy = folder / "flickr"
    (karpathy / "images").mkdir(parents=True)
    rows, listed, seen = [], [], set()
    for index in range(1000):
        scene = scenes.make_scene(9, index)
        captions = scenes.five_captions(scene)
        if seen & set(captions) or len(set(captions)) < NUM_CAPTIONS:
            continue  # which of two equal texts comes first is a matter of chance there
        seen |= set(captions)
        path = karpathy / "images" / f"{index}.png"
        path.write_bytes(png(scene))
        rows.append([str(path), captions])
        sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
        listed.append({"filename": path.name, "split": "test", "sentences": sentences})
        if len(rows) == NUM_IMAGES:
            break
    (karpathy / "dataset_flickr30k.json").write_text(json.dumps({"dataset": "flickr30k", "images": listed}))
    (folder / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, "-c", PEER, str(folder / "wds"), str(folder / "rows.json"), *map(str, models.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    named = {f"{name}/{batch}": theirs[f"{path}/{batch}"] for name, path in models.items() for batch in (16, 30)}
    return World(karpathy, folder / "wds", models, named)


def loaded(folder: Path) -> Encoder:
    (named,) = encoders.find([f"local-dir:{folder}"], [], Path())
    return encoders.load(named, "cpu", "fp32")


def scored(encoder: Encoder, data: Path, **change: Any) -> Outcome:
    batch = change.pop("batch", 16)
    benchmark = Benchmark(name="own", data=str(data), task="retrieval", **change)
    return retrieval.score(encoder, formats.open_data(benchmark), EvalConfig(batch=batch), benchmark)


def single(value: float) -> float:
    """As CLIP_benchmark has it: the nearest float32."""
    (nearest,) = struct.unpack("f", struct.pack("f", value))
    return float(nearest)


# --- equal to CLIP_benchmark ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny", "demo"])
@pytest.mark.parametrize(("their_batch", "our_batch", "files"), [(16, 16, "wds"), (30, 7, "karpathy")])
def test_recalls_equal_clip_benchmarks_to_the_last_digit(
    world: World, model: str, their_batch: int, our_batch: int, files: str
) -> None:
    theirs, data = world.theirs[f"{model}/{their_batch}"], {"wds": world.wds, "karpathy": world.karpathy}[files]
    outcome = scored(loaded(world.models[model]), data, batch=our_batch, captions_per_image=5)
    for k in (1, 5, 10):
        assert single(outcome.figures[f"text_to_image_r{k}"].value) == theirs[f"image_retrieval_recall@{k}"]
        assert single(outcome.figures[f"image_to_text_r{k}"].value) == theirs[f"text_retrieval_recall@{k}"]
    assert outcome.counts == {"images.scored": NUM_IMAGES, "texts.scored": NUM_IMAGES * NUM_CAPTIONS}


def test_the_trained_model_is_told_from_chance(world: World) -> None:
    figure = scored(loaded(world.models["demo"]), world.karpathy).figures["text_to_image_r1"]
    low, high = figure.interval()
    assert figure.chance is not None and figure.chance < low < figure.value < high < 1


def test_a_run_scores_as_its_export(world: World, tmp_path: Path) -> None:
    run = runmaker.write_run(tmp_path / "run", image_px=32, context_length=24)
    encoder = encoders.load(encoders.run_in(run), "cpu", "fp32")
    theirs = world.theirs["tiny/16"]
    assert single(scored(encoder, world.wds).figures["text_to_image_r5"].value) == theirs["image_retrieval_recall@5"]


# --- what the numbers are made of -------------------------------------------------------------------------------------


class Seer:
    """An encoder that sees an image's mean colour, and reads texts as numbers: ``0.25`` is the angle of a feature."""

    width = 2
    device = torch.device("cpu")
    tokenizer, context_length, trained = "seer", 8, None
    named = Named("seer", "run", "", None, "")

    def __init__(self) -> None:
        self.preprocessing = encoders.Preprocessing(8, "squash", "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.passes: list[int] = []

    def image_features(self, pixels_NCHW: Tensor) -> Tensor:
        self.passes.append(len(pixels_NCHW))
        angles_N = pixels_NCHW.mean((1, 2, 3))
        return torch.stack([angles_N.cos(), angles_N.sin()], dim=1)

    def text_features(self, texts: list[str]) -> Tensor:
        self.passes.append(len(texts))
        angles_N = torch.tensor([float(text.split()[0]) for text in texts])
        return torch.stack([angles_N.cos(), angles_N.sin()], dim=1)


def grey(share: float) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (round(share * 255),) * 3).save(file, "PNG")
    return file.getvalue()


def items(*texts: tuple[str, ...]) -> list[Item]:
    """Image n of ten is grey n/10."""
    return [Item(f"{number}.png", partial(grey, number / 10), texts_of) for number, texts_of in enumerate(texts)]


def of(rows: list[Item], **change: Any) -> Outcome:
    benchmark = Benchmark(name="own", data="there", task="retrieval", **change)
    return retrieval.score(Seer(), DataSet(rows, {"path": "there"}), EvalConfig(batch=4), benchmark)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_leave_with_their_texts_and_are_counted_by_reason() -> None:
    rows = items(*[(f"{number / 10}", f"{number / 10} again") for number in range(8)])

    def gone() -> bytes:
        raise FileNotFoundError

    rows[1] = dataclasses.replace(rows[1], read=gone)
    rows[2] = dataclasses.replace(rows[2], read=lambda: b"no picture at all")
    rows[3] = dataclasses.replace(rows[3], read=lambda: grey(0.3)[:45])
    rows[4] = dataclasses.replace(rows[4], read=bomb)
    found = of(rows)
    assert found.counts == {
        "images.scored": 4, "texts.scored": 8, "texts.of_bad_images": 8, "images.bad.missing": 1,
        "images.bad.not_an_image": 1, "images.bad.decode_failed": 1, "images.bad.too_many_pixels": 1,
    }  # fmt: skip
    assert found.figures["text_to_image_r1"].value == 1
    assert found.figures["text_to_image_r1"].chance == 1 / 4


def bomb() -> bytes:
    """A PNG of 11,000 × 11,000 pixels by its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 11_000, 11_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_images_with_fewer_captions_than_asked_for_are_counted() -> None:
    texts = [tuple(f"{number / 10} {way}" for way in range(4 if number < 2 else 5)) for number in range(6)]
    found = of(items(*texts), captions_per_image=5)
    assert found.counts["images.with_4_captions"] == 2
    assert found.counts["texts.scored"] == 28
    assert found.about["captions_per_image"] == 5


def test_a_unit_is_an_image_with_all_of_its_captions() -> None:
    figures = of(items(("0.0", "0.5"), ("0.1",), ("0.2",))).figures
    assert figures["text_to_image_r1"].units_UD.tolist() == [[1, 2], [1, 1], [1, 1]]
    assert figures["image_to_text_r1"].units_UD.tolist() == [[1, 1], [1, 1], [1, 1]]


def test_recalls_that_every_ranking_has_are_left_out_and_named() -> None:
    found = of(items(*[(f"{number / 10}",) for number in range(5)]))
    assert sorted(found.figures) == ["image_to_text_r1", "text_to_image_r1"]
    assert sorted(found.about["figures_left_out"]) == [
        "image_to_text_r10", "image_to_text_r5", "text_to_image_r10", "text_to_image_r5",
    ]  # fmt: skip


@pytest.mark.parametrize("number", [0, 1])
def test_fewer_than_two_images_are_no_gallery(number: int) -> None:
    with pytest.raises(UserError, match=r"None of 0 images|at least two"):
        of(items(*[("0.0",)] * number))


def test_equal_texts_tie_and_are_found_as_a_random_order_would_find_them() -> None:
    """Of two texts that tie for two images each is first half of the time, of three a third of it."""
    one_tie = of(items(("0.0",), ("0.0",), ("0.25",), ("0.9",))).figures
    assert one_tie["image_to_text_r1"].value == (1 / 2 + 1 / 2 + 1 + 0) / 4
    two_ties = of(items(("0.0",), ("0.0",), ("0.0",), ("0.9",))).figures
    assert two_ties["image_to_text_r1"].value == pytest.approx((1 / 3 + 1 / 3 + 1 / 3 + 0) / 4)
    assert two_ties["text_to_image_r1"].value == 2 / 4


def test_hardest_misses_name_what_came_first() -> None:
    rows = items(("0.9 " + "x" * 5000,), ("0.0",), *[(f"{number / 10}",) for number in range(2, 8)])
    hardest = of(rows).details["hardest"]
    assert [(miss["key"], miss["rank"]) for miss in hardest] == [("0.png", 8), ("1.png", 2)]
    assert hardest[0]["first"] == ["7.png", "6.png", "5.png"] and hardest[1]["first"][0] == "0.png"
    assert len(hardest[0]["text"]) == retrieval.SHOWN_CHARS + 1


def test_features_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="no numbers, for 1 of 3"):
        of(items(("0.0",), ("0.1",), ("nan",)))


def test_each_text_is_embedded_once_and_batches_are_as_asked() -> None:
    seer = Seer()
    texts = ["0.1", "0.2", "0.1", "0.3", "0.2"]
    text_ME = embedding.embed_texts(seer, texts, EvalConfig(batch=1))  # type: ignore[arg-type]
    assert seer.passes == [3]
    assert torch.equal(text_ME, seer.text_features(texts))
    seer.passes.clear()
    rows = [item.read for item in items(*[("0",)] * 10)]
    pictures = embedding.embed_images(seer, rows, EvalConfig(batch=4))  # type: ignore[arg-type]
    assert seer.passes == [4, 4, 2]
    assert list(pictures.numbers) == list(range(10)) and pictures.image_NE.shape == (10, 2)


def test_pictures_are_decoded_a_bounded_way_ahead() -> None:
    seer, asked, most = Seer(), [0], [0]

    def read() -> bytes:
        asked[0] += 1
        return grey(0.5)

    def features(pixels_NCHW: Tensor) -> Tensor:
        most[0] = max(most[0], asked[0] - sum(seer.passes))
        seer.passes.append(len(pixels_NCHW))
        return torch.ones(len(pixels_NCHW), 2)

    seer.image_features = features  # type: ignore[method-assign]
    embedding.embed_images(seer, [read] * 400, EvalConfig(batch=2))  # type: ignore[arg-type]
    assert most[0] <= 2 * 8


def test_a_picture_can_be_changed_before_the_models_own_preprocessing() -> None:
    sizes = []

    def cut(picture: Image.Image) -> Image.Image:
        sizes.append(picture.size)
        return picture.crop((2, 2, 10, 8))

    embedding.embed_images(Seer(), [lambda: grey(0.5)], EvalConfig(), prepare=cut)  # type: ignore[arg-type]
    assert sizes == [(12, 10)]


def test_how_many_texts_the_tower_cuts_is_told(world: World, tmp_path: Path) -> None:
    run = runmaker.write_run(tmp_path / "run", context_length=12)
    encoder = encoders.load(encoders.run_in(run), "cpu", "fp32")
    for known in (encoder, loaded(world.models["tiny"])):
        rows = items(("a red circle",), ("a red circle " * 20,))
        data = DataSet(rows, {"path": "there"})
        lengths = retrieval.score(known, data, EvalConfig(), Benchmark(name="own", data="there")).about["text_lengths"]
        budget = known.context_length - 2
        assert lengths == {
            "known": True, "tokens_read": budget, "median_tokens": 60, "most_tokens": 60, "texts_cut": 1,
            "share_cut": 0.5,
        }  # fmt: skip
