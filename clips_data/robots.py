"""robots.txt by RFC 9309: asked once per origin, kept in this process and, for all of a machine, in a folder.

A robots.txt that does not exist (4xx) allows everything; one that the server fails to give (5xx, 429, no answer in
time) forbids everything until it is asked again. Where the host itself cannot be reached, that is what the row says.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clips_data import ledger, locks
from clips_data.addresses import Refused
from clips_data.errors import UserError
from clips_data.once import Answer, OnceCache

if TYPE_CHECKING:
    from protego import Protego

MAX_ROBOTS_BYTES = 500_000
KEEP_S, KEEP_FAILURE_S, KEEP_UNREACHABLE_S = 24 * 3600.0, 600.0, 60.0
MAX_KEPT_BYTES, LEAST_WEIGHT = 4_000_000, 1000  # of robots.txt text; the parsed rules take some ten times that
LOCK_DIGITS = 3
# Failures that the images of the same origin would share: no sign of what their owner wants.
UNREACHABLE_CODES = frozenset({"dns", "connect", "tls", "blocked_address", "bad_url"})


class Origin(NamedTuple):
    """What a robots.txt speaks for."""

    scheme: str
    host: str
    port: int

    @property
    def in_brackets(self) -> str:
        """The host as a URL and a Host header spell it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def robots_url(self) -> str:
        return f"{self.scheme}://{self.in_brackets}:{self.port}/robots.txt"


@dataclass(frozen=True)
class Heard:
    """What came of asking for a robots.txt: its text, or ``code`` and ``detail`` of the failure."""

    text: str = ""
    code: str = "ok"
    detail: str = ""


class _Rules(NamedTuple):
    heard: Heard
    parsed: Protego | None


_kept: OnceCache[_Rules] = OnceCache(MAX_KEPT_BYTES)


def crawl_delay_s(origin: Origin, target: str, agent: str, folder: Path | None, ask: Callable[[str], Heard]) -> float:
    """Seconds that ``origin`` wants between requests of ``agent``, 0 where it names none.

    ``target`` is path and query of the request. Raises ``Refused`` where it is not allowed. ``ask`` fetches a
    robots.txt and never raises; it is called once per origin, in one of the processes that share ``folder``.
    """
    rules = _kept.get(origin, lambda: _answer(origin, folder, ask))
    heard = rules.heard
    if heard.code in UNREACHABLE_CODES:
        raise Refused(heard.code, f"robots.txt: {heard.detail}")
    if heard.code != "ok":
        reason = f"robots.txt of {origin.host}: not given ({heard.detail}), so nothing is allowed"
        raise Refused("opt_out", reason, evidence=reason)
    if rules.parsed is None:
        return 0.0
    # Protego wants a whole URL: it would take a target that starts with // for one without a scheme.
    if not rules.parsed.can_fetch(f"http://host{target}", agent):
        reason = f"robots.txt of {origin.host}: Disallow for {agent}"
        raise Refused("opt_out", reason, evidence=reason)
    return rules.parsed.crawl_delay(agent) or 0.0


def forget() -> None:
    """Empties this process' memory."""
    _kept.clear()


def _answer(origin: Origin, folder: Path | None, ask: Callable[[str], Heard]) -> Answer[_Rules]:
    from protego import Protego

    heard, age_s = _look_up(origin, folder, ask)
    parsed = Protego.parse(heard.text) if heard.code == "ok" and heard.text else None
    return Answer(_Rules(heard, parsed), _keep_s(heard) - age_s, max(LEAST_WEIGHT, len(heard.text)))


def _keep_s(heard: Heard) -> float:
    if heard.code in UNREACHABLE_CODES:
        return KEEP_UNREACHABLE_S
    return KEEP_S if heard.code == "ok" else KEEP_FAILURE_S


def _look_up(origin: Origin, folder: Path | None, ask: Callable[[str], Heard]) -> tuple[Heard, float]:
    """What another process heard and how old it is, or what ``ask`` hears now. One process asks at a time."""
    if folder is None:
        return ask(origin.robots_url), 0.0
    digest = ledger.digest_bytes(origin.robots_url.encode())
    path = folder / digest[:2] / f"{digest[:32]}.json"
    try:
        # One of 4096 locks that all origins share: a lock per origin would leave a file behind for each.
        with locks.locked(folder, f"lock-{digest[:LOCK_DIGITS]}"):
            known = _read(path)
            if known is not None and known[1] < _keep_s(known[0]):
                return known
            heard = ask(origin.robots_url)
            if heard.code not in UNREACHABLE_CODES:  # a later run may come with the network mended
                ledger.write_json(path, {"robots_url": origin.robots_url, "asked_at": time.time(), **heard.__dict__})
            return heard, 0.0
    except (OSError, UserError):
        # A folder that cannot be used costs further questions; the disk is complained of where shards are written.
        return ask(origin.robots_url), 0.0


def _read(path: Path) -> tuple[Heard, float] | None:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        heard = Heard(content["text"], content["code"], content["detail"])
        return heard, max(0.0, time.time() - content["asked_at"])
    except (FileNotFoundError, ValueError, KeyError):  # none, or another version's: ask again
        return None
