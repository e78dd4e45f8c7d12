"""The probe: a frozen tower's patch tokens, projector and small Llama that learn to describe, and what is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runmaker import write_run
from shardmaker import write_shards

from clips_data.errors import ResumeRefused, UserError
from clips_train import generate, probe, probe_model, transforms
from clips_train.probe_model import END_ID, PAD_ID, Captioner, FrozenTower
from clips_train.use_config import ProbeConfig

LITTLE: dict[str, Any] = {
    "width": 32, "layers": 1, "heads": 2, "vocab_size": 300, "samples": 48, "batch": 12, "warmup_samples": 12,
    "max_tokens": 40, "precision": "fp32", "log_steps": 1, "device": "cpu",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "little", image_px=32, decoder="none", caption_weight=0, seed=3)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


def probed(run: Path, shards: Path, **change: Any) -> dict[str, Any]:
    overwrite = change.pop("overwrite", False)
    return probe.probe(ProbeConfig(**{**LITTLE, **change}), run=run, shards=shards, overwrite=overwrite, quiet=True)


def result_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "probe" / "probe.json").read_text())
    return found


def captioner(seed: int = 0, **change: Any) -> Captioner:
    sizes = {"tower_width": 8, "width": 32, "layers": 1, "heads": 2, "vocab_size": 300, "num_slots": 40}
    return Captioner(**{**sizes, **change}, seed=seed)


# --- the tower --------------------------------------------------------------------------------------------------------


def test_layers_are_counted_as_transformers_does(run: Path) -> None:
    trained = generate.load_trained(run, "cpu")
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = {layer: FrozenTower(trained, layer).tokens(pixels) for layer in (-3, -2, -1, 0, 1, 2)}
    with torch.no_grad():
        _, last = trained.model.encode_image(transforms.normalise(pixels))
        entering = trained.model.towers.visual._embeds(transforms.normalise(pixels))[:, 1:]
    torch.testing.assert_close(tokens[-1], last)
    torch.testing.assert_close(tokens[0], entering)
    for below, above in ((-3, 0), (-2, 1), (-1, 2)):
        torch.testing.assert_close(tokens[below], tokens[above])
    assert not torch.allclose(tokens[-2], tokens[-1])
    assert tokens[-2].shape == (2, FrozenTower(trained, -2).num_patches, FrozenTower(trained, -2).width)


@pytest.mark.parametrize("layer", [-4, 3])
def test_a_layer_that_is_not_there_is_refused(run: Path, layer: int) -> None:
    with pytest.raises(UserError, match=rf"--layer {layer}: .* has 2 layers\. Name one of -3 to 2"):
        FrozenTower(generate.load_trained(run, "cpu"), layer)


# --- projector and language model -------------------------------------------------------------------------------------


def test_the_loss_is_of_the_caption_and_its_end_alone_each_token_from_what_comes_before() -> None:
    model = captioner().eval()
    tokens = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    ids = probe_model.batch_of([[5, 6, 7, END_ID], [8, END_ID]])
    assert ids.tolist() == [[5, 6, 7, END_ID], [8, END_ID, PAD_ID, PAD_ID]]
    together, right = model.loss(tokens, ids)
    apart = [model.loss(tokens[row : row + 1], ids[row : row + 1, :length]) for row, length in ((0, 4), (1, 2))]
    torch.testing.assert_close(together, apart[0][0] + apart[1][0])
    assert right == apart[0][1] + apart[1][1]
    with torch.no_grad():  # by hand: the whole sequence, logits of one slot before each token
        embed = model.language_model.get_input_embeddings()
        whole = torch.cat([embed(torch.tensor([[1]])), model.projector(tokens[:1]), embed(ids[:1, :-1])], dim=1)
        logits = model.language_model(inputs_embeds=whole).logits[0, -4:].log_softmax(-1)
    torch.testing.assert_close(apart[0][0].detach(), -logits[range(4), ids[0]].sum())


def test_what_is_written_is_the_likeliest_token_again_and_again() -> None:
    model = captioner().eval()
    model.language_model.lm_head.weight.data *= 20  # no ties
    tokens = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(1))
    (written,) = model.write(tokens, 6)
    so_far: list[int] = []
    for _ in range(6):
        ids = probe_model.batch_of([[*so_far, END_ID]])
        embed = model.language_model.get_input_embeddings()
        with torch.no_grad():
            whole = torch.cat([model._read(tokens), embed(ids[:, :-1])], dim=1)
            best = int(model.language_model(inputs_embeds=whole).logits[0, -1].argmax())
        if best == END_ID:
            break
        so_far.append(best)
    assert written == [number for number in so_far if number > END_ID]


def test_equal_seeds_begin_alike_whatever_the_global_generator_holds() -> None:
    torch.manual_seed(1)
    first = captioner(seed=7).state_dict()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again, other = captioner(seed=7).state_dict(), captioner(seed=8).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["projector.0.weight"], other["projector.0.weight"])


def test_the_vocabulary_spells_any_text_and_no_text_ends_a_caption() -> None:
    tokenizer = probe_model.build_tokenizer(["a red circle", "a blue circle"] * 5, 300)
    hostile = "</s> a red <pad> 圆形 </s>"
    (ids,) = probe_model.caption_ids(tokenizer, [hostile], 200)
    assert ids.count(END_ID) == 1 and ids[-1] == END_ID and PAD_ID not in ids
    assert tokenizer.decode(ids).strip() == hostile
    (cut,) = probe_model.caption_ids(tokenizer, [hostile], 5)
    assert len(cut) == 5 and cut[-1] == END_ID and cut[:4] == ids[:4]


# --- the whole --------------------------------------------------------------------------------------------------------


def test_a_probe_learns_to_describe_what_the_tower_sees(run: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "all", num_train=48)  # what is held out looks like some that are not
    before = {path.name: path.read_bytes() for path in run.rglob("model.safetensors")}
    scores = probed(run, shards, samples=12 * 150, lr=1e-2, log_steps=10)
    assert scores["token_loss"] < 0.5 * scores["token_loss_of_another_image"]
    assert scores["token_accuracy"] > 0.8 and scores["num_images"] == 8
    rows = [json.loads(line) for line in (run / "probe" / "captions.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [f"{number:09d}" for number in range(48, 56)]
    assert all(row["caption"].startswith("There is a ") for row in rows)
    losses = [json.loads(line)["loss"] for line in (run / "probe" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 15 and losses[-1] < losses[0] / 5
    after = {path.name: path.read_bytes() for path in run.rglob("checkpoints/*/model.safetensors")}
    assert before == after, "the tower is frozen"


def test_stock_transformers_loads_the_language_model(run: Path, shards: Path) -> None:
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    probed(run, shards)
    loaded, info = AutoModelForCausalLM.from_pretrained(run / "probe", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), "every weight is there, and nothing else"
    assert type(loaded).__name__ == "LlamaForCausalLM"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(run / "probe" / "tokenizer.json"))
    assert loaded.config.vocab_size == len(tokenizer) == result_of(run)["vocab_size"]
    assert loaded.config.eos_token_id == tokenizer.convert_tokens_to_ids("</s>")
    assert torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)


def test_equal_seeds_give_equal_figures_and_the_runs_seed_is_the_default(tmp_path: Path, shards: Path) -> None:
    kind = {"image_px": 32, "decoder": "none", "caption_weight": 0}
    first, second = (write_run(tmp_path / name, seed=5, **kind) for name in ("a", "b"))
    found = [{**probed(folder, shards), "train_s": 0} for folder in (first, second)]
    assert found[0] == found[1]
    assert (first / "probe" / "model.safetensors").read_bytes() == (second / "probe" / "model.safetensors").read_bytes()
    assert result_of(first)["seed"] == 0, "what the config of the run says"
    other = probed(second, shards, seed=1, overwrite=True)
    assert other["token_loss"] != found[0]["token_loss"] and result_of(second)["seed"] == 1


def test_images_that_memory_has_no_room_for_are_computed_anew(run: Path, shards: Path) -> None:
    whole = probed(run, shards)
    for cache_bytes in (0, 20_000):
        (run / "probe" / "probe.done.json").unlink()
        assert {**probed(run, shards, cache_bytes=cache_bytes), "train_s": 0} == {**whole, "train_s": 0}


def test_a_finished_probe_is_kept_and_another_config_is_refused(run: Path, shards: Path) -> None:
    first = probed(run, shards)
    assert probed(run, shards, log_steps=7) == {**first, "skipped": True}
    with pytest.raises(ResumeRefused, match="config layer: -2 before, -1 now"):
        probed(run, shards, layer=-1)
    assert probed(run, shards, layer=-1, overwrite=True)["token_loss"] != first["token_loss"]


def test_what_cannot_be_read_is_counted_and_left_out(run: Path, tmp_path: Path) -> None:
    def spoil(split: str, number: int, image: bytes, about: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        if number in (3, 33):
            return image[:-50], about
        return image, {**about, "synthetic": " "} if number in (5, 35) else about

    spoilt = write_shards(tmp_path / "spoilt", change=spoil)
    assert probed(run, spoilt)["num_images"] == 6
    assert result_of(run)["counts"] == {"trained": 30, "scored": 6, "bad.decode_failed": 2, "bad.no_caption": 2}


def test_nothing_to_read_is_an_error_and_no_figure(run: Path, tmp_path: Path, shards: Path) -> None:
    broken = write_shards(tmp_path / "broken", change=lambda split, number, image, about: (b"no picture", about))
    with pytest.raises(UserError, match=r"No image of the training split can be read: \{'not_an_image': 32\}"):
        probed(run, broken)
    silent = write_shards(tmp_path / "silent", change=lambda split, n, image, about: (image, about | {"synthetic": ""}))
    with pytest.raises(UserError, match=r"None of 32 samples .* has a text of 'synthetic': \{'bad.no_caption': 32\}"):
        probed(run, silent)
    with pytest.raises(UserError, match=r"no caption column 'syntetic'\. Did you mean 'synthetic'"):
        probed(run, shards, column="syntetic")
    assert not (run / "probe").exists()


def test_a_loss_that_is_not_finite_stops_the_probe(run: Path, shards: Path) -> None:
    with pytest.raises(UserError, match=r"The probe's loss is nan at step \d+\. Probe again with a smaller --lr"):
        probed(run, shards, lr=1e30, warmup_samples=0)


def test_derived_texts_and_the_first_of_several_can_be_learned(run: Path, shards: Path) -> None:
    config = ProbeConfig(**LITTLE, column="dense", max_samples=12, max_scored=3)
    derived = {"dense": lambda about: [f"truth of {about['extra']['scene']}", "unused"]}
    assert probe.probe(config, run=run, shards=shards, quiet=True, derived=derived)["num_images"] == 3
    rows = [json.loads(line) for line in (run / "probe" / "captions.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows] == ["truth of 0/32", "truth of 0/33", "truth of 0/34"]
    assert result_of(run)["counts"]["trained"] == 12


def test_widths_that_the_heads_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match="width 36 is not a multiple of twice the heads, 8"):
        ProbeConfig(width=36)
