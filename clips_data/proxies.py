"""The proxies that the environment names, for those who ask for them with ``--env-proxy``.

A proxy is the user's own choice, so its address is not checked; what it dials for us cannot be.
"""

from __future__ import annotations

import base64
import functools
import socket
import urllib.request
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from clips_data.addresses import Refused

DEFAULT_PORT = 8080


class Proxy(NamedTuple):
    """Where a proxy is, and the header line that it wants, "" where it wants none."""

    places: tuple[tuple[str, int], ...]
    authorization: str


def of_environment(scheme: str, host: str) -> Proxy | None:
    """The proxy for ``host`` by http_proxy, https_proxy, all_proxy and no_proxy. ``Refused`` for a broken one."""
    proxies = urllib.request.getproxies()
    url = proxies.get(scheme) or proxies.get("all")
    if not url or urllib.request.proxy_bypass(host):
        return None
    return _proxy(url if "://" in url else f"http://{url}")


@functools.lru_cache(16)
def _proxy(url: str) -> Proxy:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or DEFAULT_PORT
        if parts.scheme != "http" or not host:
            raise ValueError
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Refused("dns", f"the proxy of the environment: {error.strerror}", retry=True) from None
    except ValueError:
        raise Refused("connect", "the proxy of the environment is no http:// URL") from None
    authorization = ""
    if parts.username is not None:
        secret = base64.b64encode(f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()).decode()
        authorization = f"Proxy-Authorization: Basic {secret}\r\n"
    return Proxy(tuple((str(entry[4][0]), port) for entry in found), authorization)
