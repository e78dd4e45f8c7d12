"""Turns at a host and the connections that are kept to it, with real threads and sockets."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from webmaker import Web, reply

from clips_data import hosts, wire
from clips_data.hosts import IdleConnections, Turns


def run_threads(number: int, work: Callable[[int], object]) -> None:
    with ThreadPoolExecutor(number) as pool:
        list(pool.map(work, range(number)))


def test_a_host_never_has_more_requests_than_it_may_and_another_host_does_not_wait_for_it() -> None:
    turns, lock = Turns(), threading.Lock()
    running, most, elsewhere = 0, 0, threading.Event()

    def ask(number: int) -> None:
        nonlocal running, most
        with turns.turn("slow.test", 3, 0):
            with lock:
                running += 1
                most = max(most, running)
            assert elsewhere.wait(10)
            time.sleep(0.002)
            with lock:
                running -= 1

    def ask_another() -> None:
        with turns.turn("other.test", 1, 0):
            elsewhere.set()

    threading.Timer(0.1, ask_another).start()
    run_threads(24, ask)
    assert most == 3


def test_who_waits_first_is_served_first() -> None:
    turns, order, waiting = Turns(), list[int](), list[threading.Thread]()

    def ask(number: int) -> None:
        with turns.turn("narrow.test", 1, 0):
            order.append(number)

    with turns.turn("narrow.test", 1, 0):
        for number in range(8):
            waiting.append(threading.Thread(target=ask, args=(number,)))
            waiting[-1].start()
            while len(turns._hosts["narrow.test"].waiting) <= number:
                time.sleep(0.001)
    for thread in waiting:
        thread.join()
    assert order == list(range(8))
    assert turns._hosts["narrow.test"].running == 0


def test_requests_to_one_host_keep_their_distance() -> None:
    turns, starts, lock = Turns(), [], threading.Lock()

    def ask(number: int) -> None:
        with turns.turn("spaced.test", 16, 0.05), lock:
            starts.append(time.monotonic())

    run_threads(6, ask)
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert min(gaps) >= 0.045
    with turns.turn("free.test", 16, 0) as free:
        assert free.state.next_start <= time.monotonic(), "another host's spacing keeps nobody waiting"


def test_a_busy_host_is_left_alone_by_all_threads_for_as_long_as_it_asks() -> None:
    turns, starts, lock = Turns(), [], threading.Lock()
    with turns.turn("busy.test", 16, 0) as turn:
        turn.pause(0.3, max_wait_s=10)
        paused_at = time.monotonic()

    def ask(number: int) -> None:
        with turns.turn("busy.test", 16, 0), lock:
            starts.append(time.monotonic())

    run_threads(8, ask)
    assert min(starts) >= paused_at + 0.29


def test_a_pause_is_capped_and_grows_while_the_host_stays_busy_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(hosts.time, "monotonic", lambda: clock)
    turns = Turns()

    def pause(asked_s: float | None) -> float:
        nonlocal clock
        with turns.turn("busy.test", 16, 0) as turn:
            turn.pause(asked_s, max_wait_s=60)
            waited = turn.state.paused_until - clock
        clock = turn.state.paused_until
        return waited

    assert pause(5000.0) == 60
    with turns.turn("busy.test", 16, 0):
        pass
    pauses = [pause(None) for _ in range(10)]
    for number, seconds in enumerate(pauses):
        assert min(60, 0.25 * 2**number) <= seconds <= min(60, 0.75 * 2**number)
    with turns.turn("busy.test", 16, 0):
        pass
    assert pause(None) < 0.76


def test_back_off_is_drawn_from_its_key_and_not_from_chance() -> None:
    assert hosts.back_off_s(2, "http://a/1") == hosts.back_off_s(2, "http://a/1")
    drawn = {hosts.back_off_s(0, f"http://a/{number}") for number in range(100)}
    assert len(drawn) == 100
    assert 0.25 <= min(drawn) < 0.3 < 0.7 < max(drawn) < 0.75
    assert hosts.back_off_s(10**6, "x") < 10**6


def test_a_turn_ends_with_its_request_also_when_that_fails() -> None:
    turns = Turns()
    for _ in range(3):
        with pytest.raises(OSError), turns.turn("a.test", 1, 0):
            raise OSError
    with turns.turn("a.test", 1, 0):
        pass


def test_hosts_are_forgotten_when_there_are_many_but_not_those_in_use_or_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosts, "MAX_HOSTS", 50)
    turns = Turns()
    with turns.turn("paused.test", 1, 0) as turn:
        turn.pause(100, 100)
    with turns.turn("used.test", 1, 0):
        for number in range(500):
            with turns.turn(f"host{number}.test", 1, 0):
                pass
        assert {"paused.test", "used.test", "host499.test"} <= set(turns._hosts)
        assert len(turns._hosts) <= 53


# --- kept connections -------------------------------------------------------------------------------------------------


@pytest.fixture
def web() -> Iterator[Web]:
    def answer(path: str, head: str) -> bytes:
        if path == "/close":
            return reply(200, b"x", Connection="close")
        return reply(404 if path == "/missing" else 200, b"y" * (200_000 if path == "/large" else 10))

    with Web(answer).serve() as server:
        yield server


def connect(web: Web, path: str, *, read: bool = True) -> wire.Connection:
    deadline = time.monotonic() + 5
    connection = wire.Connection(("127.0.0.1", web.port), deadline)
    connection.ask(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), deadline)
    if read:
        connection.read_body(1 << 20, deadline)
    return connection


def test_a_connection_whose_answer_was_read_is_kept_for_the_same_place_only(web: Web) -> None:
    idle = IdleConnections()
    connection = connect(web, "/")
    idle.give_back("here", connection)
    assert idle.take("there") is None
    assert idle.take("here") is connection
    assert idle.take("here") is None


@pytest.mark.parametrize(
    ("path", "read", "kept"), [("/missing", False, True), ("/large", False, False), ("/close", True, False)]
)
def test_a_small_rest_is_read_and_a_large_one_or_a_closing_server_ends_the_connection(
    web: Web, path: str, read: bool, kept: bool
) -> None:
    idle = IdleConnections()
    idle.give_back("here", connect(web, path, read=read))
    assert (idle.take("here") is not None) == kept


def test_a_connection_that_the_server_has_closed_or_that_is_too_old_is_not_taken(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = IdleConnections()
    with Web(lambda path, head: reply(200, b"x")).serve() as short_lived:
        connection = connect(short_lived, "/")
        idle.give_back("here", connection)
        connection._socket.shutdown(2)  # as if the server had hung up
    assert idle.take("here") is None
    idle.give_back("here", connect(web, "/"))
    monkeypatch.setattr(hosts, "MAX_IDLE_S", 0.0)
    assert idle.take("here") is None


def test_the_number_of_kept_connections_is_bounded(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "MAX_IDLE", 4)
    idle = IdleConnections()
    connections = [connect(web, "/") for _ in range(7)]
    for number, connection in enumerate(connections):
        idle.give_back(number % 3, connection)
    assert sum(connection._socket.fileno() >= 0 for connection in connections) == 4
    idle.close()
    assert all(connection._socket.fileno() < 0 for connection in connections)
