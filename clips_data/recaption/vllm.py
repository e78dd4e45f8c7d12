"""The vLLM engine, on CPU as on GPU: decoded images and token ids go in, never URLs.

vLLM runs in this very process and is driven step by step, so that no batch has to be finished before the next one
begins. Where the model runs on a GPU, a thread of its own decodes images and runs the model's image processor for the
rows to come while the GPU generates for those at hand. Without a GPU both would want the same cores (the thread
made it 5 % slower there), and the rows are prepared in between.
"""

from __future__ import annotations

import os
import queue
import threading
from dataclasses import dataclass
from typing import Any, Final

from clips_data.recaption import engine_child, template
from clips_data.recaption.engines import Answer, Engine, Request
from clips_data.recaption.images import decode_image
from clips_data.recaption.template import special_tokens

WAIT_S: Final = 0.05
MOST_SEQUENCES: Final = 256


@dataclass(frozen=True)
class BuildVllm:
    """Builds the engine in the child process that it is sent to.

    ``max_model_tokens`` 0 takes the model's own limit. ``share_prefix`` pays when several answers are drawn for each
    image: the image is then computed once.
    """

    model: str
    revision: str | None = None
    seed: int = 0
    max_model_tokens: int = 0
    gpu_memory_share: float = 0.9
    cpu_cache_gib: int = 1
    max_batch_rows: int = 256
    needs_image: bool = True
    share_prefix: bool = False
    trust_remote_code: bool = False
    prepare_ahead: bool | None = None
    """Whether rows are prepared in a thread of their own; ``None``: where there is a GPU."""

    def __call__(self) -> Engine:
        # The engine must live in this very process, so that its death is this process's death and nobody waits for it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(self.cpu_cache_gib))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        return VllmEngine(self)


