"""What a caption looks like without a model: cheap rules with names, told of every scored column.

The rules that captions of models are held against too are those of ``recaption.clean`` and ``recaption.untrusted``.
These cost milliseconds on a long caption, so each is asked only where its first condition, a character or a number of
digits, is met. Their dear ones (instructions, loops, languages) are left to ``clips recaption`` and ``clips stats``.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

from clips_data.recaption import clean, untrusted

FLAGS: Final = {
    "url": "has a web address",
    "email": "has an e-mail address",
    "phone": "has a telephone number",
    "markup": "has HTML tags or entities",
    "file_name": "is the name of an image file",
    "all_caps": "is two words or more, all in capital letters",
    "no_language": "less than half of its characters are letters",
    "repeated_words": "says one word three times in a row, or spends a quarter of its words and five on one word",
    "opener": "opens with words about there being a picture",
    "special_token": "has a special token of a model or chat template",
    "role_marker": "has a role marker of a plain-text chat template",
    "control": "has control, bidirectional or other invisible characters",
}
"""The flags in the order in which they are given, and what they mean."""

MAY_BE_TOKEN: Final = re.compile(
    "[<>\\[\\]|#:◁▷＜＞［］｜＃：﹤﹥﹟﹕︓︱︳≮≯⩴℅﹇﹈"
    "\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
"""One of these, or a character that cannot be printed, is in whatever ``untrusted.neutralise`` takes out."""
_MARKUP: Final = re.compile(
    r"</?(?:a|abbr|b|big|body|br|center|code|div|em|font|h[1-6]|hr|html|i|iframe|img|li|ol|p|pre|script|small|span"
    r"|strong|style|sub|sup|table|tbody|td|th|tr|u|ul)(?:\s[^<>]{0,400})?/?>|&(?:[a-z]{2,8}|#[0-9]{2,6}|#x[0-9a-f]{2,6});",
    re.IGNORECASE,
)
_FILE_NAME: Final = re.compile(r"\S{1,200}\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|heic|avif)", re.IGNORECASE)
_IN_ADDRESS: Final = re.compile(r"\.\w|//")
_DIGIT: Final = re.compile("[0-9]")
_DIGITS_OF_PHONE: Final = 6


def flags(caption: str) -> list[str]:
    """The flags of a caption, in the order of ``FLAGS``; none for an empty one."""
    if not caption:
        return []
    told = _told_by_untrusted(caption)
    found = {
        "url": bool(_IN_ADDRESS.search(caption)) and clean.has_url(caption),
        "email": "@" in caption and clean.has_email(caption),
        "phone": len(_DIGIT.findall(caption)) >= _DIGITS_OF_PHONE and clean.has_phone(caption),
        "markup": bool(_MARKUP.search(caption)),
        "file_name": bool(_FILE_NAME.fullmatch(caption)),
        "all_caps": is_all_caps(caption),
        "no_language": is_no_language(caption),
        "repeated_words": has_repeated_words(caption),
        "opener": clean.has_opener(caption),
        **dict.fromkeys(told, True),
    }
    return [name for name in FLAGS if found.get(name)]


def _told_by_untrusted(caption: str) -> list[str]:
    if caption.isprintable() and not MAY_BE_TOKEN.search(caption):
        return []
    _, told = untrusted.neutralise(caption, (), max_chars=len(caption))
    return [name.removeprefix("input_") for name in told]


def is_all_caps(caption: str) -> bool:
    """Single words are not told: "NASA" and "BMW" are no shouting. Scripts without case never are."""
    return caption.isupper() and sum(any(c.isalpha() for c in word) for word in caption.split()) >= 2


def is_no_language(caption: str) -> bool:
    """Numbers, codes and signs. White space counts for nothing; letters are those of any script."""
    signs = "".join(caption.split())
    return 2 * sum(map(str.isalpha, signs)) < len(signs)


def has_repeated_words(caption: str) -> bool:
    """Keyword lists ("red shoes, red dress, red bag, …") and stutters. Words of one or two letters are passed over."""
    words = [word for piece in caption.lower().split() if len(word := piece.strip(".,;:!?|-–—()\"'")) > 2]
    if any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False)):
        return True
    most = max(Counter(words).values(), default=0)
    return most >= 5 and 4 * most > len(words)
