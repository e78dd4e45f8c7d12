"""vLLM in a child of ours, vLLM behind its OpenAI server, and transformers: one prompt, the same captions.

On the packaged captioner (LLaVA), and on a Qwen2.5-VL that is made here: random weights, another way to expand images.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clips_data.demo import scenes, web
from clips_data.recaption import prompts
from clips_data.recaption.choose import DEMO_MODEL
from clips_data.recaption.endpoint import BuildEndpoint
from clips_data.recaption.engine_process import EngineProcess
from clips_data.recaption.engines import Answer, Build, Decoding, Engine, Request
from clips_data.recaption.hf import BuildHf
from clips_data.recaption.vllm import BuildVllm

WORLD = 9
NUM_IMAGES = 100
SERVED_AS = "demo-captioner"
NO_WHITE_SPACE = {"backend": "xgrammar", "disable_any_whitespace": True}
STARTUP_S = 240.0
SHAPE = {
    "type": "object",
    "properties": {"short": {"type": "string", "maxLength": 30}, "colour": {"enum": ["red", "green", "blue"]}},
    "required": ["short", "colour"],
    "additionalProperties": False,
}


def described(number: int, **change: Any) -> Request:
    """The packaged prompt on a scene, greedy."""
    rendered = prompts.load("describe").render({}, seed=0, key=str(number))
    about = {"system": rendered.system, "user": rendered.user, "decoding": rendered.decoding, **change}
    return Request(image=web.jpeg(WORLD, number), seed=number, **about)


def answers_of(build: Build, log: Path, *batches: list[Request]) -> list[list[Answer]]:
    engine = EngineProcess(build, log=log, deadline_s=120)
    try:
        engine.start()
        return [engine.answer(batch) for batch in batches]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def starting(logs: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """vLLM's OpenAI server on its way up, while the other engines are at work."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(DEMO_MODEL),
        "--served-model-name", SERVED_AS, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager",
        "--max-num-seqs", "64", "--mm-processor-cache-gb", "0", "--no-enable-prefix-caching",
        "--structured-outputs-config", json.dumps(NO_WHITE_SPACE),
    ]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with (logs / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}/v1", server
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + STARTUP_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"vLLM's server did not come up:\n{log.read_text()[-3000:]}")


@dataclass(frozen=True)
class Captions:
    """By engine: greedy captions of the demo's images, and answers in a JSON shape."""

    plain: dict[str, list[Answer]]
    shaped: dict[str, list[Answer]]


@pytest.fixture(scope="module")
def captions(starting: tuple[str, subprocess.Popen[bytes]], logs: Path) -> Captions:
    url, server = starting
    plain = [described(number) for number in range(NUM_IMAGES)]
    shaped = [described(number, shape=SHAPE, decoding=Decoding(max_tokens=48)) for number in range(8)]
    builds: dict[str, Build] = {
        "hf": BuildHf(str(DEMO_MODEL)),
        "vllm": BuildVllm(str(DEMO_MODEL), max_batch_rows=64),
        "endpoint": BuildEndpoint(url, SERVED_AS, max_batch_rows=32, timeout_s=120),
    }
    found = Captions({}, {})
    for name, build in builds.items():
        if name == "endpoint":
            wait_until_up(url, server, logs / "server.log")
        found.plain[name], found.shaped[name] = answers_of(build, logs / f"{name}.log", plain, shaped)
    return found


@pytest.mark.parametrize("name", ["endpoint", "hf"])
def test_greedy_captions_are_those_of_vllm(captions: Captions, name: str) -> None:
    pairs = list(zip(captions.plain["vllm"], captions.plain[name], strict=True))
    others = [f"{number}\n  vllm: {a}\n  {name}: {b}" for number, (a, b) in enumerate(pairs) if a != b]
    assert len(others) <= 0.01 * NUM_IMAGES, "\n".join(others)
    assert len({answer.text for answer in captions.plain[name]}) > 0.9 * NUM_IMAGES


