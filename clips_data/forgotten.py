"""What a data set was told to forget: hosts by name, URLs and images by digest only, in ``pairs/forgotten.json``.

The downloader asks this list before every request, so that neither ``--append`` nor ``--retry`` brings anything back.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from clips_data import ledger, schema
from clips_data.errors import UsageError, UserError
from clips_data.redact import host_of, redact

FILE: Final = "forgotten.json"
PLAN: Final = "forgetting.json"
"""There while a removal is under way, see ``forget.py``."""
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
_HOST: Final = re.compile(r"[^\s/?#@:\[\]\\]+")


@dataclass(frozen=True)
class Forgotten:
    """What is, or is to be, forgotten. Small, and can be pickled to worker processes."""

    hosts: frozenset[str] = frozenset()
    urls: frozenset[str] = frozenset()
    """sha256 of redacted URLs, so that a renewed signature makes no difference."""
    images: frozenset[str] = frozenset()
    """sha256 of images, as downloaded or as stored."""
    lineage: Mapping[str, str] = field(default_factory=dict)
    """Digest of a ``shards/`` folder before samples were removed → after: tells which runs saw more than is there."""

    def matches(self, url: str | None, sha256: str | None = None) -> bool:
        """Whether a row with this URL, or this image, is not to be had."""
        if sha256 is not None and sha256 in self.images:
            return True
        return url is not None and (self.has_host(host_of(url)) or bool(self.urls and url_digest(url) in self.urls))

    def has_host(self, host: str) -> bool:
        """Whether ``host`` is one of these or below one. A name without a dot (``com``) has nothing below it."""
        labels = host.split(".")
        parents = (".".join(labels[first:]) for first in range(1, len(labels) - 1))
        return host in self.hosts or any(parent in self.hosts for parent in parents)

    def __or__(self, other: Forgotten) -> Forgotten:
        return Forgotten(
            self.hosts | other.hosts,
            self.urls | other.urls,
            self.images | other.images,
            {**self.lineage, **other.lineage},
        )

    def __bool__(self) -> bool:
        return bool(self.hosts or self.urls or self.images)


def url_digest(url: str) -> str:
    return ledger.digest_bytes(redact(url).encode())


def forgotten(pairs: Path) -> Forgotten:
    """What ``pairs/`` was told to forget so far; nothing where nobody asked."""
    path = pairs / FILE
    if not path.exists():
        return Forgotten()
    try:
        content = json.loads(path.read_text())
        version = content["schema_version"]
        known = {name: frozenset(content[name]) for name in ("hosts", "urls", "images")}
        lineage = dict(content["lineage"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a list that `clips forget` wrote ({error!r}). Restore it.") from None
    if version != schema.SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this version of clips reads {schema.SCHEMA_VERSION}. "
            "Use the clips version that wrote it."
        )
    return Forgotten(**known, lineage=lineage)


def refuse_unfinished(pairs: Path) -> None:
    """For the stages that read ``pairs/``: raises ``UserError`` where a ``clips forget`` was stopped half-way."""
    if (pairs / PLAN).exists():
        raise UserError(
            f"A `clips forget` was stopped half-way in {pairs}. Run it again, which completes it, before anything else."
        )


def remember(pairs: Path, more: Forgotten) -> None:
    """Adds to the list of ``pairs/``."""
    known = forgotten(pairs)
    if (whole := known | more) == known:
        return
    content = {name: sorted(getattr(whole, name)) for name in ("hosts", "urls", "images")}
    ledger.write_json(
        pairs / FILE, {"schema_version": schema.SCHEMA_VERSION, **content, "lineage": dict(whole.lineage)}
    )


# --- what a person asks for -------------------------------------------------------------------------------------------


def asked_for(hosts: Iterable[str] = (), urls: Iterable[str] = (), images: Iterable[str] = ()) -> Forgotten:
    """The hosts, URLs and image hashes as a person writes them. Raises ``UsageError`` for what is none."""
    return Forgotten(
        frozenset(spelling for host in hosts for spelling in _host(host)),
        frozenset(url_digest(_url(url)) for url in urls),
        frozenset(_image(image) for image in images),
    )


def read_list(path: Path) -> Forgotten:
    """A file with one URL, image sha256 or host a line; blank lines and lines that start with # are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}. --list wants a text file, one entry a line.") from None
    found = Forgotten()
    for number, line in enumerate((line.strip() for line in lines), start=1):
        if not line or line.startswith("#"):
            continue
        kind = "urls" if "://" in line else "images" if _SHA256.fullmatch(line) else "hosts"
        try:
            found |= asked_for(**{kind: [line]})
        except UsageError as error:
            raise UserError(f"{path}, line {number}: {error} Nothing was removed.") from None
    return found


def _host(text: str) -> set[str]:
    """The ways in which URLs spell a host: lower case, and other alphabets as such or in ASCII."""
    name = text.strip().strip("[]").rstrip(".").lower()
    try:
        return {str(ipaddress.ip_address(name))}
    except ValueError:
        pass
    if not _HOST.fullmatch(name) or name.startswith("."):
        raise UsageError(f"{redact(text)!r} is not the name of a host. Give it without scheme, port and path.")
    try:
        return {name, name.encode("idna").decode()}
    except UnicodeError:
        return {name}


def _url(text: str) -> str:
    if not host_of(text.strip()):
        raise UsageError(f"{redact(text)!r} is not a whole URL. Give it as the list has it, with http:// or https://.")
    return text.strip()


def _image(text: str) -> str:
    if not _SHA256.fullmatch(text.strip()):
        raise UsageError(f"{text!r} is not the sha256 of an image, which has 64 hexadecimal digits.")
    return text.strip().lower()
