"""The engine that runs a captioner of our own training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import runmaker
import shardmaker
import torch

from clips_data.errors import UserError
from clips_data.recaption.clips import SPECIAL_TOKENS, BuildClips, ClipsEngine
from clips_data.recaption.engine_process import EngineProcess
from clips_data.recaption.engines import Answer, Decoding, Request
from clips_data.recaption.prompts import Prompt
from clips_train import generate, search, transforms
from clips_train.search import Written
from clips_train.tokenizer import build_tokenizer

load_trained = functools.cache(generate.load_trained)
TARGET_LENGTH = runmaker.SMALL["target_length"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs of captioners that nobody trained, by what is chosen about them."""
    folder = tmp_path_factory.mktemp("runs")

    def of(**change: object) -> Path:
        name = "-".join(f"{key}={value}" for key, value in sorted(change.items())) or "plain"
        if not (folder / name).exists():
            runmaker.write_run(folder / name, spread=8.0, **change)
        return folder / name

    return of


@pytest.fixture(scope="module")
def run(runs: Callable[..., Path]) -> Path:
    return runs()


@pytest.fixture(scope="module")
def teacher_forced(runs: Callable[..., Path]) -> Path:
    return runs(decoder="teacher_forced")


@pytest.fixture(autouse=True)
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checkpoint is read once for all tests."""
    monkeypatch.setattr(generate, "load_trained", load_trained)


def engine_of(run: Path, **settings: object) -> ClipsEngine:
    return ClipsEngine(BuildClips(str(run), device="cpu", **settings))  # type: ignore[arg-type]


def asked(number: int, web: str | None = None, **change: object) -> Request:
    image, about = shardmaker.sample(number)
    return Request(**{"image": image, "system": None, "user": web or about["web"], "seed": number, **change})  # type: ignore[arg-type]


def test_captions_are_those_of_clips_caption_whatever_the_batch(run: Path) -> None:
    requests = [asked(number, "seven words are in this web caption" if number % 2 else None) for number in range(9)]
    model = generate.load_trained(run, "cpu")
    pixels = [transforms.squash(transforms.decode(shardmaker.sample(number)[0], 16), 16) for number in range(9)]
    expected = generate.caption_images(model, torch.stack(pixels), [request.user for request in requests])
    for batch in (2, 64):
        engine = engine_of(run, max_batch_rows=batch)
        answers: dict[int, Answer] = {}
        for number, request in enumerate(requests):
            engine.add(number, request)
        while len(answers) < len(requests):
            ready = engine.step()
            assert len(ready) == min(batch, len(requests) - len(answers))
            answers |= dict(ready)
        assert [answers[number].text for number in range(9)] == expected
    assert len(set(expected)) > 1


def test_tokens_are_counted_and_a_caption_that_fills_all_slots_was_cut(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(run)
    for ended, expected in ((True, ("stop", 3)), (False, ("length", 3))):
        monkeypatch.setattr(search, "slot_by_slot", lambda *_, ended=ended: [Written([320, 321, 322], ended, -1.0)])
        [answer] = engine.answer([asked(0, "red circle photo")])
        assert (answer.finish_reason, answer.num_tokens) == expected
        assert (answer.code, answer.num_prompt_tokens) == ("ok", 3)


# --- decoding ---------------------------------------------------------------------------------------------------------


def answers(run: Path, *requests: Request) -> list[Answer]:
    engine = engine_of(run)
    for number, request in enumerate(requests):
        engine.add(number, request)
    return [answer for _, answer in engine.step()]


@pytest.mark.parametrize("decoder", ["queries", "teacher_forced"])
def test_greedy_answers_do_not_depend_on_the_seed(runs: Callable[..., Path], decoder: str) -> None:
    one, other = answers(runs(decoder=decoder), asked(0, seed=1), asked(0, seed=9))
    assert one == other


@pytest.mark.parametrize("decoder", ["queries", "teacher_forced"])
def test_max_tokens_is_heeded(runs: Callable[..., Path], decoder: str) -> None:
    [answer] = answers(runs(decoder=decoder), asked(0, decoding=Decoding(max_tokens=3)))
    assert (answer.num_tokens, answer.finish_reason) == (3, "length")
    [answer] = answers(runs(decoder=decoder), asked(0, decoding=Decoding(max_tokens=500)))
    assert answer.num_tokens == TARGET_LENGTH - 1


def test_sampling_is_a_function_of_the_seed_and_not_of_the_batch(teacher_forced: Path) -> None:
    hot = Decoding(temperature=2.0, top_p=0.95)
    requests = [asked(0, seed=seed, decoding=hot) for seed in (1, 2, 3, 1)]
    together = answers(teacher_forced, *requests)
    assert together[0] == together[3]
    assert len({answer.text for answer in together}) == 3
    assert together == [answers(teacher_forced, request)[0] for request in requests]


@pytest.mark.parametrize("change", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_settings_of_sampling_reach_the_draw(teacher_forced: Path, change: dict[str, float]) -> None:
    """Each leaves one token alone."""
    greedy, hot = answers(
        teacher_forced, asked(0), asked(0, seed=7, decoding=Decoding(temperature=2.0, **change))  # type: ignore[arg-type]
    )  # fmt: skip
    assert greedy == hot


def test_a_repetition_penalty_changes_a_greedy_caption(teacher_forced: Path) -> None:
    plain, varied = answers(teacher_forced, asked(0), asked(0, decoding=Decoding(repetition_penalty=50.0)))
    assert plain.text != varied.text


def test_rows_of_one_batch_may_decode_differently(teacher_forced: Path) -> None:
    requests = [asked(n, decoding=Decoding(max_tokens=2 + n % 3)) for n in range(7)]
    assert [answer.num_tokens for answer in answers(teacher_forced, *requests)] == [2, 3, 4, 2, 3, 4, 2]


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"repetition_penalty": 1.2}])
def test_what_cannot_be_decoded_slot_by_slot_is_refused(run: Path, change: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"never see each other's words.*--decoder teacher_forced"):
        engine_of(run).add(0, asked(0, decoding=Decoding(**change)))  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"presence_penalty": 1.0}, {"frequency_penalty": -0.5}, {"stop": ("\n",)}])
def test_settings_without_counterpart_are_refused(teacher_forced: Path, change: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"knows no {next(iter(change))}"):
        engine_of(teacher_forced).add(0, asked(0, decoding=Decoding(**change)))  # type: ignore[arg-type]


# --- inputs -----------------------------------------------------------------------------------------------------------

IMAGE_ALONE = {"inputs": ["image"], "user": ""}


def rendered(content: dict[str, object], number: int) -> Request:
    """What the prompt asks of a row, as ``clips recaption`` has it."""
    prompt = Prompt.model_validate({"delimiters": [], **content, "name": "test"})
    image, about = shardmaker.sample(number)
    asks = prompt.render({name: about["web"] for name in prompt.columns}, seed=0, key=str(number))
    return Request(image, asks.system, asks.user, number, asks.decoding, prompt.shape)


@pytest.mark.parametrize("decoder", ["queries", "teacher_forced"])
@pytest.mark.parametrize("change", [{"condition": None}, {"condition_drop": 0.5}])
def test_prompts_of_the_image_alone_fit_captioners_that_know_no_text_or_lost_it(
    runs: Callable[..., Path], decoder: str, change: dict[str, object], capfd: pytest.CaptureFixture[str]
) -> None:
    engine = engine_of(runs(decoder=decoder, **change), columns=())
    request = rendered(IMAGE_ALONE, 3)
    engine.add(0, request)
    [(_, answer)] = engine.step()
    assert (answer.code, answer.num_prompt_tokens) == ("ok", 0)
    assert capfd.readouterr().err == ""


def test_any_column_can_be_the_text(run: Path) -> None:
    engine = engine_of(run, columns=("synthetic",))
    engine.add(0, rendered({"inputs": ["image", "synthetic"], "user": "{synthetic}"}, 3))
    [(_, answer)] = engine.step()
    assert answer == engine_of(run).answer([asked(3)])[0]


def test_a_prompt_without_text_does_not_fit_a_captioner_that_always_had_one(run: Path) -> None:
    with pytest.raises(UserError, match=r"never trained without a text.*inputs \[image, web\].*--condition-drop"):
        engine_of(run, columns=())


def test_a_prompt_with_text_does_not_fit_a_captioner_of_the_image_alone(runs: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"reads the image alone.*also has web.*inputs \[image\]"):
        engine_of(runs(condition=None), columns=("web",))
    with pytest.raises(UserError, match=r"cannot serve a text: it reads the image alone"):
        engine_of(runs(condition=None)).add(0, asked(0))


def test_rows_without_text_are_captioned_and_told_of_once(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = engine_of(run, columns=("web",), max_batch_rows=1)
    for number in range(3):
        engine.add(number, replace(asked(number), user=""))
    for _ in range(3):
        assert [answer.code for _, answer in engine.step()] == ["ok"]
    assert capfd.readouterr().err.count("never trained without a text") == 1


# --- what it cannot do ------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_image_are_told_and_the_rest_is_captioned(run: Path) -> None:
    engine = engine_of(run)
    codes = [answer.code for answer in engine.answer([asked(0), asked(1, image=b"none"), asked(2)])]
    assert codes == ["ok", "unreadable_image", "ok"]
    assert [answer.code for answer in engine.answer([asked(1, image=b"none")])] == ["unreadable_image"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "a prompt without image"),
        ({"system": "Be brief."}, "a system text"),
        ({"shape": {"type": "object"}}, "several outputs"),
    ],
)
def test_what_it_cannot_do_is_said(run: Path, change: dict[str, object], message: str) -> None:
    engine = engine_of(run)
    with pytest.raises(UserError, match=f"cannot serve {message}.*inputs"):
        engine.add(0, asked(0, **change))


def test_a_run_without_checkpoint_or_captioner_is_told(tmp_path: Path, runs: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        engine_of(tmp_path)
    with pytest.raises(UserError, match="has no captioner"):
        engine_of(runs(decoder="none", caption_weight=0))


def test_it_serves_from_a_child_process_with_its_own_checkpoint_folder(run: Path, tmp_path: Path) -> None:
    [checkpoint] = (run / "checkpoints").glob("step-*")
    engine = EngineProcess(BuildClips(str(checkpoint)), log=tmp_path / "engine.log", deadline_s=120)
    try:
        engine.start()
        assert engine.about["special_tokens"] == SPECIAL_TOKENS["bpe"]
        assert [answer.code for answer in engine.answer([asked(0), asked(1)])] == ["ok", "ok"]
    finally:
        engine.close()


def test_the_tokens_that_must_not_stand_in_a_text_are_those_that_the_tokenizer_knows(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text(
        "\n".join(["[PAD]", *(f"[unused{n}]" for n in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])
    )
    for kind, tokenizer in (("bpe", build_tokenizer("bpe")), ("bert", build_tokenizer("bert", str(vocab)))):
        for token in SPECIAL_TOKENS[kind]:
            assert len(tokenizer.pieces(token)) == 1, token
