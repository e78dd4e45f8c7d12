"""Which hosts and addresses may be dialled, with a real DNS server where names are resolved."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from webmaker import Dns

from clips_data import addresses
from clips_data.addresses import Refused, canonical_host, is_allowed
from clips_data.errors import UsageError

LOOPBACK = ("127.0.0.0/8",)


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    addresses.forget()
    yield
    addresses.forget()


def resolve(host: str, *servers: str, allow: tuple[str, ...] = LOOPBACK, seconds: float = 10) -> tuple[str, ...]:
    return addresses.allowed_addresses(host, allow, servers, time.monotonic() + seconds)


def refusal(host: str, *servers: str, allow: tuple[str, ...] = (), seconds: float = 10) -> Refused:
    with pytest.raises(Refused) as caught:
        resolve(host, *servers, allow=allow, seconds=seconds)
    return caught.value


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.255.255.254", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "100.100.100.200", "0.0.0.0", "0.1.2.3", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255",
        "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "168.63.129.16",
        "::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "ff0e::1", "100::1", "2001:db8::1",
        "3fff::1", "5f00::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::ffff:0:8.8.8.8", "::8.8.8.8",
        "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:808:808::",
        "2001:0:7f00:1::", "2001:0:808:808::1", "2001:20::1", "fe80::1%eth0",
    ],
)  # fmt: skip
def test_non_public_and_embedding_addresses_are_not_allowed(address: str) -> None:
    assert not is_allowed(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "2a00:1450::1"])
def test_public_addresses_are_allowed(address: str) -> None:
    assert is_allowed(address)


def test_a_named_network_allows_its_own_addresses_and_no_other_spelling_of_them() -> None:
    assert is_allowed("127.0.0.1", LOOPBACK)
    assert is_allowed("fd00::7", ("10.0.0.0/8", "fd00::/8"))
    assert not is_allowed("10.0.0.1", LOOPBACK)
    assert not is_allowed("::ffff:127.0.0.1", LOOPBACK)
    assert not is_allowed("64:ff9b::7f00:1", LOOPBACK)
    assert is_allowed("64:ff9b::7f00:1", ("64:ff9b::/96",))


@pytest.mark.parametrize(
    "host",
    [
        "2130706433", "0x7f000001", "017700000001", "0x7f.1", "0x7f.0.0.1", "0177.0.0.1", "127.1", "127.0.1", "0", "1",
        "127.0.0.01", "127.0.0.1.1", "256.1.1.1", "8.8.8.0x8", "example.0x7f", "fe80::1%eth0", "fe80::1%25eth0",
        "2606:2800::1%1", "134744072",
    ],
)  # fmt: skip
def test_unusual_spellings_of_addresses_are_refused_before_anything_resolves_them(host: str) -> None:
    with pytest.raises(Refused) as caught:
        canonical_host(host)
    assert caught.value.code == "blocked_address"
    assert not caught.value.retry


@pytest.mark.parametrize(
    "host",
    [
        "127%2e0%2e0%2e1", "exa mple.org", "a..b", ".example.org", "", "exämple\u0000.org", "a" * 64 + ".org",
        "x." * 127 + "long", "host\r\nX: y", "a/b", "::g", "1::2::3", "<script>", "${jndi}", "\ud800.org",
    ],
)  # fmt: skip
def test_what_is_no_host_is_a_bad_url(host: str) -> None:
    with pytest.raises(Refused) as caught:
        canonical_host(host)
    assert caught.value.code == "bad_url"


@pytest.mark.parametrize(
    ("host", "canonical"),
    [
        ("EXAMPLE.org", "example.org"),
        ("example.org.", "example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("\uff45xample\u3002org", "example.org"),
        ("my_bucket.example-cdn.net", "my_bucket.example-cdn.net"),
        ("127.0.0.1.", "127.0.0.1"),
        ("\uff11\uff12\uff17.0.0.1", "127.0.0.1"),
        ("\u2460\u2461\u2466.0.0.1", "127.0.0.1"),
        ("8.8.8.8", "8.8.8.8"),
        ("2606:2800:0220::1", "2606:2800:220::1"),
        ("0:0:0:0:0:ffff:7f00:1", "::ffff:7f00:1"),
        ("1.example", "1.example"),
    ],
)
def test_a_host_has_one_spelling(host: str, canonical: str) -> None:
    assert canonical_host(host) == canonical


def test_literal_addresses_are_checked_without_a_resolver() -> None:
    assert resolve("127.0.0.1") == ("127.0.0.1",)
    assert refusal("127.0.0.1").code == "blocked_address"
    assert refusal("::ffff:7f00:1", allow=LOOPBACK).code == "blocked_address"


def test_localhost_is_loopback_for_the_systems_resolver() -> None:
    assert refusal("localhost").code == "blocked_address"
    assert "127.0.0.1" in resolve("localhost")


def zone(name: str, kind: str) -> list[str] | str:
    known: dict[str, dict[str, list[str] | str]] = {
        "both.test": {"A": ["93.184.216.34"], "AAAA": ["2606:2800::1"]},
        "private.test": {"A": ["10.0.0.1"], "AAAA": ["fd00::1"]},
        "mixed.test": {"A": ["10.0.0.1", "127.0.0.1", "93.184.216.34"], "AAAA": ["::1"]},
        "mapped.test": {"A": [], "AAAA": ["::ffff:93.184.216.34", "64:ff9b::5db8:d822"]},
        "many.test": {"A": ["8.8.8.1", "8.8.8.2", "8.8.8.3"], "AAAA": ["2606:2800::1"]},
        "six.test": {"A": [], "AAAA": ["2606:2800::1"]},
        "half.test": {"A": ["93.184.216.34"], "AAAA": "SERVFAIL"},
        "broken.test": {"A": "SERVFAIL", "AAAA": "SERVFAIL"},
        "silent.test": {"A": "silence", "AAAA": "silence"},
        "empty.test": {"A": [], "AAAA": []},
    }
    return known.get(name, {}).get(kind, "NXDOMAIN")


@pytest.fixture
def dns() -> Iterator[Dns]:
    with Dns(zone).serve() as server:
        yield server


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("both.test", ("93.184.216.34", "2606:2800::1")),
        ("mixed.test", ("93.184.216.34",)),
        ("six.test", ("2606:2800::1",)),
        ("half.test", ("93.184.216.34",)),
    ],
)
def test_a_resolver_of_ones_own_is_asked_and_only_allowed_answers_count(
    dns: Dns, host: str, allowed: tuple[str, ...]
) -> None:
    assert resolve(host, dns.place, allow=()) == allowed


def test_both_kinds_of_addresses_are_among_the_first(dns: Dns) -> None:
    found = resolve("many.test", dns.place, allow=())
    assert found[1] == "2606:2800::1"
    assert len(found) == 4


@pytest.mark.parametrize(
    ("host", "code", "retry"),
    [
        ("private.test", "blocked_address", False),
        ("mapped.test", "blocked_address", False),
        ("missing.test", "dns", False),
        ("empty.test", "dns", False),
        ("broken.test", "dns", True),
    ],
)
def test_what_a_resolver_refuses_gets_its_code_and_only_helpful_retries(
    dns: Dns, host: str, code: str, retry: bool
) -> None:
    refused = refusal(host, dns.place)
    assert (refused.code, refused.retry) == (code, retry)


def test_a_silent_resolver_ends_at_the_deadline(dns: Dns) -> None:
    refused = refusal("silent.test", dns.place, seconds=0.3)
    assert (refused.code, refused.retry) == ("dns", True)


def test_the_next_resolver_is_asked_when_one_is_silent_fails_or_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "DNS_SERVER_TIMEOUT_S", 0.2)
    with (
        Dns(lambda name, kind: "silence").serve() as silent,
        Dns(lambda name, kind: "SERVFAIL").serve() as failing,
        Dns(zone).serve() as good,
    ):
        for server in (silent.place, failing.place, "127.0.0.1:9"):
            addresses.forget()
            assert resolve("both.test", server, good.place, allow=())[0] == "93.184.216.34"


def test_hosts_are_spread_over_the_resolvers() -> None:
    one, other = Dns(zone), Dns(zone)
    with one.serve(), other.serve():
        for number in range(40):
            refusal(f"host{number}.test", one.place, other.place)
    asked = [len({name for name, _ in server.asked}) for server in (one, other)]
    assert sum(asked) == 40
    assert min(asked) >= 10


def test_a_name_is_asked_once_also_by_many_threads_and_a_failure_that_may_pass_is_asked_again(dns: Dns) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: resolve("both.test", dns.place, allow=()), range(64)))
    assert set(found) == {("93.184.216.34", "2606:2800::1")}
    assert dns.asked == {("both.test", "A"): 1, ("both.test", "AAAA"): 1}
    for _ in range(2):
        refusal("missing.test", dns.place)
        refusal("broken.test", dns.place)
    assert dns.asked["missing.test", "A"] == 1
    assert dns.asked["broken.test", "A"] == 2


def test_a_thread_that_waits_for_anothers_question_keeps_its_own_deadline(dns: Dns) -> None:
    patient = threading.Thread(target=lambda: refusal("silent.test", dns.place, seconds=1.5))
    patient.start()
    while not dns.asked:
        time.sleep(0.005)
    with pytest.raises(TimeoutError):
        resolve("silent.test", dns.place, seconds=0.1)
    patient.join()


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch, dns: Dns) -> None:
    monkeypatch.setattr(addresses, "_resolved", addresses.OnceCache(10))
    for number in range(50):
        refusal(f"missing{number}.test", dns.place)
    refusal("missing49.test", dns.place)
    refusal("missing0.test", dns.place)
    assert dns.asked["missing49.test", "A"] == 1
    assert dns.asked["missing0.test", "A"] == 2


@pytest.mark.parametrize("block", ["10.0.0.0/33", "10.0.0.1/8", "everything", ""])
def test_a_network_that_is_none_is_one_sentence(block: str) -> None:
    with pytest.raises(UsageError, match="is not a CIDR block"):
        addresses.networks((block,))


@pytest.mark.parametrize("server", ["dns.google", "1.1.1.1:x", "1.1.1.1:99999", "", "[::1", "1.1.1"])
def test_a_resolver_that_is_no_address_is_one_sentence(server: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        addresses.servers((server,))


def test_resolvers_may_name_a_port() -> None:
    named = ("1.1.1.1", "127.0.0.1:5353", "[fd00::1]:54", "[::1]", "2606:4700::1111")
    assert addresses.servers(named) == (
        ("1.1.1.1", 53), ("127.0.0.1", 5353), ("fd00::1", 54), ("::1", 53), ("2606:4700::1111", 53),
    )  # fmt: skip
