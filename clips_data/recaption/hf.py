"""The transformers engine: for models that vLLM does not serve, and for machines without it. Slower, same captions.

A row is asked with the token ids that the vLLM engine gives it. Rows of one batch share decoding settings and are
padded on the left. ``generate`` decodes greedily; sampling happens in its logits processors (``choosing.py``), from
random numbers that are drawn for each row from its own seed. A row's luck does not depend on its batch, then, as with
vLLM; its tokens are others than vLLM draws, from the same distribution.

JSON shapes cannot be forced here: a prompt with several outputs relies on the model to keep to the shape, and rows that
do not are found where the answer is read (``bad_shape``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from clips_data.errors import UserError
from clips_data.recaption import template
from clips_data.recaption.engines import Answer, BatchEngine, Decoding, Engine, Request
from clips_data.recaption.images import decode_image

if TYPE_CHECKING:
    import torch

NO_LIMIT_TOKENS: Final = 1 << 30
"""A tokenizer that does not know its model's limit claims more than this."""


@dataclass(frozen=True)
class BuildHf:
    """Builds the engine in the child process that it is sent to. ``max_model_tokens`` 0 takes the model's own limit."""

    model: str
    revision: str | None = None
    max_model_tokens: int = 0
    max_batch_rows: int = 64
    needs_image: bool = True
    trust_remote_code: bool = False
    device: str = "auto"

    def __call__(self) -> Engine:
        return HfEngine(self)


@dataclass(frozen=True)
class _Row:
    """A request on its way through a batch: its place among the answers, its prompt, its picture."""

    place: int
    request: Request
    text: str
    picture: Any


