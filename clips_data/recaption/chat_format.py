"""What is written to a server that speaks OpenAI's chat completions, and how to read what it writes back."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any, Final

from clips_data.recaption.engines import Answer, Decoding, Request

_MEDIA_TYPES: Final = (
    (re.compile(rb"\xff\xd8\xff"), "image/jpeg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "image/png"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "image/webp"),
    (re.compile(rb"GIF8[79]a"), "image/gif"),
    (re.compile(rb".{4}ftypavi[fs]", re.DOTALL), "image/avif"),
)
# The words that servers refuse with. vLLM's, SGLang's and OpenAI's were looked at; others say much the same.
_TAKES_NO_IMAGES: Final = re.compile(
    r"not a multimodal model|at most 0 image|(not|n't) (support|accept|take|process)\w* (image|vision|multimodal)", re.I
)
_KNOWS_NO_MODEL: Final = re.compile(r"model.{0,80}(not (be )?found|unknown|not exist|not a valid|invalid)", re.I)
_FILTERED: Final = re.compile(r"content[ _](filter|management|policy)|moderation|safety system", re.I)
_TOO_LONG: Final = re.compile(
    r"context[ _](length|window|size)|max_model_len|(prompt|input|message)s? (is|are) too (long|large)"
    r"|too many (input |prompt )?tokens|(maximum|max|limit)\D{0,30}\d+ (input |prompt )?tokens|longer than the max",
    re.I,
)
_OF_THE_IMAGE: Final = re.compile(r"\bimages?\b|image_url|multimodal data|base64|media", re.I)


@dataclass(frozen=True)
class Dialect:
    """What a server was found to understand. ``takes_all``: vLLM's decoding settings beside OpenAI's own."""

    takes_all: bool = False
    tokens_key: str = "max_tokens"


def write_request(request: Request, model: str, dialect: Dialect) -> bytes | None:
    """The body of a chat completion, image first; ``None`` where the image is of no kind that servers know."""
    content: Any = request.user
    if request.image is not None:
        kind = next((name for magic, name in _MEDIA_TYPES if magic.match(request.image)), None)
        if kind is None:
            return None
        url = f"data:{kind};base64,{base64.b64encode(request.image).decode('ascii')}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": request.user}]
    messages = [{"role": "user", "content": content}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": request.system})
    body = {"model": model, "messages": messages, "seed": request.seed, "stream": False}
    if request.shape is not None:
        schema = {"name": "answer", "schema": request.shape, "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return json.dumps(body | _sampling(request.decoding, dialect)).encode()


def _sampling(decoding: Decoding, dialect: Dialect) -> dict[str, Any]:
    always = {
        dialect.tokens_key: decoding.max_tokens,
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
    }
    names = ("top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    others = {name: getattr(decoding, name) for name in names}
    if not dialect.takes_all:
        others = {name: value for name, value in others.items() if value != getattr(Decoding, name)}
    elif not decoding.top_k:
        others["top_k"] = -1  # all tokens to old and new releases; 0 to new ones only
    return always | others | ({"stop": list(decoding.stop)} if decoding.stop else {})


def read_answer(content: Any) -> Answer | None:
    """The answer in a chat completion; ``None`` where it is none, or was broken off by the server."""
    try:
        choice = content["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (TypeError, KeyError, IndexError, AttributeError):
        return None
    if isinstance(text, list):
        text = "".join(str(part.get("text") or "") for part in text if isinstance(part, dict))
    if not isinstance(text, str | None) or reason in ("abort", "error"):
        return None
    tokens, prompt_tokens = _count(content, "completion_tokens"), _count(content, "prompt_tokens")
    if refusal or reason == "content_filter":
        return Answer("refused", "", "stop", tokens, prompt_tokens)
    return Answer("ok", text or "", "length" if reason == "length" else "stop", tokens, prompt_tokens)


def _count(content: dict[str, Any], name: str) -> int:
    usage = content.get("usage")
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) else 0


def refusal_code(said: str) -> str:
    """The code of a row that a server refuses as the client's fault."""
    for words, code in ((_FILTERED, "refused"), (_TOO_LONG, "prompt_too_long"), (_OF_THE_IMAGE, "unreadable_image")):
        if words.search(said):
            return code
    return "engine_error"


def takes_no_images(said: str) -> bool:
    return _TAKES_NO_IMAGES.search(said) is not None


def knows_no_model(said: str) -> bool:
    return _KNOWS_NO_MODEL.search(said) is not None
