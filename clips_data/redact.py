"""Takes secrets out of URLs before these are written anywhere: signatures, tokens, passwords. Standard library only.

What is left still tells one image from another, so that rows can be matched by their redacted URL; a signature that
was renewed does not make a URL a new one.
"""

from __future__ import annotations

import hashlib
import re
from urllib.parse import SplitResult, urlsplit

REDACTED = "REDACTED"
_SECRET_NAMES = frozenset((
    "signature", "sig", "sign", "hmac", "token", "auth", "authorization", "password", "passwd", "pwd", "secret",
    "policy", "key-pair-id", "credential", "credentials", "api_key", "apikey", "api-key", "access_key", "accesskey",
    "accesskeyid", "awsaccesskeyid", "googleaccessid", "ossaccesskeyid", "session", "sessionid", "jwt", "bearer",
    "hdnea", "hdnts", "__token__", "client_secret", "verify",
))  # fmt: skip
_SECRET_PREFIXES = ("x-amz-", "x-goog-", "x-oss-", "x-cos-")
_SECRET_ENDINGS = ("token", "_sig", "signature", "_key", "-key", "secret")
# A long run of letters and digits may be a signature under a name that nobody can list.
_LONG_VALUE = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9+/=_%.~-]{24,}")
_PATH_PARAMETER = re.compile(r";([^;/]*)")
_LOOKS_LIKE_URL = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*://\S+\s*")


def redact(url: str) -> str:
    """``url`` without passwords, fragments and the values of query parameters that are or may be secrets.

    Parameters with a secret's name keep no trace of their value; other long random values are replaced by the first
    eight digits of their sha256, so that different URLs stay different. What cannot be parsed as a URL ends at its
    first ``?`` or ``#``.
    """
    try:
        parts = urlsplit(url)
        netloc = _without_password(parts)
    except ValueError:
        return re.sub(r"[^/]*@", f"{REDACTED}@", re.split(r"[?#]", url, maxsplit=1)[0])
    query = "".join(_redacted_pair(piece) for piece in re.split("([&;])", parts.query))
    path = _PATH_PARAMETER.sub(lambda found: ";" + _redacted_pair(found[1]), parts.path)
    return parts._replace(netloc=netloc, path=path, query=query, fragment="").geturl()


def without_secrets(value: object) -> object:
    """``value``, redacted where it is a text that looks like a URL: lists carry URLs in other columns too."""
    return redact(value) if isinstance(value, str) and _LOOKS_LIKE_URL.fullmatch(value) else value


def host_of(url: str) -> str:
    """The lower-case host name of ``url``, "" where it has none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def _without_password(parts: SplitResult) -> str:
    user, at, place = parts.netloc.rpartition("@")
    return f"{REDACTED}@{place}" if at and user else place


def _redacted_pair(pair: str) -> str:
    name, equals, value = pair.partition("=")
    word = name.lower()
    if (
        equals
        and value
        and (word in _SECRET_NAMES or word.startswith(_SECRET_PREFIXES) or word.endswith(_SECRET_ENDINGS))
    ):
        return f"{name}={REDACTED}"
    is_telling = word == "key" and value and not value.startswith(REDACTED)  # an access key, or what tells the image
    if is_telling or _LONG_VALUE.fullmatch(value):
        return f"{name}={REDACTED}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"
    if not equals and _LONG_VALUE.fullmatch(name):
        return f"{REDACTED}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return pair
