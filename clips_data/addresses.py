"""Which addresses a stranger's URL may lead to. Host names are spelled in one way, resolved once, and checked.

A host that looks like a number is an IPv4 address to some programs and not to others (``2130706433``, ``0x7f.1``,
``127.1``), so only the dotted quad is taken. Addresses that carry another one inside them (IPv4-mapped, 6to4, Teredo,
NAT64) are refused as a whole: what they lead to is decided by a router and not by us.
"""

from __future__ import annotations

import functools
import ipaddress
import itertools
import re
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from clips_data import draws
from clips_data.errors import UsageError
from clips_data.once import Answer, OnceCache

if TYPE_CHECKING:
    import dns.resolver

KEEP_FOUND_S, KEEP_MISSING_S, MAX_KEPT = 300.0, 60.0, 20_000
DNS_PORT, DNS_SERVER_TIMEOUT_S = 53, 2.0

_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*")
_ENDS_IN_A_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
_FINAL_DNS_ERRORS = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}

# Public by the book, and not for us: 192.0.0.0/24 holds protocol services and a cloud's metadata (192.0.0.192),
# 168.63.129.16 another cloud's; 192.88.99.0/24 are relays of 6to4.
_REFUSED_IPV4 = [ipaddress.ip_network(block) for block in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")]
# Of IPv6 only global unicast is dialled, without Teredo and its siblings, 6to4, and the blocks for documentation.
# Everything else lies outside 2000::/3: IPv4-mapped and -compatible, NAT64 (64:ff9b::/96, 64:ff9b:1::/48), ULA, …
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")
_REFUSED_IPV6 = [ipaddress.ip_network(block) for block in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]


class Refused(Exception):
    """Ends one attempt with one of ``schema.DOWNLOAD_CODES``. ``retry`` says whether another attempt can help."""

    def __init__(self, code: str, detail: str, *, retry: bool = False, evidence: str = "") -> None:
        super().__init__(detail)
        self.code, self.detail, self.retry, self.evidence = code, detail, retry, evidence


class _Resolved(NamedTuple):
    """The addresses of a host, or why there are none, and whether asking again can help."""

    addresses: tuple[str, ...]
    failure: str = ""
    temporary: bool = False


_resolved: OnceCache[_Resolved] = OnceCache(MAX_KEPT)


@functools.lru_cache(4096)
def canonical_host(host: str) -> str:
    """The one spelling of ``host`` that is used from here on: lower case, IDNA, no trailing dot.

    Raises ``Refused`` for what is neither a name nor an address in its ordinary spelling.
    """
    if ":" in host:
        return _canonical_ipv6(host)
    try:
        name = host.lower() if host.isascii() else host.encode("idna").decode().lower()
    except UnicodeError:
        raise Refused("bad_url", "the host is not a name that DNS knows") from None
    name = name.removesuffix(".")
    if not _NAME.fullmatch(name):
        raise Refused("bad_url", "the host is neither a name nor an address")
    if _ENDS_IN_A_NUMBER.fullmatch(name):
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise Refused("blocked_address", f"{name} is no ordinary spelling of an IPv4 address") from None
    return name


def _canonical_ipv6(host: str) -> str:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        raise Refused("bad_url", "the host is not an IPv6 address") from None
    if address.scope_id is not None:
        raise Refused("blocked_address", "an IPv6 zone names an interface of this machine")
    return str(address)


def is_literal(host: str) -> bool:
    """Whether the canonical ``host`` is an address and no name."""
    return ":" in host or bool(_ENDS_IN_A_NUMBER.fullmatch(host))


def allowed_addresses(
    host: str, allow_network: tuple[str, ...], dns_servers: tuple[str, ...], deadline: float
) -> tuple[str, ...]:
    """The addresses of the canonical ``host`` that may be dialled. Raises ``Refused`` when there are none.

    ``deadline`` (of ``time.monotonic``) bounds the wait for ``dns_servers`` and for other threads' questions. The
    system's resolver cannot be interrupted and keeps to its own limits, those of resolv.conf.
    """
    resolved = _resolved.get(
        (host, dns_servers), lambda: _resolve(host, dns_servers, deadline), max(0.0, deadline - time.monotonic())
    )
    if resolved.failure:
        raise Refused("dns", f"{host}: {resolved.failure}", retry=resolved.temporary)
    allowed = tuple(address for address in resolved.addresses if is_allowed(address, allow_network))
    if not allowed:
        raise Refused("blocked_address", f"{host} resolves to {resolved.addresses[0]}, which is not a public address")
    return allowed


@functools.lru_cache(10_000)
def is_allowed(address: str, allow_network: tuple[str, ...] = ()) -> bool:
    """Whether ``address`` is public, or lies in one of the CIDR blocks that the user named."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if any(ip in block for block in networks(allow_network)):
        return True
    if isinstance(ip, ipaddress.IPv6Address):
        return ip in _GLOBAL_IPV6 and ip.is_global and not any(ip in block for block in _REFUSED_IPV6)
    return ip.is_global and not ip.is_multicast and not any(ip in block for block in _REFUSED_IPV4)


@functools.lru_cache(64)
def networks(blocks: tuple[str, ...]) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """The CIDR blocks of ``--allow-network``. Raises ``UsageError`` for what is none."""
    found = []
    for block in blocks:
        try:
            found.append(ipaddress.ip_network(block))
        except ValueError as error:
            raise UsageError(
                f"--allow-network {block!r} is not a CIDR block ({error}). Give one like 10.0.0.0/8 or fd00::/8."
            ) from None
    return tuple(found)


@functools.lru_cache(64)
def servers(dns_servers: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Address and port of each of ``--dns-servers``. Raises ``UsageError`` for what is none."""
    found = []
    for server in dns_servers:
        bracketed = re.fullmatch(r"\[([^]]+)\](?::(\d+))?", server)
        plain = re.fullmatch(r"([^:]+)(?::(\d+))?", server)
        match = bracketed or plain
        address, port = (match[1], int(match[2] or DNS_PORT)) if match else (server, DNS_PORT)
        try:
            found.append((str(ipaddress.ip_address(address)), port))
            if not 0 < port < 1 << 16:
                raise ValueError
        except ValueError:
            raise UsageError(
                f"--dns-servers {server!r} is not an address. Give one like 1.1.1.1, 127.0.0.1:5353 or [fd00::1]:53."
            ) from None
    return tuple(found)


def forget() -> None:
    """Empties this process' memory of answers."""
    _resolved.clear()


def _resolve(host: str, dns_servers: tuple[str, ...], deadline: float) -> Answer[_Resolved]:
    if is_literal(host):
        resolved = _Resolved((host,))
    else:
        resolved = _ask_servers(host, dns_servers, deadline) if dns_servers else _ask_system(host)
    return Answer(resolved, 0 if resolved.temporary else KEEP_MISSING_S if resolved.failure else KEEP_FOUND_S)


def _ask_system(host: str) -> _Resolved:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        return _Resolved((), error.strerror or "not resolved", temporary=error.errno not in _FINAL_DNS_ERRORS)
    except (OSError, UnicodeError) as error:
        return _Resolved((), str(error))
    return _Resolved(tuple(dict.fromkeys(str(entry[4][0]) for entry in found)))


def _ask_servers(host: str, dns_servers: tuple[str, ...], deadline: float) -> _Resolved:
    """Asks the servers in turn, another one first for another host; the next where one is silent or fails."""
    import dns.exception
    import dns.name
    import dns.resolver

    resolver = _resolver(dns_servers, draws.integer(len(dns_servers), 0, "dns_server", 0, host))
    name = dns.name.from_text(host + ".")
    longest_s = DNS_SERVER_TIMEOUT_S * (len(dns_servers) + 1)
    found: dict[str, list[str]] = {"A": [], "AAAA": []}
    failure = ""
    for kind in found:
        lifetime_s = max(0.01, min(longest_s, deadline - time.monotonic()))
        try:
            answer = resolver.resolve(name, kind, lifetime=lifetime_s, search=False, raise_on_no_answer=False)
            found[kind] = [record.address for record in answer]
        except (dns.resolver.NXDOMAIN, dns.resolver.YXDOMAIN):
            return _Resolved((), "the name does not exist")
        except (dns.resolver.NoNameservers, dns.exception.Timeout) as error:
            failure = "no DNS server answered" if isinstance(error, dns.exception.Timeout) else "the DNS servers failed"
    # In turns, so that both kinds are among the first few: only these are dialled.
    addresses = tuple(filter(None, itertools.chain(*itertools.zip_longest(*found.values()))))
    if addresses:
        return _Resolved(addresses)
    return _Resolved((), failure or "the name has no address", temporary=bool(failure))


@functools.lru_cache(64)
def _resolver(dns_servers: tuple[str, ...], first: int) -> dns.resolver.Resolver:
    import dns.nameserver
    import dns.resolver

    places = servers(dns_servers)
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers = [
        dns.nameserver.Do53Nameserver(address, port) for address, port in places[first:] + places[:first]
    ]
    resolver.timeout = DNS_SERVER_TIMEOUT_S
    return resolver
