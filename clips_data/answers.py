"""What a server says with the head of an answer: what became of the request, when to come back, and what it forbids."""

from __future__ import annotations

import email.utils
import re
import time
from collections.abc import Mapping, Sequence

from clips_data.addresses import Refused
from clips_data.wire import Head

OPT_OUT_DIRECTIVES = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
# Directives with a value; any other word before a colon is the robot that the directives after it are for.
VALUED_DIRECTIVES = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})

_SPACES = re.compile(r"[\s;]+")
_ROBOT = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*|\*")


class Busy(Refused):
    """The server asks to come back later, after ``asked_s`` where it says when."""

    def __init__(self, status: int, asked_s: float | None) -> None:
        super().__init__(f"http_{status // 100}xx", f"HTTP {status}", retry=True)
        self.asked_s = asked_s


def check_status(head: Head) -> None:
    """Raises ``Refused`` for every status but 2xx."""
    status = head.status
    if 200 <= status < 300:
        return
    if status in (429, 503):
        raise Busy(status, retry_after_s(head.get("retry-after")))
    if 300 <= status < 400:
        raise Refused("http_3xx", f"HTTP {status}")
    if 500 <= status < 600:
        raise Refused("http_5xx", f"HTTP {status}", retry=True)
    raise Refused("http_4xx", f"HTTP {status}")  # 999 and the like are refusals, too


def retry_after_s(value: str) -> float | None:
    """Retry-After in seconds, from its number or its HTTP date; ``None`` where there is none."""
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def opt_out(headers: Mapping[str, Sequence[str]], user_agent: str) -> str:
    """The header by which a server opts out of this use for ``user_agent``, "" where none does.

    ``X-Robots-Tag`` may hold directives for several robots (``otherbot: noindex, clips: noai``); those before the
    first name are for all.
    """
    for value in headers.get("x-robots-tag", ()):
        is_for_us = True
        for piece in value.split(","):
            name, colon, rest = piece.partition(":")
            name = name.strip().lower()
            if colon and name not in VALUED_DIRECTIVES and _ROBOT.fullmatch(name):
                is_for_us = name in (user_agent.lower(), "*")
                name = rest.strip().lower()
            if is_for_us and not OPT_OUT_DIRECTIVES.isdisjoint(_SPACES.split(name)):
                return f"X-Robots-Tag: {value}"
    if any(value.strip() == "1" for value in headers.get("tdm-reservation", ())):
        return "tdm-reservation: 1"
    return ""
