"""vLLM captions per second with the packaged captioner, beside transformers' generate on the same images and prompts.

uv run python tests/bench/recaption_rate.py [--num-images 256] [--out recaption_rate.json]
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from clips_data.demo import scenes
from clips_data.recaption import prompts
from clips_data.recaption.engines import EngineProcess, Request
from clips_data.recaption.run import DEMO_MODEL
from clips_data.recaption.vllm import BuildVllm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("recaption_rate.json"))
    options = parser.parse_args()
    images = [jpeg(i) for i in range(options.num_images)]
    result: dict[str, Any] = {
        "num_images": options.num_images,
        "vllm": with_vllm(images),
        "peer": with_transformers(images),
    }
    result["ratio"] = round(result["vllm"]["captions_per_s"] / result["peer"]["captions_per_s"], 2)
    result["same_captions"] = sum(
        a == b for a, b in zip(result["vllm"].pop("texts"), result["peer"].pop("texts"), strict=True)
    )
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def jpeg(index: int) -> bytes:
    buffer = io.BytesIO()
    scenes.draw_scene(scenes.make_scene(9, index)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def with_vllm(images: list[bytes]) -> dict[str, Any]:
    prompt = prompts.load("describe")
    build = BuildVllm(str(DEMO_MODEL), None, prompt.sampling, 0, 0, 0.9, 1, 256)
    with tempfile.TemporaryDirectory() as folder:
        engine = EngineProcess(build, log=Path(folder) / "engine.log", deadline_s=600)
        engine.start()
        requests = [Request(image, None, prompt.user, 0) for image in images]
        engine.answer(requests[:8])
        started = time.monotonic()
        answers = engine.answer(requests)
        seconds = time.monotonic() - started
        engine.close()
    tokens = sum(answer.num_tokens for answer in answers)
    return {
        "startup_s": round(engine.startup_s, 1),
        "captions_per_s": round(len(images) / seconds, 2),
        "tokens_per_s": round(tokens / seconds),
        "texts": [" ".join(answer.text.split()) for answer in answers],
    }


def with_transformers(images: list[bytes], batch: int = 64) -> dict[str, Any]:
    import torch
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    prompt = prompts.load("describe")
    processor = AutoProcessor.from_pretrained(DEMO_MODEL)
    model = LlavaForConditionalGeneration.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16).eval()
    content = [{"type": "image"}, {"type": "text", "text": prompt.user}]
    text = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    started, texts = time.monotonic(), []
    for start in range(0, len(images), batch):
        pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in images[start : start + batch]]
        inputs = processor(
            images=pictures, text=[text] * len(pictures), return_tensors="pt", padding=True, add_special_tokens=False
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=prompt.sampling.max_tokens, do_sample=False)
        texts += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    seconds = time.monotonic() - started
    return {"captions_per_s": round(len(images) / seconds, 2), "texts": [" ".join(text.split()) for text in texts]}


if __name__ == "__main__":
    main()
