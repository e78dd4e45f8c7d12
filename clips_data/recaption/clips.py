"""The clips engine: a captioner that ``clips train`` made, on the image and, for most, a text beside it.

It is given no instruction: the prompt's text is that text and nothing else, a web caption (``user: "{web}"``) or
another column; a captioner of the image alone is given none (``user: ""``). A teacher-forced captioner decodes as the
prompt's sampling says; the slots of ``queries`` do not see each other's words (METHOD §2.3), so only greedy is left.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clips_data.errors import UserError
from clips_data.recaption.choosing import GREEDY_BELOW
from clips_data.recaption.engines import Answer, BatchEngine, Engine, Request

if TYPE_CHECKING:
    import torch

    from clips_data.recaption import engines
    from clips_train.decoding import Decoding

SPECIAL_TOKENS: Final = {
    "bpe": ("<start_of_text>", "<end_of_text>"),
    "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
}
"""By tokenizer, what stands for a special id when it stands in a text."""
NO_COUNTERPART: Final = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": ()}
"""Decoding settings that the captioner does not know, by the value that asks for nothing."""


@dataclass(frozen=True)
class BuildClips:
    """Builds the engine in the child process that it is sent to.

    ``run`` is the folder of a training run, whose newest checkpoint is taken, or that of a checkpoint. ``columns`` are
    those that the prompt reads beside the image; ``None`` leaves it to the rows whether they fit the captioner.
    """

    run: str
    max_batch_rows: int = 64
    device: str = "auto"
    columns: tuple[str, ...] | None = None

    def __call__(self) -> Engine:
        return ClipsEngine(self)


class ClipsEngine(BatchEngine):
    def __init__(self, settings: BuildClips) -> None:
        """Raises ``UserError`` for a run without checkpoint or captioner, and for a prompt whose inputs do not fit."""
        try:
            import torch

            from clips_data import __version__
            from clips_train import decoding, generate
        except ImportError as error:
            raise UserError(
                f"The clips engine needs {error.name}, which is not installed. Run: pip install 'clips[train]'"
            ) from None

        super().__init__(settings.max_batch_rows)
        self._trained = generate.load_trained(Path(settings.run), settings.device)
        generate.check(self._trained, decoding.GREEDY)
        if settings.columns is not None:
            self._check_columns(settings.columns)
        self._has_warned = False
        on_gpu = self._trained.device.type == "cuda"
        self.about: dict[str, Any] = {
            "engine_version": f"clips {__version__}, torch {torch.__version__}",
            "device": torch.cuda.get_device_name(self._trained.device) if on_gpu else str(self._trained.device),
            "num_gpus": int(on_gpu),
            "special_tokens": SPECIAL_TOKENS[self._trained.config.tokenizer],
            "capacity": 2 * settings.max_batch_rows,
        }

    def _check_columns(self, columns: tuple[str, ...]) -> None:
        trained = self._trained
        if columns and not trained.reads_text:
            raise UserError(
                f"The captioner of {trained.folder} reads the image alone, and the prompt also has "
                f'{", ".join(columns)}. Use a prompt with inputs [image] whose only text is user: "".'
            )
        if not columns and trained.needs_text:
            raise UserError(
                f"The captioner of {trained.folder} was never trained without a text beside the image, and the prompt "
                'reads none. Use a prompt with inputs [image, web] whose only text is user: "{web}", or train with '
                "--condition-drop 0.1 or --condition none."
            )

    def add(self, number: int, request: Request) -> None:
        """Raises ``UserError`` for what no request to this captioner may have: all rows of a prompt have it."""
        from clips_train import generate

        for asked, what in (
            (request.image is None, "a prompt without image"),
            (request.system is not None, "a system text"),
            (request.shape is not None, "several outputs"),
            (bool(request.user.strip()) and not self._trained.reads_text, "a text: it reads the image alone"),
        ):
            if asked:
                raise UserError(
                    f"The captioner of {self._trained.folder} cannot serve {what}. Use a prompt with inputs "
                    '[image, web] whose only text is user: "{web}", or inputs [image] and user: "" for one that reads '
                    "the image alone, or another --model."
                )
        generate.check(self._trained, self._decoding(request.decoding))
        super().add(number, request)

    def _decoding(self, asked: engines.Decoding) -> Decoding:
        """The prompt's settings as the captioner's own. Raises ``UserError`` for those that it does not have."""
        from clips_train.decoding import Decoding

        for name, nothing in NO_COUNTERPART.items():
            if getattr(asked, name) != nothing:
                raise UserError(
                    f"A captioner that clips trained knows no {name}. Leave it out of the prompt's sampling, or use "
                    "another --model."
                )
        greedy = Decoding(max_tokens=asked.max_tokens, repetition_penalty=asked.repetition_penalty)
        if asked.temperature < GREEDY_BELOW:
            return greedy
        return replace(
            greedy,
            strategy="top_p",
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
        )

    def answer(self, requests: list[Request]) -> list[Answer]:
        answers = [Answer("unreadable_image")] * len(requests)
        pixels = [self._pixels(request) for request in requests]
        whole = [row for row, picture in enumerate(pixels) if picture is not None]
        # A prompt may draw settings for each row (top_k_weights).
        for decoding, rows in _alike(whole, [self._decoding(request.decoding) for request in requests]):
            pictures = [picture for row in rows if (picture := pixels[row]) is not None]
            for row, found in zip(
                rows, self._captions(pictures, [requests[row] for row in rows], decoding), strict=True
            ):
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

    def _captions(self, pixels: list[torch.Tensor], requests: list[Request], decoding: Decoding) -> list[Answer]:
        import torch

        from clips_train import generate

        trained, texts = self._trained, [request.user for request in requests]
        if not self._has_warned and (warning := generate.missing_text(trained, texts)):
            print(warning, file=sys.stderr, flush=True)
            self._has_warned = True
        keys = [str(request.seed) for request in requests]
        found = generate.captions(trained, torch.stack(pixels), texts, decoding=decoding, keys=keys)
        budget = trained.tokenizer.budget(trained.config.context_length)
        return [
            Answer("ok", one.text, one.finish, one.num_tokens, min(trained.tokenizer.num_tokens(text), budget))
            for one, text in zip(found, texts, strict=True)
        ]


def _alike(rows: list[int], decodings: list[Decoding]) -> list[tuple[Decoding, list[int]]]:
    """Rows that decode alike, together."""
    together: dict[Decoding, list[int]] = {}
    for row in rows:
        together.setdefault(decodings[row], []).append(row)
    return list(together.items())