class HfEngine(BatchEngine):
    def __init__(self, settings: BuildHf) -> None:
        """Raises ``UserError`` for a model that cannot be loaded, takes no images or has no chat template."""
        try:
            import torch
            import transformers
        except ImportError as error:
            raise UserError(
                f"The transformers engine needs {error.name}, which is not installed. Run: pip install 'clips[train]'"
            ) from None

        super().__init__(settings.max_batch_rows)
        name = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
        self._device = torch.device(name)
        on_gpu = self._device.type == "cuda"
        has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
        self._dtype = torch.bfloat16 if has_bf16 else torch.float16
        try:
            self._load(settings)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"transformers cannot load the model {settings.model!r}: {error}") from error
        template.check(self.tokenizer, self.image_token, needs_image=settings.needs_image)
        self.about: dict[str, Any] = {
            "engine_version": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "device": torch.cuda.get_device_name(self._device) if on_gpu else str(self._device),
            "num_gpus": int(on_gpu),
            "special_tokens": template.special_tokens(self.tokenizer),
            "capacity": 2 * settings.max_batch_rows,
        }

    def _load(self, settings: BuildHf) -> None:
        import transformers

        given = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
        kind = transformers.AutoProcessor if settings.needs_image else transformers.AutoTokenizer
        self.processor: Any = kind.from_pretrained(settings.model, **given)
        self.tokenizer: Any = getattr(self.processor, "tokenizer", self.processor)
        if settings.needs_image and not hasattr(self.processor, "image_processor"):
            raise ValueError("it has no image processor. Name a model that takes images, or a prompt without image.")
        if self.tokenizer.chat_template is None:  # older checkpoints give it to the processor only
            self.tokenizer.chat_template = getattr(self.processor, "chat_template", None)
        self.model = _load_model(settings.model, needs_image=settings.needs_image, dtype=self._dtype, **given)
        self.model.to(self._device).eval()
        self.image_token = template.image_token_id(self.model.config)
        ends = self.model.generation_config.eos_token_id
        self._ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._pad = next(number for number in (self.tokenizer.pad_token_id, *sorted(self._ends)) if number is not None)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self._pad)
        # The model's own wishes for sampling would overrule a prompt's.
        self.model.generation_config = transformers.GenerationConfig(
            eos_token_id=sorted(self._ends), pad_token_id=self._pad
        )
        limits = [self.model.config.get_text_config().max_position_embeddings, self.tokenizer.model_max_length]
        self.max_tokens = min(limit for limit in (*limits, settings.max_model_tokens) if 0 < limit < NO_LIMIT_TOKENS)

    # --- one batch ----------------------------------------------------------------------------------------------------

    def answer(self, requests: list[Request]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        groups: dict[tuple[Decoding, bool], list[_Row]] = {}
        for place, request in enumerate(requests):
            row = self._prepare(place, request)
            if isinstance(row, Answer):
                answers[place] = row
            else:
                groups.setdefault((request.decoding, request.image is None), []).append(row)
        for rows in groups.values():
            answers |= self._answer_alike(rows)
        return [answers[place] for place in range(len(requests))]

    def _prepare(self, place: int, request: Request) -> _Row | Answer:
        text = template.prompt_text(self.tokenizer, request)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if not template.holds_its_image(ids, request, self.image_token):
            return Answer("engine_error")  # neutralising the text must have failed
        picture = decode_image(request.image) if request.image is not None else None
        if request.image is not None and picture is None:
            return Answer("unreadable_image")
        return _Row(place, request, text, picture)

    def _answer_alike(self, rows: list[_Row]) -> dict[int, Answer]:
        """Answers by place, for rows with the same decoding settings, all with an image or all without."""
        try:
            inputs = self._inputs(rows)
        except (ValueError, TypeError, OSError) as error:
            if len(rows) > 1:  # one of them is not to the processor's taste
                return {place: answer for row in rows for place, answer in self._answer_alike([row]).items()}
            print(f"row refused by the processor: {error}", flush=True)
            return {rows[0].place: Answer("unreadable_image" if rows[0].picture is not None else "engine_error")}
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        most = self.max_tokens - rows[0].request.decoding.max_tokens
        if max(lengths) > most:
            fitting = [row for row, length in zip(rows, lengths, strict=True) if length <= most]
            too_long = {row.place: Answer("prompt_too_long") for row in rows}
            return too_long | (self._answer_alike(fitting) if fitting else {})
        return dict(zip((row.place for row in rows), self._generate(rows, inputs, lengths), strict=True))

    def _inputs(self, rows: list[_Row]) -> Any:
        images = {} if rows[0].picture is None else {"images": [[row.picture] for row in rows]}
        inputs = self.processor(
            text=[row.text for row in rows],
            **images,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        return inputs.to(self._device, self._dtype) if images else inputs.to(self._device)

    def _generate(self, rows: list[_Row], inputs: Any, lengths: list[int]) -> list[Answer]:
        import torch
        from transformers import StoppingCriteriaList

        from clips_data.recaption import choosing

        decoding = rows[0].request.decoding
        stops = choosing.Stops(self.tokenizer, decoding.stop, inputs["input_ids"].shape[1])
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=decoding.max_tokens,
                do_sample=False,
                logits_processor=choosing.processors(
                    decoding,
                    inputs["input_ids"],
                    inputs["attention_mask"],
                    [row.request.seed for row in rows],
                ),
                stopping_criteria=StoppingCriteriaList([stops] if decoding.stop else []),
            )
        new = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._read(new[row], stops.ended.get(row), lengths[row]) for row in range(len(rows))]

    def _read(self, ids: list[int], stopped: tuple[int, str] | None, num_prompt_tokens: int) -> Answer:
        """The answer in a row of generated ids, which padding follows. ``stopped``: ids up to a stop string, text."""
        end = next((number + 1 for number, token in enumerate(ids) if token in self._ends), None)
        if stopped is not None and (end is None or stopped[0] <= end):
            return Answer("ok", stopped[1], "stop", stopped[0], num_prompt_tokens)
        ids = ids[:end]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A character that the end cut through is not shown, nor does vLLM show it.
        return Answer("ok", text.rstrip("\ufffd"), "length" if end is None else "stop", len(ids), num_prompt_tokens)


def _load_model(name: str, *, needs_image: bool, dtype: torch.dtype, **given: Any) -> Any:
    """As what the prompt needs; models that also take images answer prompts without image, too."""
    import transformers

    try:
        return transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **given)
    except ValueError as error:
        if needs_image or "Unrecognized configuration class" not in str(error):
            raise
    return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **given)
