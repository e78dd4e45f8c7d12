"""The likely language of a short text: by its script where that decides it, else by py3langid among a script's own.

Web captions are a few words, often product names, so a doubtful guess is ``unclear`` and not a rare language.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from clips_data import measure

UNCLEAR: Final = "unclear"
NO_LETTERS: Final = "no_letters"
LEAST_CONFIDENCE: Final = 0.5

# One language writes in each of these, by a wide margin; kana before Han, because Japanese uses both.
_OF_SCRIPT: Final = {
    "ja": re.compile("[\u3040-\u30ff]"), "ko": re.compile("[\u1100-\u11ff\uac00-\ud7af]"),
    "zh": re.compile("[\u3400-\u9fff]"), "th": re.compile("[\u0e00-\u0e7f]"), "he": re.compile("[\u0590-\u05ff]"),
    "el": re.compile("[\u0370-\u03ff]"), "hy": re.compile("[\u0530-\u058f]"), "ka": re.compile("[\u10a0-\u10ff]"),
    "bn": re.compile("[\u0980-\u09ff]"), "ta": re.compile("[\u0b80-\u0bff]"), "te": re.compile("[\u0c00-\u0c7f]"),
}  # fmt: skip
# Several do in these. Few candidates, because the model spreads its guesses over all that it is offered.
_AMONG: Final = {
    ("ru", "uk", "bg", "sr", "mk", "be", "kk"): re.compile("[\u0400-\u04ff]"),
    ("ar", "fa", "ur"): re.compile("[\u0600-\u06ff]"),
    ("hi", "mr", "ne"): re.compile("[\u0900-\u097f]"),
    (
        "ca", "cs", "da", "de", "en", "es", "et", "fi", "fr", "hr", "hu", "id", "it", "lt", "lv", "nl", "no", "pl",
        "pt", "ro", "sk", "sl", "sv", "tr", "vi",
    ): re.compile("[A-Za-z\u00c0-\u024f\u1e00-\u1eff]"),
}  # fmt: skip


KNOWN: Final = frozenset((*_OF_SCRIPT, *(code for codes in _AMONG for code in codes)))
"""The codes that ``language`` can give."""


def count(texts: Iterable[str]) -> dict[str, int]:
    """How many of the texts are in which language, most frequent first, then by name."""
    return measure.by_number(Counter(language(text) for text in texts))


def language(text: str) -> str:
    """Two-letter code of the language, ``unclear`` or ``no_letters``. The script with the most letters decides."""
    letters = {known: len(pattern.findall(text)) for known, pattern in (_OF_SCRIPT | _AMONG).items()}
    if letters["ja"]:
        letters["ja"] += letters["zh"]
    most = max(letters.values())
    if most == 0:
        return UNCLEAR if any(character.isalpha() for character in text) else NO_LETTERS
    script = next(known for known, number in letters.items() if number == most)
    if isinstance(script, str):
        return script
    code, confidence = _classifier(script)(text.lower() if text.isupper() else text)
    return str(code) if confidence >= LEAST_CONFIDENCE else UNCLEAR


@functools.cache
def _classifier(candidates: tuple[str, ...]) -> Callable[[str], tuple[str, float]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    model.set_languages(candidates)
    classify: Callable[[str], tuple[str, float]] = model.classify
    return classify
