"""The transformers engine: the packaged captioner in this process, and its way of choosing tokens on made-up logits."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clips_data.demo import web
from clips_data.errors import UserError
from clips_data.recaption import choosing, images, template
from clips_data.recaption.choose import DEMO_MODEL
from clips_data.recaption.engines import Decoding, Request
from clips_data.recaption.hf import BuildHf, HfEngine
from clips_data.recaption.images import decode_image

USER = "Describe the picture in detail."
WARM = Decoding(temperature=1.0, top_p=0.95, top_k=50, min_p=0.001, max_tokens=24)


@pytest.fixture(scope="module")
def engine() -> HfEngine:
    torch.set_num_threads(1)
    return HfEngine(BuildHf(str(DEMO_MODEL), device="cpu"))


def asked(number: int = 0, *, user: str = USER, seed: int = 0, **change: Any) -> Request:
    decoding = Decoding(**{"max_tokens": 24, **change})
    return Request(web.jpeg(9, number), None, user, seed, decoding)


# --- one batch --------------------------------------------------------------------------------------------------------


def test_captions_are_about_their_images(engine: HfEngine) -> None:
    answers = engine.answer([asked(number, max_tokens=128) for number in range(8)])
    assert all(answer.text.startswith(" This picture shows") for answer in answers)
    assert len({answer.text for answer in answers}) == 8
    assert {answer.finish_reason for answer in answers} == {"stop"}
    assert all(40 < answer.num_tokens < 128 and answer.num_prompt_tokens == 49 for answer in answers)


def test_an_answer_does_not_depend_on_its_batch(engine: HfEngine) -> None:
    requests = [
        Request(web.jpeg(9, number), None, USER + " Now." * number, number, decoding)
        for number in range(4)
        for decoding in (WARM, Decoding(max_tokens=24))
    ]
    together = engine.answer(requests)
    assert together == [engine.answer([request])[0] for request in requests]


def test_equal_seeds_give_equal_samples_and_others_others(engine: HfEngine) -> None:
    hot = {**WARM.__dict__, "temperature": 3.0}
    first, again, other = engine.answer([asked(seed=5, **hot), asked(seed=5, **hot), asked(seed=6, **hot)])
    assert first == again != other


def test_the_length_cap_is_told(engine: HfEngine) -> None:
    [answer] = engine.answer([asked(max_tokens=5)])
    assert (answer.finish_reason, answer.num_tokens) == ("length", 5)


def test_an_answer_is_what_its_tokens_spell_less_a_character_that_the_end_cuts_through(engine: HfEngine) -> None:
    odd = "do n't , one ."
    assert engine._read(engine.tokenizer.encode(odd, add_special_tokens=False), None, 1).text == odd
    whole = engine.tokenizer.encode("字", add_special_tokens=False)
    assert len(whole) > 1
    assert [engine._read(ids, None, 1).text for ids in (whole, whole[:-1])] == ["字", ""]


@pytest.mark.parametrize("stop", [("background",), ("background", "on a"), ("ground", "background")])
def test_the_first_stop_string_ends_an_answer_and_is_left_out(engine: HfEngine, stop: tuple[str, ...]) -> None:
    whole, cut = engine.answer([asked(max_tokens=60), asked(max_tokens=60, stop=stop)])
    assert cut.text == min((whole.text.partition(word)[0] for word in stop), key=len)
    assert (cut.finish_reason, cut.num_tokens < whole.num_tokens) == ("stop", True)


def test_rows_that_cannot_be_asked_have_their_code_and_the_others_an_answer(engine: HfEngine) -> None:
    user = "a small square " * 100
    answers = engine.answer(
        [
            asked(),
            Request(b"no image", None, USER, 0),
            asked(user="Describe " * 400),
            # The picture's own tokens, which only the processor knows, make it too long.
            asked(
                user=user, max_tokens=engine.max_tokens - len(template.prompt_ids(engine.tokenizer, asked(user=user)))
            ),
            asked(user="Describe <image> this."),
        ]
    )
    too_long = "prompt_too_long"
    assert [answer.code for answer in answers] == ["ok", "unreadable_image", too_long, too_long, "engine_error"]


def test_a_picture_that_the_processor_refuses_is_told_alone(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    process, bad = engine.processor, decode_image(web.jpeg(9, 1)).size

    class Choosy:
        def __call__(self, *, images: list[list[Image.Image]], **others: Any) -> Any:
            if any(picture.size == bad for [picture] in images):
                raise ValueError("absolute aspect ratio must be smaller than 200")
            return process(images=images, **others)

    monkeypatch.setattr(engine, "processor", Choosy())
    numbers = [0, 1, *(number for number in range(2, 6) if decode_image(web.jpeg(9, number)).size != bad)]
    codes = [answer.code for answer in engine.answer([asked(number) for number in numbers])]
    assert codes == ["ok", "unreadable_image", *["ok"] * (len(numbers) - 2)]


def test_the_engine_works_in_batches_of_its_size() -> None:
    engine = HfEngine(BuildHf(str(DEMO_MODEL), max_batch_rows=2, device="cpu"))
    for number in range(3):
        engine.add(number + 7, asked(number, max_tokens=2))
    assert [[number for number, _ in engine.step()] for _ in range(2)] == [[7, 8], [9]]


# --- the start --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def test_a_prompt_without_image_needs_no_image_processor(model: Path) -> None:
    (model / "preprocessor_config.json").unlink()
    (model / "processor_config.json").unlink()
    engine = HfEngine(BuildHf(str(model), needs_image=False, device="cpu"))
    assert engine.answer([Request(None, None, "Rewrite this.", 0, Decoding(max_tokens=4))])[0].code == "ok"
    with pytest.raises(UserError, match="image processor"):
        HfEngine(BuildHf(str(model), device="cpu"))


def test_a_text_model_serves_prompts_without_image_only(model: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=911,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    engine = HfEngine(BuildHf(str(model), needs_image=False, device="cpu"))
    [answer] = engine.answer([Request(None, None, "Rewrite this.", 0, Decoding(max_tokens=4))])
    assert (answer.code, engine.max_tokens) == ("ok", 64)
    with pytest.raises(UserError, match="Unrecognized configuration class"):
        HfEngine(BuildHf(str(model), device="cpu"))
    for name in ("preprocessor_config.json", "processor_config.json"):
        (model / name).unlink()
    with pytest.raises(UserError, match="it has no image processor"):
        HfEngine(BuildHf(str(model), device="cpu"))


def test_a_model_that_is_not_there_or_has_no_template_is_told(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot load the model '{tmp_path}/none'"):
        HfEngine(BuildHf(str(tmp_path / "none"), device="cpu"))
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="Choose an instruction-tuned model"):
        HfEngine(BuildHf(str(model), device="cpu"))


@pytest.mark.parametrize("refuses", [True, False])
def test_a_system_text_opens_the_users_turn_where_a_template_has_no_place_for_it(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    word = "{{ raise_exception('No system role!') }}" if refuses else ""
    turns = "{% for m in messages %}{% if m['role'] == 'system' %}" + word + "{% else %}U:{{ m['content'] }}{% endif %}"
    monkeypatch.setattr(engine.tokenizer, "chat_template", turns + "{% endfor %}")
    text = template.prompt_text(engine.tokenizer, Request(None, "Be brief.", "Describe.", 0))
    assert text == "U:Be brief.\n\nDescribe."


def test_the_models_own_sampling_wishes_do_not_count(engine: HfEngine, model: Path) -> None:
    wishes = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0, "eos_token_id": 2, "max_new_tokens": 3}
    (model / "generation_config.json").write_text(json.dumps(wishes))
    requests = [asked(number, max_tokens=100) for number in range(4)]
    assert HfEngine(BuildHf(str(model), device="cpu")).answer(requests) == engine.answer(requests)


def test_the_token_limit_is_the_least_of_those_that_are_known(model: Path) -> None:
    assert HfEngine(BuildHf(str(model), max_model_tokens=100, device="cpu")).max_tokens == 100
    assert HfEngine(BuildHf(str(model), max_model_tokens=100_000, device="cpu")).max_tokens == 512


# --- choosing tokens --------------------------------------------------------------------------------------------------


def choose(
    decoding: Decoding, logits_BV: torch.Tensor, seeds: list[int], ids_BT: torch.Tensor | None = None
) -> list[int]:
    prompt_BP = torch.zeros(len(seeds), 1, dtype=torch.long)
    ids_BT = prompt_BP if ids_BT is None else ids_BT
    found = choosing.processors(decoding, prompt_BP, torch.zeros_like(prompt_BP), seeds)
    chosen: list[int] = found(ids_BT, logits_BV.float()).argmax(dim=-1).tolist()
    return chosen


def test_samples_are_drawn_from_the_models_distribution() -> None:
    shares = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05])
    num_draws = 4_000
    drawn = choose(Decoding(temperature=1.0), shares.log().expand(num_draws, -1), list(range(num_draws)))
    counts = torch.bincount(torch.tensor(drawn), minlength=5)
    assert counts[2] == 0
    spread = (shares * (1 - shares) / num_draws).sqrt()
    assert ((counts / num_draws - shares).abs() <= 4 * spread).all()


@pytest.mark.parametrize(
    ("decoding", "allowed"),
    [
        (Decoding(temperature=1.0, top_k=2), {0, 1}),
        (Decoding(temperature=1.0, top_p=0.7), {0, 1}),
        (Decoding(temperature=1.0, min_p=0.2), {0, 1, 3}),
        (Decoding(temperature=0.05), {0}),
        (Decoding(temperature=0.0, top_k=3), {0}),
    ],
)
def test_what_the_settings_rule_out_is_never_drawn(decoding: Decoding, allowed: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.0, 0.15, 0.05]).log().expand(500, -1)
    assert set(choose(decoding, logits, list(range(500)))) == allowed


def test_the_least_draw_does_not_take_a_token_of_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing.random.Random, "random", lambda self: 0.0)
    assert choose(Decoding(temperature=1.0), torch.tensor([[float("-inf"), 0.0, 0.0]]), [1]) == [1]


def test_a_rows_draws_differ_from_position_to_position() -> None:
    logits = torch.zeros(1, 1000)
    drawn = [
        choose(Decoding(temperature=1.0), logits, [3], torch.zeros(1, 1 + position, dtype=torch.long))[0]
        for position in range(8)
    ]
    assert len(set(drawn)) == 8


@given(st.data())
def test_penalties_are_vllms_and_padding_does_not_count(data: st.DataObject) -> None:
    """Against the formula of vLLM's documentation, token by token."""
    size = 6
    token = st.integers(0, size - 1)
    prompt, answer = data.draw(st.lists(token, min_size=1, max_size=4)), data.draw(st.lists(token, max_size=5))
    num_padding = data.draw(st.integers(0, 3))
    scores = data.draw(st.lists(st.floats(-8, 8, width=32), min_size=size, max_size=size))
    penalty = st.sampled_from([0.5, 0.8, 1.0, 1.25, 2.0])
    decoding = Decoding(
        repetition_penalty=data.draw(penalty), presence_penalty=data.draw(penalty), frequency_penalty=data.draw(penalty)
    )
    padded = torch.tensor([[0] * num_padding + prompt])
    mask = torch.tensor([[0] * num_padding + [1] * len(prompt)])
    ids = torch.cat([padded, torch.tensor([answer], dtype=torch.long)], dim=1)
    found = choosing.processors(decoding, padded, mask, [0])(ids, torch.tensor([scores]))[0].tolist()
    for number, score in enumerate(scores):
        if number in prompt or number in answer:
            score = score / decoding.repetition_penalty if score > 0 else score * decoding.repetition_penalty
        score -= decoding.frequency_penalty * answer.count(number) + decoding.presence_penalty * (number in answer)
        assert found[number] == pytest.approx(score, abs=1e-4)