class VllmEngine:
    def __init__(self, settings: BuildVllm) -> None:
        self._to_prepare: queue.SimpleQueue[tuple[int, Request]] = queue.SimpleQueue()
        # Bounded: images ready for the model are large.
        self._ready: queue.Queue[tuple[int, Any, Request]] = queue.Queue(max(1, settings.max_batch_rows // 2))
        self._load(settings)
        template.check(self.tokenizer, self.image_token, needs_image=settings.needs_image)
        self._running = 0
        self._most_running = min(settings.max_batch_rows, MOST_SEQUENCES)
        ahead = settings.prepare_ahead
        self._ahead = bool(self.about["num_gpus"]) if ahead is None else ahead
        if self._ahead:
            threading.Thread(target=self._prepare_all, daemon=True).start()

    def _load(self, settings: BuildVllm) -> None:
        import torch
        import vllm

        on_gpu = torch.cuda.is_available()
        code = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        options: dict[str, Any] = {}
        if settings.max_model_tokens:
            options["max_model_len"] = settings.max_model_tokens
        if on_gpu:
            options["gpu_memory_utilization"] = settings.gpu_memory_share
        options["limit_mm_per_prompt"] = {"image": int(settings.needs_image), "video": 0, "audio": 0}
        llm = vllm.LLM(
            model=settings.model,
            revision=settings.revision,
            tokenizer_revision=settings.revision,
            seed=settings.seed,
            # Compilation pays on a GPU; on a CPU it costs minutes for nothing.
            enforce_eager=not on_gpu,
            max_num_seqs=min(settings.max_batch_rows, MOST_SEQUENCES),
            mm_processor_cache_gb=0,  # each image is seen once
            enable_prefix_caching=settings.share_prefix,
            disable_log_stats=True,
            # Else a model may fill its whole allowance with blanks between two keys. vLLM 0.32 heeds it only here.
            structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
            trust_remote_code=settings.trust_remote_code,
            **options,
        )
        self.llm = llm.llm_engine
        tokenizer: Any = llm.get_tokenizer()
        if tokenizer.chat_template is None and settings.needs_image:  # older checkpoints give it to the processor
            tokenizer.chat_template = template.of_processor(settings.model, **code)
        self.tokenizer = tokenizer
        self.max_tokens = self.llm.model_config.max_model_len
        self.image_token = template.image_token_id(self.llm.model_config.hf_config)
        self.about = {
            "engine_version": vllm.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "num_gpus": int(on_gpu),
            "model_commit": getattr(self.llm.model_config.hf_config, "_commit_hash", None),
            "special_tokens": special_tokens(self.tokenizer),
            "capacity": 2 * settings.max_batch_rows,
        }

    # --- preparing ----------------------------------------------------------------------------------------------------

    def _prepare_all(self) -> None:
        """The preparing thread."""
        while True:
            number, request = self._to_prepare.get()
            engine_child.mark(number)
            try:
                prepared = self._prepared(request)
            except Exception as error:  # raised again where the engine is driven, and not lost with this thread
                prepared = error
            self._ready.put((number, prepared, request))

    def _next(self, wait_s: float) -> tuple[int, Any, Request]:
        """The next prepared row. Raises ``queue.Empty`` when there is none within ``wait_s``."""
        if self._ahead:
            return self._ready.get(timeout=wait_s) if wait_s else self._ready.get_nowait()
        number, request = self._to_prepare.get(timeout=wait_s) if wait_s else self._to_prepare.get_nowait()
        engine_child.mark(number)
        return number, self._prepared(request), request

    def _prepared(self, request: Request) -> Any:
        """vLLM's engine input, or the answer to a request that cannot be asked."""
        ids = template.prompt_ids(self.tokenizer, request)
        if not template.holds_its_image(ids, request, self.image_token):
            return Answer("engine_error")
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if request.image is not None:
            image = decode_image(request.image)
            if image is None:
                return Answer("unreadable_image")
            prompt["multi_modal_data"] = {"image": image}
        if len(ids) + request.decoding.max_tokens > self.max_tokens:
            return Answer("prompt_too_long")
        try:
            (prepared,) = self.llm.renderer.render_cmpl([prompt])
        except (ValueError, TypeError, OSError) as error:  # this image is not to the processor's taste
            print(f"row refused by the image processor: {error}", flush=True)
            return Answer("unreadable_image")
        if len(prepared["prompt_token_ids"]) + request.decoding.max_tokens > self.max_tokens:
            return Answer("prompt_too_long")
        return prepared

    # --- generating ---------------------------------------------------------------------------------------------------

    def add(self, number: int, request: Request) -> None:
        self._to_prepare.put((number, request))

    def step(self) -> list[tuple[int, Answer]]:
        answers = self._admit()
        if self._running:
            outputs: list[Any] = self.llm.step()
            for output in outputs:
                if output.finished:
                    self._running -= 1
                    best = output.outputs[0]
                    prompt = len(output.prompt_token_ids or ())
                    answer = Answer("ok", best.text, str(best.finish_reason), len(best.token_ids), prompt)
                    answers.append((int(output.request_id), answer))
        return answers

    def _admit(self) -> list[tuple[int, Answer]]:
        """Hands prepared rows to vLLM as far as it has room; waits for one only when there is nothing else to do."""
        answers: list[tuple[int, Answer]] = []
        while self._running < self._most_running:
            try:
                number, prepared, request = self._next(0.0 if self._running or answers else WAIT_S)
            except queue.Empty:
                break
            if isinstance(prepared, Exception):
                raise prepared
            if isinstance(prepared, Answer):
                answers.append((number, prepared))
                continue
            try:
                self.llm.add_request(str(number), prepared, _sampling(request))
            except ValueError as error:
                print(f"row refused by vLLM: {error}", flush=True)
                answers.append((number, Answer("engine_error")))
            else:
                self._running += 1
        return answers


def _sampling(request: Request) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    decoding = request.decoding
    shape = request.shape
    return SamplingParams(
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        top_k=decoding.top_k,
        min_p=decoding.min_p,
        repetition_penalty=decoding.repetition_penalty,
        presence_penalty=decoding.presence_penalty,
        frequency_penalty=decoding.frequency_penalty,
        max_tokens=decoding.max_tokens,
        stop=list(decoding.stop),
        seed=request.seed,
        output_kind=RequestOutputKind.FINAL_ONLY,
        structured_outputs=StructuredOutputsParams(json=shape) if shape else None,
    )
