"""What is done to texts on their way into a prompt and out of a model. Each rule is a function with one verdict.

Nothing is rewritten by guess: a caption is kept as it is or rejected with a code; ``raw`` keeps what the model said.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

MAX_INPUT_CHARS = 1000
_CONTROL = {"Cc", "Cf", "Cs", "Co", "Cn"}
_REFUSALS = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry,|i cannot|i can'?t|i am unable|i'?m unable|as an ai\b|unfortunately, i)", re.I
)


def neutralise(text: str, special_tokens: Iterable[str], max_chars: int = MAX_INPUT_CHARS) -> tuple[str, list[str]]:
    """An untrusted text made safe to stand in a prompt, and flags for what was done.

    Removes the model's special tokens (until none is left, as removing one can join another), control and
    bidirectional characters, folds white space, and caps the length.
    """
    flags = []
    plain = "".join(" " if unicodedata.category(c) in _CONTROL else c for c in text)
    specials = sorted(filter(None, special_tokens), key=len, reverse=True)
    if specials:
        pattern = re.compile("|".join(re.escape(token) for token in specials), re.I)
        while True:
            removed = pattern.sub(" ", plain)
            if removed == plain:
                break
            plain = removed
            flags.append("input_special_token")
    plain = " ".join(plain.split())
    if len(plain) > max_chars:
        plain = plain[:max_chars]
        flags.append("input_cut")
    return plain, list(dict.fromkeys(flags))


def judge(caption: str, instruction: str) -> str:
    """The code of a model's answer: ``ok`` or why it is rejected."""
    if not caption:
        return "empty"
    if is_refusal(caption):
        return "refused"
    if is_echo(caption, instruction):
        return "echo"
    if is_loop(caption):
        return "loop"
    return "ok"


def is_refusal(caption: str) -> bool:
    """Opens as models do that decline to answer."""
    return bool(_REFUSALS.match(caption))


def is_echo(caption: str, instruction: str) -> bool:
    """Repeats the instruction instead of following it."""
    return len(instruction) > 10 and caption.lower().startswith(instruction.lower().rstrip("."))


def is_loop(caption: str, *, words_in_phrase: int = 6, max_repeats: int = 3) -> bool:
    """Says the same six words more than three times: the model is stuck."""
    words = caption.lower().split()
    phrases = Counter(tuple(words[i : i + words_in_phrase]) for i in range(len(words) - words_in_phrase + 1))
    return bool(phrases) and max(phrases.values()) > max_repeats
