"""From a request to the token ids of a model's own chat template, for the engines that run a model themselves."""

from __future__ import annotations

import contextlib
from typing import Any

from clips_data.errors import UserError
from clips_data.recaption.engines import Request


def prompt_text(tokenizer: Any, request: Request) -> str:
    """The request in the chat template, with one marker where its image goes.

    Many templates know no system role: they refuse it or pass over it. There the system text opens the user's turn.
    Raises ``UserError`` where there is no template, or none that takes the request.
    """
    from jinja2.exceptions import TemplateError

    if request.system is not None:
        with contextlib.suppress(ValueError, TemplateError):
            text = _filled(tokenizer, request, request.user, request.system)
            if request.system.strip() in text:
                return text
    user = request.user if request.system is None else f"{request.system.strip()}\n\n{request.user}"
    try:
        return _filled(tokenizer, request, user, None)
    except (ValueError, TemplateError) as error:
        raise UserError(
            f"The model's chat template cannot take the prompt: {error} Choose an instruction-tuned model."
        ) from None


def _filled(tokenizer: Any, request: Request, user: str, system: str | None) -> str:
    content: Any = user
    if request.image is not None:
        content = [{"type": "image"}, {"type": "text", "text": user}]
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def prompt_ids(tokenizer: Any, request: Request) -> list[int]:
    """The token ids of ``prompt_text``. Special tokens stand where the template puts them, and nowhere else."""
    ids: list[int] = tokenizer.encode(prompt_text(tokenizer, request), add_special_tokens=False)
    return ids


def image_token_id(config: Any) -> int | None:
    """The id of the image's marker, by the model's config; ``None`` for models without images."""
    for name in ("image_token_index", "image_token_id"):
        if (number := getattr(config, name, None)) is not None:
            return int(number)
    return None


def holds_its_image(ids: list[int], request: Request, image_token: int | None) -> bool:
    """Whether there are as many markers as images. If not, a text made itself an image."""
    return image_token is None or ids.count(image_token) == int(request.image is not None)


def check(tokenizer: Any, image_token: int | None, *, needs_image: bool) -> None:
    """Raises ``UserError`` at the start where every row would fail."""
    request = Request(b"" if needs_image else None, None, "A", 0)
    ids = prompt_ids(tokenizer, request)
    if not holds_its_image(ids, request, image_token):
        assert image_token is not None
        raise UserError(
            f"The model's chat template puts {ids.count(image_token)} image markers into a prompt with "
            f"{int(needs_image)} images. Choose a model whose template knows images."
        )


def special_tokens(tokenizer: Any) -> list[str]:
    """What must not stand in a text from outside: special and added tokens, and what opens a turn in the template."""
    from jinja2.exceptions import TemplateError

    words = {word for word in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()) if not word.isalnum()}
    turn = {"role": "user", "content": "\0"}
    for messages in ([turn], [turn, {"role": "assistant", "content": "\0"}, turn]):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (ValueError, TemplateError):  # no template: said when the engine starts
            continue
        for word in sorted(words, key=len, reverse=True):
            text = text.replace(word, "\0")
        words |= {piece.strip() for piece in text.split("\0") if piece.strip().endswith(":")}
    return sorted(word for word in words if len(word.strip()) > 2)


def of_processor(model: str, **options: Any) -> str | None:
    """The chat template that a checkpoint's processor has."""
    import transformers

    template: str | None = getattr(transformers.AutoProcessor.from_pretrained(model, **options), "chat_template", None)
    return template
