"""The vLLM engine, on CPU as on GPU: decoded images and token ids go in, never URLs."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any

from clips_data.errors import UserError
from clips_data.recaption.engines import Answer, Engine, Request
from clips_data.recaption.prompts import Sampling


@dataclass(frozen=True)
class BuildVllm:
    """Builds the engine in the child process that it is sent to."""

    model: str
    revision: str | None
    sampling: Sampling
    seed: int
    max_model_tokens: int
    gpu_memory_share: float
    cpu_cache_gib: int
    max_batch_rows: int

    def __call__(self) -> Engine:
        # The engine must live in this very process, so that its death is this process's death and nobody waits for it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self.cpu_cache_gib))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        return VllmEngine(self)


class VllmEngine:
    def __init__(self, settings: BuildVllm) -> None:
        import torch
        import vllm

        on_gpu = torch.cuda.is_available()
        options: dict[str, Any] = {}
        if settings.max_model_tokens:
            options["max_model_len"] = settings.max_model_tokens
        if on_gpu:
            options["gpu_memory_utilization"] = settings.gpu_memory_share
        self.llm = vllm.LLM(
            model=settings.model,
            revision=settings.revision,
            tokenizer_revision=settings.revision,
            seed=settings.seed,
            # Compilation pays on a GPU; on a CPU it costs minutes for nothing.
            enforce_eager=not on_gpu,
            max_num_seqs=min(settings.max_batch_rows, 256),
            limit_mm_per_prompt={"image": 1},
            mm_processor_cache_gb=0,  # each image is seen once
            enable_prefix_caching=False,
            disable_log_stats=True,
            trust_remote_code=False,
            **options,
        )
        self.sampling = settings.sampling
        self.tokenizer: Any = self.llm.get_tokenizer()
        self.max_tokens = self.llm.llm_engine.model_config.max_model_len
        config = self.llm.llm_engine.model_config.hf_config
        self.image_token_id = getattr(config, "image_token_index", None) or getattr(config, "image_token_id", None)
        self.about = {
            "engine_version": vllm.__version__,
            "device": "cuda" if on_gpu else "cpu",
            "special_tokens": sorted(set(self.tokenizer.all_special_tokens)),
        }

    def answer(self, requests: list[Request]) -> list[Answer]:
        """Rows that cannot be asked are answered at once: one of them would fail vLLM's whole batch."""
        answers: dict[int, Answer] = {}
        prompts: list[Any] = []
        sampling, asked = [], []
        for i, request in enumerate(requests):
            prompt = self._prompt(request)
            if isinstance(prompt, Answer):
                answers[i] = prompt
            else:
                prompts.append(prompt)
                sampling.append(self._sampling(request.seed))
                asked.append(i)
        for i, output in zip(asked, self.llm.generate(prompts, sampling, use_tqdm=False), strict=True):
            best = output.outputs[0]
            answers[i] = Answer("ok", best.text, str(best.finish_reason), len(best.token_ids))
        return [answers[i] for i in range(len(requests))]

    def _prompt(self, request: Request) -> dict[str, Any] | Answer:
        parts: list[dict[str, str]] = [{"type": "text", "text": request.user}]
        if request.image is not None:
            parts.insert(0, {"type": "image"})
        messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": request.system})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        expected = int(request.image is not None)
        if self.image_token_id is not None and ids.count(self.image_token_id) != expected:
            raise UserError(
                f"The model's chat template put {ids.count(self.image_token_id)} image markers, not {expected}."
            )
        if len(ids) + self.sampling.max_tokens > self.max_tokens:
            return Answer("prompt_too_long")
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if request.image is not None:
            image = _decode(request.image)
            if image is None:
                return Answer("unreadable_image")
            prompt["multi_modal_data"] = {"image": image}
        return prompt

    def _sampling(self, seed: int) -> Any:
        import vllm

        settings = self.sampling.model_dump()
        return vllm.SamplingParams(**{**settings, "top_k": settings["top_k"] or -1}, seed=seed)


def _decode(data: bytes) -> Any:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
