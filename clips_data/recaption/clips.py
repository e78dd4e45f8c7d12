"""The clips engine: a captioner that ``clips train`` made, on the image and the web caption.

It is given no instruction: the prompt's text is the web caption and nothing else (``user: "{web}"``). Each slot of the
answer takes its likeliest token without seeing the others (METHOD §2.3), so decoding settings and seeds do not apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data.errors import UserError
from clips_data.recaption.engines import Answer, BatchEngine, Engine, Request

if TYPE_CHECKING:
    import torch

SPECIAL_TOKENS: Final = {
    "bpe": ("<start_of_text>", "<end_of_text>"),
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
}
"""By tokenizer, what stands for a special id when it stands in a text."""


@dataclass(frozen=True)
class BuildClips:
    """Builds the engine in the child process that it is sent to.

    ``run`` is the folder of a training run, whose newest checkpoint is taken, or that of a checkpoint.
    """

    run: str
    max_batch_rows: int = 64
    device: str = "auto"

    def __call__(self) -> Engine:
        return ClipsEngine(self)


class ClipsEngine(BatchEngine):
    def __init__(self, settings: BuildClips) -> None:
        """Raises ``UserError`` for a run without checkpoint, and for one that was trained without a captioner."""
        try:
            import torch

            from clips_data import __version__
            from clips_train import generate
        except ImportError as error:
            raise UserError(
                f"The clips engine needs {error.name}, which is not installed. Run: pip install 'clips[train]'"
            ) from None

        super().__init__(settings.max_batch_rows)
        self._trained = generate.load_trained(Path(settings.run), settings.device)
        if self._trained.model.decoder is None:
            raise UserError(f"{self._trained.folder} has no captioner: it was trained with decoder false.")
        on_gpu = self._trained.device.type == "cuda"
        self.about: dict[str, Any] = {
            "engine_version": f"clips {__version__}, torch {torch.__version__}",
            "device": torch.cuda.get_device_name(self._trained.device) if on_gpu else str(self._trained.device),
            "num_gpus": int(on_gpu),
            "special_tokens": SPECIAL_TOKENS[self._trained.config.tokenizer],
            "capacity": 2 * settings.max_batch_rows,
        }

    def add(self, number: int, request: Request) -> None:
        """Raises ``UserError`` for what no request to this captioner may have: all rows of a prompt have it."""
        for asked, what in (
            (request.image is None, "a prompt without image"),
            (request.system is not None, "a system text"),
            (request.shape is not None, "several outputs"),
        ):
            if asked:
                raise UserError(
                    f"A captioner that clips trained cannot serve {what}: it takes an image and a web caption. Use a "
                    'prompt with inputs [image, web] whose only text is user: "{web}", or another --model.'
                )
        super().add(number, request)

    def answer(self, requests: list[Request]) -> list[Answer]:
        import torch

        pixels = [self._pixels(request) for request in requests]
        whole = [row for row, picture in enumerate(pixels) if picture is not None]
        answers = [Answer("unreadable_image")] * len(requests)
        if whole:
            stacked = torch.stack([picture for picture in pixels if picture is not None])
            for row, found in zip(whole, self._captions(stacked, [requests[row].user for row in whole]), strict=True):
                answers[row] = found
        return answers

    def _pixels(self, request: Request) -> torch.Tensor | None:
        from clips_train import transforms

        side_px = self._trained.config.image_px
        assert request.image is not None
        try:
            return transforms.squash(transforms.decode(request.image, side_px), side_px)
        except transforms.BadImage:
            return None

    def _captions(self, pixels_BCHW: torch.Tensor, web_captions: list[str]) -> list[Answer]:
        """What ``generate.caption_images`` does, with the ids kept: they tell how an answer ended."""
        import torch

        from clips_train import generate, transforms

        model, tokenizer, config = self._trained.model, self._trained.tokenizer, self._trained.config
        assert model.decoder is not None
        with torch.inference_mode():
            device = self._trained.device
            _, patch_tokens_BPW = model.encode_image(transforms.normalise(pixels_BCHW.to(device)))
            ids_BL = tokenizer.text_ids(web_captions, config.context_length).to(device)
            _, web_states_BTW = model.encode_text(ids_BL)
            states_BQD = model.caption_states(patch_tokens_BPW, web_states_BTW)
            ids = generate.decode_slots(states_BQD, model.decoder.head.weight, tokenizer.eos_id)
        most = states_BQD.shape[1]
        return [
            Answer(
                "ok",
                tokenizer.decode(row),
                "length" if len(row) == most else "stop",
                len(row),
                min(tokenizer.num_tokens(web), tokenizer.budget(config.context_length)),
            )
            for row, web in zip(ids, web_captions, strict=True)
        ]
