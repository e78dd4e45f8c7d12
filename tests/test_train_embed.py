"""Stored features of teachers: what is stored, resumption and refusals, and what training reads of it."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shardmaker
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cli.main import main
from clips_data import ledger
from clips_data.errors import ResumeRefused, UserError
from clips_train import features, generate, shards, transforms
from clips_train.config import TrainConfig
from clips_train.embed import Embedded, embed
from clips_train.losses import distillation_loss
from clips_train.model import build_model
from clips_train.teacher import NoFeatures, Teacher
from clips_train.tokenizer import build_tokenizer
from clips_train.train import train
from clips_train.use_config import EmbedConfig

ROOT = Path(__file__).resolve().parent.parent
VIEWS = ("web", {"from": "synthetic", "reduce": "truncate"})


def tiny_clip(folder: Path, *, image_px: int, width: int, scale: float, seed: int) -> str:
    """A random model that stock open_clip loads."""
    import open_clip

    about = {
        "model_cfg": {
            "embed_dim": width,
            "vision_cfg": {"image_size": image_px, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
            "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.CLIP(**about["model_cfg"])
    torch.nn.init.constant_(model.logit_scale, float(np.log(scale)))
    folder.mkdir()
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    (folder / "open_clip_config.json").write_text(json.dumps(about))
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "small": tiny_clip(folder / "small", image_px=16, width=12, scale=20.0, seed=0),
        "large": tiny_clip(folder / "large", image_px=32, width=20, scale=60.0, seed=1),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "shards", size_px=90)  # tars of 12, 12 and 8


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, data: Path, models: dict[str, str]) -> Path:
    out = tmp_path_factory.mktemp("work") / "embeddings" / "teacher"
    run(data, out, models["small"])
    return out


def write_shards(folder: Path, **given: Any) -> Path:
    """With sidecars, as ``clips shard`` leaves them."""
    shardmaker.write_shards(folder, **given)
    for tar in sorted(folder.glob("*.tar")):
        unit, names = tar.stem, [tar.name, f"{tar.stem}.index.parquet"]
        for name in names:
            (folder / name).rename(ledger.part(folder / name))
        ledger.commit(folder, unit, names, inputs={}, config={}, counts={})
    return folder


def run(data: Path, out: Path, *model: str, quiet: bool = True, **given: Any) -> Embedded:
    known = ("only", "part", "limit", "overwrite", "dry_run")
    about = {name: given.pop(name) for name in known if name in given}
    config = EmbedConfig(**{"model": model, "num_augmentations": 3, "precision": "fp32", "batch": 8, **given})
    return embed(config, shards=data, out=out, runs=data.parent / "runs", quiet=quiet, **about)


def config(**change: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "size": "tiny", "image_px": 16, "context_length": 24, "batch": 8, "decoder": "none", "caption_weight": 0,
        "views": VIEWS, "teacher": "teacher",
    }  # fmt: skip
    return TrainConfig(**settings | change)


def open_teacher(data: Path, out: Path, **change: Any) -> Teacher:
    teacher = Teacher.open(train_split(data), config(teacher=out.name, **change), out.parent)
    assert teacher is not None
    return teacher


def train_split(data: Path) -> shards.Split:
    return shards.open_split(data, shards.TRAIN)


def live(model: str, data: bytes, text: str, *, side_px: int, augmentation: int, key: str) -> tuple[Tensor, Tensor]:
    """Unit features by stock open_clip."""
    import open_clip

    stock, _ = open_clip.create_model_from_pretrained(f"local-dir:{model}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{model}")
    pixels = transforms.training_view(lambda: data, side_px, "full", seed=0, epoch=augmentation, key=key)
    with torch.inference_mode():
        image_1E = stock.encode_image((pixels[None] / 255 - 0.5) / 0.25, normalize=True)
        text_1E = stock.encode_text(tokenize([text]), normalize=True)
    return image_1E[0], text_1E[0]


# --- what is stored ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2), ("fp16", 1e-3)])
def test_stored_features_are_those_of_the_teacher_on_the_pictures_that_training_draws(
    tmp_path: Path, data: Path, models: dict[str, str], precision: str, tolerance: float
) -> None:
    run(data, tmp_path / "teacher", models["small"], precision=precision)
    teacher = open_teacher(data, tmp_path / "teacher")
    reader = shards.ShardReader(train_split(data))
    for shard, row, augmentation in [(0, 0, 0), (0, 11, 2), (1, 5, 1), (2, 7, 2)]:
        about, key = reader.about(shard, row), reader.key(shard, row)
        found = teacher.features(shard, row, augmentation, ("web", "synthetic"))
        for number, column in enumerate(("web", "synthetic")):
            image_E, text_E = live(
                models["small"], reader.image(shard, row), about[column], side_px=16, augmentation=augmentation, key=key
            )
            torch.testing.assert_close(found["image"], image_E, atol=tolerance, rtol=0)
            torch.testing.assert_close(found[f"view.{number}"], text_E, atol=tolerance, rtol=0)
    images = [teacher.features(0, 0, a, ())["image"] for a in range(3)]
    assert min(float((a - b).abs().max()) for a, b in itertools.combinations(images, 2)) > tolerance


def test_an_ensemble_gives_unit_features_whose_logits_are_the_mean_of_the_teachers(
    tmp_path: Path, data: Path, models: dict[str, str]
) -> None:
    run(data, tmp_path / "two", models["small"], models["large"])
    raw = load_file(tmp_path / "two" / "train-00000.safetensors")
    assert raw["image"].shape == (12, 3, 32) and raw["text.web"].shape == raw["text.synthetic"].shape == (12, 32)
    for start, stop in ((0, 12), (12, 32)):
        norms = raw["image"][..., start:stop].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    teacher = open_teacher(data, tmp_path / "two")
    found = teacher.features(0, 4, 1, ("web", "synthetic"))
    assert found["scale"] == teacher.scale == pytest.approx(40)
    assert float(found["image"].norm()) == pytest.approx(1, abs=1e-5)
    reader = shards.ShardReader(train_split(data))
    data_, text, key = reader.image(0, 4), reader.about(0, 4)["web"], reader.key(0, 4)
    logits = []
    for name, side_px, scale in (("small", 16, 20.0), ("large", 32, 60.0)):
        image_E, text_E = live(models[name], data_, text, side_px=side_px, augmentation=1, key=key)
        logits.append(scale * float(image_E @ text_E))
    assert teacher.scale * float(found["image"] @ found["view.0"]) == pytest.approx(sum(logits) / 2, abs=1e-3)


@pytest.mark.parametrize("text_padding", ["reference", "trimmed"])
def test_a_run_of_ours_teaches_with_its_own_preprocessing_and_padding(
    tmp_path: Path, data: Path, text_padding: str
) -> None:
    settings = config(teacher=None, samples=8, text_padding=text_padding, precision="fp32", device="cpu")
    train(settings, shards=data, out=tmp_path / "runs" / "first", quiet=True)
    done = run(data, tmp_path / "teacher", f"run:{tmp_path}/runs/first", augment="none", num_augmentations=1)
    assert done.counts == {"ok": 32}
    teacher = open_teacher(data, tmp_path / "teacher", augment="none")
    trained, reader = generate.load_trained(tmp_path / "runs" / "first", "cpu"), shards.ShardReader(train_split(data))
    ids_1L = trained.tokenizer.text_ids([reader.about(1, 2)["synthetic"]], settings.context_length)
    mask_1L = None
    if text_padding == "trimmed":
        slots_L = torch.arange(settings.context_length)
        end = int((ids_1L[0] == trained.tokenizer.eos_id).int().argmax())
        mask_1L = (slots_L <= end)[None] | (slots_L == settings.context_length - 1)
    picture = transforms.squash(transforms.decode(reader.image(1, 2), settings.image_px), settings.image_px)
    with torch.inference_mode():
        image_1E, _ = trained.model.encode_image(transforms.normalise(picture[None]))
        text_1E, _ = trained.model.encode_text(ids_1L, mask_1L)
    found = teacher.features(1, 2, 0, ("synthetic",))
    torch.testing.assert_close(found["image"], image_1E[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found["view.0"], text_1E[0], atol=1e-5, rtol=0)
    assert teacher.scale == pytest.approx(float(trained.model.logit_scale.detach().exp()))


def test_a_student_of_another_size_sees_the_same_crop_and_colours() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((540, 360), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    for epoch in range(12):
        large, small = (
            transforms.training_view(file.getvalue, side_px, "full", seed=5, epoch=epoch, key="k").float()
            for side_px in (96, 32)
        )
        assert float((torch.nn.functional.avg_pool2d(large, 3) - small).abs().mean()) < 4, "of 255"
    other = transforms.training_view(file.getvalue, 32, "full", seed=5, epoch=0, key="other").float()
    assert float((other - small).abs().mean()) > 12


def test_bad_images_and_missing_captions_are_flagged_counted_and_have_no_features(
    tmp_path: Path, models: dict[str, str]
) -> None:
    def spoil(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        if number == 3:
            return image[:-60], about
        if number == 5:
            return b"<html>", about
        if number == 9:
            return image, about | {"synthetic": " "}
        return image, about

    data = write_shards(tmp_path / "shards", change=spoil)
    done = run(data, tmp_path / "teacher", models["small"])
    assert done.counts == {"ok": 29, "decode_failed": 1, "not_an_image": 1, "caption_missing": 1}
    raw = load_file(tmp_path / "teacher" / "train-00000.safetensors")
    assert raw["there.image"].tolist() == [row not in (3, 5) for row in range(12)]
    assert raw["there.synthetic"].tolist() == [row not in (3, 5, 9) for row in range(12)]
    assert raw["image"].isnan().any(2).all(1).tolist() == [row in (3, 5) for row in range(12)]
    assert raw["text.synthetic"].isnan().any(1).tolist() == [row in (3, 5, 9) for row in range(12)]
    assert not raw["text.web"][9].isnan().any()
    assert [bytes(key.tolist()).decode() for key in raw["keys"]] == [f"{number:09d}" for number in range(12)]
    teacher = open_teacher(data, tmp_path / "teacher")
    with pytest.raises(NoFeatures, match="no_teacher_image"):
        teacher.features(0, 3, 0, ())
    with pytest.raises(NoFeatures, match="no_teacher_text"):
        teacher.features(0, 9, 0, ("web", "synthetic"))
    with pytest.raises(NoFeatures, match="no_teacher_text"):
        teacher.features(0, 0, 0, ("web", None))
    assert issubclass(NoFeatures, shards.ShardError), "the data side counts it as a bad sample"


def test_threads_processes_and_batches_change_nothing(
    tmp_path: Path, data: Path, stored: Path, models: dict[str, str]
) -> None:
    run(data, tmp_path / "processes", models["small"], num_workers=2)
    for file in sorted(stored.glob("*.safetensors")):
        assert (tmp_path / "processes" / file.name).read_bytes() == file.read_bytes()
    run(data, tmp_path / "one", models["small"], batch=1)
    for name, tensor in load_file(tmp_path / "one" / "train-00001.safetensors").items():
        torch.testing.assert_close(tensor, load_file(stored / "train-00001.safetensors")[name], atol=1e-5, rtol=0)


@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 3), st.integers(1, 5)),
    dtype=st.sampled_from(list(features.TYPES.values())),
    step=st.integers(1, 4),
    keys=st.lists(st.text(alphabet="0123456789é", min_size=1, max_size=9), min_size=7, max_size=7),
)
def test_what_is_written_in_any_order_is_read_by_stock_safetensors(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    step: int,
    keys: list[str],
) -> None:
    rows, augmentations, width = shape
    path = tmp_path_factory.mktemp("features") / "file.safetensors"
    image, text = torch.randn(shape), torch.randn(rows, width)
    layout = features.layout(keys[:rows], ("web",), num_augmentations=augmentations, width=width, dtype=dtype)
    writer = features.FeatureWriter(path, layout, {"teachers": "[]"})
    for first in reversed(range(0, rows, step)):
        writer.write("image", first, image[first : first + step])
        writer.write("text.web", first, text[first : first + step])
    writer.write("there.web", 0, torch.arange(rows) % 2 == 0)
    writer.write_keys(keys[:rows])
    writer.close()
    found = load_file(path)
    assert torch.equal(found["image"], image.to(dtype)) and torch.equal(found["text.web"], text.to(dtype))
    assert torch.equal(found["there.web"], torch.arange(rows) % 2 == 0) and not found["there.image"].any()
    assert [bytes(key.tolist()).rstrip(b"\0").decode() for key in found["keys"]] == keys[:rows]


# --- resuming and refusing --------------------------------------------------------------------------------------------


def test_a_kill_at_any_commit_leaves_what_the_next_run_completes_to_the_same_bytes(
    tmp_path: Path, data: Path, stored: Path, models: dict[str, str]
) -> None:
    out = tmp_path / "teacher"
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from clips_data import ledger\n"
        "from clips_train.use_config import EmbedConfig\n"
        "from clips_train.embed import embed\n"
        "commit = ledger.commit\n"
        "def killed(folder, unit, *given, **named):\n"
        "    os.kill(os.getpid(), 9) if unit == 'train-00001' else commit(folder, unit, *given, **named)\n"
        "ledger.commit = killed\n"
        f"config = EmbedConfig(model={models['small']!r}, num_augmentations=3, precision='fp32', batch=8)\n"
        f"embed(config, shards=Path({str(data)!r}), out=Path({str(out)!r}), runs=Path(), quiet=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == -9
    assert ledger.finished_units(out) == ["train-00000"] and (out / "train-00001.safetensors.part").exists()
    assert not (out / "index.json").exists()
    with pytest.raises(UserError, match=r"1 of its shards finished.*clips embed"):
        open_teacher(data, out)
    again = run(data, out, models["small"])
    assert (again.made, again.skipped, again.counts) == (2, 1, {"ok": 32})
    assert {path.name: path.read_bytes() for path in out.glob("*.*")} == {
        path.name: path.read_bytes() for path in stored.glob("*.*")
    }


def test_a_second_run_skips_and_loads_no_model(
    data: Path, stored: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    monkeypatch.delattr(open_clip, "create_model_from_pretrained")
    again = run(data, stored, models["small"], batch=3, num_workers=1)
    assert (again.made, again.skipped, again.counts) == (0, 3, {"ok": 32})
    assert again.files == [stored / f"train-{number:05d}.safetensors" for number in range(3)]
    assert run(data, stored, models["small"], dry_run=True).facts == {"shards_to_do": 0}


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"num_augmentations": 2}, {"augment": "crop"}, {"columns": ("web",)}, {"model": ("large",)}]
)
def test_another_config_or_teacher_is_refused(
    data: Path, stored: Path, models: dict[str, str], change: dict[str, Any]
) -> None:
    if "model" in change:
        change = {"model": (models["large"],)}
    with pytest.raises(ResumeRefused, match="finished with other inputs or another config"):
        run(data, stored, models["small"], **change)


def test_changed_shards_are_refused_and_made_again_on_demand(tmp_path: Path, models: dict[str, str]) -> None:
    data = write_shards(tmp_path / "shards", num_train=12, shard_rows=6)
    run(data, tmp_path / "teacher", models["small"])

    def change(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        return image, about | ({"web": "another caption"} if number == 8 else {})

    write_shards(data, num_train=12, shard_rows=6, change=change)
    with pytest.raises(ResumeRefused, match=r"train-00001 was finished with other inputs.*\n.*input shards"):
        run(data, tmp_path / "teacher", models["small"])
    with pytest.raises(ResumeRefused, match=r"made from shards with digest.*clips embed --name teacher"):
        open_teacher(data, tmp_path / "teacher")
    done = run(data, tmp_path / "teacher", models["small"], overwrite=True)
    assert (done.made, done.skipped) == (1, 1), "the tar that did not change is left as it is"
    open_teacher(data, tmp_path / "teacher")


def test_further_shards_are_missing_work(tmp_path: Path, models: dict[str, str]) -> None:
    data = write_shards(tmp_path / "shards", num_train=12, shard_rows=6)
    run(data, tmp_path / "teacher", models["small"])
    write_shards(data, num_train=18, shard_rows=6)
    with pytest.raises(ResumeRefused, match="adds what is missing"):
        open_teacher(data, tmp_path / "teacher")
    done = run(data, tmp_path / "teacher", models["small"])
    assert (done.made, done.skipped) == (1, 2)
    assert open_teacher(data, tmp_path / "teacher").features(2, 5, 0, ("web", "web"))


def test_slices_and_limits_make_whole_shards_and_the_last_slice_the_index(
    tmp_path: Path, data: Path, stored: Path, models: dict[str, str]
) -> None:
    out = tmp_path / "teacher"
    assert [path.name for path in run(data, out, models["small"], part=(1, 2)).files] == ["train-00001.safetensors"]
    with pytest.raises(UserError, match=r"limit 3 is less than the \d+ samples of train-0000\d"):
        run(data, out, models["small"], limit=3)
    assert run(data, out, models["small"], limit=15).made == 1
    assert ledger.finished_units(out) == ["train-00000", "train-00001"] and not (out / "index.json").exists()
    run(data, out, models["small"], part=(0, 2))
    assert (out / "index.json").read_bytes() == (stored / "index.json").read_bytes()
    run(data, out, models["small"], split="heldout", only=["heldout-00000"])
    assert list(json.loads((out / "index.json").read_text())["splits"]) == ["heldout", "train"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nothing-such", "is no open_clip model, folder or run"),
        ("ViT-B-32", r"ViT-B-32:TAG, with one of .*openai"),
        ("run:first", r"There is no run .*first"),
        ("local-dir:nowhere", r"nowhere has no open_clip_config.json"),
    ],
)
def test_teachers_that_are_not_there_are_named(tmp_path: Path, data: Path, model: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(data, tmp_path / "teacher", model)
    assert not (tmp_path / "teacher").exists()


def test_tags_and_columns_that_fit_nothing_are_refused(tmp_path: Path, data: Path, models: dict[str, str]) -> None:
    with pytest.raises(UserError, match="--pretrained openai belongs to no --model"):
        run(data, tmp_path / "teacher", models["small"], pretrained=("openai",))
    with pytest.raises(UserError, match=r"no column .sintetic.\. Did you mean .synthetic."):
        run(data, tmp_path / "teacher", models["small"], columns=("sintetic",))
    with pytest.raises(ValueError, match="set num_augmentations to 1"):
        EmbedConfig(augment="none")


# --- what training reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"views": ("web", {"from": "synthetic", "reduce": "one_piece"})},
            r"views.1 \(from synthetic, reduce one_piece\)",
        ),
        ({"views": (), "decoder": "queries", "caption_weight": 2}, "nothing to teach"),
        ({"augment": "crop"}, "of pictures with augment full, but the run's is crop"),
    ],
)
def test_a_run_that_the_teacher_cannot_teach_is_told_what_to_change(
    data: Path, stored: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        open_teacher(data, stored, **change)


def test_a_view_of_a_column_without_features_is_named(tmp_path: Path, data: Path, models: dict[str, str]) -> None:
    run(data, tmp_path / "teacher", models["small"], columns=("web",))
    with pytest.raises(UserError, match=r"views.0 \(from mix.*column 'synthetic'.*--columns web,synthetic"):
        open_teacher(data, tmp_path / "teacher", views=({"from": {"web": 0.8, "synthetic": 0.2}},))
    assert open_teacher(data, tmp_path / "teacher", views=("web",)).num_augmentations == 3


def test_without_a_teacher_nothing_is_opened_and_without_features_it_says_what_to_run(
    data: Path, tmp_path: Path
) -> None:
    assert Teacher.open(train_split(data), config(teacher=None), tmp_path) is None
    with pytest.raises(UserError, match=r"no such folder.*Run `clips embed`"):
        open_teacher(data, tmp_path / "nowhere")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "index.json").write_text('{"schema_version": 1}')
    with pytest.raises(UserError, match="is not an index that `clips embed` wrote"):
        open_teacher(data, tmp_path / "broken")


def test_a_missing_or_shortened_file_is_found_when_training_begins(
    tmp_path: Path, data: Path, models: dict[str, str]
) -> None:
    run(data, tmp_path / "teacher", models["small"])
    file = tmp_path / "teacher" / "train-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"promises train-00002.safetensors"):
        open_teacher(data, tmp_path / "teacher")


def test_every_augmentation_is_used_in_turn_from_a_start_that_the_seed_draws(data: Path, stored: Path) -> None:
    teacher = open_teacher(data, stored)
    for key in map(str, range(20)):
        epochs = [teacher.augmentation(7, epoch, key) for epoch in range(6)]
        assert sorted(epochs[:3]) == [0, 1, 2] and epochs[3:] == epochs[:3]
    starts = [[teacher.augmentation(seed, 0, str(key)) for key in range(50)] for seed in (0, 1)]
    assert starts[0] != starts[1] and all({*found} == {0, 1, 2} for found in starts)


def test_a_teacher_sent_to_another_process_reads_the_same(data: Path, stored: Path) -> None:
    teacher = open_teacher(data, stored)
    copy = pickle.loads(pickle.dumps(teacher))
    for name, tensor in teacher.features(2, 1, 2, ("web", "synthetic")).items():
        assert torch.equal(copy.features(2, 1, 2, ("web", "synthetic"))[name], tensor), name


def test_a_student_comes_to_see_pictures_as_the_demo_teacher_does(tmp_path: Path, data: Path) -> None:
    """By distillation alone, in pictures never seen: nearer to its teacher than a student who sees no differences."""
    run(data, tmp_path / "demo", "demo", augment="crop", batch=64)
    teacher = open_teacher(data, tmp_path / "demo", augment="crop")
    settings, reader = config(image_px=32, context_length=12), shards.ShardReader(train_split(data))
    places = [(shard, row) for shard, rows in enumerate(reader.split.num_samples_by_shard[:2]) for row in range(rows)]
    ids_NL = build_tokenizer("bpe").text_ids([reader.about(*at)["web"] for at in places], settings.context_length)
    pictures, told = [], []
    for number in range(3):
        augmented = {"seed": teacher.seed, "epoch": number}
        views = [
            transforms.training_view(partial(reader.image, *at), 32, "crop", key=reader.key(*at), **augmented)
            for at in places
        ]
        pictures.append(transforms.normalise(torch.stack(views)))
        features_of = [teacher.features(*at, number, ("web",)) for at in places]
        told.append([torch.stack([one[name] for one in features_of]) for name in ("image", "view.0")])
    model = build_model(settings.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95))

    def loss(number: int, scale: Tensor) -> Tensor:
        image_NE, text_NE = model.encode_image(pictures[number])[0], model.encode_text(ids_NL)[0]
        return distillation_loss(image_NE, text_NE, scale, *told[number], teacher.scale)

    indifferent, seen = loss(2, torch.tensor(0.0)).item(), []
    for step in range(30):
        optimizer.zero_grad()
        found = loss(step % 2, model.logit_scale.exp())
        found.backward()
        optimizer.step()
        seen.append(found.item())
    assert seen[-1] < 0.5 * seen[0] and loss(2, model.logit_scale.exp()).item() < 0.7 * indifferent


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_under_embeddings_and_refuses_with_exit_code_4(
    tmp_path: Path, models: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "shards", num_train=12, shard_rows=6)
    words = [
        "embed",
        "--name",
        "small",
        "--model",
        models["small"],
        "--num-augmentations",
        "2",
        "--work",
        str(tmp_path),
    ]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(tmp_path / f"embeddings/small/train-0000{n}.safetensors") for n in range(2)]
    assert "embed: 2 made, 0 skipped" in err and "12 of 12 succeeded" in err and "augmented_images_per_s" in err
    assert main([*words, "--seed", "3"]) == 4
    assert "config seed: 0 before, 3 now" in capsys.readouterr().err
    assert main([*words, "--slice", "0/2", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["skipped"] == 1 and answer["counts"] == {"ok": 6}