def test_an_image_marker_beyond_the_vocabulary_is_no_token_to_punish() -> None:
    prompt, mask = torch.tensor([[9, 1]]), torch.ones(1, 2)
    found = choosing.processors(Decoding(repetition_penalty=2.0), prompt, mask, [0])(prompt, torch.ones(1, 4))
    assert found.tolist() == [[1.0, 0.5, 1.0, 1.0]]


# --- pictures ---------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def test_a_picture_is_shown_upright_on_white_and_in_rgb() -> None:
    wide = Image.new("RGB", (40, 20), "red")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    assert decode_image(encoded(wide, "JPEG", exif=rotated)).size == (20, 40)
    clear = decode_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG"))
    assert (clear.mode, clear.getpixel((0, 0))) == ("RGB", (255, 255, 255))
    exact = Image.effect_noise((64, 48), 80).convert("RGB")
    assert decode_image(encoded(exact, "PNG")).tobytes() == exact.tobytes()


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"%!PS-Adobe", web.jpeg(9, 0)[:900]])
def test_what_is_no_whole_picture_is_none(data: bytes) -> None:
    assert decode_image(data) is None


def test_a_picture_above_the_cap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (20, 10)), "PNG")
    for cap, is_taken in ((200, True), (199, False)):
        monkeypatch.setattr(images, "MAX_PIXELS", cap)
        assert (decode_image(data) is not None) == is_taken