@pytest.mark.parametrize("name", ["vllm", "endpoint"])
def test_an_answer_in_a_json_shape_has_it(captions: Captions, name: str) -> None:
    for answer in captions.shaped[name]:
        assert (answer.code, answer.finish_reason) == ("ok", "stop"), answer
        content = json.loads(answer.text)
        assert set(content) == {"short", "colour"} and content["colour"] in ("red", "green", "blue")


# --- a second architecture --------------------------------------------------------------------------------------------

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_qwen(folder: Path) -> None:
    """A Qwen2.5-VL of 0.5 M random weights. Heads are 32 wide, the least that vLLM's CPU attention takes."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces: Any = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    pieces.train_from_iterator(
        [scenes.describe(scenes.make_scene(1, number)) for number in range(50)],
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(SPECIALS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )  # fmt: skip
    end, _, turn_end, vision_start, vision_end, image, video = range(len(SPECIALS))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pieces, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIALS[3:]), chat_template=TEMPLATE, model_max_length=2048,
    )  # fmt: skip
    width, rope = 128, {"rope_theta": 10_000.0, "rope_type": "default", "mrope_section": [4, 6, 6]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": width, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 2048,
            "initializer_range": 0.2, "bos_token_id": end, "eos_token_id": turn_end, "pad_token_id": end,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": width,
            "fullatt_block_indexes": [1], "initializer_range": 0.1,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=vision_start,
        vision_end_token_id=vision_end, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    # A published Qwen's wishes, which a prompt's own settings must overrule.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[turn_end, end], do_sample=True, temperature=9.0, top_k=3, repetition_penalty=1.5
    )
    model.save_pretrained(folder)
    pixels = transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    videos = transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2_5_VLProcessor(pixels, tokenizer, videos, chat_template=TEMPLATE).save_pretrained(folder)


@dataclass(frozen=True)
class Listening:
    """Builds an engine whose prompts, as the model gets them, are written to a file: one list of token ids a line."""

    build: Any
    file: Path

    @property
    def max_batch_rows(self) -> int:
        return int(self.build.max_batch_rows)

    def __call__(self) -> Engine:
        engine: Any = self.build()
        name = "_inputs" if isinstance(self.build, BuildHf) else "_prepared"
        make = getattr(engine, name)

        def listening(given: Any) -> Any:
            made = make(given)
            if isinstance(self.build, BuildHf):
                rows = zip(made["input_ids"].tolist(), made["attention_mask"].tolist(), strict=True)
                prompts = [[token for token, real in zip(*row, strict=True) if real] for row in rows]
            else:
                prompts = [list(made["prompt_token_ids"])]
            with self.file.open("a") as out:
                out.writelines(json.dumps(prompt) + "\n" for prompt in prompts)
            return made

        setattr(engine, name, listening)
        return engine  # type: ignore[no-any-return]


def test_another_architecture_gets_the_same_prompts_and_answers_through_vllm_and_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "qwen"
    save_qwen(folder)
    requests = [
        Request(
            web.jpeg(WORLD, number) if number % 4 else None,
            "Be brief." if number % 2 else None,
            "Describe it" + " now" * number,
            number,
            Decoding(max_tokens=4),
        )
        for number in range(24)
    ]
    heard, found = {}, {}
    for build in (BuildHf(str(folder), max_batch_rows=8), BuildVllm(str(folder), max_batch_rows=8)):
        name = type(build).__name__
        file = tmp_path / f"{name}.jsonl"
        [found[name]] = answers_of(Listening(build, file), tmp_path / f"{name}.log", requests)
        heard[name] = sorted(file.read_text().splitlines())
    assert len(heard["BuildVllm"]) == len(requests)
    assert heard["BuildVllm"] == heard["BuildHf"]
    pairs = list(zip(found["BuildVllm"], found["BuildHf"], strict=True))
    assert all(answer.code == "ok" for pair in pairs for answer in pair), pairs
    assert [a.num_prompt_tokens for a, _ in pairs] == [b.num_prompt_tokens for _, b in pairs]
    # Random weights leave near ties, which bf16 settles by chance; wrong inputs or settings leave no answer alike.
    assert sum(a == b for a, b in pairs) >= 0.7 * len(pairs), pairs
