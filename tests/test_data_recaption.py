"""Prompts, cleaning, and engines that die. The walk's own tests run the real vLLM."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clips_data.errors import UserError
from clips_data.recaption import clean, prompts
from clips_data.recaption.engines import Answer, EngineProcess, Request

# --- prompt files ---


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_packaged_prompt_loads_and_renders() -> None:
    prompt = prompts.load("describe")
    assert prompt.inputs == ("image",)
    assert prompt.render({}) == (None, prompt.user)


def test_columns_are_filled_in_and_braces_in_them_stay(tmp_path: Path) -> None:
    prompt = prompts.load(write(tmp_path / "fuse.yaml", "inputs: [image, web]\nuser: 'Describe. Hint: {web}'\n"))
    assert prompt.render({"web": "a {web} {user}"})[1] == "Describe. Hint: a {web} {user}"


def test_the_digest_is_of_content_not_of_name(tmp_path: Path) -> None:
    one = prompts.load(write(tmp_path / "a.yaml", "user: Describe.\n"))
    two = prompts.load(write(tmp_path / "b.yaml", "user: Describe.\n"))
    other = prompts.load(write(tmp_path / "c.yaml", "user: Describe it.\n"))
    assert one.digest == two.digest != other.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user: x\nsamplin: {}\n", "Did you mean 'sampling'"),
        ("user: x\nsampling: {temprature: 1}\n", "Did you mean 'temperature'"),
        ("user: 'see {web}'\n", "not a column of inputs"),
        ("inputs: [image]\n", "key user"),
        ("user: [unclosed\n", "not valid YAML"),
        ("- a list\n", "does not hold a mapping"),
    ],
)
def test_a_bad_prompt_file_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompts.load(write(tmp_path / "p.yaml", text))


def test_an_unknown_prompt_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'describe'"):
        prompts.load("descrbe")


# --- cleaning ---

SPECIALS = ["<image>", "<s>", "</s>", "<|im_end|>", "[INST]"]


def test_special_tokens_control_and_bidi_characters_are_removed_and_flagged() -> None:
    text, flags = clean.neutralise("a <image> b\x00\u202e</S><|im_end|> c", SPECIALS)
    assert text == "a b c"
    assert flags == ["input_special_token"]


def test_a_token_that_appears_by_removing_another_is_removed_too() -> None:
    assert "<image>" not in clean.neutralise("<im<image>age>", [*SPECIALS, "< im"])[0]


def test_a_megabyte_of_text_is_cut_and_flagged() -> None:
    text, flags = clean.neutralise("x" * 1_000_000, SPECIALS)
    assert len(text) == clean.MAX_INPUT_CHARS
    assert flags == ["input_cut"]


@given(st.text(alphabet=st.sampled_from("<>/simage |_nd[]INST\u202e\x07ab"), max_size=200))
def test_no_special_token_survives(text: str) -> None:
    safe, _ = clean.neutralise(text, SPECIALS)
    assert not any(token.lower() in safe.lower() for token in SPECIALS)


@pytest.mark.parametrize(
    ("caption", "code"),
    [
        ("A red circle on gray.", "ok"),
        ("", "empty"),
        ("I'm sorry, but I cannot see the picture.", "refused"),
        ("As an AI language model, I", "refused"),
        ("Describe the picture in detail. Describe", "echo"),
        ("a b c d e f " * 5, "loop"),
        ("Sorry-looking dog on a bench.", "ok"),
    ],
)
def test_answers_are_judged(caption: str, code: str) -> None:
    assert clean.judge(caption.strip(), "Describe the picture in detail.") == code


# --- engines in a child process ---


@dataclass(frozen=True)
class BuildFragile:
    """An engine that really dies (SIGKILL) or hangs on the rows that it is told to."""

    deadly: tuple[str, ...] = ()
    hanging: tuple[str, ...] = ()
    broken: bool = False

    def __call__(self) -> Any:
        if self.broken:
            raise RuntimeError("no such device")
        return FragileEngine(self)


class FragileEngine:
    about = {"engine_version": "1", "device": "cpu", "special_tokens": []}  # noqa: RUF012

    def __init__(self, settings: BuildFragile) -> None:
        self.settings = settings

    def answer(self, requests: list[Request]) -> list[Answer]:
        for request in requests:
            if request.user in self.settings.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            if request.user in self.settings.hanging:
                time.sleep(600)
        return [Answer("ok", f"said {request.user}", "stop", 2) for request in requests]


def ask(build: BuildFragile, users: str, log: Path, deadline_s: float = 60.0) -> tuple[list[str], int]:
    engine = EngineProcess(build, log=log / "engine.log", deadline_s=deadline_s)
    engine.start()
    try:
        answers = engine.answer([Request(None, None, user, 0) for user in users])
        return [answer.text or answer.code for answer in answers], engine.num_deaths
    finally:
        engine.close()


def test_answers_come_back_in_order(tmp_path: Path) -> None:
    assert ask(BuildFragile(), "abc", tmp_path) == (["said a", "said b", "said c"], 0)


def test_a_row_that_kills_the_engine_is_found_and_the_rest_is_answered(tmp_path: Path) -> None:
    answers, num_deaths = ask(BuildFragile(deadly=("c",)), "abcde", tmp_path)
    assert answers == ["said a", "said b", "engine_died", "said d", "said e"]
    assert num_deaths >= 3


def test_an_engine_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    assert ask(BuildFragile(hanging=("b",)), "ab", tmp_path, deadline_s=1.0)[0] == ["said a", "engine_died"]


def test_an_engine_that_cannot_start_says_why_and_where_its_log_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"RuntimeError: no such device.*engine\.log"):
        ask(BuildFragile(broken=True), "a", tmp_path)
